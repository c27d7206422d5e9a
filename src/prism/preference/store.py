"""The latent store: a folder of finished videos as latents, with prompts, scores and labelled pairs. I/O only.

    store.json                    schema, pipeline call, backbone fingerprint, command, seed, dimensions, and the sha256
                                  of each other file
    videos.parquet                video, prompt, seed, split, shard, row, and any score columns
    pairs.parquet                 see ``prism.preference.pairs``
    latents-00000.safetensors     "latents" (rows, ...) in the layout of the sampling loop, float16 or float32; or int8
                                  with "scale" (1, ...), by which each place of a latent is multiplied
    trajectory-00000.safetensors  optional: "states" (rows, S, ...) recorded while sampling, "t" (rows, S) in [0, 1000]

Latents are read row by row from memory-mapped files, so a store may be larger than memory.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism import files
from prism.errors import PrismError, flag, instance, listed, quoted, whole
from prism.preference.pairs import (
    PAIR_COLUMNS,
    SPLITS,
    PromptGroup,
    check_disjoint,
    check_file,
    cut,
    dimensions_of,
    group_by_prompt,
    label_matrix,
    named,
    read_table,
)
from prism.preference.soft import check_soft

SCHEMA = 1
SHARD_BYTES = 1 << 30
FLOATS = ("F16", "BF16", "F32", "F64")
NUMBERS = (*FLOATS, "I8")  # eight bits come with a scale


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
    """Write a store into ``folder``, which exists (take it from ``files.new_folder``), and check it by opening it.

    Args:
        videos: one row per video: video, prompt, seed, split, and score columns; ``shard`` and ``row`` are added here.
        latents: (n, ...) float16 or float32, row i belongs to row i of ``videos``.
        pairs: as ``pairs_from_scores`` gives them; soft labels and weights beside them as in ``preference.soft``.
        meta: goes into store.json: "call", "backbone", "command", "seed", "dimensions".
        trajectories: {"states": (n, S, ...), "t": (n, S)}.
        shard_bytes: largest size of a latent file.
        eight_bits: keep latents in a byte a number, off by at most 1/254 of the largest number at their place.
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
    files.write_json(folder / "store.json", {"schema": SCHEMA, **meta, "sha256": seals})
    LatentStore.open(folder)


def _in_eight_bits(latents: Tensor) -> dict[str, Tensor]:
    scale = (latents.float().abs().amax(0, keepdim=True) / 127).clamp(min=1e-12)
    return {"latents": (latents.float() / scale).round().to(torch.int8), "scale": scale}


