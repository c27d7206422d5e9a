"""Work divided among the processes of a job, and into batches that fit into memory."""

from __future__ import annotations

import atexit
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

# An attribute that is true of exceptions from a caller's callback. `prism.backbone.pipeline` sets it, so that memory
# that ran out there is not answered with smaller batches.
CALLERS = "_raised_by_a_callback"
# Parts of allocators' error messages; on a CPU torch raises a plain RuntimeError.
_WORDS = (
    "out of memory",
    "not enough memory",
    "defaultcpuallocator",
    "can't allocate memory",
    "cannot allocate memory",
)


def ran_out(error: BaseException) -> bool:
    """True if an exception says that memory ran out, on any device, unless a callback of the caller raised it."""
    if getattr(error, CALLERS, False):
        return False
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def halved(rows: int, work: str, kind: str = "video") -> int:
    """Half of `rows` videos per batch, after memory ran out. Warns, and empties the GPU's cache of free memory.

    Raises PrismError if the batch was already a single video.
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
    """Call `work` on at most `rows` of `items` at a time, in order; if memory runs out, again on half as many.

    A failed call of `work` must have no effects, since its items are given to it again.

    Returns:
        The rows per batch in the end.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + rows]
        if _fits(work, batch):
            start += len(batch)
        else:  # not in `_fits`: while its exception exists, the tensors of the failed attempt are not freed
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
SILENCE = 180.0  # seconds without a sign of life after which a process counts as ended
_MET, _ALIVE = "prism/met", "prism/alive/{}"

_meetings: dict[int, list[Any]] = {}  # by a store's id: [the store, the number of meetings so far]


