"""Tables of texts in little memory: texts that recur are kept once, and rows are looked up by 12 bytes each.

A store of 100,000 videos repeats a few prompts, calls and shapes over and over; as Arrow's strings or as Python's they
would take most of the memory that an opened store needs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

RECURRING = ("prompt", "split", "model", "call", "shape", "image", "source", "shard", "video_a", "video_b")
"""Columns of texts that recur in the tables of videos and of pairs."""
ROW_GROUP = 2048
"""Rows of a Parquet file that are read at once."""
_CHUNK = 4096  # texts that exist as Python's at once
ENCODED = pa.dictionary(pa.int32(), pa.string())
"""The type of the columns in which each text is kept once."""


@contextlib.contextmanager
def returned_memory() -> Iterator[None]:
    """Have Arrow allocate in the block from the system, to which all that was needed for a moment goes back at once.

    Arrow's own allocator keeps some ten times what a small table takes.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.default_memory_pool().release_unused()
        pa.set_memory_pool(before)


def recurring(schema: pa.Schema) -> list[str]:
    """The columns of a table whose texts are kept once each."""
    return [each.name for each in schema if each.type == pa.string() and each.name in RECURRING]


def read_compacted(path: Path) -> pa.Table:
    """A Parquet file as from `compacted`, read by its groups of rows, so that little more is needed than is kept."""
    texts = recurring(pq.read_schema(path))
    file = pq.ParquetFile(path, read_dictionary=texts, buffer_size=1 << 16)
    if not file.num_row_groups:
        return compacted(file.read())
    table = compacted(pa.concat_tables(file.read_row_group(n, use_threads=False) for n in range(file.num_row_groups)))
    pa.default_memory_pool().release_unused()
    return table


def compacted(table: pa.Table) -> pa.Table:
    """The table in single chunks, with one dictionary for the texts of each column that is `recurring`."""
    names, metadata, texts = table.column_names, table.schema.metadata, set(recurring(table.schema))
    parts = table.columns[::-1]
    del table  # a column's chunks can go when the next column comes
    columns = []
    for name in names:
        part = parts.pop()
        columns.append(encoded(part) if name in texts or part.type == ENCODED else _single(part))
    return pa.table(columns, names).replace_schema_metadata(metadata)


def encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column's values as one array of indices and one dictionary."""
    column = (column.cast(pa.string()) if pa.types.is_null(column.type) else column).dictionary_encode()
    return _single(column.unify_dictionaries() if column.num_chunks > 1 else column)


def _single(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def plain(table: pa.Table) -> pa.Table:
    """The table with Arrow's strings in place of their dictionaries."""
    kinds = [pa.string() if each.type == ENCODED else each.type for each in table.schema]
    return table.cast(pa.schema(list(zip(table.column_names, kinds)), table.schema.metadata))


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers from 0 of a column's values (null is one), in order of appearance.

    Returns:
        (rows,) int32.
    """
    values = encoded(column)
    indices = pc.fill_null(values.indices, len(values.dictionary)).to_numpy()
    count = len(indices)
    first = np.full(len(values.dictionary) + 1, count, np.int32)
    first[indices[::-1]] = np.arange(count - 1, -1, -1, dtype=np.int32)  # of several rows the last one stays
    numbers = np.empty(len(first), np.int32)
    numbers[np.argsort(first, kind="stable")] = np.arange(len(first), dtype=np.int32)
    result: np.ndarray = numbers[indices]
    return result


def equal_at(column: pa.ChunkedArray, rows: np.ndarray, other: pa.ChunkedArray) -> np.ndarray:
    """True where a column has at `rows` the texts of another one.

    Args:
        rows: (n,) whole numbers, one per text of `other`.

    Returns:
        (n,) bool.
    """
    ours, theirs = encoded(column), encoded(other)
    number = pc.fill_null(pc.index_in(theirs.dictionary, value_set=ours.dictionary), -1).to_numpy(False)
    equal: np.ndarray = ours.indices.to_numpy()[rows] == number[theirs.indices.to_numpy()]
    return equal


def joint_codes(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Numbers from 0 of the combinations of several columns' values, in order of appearance.

    Returns:
        (rows,) int32.
    """
    joined = codes(columns[0])
    for column in columns[1:]:
        each = codes(column)
        joined = codes(pa.chunked_array([joined.astype(np.int64) * (int(each.max(initial=0)) + 1) + each]))
    return joined


def texts_of(column: pa.ChunkedArray | pa.Array) -> Iterator[str]:
    """The texts of a column, of which few exist as Python's at once."""
    for start in range(0, len(column), _CHUNK):
        yield from column.slice(start, _CHUNK).to_pylist()


class RowIndex:
    """Rows of a column of texts, found by text: 12 bytes per row.

    Args:
        column: of strings.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._texts = _single(column)
        hashes = np.fromiter(map(hash, texts_of(self._texts)), np.int64, len(self._texts))
        self._order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._order]

    def get(self, text: Any) -> int | None:
        """The first row that holds a text; None if there is none."""
        if not isinstance(text, str):
            return None
        wanted = hash(text)
        place = int(self._hashes.searchsorted(wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._order[place])
            if self._texts[row].as_py() == text:
                return row
            place += 1
        return None

    def rows(self, column: pa.ChunkedArray) -> np.ndarray:
        """The row of each text of a column, -1 of those that are not there.

        Returns:
            (texts,) int64.
        """
        values = encoded(column)
        texts = values.dictionary
        found = np.full(len(texts) + 1, -1)  # the last is that of null
        for start in range(0, len(texts) if len(self._hashes) else 0, _CHUNK):
            some = texts.slice(start, _CHUNK)
            hashes = np.fromiter(map(hash, some.to_pylist()), np.int64, len(some))
            places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
            alike = np.flatnonzero(self._hashes[places] == hashes)
            rows = self._order[places[alike]]
            found[start + alike] = rows
            equal = pc.equal(self._texts.take(pa.array(rows)), some.take(pa.array(alike))).to_numpy(False)
            for place in alike[~equal]:  # other texts of the same hash
                row = self.get(some[int(place)].as_py())
                found[start + place] = -1 if row is None else row
        result: np.ndarray = found[pc.fill_null(values.indices, len(texts)).to_numpy()]
        return result

    def twice(self) -> str | None:
        """A text that several rows hold, the first that comes again; None if all differ."""
        again = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if not len(again):
            return None
        rows = np.unique(np.concatenate([self._order[again], self._order[again + 1]]))
        counts = Counter(self._texts.take(pa.array(rows)).to_pylist())
        return next((text for text, count in counts.items() if count > 1), None)
