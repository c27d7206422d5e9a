"""Batches by prompt group: each step's randomness is a function of (seed, step, place), so resuming needs no state."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.preference import LatentStore, PromptGroup, prompt_key
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
    start: int = 0
    """Of a part: the whole batch's row that it begins at."""

    def parts(self, rows: int) -> list[Batch]:
        """This batch as several of at most `rows` rows each, and of one whole group at least."""
        found: list[list[tuple[int, int]]] = [[]]
        for group in self.groups:
            if found[-1] and sum(count for count, _ in found[-1]) + group[0] > rows:
                found.append([])
            found[-1].append(group)
        parts, row, pair = [], 0, 0
        for groups in found:
            ends = row + sum(count for count, _ in groups), pair + sum(count for _, count in groups)
            at, of = slice(row, ends[0]), slice(pair, ends[1])
            pairs = self.first[of] - row, self.second[of] - row, self.labels[of]
            parts.append(Batch(self.noisy_latents[at], self.t[at], self.prompts[at], *pairs, groups, row))
            row, pair = ends
        return parts


# Inverse distribution functions on [0, 1]: uniform, and densities that fall linearly away from either end.
_LEVELS = {"uniform": lambda u: u, "clean": lambda u: 1 - (1 - u) ** 0.5, "noise": lambda u: u**0.5}


def training_groups(store: LatentStore, dimensions: Sequence[str], config: TrainConfig) -> list[PromptGroup]:
    """The store's training pairs that the configuration asks for, by prompt.

    Which prompts ``max_prompts`` takes depends on their text alone: fewer are a part of more.

    Raises:
        PrismError: where there are none.
    """
    groups = store.groups("train", dimensions)
    if config.max_prompts:
        groups = sorted(groups, key=lambda group: prompt_key(group.prompt))[: config.max_prompts]
    if config.per_prompt:
        order = {video: place for place, video in enumerate(store.videos["video"].to_pylist())}
        groups = [_first_videos(group, config.per_prompt, order) for group in groups]
    groups = [group for group in groups if len(group.labels)]
    if not groups:
        raise PrismError(f"The store {store.folder} has no training pairs labelled {', '.join(dimensions)}.")
    return groups


def _first_videos(group: PromptGroup, count: int, order: Mapping[str, int]) -> PromptGroup:
    """The pairs among the first videos of a group."""
    kept = sorted(range(len(group.videos)), key=lambda place: order[group.videos[place]])[:count]
    renumbered = np.full(len(group.videos), -1)
    renumbered[kept] = np.arange(len(kept))
    first, second = renumbered[group.first], renumbered[group.second]
    rows = (first >= 0) & (second >= 0)
    videos = tuple(group.videos[place] for place in kept)
    return PromptGroup(group.prompt, videos, first[rows], second[rows], group.labels[rows])


class Batches:
    """Draws the batch of a step. Every prompt comes up once before any comes up again."""

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
                f"{config.t_low:g} and t_high {config.t_high:g}; choose them within."
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

    def draw(self, step: int, places: Sequence[int]) -> Batch:
        """The batch of a step (from 0), of the prompt groups at some of its ``prompts_per_step`` places."""
        latents, levels, prompts, first, second, labels, groups = [], [], [], [], [], [], []
        offset = 0
        for place, copy in itertools.product(places, range(self.config.draws_per_step)):
            index, epoch = self._group(step * self.config.prompts_per_step + place)
            group = self.groups[index]
            key = [self.config.seed, step, place, *([copy] if copy else [])]
            if self.config.noise_draws:  # the same few again, epoch by epoch
                draw = (epoch * self.config.draws_per_step + copy) % self.config.noise_draws
                key = [self.config.seed, index, draw, 0, 0]
            noisy, t = self._noisy(group, np.random.default_rng(key))
            latents.append(noisy)
            levels.append(t)
            prompts += [index] * len(group.videos)
            first.append(group.first + offset)
            second.append(group.second + offset)
            labels.append(group.labels)
            groups.append((len(group.videos), len(group.labels)))
            offset += len(group.videos)
        device = self.backbone.device
        return Batch(
            torch.cat(latents).to(device),
            torch.cat(levels).to(device),
            prompts,
            torch.from_numpy(np.concatenate(first)).to(device),
            torch.from_numpy(np.concatenate(second)).to(device),
            torch.from_numpy(np.concatenate(labels)).to(device, torch.float32),
            groups,
        )

    def _group(self, position: int) -> tuple[int, int]:
        """The prompt at a position of the endless sequence of shuffled epochs, and its epoch."""
        epoch, place = divmod(position, len(self.groups))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(len(self.groups))
        return int(self._order[1][place]), epoch

    def _noisy(self, group: PromptGroup, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The videos of a group at one noise level: (videos, ...) and (videos,)."""
        source = self.config.source
        share = _LEVELS[self.config.levels](rng.uniform())  # drawn by every source, to compare them
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
