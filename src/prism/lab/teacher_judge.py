"""A published teacher as a judge of noisy latents, which it scores decoded: the pixel judges of the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.errors import PrismError, quoted
from prism.judge import Judge
from prism.lab.pixel import ROWS, checked_prompts, decode
from prism.teachers import Teacher


class TeacherJudge:
    """Scores noisy latents by a teacher's verdict on the frames that the VAE makes of them, as if they were clean.

    `prism.evaluation.measure(TeacherJudge(...), store)` gives a row of Table 1: accuracy at each of its noise levels,
    on the same noise as any other judge. A pair of equal scores counts as wrong, as in VideoAlign's evaluator; a
    teacher with few grades can therefore fall below one half.

    Args:
        backbone: whose VAE decodes: a diffusers pipeline or a `Backbone`.
        teacher: of `prism.teachers.load`, or any object with its `name`, `dimensions` and `score`.
        dimensions: dimension of the store -> the teacher's dimension, or several, which are added up; by default the
            teacher's names. For VideoReward, whose dimensions are VQ, MQ and TA, its "Overall" is {"overall": ("VQ",
            "MQ", "TA")}.
        fps: frames per second of the store's videos, for teachers that sample by time.
        frames: decodes latents as `prism.lab.pixel.decode` does, from a cache (`DecodedCache`); None: no cache.

    Attributes:
        unread: videos so far for which the teacher gave no clear answer. They get the lowest score that the teacher
            can give, `teacher.lowest`, so that the other video of the pair wins.
        eta, trained_on: as of `Judge`.
    """

    def __init__(
        self,
        backbone: Any,
        teacher: Teacher,
        dimensions: Mapping[str, str | Sequence[str]] | None = None,
        fps: float | None = None,
        frames: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else Backbone(backbone)
        self.teacher, self.name, self.fps, self.frames = teacher, teacher.name, fps, frames
        named = dimensions or {each: each for each in teacher.dimensions}
        self.parts = {name: (each,) if isinstance(each, str) else tuple(each) for name, each in named.items()}
        for name, parts in self.parts.items():
            strange = [part for part in parts if part not in teacher.dimensions]
            if strange or not parts:
                raise PrismError(
                    f"The dimension {quoted(name, 60)} is to be read from {quoted(strange or parts, 80)}, which the "
                    f"teacher {teacher.name} does not give; it gives {', '.join(teacher.dimensions)}."
                )
        self.dimensions, self.eta, self.unread = tuple(self.parts), 5.0, 0
        self.trained_on: dict[str, Any] = {"source": "published"}

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: str | Sequence[str], t: float | Tensor, **call: Any) -> Tensor:
        """(B, num_dimensions) float32 of latents at noise level t, decoded as they are; t and `call` are not used."""
        names, scores = checked_prompts(noisy_latents, prompts), []
        for start in range(0, len(names), ROWS):
            rows = slice(start, start + ROWS)
            latents = noisy_latents[rows]
            videos = decode(self.backbone, latents) if self.frames is None else self.frames(latents)
            for row in self.teacher.score([video.cpu().numpy() for video in videos], names[rows], self.fps):
                scores.append([self._sum(row, parts) for parts in self.parts.values()])
                self.unread += any(math.isnan(value) for value in row.values())
        return torch.tensor(scores, dtype=torch.float32, device=noisy_latents.device)

    def _sum(self, row: Mapping[str, float], parts: Sequence[str]) -> float:
        lowest = getattr(self.teacher, "lowest", 0.0)
        return sum(lowest if math.isnan(row[part]) else row[part] for part in parts)

    score_clean = Judge.score_clean  # the same draws of noise, around this class's own `score`