class LatentStore:
    """An opened store. Use ``LatentStore.open(folder)``, which checks everything that can be checked cheaply."""

    def __init__(self, folder: Path, meta: dict[str, Any], videos: pa.Table, pairs: pa.Table) -> None:
        self.folder, self.meta, self.videos, self.pairs = folder, meta, videos, pairs
        columns = (videos[name].to_pylist() for name in ("video", "shard", "row"))
        self._place = {video: (shard, row) for video, shard, row in zip(*columns)}
        self._shards: dict[Path, Any] = {}
        self._unread = {folder / name for name in meta.get("sha256") or {}}

    def __repr__(self) -> str:
        return f"LatentStore({self.folder}: {len(self.videos)} videos, {len(self.pairs)} pairs)"

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> LatentStore:
        """Open and check a store.

        Raises:
            PrismError: on a missing or damaged file, a video or pair that refers to nothing, unknown splits or labels,
                or splits that share a prompt or video.
        """
        instance("A store's folder", folder, str | os.PathLike, "a path")
        folder = Path(folder)
        if not os.path.isdir(folder):  # also of a name too long for the file system
            found = "is a file" if os.path.exists(folder) else "does not exist"
            raise PrismError(
                f"The store {named(folder)} {found}; it is a folder that prism.preference.write_store writes."
            )
        if not (folder / "store.json").exists():
            raise PrismError(
                f"The folder {named(folder)} is no store: its store.json does not exist. Latents and labels "
                "become one by prism.preference.write_store."
            )
        meta = _read_meta(folder / "store.json")
        if meta.get("schema") != SCHEMA:
            found = quoted(meta.get("schema"), 80)
            raise PrismError(f"The store {named(folder)} has schema {found}; this version reads schema {SCHEMA}.")
        texts, others = ("video", "prompt", "split"), ("seed",)
        videos = read_table(folder / "videos.parquet", texts, ("shard", "row"), others)
        pairs = read_table(folder / "pairs.parquet", PAIR_COLUMNS)
        store = cls(folder, meta, videos, pairs)
        check_disjoint(pairs)
        store._check_videos()
        store._check_pairs()
        for name in ("videos.parquet", "pairs.parquet"):
            store._check_seal(folder / name)
        return store

    @classmethod
    def of(cls, store: LatentStore | str | os.PathLike[str]) -> LatentStore:
        """The store itself, or the one in a folder. Raises PrismError for anything else."""
        if isinstance(store, LatentStore):
            return store
        if not isinstance(store, str | os.PathLike):
            raise PrismError(f"A latent store or its folder is needed, found {type(store).__name__}.")
        return cls.open(store)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that pairs are labelled in."""
        return dimensions_of(self.pairs)

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline arguments the videos were sampled with; scoring captures its conditioning with the same."""
        return dict(self.meta.get("call") or {})

    @property
    def has_trajectories(self) -> bool:
        return (self.folder / "trajectory-00000.safetensors").exists()

    def groups(self, split: str, dimensions: Sequence[str] | None = None) -> list[PromptGroup]:
        """The labelled pairs of a split by prompt."""
        instance("The split", split, str, "a text")
        return group_by_prompt(self.pairs, self.dimensions if dimensions is None else dimensions, split)

    def latents(self, ids: Iterable[str]) -> Tensor:
        """(n, ...) float32 latents of finished videos, normalised, in the layout of the sampling loop."""
        return self._read("latents", "latents", ids)

    def trajectory(self, ids: Iterable[str], index: int | None = None) -> tuple[Tensor, Tensor]:
        """Recorded states (n, S, ...) and their t (n, S), both float32; of one ``index``: (n, ...) and (n,)."""
        if not self.has_trajectories:
            raise PrismError(f"The store {self.folder} holds no trajectories; make it anew with trajectories recorded.")
        ids, count = list(listed("The videos", ids)), self.num_states()
        if index is not None:
            index = whole(f"The index of a state in {named(self.folder)}", index, -count, count - 1) % count
        states, t = self._read("trajectory", "states", ids, index), self._read("trajectory", "t", ids, index)
        if not bool(((t >= 0) & (t <= 1000)).all()):
            raise PrismError(f"The t of recorded states in {self.folder} must lie in [0, 1000]; the file is altered.")
        return states, t

    def num_states(self) -> int:
        """S, the number of recorded states per video; 0 without trajectories."""
        if not self.has_trajectories:
            return 0
        return int(self._tensor(self._path("trajectory", 0), "t").get_shape()[1])

    def _read(self, kind: str, name: str, ids: Iterable[str], index: int | None = None) -> Tensor:
        rows = []
        for video in listed("The videos", ids):
            if video not in self._place:
                raise PrismError(f"The store {self.folder} has no video {cut(video)}.")
            shard, row = self._place[video]
            path = self._path(kind, shard)
            self._check_seal(path)
            view = self._tensor(path, name, NUMBERS)
            try:
                value = (view[row : row + 1] if index is None else view[row : row + 1, index : index + 1]).float()
                if view.get_dtype() == "I8":
                    value = value * self._scale(path)
            except (SafetensorError, OSError, RuntimeError, IndexError, ValueError) as error:
                raise PrismError(
                    f"The {name} of row {row} cannot be read from {named(path)} ({quoted(error, 150)})."
                ) from error
            if not bool(torch.isfinite(value).all()):
                raise PrismError(f"The {name} of video {cut(video)} in {self.folder} hold NaN or infinity.")
            rows.append(value[0] if index is None else value[0, 0])
        if not rows:
            raise PrismError(f"No videos were asked for in the store {self.folder}.")
        return torch.stack(rows)

    def _scale(self, path: Path) -> Tensor:
        scale: Tensor = self._tensor(path, "scale")[:].float()
        if not bool((scale >= 0).all()) or not bool(torch.isfinite(scale).all()):
            raise PrismError(f"The tensor scale in {named(path)} must hold finite numbers from 0; the file is altered.")
        return scale

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / f"{kind}-{shard:05d}.safetensors"

    def _tensor(self, path: Path, name: str, kinds: Sequence[str] = FLOATS) -> Any:
        if path not in self._shards:
            self._shards[path] = _open_shard(path)
        return _view(self._shards[path], path, name, kinds)

    def _check_seal(self, path: Path) -> None:
        """Compare a file with its checksum, the first time it is read; stores of earlier versions have none."""
        if path not in self._unread:
            return
        if files.sha256(path) != self.meta["sha256"][path.name]:
            raise PrismError(
                f"The file {named(path)} is not the one that was written: store.json has another SHA-256. "
                "Copy or write the store anew; if it was changed on purpose, delete its line under sha256 there."
            )
        self._unread.discard(path)

    def _check_videos(self) -> None:
        table = self.folder / "videos.parquet"
        ids, splits = (self.videos[name].to_pylist() for name in ("video", "split"))
        if len(set(ids)) != len(ids):
            twice = next(video for video, count in Counter(ids).items() if count > 1)
            raise PrismError(f"The video {cut(twice)} is in {table} twice.")
        _check_splits(splits, table)
        as_pairs = [self.videos[name] for name in ("prompt", "video", "video", "split")]
        check_disjoint(pa.table(as_pairs, names=list(PAIR_COLUMNS)))  # videos without pairs leak as well
        needed: dict[int, int] = {}
        for shard, row in self._place.values():
            needed[shard] = max(needed.get(shard, 0), row + 1)
        recorded = self.has_trajectories
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in sorted({*needed, 0} if recorded and needed else needed):
            path = self._path("latents", shard)
            latents = self._tensor(path, "latents", NUMBERS)
            self._check_shape(shapes, path, "latents", latents, needed.get(shard, 0))
            if recorded:
                path = self._path("trajectory", shard)
                states, t = self._tensor(path, "states", NUMBERS), self._tensor(path, "t")
                self._check_shape(shapes, path, "states", states, needed.get(shard, 0))
                self._check_shape(shapes, path, "t", t, needed.get(shard, 0))
        if recorded and needed and shapes["states"] != shapes["t"] + shapes["latents"]:
            raise PrismError(
                f"The trajectories of {self.folder} must be states (rows, S, ...) and t (rows, S) of its latents; "
                f"found (rows, {_listed(shapes['states'])}) and (rows, {_listed(shapes['t'])})."
            )

    def _check_shape(self, shapes: dict[str, tuple[int, ...]], path: Path, name: str, view: Any, needed: int) -> None:
        """A tensor must have the rows that are needed, and the shape behind them that it has in the other shards."""
        rows, *shape = view.get_shape()
        if rows < needed:
            table = self.folder / "videos.parquet"
            raise PrismError(f"The file {path} holds {rows} videos where {table} refers to {needed}.")
        if shapes.setdefault(name, tuple(shape)) != tuple(shape):
            raise PrismError(
                f"The {name} in {named(path)} have the shape (rows, {_listed(shape)}), those of other files "
                f"(rows, {_listed(shapes[name])})."
            )
        if view.get_dtype() == "I8":
            scale, wanted = self._tensor(path, "scale").get_shape(), [1, *shape]
            if list(scale) != wanted:
                raise PrismError(
                    f"The tensor scale in {named(path)} must have the shape ({_listed(wanted)}), found "
                    f"({_listed(scale)})."
                )

    def _check_pairs(self) -> None:
        table = self.folder / "pairs.parquet"
        _check_splits(self.pairs["split"].to_pylist(), table)
        columns = (self.videos[name].to_pylist() for name in ("video", "prompt", "split"))
        known = {video: (prompt, split) for video, prompt, split in zip(*columns)}
        for prompt, video_a, video_b, split in zip(*(self.pairs[name].to_pylist() for name in PAIR_COLUMNS)):
            for video in (video_a, video_b):
                if known.get(video) == (prompt, split):
                    continue
                pair = f"The pair ({cut(video_a)}, {cut(video_b)}) in {named(table)}"
                if video not in known:
                    raise PrismError(f"{pair} names no video of the store.")
                raise PrismError(
                    f"{pair} is of {cut(prompt)} ({split}), but its video {cut(video)} of "
                    f"{cut(known[video][0])} ({known[video][1]})."
                )
        label_matrix(self.pairs, self.dimensions)
        check_soft(self.pairs, self.dimensions, named(table))


