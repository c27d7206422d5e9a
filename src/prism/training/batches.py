"""The batches of training: prompt groups noised to a level, whose videos may be of several shapes and calls.

A step's random numbers depend only on (seed, step, the group's slot in the step), so that resuming needs no state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.preference import LatentStore, PromptGroup, prompt_key
from prism.training.config import TrainConfig


@dataclass(frozen=True)
class Labels:
    """The labels of a step's pairs, without their videos."""

    labels: Tensor
    """(pairs, num_dimensions) 1, -1, 0 or NaN."""
    soft: Tensor | None = None
    """(pairs, num_dimensions, 2) probabilities that A and that B is better, NaN where the hard label counts."""
    weights: Tensor | None = None
    """(pairs, num_dimensions) of the labels, NaN for 1."""


@dataclass(frozen=True)
class Batch:
    """The videos of some prompt groups, one after another, and the pairs among them."""

    latents: list[Tensor]
    """(rows,) latents of each video at noise level t, in host memory; of one kind they have one shape."""
    kinds: list[int]
    """(rows,) kind of each video: `LatentStore.kinds`."""
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
    draws: list[int]
    """(groups,) number of each group's fixed draw of noise and t; -1 for a new one."""
    soft: Tensor | None = None
    """(pairs, num_dimensions, 2) probabilities that A and that B is better, NaN where the hard label counts."""
    weights: Tensor | None = None
    """(pairs, num_dimensions) of the labels, NaN for 1."""
    start: int = 0
    """Row of the whole batch at which this part begins."""

    @property
    def noisy_latents(self) -> Tensor:
        """(rows, ...) at noise level t, in host memory; of a batch of one shape."""
        if len({latents.shape for latents in self.latents}) > 1:
            raise PrismError("The videos of this batch have several shapes; read them kind by kind.")
        return torch.stack(self.latents)

    def passes(self, rows: int) -> Iterator[list[int]]:
        """The rows of the batch, at most `rows` of one kind at a time."""
        for kind in dict.fromkeys(self.kinds):
            fitting = [row for row, other in enumerate(self.kinds) if other == kind]
            yield from (fitting[start : start + rows] for start in range(0, len(fitting), rows))

    def units(self) -> Iterator[tuple[int, int, list[int]]]:
        """The rows of each group by kind, with the group's draw and the kind's number in the group."""
        row = 0
        for (count, _), draw in zip(self.groups, self.draws):
            members = range(row, row + count)
            for number, kind in enumerate(dict.fromkeys(self.kinds[row : row + count])):
                yield draw, number, [member for member in members if self.kinds[member] == kind]
            row += count

    def parts(self, rows: int) -> list[Batch]:
        """This batch as several of at most `rows` rows each; a group is never split, even if it alone has more rows."""
        groups_of: list[list[int]] = [[]]
        for number, (count, _) in enumerate(self.groups):
            if groups_of[-1] and sum(self.groups[each][0] for each in groups_of[-1]) + count > rows:
                groups_of.append([])
            groups_of[-1].append(number)
        parts, row, pair = [], 0, 0
        for numbers in groups_of:
            groups, draws = [self.groups[each] for each in numbers], [self.draws[each] for each in numbers]
            ends = row + sum(count for count, _ in groups), pair + sum(count for _, count in groups)
            at, of = slice(row, ends[0]), slice(pair, ends[1])
            pairs = self.first[of] - row, self.second[of] - row, self.labels[of]
            soft, weights = (None if values is None else values[of] for values in (self.soft, self.weights))
            rows_of = self.latents[at], self.kinds[at], self.t[at], self.prompts[at]
            parts.append(Batch(*rows_of, *pairs, groups, draws, soft, weights, row))
            row, pair = ends
        return parts


# Inverse distribution functions on [0, 1]: uniform, and densities that fall linearly away from either end.
_DENSITIES = {"uniform": lambda u: u, "clean": lambda u: 1 - (1 - u) ** 0.5, "noise": lambda u: u**0.5}


def training_groups(store: LatentStore, dimensions: Sequence[str], config: TrainConfig) -> Sequence[PromptGroup]:
    """The store's training pairs that the configuration asks for, by prompt; each group is made when it is asked for.

    ``max_prompts`` takes prompts in an order that depends on their texts alone: the first 10 are among the first 20.

    Raises:
        PrismError: if there are none.
    """
    groups = TrainingGroups(store, dimensions, config)
    if not len(groups):
        raise PrismError(f"The store {store.folder} has no training pairs labelled {', '.join(dimensions)}.")
    return groups


