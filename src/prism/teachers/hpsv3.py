"""HPSv3: Qwen2-VL-7B with a head that gives the mean and the deviation of people's preference for a picture.

Facts from MizzenAI/HPSv3, package hpsv3 1.0.0 (MIT): the question (prompts/hpsv3.txt), pictures of 256 tokens, the
head's layers, one special token. HPSv3 judges pictures; the choice and the mean of frames are PRISM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from prism import files
from prism.errors import PrismError, whole
from prism.teachers import frames, prompts, qwen, weights

WEIGHTS, BASE = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"
TOKENS = ("<|Reward|>",)
_PIXELS = 256 * 28 * 28


class HPSv3:
    """The mean of a video's frames' scores, "preference": the higher the better, about -10 to 15 as published.

    Args:
        count: frames that are looked at, evenly spread from the first to the last.
    """

    name = "hpsv3"
    dimensions = ("preference",)

    def __init__(self, scorer: qwen.Scorer, reader: qwen.Reader, count: int = 8) -> None:
        self.scorer, self.reader, self.count = scorer, reader, whole("frames of hpsv3", count)

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, base: str | None = None, device: str | None = None,
        dtype: str | None = None, count: int = 8,
    ) -> HPSv3:  # fmt: skip
        """Load HPSv3.safetensors from a folder or a repository of the Hub.

        Args:
            base: folder or repository with the configuration and tokenizer of Qwen2-VL-7B-Instruct (its weights are
                not needed); by default the folder itself where it has a config.json.
        """
        folder = weights.folder(source, revision)
        device, kind = weights.chosen(device, dtype)
        state = weights.tensors(folder, ("HPSv3.safetensors", "model.safetensors"))
        if state is None:
            raise PrismError(f"The folder {files.shown(folder)} has no HPSv3.safetensors; download it from {WEIGHTS}.")
        foundation = folder if base is None and (folder / "config.json").is_file() else None
        foundation = foundation or weights.base(base or BASE, ("*.json", "*.txt", "*.jinja"))
        width = state["rm_head.0.weight"].shape[1] if "rm_head.0.weight" in state else 1
        head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        return cls(*qwen.scorer(foundation, state, head, TOKENS, kind, device, folder), count)

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """The preference for videos (T, H, W, 3) of uint8; `fps` is not needed."""
        return [{"preference": float(each[:, 0].mean())} for each in self.moments(videos, prompts)]

    __call__ = score

    def moments(self, videos: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Tensor]:
        """Mean and deviation of each frame's score, (frames, 2) for each video, as the model gives them."""
        frames.check(videos, prompts, self.name)
        moments = []
        for video, prompt in zip(videos, prompts):
            chosen = frames.some(video, self.count)
            size = frames.fitted(video.shape[1:3], _PIXELS, _PIXELS, self.reader.factor)
            pixels = frames.resized(chosen, *size)
            inputs = self.reader.inputs(question(prompt), pixels, "image", rows=len(pixels))
            moments.append(self.scorer(inputs)[:, 0].cpu())
        return moments


def question(prompt: str) -> str:
    """The published question about a picture of this prompt."""
    return prompts.filled("hpsv3", qwen.harmless(prompt))
