"""Small files in the forms that public preference sets have, for the tests of the readers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def touch(root: Path, *names: str) -> None:
    """Files that are there, each with its name as its bytes."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def write(path: Path, rows: list[dict[str, Any]] | Any, encoding: str = "utf-8") -> Path:
    """Rows as a file, of the kind that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding=encoding) as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    else:
        path.write_text(json.dumps(rows), encoding=encoding)
    return path


def votes(found: Any, dimension: str) -> list[tuple[Any, ...]]:
    """(video_a, video_b, label) of a dimension."""
    columns = zip(*(found.votes[name].to_pylist() for name in ("video_a", "video_b", "label", "dimension")))
    return [each[:3] for each in columns if each[3] == dimension]


def column(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist()
