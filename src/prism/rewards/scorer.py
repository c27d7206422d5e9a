"""A judge with settings, as trainers ask it: finished latents at a noise level and seed, or clips, scored in batches.

A row's score is that of `Judge.score_clean` or `Judge.score_video` for this row alone: to the bit where it is scored
alone, and to the rounding of the denoiser's arithmetic where others are in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone.layout import is_packed
from prism.backbone.videos import call_frames
from prism.errors import DRAWS, SEEDS, PrismError, choice, quoted, whole
from prism.judge import Judge
from prism.judge.checks import noise_levels
from prism.judge.scoring import default_levels
from prism.team import in_batches

_TEXTS = ("prompt", "pooled_prompt")  # how names of embeddings and their masks begin


@dataclass(frozen=True)
class LatentRow:
    """Finished latents to score."""

    latents: Tensor
    """(1, ...) normalised latents, as the pipeline's loop ends with them."""
    t: float
    """Noise level in [0, 1000] to which they are re-noised."""
    seed: int = 0
    """Seed of the noise."""
    prompt: str | None = None
    """The prompt; None where embeddings are given."""
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    """The prompt as embeddings, (1, ...) each, by the names of the pipeline's arguments."""
    noisy: bool = False
    """True for latents that are at this level already; they are scored as they are."""


@dataclass(frozen=True)
class ClipRow:
    """A finished clip to score."""

    frames: np.ndarray
    """(T, H, W, 3) uint8, as many and of the size that the scorer's call makes."""
    prompt: str
    """The prompt."""
    image: Any = None
    """The image it was made from, a PIL image, for pipelines that start from one."""


Row = LatentRow | ClipRow


