"""UnifiedReward: a Qwen2.5-VL (in version 2.0 also Qwen3-VL) that writes scores of a video.

Facts from CodeGoat24/UnifiedReward at ff6f520 (MIT): the questions (prompts/unifiedreward.txt and unifiedreward2.txt),
two frames per second as a video for the first version, 16 frames as pictures for 2.0, greedy answers. Of the first
version only the model on Qwen2.5-VL can be loaded: that on LLaVA-OneVision has no class in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism.errors import PrismError
from prism.teachers import answers, frames, prompts, qwen
from prism.teachers.answers import Label

WEIGHTS = "CodeGoat24/UnifiedReward-qwen-7b"
LABELS = {
    "1": {
        "visual_quality": Label("visual quality", 1, 4),
        "temporal_consistency": Label("temporal consistency", 1, 4),
        "dynamic_degree": Label("dynamic degree", 1, 4),
        "text_alignment": Label("text-to-video alignment", 1, 4),
        "factual_consistency": Label("factual consistency", 1, 4),
        "overall": Label("final score", 1, 10),
    },
    "2": {
        "alignment": Label("alignment score", 1, 5),
        "physics": Label("physics score", 1, 5),
        "style": Label("style score", 1, 5),
    },
}
_PICTURES = 16  # frames that 2.0 is shown


class UnifiedReward:
    """Scores that the model writes: five dimensions from 1 to 4 and "overall" from 1 to 10; in 2.0 three from 1 to 5.

    Args:
        version: "1" or "2"; it decides on question, frames and dimensions.

    Attributes:
        name: "unifiedreward"; for version 2 "unifiedreward2".
        unread: answers without a clear number for each dimension so far; their videos have NaN scores.
    """

    lowest = 1.0  # of any dimension

    def __init__(self, writer: answers.Writer, version: str = "1") -> None:
        if version not in LABELS:
            raise PrismError(f"The version of unifiedreward must be 1 or 2; found {version}.")
        self.writer, self.version, self.unread = writer, version, 0
        self.name = "unifiedreward" if version == "1" else "unifiedreward2"
        self.dimensions, self.needs_fps = tuple(LABELS[version]), version == "1"

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, device: str | None = None, dtype: str | None = None,
        version: str | None = None,
    ) -> UnifiedReward:  # fmt: skip
        """Load from a folder or a repository of the Hub.

        Args:
            version: by default 2 where the name of the source says 2.0, or else 1.
        """
        version = version or ("2" if "2.0" in source.rstrip("/").rpartition("/")[2] else "1")
        return cls(answers.Writer.load(source, revision, device, dtype), version)

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """Scores of videos (T, H, W, 3) of uint8; the first version needs `fps`. NaN where the answer is not clear."""
        frames.check(videos, prompts, self.name, least=2 if self.version == "1" else 1)
        rows = []
        for video, prompt in zip(videos, prompts):
            text = self._first(video, prompt, fps) if self.version == "1" else self._second(video, prompt)
            row = answers.labelled(text, LABELS[self.version])
            self.unread += row is None
            rows.append(row or answers.missing(self.dimensions))
        return rows

    __call__ = score

    def _first(self, video: np.ndarray, prompt: str, fps: float | None) -> str:
        rate = frames.rate(fps, self.name)
        chosen = frames.by_time(len(video), rate)
        size = frames.fitted(video.shape[1:3], qwen.LEAST_PIXELS, qwen.MOST_PIXELS, self.writer.reader.factor)
        pixels, seconds = frames.resized(video[chosen], *size), answers.frame_interval(chosen, len(video), rate)
        question = prompts.filled("unifiedreward", qwen.harmless(prompt))
        return self.writer.write(question, pixels, "video", 1024, seconds).text

    def _second(self, video: np.ndarray, prompt: str) -> str:
        chosen = [index * len(video) // _PICTURES for index in range(_PICTURES)]
        size = frames.fitted(video.shape[1:3], *self.writer.reader.limits, self.writer.reader.factor)
        pixels = frames.resized(video[list(dict.fromkeys(chosen))], *size)
        question = prompts.filled("unifiedreward2", qwen.harmless(prompt))
        return self.writer.write(question, pixels, "image", 4096).text
