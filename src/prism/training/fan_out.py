"""Units of work shared among the processes that hold a backbone: those of a launcher here, of Ray in `actors`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from prism.backbone import Backbone
from prism.errors import quoted
from prism.preference import StoreWriter
from prism.runs import Clock
from prism.team import Team

T = TypeVar("T")
Unit = tuple[str, Sequence[Any]]
"""The name of a unit of work, and the rows of the videos that it makes."""
Make = Callable[[str, Sequence[Any], Callable[[int], Any]], list[str]]
"""A function that makes a unit. It calls its third argument with the number of rows whenever some are done, and returns
a sentence for each row that is left out. A unit may be made twice, even at the same time by a process that is thought
lost: its files appear whole."""
Begin = Callable[[Backbone], Make]
"""A function that prepares a process for making units. It must be picklable, as it is sent to other machines."""


class Crew(Protocol):
    """The processes that hold a backbone.

    Attributes:
        first: True in the process that writes messages, and files that belong to no unit.
    """

    first: bool

    def ask(self, question: Callable[[Backbone], T]) -> T:
        """The answer to a (picklable) question about the backbone."""

    def on_first(self, work: Callable[[], T]) -> T:
        """The result of `work`, run in the first process only."""

    def share(
        self, name: str, kind: str, units: Sequence[Unit], done: Sequence[bool], begin: Begin, progress: bool
    ) -> list[str]:
        """Make the units that are not done, each in one of the processes, with a progress bar.

        Args:
            name: of the work, in messages, such as encoding.
            kind: of the rows, in messages, such as videos.
            units: with names of their own.
            done: True for the units that were made before.
            begin: prepares a process.
            progress: show the bar where stderr is a terminal, and lines of text elsewhere.

        Returns:
            The sentences of all units.

        Raises:
            PrismError: if a unit fails; units that were made before stay.
        """


class Processes:
    """The processes that a launcher such as ``torchrun`` started, or this one alone; each holds the backbone."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.team = backbone, Team.gathered(backbone.device)
        self.first = self.team.first

    def ask(self, question: Callable[[Backbone], T]) -> T:
        """The answer of this process."""
        return question(self.backbone)

    def on_first(self, work: Callable[[], T]) -> T:
        """See `Crew.on_first`; the others wait for it."""
        return self.team.on_first(work)

    def share(
        self, name: str, kind: str, units: Sequence[Unit], done: Sequence[bool], begin: Begin, progress: bool
    ) -> list[str]:
        """See `Crew.share`: each process makes every n-th unit."""
        mine = list(itertools.islice(zip(units, done), self.team.rank, None, self.team.size))

        def run() -> list[str]:
            sentences: list[str] = []
            make = begin(self.backbone)
            counter = Progress(name, kind, mine, self.first, progress)
            with counter.bar():
                for (unit, rows), ready in mine:
                    if not ready:
                        sentences += make(unit, rows, counter.rows)
                        counter.unit()
            return sentences

        return [sentence for part in self.team.agree(run) for sentence in part]


class Progress:
    """The progress of units: a bar on a terminal, lines in a log.

    Args:
        name, kind, progress: as of `Crew.share`.
        units: each with True if it was made before.
        first: False in processes that show nothing.
    """

    def __init__(self, name: str, kind: str, units: Sequence[tuple[Unit, bool]], first: bool, progress: bool) -> None:
        self._made = sum(ready for _, ready in units)
        self._first, self._clock = first, Clock(f"{name} shards", len(units))
        self._bar = tqdm(
            total=sum(len(rows) for (_, rows), _ in units),
            initial=sum(len(rows) for (_, rows), ready in units if ready),
            desc=name,
            unit=f" {kind}",
            disable=None if progress and first else True,
        )

    def rows(self, count: int) -> None:
        """Count rows of a unit that are done."""
        self._bar.update(count)

    def unit(self) -> None:
        """Count a unit that is done."""
        self._made += 1
        if self._first:
            self._clock.tick(self._made, True)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Keep the bar on the terminal; it is closed at the end."""
        with self._bar:
            yield


def tell_left_out(what: str, sentences: Sequence[str]) -> None:
    """Say on stderr how many are left out, if any, and why the first is."""
    if sentences:
        more = " ..." if len(sentences) > 1 else ""
        print(f"prism: {len(sentences)} {what}: {quoted(sentences[0], 200)}{more}", file=sys.stderr)


def crew_of(backbone: Backbone | Crew) -> Crew:
    """The crew of a backbone of this process; a crew is returned as it is."""
    return Processes(backbone) if isinstance(backbone, Backbone) else backbone


@contextmanager
def writing(crew: Crew, opened: Callable[..., StoreWriter]) -> Iterator[StoreWriter]:
    """The store's writer in each process of a crew: the first begins or continues the store, the others follow.

    Where the block fails before a shard is written, the folder is left as it was.
    """
    writers: list[StoreWriter] = []
    crew.on_first(lambda: writers.append(opened()))
    try:
        yield writers[0] if crew.first else opened(main=False)
    except Exception:
        if crew.first:
            writers[0].withdraw()
        raise
