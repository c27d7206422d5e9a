"""VBench's dimensions for any videos, computed by the package vbench in a Python environment of its own.

Facts from Vchitect/VBench, package vbench 0.1.5 (Apache 2.0): its mode "custom_input", the result of single videos in
each dimension, and their ranges. It needs transformers 4.33 and numpy 1, which exclude PRISM's; therefore another
interpreter runs it. It downloads its networks into ~/.cache/vbench, or VBENCH_CACHE_DIR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism import files, video
from prism.errors import PrismError, choice, number, quoted
from prism.teachers import frames, weights

QUALITY = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality",
)  # fmt: skip
DIMENSIONS = (*QUALITY, "temporal_style", "overall_consistency")
_PERCENT = "imaging_quality"  # VBench gives it from 0 to 100 for single videos, but from 0 to 1 for their mean
_RUN = """
import json, sys, torch
from vbench import VBench
with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
VBench(torch.device(request["device"]), None, request["out"]).evaluate(
    videos_path=request["videos"], name="prism", prompt_list=request["prompts"], dimension_list=request["dimensions"],
    mode="custom_input", imaging_quality_preprocessing_mode="longer",
)
"""


class VBench:
    """Scores from 0 to 1 in VBench's dimensions, higher is better; "dynamic_degree" is 0 or 1.

    Each call loads VBench's networks anew, so give it many videos at once: label a finished store.

    Args:
        python: interpreter that has the package vbench.
        dimensions: some of `DIMENSIONS`.
        device: as VBench takes it.
    """

    name = "vbench"
    needs_fps = True

    def __init__(self, python: str, dimensions: Sequence[str] = QUALITY, device: str = "cpu") -> None:
        for dimension in dimensions:
            choice("A dimension of vbench", dimension, DIMENSIONS)
        self.python, self.dimensions, self.device = python, tuple(dict.fromkeys(dimensions)), device

    @classmethod
    def load(
        cls, source: str = sys.executable, dimensions: str = "+".join(QUALITY), device: str | None = None
    ) -> VBench:
        """The teacher, run by a Python interpreter.

        Args:
            source: the interpreter, such as path/to/vbench-venv/bin/python.
            dimensions: names joined by "+".
        """
        if not os.access(source, os.X_OK) or Path(source).is_dir():
            raise PrismError(
                f"The teacher vbench needs the Python that has the package vbench; {quoted(source, 120)} is no "
                "program. Write vbench=path/to/venv/bin/python."
            )
        return cls(source, dimensions.split("+"), weights.chosen(device, None)[0])

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """Scores of videos (T, H, W, 3) of uint8 with two frames or more, at `fps`."""
        frames.check(videos, prompts, self.name, least=2)
        rate = frames.rate(fps, self.name)
        with tempfile.TemporaryDirectory(prefix="prism-vbench-") as scratch:
            folder, out = Path(scratch) / "videos", Path(scratch) / "out"
            folder.mkdir()
            names = [f"video{position}.mp4" for position in range(len(videos))]
            for name, each in zip(names, videos):
                video.write_video(folder / name, each, rate)
            request_file = Path(scratch) / "request.json"
            request = {"device": self.device, "out": str(out), "videos": str(folder), "dimensions": self.dimensions}
            request_file.write_text(json.dumps(request | {"prompts": dict(zip(names, prompts))}), encoding="utf-8")
            run = subprocess.run(
                [self.python, "-c", _RUN, str(request_file)],
                cwd=scratch,
                capture_output=True,
                text=True,
                errors="replace",
            )
            if run.returncode != 0:
                last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
                raise PrismError(
                    f"VBench failed in {files.shown(self.python)}: {quoted(last, 200).rstrip('.')}; the package vbench "
                    "must run there, in an environment of its own (docs/teachers.md)."
                )
            return self._read(out / "prism_eval_results.json", names)

    __call__ = score

    def _read(self, path: Path, names: Sequence[str]) -> list[dict[str, float]]:
        results = files.read_json(path)
        rows: list[dict[str, float]] = [{} for _ in names]
        for dimension in self.dimensions:
            scores: dict[str, Any] = {}
            try:
                for each in results[dimension][1]:
                    scores[Path(each["video_path"]).name] = each["video_results"]
            except (KeyError, IndexError, TypeError) as error:
                raise PrismError(f"VBench's results say nothing of single videos in {dimension}.") from error
            for row, name in zip(rows, names):
                value = scores.get(name)
                value = float(value) if isinstance(value, bool) else value  # dynamic_degree
                score = number(f"VBench's {dimension} of {name}", value)
                row[dimension] = score / 100 if dimension == _PERCENT else score
        return rows
