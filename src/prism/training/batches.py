"""The reading side of training: batches by prompt group, their prompts' conditionings, and the validation pairs.

A step's random numbers depend only on (seed, step, the group's slot in the step), so that resuming needs no state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone, Conditioning, Ragged, Tokens
from prism.backbone.conditioning import ConditioningCache, Stowed
from prism.errors import PrismError
from prism.evaluation.evaluator import Video, check_call, noised, pair_margins, videos_of
from prism.judge import Judge
from prism.preference import LatentStore, PromptGroup, prompt_key
from prism.team import in_batches, ran_out
from prism.training.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """The videos of some prompt groups, one after another, and the pairs among them."""

    noisy_latents: Tensor
    """(rows, ...) at noise level t."""
    t: Tensor
    """(rows,) in [0, 1000], the same within a group."""
    prompts: list[int]
    """(rows,) index of each row's prompt group."""
    first: Tensor
    """(pairs,) row of A."""
    second: Tensor
    """(pairs,) row of B."""
    labels: Tensor
    """(pairs, num_dimensions) 1, -1, 0 or NaN."""
    groups: list[tuple[int, int]]
    """Rows and pairs of each group, in order."""
    soft: Tensor | None = None
    """(pairs, num_dimensions, 2) probabilities that A and that B is better, NaN where the hard label counts."""
    weights: Tensor | None = None
    """(pairs, num_dimensions) of the labels, NaN for 1."""
    start: int = 0
    """Row of the whole batch at which this part begins."""

    def parts(self, rows: int) -> list[Batch]:
        """This batch as several of at most `rows` rows each; a group is never split, even if it alone has more rows."""
        groups_of: list[list[tuple[int, int]]] = [[]]
        for group in self.groups:
            if groups_of[-1] and sum(count for count, _ in groups_of[-1]) + group[0] > rows:
                groups_of.append([])
            groups_of[-1].append(group)
        parts, row, pair = [], 0, 0
        for groups in groups_of:
            ends = row + sum(count for count, _ in groups), pair + sum(count for _, count in groups)
            at, of = slice(row, ends[0]), slice(pair, ends[1])
            pairs = self.first[of] - row, self.second[of] - row, self.labels[of]
            soft, weights = (None if values is None else values[of] for values in (self.soft, self.weights))
            rows_of = self.noisy_latents[at], self.t[at], self.prompts[at]
            parts.append(Batch(*rows_of, *pairs, groups, soft, weights, row))
            row, pair = ends
        return parts


# Inverse distribution functions on [0, 1]: uniform, and densities that fall linearly away from either end.
_DENSITIES = {"uniform": lambda u: u, "clean": lambda u: 1 - (1 - u) ** 0.5, "noise": lambda u: u**0.5}


def training_groups(store: LatentStore, dimensions: Sequence[str], config: TrainConfig) -> list[PromptGroup]:
    """The store's training pairs that the configuration asks for, by prompt.

    ``max_prompts`` takes prompts in an order that depends on their texts alone: the first 10 are among the first 20.

    Raises:
        PrismError: if there are none.
    """
    groups = store.groups("train", dimensions)
    if config.max_prompts:
        groups = sorted(groups, key=lambda group: prompt_key(group.prompt))[: config.max_prompts]
    if config.per_prompt:
        order = {video: row for row, video in enumerate(store.videos["video"].to_pylist())}
        groups = [_first_videos(group, config.per_prompt, order) for group in groups]
    groups = [group for group in groups if len(group.labels)]
    if not groups:
        raise PrismError(f"The store {store.folder} has no training pairs labelled {', '.join(dimensions)}.")
    return groups


def _first_videos(group: PromptGroup, count: int, order: Mapping[str, int]) -> PromptGroup:
    """The pairs among the first `count` videos of a group; `order` is each video's row in the store."""
    kept = sorted(range(len(group.videos)), key=lambda index: order[group.videos[index]])[:count]
    renumbered = np.full(len(group.videos), -1)
    renumbered[kept] = np.arange(len(kept))
    first, second = renumbered[group.first], renumbered[group.second]
    rows = (first >= 0) & (second >= 0)
    videos = tuple(group.videos[index] for index in kept)
    extras = (None if values is None else values[rows] for values in (group.soft, group.weights))
    return PromptGroup(group.prompt, videos, first[rows], second[rows], group.labels[rows], *extras)


