"""Batches by prompt group: each step's randomness is a function of (seed, step, place), so resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.preference import LatentStore, PromptGroup
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


class Batches:
    """Draws the batch of a step. Every prompt comes up once before any comes up again."""

    def __init__(
        self, store: LatentStore, groups: Sequence[PromptGroup], backbone: Backbone, config: TrainConfig
    ) -> None:
        self.store, self.groups, self.backbone, self.config = store, groups, backbone, config
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        self._states: list[int] = []
        if config.source != "renoised":
            if not store.has_trajectories:
                raise PrismError(
                    f"The source {config.source} needs trajectories, and the store {store.folder} holds none; "
                    "use the source renoised."
                )
            levels = store.trajectory(groups[0].videos[:1])[1][0]
            self._states = [i for i, t in enumerate(levels.tolist()) if config.t_low <= t <= config.t_high]
            if not self._states:
                raise PrismError(
                    f"No recorded state of {store.folder} has t from {config.t_low:g} to {config.t_high:g}; "
                    "widen t_low and t_high."
                )

    def draw(self, step: int, places: Sequence[int]) -> Batch:
        """The batch of a step (from 0), of the prompt groups at some of its ``prompts_per_step`` places."""
        latents, levels, prompts, first, second, labels = [], [], [], [], [], []
        offset = 0
        for place in places:
            index = self._group(step * self.config.prompts_per_step + place)
            group = self.groups[index]
            noisy, t = self._noisy(group, np.random.default_rng([self.config.seed, step, place]))
            latents.append(noisy)
            levels.append(t)
            prompts += [index] * len(group.videos)
            first.append(group.first + offset)
            second.append(group.second + offset)
            labels.append(group.labels)
            offset += len(group.videos)
        device = self.backbone.device
        return Batch(
            torch.cat(latents).to(device),
            torch.cat(levels).to(device),
            prompts,
            torch.from_numpy(np.concatenate(first)).to(device),
            torch.from_numpy(np.concatenate(second)).to(device),
            torch.from_numpy(np.concatenate(labels)).to(device, torch.float32),
        )

    def _group(self, position: int) -> int:
        """The prompt at a position of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.groups))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(len(self.groups))
        return int(self._order[1][place])

    def _noisy(self, group: PromptGroup, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The videos of a group at one noise level: (videos, ...) and (videos,)."""
        source = self.config.source
        level = rng.uniform(self.config.t_low, self.config.t_high)  # drawn by every source, to compare them
        if source == "mixed":
            source = ("renoised", "trajectory")[int(rng.integers(2))]
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
