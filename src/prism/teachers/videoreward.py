"""VideoReward (VideoAlign): Qwen2-VL-2B with a reward head for visual quality, motion quality and text alignment.

Facts from KwaiVGI/VideoAlign at 219ab9d (MIT, Kling Team of Kuaishou): the question is its template
"detailed_special" to the letter (prompts/videoreward.txt), frames and sizes are those of its vision_process.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from prism import files
from prism.errors import PrismError, number, quoted, whole
from prism.teachers import frames, prompts, qwen, weights

WEIGHTS = "KwaiVGI/VideoReward"
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")


class VideoReward:
    """Scores of a video for a prompt: VQ, MQ and TA, each normalised by the mean and deviation in model_config.json.

    Frames: two per second (`fps` in the folder's configuration), at least 4, evenly spread, each with at most
    `max_frame_pixels`. Scores have no fixed range; over VideoAlign's videos their mean is about 0 and their deviation
    about 1.
    """

    name = "videoreward"
    dimensions = ("VQ", "MQ", "TA")
    needs_fps = True

    def __init__(self, scorer: qwen.Scorer, reader: qwen.Reader, config: Mapping[str, Any]) -> None:
        self.scorer, self.reader, self.config = scorer, reader, dict(config)

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, base: str | None = None, device: str | None = None,
        dtype: str | None = None,
    ) -> VideoReward:  # fmt: skip
        """Load from a folder, or a repository of the Hub, with model_config.json and checkpoint-N.

        Args:
            base: folder or repository of the Qwen2-VL that was fine-tuned; by default the folder itself where it has a
                config.json, or else what model_config.json names.
        """
        folder = weights.folder(source, revision)
        config = described(folder / "model_config.json")
        checkpoint = _latest(folder)
        foundation = folder if base is None and (folder / "config.json").is_file() else None
        foundation = foundation or weights.base(base or config["base"])
        device, kind = weights.chosen(device, dtype)

        state = weights.tensors(checkpoint)
        if state is None:
            adapter = weights.tensors(checkpoint, ("adapter_model.safetensors",))
            rest = weights.tensors(checkpoint, ("non_lora_state_dict.safetensors",))
            if adapter is None or rest is None:
                raise PrismError(
                    f"The folder {files.shown(checkpoint)} holds neither model.safetensors nor "
                    "adapter_model.safetensors with non_lora_state_dict.safetensors; where there are .pth files, "
                    f"{weights.CONVERT}."
                )
            state = {**_foundation(foundation), **rest, **adapter}  # trained weights replace the base's
        state = {qwen.current(name): value for name, value in weights.plain(state).items()}
        state = weights.merged(state, config["rank"], config["alpha"], config["rslora"], checkpoint)
        head = state.get("rm_head.weight")
        width = 1 if head is None else head.shape[1]
        linear = nn.Linear(width, len(TOKENS), bias=False, device="meta")
        return cls(*qwen.scorer(foundation, state, linear, TOKENS, kind, device, checkpoint), config)

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """VQ, MQ and TA of videos (T, H, W, 3) of uint8 with at least two frames, at `fps` frames a second."""
        frames.check(videos, prompts, self.name, least=2)
        return [self._one(video, prompt, frames.rate(fps, self.name)) for video, prompt in zip(videos, prompts)]

    __call__ = score

    def _one(self, video: np.ndarray, prompt: str, fps: float) -> dict[str, float]:
        count = self.config["num_frames"]
        if count is None:
            chosen = video[frames.by_time(len(video), fps, self.config["fps"], floor=False)]
        else:
            chosen = video[frames.spread(len(video), min(round(count / 2) * 2, len(video)))]
        size = frames.fitted(
            video.shape[1:3], qwen.LEAST_PIXELS, self.config["max_frame_pixels"], self.reader.factor
        )  # fmt: skip
        inputs = self.reader.inputs(question(prompt), frames.resized(chosen, *size), "video")
        output = self.scorer(inputs)[0].diagonal()  # output i at token i
        means, deviations = self.config["mean"], self.config["std"]
        return {
            dimension: (float(value) - means[dimension]) / deviations[dimension]
            for dimension, value in zip(self.dimensions, output)
        }


def question(prompt: str) -> str:
    """The published question about a video of this prompt."""
    return prompts.filled("videoreward", qwen.harmless(prompt))


def described(path: Path) -> dict[str, Any]:
    """The settings in a model_config.json for frames, base model, adapter and statistics, checked."""
    config = files.read_json(path)

    def part(name: str, default: Any = None) -> dict[str, Any]:
        value = config.get(name, default) if isinstance(config, dict) else None
        if not isinstance(value, dict):
            raise PrismError(f"The file {files.shown(path)} has no object {name}; it is no VideoReward's.")
        return value

    data, model = part("data_config"), part("model_config")
    lora, statistics = part("peft_lora_config", {}), part("inference_config", {})
    for values, name, needed, default in (
        (data, "prompt_template_type", "detailed_special", "none"),
        (data, "sample_type", "uniform", "uniform"),
        (model, "output_dim", 3, 1),
        (model, "use_special_tokens", True, False),
    ):
        if values.get(name, default) != needed:
            raise PrismError(
                f"The file {files.shown(path)} has {name} {quoted(values.get(name, default), 60)}; only {needed} is "
                "read, which the published VideoReward has."
            )
    base = model.get("model_name_or_path")
    if not isinstance(base, str):
        raise PrismError(f"The file {files.shown(path)} names no base model (model_name_or_path).")
    count = data.get("num_frames")
    return {
        "base": base,
        "fps": number(f"{path}: fps", data.get("fps", 2.0), 0, 1000, above=True),
        "num_frames": None if count is None else int(number(f"{path}: num_frames", count, 2, 768)),
        "max_frame_pixels": whole(f"{path}: max_frame_pixels", data.get("max_frame_pixels", 240 * 320), 28 * 28),
        "rank": whole(f"{path}: lora_r", lora.get("lora_r", 16)),
        "alpha": number(f"{path}: lora_alpha", lora.get("lora_alpha", 32)),
        "rslora": bool(lora.get("use_rslora", False)),
        "mean": {
            name: number(f"{path}: {name}_mean", statistics.get(f"{name}_mean", 0.0)) for name in VideoReward.dimensions
        },
        "std": {
            name: number(f"{path}: {name}_std", statistics.get(f"{name}_std", 1.0), 0, above=True)
            for name in VideoReward.dimensions
        },
    }


def _latest(folder: Path) -> Path:
    """The checkpoint-N of the largest N in a folder, or the folder itself."""
    numbered = [
        (int(each.name[11:]), each) for each in folder.glob("checkpoint-*") if re.fullmatch(r"\d+", each.name[11:])
    ]
    return max(numbered)[1] if numbered else folder


def _foundation(folder: Path) -> dict[str, Any]:
    """The base model's state, which an adapter is added to."""
    state = weights.tensors(folder)
    if state is None:
        raise PrismError(f"The base model in {files.shown(folder)} has no model.safetensors, which an adapter needs.")
    return {qwen.current(name): value for name, value in state.items()}