def _joined(
    parts: Sequence[np.ndarray | None], shapes: Sequence[tuple[int, ...]], device: torch.device
) -> Tensor | None:
    """Arrays concatenated as float32, a missing one as NaN of its shape; None if all are missing."""
    if all(part is None for part in parts):
        return None
    whole = [np.full(shape, np.nan) if part is None else part for part, shape in zip(parts, shapes)]
    return torch.from_numpy(np.concatenate(whole)).to(device, torch.float32)


class Batches:
    """The batch of each step. Prompts are drawn in shuffled epochs: each comes once before any comes again."""

    def __init__(
        self, store: LatentStore, groups: Sequence[PromptGroup], backbone: Backbone, config: TrainConfig
    ) -> None:
        self.store, self.groups, self.backbone, self.config = store, groups, backbone, config
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        low, high = backbone.t_range
        self._levels = max(config.t_low, low), min(config.t_high, high)
        if self._levels[0] >= self._levels[1]:
            raise PrismError(
                f"The denoiser {backbone.reads!r} is used for t from {low:g} to {high:g}, found t_low "
                f"{config.t_low:g} and t_high {config.t_high:g}; choose values in that range."
            )
        self._states: list[int] = []
        if config.source != "renoised":
            if not store.has_trajectories:
                raise PrismError(
                    f"The source {config.source} needs trajectories, and the store {store.folder} holds none; "
                    "use the source renoised."
                )
            levels = store.trajectory(groups[0].videos[:1])[1][0]
            low, high = self._levels
            self._states = [i for i, t in enumerate(levels.tolist()) if low <= t <= high]
            if not self._states:
                raise PrismError(
                    f"No recorded state of {store.folder} has t from {low:g} to {high:g}; widen t_low and t_high."
                )

    def draw(self, step: int, slots: Sequence[int]) -> Batch:
        """The part of a step's batch (steps from 0) in `slots`: a step has ``prompts_per_step`` slots, a group each."""
        latents, levels, prompts, first, second, drawn = [], [], [], [], [], []
        offset = 0
        for slot, copy in itertools.product(slots, range(self.config.draws_per_step)):
            index, epoch = self._group(step * self.config.prompts_per_step + slot)
            group = self.groups[index]
            key = [self.config.seed, step, slot, *([copy] if copy else [])]  # without copy 0: seeds of older versions
            if self.config.noise_draws:  # cycle through a fixed number of draws, one after another per epoch
                draw = (epoch * self.config.draws_per_step + copy) % self.config.noise_draws
                key = [self.config.seed, index, draw, 0, 0]
            noisy, t = self._noisy(group, np.random.default_rng(key))
            latents.append(noisy)
            levels.append(t)
            prompts += [index] * len(group.videos)
            first.append(group.first + offset)
            second.append(group.second + offset)
            drawn.append(group)
            offset += len(group.videos)
        device = self.backbone.device
        return Batch(
            torch.cat(latents).to(device),
            torch.cat(levels).to(device),
            prompts,
            torch.from_numpy(np.concatenate(first)).to(device),
            torch.from_numpy(np.concatenate(second)).to(device),
            torch.from_numpy(np.concatenate([group.labels for group in drawn])).to(device, torch.float32),
            [(len(group.videos), len(group.labels)) for group in drawn],
            _joined([group.soft for group in drawn], [(*group.labels.shape, 2) for group in drawn], device),
            _joined([group.weights for group in drawn], [group.labels.shape for group in drawn], device),
        )

    def _group(self, position: int) -> tuple[int, int]:
        """The prompt at a position of the endless sequence of shuffled epochs, and its epoch."""
        epoch, index = divmod(position, len(self.groups))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(len(self.groups))
        return int(self._order[1][index]), epoch

    def _noisy(self, group: PromptGroup, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The videos of a group at one noise level: (videos, ...) and (videos,)."""
        source = self.config.source
        share = _DENSITIES[self.config.levels](rng.uniform())  # drawn for every source, so that all use the same rng
        low, high = self._levels
        level = low + share * (high - low)
        if source == "mixed":
            source = "trajectory" if rng.uniform() < self.config.trajectory_share else "renoised"
        if source == "trajectory":
            states, t = self.store.trajectory(group.videos, index=self._states[int(rng.integers(len(self._states)))])
            if bool((t != t[0]).any()):
                raise PrismError(f"The recorded states of {group.prompt!r} differ in t; a pair needs the same t.")
            return states, t
        latents = self.store.latents(group.videos)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        rows = 1 if self.config.shared_noise else len(latents)
        noise = torch.randn((rows, *latents.shape[1:]), generator=generator).expand_as(latents)
        t = torch.full((len(latents),), level, dtype=torch.float32)
        return self.backbone.add_noise(latents, t, noise), t  # Eq. 1


HELD_BYTES = 4 * 2**30
"""Host memory for the conditionings of all prompts: 1,000 prompts of Wan."""
CHUNK = 16  # prompts that are encoded together


class Conditionings:
    """The conditionings of a store's prompts.

    If all fit into `HELD_BYTES`, they are captured once, before the first step. If not, each prompt is encoded alone
    when a batch needs it, and the most recently used ones are kept. The choice depends on the prompts alone, so that a
    resumed run reads the same bits.
    """

    def __init__(self, backbone: Backbone, store: LatentStore, prompts: Sequence[str]) -> None:
        self.backbone, self.store, self.prompts = backbone, store, list(prompts)
        self._kept: ConditioningCache[int, Stowed] = ConditioningCache()
        in_batches(range(len(self.prompts)), CHUNK, self._capture, "encoding prompts")
        if not self._all_fit:
            self._kept.clear()
            backbone.forget()

    def _capture(self, indices: Sequence[int]) -> None:
        if self._all_fit:
            chunk = conditioned(self.backbone, self.store, [self.prompts[index] for index in indices])
            for row, index in enumerate(indices):
                self._kept[index] = Stowed.of(chunk[row])

    @property
    def _all_fit(self) -> bool:
        """True if all prompts will fit, estimated from those captured so far."""
        return self._kept.nbytes * len(self.prompts) <= HELD_BYTES * len(self._kept)

    def of(self, indices: Sequence[int]) -> Conditioning | Ragged:
        """A row for each of some indices into the list of prompts."""
        rows = {}
        for index in dict.fromkeys(indices):
            if index not in self._kept:
                row = conditioned(self.backbone, self.store, [self.prompts[index]])[0]
                self._kept[index] = Stowed.of(row)
                self._kept.trim(HELD_BYTES)
                self.backbone.forget()
            rows[index] = self._kept[index].back()
        return Conditioning.cat([rows[index] for index in indices])


def conditioned(backbone: Backbone, store: LatentStore, prompts: Sequence[str]) -> Conditioning | Ragged:
    """The conditionings of prompts under a store's call. Raises PrismError for a call that the pipeline rejects."""
    try:
        return backbone.condition(prompts, **store.call)
    except Exception as error:
        if not ran_out(error):
            check_call(backbone, store, prompts[0])
        raise


LEVELS = (899, 699, 499)
"""Noise levels t at which candidates are typically judged while sampling; accuracy is averaged over them."""
KEPT_BYTES = 512 * 2**20
"""Memory for the tokens of validation videos."""


def levels(backbone: Backbone) -> tuple[float, ...]:
    """The noise levels of validation: those of LEVELS within the denoiser's range, else the middle of the range."""
    low, high = backbone.t_range
    return tuple(t for t in LEVELS if low <= t <= high) or ((low + high) / 2,)


class Validation:
    """The validation pairs of a store. The backbone is frozen, so that tokens are kept as far as `KEPT_BYTES` goes."""

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
                        conditioning = conditioned(judge.backbone, self.store, [prompt for _, prompt in batch])
                    noisy = noised(judge.backbone, latents, videos, t)
                    tokens = judge.backbone.tokens(noisy, conditioning, t, self.taps)
                    self._keep((t, tuple(batch)), tokens)
                scores_at_t.update(zip(videos, judge.score_tokens(tokens).double().cpu().numpy()))

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
    for scores_at_level in scores:
        labels, margins, _ = pair_margins(groups, scores_at_level)
        decided = np.abs(labels) == 1
        shares.append(((labels * margins > 0) & decided).sum(0) / np.maximum(decided.sum(0), 1))
    means: list[float] = np.mean(shares, 0).tolist()
    return means
