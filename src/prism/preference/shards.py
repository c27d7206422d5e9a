"""Shards of a latent store (schema 2): files that several processes write at once, each complete or absent.

    store.json                schema 2, the cache key, dimensions, the call that most videos share, command, seed
    shards/UNIT.safetensors   tensors of some videos of one shape: "latents" (rows, ...); optional "states" (rows, S,
                              ...) recorded while sampling, "predicted" (rows, S, ...), the clean latents the denoiser
                              predicted there, and "t" (rows, S) in [0, 1000] of both
    shards/UNIT.parquet       a row per video (`ROW_COLUMNS`, and any score columns); written last, so that a shard is
                              complete if this file exists; its metadata hold the tensors' SHA-256 and the key's digest
    index.parquet             the rows of all shards, so that a store of 100,000 videos opens in a second
    images/SHA256.ENDING      conditioning images of videos, each once (``prism.preference.images``)
    pairs.parquet             labelled pairs (see ``prism.preference.pairs``); optional: votes.parquet, ratings.parquet
    conditionings/KEY/        optional: encodings of its prompts (``prism.training.kept_conditionings``)
    seals.json                SHA-256 of index, pairs, votes and ratings

A unit is the work that makes one shard. Its name (`unit_name`) depends on its number and videos only, so that a resumed
run sees which units are done. Processes that share a run write different units.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open

from prism import files
from prism.errors import PrismError, quoted
from prism.preference.compact import RowIndex, compacted, equal_at, joint_codes, plain
from prism.preference.pairs import (
    PAIR_COLUMNS,
    SPLITS,
    check_disjoint,
    check_file,
    cut,
    dimensions_of,
    label_matrix,
    named,
    read_table,
)
from prism.preference.soft import check_soft

FIRST_SCHEMA, SCHEMA = 1, 2
FLOATS = ("F16", "BF16", "F32", "F64")
NUMBERS = (*FLOATS, "I8")  # int8 tensors come with a scale
STORE, INDEX, PAIRS, SEALS = "store.json", "index.parquet", "pairs.parquet", "seals.json"
ROW_COLUMNS = {
    "video": pa.string(),
    "prompt": pa.string(),
    "split": pa.string(),
    "row": pa.int64(),
    "seed": pa.int64(),
    "model": pa.string(),
    "call": pa.string(),
    "shape": pa.string(),
    "image": pa.string(),
    "source": pa.string(),
    "source_row": pa.int64(),
}
"""Columns of a shard's rows and of the index. May be null: seed, model (the generator), image (a file below images/),
source and source_row (file and row that named the video). call: JSON of the pipeline arguments that differ from the
store's; shape: of one latent, such as "16x21x60x104"."""
REQUIRED = ("video", "prompt", "split", "call", "shape")
UNIT = re.compile(r"\d{6}-[0-9a-f]{12}")


