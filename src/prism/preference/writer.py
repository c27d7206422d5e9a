"""Writers of latent stores. `StoreWriter` writes shard by shard, from several processes, and can resume (schema 2);
`write_store` writes a whole store from memory at once (schema 1).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prism import files, runs, temporary
from prism.errors import PrismError, flag, instance, quoted, whole
from prism.preference import images
from prism.preference.compact import ROW_GROUP
from prism.preference.pairs import named
from prism.preference.shards import (
    FIRST_SCHEMA,
    INDEX,
    REQUIRED,
    ROW_COLUMNS,
    SCHEMA,
    SEALS,
    STORE,
    UNIT,
    check_key,
    key_digest,
    noted,
    shard_tables,
    with_units,
)
from prism.preference.store import LatentStore

SHARD_BYTES = 1 << 30
_TENSORS = ("latents", "scale", "states", "predicted", "t")


def unit_name(number: int, videos: Iterable[str]) -> str:
    """The name of the unit of work with this number (0 to 999,999), which makes these videos."""
    if not 0 <= number < 1_000_000:
        raise PrismError(f"A store has units 0 to 999999, found {number}; put more videos into each.")
    digest = hashlib.sha256("\0".join(videos).encode(errors="surrogatepass")).hexdigest()
    return f"{number:06d}-{digest[:12]}"


class StoreWriter:
    """Writer of a store, shard by shard; memory holds one shard at a time.

    Args:
        folder: new, or with `resume` a store of the same key and meta, which is continued.
        key: what the latents depend on, as JSON: backbone and revision, VAE, frame policy, dtype. Shards that were
            written under another key are refused.
        meta: further fields of store.json: "call", "backbone", "dimensions", "command", "seed".
        resume: continue the store in the folder.
        main: True in the first of several processes that write into the folder; False in the others, which must open
            the folder after it.
        changeable: fields of meta ("a.b": b of the object a) that may differ when a store is continued.
        again: what to do once a file can be written that could not, in words.

    Raises:
        PrismError: for a folder that holds something else or another store, naming the first difference.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: Mapping[str, Any],
        meta: Mapping[str, Any],
        resume: bool = False,
        main: bool = True,
        changeable: Sequence[str] = (),
        again: str = "start again with --resume: the shards written so far are complete",
    ) -> None:
        self.folder, self.key, self.again = Path(folder), key_digest(key), again
        self._images: dict[str, str] = {}
        identity = {"schema": SCHEMA, **meta, "key": dict(key)}
        self._claim = runs.claim(
            self.folder, identity, resume, main=main, name=STORE, shared=True, changeable=changeable
        )

    def has(self, unit: str) -> bool:
        """True if a unit's shard was written, under this store's key."""
        path = self.folder / "shards" / f"{unit}.parquet"
        if not path.is_file() or not path.with_suffix(".safetensors").is_file():
            return False
        check_key(path, noted(path), self.key)
        return True

    def keep_image(self, source: str | os.PathLike[str]) -> str:
        """Copy a conditioning image into the store, once; any process may. Returns what the column image holds of it.

        Raises:
            PrismError: for a file that is missing, no picture, or damaged.
        """
        path = os.path.abspath(source)
        if path not in self._images:
            self._images[path] = images.keep(self.folder, source)
        return self._images[path]

    def write(self, unit: str, videos: pa.Table, tensors: Mapping[str, Tensor]) -> None:
        """Write the shard of a unit; readers see it complete, or not at all.

        Args:
            unit: a name from `unit_name`.
            videos: a row per video: video, prompt, split, and optionally other columns of `ROW_COLUMNS` and scores; row
                and shape are filled in, and call is "{}" if it is missing. image: from `keep_image`.
            tensors: "latents" (videos, ...) of a floating-point dtype, or int8 with "scale" (1, ...); with recorded
                states also "states" (videos, S, ...), "t" (videos, S), and "predicted" (videos, S, ...).

        Raises:
            PrismError: for rows or tensors that do not fit each other, or if the file cannot be written; shards written
                before stay complete.
        """
        if not UNIT.fullmatch(unit):
            raise PrismError(
                f"The unit {quoted(unit, 60)} has no name of the right form; take it from prism.preference.unit_name."
            )
        _check_tensors(unit, len(videos), tensors)
        rows = _completed(unit, videos, tensors["latents"])
        for image in rows["image"].drop_null().unique().to_pylist():
            if not images.path_of(self.folder, image).is_file():
                raise PrismError(f"The image {image} of unit {unit} is not in the store; call keep_image first.")
        path = self.folder / "shards" / f"{unit}.safetensors"
        try:
            path.parent.mkdir(exist_ok=True)
            with files.new_file(path) as whole:
                save_file({name: value.contiguous() for name, value in tensors.items()}, whole)
                seal = files.sha256(whole)
                files.sync_tree(whole.parent)
            self._write_table(path.with_suffix(".parquet"), rows, {"sha256": seal, "key": self.key})
        except (OSError, SafetensorError) as error:
            raise self._unwritable(path, error) from error

    def label(
        self, pairs: pa.Table | None = None, votes: pa.Table | None = None, ratings: pa.Table | None = None
    ) -> None:
        """Write or replace labels; tables that are None stay as they are. Only the first process may call this."""
        for name, table in (("pairs", pairs), ("votes", votes), ("ratings", ratings)):
            if table is not None:
                self._seal(f"{name}.parquet", table)

    def write_beside(self, name: str, table: pa.Table, notes: Mapping[str, Any]) -> None:
        """Write a table that is no part of the store, at a name below its folder; it appears whole, or not at all."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write_table(path, table, notes)
        except OSError as error:
            raise self._unwritable(path, error) from error

    def finish(self, scores: pa.Table | None = None) -> int:
        """Write the index of all shards and return the number of videos.

        Only the first process may call this, when all processes have written their shards.

        scores: a column video, and columns of numbers that become score columns of the index, null for other videos.

        Raises:
            PrismError: if two shards hold the same video, or a shard was written under another key.
        """
        temporary.sweep(self.folder, deep=True)  # what a process left that was killed while the others went on
        shards = shard_tables(self.folder, self.key)
        rows = with_units(shards)
        if scores is not None:
            places = pc.index_in(rows["video"], value_set=scores["video"].combine_chunks())
            for name in scores.column_names:
                if name != "video":
                    rows = rows.drop_columns([name]) if name in rows.column_names else rows
                    rows = rows.append_column(name, scores[name].take(places))
        ids = rows["video"].to_pylist()
        if len(set(ids)) < len(ids):
            video = next(video for video, count in Counter(ids).items() if count > 1)
            raise PrismError(f"The video {quoted(video, 80)} is in two shards of {named(self.folder)}.")
        seals = {unit: metadata["sha256"] for unit, (_, metadata) in shards.items()}
        self._seal(INDEX, rows, {"key": self.key, "sha256": seals})
        return len(ids)

    def withdraw(self) -> None:
        """Leave the folder as it was before this run began in it, where no shard was written; a user's file stays.

        Only the first process may call this, when no other process writes any more.
        """
        if self._claim.resumed or any((self.folder / "shards").glob("*.*")) or not temporary.is_alone(self._claim.lock):
            return
        temporary.sweep(self.folder, deep=True)
        for name in (STORE, INDEX, SEALS):
            (self.folder / name).unlink(missing_ok=True)
        for path in (self.folder / images.FOLDER).glob("*"):
            if images.NAME.fullmatch(path.name) and not path.is_symlink():
                path.unlink()
        made = [self.folder] if self._claim.made else []
        for folder in (self.folder / "shards", self.folder / images.FOLDER, *made):
            with contextlib.suppress(OSError):  # not there, or not empty
                folder.rmdir()
        self._claim.release()

    def _unwritable(self, path: Path, error: Exception) -> PrismError:
        reason = getattr(error, "strerror", None) or error
        return PrismError(
            f"The file {named(path)} cannot be written ({quoted(reason, 120)}); free disk space or give write "
            f"permission, then {self.again}."
        )

    def _seal(self, name: str, table: pa.Table, metadata: Mapping[str, Any] | None = None) -> None:
        path = self.folder / name
        try:
            self._write_table(path, table, metadata or {})
            seals = files.read_json(self.folder / SEALS) if (self.folder / SEALS).is_file() else {}
            files.write_json(self.folder / SEALS, {**seals, name: files.sha256(path)})
        except OSError as error:
            raise self._unwritable(path, error) from error

    @staticmethod
    def _write_table(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> None:
        with files.new_file(path) as whole:
            noted_table = table.replace_schema_metadata({"prism": json.dumps(metadata)})
            pq.write_table(noted_table, whole, row_group_size=ROW_GROUP, compression="zstd")
            files.sync_tree(whole.parent)


def _check_tensors(unit: str, count: int, tensors: Mapping[str, Tensor]) -> None:
    unknown = [name for name in tensors if name not in _TENSORS]
    if "latents" not in tensors or unknown:
        raise PrismError(
            f"The tensors of unit {unit} must be latents and optionally {', '.join(_TENSORS[1:])}; found "
            f"{list(tensors)}."
        )
    if ("states" in tensors or "predicted" in tensors) != ("t" in tensors):
        raise PrismError(f"The tensors of unit {unit} need t if and only if they have states or predicted.")
    latents = tensors["latents"]
    if latents.ndim < 2 or not (latents.is_floating_point() or latents.dtype == torch.int8):
        raise PrismError(f"The latents of unit {unit} must be (rows, ...) floating-point numbers or int8 with a scale.")
    if (latents.dtype == torch.int8) != ("scale" in tensors):
        raise PrismError(f"The latents of unit {unit} need a scale if and only if they are int8.")
    shapes: dict[str, tuple[int, ...]] = {"latents": (count, *latents.shape[1:]), "scale": (1, *latents.shape[1:])}
    if "t" in tensors:
        steps = tensors["t"].shape[1] if tensors["t"].ndim == 2 else 0
        shapes |= {"t": (count, steps)}
        shapes |= dict.fromkeys(("states", "predicted"), (count, steps, *latents.shape[1:]))
    for name, value in tensors.items():
        if tuple(value.shape) != shapes[name] or not value.numel():
            raise PrismError(
                f"The tensor {name} of unit {unit} must be {shapes[name]} for {count} videos, found "
                f"{tuple(value.shape)}."
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise PrismError(f"The tensor {name} of unit {unit} holds NaN or infinity.")


def _completed(unit: str, videos: pa.Table, latents: Tensor) -> pa.Table:
    """The rows of a shard with all of `ROW_COLUMNS`, in their types."""
    count = len(videos)
    filled = {
        "row": pa.array(range(count), pa.int64()),
        "shape": pa.array(["x".join(map(str, latents.shape[1:]))] * count),
        "call": pa.array(["{}"] * count),
    }
    columns: dict[str, Any] = {}
    for name, kind in ROW_COLUMNS.items():
        column = videos[name] if name in videos.column_names and name not in ("row", "shape") else filled.get(name)
        try:
            columns[name] = pa.nulls(count, kind) if column is None else column.cast(kind)
        except pa.ArrowException as error:
            raise PrismError(f"The column {name} of unit {unit} must be {kind} ({quoted(error, 120)}).") from error
        if name in REQUIRED and columns[name].null_count:
            raise PrismError(f"The column {name} of unit {unit} must hold a text in each row.")
    scores = {name: videos[name] for name in videos.column_names if name not in ROW_COLUMNS}
    return pa.table({**columns, **scores})


# -- the first schema


def write_store(
    folder: Path,
    videos: pa.Table,
    latents: Tensor,
    pairs: pa.Table,
    meta: Mapping[str, Any],
    trajectories: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
    eight_bits: bool = False,
) -> None:
    """Write a store into an existing ``folder`` (from ``files.new_folder``), and check it by opening it.

    Args:
        videos: one row per video: video, prompt, seed, split, and score columns; ``shard`` and ``row`` are added here.
        latents: (videos, ...) float16 or float32, row i belongs to row i of ``videos``.
        pairs: as from ``pairs_from_scores``; optionally soft labels and weights as in ``prism.preference.soft``.
        meta: fields of store.json: "call", "backbone", "command", "seed", "dimensions".
        trajectories: {"states": (videos, S, ...), "t": (videos, S)}.
        shard_bytes: largest size of a latent file.
        eight_bits: keep latents as int8; the error is at most 1/254 of the largest absolute value, in the shard, of the
            same number of a latent.
    """
    instance("folder", folder, str | os.PathLike, "a path")
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise PrismError(f"The folder {named(folder)} does not exist; make it first, with files.new_folder.")
    instance("videos", videos, pa.Table, "a table of pyarrow")
    instance("pairs", pairs, pa.Table, "a table of pyarrow")
    instance("meta", meta, Mapping, "a dict")
    shard_bytes, eight_bits = whole("shard_bytes", shard_bytes, 1, 2**62), flag("eight_bits", eight_bits)
    if trajectories is not None and not (isinstance(trajectories, Mapping) and set(trajectories) == {"states", "t"}):
        raise PrismError(f'trajectories must be a dict of "states" and "t"; found {quoted(trajectories, 80)}.')
    for name, tensor in {"latents": latents, **(trajectories or {})}.items():
        instance(name, tensor, Tensor, "a tensor with one row per video")
        if tensor.ndim < 2 or not tensor.is_floating_point():
            raise PrismError(f"{name} must be (n, ...) floating-point numbers; found {quoted(tensor, 80)}.")
    count = len(videos)
    tensors = {"latents": latents, **(trajectories or {})}
    for name, tensor in tensors.items():
        if len(tensor) != count:
            raise PrismError(f"The store needs one row of {name} per video, found {len(tensor)} for {count} videos.")
    rows = max(1, shard_bytes // max(1, latents[:1].numel() * latents.element_size()))
    index = np.arange(count)
    videos = videos.select([name for name in videos.column_names if name not in ("shard", "row")])
    videos = videos.append_column("shard", pa.array(index // rows)).append_column("row", pa.array(index % rows))
    for shard, start in enumerate(range(0, count, rows)):
        piece = slice(start, start + rows)
        kept = _in_eight_bits(latents[piece]) if eight_bits else {"latents": latents[piece].contiguous()}
        save_file(kept, folder / f"latents-{shard:05d}.safetensors")
        if trajectories is not None:
            states = {name: trajectories[name][piece].contiguous() for name in ("states", "t")}
            save_file(states, folder / f"trajectory-{shard:05d}.safetensors")
    pq.write_table(videos, folder / "videos.parquet")
    pq.write_table(pairs, folder / "pairs.parquet")
    written = [path for kind in ("parquet", "safetensors") for path in sorted(folder.glob(f"*.{kind}"))]
    seals = {path.name: files.sha256(path) for path in written}
    files.write_json(folder / "store.json", {"schema": FIRST_SCHEMA, **meta, "sha256": seals})
    LatentStore.open(folder)


def _in_eight_bits(latents: Tensor) -> dict[str, Tensor]:
    scale = (latents.float().abs().amax(0, keepdim=True) / 127).clamp(min=1e-12)
    return {"latents": (latents.float() / scale).round().to(torch.int8), "scale": scale}
