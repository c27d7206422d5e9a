"""Backbones without what training gave them: random weights, shuffled weights, and statistics without any backbone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone import Backbone
from prism.backbone.taps import Tokens
from prism.errors import PrismError
from prism.lab.judging_power import Subject
from prism.preference import LatentStore

STATISTICS = "statistics"  # the name of that control
MOST = 256  # videos that the scale of statistics is taken from


def untrained(subject: Subject, seed: int = 0, parts: Sequence[str] = ()) -> Subject:
    """A subject with random weights of the same configuration.

    parts: the components that get them, such as a text encoder that was trained along; (): the denoisers.
    """

    def make(module: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind: Any = type(module)
            config: Any = module.config
            fresh: nn.Module = kind.from_config(config) if isinstance(config, Mapping) else kind(copy.deepcopy(config))
        return fresh

    return _changed(subject, "random weights", make, parts)


def shuffled(subject: Subject, seed: int = 0, parts: Sequence[str] = ()) -> Subject:
    """A subject with the numbers of each of its weights in random order; arguments as of `untrained`."""

    def make(module: nn.Module) -> nn.Module:
        other, chance = copy.deepcopy(module), torch.Generator().manual_seed(seed)
        for weight in other.parameters():
            order = torch.randperm(weight.numel(), generator=chance).to(weight.device)
            weight.data = weight.data.flatten()[order].view(weight.shape).clone()
        return other

    return _changed(subject, "shuffled weights", make, parts)


def _changed(subject: Subject, name: str, make: Callable[[nn.Module], nn.Module], parts: Sequence[str]) -> Subject:
    def load() -> Backbone:
        backbone = subject.load()
        pipe = backbone.pipe
        components = dict(pipe.components)
        for part in parts or backbone.denoiser_names:
            module = components[part]
            fresh, dtype = make(module).to(backbone.device), next(module.parameters()).dtype
            if next(fresh.parameters()).dtype != dtype:
                fresh = fresh.to(dtype)
            components[part] = fresh.eval().requires_grad_(False)
        taken = inspect.signature(type(pipe).__init__).parameters
        config = {key: value for key, value in pipe.config.items() if key in taken and key not in components}
        other = type(pipe)(**components, **config)
        other.set_progress_bar_config(disable=True)
        return Backbone(other, None if backbone.t_range == (0.0, 1000.0) else backbone.reads)

    return replace(subject, name=name, load=load, run=None, compute=None)


class Statistics(Backbone):
    """A backbone whose one token per video are statistics of the noisy latent: no network, and no prompt.

    Per channel: mean, logarithms of the variance and of the mean squared differences over time, height and width, and
    the mean of each latent frame; each standardised by its mean and deviation over noised videos of a store.
    """

    def __init__(self, base: Backbone, store: LatentStore) -> None:
        self.__dict__.update(base.__dict__)
        videos = [video for group in store.groups("train") for video in group.videos][:MOST]
        if not videos:
            raise PrismError(f"The store {store.folder} has no training pairs to take statistics from.")
        latents = store.latents(videos).float()
        chance = torch.Generator().manual_seed(0)
        low, high = base.t_range
        t = low + (high - low) * torch.rand(len(latents), generator=chance)
        noise = torch.randn(latents.shape, generator=chance)
        rows = statistics(base.add_noise(latents, t, noise))
        self._mean, self._scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
        self.family = replace(base.family, widths=rows.shape[1])
        self.widths = [rows.shape[1]] * self.num_blocks

    @torch.no_grad()
    def tokens(
        self,
        noisy_latents: Tensor,
        conditioning: Any,
        t: Any,
        block: int | Sequence[int],
        stop: bool = True,
        grad: bool = False,
    ) -> Tokens:
        """One token (B, 1, statistics), the same after every block."""
        rows = (statistics(noisy_latents.float().cpu()) - self._mean) / self._scale
        return Tokens(rows[:, None].to(noisy_latents.device), (1, 1, 1))


def statistics(latents: Tensor) -> Tensor:
    """(B, statistics) of latents (B, C, T, H, W)."""
    if latents.ndim != 5:
        raise PrismError(
            f"Statistics need latents (B, channels, T, H, W), found {tuple(latents.shape)}; leave them out."
        )
    space = (2, 3, 4)
    parts = [latents.mean(space), latents.var(space, unbiased=False).clamp(min=1e-8).log()]
    for axis in space:
        if latents.shape[axis] > 1:
            parts.append(latents.diff(dim=axis).square().mean(space).clamp(min=1e-8).log())
    if latents.shape[2] > 1:
        parts.append(latents.mean((3, 4)).flatten(1))
    return torch.cat(parts, 1)


def statistics_of(subject: Subject, store: LatentStore) -> Subject:
    """A subject of statistics alone."""
    return Subject(STATISTICS, lambda: Statistics(subject.load(), store), 0)
