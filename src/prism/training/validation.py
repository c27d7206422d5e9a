"""Accuracy on validation pairs while training, and the conditionings of a store's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prism.backbone import Backbone, Conditioning, Ragged, Tokens
from prism.backbone.conditioning import ConditioningCache, Stowed
from prism.errors import PrismError
from prism.evaluation.evaluator import Video, check_call, noised, pair_margins, videos_of
from prism.judge import Judge
from prism.preference import LatentStore, PromptGroup
from prism.team import in_batches, ran_out

HELD_BYTES = 4 * 2**30
"""Host memory for the conditionings of all prompts: 1,000 prompts of Wan."""
CHUNK = 16  # prompts that are encoded together


class Conditionings:
    """What the denoiser is told of each of a store's prompts.

    Where all fit into `HELD_BYTES` they are captured once, before the first step. Where not, each prompt is encoded by
    itself when a batch needs it, and those used last are kept. Which of the two it is follows from the prompts alone,
    so that a resumed run reads the same bits.
    """

    def __init__(self, backbone: Backbone, store: LatentStore, prompts: Sequence[str]) -> None:
        self.backbone, self.store, self.prompts = backbone, store, list(prompts)
        self._kept: ConditioningCache[int, Stowed] = ConditioningCache()
        in_batches(range(len(self.prompts)), CHUNK, self._capture, "encoding prompts")
        if not self._all_fit:
            self._kept.clear()
            backbone.forget()

    def _capture(self, places: Sequence[int]) -> None:
        if self._all_fit:
            chunk = conditioned(self.backbone, self.store, [self.prompts[place] for place in places])
            for row, place in enumerate(places):
                self._kept[place] = Stowed.of(chunk[row])

    @property
    def _all_fit(self) -> bool:
        """Whether all prompts are going to fit, to judge by those captured so far."""
        return self._kept.nbytes * len(self.prompts) <= HELD_BYTES * len(self._kept)

    def of(self, places: Sequence[int]) -> Conditioning | Ragged:
        """A row for each of some places in the list of prompts."""
        rows = {}
        for place in dict.fromkeys(places):
            if place not in self._kept:
                row = conditioned(self.backbone, self.store, [self.prompts[place]])[0]
                self._kept[place] = Stowed.of(row)
                self._kept.trim(HELD_BYTES)
                self.backbone.forget()
            rows[place] = self._kept[place].back()
        return Conditioning.cat([rows[place] for place in places])


def conditioned(backbone: Backbone, store: LatentStore, prompts: Sequence[str]) -> Conditioning | Ragged:
    """The conditionings of prompts under a store's call. Raises PrismError for a call that the pipeline rejects."""
    try:
        return backbone.condition(prompts, **store.call)
    except Exception as error:
        if not ran_out(error):
            check_call(backbone, store, prompts[0])
        raise


LEVELS = (899, 699, 499)
"""Where candidates are judged on the way: accuracy is averaged over these t."""
KEPT_BYTES = 512 * 2**20


def levels(backbone: Backbone) -> tuple[float, ...]:
    """The levels validated at: LEVELS, or of a denoiser that is used for other ones the middle of its range."""
    low, high = backbone.t_range
    return tuple(t for t in LEVELS if low <= t <= high) or ((low + high) / 2,)


class Validation:
    """The validation pairs of a store. The backbone is frozen, so tokens that fit in memory are read once for all."""

    def __init__(self, store: LatentStore, dimensions: tuple[str, ...], taps: tuple[int, ...], batch: int = 64) -> None:
        self.store, self.taps, self.batch = store, taps, batch
        self.groups = store.groups("validation", dimensions)
        if not self.groups:
            raise PrismError(
                f"The store {store.folder} has no validation pairs labelled {', '.join(dimensions)}; "
                "set validate_every to 0."
            )
        self._kept: dict[tuple[float, tuple[Video, ...]], Tokens] = {}
        self._bytes = 0

    @torch.no_grad()
    def accuracy(self, judge: Judge) -> list[float]:
        """Accuracy without ties by dimension, averaged over the levels; a dimension without decided pairs counts 0."""
        scores: dict[float, dict[str, np.ndarray]] = {t: {} for t in levels(judge.backbone)}

        def work(batch: Sequence[Video]) -> None:
            videos, latents, conditioning = [video for video, _ in batch], None, None
            for t, found in scores.items():
                tokens = self._kept.get((t, tuple(batch)))
                if tokens is None:
                    latents = self.store.latents(videos) if latents is None else latents
                    if conditioning is None:
                        conditioning = conditioned(judge.backbone, self.store, [prompt for _, prompt in batch])
                    noisy = noised(judge.backbone, latents, videos, t)
                    tokens = judge.backbone.tokens(noisy, conditioning, t, self.taps)
                    self._keep((t, tuple(batch)), tokens)
                found.update(zip(videos, judge.score_tokens(tokens).double().cpu().numpy()))

        self.batch = in_batches(videos_of(self.groups), self.batch, work, "validating")
        return mean_accuracy(self.groups, list(scores.values()))

    def _keep(self, key: tuple[float, tuple[Video, ...]], tokens: Tokens) -> None:
        parts = [tokens.visual, tokens.text, tokens.text_mask, *tokens.lower.values()]
        size = sum(part.nbytes for part in parts if part is not None)
        if self._bytes + size <= KEPT_BYTES:
            self._bytes += size
            self._kept[key] = tokens


def mean_accuracy(groups: Sequence[PromptGroup], scores: Sequence[Mapping[str, np.ndarray]]) -> list[float]:
    """Accuracy without ties by dimension, averaged over scores at several levels."""
    shares = []
    for found in scores:
        labels, margins, _ = pair_margins(groups, found)
        decided = np.abs(labels) == 1
        shares.append(((labels * margins > 0) & decided).sum(0) / np.maximum(decided.sum(0), 1))
    means: list[float] = np.mean(shares, 0).tolist()
    return means