def meet() -> None:
    """Wait until all processes of the default group have called this as often as this one.

    Raises:
        PrismError: if one of them ended meanwhile.
    """
    store, rank, size = _store(), distributed.get_rank(), distributed.get_world_size()
    if store is None:
        return
    if id(store) not in _meetings:
        _meetings[id(store)] = [store, 0]
        _show_from_now(store, _ALIVE.format(rank))
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
    except RuntimeError as error:  # the process that hosts the store ended
        raise PrismError(
            "The first process, through which all processes are synchronised, ended; start the run again."
        ) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise PrismError if the collective in the block fails, which means that another process ended."""
    try:
        yield
    except RuntimeError as error:
        raise PrismError(
            f"Another process of this run ended while this one waited for it ({quoted(error, 120)}); start the run "
            "again: what was finished or saved is kept where the command has --resume."
        ) from error


def _show_from_now(store: Any, key: str) -> None:
    """Show signs of life, in a thread, as long as the process and the store exist."""
    end = threading.Event()

    def show() -> None:
        with contextlib.suppress(RuntimeError):
            while not end.is_set():
                store.add(key, 1)
                end.wait(INTERVAL)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()

    # A thread within the store's C++ code while the interpreter ends would abort the process.
    @atexit.register
    def _() -> None:
        end.set()
        thread.join(10)


def _store() -> Any:
    """The store of the default group, or None if this version of torch does not offer it."""
    find = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


@dataclass
class Team:
    """This process's `rank` among the `size` processes that share work; one process unless `gathered`.

    device: the device of the tensors that processes send each other. Other objects are sent as pickles, from one
    process of the job to another: no pickle is ever read from a file.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def gathered(cls, device: str | torch.device | None = None) -> Team:
        """The team of the processes that a launcher started, to compute on `device`; None: on GPUs if there are any.

        If there is no process group yet, accelerate's PartialState makes it from the environment variables that
        `torchrun` or `accelerate launch` set.
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
        """True in the process that writes files and messages."""
        return self.rank == 0

    def agree(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on all processes, by rank. If it fails on one, all raise, and none waits forever."""
        if self.alone:
            return [work()]
        value, error = None, None
        try:
            value = portable(work())
        except Exception as raised:
            error = raised
        meet()
        answers: list[Any] = [None] * self.size
        memory = error is not None and ran_out(error)
        with together():
            distributed.all_gather_object(answers, (value, error is not None, memory, str(error)))
        failed = [(memory, rank, text) for rank, (_, fails, memory, text) in enumerate(answers) if fails]
        if failed:
            # Other errors win over memory that ran out, which is retried with smaller batches.
            memory, rank, text = min(failed)
            if error is not None and rank == self.rank:
                raise error
            raise torch.cuda.OutOfMemoryError(text) if memory else PrismError(f"Process {rank} failed: {text}")
        return [value for value, *_ in answers]

    def same(self, call: Mapping[str, Any]) -> None:
        """Raise PrismError naming the first argument of a call that is not the same on all processes."""
        texts = self.agree(lambda: {name: _text(value) for name, value in call.items()})
        for rank, text in enumerate(texts):
            for name in (*texts[0], *text):
                first, other = (each.get(name, "not given") for each in (texts[0], text))
                if first != other:
                    raise PrismError(
                        f"Processes that share candidates must be given the same call; process 0 has {name} = "
                        f"{first[:100]} and process {rank} {other[:100]}."
                    )

    def owners(self, candidates: Sequence[Key], before: Mapping[Key, int]) -> dict[Key, int]:
        """The rank of each candidate's process: as `before`, unless that process would get more than an even share."""
        most = -(-len(candidates) // self.size)
        ranks: dict[Key, int] = {}
        spare: list[Key] = []
        load: Counter[int] = Counter()
        for candidate in candidates:
            rank = before.get(candidate)
            if rank is None or load[rank] >= most:
                spare.append(candidate)
                continue
            ranks[candidate] = rank
            load[rank] += 1
        for candidate in spare:
            ranks[candidate] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[ranks[candidate]] += 1
        return ranks

    def move(self, belongings: dict[Key, Any], before: Mapping[Key, int], after: Mapping[Key, int]) -> None:
        """Send the belongings of candidates whose process changed to their new process."""
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
        """The result of `work`, run on the first process only; the others wait for it. If it fails, all raise."""
        if self.alone:
            return work()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                answer[0] = work()
            except Exception as error:
                failure, answer[1] = error, str(error)
        with self._together():
            distributed.broadcast_object_list(answer, 0)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise PrismError(answer[1])
        return answer[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Run a collective that fails soon if another process has ended; on GPUs it would wait until its time limit."""
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
        """Replace tensors of one dtype and device by their sums over the processes."""
        if self.alone:
            return
        whole = self.total(torch.cat([value.flatten() for value in values]))
        for value, total in zip(values, whole.split([value.numel() for value in values])):
            value.copy_(total.view_as(value))

    def share(self, values: Iterable[Tensor]) -> None:
        """Overwrite the values on all processes with those of the first."""
        if self.alone:
            return
        with torch.no_grad():
            for value in values:
                whole = value.detach().to(self.device) if self.device.type == "cuda" else value.detach().clone()
                with self._together():
                    distributed.broadcast(whole, 0)
                value.copy_(whole)


def merged(parts: Iterable[Mapping[Key, T]]) -> dict[Key, T]:
    """The mappings of several processes as one, in order of the candidates."""
    return dict(sorted(entry for part in parts for entry in part.items()))


def portable(value: Any) -> Any:
    """The value with its tensors in host memory, as another process may have other devices."""
    if isinstance(value, Tensor):
        return value.cpu()
    if is_dataclass(value) and not isinstance(value, type):  # before dict: diffusers' outputs are both
        return replace(value, **{each.name: portable(getattr(value, each.name)) for each in fields(value)})
    if hasattr(value, "_fields"):
        return type(value)(*(portable(inner) for inner in value))
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(portable(inner) for inner in value)
    return value


def _text(value: Any) -> str:
    """A text that is the same on all processes for equal arguments; of other objects, the class."""
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
