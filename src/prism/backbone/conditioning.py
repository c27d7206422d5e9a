"""What a denoiser call is made of: the arguments kept from a stock call, and the tokens read from a block."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prism.backbone import layout
from prism.backbone.family import Family, noisy_name
from prism.backbone.parts import unwrapped
from prism.errors import PrismError

# Pictures of adapters (IP-Adapter) in a denoiser call: rows in a tensor, or in a list of one per adapter.
_ADAPTERS = re.compile(r"(^|\.)(ip_adapter_image_embeds|ip_hidden_states|added_cond_kwargs\.image_embeds)(\.|$)")


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
    def of(cls, arguments: Mapping[str, Any], rows: slice, family: Family, config: Any, pipeline: type) -> Conditioning:
        """Keep `rows` of a call's arguments; `config` is the denoiser's, `pipeline` the class of what called it."""
        taken = take_rows(arguments, rows, family)
        name, timed = noisy_name(taken, family), family.timestep_argument
        batch = len(arguments[name])
        timestep, latents = taken.pop(timed), taken.pop(name)
        if timestep.ndim == 0:
            timestep = timestep.expand(batch)[rows]
        flat = {path: value for path, value in flattened(arguments).items() if path not in (name, timed)}
        batched = frozenset(path for path, value in flat.items() if has_rows(path, value, batch, family))
        axis = layout.channel_axis(family.layout)
        count = family.channels(config, latents)
        appended = latents.narrow(axis, count, latents.shape[axis] - count) if count < latents.shape[axis] else None
        latents = latents.narrow(axis, 0, count)
        given, times = _given(taken, timestep, latents, family, config, pipeline)
        kept = None if given is None else latents
        told = (taken, batched, timestep, timed, name, axis, latents.dtype, tuple(latents.shape[1:]))
        return cls(*told, appended, kept, given, times)

    def __len__(self) -> int:
        return len(self.timestep)

    def __getitem__(self, rows: Any) -> Conditioning:
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        taken = _nested(
            {
                path: _take(value, rows, len(self)) if path in self.batched else value
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
        joined = _nested(
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
    arguments: Mapping[str, Any], timestep: Tensor, latents: Tensor, family: Family, config: Any, pipeline: type
) -> tuple[Tensor | None, Tensor | None]:
    """Which latents and which timesteps of a captured call are a condition's, or None where none is."""
    mask = arguments.get("condition_mask")
    if mask is not None:
        given = mask.bool() if bool(mask.any()) else None
        times = None if given is None or timestep.ndim < 5 else given.flatten(3).any(3)[..., None, None]
        return given, times
    if {base.__name__ for base in pipeline.__mro__} & set(family.first_frame) and config.get(
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
        cells = (
            times[:, None, :, None, None]
            if frames
            else times.unflatten(1, family.grid(config, arguments, latents))[:, None]
        )
    for axis in (2, 3, 4):
        if cells.shape[axis] not in (1, latents.shape[axis]):
            cells = cells.repeat_interleave(latents.shape[axis] // cells.shape[axis], axis)
    return cells, times


def has_rows(name: str, value: Any, batch: int, family: Family) -> bool:
    """Whether an argument of a denoiser call carries a row per sample of the batch, or several (a first and a last
    image's embeddings). What stands in a dictionary is named "argument.key"; a dictionary does where any in it does.
    """
    if isinstance(value, dict):
        return any(has_rows(f"{name}.{key}", inner, batch, family) for key, inner in value.items())
    named = name in family.batched or any(
        name.startswith(f"{other}.") for other in family.batched if len(other) < len(name)
    )
    named = named or _ADAPTERS.search(name) is not None
    if not named or not isinstance(value, Tensor | list):
        return False
    if isinstance(value, list):
        return len(value) == batch
    return value.ndim > 0 and len(value) > 0 and len(value) % batch == 0


def take_rows(arguments: Mapping[str, Any], rows: Any, family: Family) -> dict[str, Any]:
    """The same denoiser call for some rows of its batch (a slice or a list of indices), in dictionaries too."""
    batch = len(arguments[noisy_name(arguments, family)])
    return _nested(
        {
            path: _take(value, rows, batch) if has_rows(path, value, batch, family) else value
            for path, value in flattened(arguments).items()
        }
    )


def flattened(arguments: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Arguments by name, what stands in dictionaries by "argument.key", and the tensors of several adapters by
    "argument.key.[place]"."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            found |= flattened(value, f"{before}{name}.")
        elif isinstance(value, list) and value and _ADAPTERS.search(before + name):
            found |= {f"{before}{name}.[{place}]": each for place, each in enumerate(value)}
        else:
            found[before + name] = value
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, name = path.split(".")
        listed = outer.pop() if name.startswith("[") else None  # one of a list, whose places rise
        place = found
        for each in outer:
            place = place.setdefault(each, {})
        if listed is not None:
            place.setdefault(listed, []).append(value)
        else:
            place[name] = value
    return found


def _take(value: Any, rows: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value.unflatten(0, (batch, -1))[rows].flatten(0, 1)
    return value[rows] if isinstance(rows, slice) else [value[int(row)] for row in rows]


def _cat(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else [row for value in values for row in value]


def by_name(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser call by their names (some pipelines pass them by position)."""
    if args:
        plain = unwrapped(denoiser)
        signature = inspect.signature(type(plain).forward)
        bound = signature.bind(plain, *args, **kwargs).arguments
        others = [name for name, taken in signature.parameters.items() if taken.kind is taken.VAR_KEYWORD]
        found = dict(list(bound.items())[1:])
        rest = found.pop(others[0], {}) if others else {}
        kwargs = {**found, **rest}
    if isinstance(kwargs.get("fps"), list):  # SkyReels-V2 gives the call's one rate a row, and reads it at batch 1 only
        kwargs = {**kwargs, "fps": kwargs["fps"][:1]}
    return kwargs


def is_single(name: str, value: Any) -> bool:
    """Whether a call's `image` or `video` is one for all rows, not a list with one a row; a video lists its frames."""
    if name == "video" and isinstance(value, list | tuple) and value:
        value = value[0]
    return value is not None and not isinstance(value, list | tuple)
