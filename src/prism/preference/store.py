"""The latent store: a folder of finished videos as latents, with prompts, scores and labelled pairs. I/O only.

    store.json                    schema, pipeline call, backbone fingerprint, command, seed, dimensions
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
from prism.errors import PrismError
from prism.preference.pairs import (
    PAIR_COLUMNS,
    SPLITS,
    PromptGroup,
    check_disjoint,
    group_by_prompt,
    label_matrix,
)

SCHEMA = 1
VIDEO_COLUMNS = ("video", "prompt", "seed", "split", "shard", "row")
SHARD_BYTES = 1 << 30


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
        pairs: as ``pairs_from_scores`` gives them.
        meta: goes into store.json: "call", "backbone", "command", "seed", "dimensions".
        trajectories: {"states": (n, S, ...), "t": (n, S)}.
        shard_bytes: largest size of a latent file.
        eight_bits: keep latents in a byte a number, off by at most 1/254 of the largest number at their place.
    """
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
    files.write_json(folder / "store.json", {"schema": SCHEMA, **meta})
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

    def __repr__(self) -> str:
        return f"LatentStore({self.folder}: {len(self.videos)} videos, {len(self.pairs)} pairs)"

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> LatentStore:
        """Open and check a store.

        Raises:
            PrismError: on a missing or damaged file, a video or pair that refers to nothing, unknown splits or labels,
                or splits that share a prompt or video.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise PrismError(f"The store {folder} does not exist.")
        meta = files.read_json(folder / "store.json")
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            found = meta.get("schema") if isinstance(meta, dict) else type(meta).__name__
            raise PrismError(f"The store {folder} has schema {found}; this version reads schema {SCHEMA}.")
        videos = _read_table(folder / "videos.parquet", VIDEO_COLUMNS)
        pairs = _read_table(folder / "pairs.parquet", PAIR_COLUMNS)
        store = cls(folder, meta, videos, pairs)
        check_disjoint(pairs)
        store._check_videos()
        store._check_pairs()
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
        return tuple(name for name in self.pairs.column_names if name not in PAIR_COLUMNS)

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline arguments the videos were sampled with; scoring captures its conditioning with the same."""
        return dict(self.meta.get("call") or {})

    @property
    def has_trajectories(self) -> bool:
        return (self.folder / "trajectory-00000.safetensors").exists()

    def groups(self, split: str, dimensions: Sequence[str] | None = None) -> list[PromptGroup]:
        """The labelled pairs of a split by prompt."""
        return group_by_prompt(self.pairs, self.dimensions if dimensions is None else dimensions, split)

    def latents(self, ids: Iterable[str]) -> Tensor:
        """(n, ...) float32 latents of finished videos, normalised, in the layout of the sampling loop."""
        return self._read("latents", "latents", ids)

    def trajectory(self, ids: Iterable[str], index: int | None = None) -> tuple[Tensor, Tensor]:
        """Recorded states (n, S, ...) and their t (n, S), both float32; of one ``index``: (n, ...) and (n,)."""
        if not self.has_trajectories:
            raise PrismError(f"The store {self.folder} holds no trajectories; make it anew with trajectories recorded.")
        ids = list(ids)
        return self._read("trajectory", "states", ids, index), self._read("trajectory", "t", ids, index)

    def num_states(self) -> int:
        """S, the number of recorded states per video; 0 without trajectories."""
        if not self.has_trajectories:
            return 0
        return int(self._slice(self.folder / "trajectory-00000.safetensors", "t").get_shape()[1])

    def _read(self, kind: str, name: str, ids: Iterable[str], index: int | None = None) -> Tensor:
        rows = []
        for video in ids:
            if video not in self._place:
                raise PrismError(f"The store {self.folder} has no video {video!r}.")
            shard, row = self._place[video]
            view = self._slice(self.folder / f"{kind}-{shard:05d}.safetensors", name)
            value = (view[row : row + 1] if index is None else view[row : row + 1, index : index + 1]).float()
            if view.get_dtype() == "I8":
                value = value * self._slice(self.folder / f"{kind}-{shard:05d}.safetensors", "scale")[:]
            if not bool(torch.isfinite(value).all()):
                raise PrismError(f"The {name} of video {video!r} in {self.folder} hold NaN or infinity.")
            rows.append(value[0] if index is None else value[0, 0])
        if not rows:
            raise PrismError(f"No videos were asked for in the store {self.folder}.")
        return torch.stack(rows)

    def _slice(self, path: Path, name: str) -> Any:
        if path not in self._shards:
            if not path.is_file():
                raise PrismError(f"The file {path} does not exist, though the store's videos refer to it.")
            try:
                self._shards[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError):
                files.load_safetensors(path)  # says what is wrong: truncated, a pickle, no safetensors at all
                raise
        with contextlib.suppress(SafetensorError):
            return self._shards[path].get_slice(name)
        raise PrismError(f"The file {path} holds no tensor {name!r}.")

    def _check_videos(self) -> None:
        table = self.folder / "videos.parquet"
        ids, splits, shards = (self.videos[name].to_pylist() for name in ("video", "split", "shard"))
        if len(set(ids)) != len(ids):
            twice = next(video for video in ids if ids.count(video) > 1)
            raise PrismError(f"The video {twice!r} is in {table} twice.")
        _check_splits(splits, table)
        as_pairs = [self.videos[name] for name in ("prompt", "video", "video", "split")]
        check_disjoint(pa.table(as_pairs, names=list(PAIR_COLUMNS)))  # videos without pairs leak as well
        needed: dict[int, int] = {}
        for shard, row in self._place.values():
            if not isinstance(shard, int) or not isinstance(row, int) or shard < 0 or row < 0:
                raise PrismError(f"The columns shard and row of {table} must be whole numbers from 0.")
            needed[shard] = max(needed.get(shard, 0), row + 1)
        for shard in sorted(set(shards)):
            path = self.folder / f"latents-{shard:05d}.safetensors"
            names = {path: "latents"}
            if self.has_trajectories:
                names[self.folder / f"trajectory-{shard:05d}.safetensors"] = "states"
            for path, name in names.items():
                rows = self._slice(path, name).get_shape()[0]
                if rows < needed[shard]:
                    raise PrismError(f"The file {path} holds {rows} videos where {table} refers to {needed[shard]}.")

    def _check_pairs(self) -> None:
        table = self.folder / "pairs.parquet"
        _check_splits(self.pairs["split"].to_pylist(), table)
        columns = (self.videos[name].to_pylist() for name in ("video", "prompt", "split"))
        known = {video: (prompt, split) for video, prompt, split in zip(*columns)}
        for prompt, video_a, video_b, split in zip(*(self.pairs[name].to_pylist() for name in PAIR_COLUMNS)):
            for video in (video_a, video_b):
                if video not in known:
                    raise PrismError(f"The pair ({video_a!r}, {video_b!r}) in {table} names no video of the store.")
                if known[video] != (prompt, split):
                    raise PrismError(
                        f"The pair ({video_a!r}, {video_b!r}) in {table} is of {prompt!r} ({split}), but its video "
                        f"{video!r} of {known[video][0]!r} ({known[video][1]})."
                    )
        label_matrix(self.pairs, self.dimensions)


def _read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    if not path.is_file():
        raise PrismError(f"The file {path} does not exist.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise PrismError(f"The file {path} is not a whole Parquet file ({error}).") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise PrismError(f"The file {path} lacks the column {missing[0]}.")
    return table


def _check_splits(splits: Iterable[str], table: Path) -> None:
    strange = set(splits) - set(SPLITS)
    if strange:
        raise PrismError(f"The split {min(map(str, strange))!r} in {table} is none of {', '.join(SPLITS)}.")
