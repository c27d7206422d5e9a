"""A pipeline's queue: what many callers ask, scored by one thread in batches of what goes together.

A batch starts when it is full, or `max_wait` after its oldest item came; while one is scored, the next one fills.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prism.errors import PrismError, number, whole


class Overloaded(PrismError):
    """Work that is refused, or given up, because others' is in front of it; it may be asked again."""


class Stopped(Overloaded):
    """Work that is refused because the worker ends."""


@dataclass(frozen=True)
class Batching:
    """Settings of a queue. Raises PrismError for values out of range."""

    max_batch: int = 16
    """Most items that are scored together."""
    max_wait: float = 0.01
    """Seconds that an item waits for others to be scored with."""
    max_queue: int = 1024
    """Most items that wait; more are refused."""
    max_queue_seconds: float = 120.0
    """Seconds after which an item that still waits is given up."""

    def __post_init__(self) -> None:
        whole("max_batch", self.max_batch, 1, 4096)
        number("max_wait", self.max_wait, 0, 60)
        whole("max_queue", self.max_queue, 1, 1_000_000)
        number("max_queue_seconds", self.max_queue_seconds, 0, 86_400, above=True)


@dataclass
class _Item:
    value: Any
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


Score = Callable[[Sequence[Any]], Sequence[Any]]
Watch = Callable[[int, float, Sequence[float]], None]


class Worker:
    """One thread that scores what is submitted, in batches.

    Args:
        batching: sizes and times.
        watch: called after each batch with the number of items, the seconds of scoring, and how long each item had
            waited.
    """

    def __init__(self, batching: Batching | None = None, watch: Watch | None = None, name: str = "prism") -> None:
        self.batching = batching or Batching()
        self._watch = watch
        self._waiting: dict[Hashable, deque[_Item]] = {}  # by what goes together; each in order of arrival
        self._scores: dict[Hashable, Score] = {}
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """The number of items that wait."""
        with self._changed:
            return self._count()

    def submit(self, key: Hashable, values: Sequence[Any], score: Score) -> list[Future[Any]]:
        """Queue values; a future of each one's result. All are taken, or none.

        Args:
            key: values of equal keys may be scored together, by the `score` of the first of them.
            score: gives a result for each of a list of values; called by the worker's thread. Where it fails on several
                values it is called again on each alone, so that one value fails no other.

        Raises:
            Overloaded: where too many wait; Stopped: after `close`.
        """
        items = [_Item(value) for value in values]
        with self._changed:
            if not self._open:
                raise Stopped("This judge stops and takes no further work; ask another one.")
            if self._count() + len(items) > self.batching.max_queue:
                raise Overloaded(
                    f"The queue holds {self._count()} of at most {self.batching.max_queue} items, and {len(items)} "
                    "more were asked; ask again later, or ask for fewer at once."
                )
            self._waiting.setdefault(key, deque()).extend(items)
            self._scores[key] = score
            self._changed.notify()
        return [item.future for item in items]

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new work, finish what was taken, and end the thread; False if it still works after `timeout`."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the thread

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _work(self) -> None:
        while batch := self._next():
            score, items = batch
            now, live = time.monotonic(), []
            for item in items:
                if not item.future.set_running_or_notify_cancel():  # the caller is gone
                    continue
                if now - item.arrived > self.batching.max_queue_seconds:
                    item.future.set_exception(
                        Overloaded(
                            f"The work waited {now - item.arrived:.1f} seconds, of at most "
                            f"{self.batching.max_queue_seconds:g}, behind others' work; ask again later."
                        )
                    )
                    continue
                live.append(item)
            if live:
                self._run(score, live)
                if self._watch is not None:
                    self._watch(len(live), time.monotonic() - now, [now - item.arrived for item in live])
            del batch, items, live  # nothing of a batch stays in memory while the next one is awaited

    def _next(self) -> tuple[Score, list[_Item]] | None:
        """The next batch, as soon as it is due; None once the worker is closed and nothing waits."""
        most, wait = self.batching.max_batch, self.batching.max_wait
        with self._changed:
            while True:
                if not self._waiting:
                    if not self._open:
                        return None
                    self._changed.wait()
                    continue
                key = min(self._waiting, key=lambda each: self._waiting[each][0].arrived)
                left = self._waiting[key][0].arrived + wait - time.monotonic()
                if len(self._waiting[key]) < most and left > 0 and self._open:
                    full = [each for each, items in self._waiting.items() if len(items) >= most]
                    if not full:
                        self._changed.wait(left)
                        continue
                    key = full[0]
                queue = self._waiting[key]
                score = self._scores[key]
                items = [queue.popleft() for _ in range(min(most, len(queue)))]
                if not queue:
                    del self._waiting[key], self._scores[key]
                return score, items

    def _run(self, score: Score, items: Sequence[_Item]) -> None:
        try:
            results = score([item.value for item in items])
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
        except Exception as error:
            if len(items) == 1:
                items[0].future.set_exception(error)
            else:
                for item in items:
                    self._run(score, [item])
            return
        for item, result in zip(items, results):
            item.future.set_result(result)
