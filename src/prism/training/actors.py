"""Units of work shared among actors of a Ray cluster, one per device; those of an actor that is lost are made again.

The driver holds no model: each actor loads the backbone itself. All machines see the same files: the clips, the models
and the store.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pickle import PicklingError
from types import TracebackType
from typing import Any, TypeVar

from prism.backbone import Backbone
from prism.backbone.fingerprint import VERSIONED
from prism.errors import PrismError, first_difference, quoted, reason, whole, without
from prism.training.fan_out import Begin, Make, Progress, Unit

T = TypeVar("T")
LOCAL = "local"
LOSSES = 3
"""Actors that may be lost by one unit before the run ends: a unit too large for memory would end them for ever."""
SECONDS = 300.0
"""Time within which a cluster must have room for one actor at least."""
MEMORY = 256 * 2**20
"""Bytes of the object store of a local cluster, through which only names, rows and sentences pass."""
_LOST = "prism: the worker {} was lost; another one makes again what it had not finished."


class Actor:
    """A backbone on one device, in a process of its own. Answers are (result, sentence of a failure, warnings)."""

    def __init__(self, folder: str, paths: Sequence[str]) -> None:
        with contextlib.suppress(OSError):  # relative paths mean the same where the machine has the folder
            os.chdir(folder)
        sys.path += [path for path in paths if path not in sys.path]  # for what the driver can import
        self._load: Callable[[], Backbone] | None = None
        self._backbone: Backbone | None = None
        self._make: Make | None = None
        self._failure: str | None = "A worker cannot read its work; each machine needs this version of prism."

    def prepare(self, load: Callable[[], Backbone]) -> str:
        """Take the function that makes the backbone, which Ray unpickles after the paths are set; return the process
        and machine, for messages."""
        self._load = load
        return f"{os.getpid()} on {socket.gethostname()}"

    def ask(self, question: Callable[[Backbone], Any]) -> tuple[Any, str | None, list[str]]:
        """See `Crew.ask`."""
        return _outcome(lambda: question(self._loaded()))

    def begin(self, begin: Begin, fingerprint: Mapping[str, Any]) -> None:
        """Prepare for making units; after a failure, `make` answers with it."""

        def prepare() -> None:
            present = without(self._loaded().fingerprint(), VERSIONED)
            if present != fingerprint:
                raise PrismError(
                    f"The backbone on {socket.gethostname()} is not that of the other workers: "
                    f"{first_difference(fingerprint, present)}; let all machines read the same files."
                )
            self._make = begin(self._loaded())

        _, self._failure, _ = _outcome(prepare)

    def make(self, name: str, rows: Sequence[Any]) -> tuple[Any, str | None, list[str]]:
        """Make a unit."""
        make = self._make
        if make is None or self._failure is not None:
            return None, self._failure, []
        return _outcome(lambda: make(name, rows, lambda _: None))

    def _loaded(self) -> Backbone:
        if self._backbone is None:
            assert self._load is not None  # calls of an actor are run in order, and `prepare` is the first
            self._backbone = self._load()
        return self._backbone


def _outcome(work: Callable[[], Any]) -> tuple[Any, str | None, list[str]]:
    """The result of `work`, the sentence of its failure, and the warnings that came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            answer, failure = work(), None
        except PrismError as error:
            answer, failure = None, str(error)
        except Exception as error:  # an exception of a library may not be picklable
            answer, failure = None, f"A worker on {socket.gethostname()} failed: {reason(error, 400)}."
    return answer, failure, [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


@dataclass
class _Worker:
    """An actor as the driver sees it."""

    handle: Any
    where: str = ""
    begun: Any = None
    """The work for which it was prepared."""


class Actors:
    """The actors of a Ray cluster that hold a backbone, for use in a ``with`` block; they end with the block.

    Args:
        load: makes the backbone, in each actor; picklable, such as ``functools.partial(Backbone.from_pretrained,
            "path/to/pipeline")``. Where actors have GPUs, each sees its own alone, as ``cuda``.
        address: of a running cluster, "auto" for the one that this machine is part of, or "local" to start one here for
            the time of the block; if this process has initialised Ray, its cluster is used.
        workers: number of actors; by default one per GPU, or without GPUs one per machine.
        gpus: True to compute on GPUs; by default if the cluster has any.

    Attributes:
        workers: the processes of the actors that have started, each as "PID on MACHINE".

    Raises:
        PrismError: without Ray, for a cluster that cannot be reached, or a `load` that cannot be sent.
    """

    first = True

    def __init__(
        self, load: Callable[[], Backbone], address: str = LOCAL, workers: int | None = None, gpus: bool | None = None
    ) -> None:
        self._gpus = gpus
        self._count = 0 if workers is None else whole("ray_workers", workers, 1, 10_000)
        self._ray, self._started = connected(address, self._count or 1)
        self.workers: list[str] = []
        self._placing: dict[Any, _Worker] = {}  # by the answer that they wait for
        self._idle: list[_Worker] = []
        self._kind: Any = None
        self._warned: set[str] = set()
        self._failed_starts = 0
        self._fingerprint: Mapping[str, Any] | None = None
        try:
            with _sendable("What loads the backbone"):
                self._load = self._ray.put(load)
        except PrismError:
            self.close()
            raise

    def __enter__(self) -> Actors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for worker in [*self._idle, *self._placing.values()]:
            self._end(worker)
        self._idle, self._placing = [], {}
        if self._started:
            self._ray.shutdown()
            self._started = False

    def ask(self, question: Callable[[Backbone], T]) -> T:
        """The answer of one of the actors."""
        for _, answer in self._answers([("ask", (question,))]):
            return answer  # type: ignore[no-any-return]
        raise AssertionError("one task has one answer")

    def on_first(self, work: Callable[[], T]) -> T:
        """The result of `work`, run here, in the driver."""
        return work()

    def share(
        self, name: str, kind: str, units: Sequence[Unit], done: Sequence[bool], begin: Begin, progress: bool
    ) -> list[str]:
        """See `Crew.share`: an actor gets its next unit when it has made one."""
        counter = Progress(name, kind, list(zip(units, done)), True, progress)
        left = [unit for unit, ready in zip(units, done) if not ready]
        if left and self._fingerprint is None:
            self._fingerprint = without(self.ask(_fingerprint), VERSIONED)
        with _sendable("The work, with its rewards,"):
            sent = self._ray.put(begin) if left else None  # once, as it may hold a whole data set
        sentences: list[str] = []
        with counter.bar():
            for number, answer in self._answers([("make", unit) for unit in left], sent):
                sentences += answer
                counter.rows(len(left[number][1]))
                counter.unit()
        return sentences

    def _answers(self, tasks: Sequence[tuple[str, tuple[Any, ...]]], begin: Any = None) -> Iterator[tuple[int, Any]]:
        """Yield (number of a task, its answer) in the order of answers; a lost actor's task is given to another one."""
        ray = self._ray
        waiting, losses = deque(range(len(tasks))), Counter[int]()
        running: dict[Any, tuple[_Worker, int]] = {}
        self._place()
        try:
            while waiting or running:
                while waiting and self._idle:
                    worker, number = self._idle.pop(0), waiting.popleft()
                    if begin is not None and worker.begun is not begin:
                        worker.handle.begin.remote(begin, self._fingerprint)  # calls of an actor are run in order
                        worker.begun = begin
                    method, arguments = tasks[number]
                    running[getattr(worker.handle, method).remote(*arguments)] = worker, number
                ready, _ = ray.wait([*running, *self._placing], timeout=SECONDS)
                if not ready and not running:
                    raise PrismError(
                        f"The Ray cluster had no room for a worker within {SECONDS:.0f} seconds: a worker needs "
                        f"{_words(self._needs)}, and the cluster has {_words(ray.cluster_resources())}."
                    )
                for answer in ready:
                    if answer in self._placing:
                        self._placed(answer)
                        continue
                    worker, number = running[answer]
                    try:
                        value, failure, warned = ray.get(answer)
                    except ray.exceptions.RayTaskError as error:  # its answer, or what it was sent, cannot be read
                        raise PrismError(f"The worker {worker.where} failed: {_last(error)}.") from error
                    except ray.exceptions.RayError as error:
                        del running[answer]
                        losses[number] += 1
                        self._replace(worker, losses[number], tasks[number], error)
                        waiting.appendleft(number)
                        continue
                    del running[answer]
                    self._idle.append(worker)
                    for text in warned:
                        if text not in self._warned:
                            self._warned.add(text)
                            warnings.warn(text, stacklevel=4)
                    if failure is not None:
                        raise PrismError(failure)
                    yield number, value
        finally:
            for worker, _ in running.values():  # after a failure they would go on
                self._end(worker)

    def _place(self) -> None:
        """Ask the cluster for as many actors as are missing."""
        if self._kind is None:
            self._describe()
        while len(self._idle) + len(self._placing) < self._count:
            self._start()

    def _describe(self) -> None:
        """Choose the number of actors, and the GPUs and CPUs of each."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes) if self._gpus is not False else 0
        if self._gpus and not gpus:
            raise PrismError("The Ray cluster has no GPU; choose another --device.")
        working = [node for node in nodes if node.get("GPU" if gpus else "CPU", 0) >= 1] or [{}]
        self._count = self._count or gpus or len(working)
        if gpus:
            threads = min(int(node.get("CPU", 0) // node["GPU"]) for node in working)
        else:
            threads = max(1, min(int(node.get("CPU", 1)) for node in working) // -(-self._count // len(working)))
        self._needs = {"GPU": 1 if gpus else 0, "CPU": threads}
        self._kind = self._ray.remote(num_gpus=self._needs["GPU"], num_cpus=threads)(Actor)

    def _start(self) -> None:
        worker = _Worker(self._kind.remote(os.getcwd(), [os.path.abspath(path) for path in sys.path]))
        self._placing[worker.handle.prepare.remote(self._load)] = worker

    def _placed(self, answer: Any) -> None:
        """Take an actor that has started to the idle ones, or start another one in its place."""
        worker = self._placing.pop(answer)
        try:
            worker.where = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= LOSSES:
                raise PrismError(
                    f"Workers of the Ray cluster do not start: {_last(error)}; each machine needs this version of "
                    "prism and its packages."
                ) from error
            self._start()
            return
        self._failed_starts = 0
        worker.handle.ask.remote(_nothing)  # loads the backbone, at the same time as other actors
        self._idle.append(worker)
        self.workers.append(worker.where)

    def _replace(self, worker: _Worker, losses: int, task: tuple[str, tuple[Any, ...]], error: Exception) -> None:
        if losses >= LOSSES:
            what = f"The unit {task[1][0]}" if task[0] == "make" else "Loading the backbone"
            raise PrismError(
                f"{what} ended {losses} workers, one after another, the last of them {worker.where} ({_last(error)}): "
                "memory may have run out; what was made before stays, and --resume goes on."
            ) from error
        print(_LOST.format(worker.where), file=sys.stderr)
        self._end(worker)
        self._start()

    def _end(self, worker: _Worker) -> None:
        self.workers = [where for where in self.workers if where != worker.where]
        with contextlib.suppress(Exception):  # it has ended, or the cluster has
            self._ray.kill(worker.handle)


@contextlib.contextmanager
def _sendable(name: str) -> Iterator[None]:
    """Raise PrismError where the block cannot pickle something."""
    try:
        yield
    except (TypeError, AttributeError, PicklingError) as error:
        raise PrismError(
            f"{name} cannot be sent to other processes ({reason(error, 160)}); use functions of a module, or a "
            "functools.partial of one."
        ) from error


def _fingerprint(backbone: Backbone) -> dict[str, Any]:
    return backbone.fingerprint()


def _nothing(_: Backbone) -> None:
    return None


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU"))


def _last(error: Exception) -> str:
    """The last line of an error of Ray, whose texts are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return quoted(lines[-1] if lines else type(error).__name__, 240).rstrip(".")


def connected(address: str, workers: int, memory: int = MEMORY) -> tuple[Any, bool]:
    """Ray, and True if this process started it and must shut it down.

    Args:
        address: see `Actors`.
        workers: actors that a cluster which is started here must have room for.
        memory: bytes of its object store.

    Raises:
        PrismError: without Ray, or for a cluster that cannot be reached.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray warns of otherwise
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")  # `_LOST` says it
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise PrismError('Ray is not installed; install it with pip install "prism-video[ray]".') from error
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "critical"}
    if address == LOCAL:
        cpus = max(os.cpu_count() or 1, workers)
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": memory}
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    try:
        if colon and port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), 10).close()
        ray.init(**options)
    except Exception as error:  # OSError, ConnectionError, ValueError, RuntimeError, ...
        raise PrismError(
            f"The Ray cluster {quoted(address, 80)} cannot be used: {reason(error, 200)}; start one with ray start "
            "--head, or give --ray alone for one on this machine."
        ) from error
    return ray, True
