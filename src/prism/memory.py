"""Work in batches that become smaller where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from prism.errors import PrismError

T = TypeVar("T")

# In an allocator's words; on a CPU torch raises a plain RuntimeError.
CALLERS = "_raised_by_a_callback"  # an attribute of exceptions
_WORDS = (
    "out of memory",
    "not enough memory",
    "defaultcpuallocator",
    "can't allocate memory",
    "cannot allocate memory",
)


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device, in no callback of the caller's."""
    if getattr(error, CALLERS, False):
        return False
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def halved(rows: int, work: str, kind: str = "video") -> int:
    """Half of `rows` videos per batch, with a warning, and the device's spare memory given back.

    Raises PrismError where it was a single one.
    """
    if rows <= 1:
        raise PrismError(
            f"Memory ran out with a single {kind} per batch while {work}; use smaller videos, or offload the "
            "pipeline's models (enable_model_cpu_offload)."
        )
    warnings.warn(
        f"Memory ran out with {rows} {kind}s per batch while {work}; going on with {rows // 2}.", stacklevel=3
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows // 2


def in_batches(items: Sequence[T], rows: int, work: Callable[[Sequence[T]], Any], name: str) -> int:
    """Call `work` on at most `rows` of `items` at a time, in order; a batch that ran out of memory again, in halves.

    `work` must leave nothing behind where it fails.

    Returns:
        The rows per batch that it came down to.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + rows]
        if _fits(work, batch):
            start += len(batch)
        else:  # here the failed attempt's tensors are gone
            rows = halved(len(batch), name)
    return rows


def _fits(work: Callable[[Sequence[T]], Any], batch: Sequence[T]) -> bool:
    try:
        work(batch)
    except Exception as error:
        if not ran_out(error):
            raise
        return False
    return True
