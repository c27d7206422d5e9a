"""Work divided: among the processes of a job, and into batches that fit into memory."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prism.errors import PrismError, quoted

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)  # of a candidate; keys of one kind can be sorted

CALLERS = "_raised_by_a_callback"  # an attribute of exceptions
# In an allocator's words; on a CPU torch raises a plain RuntimeError.
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


@dataclass
class Team:
    """This process's `rank` among the `size` that share work; alone unless `gathered`.

    `device`: where tensors are that they send each other. What processes tell each other is theirs alone: it comes from
    no file and no other machine's user.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def gathered(cls, device: str | torch.device | None = None) -> Team:
        """The processes that a launcher started, to compute on `device`; None: on GPUs where there are some.

        A group that does not exist yet is made from what `torchrun` or `accelerate launch` set, by accelerate's
        PartialState.
        """
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            from accelerate import PartialState

            cpu = not torch.cuda.is_available() if device is None else str(device).startswith("cpu")
            # The first process may encode texts or validate while the others wait.
            PartialState(cpu=cpu, timeout=timedelta(hours=24))
        if not distributed.is_initialized():
            return cls()
        team = cls(distributed.get_rank(), distributed.get_world_size())
        if "nccl" in distributed.get_backend() and torch.cuda.is_available():
            team.device = torch.device("cuda", torch.cuda.current_device())
        return team

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def agree(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each process, by rank. Where it fails on one, it fails on all: nobody waits for ever."""
        if self.alone:
            return [work()]
        value, error = None, None
        try:
            value = portable(work())
        except Exception as found:
            error = found
        meet()
        told: list[Any] = [None] * self.size
        memory = error is not None and ran_out(error)
        with together():
            distributed.all_gather_object(told, (value, error is not None, memory, str(error)))
        failed = [(memory, rank, text) for rank, (_, fails, memory, text) in enumerate(told) if fails]
        if failed:
            memory, rank, text = min(failed)  # want of memory comes last: all go on with smaller batches after it
            if error is not None and rank == self.rank:
                raise error
            raise torch.cuda.OutOfMemoryError(text) if memory else PrismError(f"Process {rank} failed: {text}")
        return [value for value, *_ in told]

    def same(self, call: Mapping[str, Any]) -> None:
        """Raise PrismError naming the first argument of a call that is not the same on all processes."""
        texts = self.agree(lambda: {name: _text(value) for name, value in call.items()})
        for rank, text in enumerate(texts):
            for name in (*texts[0], *text):
                first, other = (found.get(name, "not given") for found in (texts[0], text))
                if first != other:
                    raise PrismError(
                        f"Processes that share candidates must be given one call; process 0 has {name} = {first[:100]} "
                        f"and process {rank} {other[:100]}."
                    )

    def owners(self, candidates: Sequence[Key], before: Mapping[Key, int]) -> dict[Key, int]:
        """The process of each candidate: its own one as far as that leaves all with about as many."""
        most = -(-len(candidates) // self.size)
        found: dict[Key, int] = {}
        spare: list[Key] = []
        load: Counter[int] = Counter()
        for candidate in candidates:
            rank = before.get(candidate)
            if rank is None or load[rank] >= most:
                spare.append(candidate)
                continue
            found[candidate] = rank
            load[rank] += 1
        for candidate in spare:
            found[candidate] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[found[candidate]] += 1
        return found

    def move(self, belongings: dict[Key, Any], before: Mapping[Key, int], after: Mapping[Key, int]) -> None:
        """Hand over what belongs to candidates whose process changed."""
        for candidate, rank in sorted(after.items()):
            giver = before.get(candidate, rank)
            if giver == rank:
                continue
            if self.rank == giver:
                with together():
                    distributed.send_object_list([belongings.pop(candidate)], rank)
            elif self.rank == rank:
                box: list[Any] = [None]
                with together():
                    distributed.recv_object_list(box, giver)
                belongings[candidate] = box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """`work()`, done by the first process while the others wait, and told to all. Where it fails, all raise."""
        if self.alone:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                failure, told[1] = error, str(error)
        with self._together():
            distributed.broadcast_object_list(told, 0)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise PrismError(told[1])
        return told[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Where another process has ended, say so, and do not wait: a GPU's collectives would until their limit."""
        if self.device.type == "cuda":
            meet()
        with together():
            yield

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' values."""
        if self.alone:
            return values
        whole = values.to(self.device) if self.device.type == "cuda" else values.clone()
        with self._together():
            distributed.all_reduce(whole)
        return whole.to(values.device)

    def add_up(self, values: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over processes."""
        if self.alone:
            return
        whole = self.total(torch.cat([value.flatten() for value in values]))
        for value, total in zip(values, whole.split([value.numel() for value in values])):
            value.copy_(total.view_as(value))

    def share(self, values: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.alone:
            return
        with torch.no_grad():
            for value in values:
                whole = value.detach().to(self.device) if self.device.type == "cuda" else value.detach().clone()
                with self._together():
                    distributed.broadcast(whole, 0)
                value.copy_(whole)


def merged(parts: Iterable[Mapping[Key, T]]) -> dict[Key, T]:
    """The parts of several processes as one mapping, by candidate."""
    return dict(sorted(entry for part in parts for entry in part.items()))


def portable(value: Any) -> Any:
    """The same with its tensors in host memory: another process has other devices."""
    if isinstance(value, Tensor):
        return value.cpu()
    if is_dataclass(value) and not isinstance(value, type):  # also the outputs of diffusers, which are dictionaries too
        return replace(value, **{each.name: portable(getattr(value, each.name)) for each in fields(value)})
    if hasattr(value, "_fields"):
        return type(value)(*(portable(inner) for inner in value))
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(portable(inner) for inner in value)
    return value


def _text(value: Any) -> str:
    """A text that is the same on all processes for equal arguments; of objects it tells their class alone."""
    if isinstance(value, str | int | float | bool | type(None)):
        return repr(value)
    if isinstance(value, Mapping):
        return str({str(name): _text(inner) for name, inner in value.items()})
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    content = hashlib.sha256(value.tobytes()).hexdigest()[:12] if hasattr(value, "tobytes") else ""
    return f"{type(value).__name__} {content}".strip()
