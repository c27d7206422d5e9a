"""Sources of videos: a file, a folder or list of pictures, bytes, or a cell of a Parquet file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism.decoding import Decoder, Movie, Timeline, decoder
from prism.errors import PrismError, quoted, reason

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MOVIES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv", ".gif")
_CELL = re.compile(r"(?P<file>.+\.parquet)#(?P<column>.+)/(?P<row>[0-9]{1,18})", re.DOTALL | re.IGNORECASE)


def opened(source: Any, fps: float | None) -> tuple[Decoder, str]:
    """The decoder of a source, and its name in error messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        name = f"The video of {len(source):,} bytes"
        return decoder(bytes(source), name), name
    if isinstance(source, list | tuple):
        return _stills(source, f"The video of {len(source)} picture{'' if len(source) == 1 else 's'}", fps)
    path = _path(source)
    name = f"The video {quoted(path)}"
    try:
        is_folder, exists = os.path.isdir(path), os.path.exists(path)
    except (OSError, ValueError) as error:
        raise PrismError(f"{name} cannot be read: {reason(error)}.") from error
    cell = None if exists else _CELL.fullmatch(path)
    if cell:
        value = _cell_value(cell["file"], cell["column"], int(cell["row"]), name)
        return _stills(value, name, fps) if isinstance(value, list) else (decoder(value, name), name)
    if is_folder:
        pictures = picture_files(Path(path))
        if not pictures:
            raise PrismError(f"{name} is a folder without pictures; {', '.join(PICTURES)} are read.")
        return Stills(pictures, name, fps), name
    if not exists:
        raise PrismError(f"{name} does not exist.")
    if not os.path.isfile(path):
        raise PrismError(f"{name} is no file.")
    return decoder(path, name), name


def _path(source: Any) -> str:
    try:
        path = os.fsdecode(source)
    except TypeError as error:
        raise PrismError(
            f"A video is given as {quoted(source, 80)}; a path, bytes or a list of picture files is needed."
        ) from error
    if "\0" in path:
        raise PrismError(f"The video {quoted(path)} cannot be read: its name holds a null character.")
    return path


def _stills(items: Sequence[Any], name: str, fps: float | None) -> tuple[Decoder, str]:
    if not items:
        raise PrismError(f"{name} holds none; picture files are needed.")
    files: list[str | bytes] = []
    for item in items:
        if isinstance(item, bytes | bytearray | memoryview):
            files.append(bytes(item))
            continue
        path = _path(item)
        cell = None if os.path.exists(path) else _CELL.fullmatch(path)
        value = _cell_value(cell["file"], cell["column"], int(cell["row"]), name) if cell else path
        if isinstance(value, list):
            raise PrismError(f"{name} has the frame {quoted(path, 120)}, which is {len(value)} pictures; give one.")
        files.append(value)
    return Stills(files, name, fps), name


def _cell_value(file: str, column: str, row: int, name: str) -> Any:
    """A file's bytes or path, or a list of them, from a cell of a Parquet file, of which only a few rows are read."""
    import pyarrow.parquet as pq

    if not os.path.isfile(file):
        raise PrismError(f"{name} cannot be read: there is no file {quoted(file, 120)}.")
    try:
        with pq.ParquetFile(file) as table:
            columns, rows = table.schema_arrow.names, table.metadata.num_rows
            if column not in columns:
                raise PrismError(
                    f"{name} cannot be read: the file has no column {quoted(column, 80)}; it has "
                    f"{quoted(', '.join(columns), 120)}."
                )
            if row >= rows:
                raise PrismError(f"{name} cannot be read: the file has {rows} rows, numbered from 0.")
            value = _value(table, column, row)
    except PrismError:
        raise
    except Exception as error:  # pyarrow's of a file that is damaged
        raise PrismError(f"{name} cannot be read from the Parquet file: {reason(error)}.") from error
    return _files(value, Path(file).parent, name)


def _value(table: Any, column: str, row: int) -> Any:
    """The cell's value; at most eight rows of its row group are in memory."""
    group = 0
    while row >= table.metadata.row_group(group).num_rows:
        row -= table.metadata.row_group(group).num_rows
        group += 1
    leaves = [table.schema.column(index).path for index in range(len(table.schema))]
    names = [path for path in leaves if path == column or path.startswith(f"{column}.")]
    for batch in table.iter_batches(batch_size=8, row_groups=[group], columns=names, use_threads=False):
        if row < batch.num_rows:
            return batch.column(batch.schema.get_field_index(column))[row].as_py()
        row -= batch.num_rows
    raise PrismError("The Parquet file ends before this row.")


def _files(value: Any, folder: Path, name: str) -> Any:
    if isinstance(value, list):
        return [_files(item, folder, name) for item in value]
    if isinstance(value, dict):  # as datasets' Image and Video
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value and "\0" not in value:
        path = (folder / value).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise PrismError(f"{name} names the file {quoted(value, 120)}, which is outside the Parquet file's folder.")
        if not path.is_file():
            raise PrismError(f"{name} holds no bytes, and the file {quoted(value, 120)} that it names does not exist.")
        return str(path)
    raise PrismError(
        f"{name} holds {quoted(value, 80)}; a file's bytes, or a struct of bytes and path, is needed in the cell."
    )


class Stills:
    """Pictures, each a path or bytes, as the frames of one video."""

    def __init__(self, files: Sequence[str | bytes], name: str, fps: float | None):
        self.name = name
        self._files = files
        self._fps = fps

    def timeline(self) -> Timeline:
        rate, count = self._fps or 1.0, len(self._files)
        return Timeline(np.arange(count) / rate, count / rate, count, timed=self._fps is not None)

    def pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray, float]]:
        first: tuple[int, ...] | None = None
        for number in numbers:
            file = self._files[number]
            path = f" ({quoted(file, 120)})" if isinstance(file, str) else ""
            name = f"Frame {number}{path} of {self.name[0].lower()}{self.name[1:]}"
            each = decoder(file, name)
            if isinstance(each, Movie):
                raise PrismError(f"{name} is no picture; a list or folder of frames holds PNG, JPEG or WebP.")
            for _, pixels, ratio in each.pictures([0]):
                size = pixels.shape[:2]
                first = first or size
                if size != first:
                    raise PrismError(
                        f"{name} is {size[0]} x {size[1]}, and those before it are {first[0]} x {first[1]}; make "
                        "the frames of a video of one size."
                    )
                yield number, pixels, ratio


def picture_files(folder: Path) -> list[str]:
    """The pictures of a folder in the order of the numbers in their names: frame_2 comes before frame_10."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(PICTURES) and not name.startswith(".")]
    key = {name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in names}
    return [str(folder / name) for name in sorted(names, key=lambda name: (key[name], name))]
