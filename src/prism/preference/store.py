"""The latent store: a folder of finished videos as latents, with prompts, scores and labelled pairs. I/O only.

    store.json                    schema, pipeline call, backbone fingerprint, command, seed, dimensions, and the sha256
                                  of each other file
    videos.parquet                video, prompt, seed, split, shard, row, and any score columns
    pairs.parquet                 see ``prism.preference.pairs``
    latents-00000.safetensors     "latents" (rows, ...) in the layout of the sampling loop, float16 or float32; or int8
                                  with "scale" (1, ...), which each number of a latent is multiplied by
    trajectory-00000.safetensors  optional: "states" (rows, S, ...) recorded while sampling, "t" (rows, S) in [0, 1000]

Latents are read row by row from memory-mapped files, so a store may be larger than memory.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from torch import Tensor

from prism import files
from prism.errors import PrismError, instance, listed, quoted, whole
from prism.preference import images
from prism.preference.compact import RowIndex, codes, compacted, plain, returned_memory
from prism.preference.pairs import (
    PAIR_COLUMNS,
    PromptGroup,
    PromptGroups,
    are_disjoint,
    check_disjoint,
    cut,
    dimensions_of,
    named,
    read_table,
)
from prism.preference.shards import (
    FIRST_SCHEMA,
    FLOATS,
    INDEX,
    NUMBERS,
    PAIRS,
    SCHEMA,
    check_pairs,
    check_seal,
    check_splits,
    indexed,
    key_digest,
    kinds_of,
    open_shard,
    present_pairs,
    read_meta,
    view,
)

OPEN_SHARDS = 16
"""Shards that are memory-mapped at once: what a store of any size holds of them, and within a system's open files."""
_WRITTEN = "that prism encode, prism collect or prism.preference.write_store wrote"


