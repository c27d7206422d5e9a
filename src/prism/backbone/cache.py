"""Conditionings that are kept: counted by the memory they hold, and dropped where it is too much."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from prism.backbone.conditioning import Conditioning

Key = TypeVar("Key", bound=Hashable)
Entry = TypeVar("Entry")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in lists and dictionaries as deep as they go, and in a `Conditioning`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Conditioning):
        yield from tensors_of([value.arguments, *value._beside().values()])
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with `change` made to each of `tensors_of`, in that order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Conditioning):
        arguments = with_tensors(value.arguments, change)
        return replace(value, arguments=arguments, **with_tensors(value._beside(), change))
    if isinstance(value, dict):
        return {name: with_tensors(each, change) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(each, change) for each in value)
    return value


def alone(value: Tensor) -> Tensor:
    """The tensor, copied where it is part of a larger one, which it would keep in memory."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


@dataclass(frozen=True)
class Stowed:
    """A conditioning in host memory, and where its tensors belong."""

    conditioning: Conditioning
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, conditioning: Conditioning) -> Stowed:
        devices = tuple(value.device for value in tensors_of(conditioning))
        return cls(with_tensors(conditioning, lambda value: alone(value).cpu()), devices)

    def back(self) -> Conditioning:
        devices = iter(self.devices)
        back: Conditioning = with_tensors(self.conditioning, lambda value: value.to(next(devices)))
        return back


class ConditioningCache(Generic[Key, Entry]):
    """Conditionings by key; `nbytes` is what they hold, tensors that several share counted once.

    An entry that is read or put in counts as used just now.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._users: dict[int, int] = {}  # of each storage, by its address

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __getitem__(self, key: Key) -> Entry:
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: Key, entry: Entry) -> None:
        """Put an entry in. Rows of larger tensors hold these whole: see `alone`."""
        if key in self._entries:
            self._drop(key)
        self._entries[key] = entry
        for address, size in self._storages(entry).items():
            self._users[address] = self._users.get(address, 0) + 1
            self.nbytes += size if self._users[address] == 1 else 0

    def trim(self, most_bytes: int, spared: int = 1) -> None:
        """Drop entries until the rest fits, those used longest ago first, but for the `spared` used last."""
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
    """A key for what a call conditions on, or None where an argument (a tensor) has no short faithful text."""
    plain = (str, int, float, bool, type(None))
    faithful = {}
    for name, value in call.items():
        if isinstance(value, Image.Image):
            value = f"{value.mode}{value.size}{hashlib.sha256(value.tobytes()).hexdigest()}"
        if not isinstance(value, plain):
            return None
        faithful[name] = value
    return repr(sorted(faithful.items()))