def key_digest(key: Mapping[str, Any]) -> str:
    """A hash of a cache key that ignores the order of its fields."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def check_key(path: Path, metadata: Mapping[str, Any], key: str) -> None:
    """Refuse a shard or index that was written under another cache key."""
    if metadata.get("key") != key:
        raise PrismError(
            f"The file {named(path)} was written for another backbone, VAE, frame policy or dtype than store.json "
            "says; delete the store's folder and write it again, or restore the right store.json."
        )


def shard_tables(folder: Path, key: str, skip: Iterable[str] = ()) -> dict[str, tuple[pa.Table, dict[str, Any]]]:
    """Rows and metadata of each shard, by unit, in the order of their names; the units in `skip` are left out."""
    skipped, shards = set(skip), {}
    try:
        names = sorted(os.listdir(folder / "shards")) if (folder / "shards").is_dir() else []
    except OSError as error:
        raise PrismError(f"The folder {named(folder / 'shards')} cannot be read ({error.strerror}).") from error
    for name in names:
        unit, end = os.path.splitext(name)
        if end == ".parquet" and UNIT.fullmatch(unit) and unit not in skipped:
            path = folder / "shards" / name
            metadata = noted(path)
            check_key(path, metadata, key)
            shards[unit] = read_rows(path, ()), metadata
    return shards


def read_rows(path: Path, texts: Sequence[str], compact: bool = False) -> pa.Table:
    """The rows of a shard or of the index, checked; `texts`: further columns that it must have."""
    return read_table(
        path, ("video", "prompt", "split", "call", "shape", *texts), ("row",), tuple(ROW_COLUMNS), compact
    )


def with_units(shards: Mapping[str, tuple[pa.Table, Any]]) -> pa.Table:
    """The rows of some shards as one table, with the column shard: each row's unit."""
    tables = [rows.append_column("shard", pa.array([unit] * len(rows))) for unit, (rows, _) in shards.items()]
    if not tables:
        return pa.table({name: pa.array([], kind) for name, kind in {**ROW_COLUMNS, "shard": pa.string()}.items()})
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def indexed(folder: Path, key: str, compact: bool = False) -> tuple[pa.Table, dict[Path, str]]:
    """All rows of a store, with the column shard, and the SHA-256 of each shard's tensors and of the labels.

    Shards that were written after the index are read too. `compact`: as of `read_table`.
    """
    seals = _sealed(folder)
    for path, seal in seals.items():
        check_seal(path, seal, SEALS)
    rows, sums = None, {}
    if (folder / INDEX).is_file():
        metadata = noted(folder / INDEX)
        check_key(folder / INDEX, metadata, key)
        rows = read_rows(folder / INDEX, ("shard",), compact)
        sums = dict(metadata.get("sha256") or {})
        unsealed = set(pc.unique(rows["shard"]).to_pylist()) - set(sums)
        if unsealed:
            raise PrismError(
                f"The file {named(folder / INDEX)} names the shard {quoted(min(unsealed), 60)} without its SHA-256."
            )
    later = shard_tables(folder, key, sums)
    if later or rows is None:
        added = with_units(later)
        rows = added if rows is None else pa.concat_tables([plain(rows), added], promote_options="permissive")
        rows = compacted(rows) if compact else rows
        sums |= {unit: metadata.get("sha256") for unit, (_, metadata) in later.items()}
    for unit, seal in sums.items():
        seals[folder / "shards" / f"{unit}.safetensors"] = str(seal)
    return rows, seals


def check_seal(path: Path, seal: str, kept_in: str) -> None:
    """Compare a file with its SHA-256; `kept_in` is the name of the file that holds the SHA-256."""
    check_file(path, f", though {kept_in} has its SHA-256")
    if files.sha256(path) != seal:
        on_purpose = f"; if the file was changed on purpose, delete its entry in {kept_in}"
        raise PrismError(
            f"The file {named(path)} is not the one that was written: {kept_in} has another SHA-256. Copy or write the "
            f"store again{on_purpose * kept_in.endswith('.json')}."
        )


def _sealed(folder: Path) -> dict[Path, str]:
    path = folder / SEALS
    seals = files.read_json(path) if path.is_file() else {}
    if not isinstance(seals, dict) or set(seals) - {INDEX, PAIRS, "votes.parquet", "ratings.parquet"}:
        raise PrismError(f"The file {named(path)} must be an object of SHA-256 sums by file name; it was altered.")
    return {folder / name: str(seal) for name, seal in seals.items()}


def noted(path: Path) -> dict[str, Any]:
    """The metadata that `StoreWriter` put into a Parquet file."""
    try:
        metadata = json.loads((pq.read_schema(path).metadata or {})[b"prism"])
    except Exception as error:
        raise PrismError(
            f"The file {named(path)} is no table of a latent store, or damaged ({quoted(error, 120)}); delete it and "
            "run with --resume, which makes it again."
        ) from error
    if not isinstance(metadata, dict):
        raise PrismError(f"The file {named(path)} is no table of a latent store; delete it.")
    return metadata


def open_shard(path: Path) -> Any:
    """A safetensors file, memory-mapped."""
    check_file(path, ", though the store's videos refer to it")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        with contextlib.suppress(MemoryError, TypeError, AttributeError, RuntimeError, IndexError):
            files.load_safetensors(path)  # says what is wrong: truncated, a pickle, no safetensors at all
        raise PrismError(f"The file {named(path)} is not a whole safetensors file ({quoted(error, 150)}).") from error


