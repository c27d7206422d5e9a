"""Previews, the videos that the denoiser predicts of candidates at a cut that looks ahead, and who watches a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.backbone.layout import Grid
from prism.backbone.sounds import check_pictures
from prism.errors import PrismError
from prism.sampling.plan import Candidate, Plan, Workload
from prism.team import Team, merged


class Watch(Protocol):
    """Who is told of a run while it goes on. What its methods raise ends the run."""

    def rows(self, done: float, expected: float) -> None:
        """Called after each denoiser call, with the denoiser rows that it and those before took, and those that the
        plan takes as a whole."""

    def cut(self, cut: Mapping[str, Any], previews: Mapping[Candidate, np.ndarray]) -> None:
        """Called at each cut, as soon as it is decided, with its entry of `BestOfNResult.scores` (whose candidates are
        `Candidate`s here), and with the previews of its candidates, (T, H, W, 3) uint8, where there are any."""


@dataclass
class Previews:
    """The previews of a search, each decoded as soon as its candidate was looked at.

    videos: by step, by candidate of this process, (T, H, W, 3) uint8. optional: a plan without any is no mistake.
    """

    videos: dict[int, dict[Candidate, np.ndarray]] = field(default_factory=dict)
    optional: bool = False

    @classmethod
    def of(cls, wanted: bool | None, backbone: Backbone) -> Previews | None:
        """Previews of a run: True demands them, None takes them where there are any. Of sounds there are none."""
        if wanted:
            check_pictures(backbone.pipe, backbone.family)
        unwanted = wanted is False or backbone.family.sampling_rate
        return None if unwanted else cls(optional=wanted is None)

    def check(self, plan: Plan, load: Workload) -> bool:
        """True for a settled plan with a cut that looks ahead, before which no candidate parts from its seed.

        Raises PrismError for another one, unless previews are optional.
        """
        if self.optional:
            return plan.predicts() and not plan.parts_at(load)
        if not plan.predicts():
            raise PrismError(
                "Previews are the videos that the denoiser predicts at cuts that look ahead, and this run has none; "
                'take look="ahead" (--look ahead), or leave previews out.'
            )
        if plan.parts_at(load):
            raise PrismError(
                f'Previews are shown by seed, and the candidates of the strategy "{plan.strategy}" part from theirs; '
                'leave previews out, or take "early".'
            )
        return True

    def add(
        self,
        backbone: Backbone,
        call: Mapping[str, Any],
        step: int,
        predicted: Mapping[Candidate, Tensor],
        grid: Grid | None,
    ) -> None:
        """Decode predicted clean latents (...) by candidate, one at a time, as the pipeline decodes final ones.

        call: the pipeline's arguments. grid: (T, H, W) in tokens, where latents are packed.
        """
        frames = call.get("num_frames", backbone.default("num_frames"))
        with backbone.freed():
            for candidate, latents in predicted.items():
                video = backbone.decode(latents[None], grid, frames)[0]
                self.videos.setdefault(step, {})[candidate] = _bytes(video)

    def take(self, others: Previews) -> None:
        """Add the previews of another search."""
        for step, videos in others.videos.items():
            self.videos.setdefault(step, {}).update(videos)

    def gathered(self, team: Team) -> dict[int, dict[int, np.ndarray]]:
        """The previews of all processes by step and candidate's index, (T, H, W, 3) uint8."""
        parts = team.agree(lambda: self.videos)
        steps: Sequence[int] = sorted({step for part in parts for step in part})
        every = {step: merged(part.get(step, {}) for part in parts) for step in steps}
        return {step: {candidate.index: video for candidate, video in videos.items()} for step, videos in every.items()}


def _bytes(video: Tensor) -> np.ndarray:
    """A video (T, H, W, 3) in [0, 1] as bytes; what a VAE overflows to becomes black or white."""
    pixels: np.ndarray = (torch.nan_to_num(video.float()).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return pixels
