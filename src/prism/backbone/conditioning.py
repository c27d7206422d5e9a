"""Conditionings: the denoiser's arguments other than latents and timestep, captured from a stock call and cached.

A `Conditioning` is captured once per prompt and cached in a `ConditioningCache`, which can be trimmed to a number of
bytes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from prism.backbone import layout
from prism.backbone.denoiser_call import DenoiserCall, flattened, nested, take
from prism.errors import PrismError

Key = TypeVar("Key", bound=Hashable)
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Conditioning:
    """The arguments of a stock pipeline's first denoiser call, conditional rows only, without latents and timestep.

    arguments: the other arguments by name; batched: the paths of those with a row per sample.
    timestep: a template, (B, ...), as the pipeline passes it; timed: its name; followers: others (B,) that hold it.
    noisy, dtype, shape: name, dtype and shape of one row of the latents that the denoiser takes.
    appended: channels or tokens after the latents' (an image's latents, a mask), or None; axis: theirs.
    given: (B, ...) bool, True where the pipeline shows the denoiser a condition in place of noise; kept: the latents
        with that condition. Both None where there is none.
    given_times: bool, shaped like the timestep, True where the template's timestep stays; None: nowhere.
    control: the same of a ControlNet's call, whose outputs are no part of `arguments`; None where there is none.
    control_levels: the lowest and the highest noise level at which the ControlNet works; None: at all.
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
    control: Conditioning | None = None
    control_levels: tuple[float, float] | None = None
    followers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        call: DenoiserCall,
        rows: slice,
        pipeline: type,
        control: Conditioning | None = None,
        control_levels: tuple[float, float] | None = None,
    ) -> Conditioning:
        """Keep `rows` of a denoiser call that a pipeline of the class `pipeline` made; the rest as the fields."""
        call = call.without(call.family.control_arguments)
        call = replace(call, arguments={**call.arguments, **call.family.read_arguments})
        part = call.rows(rows)
        name, timed = part.noisy_name, call.family.timestep_argument
        timestep, (latents, appended, axis) = part.timestep, part.parted()
        if timestep.shape in ((), (1,)):  # one for all rows
            timestep = timestep.expand(call.batch)[rows]
        others = {path: value for path, value in part.arguments.items() if path not in (name, timed)}
        flat = {path: value for path, value in flattened(call.arguments).items() if path not in (name, timed)}
        batched = frozenset(path for path, value in flat.items() if call.has_rows(path, value))
        mask, timestep_mask = _condition_masks(part, timestep, latents, pipeline)
        return cls(
            arguments=others,
            batched=batched,
            timestep=timestep,
            timed=timed,
            noisy=name,
            axis=axis,
            dtype=latents.dtype,
            shape=tuple(latents.shape[1:]),
            appended=appended,
            kept=None if mask is None else latents,
            given=mask,
            given_times=timestep_mask,
            control=control,
            control_levels=control_levels,
            followers=tuple(n for n in call.family.further_timesteps if part.arguments.get(n) is not None),
        )

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
        fields = {**self._tensor_fields(), "control": self.control}
        changes: Any = {name: None if value is None else value[rows] for name, value in fields.items()}
        return replace(self, arguments=taken, **changes)

    def _tensor_fields(self) -> dict[str, Tensor | None]:
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
        fields: Any = [part._tensor_fields() for part in parts]
        changes: Any = {
            name: None if value is None else torch.cat([each[name] for each in fields])
            for name, value in fields[0].items()
        }
        if first.control is not None:
            changes["control"] = Conditioning.cat([part.control for part in parts])  # type: ignore[misc]  # all have one
        return replace(first, arguments=joined, **changes)

    def shapes(self) -> dict[str, Any]:
        """Shapes of the tensors, by name, which conditionings must share to be run in one batch."""
        shapes: dict[str, Any] = {
            path: value.shape[1:] if path in self.batched else value.shape
            for path, value in flattened(self.arguments).items()
            if isinstance(value, Tensor)
        }
        if self.control is None:
            return shapes
        return {**shapes, "control": self.control.shapes(), "control_levels": self.control_levels}

    def call(self, noisy_latents: Tensor, timestep: Tensor, length: int = 1000) -> dict[str, Any]:
        """Arguments of the denoiser for `noisy_latents` at the model timestep (B,), below `length` where it is an int.

        Raises PrismError for latents of another shape or layout than the captured call's.
        """
        more = 0 if self.appended is None or noisy_latents.ndim != 3 else self.appended.shape[1]
        if more and noisy_latents.shape[1] == self.shape[0] + more:  # the loop's, with the conditions' tokens
            noisy_latents = noisy_latents[:, : self.shape[0]]
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
        followers = dict.fromkeys(self.followers, timestep.flatten(1).amax(1) if timestep.ndim > 1 else timestep)
        return {self.noisy: latents, self.timed: timestep, **self.arguments, **followers}


@dataclass(frozen=True)
class Ragged:
    """Conditionings of one row each that do not fit one batch, because their texts are of different lengths."""

    parts: tuple[Conditioning, ...]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, rows: Any) -> Any:
        chosen = self.parts[rows] if isinstance(rows, int | slice) else tuple(self.parts[row] for row in rows)
        return chosen if isinstance(chosen, Conditioning) else Conditioning.cat(chosen)