def _listed(shape: Sequence[int]) -> str:
    return quoted(", ".join(map(str, shape)), 60)


def _check_splits(splits: Iterable[str], table: Path) -> None:
    strange = set(splits) - set(SPLITS)
    if strange:
        raise PrismError(f"The split {cut(min(strange))} in {table} is none of {', '.join(SPLITS)}.")


def _read_meta(path: Path) -> dict[str, Any]:
    """store.json: an object whose parts have the kinds that a store relies on."""
    check_file(path)
    meta = files.read_json(path)
    if not isinstance(meta, dict):
        raise PrismError(f"The file {named(path)} is a {type(meta).__name__} where an object is needed.")
    for name in ("call", "backbone", "sha256"):
        if not isinstance(meta.get(name) or {}, dict):
            raise PrismError(f"The field {name} of {named(path)} must be an object, found {quoted(meta[name], 80)}.")
    return meta


def _open_shard(path: Path) -> Any:
    """A safetensors file, memory-mapped."""
    check_file(path, ", though the store's videos refer to it")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        with contextlib.suppress(MemoryError, TypeError, AttributeError, RuntimeError, IndexError):
            files.load_safetensors(path)  # says what is wrong: truncated, a pickle, no safetensors at all
        raise PrismError(f"The file {named(path)} is not a whole safetensors file ({quoted(error, 150)}).") from error


def _view(shard: Any, path: Path, name: str, kinds: Sequence[str] = FLOATS) -> Any:
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
