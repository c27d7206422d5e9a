"""What a denoiser call is made of: the arguments kept from a stock call, and the tokens read from a block."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prism.backbone.families import BATCHED


@dataclass(frozen=True)
class Tokens:
    """Hidden states after a block, in raster order t, h, w, with the backbone's own text tokens beside them.

    visual: (B, L, D_vis), L = T * H * W. grid: (T, H, W). text: (B, Lt, D_vis), or None where the family has none.
    text_mask: (B, Lt) bool, True for a real token, or None where all of them count.
    lower: where several blocks were tapped, those below the last by number, (B, L, D_vis) each.
    """

    visual: Tensor
    grid: tuple[int, int, int]
    text: Tensor | None = None
    text_mask: Tensor | None = None
    lower: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.visual)

    def after(self, block: int) -> Tensor:
        """(B, L, D_vis) after one of the blocks that were tapped."""
        return self.lower.get(block, self.visual)

    def __getitem__(self, rows: Any) -> Tokens:
        take = lambda value: None if value is None else value[rows]  # noqa: E731
        lower = {block: value[rows] for block, value in self.lower.items()}
        return Tokens(self.visual[rows], self.grid, take(self.text), take(self.text_mask), lower)


@dataclass(frozen=True)
class Conditioning:
    """The arguments of a stock pipeline's first denoiser call, conditional rows only, without latents and timestep.

    `timestep` is a template: its dtype and its shape beyond the batch are those the pipeline passes. `noisy` and
    `dtype` are the name and the dtype of the latents that the denoiser takes.
    """

    arguments: dict[str, Any]
    batched: frozenset[str]
    timestep: Tensor
    noisy: str
    dtype: torch.dtype

    @classmethod
    def of(cls, arguments: Mapping[str, Any], rows: slice) -> Conditioning:
        """Keep `rows` of the call's arguments."""
        taken = take_rows(arguments, rows)
        batch = len(arguments[noisy_name(arguments)])
        timestep = taken.pop("timestep")
        if timestep.ndim == 0:
            timestep = timestep.expand(batch)[rows]
        noisy = noisy_name(taken)
        dtype = taken.pop(noisy).dtype
        batched = frozenset(name for name in taken if has_rows(name, arguments[name], batch))
        return cls(taken, batched, timestep, noisy, dtype)

    def __len__(self) -> int:
        return len(self.timestep)

    def __getitem__(self, rows: Any) -> Conditioning:
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        taken = {name: value[rows] if name in self.batched else value for name, value in self.arguments.items()}
        return replace(self, arguments=taken, timestep=self.timestep[rows])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings of one pipeline and call, one after another."""
        first = parts[0]
        joined = {
            name: torch.cat([part.arguments[name] for part in parts]) if name in first.batched else value
            for name, value in first.arguments.items()
        }
        return replace(first, arguments=joined, timestep=torch.cat([part.timestep for part in parts]))

    def call(self, noisy_latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """Arguments of the denoiser for `noisy_latents` at the model timestep (B,)."""
        template = self.timestep
        if not template.dtype.is_floating_point:
            timestep = timestep.floor().clamp(max=999)
        noisy_latents = noisy_latents.to(template.device, self.dtype)
        timestep = timestep.to(template.device, template.dtype)
        timestep = timestep.view(-1, *[1] * (template.ndim - 1)).expand(len(noisy_latents), *template.shape[1:])
        return {self.noisy: noisy_latents, "timestep": timestep, **self.arguments}


def noisy_name(arguments: Mapping[str, Any]) -> str:
    """The name under which the denoiser takes its latents."""
    return "hidden_states" if "hidden_states" in arguments else "sample"


def has_rows(name: str, value: Any, batch: int) -> bool:
    """Whether an argument of a denoiser call carries one row per sample of the batch."""
    return name in BATCHED and isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def take_rows(arguments: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """The same denoiser call for some rows of its batch (a slice or a list of indices)."""
    batch = len(arguments[noisy_name(arguments)])
    return {name: value[rows] if has_rows(name, value, batch) else value for name, value in arguments.items()}


def by_name(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser call by their names (some pipelines pass them by position)."""
    if not args:
        return kwargs
    plain = getattr(denoiser, "_orig_mod", denoiser)
    bound = inspect.signature(type(plain).forward).bind(plain, *args, **kwargs).arguments
    return {**{name: value for name, value in list(bound.items())[1:] if name != "kwargs"}, **bound.get("kwargs", {})}
