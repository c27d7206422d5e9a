"""A store's files, read with checks: whatever lies there, it is the tables and tensors asked for, or a sentence."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from prism import files
from prism.errors import PrismError, quoted

FLOATS = ("F16", "BF16", "F32", "F64")
NUMBERS = (*FLOATS, "I8")  # eight bits come with a scale


def named(path: Path) -> str:
    """A path on one line, cut where it is long."""
    return quoted(str(path), 150)


def check_file(path: Path, wanted_by: str = "") -> None:
    """Refuse a path that is missing or no regular file (a pipe would be waited for without end)."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise PrismError(f"The file {named(path)} {what}{wanted_by}.")
    files.check_regular(path)


def read_meta(path: Path) -> dict[str, Any]:
    """store.json: an object whose parts have the kinds that a store relies on."""
    check_file(path)
    meta = files.read_json(path)
    if not isinstance(meta, dict):
        raise PrismError(f"The file {named(path)} is a {type(meta).__name__} where an object is needed.")
    for name in ("call", "backbone", "sha256"):
        if not isinstance(meta.get(name) or {}, dict):
            raise PrismError(f"The field {name} of {named(path)} must be an object, found {quoted(meta[name], 80)}.")
    return meta


def read_table(path: Path, texts: Sequence[str], wholes: Sequence[str] = (), others: Sequence[str] = ()) -> pa.Table:
    """A Parquet file that has at least these columns.

    Args:
        path: the file.
        texts: columns of texts; they come as Arrow's `string`.
        wholes: columns of whole numbers from 0; they come as `int64`.
        others: columns of anything.

    Raises:
        PrismError: naming the file, the column and what is wrong with it.
    """
    check_file(path)
    try:
        table = pq.ParquetFile(path).read()  # read_table would add columns from folders named a=b
        table.validate(full=True)
    except Exception as error:
        raise PrismError(f"The file {named(path)} is not a whole Parquet file ({quoted(error, 150)}).") from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise PrismError(f"The file {named(path)} has the column {quoted(twice[0], 80)} twice.")
    for name in (*texts, *wholes, *others):
        if name not in table.column_names:
            raise PrismError(f"The file {named(path)} lacks the column {name}.")
    for name in texts:
        table = _cast(table, path, name, _is_text, pa.string(), "texts")
    for name in wholes:
        table = _cast(table, path, name, pa.types.is_integer, pa.int64(), "whole numbers from 0")
        if len(table) and min(table[name].to_pylist()) < 0:
            raise PrismError(
                f"The column {name} of {named(path)} must hold whole numbers from 0, found a negative one."
            )
    return table


def _cast(
    table: pa.Table, path: Path, name: str, is_kind: Callable[[pa.DataType], bool], kind: pa.DataType, wanted: str
) -> pa.Table:
    column = table[name]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise PrismError(f"The column {name} of {named(path)} must hold {wanted}, found none in row {row}.")
    if len(column) and not is_kind(column.type):
        raise PrismError(
            f"The column {name} of {named(path)} must hold {wanted}, found {quoted(str(column.type), 80)}."
        )
    try:
        return table.set_column(table.column_names.index(name), name, column.cast(kind))
    except pa.ArrowException as error:
        raise PrismError(f"The column {name} of {named(path)} must hold {wanted} ({quoted(error, 150)}).") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def open_shard(path: Path) -> Any:
    """A safetensors file, memory-mapped."""
    check_file(path, ", though the store's videos refer to it")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        with contextlib.suppress(MemoryError, TypeError, AttributeError, RuntimeError, IndexError):
            files.load_safetensors(path)  # says what is wrong: truncated, a pickle, no safetensors at all
        raise PrismError(f"The file {named(path)} is not a whole safetensors file ({quoted(error, 150)}).") from error


def tensor(shard: Any, path: Path, name: str, kinds: Sequence[str] = FLOATS) -> Any:
    """A tensor of an opened shard, not read yet, of one of some kinds of numbers, with at least one of them in it."""
    try:
        found = shard.get_slice(name)
        kind, shape = found.get_dtype(), found.get_shape()
    except Exception:
        raise PrismError(f"The file {named(path)} holds no tensor {name!r}.") from None
    if kind not in kinds:
        raise PrismError(f"The tensor {name} in {named(path)} must be of {', '.join(kinds)}; found {quoted(kind, 40)}.")
    if len(shape) < 2 or not all(shape):
        raise PrismError(
            f"The tensor {name} in {named(path)} must be (rows, ...), found the shape {quoted(shape, 80)}."
        )
    return found
