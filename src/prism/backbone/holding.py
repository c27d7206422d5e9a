"""A pipeline in one search's hands at a time: who waits for it, and its modules in evaluation mode meanwhile.

A search wraps modules that other pipelines may share, so that what is held are the parts: all modules within them, the
scheduler, the guider, the tokenizers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prism.errors import PrismError

_CIRCLE = (
    "This thread works with one pipeline and asks for another whose own search waits for the first; let one thread "
    "at a time use both."
)


class _Here(threading.local):
    """This thread's own: the pipelines it holds, and how many holds are open, one inside another."""

    def __init__(self) -> None:
        self.pipes: list[Any] = []

    @property
    def place(self) -> tuple[int, int]:
        return threading.get_ident(), len(self.pipes)


here = _Here()
_changed = threading.Condition()
_holders: dict[int, int] = {}  # the thread that holds a part, by the part's id
_wanted: dict[int, set[int]] = {}  # the ids of what a waiting thread waits for


@contextmanager
def held(pipe: Any) -> Iterator[None]:
    """While open no other thread searches, reads or encodes with this pipeline, or with one that shares a part.

    Who comes second waits; a thread that holds the pipeline already goes on at once. All modules are in evaluation
    mode meanwhile, and each has the `training` flag that it had afterwards.

    Raises:
        PrismError: where two threads would wait for each other for ever.
    """
    if any(each is pipe for each in here.pipes):
        here.pipes.append(pipe)
        try:
            yield
        finally:
            here.pipes.pop()
        return
    parts = [part for part in (*pipe.components.values(), pipe.scheduler, pipe) if hasattr(part, "__dict__")]
    modules = [each for part in parts if isinstance(part, nn.Module) for each in part.modules()]
    keys = {id(part) for part in (*parts, *modules)}
    taken: set[int] = set()
    training: list[nn.Module] = []
    try:
        _take(keys, taken)
        here.pipes.append(pipe)
        for module in modules:
            if module.training:
                training.append(module)
                module.training = False  # not by `eval()`, which some models answer by changing their weights
        yield
    finally:
        for module in training:
            module.training = True
        if here.pipes and here.pipes[-1] is pipe:
            here.pipes.pop()
        with _changed:
            for key in taken:
                del _holders[key]
            _changed.notify_all()


def _take(keys: set[int], taken: set[int]) -> None:
    """Wait until all of `keys` are free or this thread's, and note in `taken` those that it did not have."""
    me = threading.get_ident()
    with _changed:
        try:
            while _others(keys, me):
                _wanted[me] = keys
                if _waits_for(me, me, set()):
                    raise PrismError(_CIRCLE)
                _changed.wait()
        finally:
            _wanted.pop(me, None)
        for key in keys - _holders.keys():
            _holders[key] = me
            taken.add(key)


def _others(keys: set[int], me: int) -> set[int]:
    """The other threads that hold some of `keys`."""
    return {_holders[key] for key in keys & _holders.keys()} - {me}


def _waits_for(thread: int, target: int, passed: set[int]) -> bool:
    """Whether `thread` waits for what `target` holds, or for who waits for it."""
    passed.add(thread)
    for other in _others(_wanted.get(thread, set()), thread):
        if other == target or (other not in passed and _waits_for(other, target, passed)):
            return True
    return False


def _after_fork() -> None:
    """In a child process no other thread lives, and none of the parent's searches goes on."""
    global _changed
    _changed = threading.Condition()
    _wanted.clear()
    me = threading.get_ident()
    for key in [key for key, holder in _holders.items() if holder != me]:
        del _holders[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
