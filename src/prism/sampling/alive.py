"""Processes that wait for each other, as long as all of them live: each shows a sign of life in the group's store.

A collective of torch.distributed waits for its time limit where a process was killed; the last steps of a large model
may take hours, so that no limit fits. So processes meet in the store first, and go into a collective together.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch import distributed

from prism.checks import quoted
from prism.errors import PrismError

INTERVAL = 5.0  # seconds between signs of life
SILENCE = 180.0  # seconds after which a process that shows none is taken to have ended
_MET, _ALIVE = "prism/met", "prism/alive/{}"

_meetings: dict[int, list[Any]] = {}  # by a store's id: the store, and how often this process met the others in it


def meet() -> None:
    """Wait until all processes of the default group are here.

    Raises:
        PrismError: where one of them ended meanwhile.
    """
    store, rank, size = _store(), distributed.get_rank(), distributed.get_world_size()
    if store is None:
        return
    if id(store) not in _meetings:
        _meetings[id(store)] = [store, 0]
        threading.Thread(target=_show, args=(store, _ALIVE.format(rank)), daemon=True).start()
    _meetings[id(store)][1] += 1
    all_here = size * _meetings[id(store)][1]
    seen: dict[int, tuple[int, float]] = {}
    pause, looked = 0.001, time.monotonic()
    try:
        store.add(_MET, 1)
        while store.add(_MET, 0) < all_here:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            if time.monotonic() - looked > INTERVAL:
                looked = time.monotonic()
                for other in range(size):
                    signs = store.add(_ALIVE.format(other), 0)
                    if seen.get(other, (-1, 0.0))[0] != signs:
                        seen[other] = (signs, looked)
                    elif looked - seen[other][1] > SILENCE:
                        raise PrismError(
                            f"Process {other} has shown no sign of life for {SILENCE:.0f} seconds: it was killed, or "
                            "its machine is gone; start the run again."
                        )
    except RuntimeError as error:  # the process that kept the store ended
        raise PrismError("The process that the others meet at ended; start the run again.") from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Say in a sentence that another process ended in the middle of the collective in the block."""
    try:
        yield
    except RuntimeError as error:
        raise PrismError(
            f"Another process of this run ended while this one waited for it ({quoted(error, 120)}); start the run "
            "again: what was finished or saved is kept where the command has --resume."
        ) from error


def _show(store: Any, key: str) -> None:
    """Show signs of life for as long as the process and the store live."""
    try:
        while True:
            store.add(key, 1)
            time.sleep(INTERVAL)
    except RuntimeError:
        return


def _store() -> Any:
    """The store of the default group, or None where this version of torch keeps it elsewhere."""
    find = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()
