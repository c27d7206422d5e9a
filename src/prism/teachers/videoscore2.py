"""VideoScore2: Qwen2.5-VL that reasons, then writes three scores, each weighted by how sure the model was of it.

Facts from TIGER-AI-Lab/VideoScore2 at e6abe26, vs2_inference.py (model under Apache 2.0): the question
(prompts/videoscore2.txt), two frames per second, answers drawn at temperature 0.7, and the published soft score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from prism.teachers import answers, frames, prompts, qwen

WEIGHTS = "TIGER-Lab/VideoScore2"
_PATTERN = re.compile(
    r"visual quality:\s*(\d+).*?text-to-video alignment:\s*(\d+).*?physical/common-sense consistency:\s*(\d+)",
    re.DOTALL | re.IGNORECASE | re.ASCII,
)
_GRADES = range(1, 6)


class VideoScore2:
    """Scores of visual quality, text alignment and physical consistency, above 0 and up to 5.

    A score is the likeliest grade, from 1 to 5, times its probability among the five grades at the token where the
    model writes the grade. By this published rule a sure 2 (2.0) may score above an unsure 3 (from 0.6).

    Args:
        seed: of the draws of the answer. The same video and prompt have the same answer.

    Attributes:
        unread: answers without three grades so far; their videos have NaN scores.
    """

    name = "videoscore2"
    dimensions = ("visual_quality", "text_alignment", "physical_consistency")
    needs_fps = True
    lowest = 0.0

    def __init__(self, writer: answers.Writer, seed: int = 0) -> None:
        self.writer, self.seed, self.unread = writer, seed, 0

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, device: str | None = None, dtype: str | None = None,
        seed: int = 0,
    ) -> VideoScore2:  # fmt: skip
        """Load from a folder or a repository of the Hub."""
        return cls(answers.Writer.load(source, revision, device, dtype), seed)

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """Scores of videos (T, H, W, 3) of uint8 with two frames or more, at `fps`. NaN where an answer is unclear."""
        frames.check(videos, prompts, self.name, least=2)
        rows = []
        for video, prompt in zip(videos, prompts):
            chosen = frames.by_time(len(video), frames.rate(fps, self.name))
            size = frames.fitted(video.shape[1:3], qwen.LEAST_PIXELS, qwen.MOST_PIXELS, self.writer.reader.factor)
            answer = self.writer.write(
                question(prompt), frames.resized(video[chosen], *size), "video", 1024, 0.5, 0.7, self.seed
            )
            values = soft(answer)
            self.unread += values is None
            rows.append(dict(zip(self.dimensions, values)) if values else answers.missing(self.dimensions))
        return rows

    __call__ = score


def question(prompt: str) -> str:
    """The published question about a video of this prompt."""
    return prompts.filled("videoscore2", qwen.harmless(prompt))


def soft(answer: answers.Answer) -> list[float] | None:
    """The three soft scores of an answer; None where it does not have three grades from 1 to 5.

    Each is read at the token that writes the grade. The published code takes the first digit after the first mention of
    the dimension, which is the same token unless the reasoning mentions the dimension with a colon.
    """
    written = answer.written()
    match = _PATTERN.search(written)
    if match is None or not all(int(grade) in _GRADES for grade in match.groups()):
        return None
    ids = [answer.tokenizer.encode(str(grade), add_special_tokens=False) for grade in _GRADES]
    single = [(grade, each[0]) for grade, each in zip(_GRADES, ids) if len(each) == 1]
    values = []
    for group in (1, 2, 3):
        scores = answer.scores[answer.token_at(match.start(group))]
        shares = torch.softmax(scores[[token for _, token in single]], 0)
        best = int(shares.argmax())
        value = single[best][0] * float(shares[best])
        if not np.isfinite(value):  # none of the grades could be drawn there
            return None
        values.append(value)
    return values
