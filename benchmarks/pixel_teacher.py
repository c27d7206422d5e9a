"""ShapeWorld's pixel judge as a reward function, for `prism collect --reward benchmarks/pixel_teacher.py:PixelTeacher`.

A teacher with faults of its own: it sees decoded frames, and was trained on the pairs that ship with PRISM.
"""

from __future__ import annotations

import numpy as np

from prism import shapeworld
from prism.lab.pixel import PixelJudge


class PixelTeacher:
    def __init__(self) -> None:
        self.judge = PixelJudge.from_pretrained(shapeworld.asset_folder("pixel"), shapeworld.pipeline())

    def __call__(self, videos: list[np.ndarray], prompts: list[str]) -> dict[str, list[float]]:
        scores = self.judge.score_videos(np.stack(videos), prompts)
        return {name: scores[:, column].tolist() for column, name in enumerate(self.judge.dimensions)}
