"""Validation while training: accuracy on a store's validation pairs at a few noise levels, from tokens read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prism.backbone import Backbone, Tokens
from prism.errors import PrismError
from prism.evaluation.evaluator import Video, noised, pair_margins, videos_of
from prism.judge import Judge
from prism.preference import LatentStore, PromptGroup
from prism.team import in_batches
from prism.training.conditionings import conditioned

LEVELS = (899, 699, 499)
"""Noise levels t at which candidates are typically judged while sampling; accuracy is averaged over them."""
KEPT_BYTES = 512 * 2**20
"""Memory for the tokens of validation videos."""


def levels(backbone: Backbone) -> tuple[float, ...]:
    """The noise levels of validation: those of LEVELS within the denoiser's range, else the middle of the range."""
    low, high = backbone.t_range
    return tuple(t for t in LEVELS if low <= t <= high) or ((low + high) / 2,)


class Validation:
    """The validation pairs of a store. The backbone is frozen, so that tokens are kept as far as `KEPT_BYTES` goes.

    A batch holds videos of one shape and call.
    """

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
            for t, scores_at_t in scores.items():
                tokens = self._kept.get((t, tuple(batch)))
                if tokens is None:
                    latents = self.store.latents(videos) if latents is None else latents
                    if conditioning is None:
                        prompts, call = [prompt for _, prompt in batch], self.store.call_of(videos[0])
                        conditioning = conditioned(judge.backbone, self.store, prompts, call)
                    noisy = noised(judge.backbone, latents, videos, t)
                    tokens = judge.backbone.tokens(noisy, conditioning, t, self.taps)
                    self._keep((t, tuple(batch)), tokens)
                scores_at_t.update(zip(videos, judge.score_tokens(tokens).double().cpu().numpy()))

        videos = videos_of(self.groups)
        kinds = self.store.kinds(video for video, _ in videos)
        for kind in dict.fromkeys(kinds.tolist()):
            fitting = [video for video, other in zip(videos, kinds.tolist()) if other == kind]
            self.batch = in_batches(fitting, self.batch, work, "validating")
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
    for scores_at_level in scores:
        labels, margins, _ = pair_margins(groups, scores_at_level)
        decided = np.abs(labels) == 1
        shares.append(((labels * margins > 0) & decided).sum(0) / np.maximum(decided.sum(0), 1))
    means: list[float] = np.mean(shares, 0).tolist()
    return means