def view(shard: Any, path: Path, name: str, kinds: Sequence[str] = FLOATS) -> Any:
    """A tensor of an opened shard, not read yet; checked to be of one of `kinds`, and not empty."""
    try:
        tensor = shard.get_slice(name)
        kind, shape = tensor.get_dtype(), tensor.get_shape()
    except Exception:
        raise PrismError(f"The file {named(path)} holds no tensor {name!r}.") from None
    if kind not in kinds:
        raise PrismError(f"The tensor {name} in {named(path)} must be of {', '.join(kinds)}; found {quoted(kind, 40)}.")
    if len(shape) < 2 or not all(shape):
        raise PrismError(
            f"The tensor {name} in {named(path)} must be (rows, ...), found the shape {quoted(shape, 80)}."
        )
    return tensor


def present_pairs(folder: Path, videos: RowIndex) -> pa.Table:
    """The pairs whose videos the store holds; a store that is still being written may lack videos of some pairs."""
    if not (folder / PAIRS).is_file():
        return pa.table({name: pa.array([], pa.string()) for name in PAIR_COLUMNS})
    pairs = read_table(folder / PAIRS, PAIR_COLUMNS, compact=True)
    present = (videos.rows(pairs["video_a"]) >= 0) & (videos.rows(pairs["video_b"]) >= 0)
    missing = len(pairs) - int(present.sum())
    if missing:
        warnings.warn(
            f"{missing} of {len(pairs)} pairs of the store {named(folder)} name videos that it does not hold (yet); "
            "they are left out.",
            stacklevel=3,
        )
    return pairs.filter(pa.array(present)) if missing else pairs


def check_pairs(pairs: pa.Table, videos: pa.Table, index: RowIndex, path: Path) -> None:
    """Refuse pairs of other videos, prompts or splits than the store's, so that splits share none, as in its videos.

    Args:
        pairs, videos: as from `compacted`.
        index: of the videos.
        path: of the pairs.
    """
    check_splits(pc.unique(pairs["split"]).to_pylist(), path)
    for side in ("video_a", "video_b"):
        rows = index.rows(pairs[side])
        same = rows >= 0
        for name in ("prompt", "split"):
            same &= equal_at(videos[name], rows.clip(0), pairs[name]) if len(rows) else True
        if same.all():
            continue
        check_disjoint(plain(pairs))  # which says more
        wrong = int(np.argmin(same))
        prompt, video_a, video_b, split = (pairs[name][wrong].as_py() for name in PAIR_COLUMNS)
        pair, row = f"The pair ({cut(video_a)}, {cut(video_b)}) in {named(path)}", int(rows[wrong])
        if row < 0:
            raise PrismError(f"{pair} names no video of the store.")
        raise PrismError(
            f"{pair} is of {cut(prompt)} ({split}), but its video {cut(pairs[side][wrong].as_py())} of "
            f"{cut(videos['prompt'][row].as_py())} ({videos['split'][row].as_py()})."
        )
    label_matrix(pairs, dimensions_of(pairs))
    check_soft(pairs, dimensions_of(pairs), named(path))


def read_meta(path: Path) -> dict[str, Any]:
    """The content of store.json; checked to be an object with objects as "call", "backbone" and "sha256"."""
    check_file(path)
    meta = files.read_json(path)
    if not isinstance(meta, dict):
        raise PrismError(f"The file {named(path)} is a {type(meta).__name__} where an object is needed.")
    for name in ("call", "backbone", "sha256"):
        if not isinstance(meta.get(name) or {}, dict):
            raise PrismError(f"The field {name} of {named(path)} must be an object, found {quoted(meta[name], 80)}.")
    return meta


def kinds_of(videos: pa.Table) -> np.ndarray:
    """Number the combinations of shape, call and conditioning image, in order of appearance.

    Returns:
        (videos,) int64, equal for videos that may share a batch.
    """
    columns = [videos[name] for name in ("image", "shape", "call") if name in videos.column_names]
    return joint_codes(columns).astype(np.int64)


def check_splits(splits: Iterable[str], table: Path) -> None:
    """Refuse splits of a table that are none of `SPLITS`."""
    unknown = set(splits) - set(SPLITS)
    if unknown:
        raise PrismError(f"The split {cut(min(unknown))} in {table} is none of {', '.join(SPLITS)}.")