def _condition_masks(
    call: DenoiserCall, timestep: Tensor, latents: Tensor, pipeline: type
) -> tuple[Tensor | None, Tensor | None]:
    """Masks of the latents and of the timesteps of a captured call that hold a condition, each None where none does."""
    family, condition_mask = call.family, call.arguments.get("condition_mask")
    if condition_mask is not None:
        mask = condition_mask.bool() if bool(condition_mask.any()) else None
        times = None if mask is None or timestep.ndim < 5 else mask.flatten(3).any(3)[..., None, None]
        return mask, times
    if {base.__name__ for base in pipeline.__mro__} & set(family.first_frame_pipelines) and call.config.get(
        "image_condition_type"
    ) != "latent_concat":
        axis = family.layout.index("T")
        mask = torch.zeros_like(latents, dtype=torch.bool)
        mask.narrow(axis, 0, 1).fill_(True)
        return mask, None
    if timestep.ndim == 1:
        return None, None
    # Sampled frames have the highest timestep of their row.
    times = timestep != timestep.flatten(1).amax(1).view(-1, *[1] * (timestep.ndim - 1))
    if not bool(times.any()):
        return None, None
    if bool(timestep[times].any()):
        raise PrismError(
            f"{pipeline.__name__} starts some frames at a noise level of their own, and a judge reads all frames at "
            "one; give conditions in full strength."
        )
    if layout.is_packed(family.layout):
        given = times[:, : latents.shape[1], None]  # an appended condition's follow
        return given if bool(given.any()) else None, times
    cells = times[..., None, None] if times.ndim == 3 else times  # (B, 1, T) of SANA-WM
    if times.ndim == 2:  # one per frame, or one per token
        frames = times.shape[1] == latents.shape[2]
        cells = times[:, None, :, None, None] if frames else times.unflatten(1, call.grid())[:, None]
    for axis in (2, 3, 4):
        if cells.shape[axis] not in (1, latents.shape[axis]):
            cells = cells.repeat_interleave(latents.shape[axis] // cells.shape[axis], axis)
    return cells, times


def _cat(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else [row for value in values for row in value]


# -- the cache


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: in nested lists and dictionaries, and in a `Conditioning`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Conditioning):
        yield from tensors_of([value.arguments, *value._tensor_fields().values(), value.control])
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with each of its tensors replaced by `change(tensor)`, in the order of `tensors_of`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Conditioning):
        parts = {"arguments": value.arguments, **value._tensor_fields(), "control": value.control}
        return replace(value, **with_tensors(parts, change))
    if isinstance(value, dict):
        return {name: with_tensors(each, change) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(each, change) for each in value)
    return value


def compacted(value: Tensor) -> Tensor:
    """The tensor, copied where it is a view into a larger one, which it would keep in memory."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


@dataclass(frozen=True)
class Stowed:
    """A conditioning moved to host memory, and the devices to bring its tensors back to."""

    conditioning: Conditioning
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, conditioning: Conditioning) -> Stowed:
        devices = tuple(value.device for value in tensors_of(conditioning))
        return cls(with_tensors(conditioning, lambda value: compacted(value).cpu()), devices)

    def back(self) -> Conditioning:
        devices = iter(self.devices)
        back: Conditioning = with_tensors(self.conditioning, lambda value: value.to(next(devices)))
        return back


class ConditioningCache(Generic[Key, Entry]):
    """Conditionings by key. `nbytes` is the memory of their tensors; a storage that several share counts once.

    Reading or setting an entry makes it the one used last.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._users: dict[int, int] = {}  # entries that use a storage, by its address

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __getitem__(self, key: Key) -> Entry:
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: Key, entry: Entry) -> None:
        """Set an entry. A row of a larger tensor keeps all of it in memory, unless it is `compacted`."""
        if key in self._entries:
            self._drop(key)
        self._entries[key] = entry
        for address, size in self._storages(entry).items():
            self._users[address] = self._users.get(address, 0) + 1
            self.nbytes += size if self._users[address] == 1 else 0

    def trim(self, most_bytes: int, spared: int = 1) -> None:
        """Drop the least recently used entries until the rest fits `most_bytes`, but never the last `spared`."""
        while self.nbytes > most_bytes and len(self._entries) > spared:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        self.nbytes = 0
        self._entries.clear()
        self._users.clear()

    def _drop(self, key: Key) -> None:
        for address, size in self._storages(self._entries.pop(key)).items():
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                self.nbytes -= size

    @staticmethod
    def _storages(entry: Any) -> dict[int, int]:
        held = entry.conditioning if isinstance(entry, Stowed) else entry
        storages = (value.untyped_storage() for value in tensors_of(held))
        return {storage.data_ptr(): storage.nbytes() for storage in storages}


def cache_key(call: dict[str, Any]) -> str | None:
    """A text that is equal for equal arguments of a call, or None where one of them (a tensor) has no short text."""
    plain = (str, int, float, bool, type(None))
    faithful = {}
    for name, value in call.items():
        if isinstance(value, Image.Image):
            value = f"{value.mode}{value.size}{hashlib.sha256(value.tobytes()).hexdigest()}"
        if not isinstance(value, plain):
            return None
        faithful[name] = value
    return repr(sorted(faithful.items()))