class Scorer:
    """A judge, and how it is asked.

    Attributes: `judge`; `call`, with the number and size of frames; `policy`, which cuts clips to these; `dimension`,
    the one that is the reward, and its `column`; `levels`, at which clips are scored; `shape` of one row of latents.

    Args:
        judge: the judge.
        call: arguments of its pipeline's call, with the resolution that will be asked.
        dimension: the score that is the reward; None: "overall" where there is one, else the last.
        draws: noise draws per score; None: 1 of latents, 4 of clips.
        levels: noise levels of clips, whose scores are averaged; None: `default_levels`.
        seed: of the noise of clips.

    Raises:
        PrismError: where the judge has no such dimension, or the pipeline makes nothing of the call.
    """

    def __init__(
        self,
        judge: Judge,
        call: Mapping[str, Any] | None = None,
        dimension: str | None = None,
        draws: int | None = None,
        levels: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.judge = judge
        self.policy, self.call = call_frames(judge.backbone, dict(call or {}))
        fallback = "overall" if "overall" in judge.dimensions else judge.dimensions[-1]
        self.dimension = fallback if dimension is None else choice("dimension", dimension, judge.dimensions)
        self.column = judge.dimensions.index(self.dimension)
        self.draws = None if draws is None else whole("draws", draws, 1, DRAWS)
        self.levels = default_levels(judge) if levels is None else noise_levels(judge.backbone, levels, "levels")
        self.seed = whole("seed", seed, 0, SEEDS)
        self._shape: tuple[int, ...] | None = None

    @property
    def takes_image(self) -> bool:
        """True where the pipeline starts from an image, which each clip then needs."""
        return self.judge.backbone.takes("image") and self.call.get("image") is None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one row of latents; None where it shows with the first image alone."""
        if self._shape is None and not self.takes_image:
            prompt = "a" if self.judge.backbone.family.takes_prompts else ""
            self._shape = tuple(self.judge.backbone.condition([prompt], **self.call).shape)  # type: ignore[union-attr]
        return self._shape

    def fitted(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of latents (B, ...) in the pipeline's layout: one frame of a video may come without its axis.

        Raises:
            PrismError: where latents of this shape are not those of the call.
        """
        expected, asked = self.shape, tuple(int(size) for size in shape)
        if expected is None or asked[1:] == expected:
            return asked
        layout = self.judge.backbone.family.layout
        if not is_packed(layout) and "T" in layout and expected[axis := layout.index("T") - 1] == 1:
            bare = expected[:axis] + expected[axis + 1 :]
            if asked[1:] == bare:
                return (asked[0], *expected)
        raise PrismError(
            f"The latents have the shape {list(asked)}, and this judge's pipeline makes [B, "
            f"{', '.join(map(str, expected))}]; serve the judge with the size that the trainer samples."
        )

    def embeddings(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a prompt's embeddings and masks that the pipeline's call takes; the others say nothing to it."""
        takes = self.judge.backbone.takes
        return {name: value for name, value in tensors.items() if name.startswith(_TEXTS) and takes(name)}

    def key(self, row: Row) -> Hashable:
        """Rows of equal keys may be scored together."""
        if isinstance(row, ClipRow):
            image = None if row.image is None else hashlib.sha256(row.image.tobytes()).digest()
            return id(self), "clip", row.frames.shape, image
        parts = {"latents": row.latents, **row.embeddings}
        return id(self), row.noisy, *((name, value.shape[1:], value.dtype) for name, value in sorted(parts.items()))

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> list[list[float]]:
        """Scores of rows of one key: per row a finite number per dimension."""
        scores: list[list[float]] = []
        latents = [row for row in rows if isinstance(row, LatentRow)]
        clips = [row for row in rows if isinstance(row, ClipRow)]
        in_batches(latents, max(1, len(latents)), lambda batch: scores.extend(self._latents(batch).tolist()), "scoring")
        in_batches(clips, max(1, len(clips)), lambda batch: scores.extend(self._clips(batch).tolist()), "scoring")
        for values in scores:
            if not np.isfinite(values).all():
                raise PrismError(f"The judge gives no finite score; found {quoted(values, 120)}.")
        return scores

    def reward(self, scores: Sequence[float]) -> float:
        """The score that is the reward."""
        return float(scores[self.column])

    def named(self, scores: Sequence[float]) -> dict[str, float]:
        """Scores by dimension, the reward's first."""
        by_name = dict(zip(self.judge.dimensions, scores))
        return {self.dimension: by_name[self.dimension], **by_name}

    def _latents(self, rows: Sequence[LatentRow]) -> Tensor:
        """(B, num_dimensions): `Judge.score_clean` of each row, with a level and a seed of its own."""
        judge, backbone = self.judge, self.judge.backbone
        latents = torch.cat([row.latents for row in rows]).to(backbone.device)
        levels = torch.tensor([row.t for row in rows], dtype=torch.float32, device=backbone.device)
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        names = rows[0].embeddings
        given = {name: torch.cat([row.embeddings[name] for row in rows]).to(backbone.device) for name in names}
        prompts = None if names else [row.prompt or "" for row in rows]
        shape, draws = (1, *latents.shape[1:]), []
        if rows[0].noisy:
            return judge.score(latents, prompts, levels, **self.call, **given).cpu()
        with backbone.held(), backbone.freed():
            for _ in range(self.draws or 1):
                noise = torch.cat([torch.randn(shape, generator=each) for each in generators]).to(latents)
                noisy = backbone.add_noise(latents, levels, noise)
                draws.append(judge.score(noisy, prompts, levels, **self.call, **given))
        return torch.stack(draws).mean(0).cpu()

    def _clips(self, rows: Sequence[ClipRow]) -> Tensor:
        """(B, num_dimensions): `Judge.score_video` of each row, the mean over levels."""
        image = {} if rows[0].image is None else {"image": rows[0].image}
        scored = self.judge.score_video(
            [row.frames for row in rows],
            [row.prompt for row in rows],
            self.levels,
            self.draws or 4,
            self.seed,
            **{**self.call, **image},
        )
        return scored.scores.mean(1)
