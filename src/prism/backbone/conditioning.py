"""Conditionings: what a denoiser is told beside the latents, kept from a stock call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prism.backbone import layout
from prism.backbone.denoiser_call import DenoiserCall, flattened, nested, take
from prism.errors import PrismError


@dataclass(frozen=True)
class Conditioning:
    """The arguments of a stock pipeline's first denoiser call, conditional rows only, without latents and timestep.

    `timestep` is a template: its dtype and its shape beyond the batch are those the pipeline passes; `timed` is its
    name. `noisy`, `axis` and `dtype` are the name, the channel axis and the dtype of the latents that the denoiser
    takes, `shape` is that of one row of them. `appended` follows them on that axis (an image's latents, a mask), or is
    None. Where `given` (bool, beside the latents) or `given_times` (bool, beside the timestep) is True the pipeline
    shows the denoiser a condition in place of noise: `kept` there, and the template's timestep.
    """

    arguments: dict[str, Any]
    batched: frozenset[str]
    timestep: Tensor
    timed: str
    noisy: str
    axis: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    appended: Tensor | None = None
    kept: Tensor | None = None
    given: Tensor | None = None
    given_times: Tensor | None = None

    @classmethod
    def of(cls, call: DenoiserCall, rows: slice, pipeline: type) -> Conditioning:
        """Keep `rows` of a denoiser call; `pipeline` is the class of what made it."""
        part, family = call.rows(rows), call.family
        name, timed = part.noisy_name, family.timestep_argument
        timestep, latents = part.timestep, part.noisy
        if timestep.ndim == 0:
            timestep = timestep.expand(call.batch)[rows]
        taken = {path: value for path, value in part.arguments.items() if path not in (name, timed)}
        flat = {path: value for path, value in flattened(call.arguments).items() if path not in (name, timed)}
        batched = frozenset(path for path, value in flat.items() if call.has_rows(path, value))
        axis = layout.channel_axis(family.layout)
        count = family.channels(call.config, latents)
        appended = latents.narrow(axis, count, latents.shape[axis] - count) if count < latents.shape[axis] else None
        latents = latents.narrow(axis, 0, count)
        given, times = _given(part, timestep, latents, pipeline)
        kept = None if given is None else latents
        told = (taken, batched, timestep, timed, name, axis, latents.dtype, tuple(latents.shape[1:]))
        return cls(*told, appended, kept, given, times)

    def __len__(self) -> int:
        return len(self.timestep)

    def __getitem__(self, rows: Any) -> Conditioning:
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        taken = nested(
            {
                path: take(value, rows, len(self)) if path in self.batched else value
                for path, value in flattened(self.arguments).items()
            }
        )
        changes: Any = {name: None if value is None else value[rows] for name, value in self._beside().items()}
        return replace(self, arguments=taken, **changes)

    def _beside(self) -> dict[str, Tensor | None]:
        names = ("timestep", "appended", "kept", "given", "given_times")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning | Ragged:
        """Rows of several conditionings of one pipeline and call, one after another."""
        first = parts[0]
        if any(part.shapes() != first.shapes() for part in parts[1:]):
            return Ragged(tuple(part[row] for part in parts for row in range(len(part))))
        every = [flattened(part.arguments) for part in parts]
        joined = nested(
            {
                path: _cat([flat[path] for flat in every]) if path in first.batched else value
                for path, value in every[0].items()
            }
        )
        beside: Any = [part._beside() for part in parts]
        changes: Any = {
            name: None if value is None else torch.cat([each[name] for each in beside])
            for name, value in beside[0].items()
        }
        return replace(first, arguments=joined, **changes)

    def shapes(self) -> dict[str, Any]:
        """What two conditionings must share to be run in one batch."""
        return {
            path: value.shape[1:] if path in self.batched else value.shape
            for path, value in flattened(self.arguments).items()
            if isinstance(value, Tensor)
        }

    def call(self, noisy_latents: Tensor, timestep: Tensor, length: int = 1000) -> dict[str, Any]:
        """Arguments of the denoiser for `noisy_latents` at the model timestep (B,), one of `length` where it is whole.

        Raises PrismError for latents of another shape or layout than the captured call's.
        """
        if tuple(noisy_latents.shape[1:]) != self.shape:
            raise PrismError(
                f"The latents have the shape {tuple(noisy_latents.shape)}, and the pipeline's call makes (B, "
                f"{', '.join(map(str, self.shape))}); give the arguments they were sampled with."
            )
        template, latents = self.timestep, noisy_latents.to(self.timestep.device, self.dtype)
        if self.given is not None:
            latents = torch.where(self.given, self.kept, latents)  # type: ignore[arg-type]  # both or neither
        if self.appended is not None:
            latents = torch.cat([latents, self.appended.to(latents.dtype)], self.axis)
        if not template.dtype.is_floating_point:
            timestep = timestep.floor().clamp(max=length - 1)
        timestep = timestep.to(template.device, template.dtype)
        timestep = timestep.view(-1, *[1] * (template.ndim - 1)).expand(len(latents), *template.shape[1:])
        if self.given_times is not None:
            timestep = torch.where(self.given_times, template, timestep)
        return {self.noisy: latents, self.timed: timestep, **self.arguments}


@dataclass(frozen=True)
class Ragged:
    """Conditionings of one row each that do not fit one batch: their texts are of different lengths."""

    parts: tuple[Conditioning, ...]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, rows: Any) -> Any:
        chosen = self.parts[rows] if isinstance(rows, int | slice) else tuple(self.parts[row] for row in rows)
        return chosen if isinstance(chosen, Conditioning) else Conditioning.cat(chosen)


def _given(
    call: DenoiserCall, timestep: Tensor, latents: Tensor, pipeline: type
) -> tuple[Tensor | None, Tensor | None]:
    """Which latents and which timesteps of a captured call are a condition's, or None where none is."""
    family, mask = call.family, call.arguments.get("condition_mask")
    if mask is not None:
        given = mask.bool() if bool(mask.any()) else None
        times = None if given is None or timestep.ndim < 5 else given.flatten(3).any(3)[..., None, None]
        return given, times
    if {base.__name__ for base in pipeline.__mro__} & set(family.first_frame) and call.config.get(
        "image_condition_type"
    ) != "latent_concat":
        axis = family.layout.index("T")
        given = torch.zeros_like(latents, dtype=torch.bool)
        given.narrow(axis, 0, 1).fill_(True)
        return given, None
    if timestep.ndim == 1:
        return None, None
    times = timestep != timestep.flatten(1).amax(1).view(-1, *[1] * (timestep.ndim - 1))  # what is sampled is noisier
    if not bool(times.any()):
        return None, None
    if bool(timestep[times].any()):
        raise PrismError(
            f"{pipeline.__name__} starts some frames at a noise level of their own, and a judge reads all frames at "
            "one; give conditions in full strength."
        )
    if layout.is_packed(family.layout):
        return times[..., None], times
    cells = times
    if times.ndim == 2:  # one a frame, or one a token
        frames = times.shape[1] == latents.shape[2]
        cells = times[:, None, :, None, None] if frames else times.unflatten(1, call.grid())[:, None]
    for axis in (2, 3, 4):
        if cells.shape[axis] not in (1, latents.shape[axis]):
            cells = cells.repeat_interleave(latents.shape[axis] // cells.shape[axis], axis)
    return cells, times


def _cat(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else [row for value in values for row in value]


def is_single(name: str, value: Any) -> bool:
    """Whether a call's `image` or `video` is one for all rows, not a list with one a row; a video lists its frames."""
    if name == "video" and isinstance(value, list | tuple) and value:
        value = value[0]
    return value is not None and not isinstance(value, list | tuple)
