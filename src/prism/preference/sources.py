"""Files of labels as rows of cells: CSV, JSON, JSONL and Parquet, in any encoding, with every cell checked.

Nothing is unpickled. Clips embedded in a Parquet file are not read with the rows, but when a clip is used.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prism import files
from prism.errors import PrismError, quoted
from prism.preference.pairs import named

TABLES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".npy", ".npz")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ROWS = 4096  # rows of a Parquet file that are in memory at once


class Place(NamedTuple):
    """The position of a row: the file's name below the set's root, and its number, from 0."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"row {self.row} of {quoted(self.source, 120)} (the first is 0)"


@dataclass(frozen=True)
class Row:
    """A row of a source: its cells by column. Methods return a cell as one kind, or raise an error with its place."""

    cells: Mapping[str, Any]
    place: Place

    def wrong(self, column: str, requirement: str) -> PrismError:
        """The error for a cell that does not hold what is required."""
        cell = quoted(self.cells.get(column), 80) if self.cells.get(column) is not None else "nothing"
        return PrismError(f"The column {quoted(column, 60)} in {self.place} must hold {requirement}; found {cell}.")

    def text(self, column: str) -> str | None:
        """A text; None if the cell is empty or missing. Numbers become their digits."""
        cell = self.cells.get(column)
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return None
        if isinstance(cell, bool) or not isinstance(cell, str | int | float):
            raise self.wrong(column, "a text")
        text = str(cell)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.wrong(column, "whole characters of Unicode, no half of a surrogate pair") from None
        return text if text.strip() else None

    def number(self, column: str) -> float | None:
        """A finite number, also from a text such as "0.5"; None if the cell is empty, NaN or missing."""
        cell = self.cells.get(column)
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            return None
        try:
            value = float(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else math.inf
        except (ValueError, OverflowError):
            value = math.inf
        if math.isinf(value):
            raise self.wrong(column, "a finite number")
        return None if math.isnan(value) else value

    def items(self, column: str) -> list[Any]:
        """A list, also from a text with JSON; empty if the cell is empty."""
        cell = self.cells.get(column)
        if isinstance(cell, str) and cell.lstrip().startswith("["):
            cell = _json(cell, f"The column {quoted(column, 60)} in {self.place}")
        if cell is None:
            return []
        if not isinstance(cell, list):
            raise self.wrong(column, "a list")
        return cell

    def label(self, column: str, codes: Mapping[str, int | None]) -> int | None:
        """The code of a label in `codes`, upper or lower case; None if the cell is empty.

        Raises `PrismError` for a label that is not in `codes`, naming file, row and column."""
        text = self.text(column)
        key = "" if text is None else text.strip().casefold()
        if key and key not in codes:
            raise self.wrong(column, f"one of {', '.join(codes)}")
        return codes[key] if key else None


@dataclass(frozen=True)
class Source:
    """A file of labels: its columns and its rows. The rows of a Parquet file are read again at each iteration."""

    path: Path
    name: str
    """The file's path in messages: relative to the set's root if it lies below the root, else absolute."""
    columns: tuple[str, ...]
    rows: Any = field(repr=False)
    """List of cells by column, or None for Parquet."""
    embedded: tuple[str, ...] = ()
    """Columns of a Parquet file that hold clips or pictures as bytes; rows do not contain them."""
    shape: str = "rows"
    """"rows", or "object" for a JSON file of objects by key (each row's key is its cell "")."""

    def __iter__(self) -> Iterator[Row]:
        if self.rows is not None:
            for number, cells in enumerate(self.rows):
                yield Row(cells, Place(self.name, number))
            return
        number = 0
        with _whole(self.path):
            columns = [name for name in self.columns if name not in self.embedded]
            for batch in pq.ParquetFile(self.path).iter_batches(_ROWS, columns=columns):
                for cells in batch.to_pylist() if columns else [{}] * len(batch):
                    yield Row(cells, Place(self.name, number))
                    number += 1

    def has(self, *columns: str) -> bool:
        """True if the file has all these columns."""
        return all(column in self.columns for column in columns)

    def references(self, column: str) -> list[tuple[str, str] | None]:
        """For each row, the identity of the clip embedded in a column (a digest of its bytes) and its path.

        The path is ``FILE.parquet#COLUMN/ROW``; None for rows without bytes. Few clips are in memory at once.
        """
        references: list[tuple[str, str] | None] = []
        with _whole(self.path):
            for batch in pq.ParquetFile(self.path).iter_batches(16, columns=[column]):
                for cell in batch.column(0):
                    value = cell["bytes"] if pa.types.is_struct(cell.type) else cell
                    data = value.as_buffer() if value.is_valid else None
                    if data is None or not len(data):
                        references.append(None)
                    else:
                        path = f"{self.name}#{column}/{len(references)}"
                        references.append((f"sha256:{hashlib.sha256(data).hexdigest()[:24]}", path))
        return references


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn errors of reading a Parquet file in the block into a PrismError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PrismError(f"The file {named(path)} is not a whole Parquet file ({quoted(error, 150)}).") from error


def open_source(path: Path, root: Path, encoding: str | None = None) -> Source:
    """Open a file of labels by its ending: .csv, .tsv, .json, .jsonl, .ndjson or .parquet.

    Args:
        path: the file.
        root: folder that `Source.name` is relative to.
        encoding: of text files; None: by the byte order mark, else UTF-8.

    Raises:
        PrismError: for another ending, a pickle, a damaged file, another encoding, or two columns of the same name.
    """
    files.check_regular(path)
    try:
        name = path.relative_to(root).as_posix()
    except ValueError:
        name = path.absolute().as_posix()
    ending = path.suffix.lower()
    if ending in PICKLES:
        raise PrismError(
            f"The file {named(path)} may hold a pickle, which could run code and is never loaded; export the labels as "
            "CSV, JSONL or Parquet."
        )
    if ending not in TABLES:
        raise PrismError(
            f"The file {named(path)} is no table of labels; its name must end in one of {', '.join(TABLES)}."
        )
    if ending == ".parquet":
        return _parquet(path, name)
    text = read_text(path, encoding)
    if ending in (".csv", ".tsv"):
        rows, shape = _csv(path, text), "rows"
        columns = tuple(rows.pop(0))
    else:
        rows, shape = _objects(path, text, lines=ending in (".jsonl", ".ndjson"))
        columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Source(path, name, columns, rows, shape=shape)


def _parquet(path: Path, name: str) -> Source:
    try:
        schema = pq.ParquetFile(path).schema_arrow
    except Exception as error:
        raise PrismError(f"The file {named(path)} is not a whole Parquet file ({quoted(error, 150)}).") from error
    twice = [each for each, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise PrismError(f"The file {named(path)} has the column {quoted(twice[0], 80)} twice.")
    embedded = [each.name for each in schema if _is_bytes(each.type)]
    return Source(path, name, tuple(schema.names), None, tuple(embedded))


def _is_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):  # datasets keeps {bytes, path}
        return any(each.name == "bytes" and _is_bytes(each.type) for each in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def read_text(path: Path, encoding: str | None = None) -> str:
    """The text of a file, by its byte order mark or as UTF-8 where no encoding is named."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PrismError(f"The file {named(path)} cannot be read: {error.strerror or error}.") from error
    chosen = encoding or next((each for mark, each in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(chosen)
    except LookupError:
        raise PrismError(
            f"There is no encoding {quoted(encoding, 60)}; name one like cp1252 with --encoding."
        ) from None
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        raise PrismError(
            f"The file {named(path)} is not {chosen}: byte {start} is 0x{data[start : start + 1].hex()}; save it as "
            "UTF-8, or name its encoding (often cp1252 or gb18030) with --encoding."
        ) from None


def _csv(path: Path, text: str) -> list[Any]:
    """The header, then the rows as cells by column."""
    csv.field_size_limit(2**31 - 1)  # prompts may be long
    start = text[: text.find("\n") + 1] or text
    delimiter = max(",;\t", key=start.count)
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if line]
    except csv.Error as error:
        raise PrismError(f"The file {named(path)} is no whole CSV file ({quoted(error, 120)}).") from None
    if not lines:
        raise PrismError(f"The file {named(path)} is empty; a header with the columns is needed.")
    header = [each.strip() for each in lines[0]]
    twice = [each for each, count in Counter(header).items() if count > 1]
    if twice:
        raise PrismError(f"The file {named(path)} has the column {quoted(twice[0], 80) or 'without a name'} twice.")
    rows: list[Any] = [header]
    for number, line in enumerate(lines[1:]):
        if len(line) != len(header):
            raise PrismError(
                f"In {Place(path.name, number)} there are {len(line)} cells where the header has {len(header)}; a text "
                f"that contains {'a tab' if delimiter == chr(9) else delimiter} must be in quotes."
            )
        rows.append(dict(zip(header, line)))
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else quoted(error, 120)
        raise PrismError(f"{where} is not valid JSON ({why}).") from None


def _objects(path: Path, text: str, lines: bool) -> tuple[list[dict[str, Any]], str]:
    """The objects of a JSON or JSONL file, and its shape."""
    where, shape = f"The file {named(path)}", "rows"
    if not lines:
        try:
            content = json.loads(text)
        except RecursionError:
            raise PrismError(f"{where} is not valid JSON (nested too deeply).") from None
        except ValueError as error:
            lines = getattr(error, "msg", "") == "Extra data"  # JSONL (one object per line) named .json
            if not lines:
                raise PrismError(f"{where} is not valid JSON ({quoted(error, 120)}).") from None
    if lines:
        content = [
            _json(line, f"Line {number + 1} of {named(path)}")
            for number, line in enumerate(text.split("\n"))
            if line.strip()
        ]
    if isinstance(content, dict) and content and all(isinstance(each, dict) for each in content.values()):
        content, shape = [{"": key, **each} for key, each in content.items()], "object"
    elif isinstance(content, dict):  # the rows under some key, as {"data": [...]}
        tables = [each for each in content.values() if isinstance(each, list)]
        content = tables[0] if len(tables) == 1 else [content]
    for number, each in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(each, dict):
            raise PrismError(f"{where} must hold objects with named values; found {quoted(each, 80)} in row {number}.")
    return content, shape