class LatentStore:
    """An opened store. Use ``LatentStore.open(folder)``, which checks everything that can be checked cheaply."""

    def __init__(
        self, folder: Path, meta: dict[str, Any], videos: pa.Table, pairs: pa.Table, seals: Mapping[Path, str],
        index: RowIndex | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.meta, self._seals = folder, meta, seals
        self._videos, self._pairs = compacted(videos), compacted(pairs)
        self._index = RowIndex(videos["video"]) if index is None else index
        self._shard_of, self._row_of = codes(videos["shard"]), videos["row"].to_numpy()
        self._shard_names = pc.unique(videos["shard"]).to_pylist()
        self._shards: OrderedDict[Path, Any] = OrderedDict()  # opened, the one used last at the end
        self._kinds: np.ndarray | None = None
        self._unread, self._whole_images = set(seals), set[Path]()

    def __repr__(self) -> str:
        return f"LatentStore({self.folder}: {len(self._videos)} videos, {len(self._pairs)} pairs)"

    @property
    def videos(self) -> pa.Table:
        """A row per video; made anew each time, as the store itself keeps texts that recur once."""
        return plain(self._videos)

    @property
    def pairs(self) -> pa.Table:
        """The table of labelled pairs; see ``prism.preference.pairs``. Made anew each time."""
        return plain(self._pairs)

    @pairs.setter
    def pairs(self, pairs: pa.Table) -> None:
        self._pairs = compacted(pairs)

    @classmethod
    @returned_memory()
    def open(cls, folder: str | os.PathLike[str]) -> LatentStore:
        """Open and check a store.

        Raises:
            PrismError: on a missing or damaged file, a video or pair that refers to nothing, unknown splits or labels,
                or splits that share a prompt or video.
        """
        instance("A store's folder", folder, str | os.PathLike, "a path")
        folder = Path(folder)
        if not os.path.isdir(folder):  # also of a name too long for the file system
            what = "is a file" if os.path.exists(folder) else "does not exist"
            raise PrismError(f"The store {named(folder)} {what}; name a folder {_WRITTEN}.")
        if not (folder / "store.json").exists():
            raise PrismError(
                f"The folder {named(folder)} is no store: its store.json does not exist. Name a folder {_WRITTEN}."
            )
        meta = read_meta(folder / "store.json")
        if meta.get("schema") == SCHEMA:
            videos, seals = indexed(folder, key_digest(meta.get("key") or {}), compact=True)
            index = RowIndex(videos["video"])
            pairs = present_pairs(folder, index)
            tables = []  # `indexed` has compared them with their SHA-256
        elif meta.get("schema") == FIRST_SCHEMA:
            tables = [folder / "videos.parquet", folder / PAIRS]
            videos = read_table(tables[0], ("video", "prompt", "split"), ("shard", "row"), ("seed",), compact=True)
            pairs, index = read_table(tables[1], PAIR_COLUMNS, compact=True), RowIndex(videos["video"])
            seals = {folder / name: seal for name, seal in (meta.get("sha256") or {}).items()}
        else:
            raise PrismError(
                f"The store {named(folder)} has schema {quoted(meta.get('schema'), 80)}; this version reads schema "
                f"{FIRST_SCHEMA} and {SCHEMA}."
            )
        store = cls(folder, meta, videos, pairs, seals, index)
        store._check_videos()
        pa.default_memory_pool().release_unused()
        check_pairs(store._pairs, store._videos, index, folder / PAIRS)
        for path in tables:
            store._check_seal(path)
        return store

    @classmethod
    def of(cls, store: LatentStore | str | os.PathLike[str]) -> LatentStore:
        """The store itself, or the one in a folder. Raises PrismError for anything else."""
        if isinstance(store, LatentStore):
            return store
        if not isinstance(store, str | os.PathLike):
            raise PrismError(f"A latent store or its folder is needed, found {type(store).__name__}; give one of them.")
        return cls.open(store)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that pairs are labelled in."""
        return dimensions_of(self._pairs)

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline arguments the videos were sampled with; scoring captures its conditioning with them too."""
        return dict(self.meta.get("call") or {})

    @property
    def has_trajectories(self) -> bool:
        return self._holds("states")

    @property
    def has_predicted(self) -> bool:
        """True if the store keeps the clean latents that the denoiser predicted at the recorded states."""
        return self._holds("predicted")

    def _holds(self, name: str) -> bool:
        if self._sharded:
            first = next(iter(self._shard_names), None)
            return first is not None and name in self._opened(self._path("latents", first)).keys()  # noqa: SIM118
        return name == "states" and self._path("trajectory", 0).exists()

    @property
    def _sharded(self) -> bool:
        return bool(self.meta["schema"] == SCHEMA)

    def call_of(self, video: str) -> dict[str, Any]:
        """The pipeline arguments of one video: the store's, updated with those that differ for it and its `image`."""
        different, image = self._of(video, "call") if self._sharded else None, self.image_of(video)
        call = {**self.call, **(json.loads(different) if different else {})}
        return call if image is None else {**call, "image": str(image)}

    def image_of(self, video: str) -> Path | None:
        """The file of a video's conditioning image, compared with its SHA-256 the first time; None: it has none."""
        name = self._of(video, "image") if self._sharded and "image" in self._videos.column_names else None
        path = None if name is None else images.path_of(self.folder, name)
        if path is not None and path not in self._whole_images:
            images.check(path)
            self._whole_images.add(path)
        return path

    def shape_of(self, video: str) -> tuple[int, ...]:
        """The shape of one video's latents."""
        if self._sharded:
            return tuple(map(int, str(self._of(video, "shape")).split("x")))
        return tuple(self._tensor(self._path("latents", self._placed(video)[0]), "latents", NUMBERS).get_shape()[1:])

    def kinds(self, ids: Iterable[str]) -> np.ndarray:
        """Numbers from 0 of the shape, call and image of videos; those of one number are conditioned alike.

        Returns:
            (ids,) int64. A store of the first schema has one shape and call, number 0.
        """
        if self._kinds is None:
            self._kinds = kinds_of(self._videos) if self._sharded else np.zeros(len(self._videos), np.int64)
        kinds: np.ndarray = self._kinds[[self._row(video) for video in ids]]
        return kinds

    def _of(self, video: str, column: str) -> Any:
        return self._videos[column][self._row(video)].as_py()

    def _row(self, video: str) -> int:
        """The row of a video in the table of videos."""
        if (row := self._index.get(video)) is None:
            raise PrismError(f"The store {self.folder} has no video {cut(video)}.")
        return row

    def _placed(self, video: str) -> tuple[Any, int]:
        """The shard of a video's latents, and their row in it."""
        row = self._row(video)
        return self._shard_names[self._shard_of[row]], int(self._row_of[row])

    def groups(self, split: str, dimensions: Sequence[str] | None = None) -> list[PromptGroup]:
        """The labelled pairs of a split by prompt."""
        return list(self.prompt_groups(split, dimensions))

    def prompt_groups(self, split: str, dimensions: Sequence[str] | None = None) -> PromptGroups:
        """The groups of `groups`, each made when it is asked for."""
        instance("The split", split, str, "a text")
        return PromptGroups(self._pairs, self.dimensions if dimensions is None else dimensions, split)

    def latents(self, ids: Iterable[str]) -> Tensor:
        """Latents of finished videos, normalised, in the layout of the sampling loop.

        Returns:
            (ids, ...) float32.
        """
        return self._read("latents", "latents", ids)

    def trajectory(self, ids: Iterable[str], index: int | None = None) -> tuple[Tensor, Tensor]:
        """Recorded states and their t; of one ``index``, or of all of them.

        Returns:
            states: (ids, S, ...) float32, or (ids, ...) float32 of one index.
            t: (ids, S) float32, or (ids,) float32 of one index.
        """
        if not self.has_trajectories:
            raise PrismError(f"The store {self.folder} holds no trajectories; write it again with recorded states.")
        ids, count = list(listed("The videos", ids)), self.num_states()
        if index is not None:
            index = whole(f"The index of a state in {named(self.folder)}", index, -count, count - 1) % count
        states, t = self._read("trajectory", "states", ids, index), self._read("trajectory", "t", ids, index)
        if not bool(((t >= 0) & (t <= 1000)).all()):
            raise PrismError(f"The t of recorded states in {self.folder} must lie in [0, 1000]; the file was altered.")
        return states, t

    def predicted(self, ids: Iterable[str], index: int) -> tuple[Tensor, Tensor]:
        """The clean latents that the denoiser predicted at one recorded state, and that state's t.

        Returns:
            predicted: (ids, ...) float32.
            t: (ids,) float32.
        """
        if not self.has_predicted:
            raise PrismError(f"The store {self.folder} holds no predicted latents; write it again with them recorded.")
        ids, count = list(listed("The videos", ids)), self.num_states()
        index = whole(f"The index of a state in {named(self.folder)}", index, -count, count - 1) % count
        return self._read("trajectory", "predicted", ids, index), self._read("trajectory", "t", ids, index)

    def num_states(self) -> int:
        """S, the number of recorded states per video; 0 without trajectories."""
        if not (self.has_trajectories or self.has_predicted):
            return 0
        shard = self._shard_names[0] if self._sharded else 0
        return int(self._tensor(self._path("trajectory", shard), "t").get_shape()[1])

    def _read(self, kind: str, name: str, ids: Iterable[str], index: int | None = None) -> Tensor:
        rows = []
        for video in listed("The videos", ids):
            shard, row = self._placed(video)
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
            if not value.numel():
                raise PrismError(f"The video {cut(video)} in {self.folder} has no recorded state {index}.")
            rows.append(value[0] if index is None else value[0, 0])
        if not rows:
            raise PrismError(f"No videos were asked for in the store {self.folder}.")
        if len({row.shape for row in rows}) > 1:
            raise PrismError(
                f"The {name} that were asked for in {self.folder} have several shapes; ask for videos of one shape "
                "(LatentStore.shape_of)."
            )
        return torch.stack(rows)

    def _scale(self, path: Path) -> Tensor:
        scale: Tensor = self._tensor(path, "scale")[:].float()
        if not bool((scale >= 0).all()) or not bool(torch.isfinite(scale).all()):
            raise PrismError(
                f"The tensor scale in {named(path)} must hold finite numbers from 0; the file was altered."
            )
        return scale

    def _path(self, kind: str, shard: Any) -> Path:
        if self._sharded:
            return self.folder / "shards" / f"{shard}.safetensors"
        return self.folder / f"{kind}-{shard:05d}.safetensors"

    def _tensor(self, path: Path, name: str, kinds: Sequence[str] = FLOATS) -> Any:
        return view(self._opened(path), path, name, kinds)

    def _opened(self, path: Path) -> Any:
        if path not in self._shards:
            self._shards[path] = open_shard(path)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(path)
        return self._shards[path]

    def _check_seal(self, path: Path) -> None:
        """Compare a file with its checksum, the first time it is read; stores of earlier versions have none."""
        if path not in self._unread:
            return
        check_seal(path, self._seals[path], INDEX if self._sharded else "store.json")
        self._unread.discard(path)

    def _check_videos(self) -> None:
        table = self.folder / (INDEX if self._sharded else "videos.parquet")
        twice = self._index.twice()
        if twice is not None:
            raise PrismError(f"The video {cut(twice)} is in {table} twice.")
        check_splits(pc.unique(self._videos["split"]).to_pylist(), table)
        if not are_disjoint(self._videos):  # videos without pairs leak as well
            as_pairs = [self.videos[name] for name in ("prompt", "video", "video", "split")]
            check_disjoint(pa.table(as_pairs, names=list(PAIR_COLUMNS)))
        if self._sharded:  # shapes were checked when shards were written; a file is compared with its SHA-256 when read
            return
        rows_of = ((shard, self._row_of[self._shard_of == number]) for number, shard in enumerate(self._shard_names))
        needed = {shard: int(rows.max()) + 1 for shard, rows in rows_of}
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
        """Check that a tensor has at least `needed` rows, and the same shape per row as in the other shards."""
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
            scale, expected = self._tensor(path, "scale").get_shape(), [1, *shape]
            if list(scale) != expected:
                raise PrismError(
                    f"The tensor scale in {named(path)} must have the shape ({_listed(expected)}), found "
                    f"({_listed(scale)})."
                )


def store_identity(store: LatentStore) -> dict[str, Any]:
    """The identity of a store, the same in whatever folder it lies."""
    every = ("store.json", "videos.parquet", INDEX, PAIRS)  # of either schema
    names = (name for name in every if (store.folder / name).is_file())
    return {"name": store.folder.name, **{name: files.sha256(store.folder / name)[:16] for name in names}}


def _listed(shape: Sequence[int]) -> str:
    return quoted(", ".join(map(str, shape)), 60)
