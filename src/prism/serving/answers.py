"""People's judgements of pairs, in a CSV of VideoAlign's columns that is appended row by row and never loses one.

A row is one write to a file opened for appending, synced before the next pair is shown. Several processes and threads
may append to one file. A row that was cut by a power failure is put aside when the file is opened.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism import files
from prism.errors import PrismError, quoted

LABELS = ("A", "B", "same")
SIDES = ("path_A", "path_B")
BEFORE, AFTER = ("path_A", "path_B", "prompt"), ("annotator", "seconds", "left", "time")


@dataclass(frozen=True)
class Answer:
    """One annotator's judgement of one pair.

    labels: by dimension, "A", "B" or "same"; A is path_A, wherever it was shown. seconds: from the pair's appearance to
    the judgement. left: the clip that was shown on the left, "path_A" or "path_B". time: of the judgement, ISO 8601.
    """

    path_a: str
    path_b: str
    prompt: str
    labels: tuple[str, ...]
    annotator: str
    seconds: float
    left: str
    time: str

    @property
    def pair(self) -> tuple[str, str, str]:
        return self.path_a, self.path_b, self.prompt

    def cells(self) -> list[str]:
        """The row of the CSV."""
        facts = (self.annotator, f"{self.seconds:.2f}", self.left, self.time)
        return [self.path_a, self.path_b, self.prompt, *self.labels, *facts]


class Answers:
    """The rows of a file of judgements, those of other processes included once `refresh` has read them.

    Args:
        path: the CSV; an empty one is made where there is none.
        dimensions: the questions, one column each; "overall" is the column Overall, as VideoAlign calls it.

    Raises:
        PrismError: for a file with other columns, or with a row that is none of ours.
    """

    def __init__(self, path: str | os.PathLike[str], dimensions: Sequence[str]) -> None:
        self.path, self.dimensions = Path(path), tuple(dimensions)
        names = ("Overall" if name == "overall" else name for name in dimensions)
        self.columns = (*BEFORE, *names, *AFTER)
        self.rows: list[Answer] = []
        self._read_to = 0
        self._identity: tuple[int, int] | None = None
        self._lock = threading.RLock()
        with self._opened() as file:
            _put_cut_row_aside(file, self.path)
            self._take(file)

    def add(self, answer: Answer) -> None:
        """Append a row, and return when it is on the disk."""
        text = io.StringIO()
        with self._opened() as file:
            self._take(file)
            writer = csv.writer(text, lineterminator="\r\n")
            if not os.fstat(file.fileno()).st_size:
                writer.writerow(self.columns)
            writer.writerow(answer.cells())
            file.write(text.getvalue().encode())
            os.fsync(file.fileno())
            self._take(file)

    def withdraw(self, answer: Answer) -> None:
        """Take a row out again; the file is replaced as a whole."""
        with self._opened() as file:
            self._take(file)
            if answer not in self.rows:
                return
            last = len(self.rows) - 1 - self.rows[::-1].index(answer)
            self.rows = [row for number, row in enumerate(self.rows) if number != last]
            text = io.StringIO()
            csv.writer(text, lineterminator="\r\n").writerows([self.columns, *(row.cells() for row in self.rows)])
            with files.new_file(self.path) as work, open(work, "wb") as new:
                new.write(text.getvalue().encode())
                new.flush()
                os.fsync(new.fileno())
            status = self.path.stat()
            self._read_to, self._identity = status.st_size, (status.st_dev, status.st_ino)

    def refresh(self) -> list[Answer]:
        """All rows, with those that other processes have appended."""
        with self._opened() as file:
            self._take(file)
            return self.rows

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """The file, open for reading and appending, locked against other threads and processes."""
        with self._lock:
            while True:
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
                except OSError as error:
                    raise PrismError(
                        f"The answers {quoted(str(self.path), 200)} cannot be written: {error.strerror}; name another "
                        "--answers."
                    ) from error
                with file:
                    _lock(file)
                    status = os.fstat(file.fileno())
                    try:
                        named = self.path.stat()
                    except OSError:
                        continue
                    if (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino):  # not replaced meanwhile
                        yield file
                        return

    def _take(self, file: Any) -> None:
        """Read the rows that are new in the file."""
        status = os.fstat(file.fileno())
        if self._identity != (status.st_dev, status.st_ino) or status.st_size < self._read_to:
            self.rows, self._read_to, self._identity = [], 0, (status.st_dev, status.st_ino)
        if status.st_size == self._read_to:
            return
        file.seek(self._read_to)
        try:
            text = file.read().decode("utf-8-sig")
            lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise PrismError(
                f"The answers {quoted(str(self.path), 200)} are no CSV in UTF-8 ({quoted(error, 80)}); name "
                "another file."
            ) from error
        if self._read_to == 0 and lines:
            self._check_columns(lines.pop(0))
        first = len(self.rows) + 2
        self.rows = [*self.rows, *(self._answer(cells, first + number) for number, cells in enumerate(lines) if cells)]
        self._read_to = status.st_size

    def _check_columns(self, columns: Sequence[str]) -> None:
        if tuple(columns) != self.columns:
            raise PrismError(
                f"The answers {quoted(str(self.path), 150)} have the columns {quoted(', '.join(columns), 120)}, and "
                f"this page writes {', '.join(self.columns)}; give the same --dimensions, or another --answers."
            )

    def _answer(self, cells: Sequence[str], row: int) -> Answer:
        count = len(self.dimensions)
        labels = tuple(cells[3 : 3 + count])
        try:
            annotator, seconds, left, time = cells[3 + count :]
            if left not in SIDES or any(label not in LABELS for label in labels):
                raise ValueError
            return Answer(cells[0], cells[1], cells[2], labels, annotator, float(seconds), left, time)
        except (ValueError, IndexError):
            raise PrismError(
                f"The answers {quoted(str(self.path), 150)} hold in row {row} {quoted(', '.join(cells), 120)}, which "
                "is no judgement that this page wrote; correct the row, or name another --answers."
            ) from None


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _put_cut_row_aside(file: Any, path: Path) -> None:
    """Move what follows the last whole row into a file beside it."""
    file.seek(0)
    data = file.read()
    end = _end_of_rows(data)
    if end == len(data):
        return
    aside = path.with_name(f"{path.name}.cut-{os.urandom(2).hex()}")
    aside.write_bytes(data[end:])
    file.truncate(end)
    os.fsync(file.fileno())
    warnings.warn(
        f"The last row of {path} was cut off in the middle; it was moved to {aside.name}, and its pair will be asked "
        "again.",
        stacklevel=4,
    )


def _end_of_rows(data: bytes) -> int:
    """The length of the whole rows that a CSV begins with: up to the last line break outside of quotes."""
    end = place = quotes = 0
    for line in data.splitlines(keepends=True):
        place += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\n"):
            end = place
    return end