class TrainingGroups(Sequence[PromptGroup]):
    """The sequence that `training_groups` gives."""

    def __init__(self, store: LatentStore, dimensions: Sequence[str], config: TrainConfig) -> None:
        self._groups, self._count = store.prompt_groups("train", dimensions), config.per_prompt
        self._order = {video: row for row, video in enumerate(store.videos["video"].to_pylist())} if self._count else {}
        indices = list(range(len(self._groups)))
        if config.max_prompts:
            keys = [prompt_key(group.prompt) for group in self._groups]
            indices = sorted(indices, key=keys.__getitem__)[: config.max_prompts]
        if self._count:
            indices = [index for index in indices if len(self._chosen(index).labels)]
        self._indices = np.array(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._chosen(int(each)) for each in self._indices[index]]
        return self._chosen(int(self._indices[index]))

    def _chosen(self, index: int) -> PromptGroup:
        group = self._groups[index]
        return _first_videos(group, self._count, self._order) if self._count else group


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
        self._sources = config.sources
        self._states = self._recorded_states() if "recorded" in self._sources else []
        if "predicted" in self._sources and not store.has_predicted:
            raise PrismError(
                f"The source {config.source} needs the denoiser's predicted clean latents, and the store "
                f"{store.folder} holds none; use the source renoised."
            )

    def _recorded_states(self) -> list[int]:
        """Indices of the recorded states whose t are trained on."""
        store, (low, high) = self.store, self._levels
        if not store.has_trajectories:
            raise PrismError(
                f"The source {self.config.source} needs trajectories, and the store {store.folder} holds none; "
                "use the source renoised."
            )
        recorded = store.trajectory(self.groups[0].videos[:1])[1][0]
        states = [index for index, t in enumerate(recorded.tolist()) if low <= t <= high]
        if not states:
            raise PrismError(
                f"No recorded state of {store.folder} has t from {low:g} to {high:g}; widen t_low and t_high."
            )
        return states

    def draw(self, step: int, slots: Sequence[int]) -> Batch:
        """The part of a step's batch (steps from 0) in `slots`: a step has ``prompts_per_step`` slots, a group each."""
        latents, levels, prompts, kinds, first, second, drawn, draws = [], [], [], [], [], [], [], []
        offset = 0
        for slot, copy in itertools.product(slots, range(self.config.draws_per_step)):
            index, epoch = self._group(step * self.config.prompts_per_step + slot)
            group, draw = self.groups[index], -1
            key = [self.config.seed, step, slot, *([copy] if copy else [])]  # without copy 0: seeds of older versions
            if self.config.noise_draws:  # cycle through a fixed number of draws, one after another per epoch
                draw = (epoch * self.config.draws_per_step + copy) % self.config.noise_draws
                key = [self.config.seed, index, draw, 0, 0]
            kinds_of = self.store.kinds(group.videos)
            noisy, t = self._noisy(group, kinds_of, np.random.default_rng(key))
            latents += noisy
            levels.append(t)
            kinds += kinds_of.tolist()
            prompts += [index] * len(group.videos)
            first.append(group.first + offset)
            second.append(group.second + offset)
            drawn.append(group)
            draws.append(draw)
            offset += len(group.videos)
        device, labels = self.backbone.device, self._labels(drawn)
        return Batch(
            latents,
            kinds,
            torch.cat(levels).to(device),
            prompts,
            torch.from_numpy(np.concatenate(first)).to(device),
            torch.from_numpy(np.concatenate(second)).to(device),
            labels.labels,
            [(len(group.videos), len(group.labels)) for group in drawn],
            draws,
            labels.soft,
            labels.weights,
        )

    def labels(self, step: int, slots: Sequence[int]) -> Labels:
        """The labels of the pairs that `draw` gives, without reading their videos."""
        chosen = [self.groups[self._group(step * self.config.prompts_per_step + slot)[0]] for slot in slots]
        return self._labels([group for group in chosen for _ in range(self.config.draws_per_step)])

    def _labels(self, groups: Sequence[PromptGroup]) -> Labels:
        device = self.backbone.device
        return Labels(
            torch.from_numpy(np.concatenate([group.labels for group in groups])).to(device, torch.float32),
            _joined([group.soft for group in groups], [(*group.labels.shape, 2) for group in groups], device),
            _joined([group.weights for group in groups], [group.labels.shape for group in groups], device),
        )

    def _group(self, position: int) -> tuple[int, int]:
        """The prompt at a position of the endless sequence of shuffled epochs, and its epoch."""
        epoch, index = divmod(position, len(self.groups))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(len(self.groups))
        return int(self._order[1][index]), epoch

    def _noisy(self, group: PromptGroup, kinds: np.ndarray, rng: np.random.Generator) -> tuple[list[Tensor], Tensor]:
        """The videos of a group at one noise level: (...) of each, and (videos,) of t."""
        share = _DENSITIES[self.config.levels](rng.uniform())  # drawn for every source, so that all use the same rng
        low, high = self._levels
        level = low + share * (high - low)
        source = next(iter(self._sources))
        if len(self._sources) > 1:
            chance, shares = rng.uniform(), np.cumsum(list(self._sources.values()))
            source = list(self._sources)[int(np.searchsorted(shares[:-1], chance, side="right"))]
        state = -1
        if source != "renoised":
            states = self._states if source == "recorded" else range(self.store.num_states())
            state = states[int(rng.integers(len(states)))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**63))) if source != "recorded" else None
        noisy: list[Any] = [None] * len(group.videos)
        t = torch.full((len(group.videos),), level, dtype=torch.float32)
        for kind in dict.fromkeys(kinds.tolist()):  # of one shape each
            members = np.flatnonzero(kinds == kind).tolist()
            videos = [group.videos[member] for member in members]
            if source == "recorded":
                rows, t[members] = self.store.trajectory(videos, index=state)
            else:
                clean = self.store.latents(videos) if source == "renoised" else self.store.predicted(videos, state)[0]
                count = 1 if self.config.shared_noise else len(clean)
                noise = torch.randn((count, *clean.shape[1:]), generator=generator).expand_as(clean)
                rows = self.backbone.add_noise(clean, t[members], noise)  # Eq. 1
            for member, row in zip(members, rows):
                noisy[member] = row
        if bool((t != t[0]).any()):
            raise PrismError(f"The recorded states of {group.prompt!r} differ in t; a pair needs the same t.")
        return noisy, t
