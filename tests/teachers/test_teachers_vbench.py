"""VBench in another Python: what it is asked, how its results are read, what becomes of its failures.

The package asks for versions that cannot stand beside PRISM. A stand-in of its class, in a folder of the interpreter's
path, computes one dimension as VBench does and writes the file that VBench writes. PRISM_VBENCH names a Python with the
real one.
"""

from __future__ import annotations

import json
import math
import os
import sys

import numpy as np
import pytest
from tests.teachers import small_models

from prism import teachers
from prism.errors import PrismError

STAND_IN = """
import json, os
import numpy as np

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        os.makedirs(output_path, exist_ok=True)
        self.out = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        import av
        assert mode == "custom_input" and kwargs == {"imaging_quality_preprocessing_mode": "longer"}
        results = {}
        for dimension in dimension_list:
            rows = []
            for file in sorted(os.listdir(videos_path), reverse=True):  # in an order of its own
                path = os.path.join(videos_path, file)
                with av.open(path) as container:
                    decoded = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
                frames = [frame.astype(np.float32) for frame in decoded]
                change = float(np.mean([np.abs(a - b).mean() for a, b in zip(frames, frames[1:])]))
                value = {"temporal_flickering": (255 - change) / 255, "dynamic_degree": change > 20,
                         "imaging_quality": 50.0 + len(prompt_list[file])}[dimension]
                rows.append({"video_path": path, "video_results": value})
            results[dimension] = [0.5, rows]
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as file:
            json.dump(results, file)
"""


def stand_in(tmp_path, monkeypatch):
    package = tmp_path / "vbench"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def clips():
    still = np.repeat(small_models.clip(0, frames=1, height=48, width=64), 6, 0)
    return [small_models.clip(1, frames=6, height=48, width=64), still]


def test_vbench_scores_each_video_by_its_name(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch)
    names = "temporal_flickering+dynamic_degree+imaging_quality"
    teacher = teachers.load(f"vbench={sys.executable},dimensions={names},device=cpu")
    rows = teacher.score(clips(), ["a cat", "a \u00e9"], fps=8)
    assert [tuple(row) for row in rows] == [teacher.dimensions] * 2
    assert rows[0]["temporal_flickering"] < 0.8 < rows[1]["temporal_flickering"]
    assert [row["dynamic_degree"] for row in rows] == [1.0, 0.0]
    assert [row["imaging_quality"] for row in rows] == [0.55, 0.53]


@pytest.mark.skipif("PRISM_VBENCH" not in os.environ, reason="no Python with the package vbench is named")
def test_the_real_vbench_scores_flickering():
    teacher = teachers.load(f"vbench={os.environ['PRISM_VBENCH']},dimensions=temporal_flickering,device=cpu")
    moving, still = (row["temporal_flickering"] for row in teacher.score(clips(), ["a", "b"], fps=8))
    assert moving < 0.8 < 0.99 < still


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({}, "say nothing of single videos in temporal_flickering"),
        ({"temporal_flickering": [0.5]}, "say nothing of single videos"),
        ({"temporal_flickering": [0.5, [{"video_path": "a/v0.mp4", "video_results": 0.5}]]}, r"of v1\.mp4 must be"),
        ({"temporal_flickering": [0.5, [{"video_path": "v0.mp4", "video_results": math.nan}]]}, r"of v0\.mp4 must be"),
        ([], "say nothing of single videos"),
    ],
)
def test_results_that_lack_a_video_are_refused(tmp_path, results, words):
    (tmp_path / "results.json").write_text(json.dumps(results))
    teacher = teachers.load(f"vbench={sys.executable},dimensions=temporal_flickering")
    with pytest.raises(PrismError, match=words):
        teacher._read(tmp_path / "results.json", ["v0.mp4", "v1.mp4"])


def test_a_python_in_which_vbench_fails_is_refused(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vbench'\" >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(PrismError, match=r"No module named 'vbench'; the package vbench must run there"):
        teachers.load(f"vbench={program}").score(clips(), ["a", "b"], fps=8)
    for source in (tmp_path, tmp_path / "no-python"):
        with pytest.raises(PrismError, match="is no program"):
            teachers.load(f"vbench={source}")
    with pytest.raises(PrismError, match=r"A dimension of vbench must be one of .*; found color"):
        teachers.load("vbench,dimensions=color")
