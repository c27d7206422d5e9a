"""Caches of latents that trainers wrote: FastVideo's Parquet and musubi-tuner's safetensors files, read as they are.

Sources of what they hold: FastVideo 2f3d407 (`pipelines/preprocess`, `pipelines/stages/denoising.py`,
`training/training_utils.py`), musubi-tuner 30c658c (`*_cache_latents.py`, `hv_train_network.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prism import files
from prism.errors import PrismError, quoted, reason
from prism.preference import cache_files
from prism.preference.cache_files import LATENT, PARTS, TIMES, TRAJECTORY, Entry
from prism.preference.pairs import named
from prism.preference.sources import PICKLES

FASTVIDEO, MUSUBI = "fastvideo", "musubi-tuner"
RAW_VAES = ("AutoencoderKLWan", "AutoencoderKLHunyuanVideo")
"""VAEs of which FastVideo is known to keep the mean as it is, and to scale it when it trains."""


class Cached(NamedTuple):
    """One clip's latents, float32, channels first.

    latent: (C, F, H, W), of the VAE or of the loop (`in_loop`). states: (S, C, F, H, W) on the scale of the loop, in
    the order in which they were sampled, and t: (S,) their noise levels in [0, 1000]; None without a trajectory.
    """

    latent: Tensor
    in_loop: bool
    states: Tensor | None = None
    t: Tensor | None = None


@dataclass
class LatentCache:
    """An opened cache. Use `LatentCache.open(folder)`."""

    folder: Path
    kind: str
    """FASTVIDEO or MUSUBI, told by the columns of Parquet files or the keys of safetensors files."""
    architecture: str | None
    """musubi-tuner's name of the model, which all its files must state."""
    digest: str
    """SHA-256 of the files' names, sizes, and first and last 64 KiB."""
    entries: Mapping[str, list[Entry]] = field(repr=False)
    """Latents by the name of their clip."""
    _open: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> LatentCache:
        """Open a cache: a folder, with folders in it.

        Raises:
            PrismError: for a folder without latents of either form, or with both; a folder of pickles; files of
                musubi-tuner that are no whole clips (FramePack's sections), or of an unknown or several architectures.
        """
        top = Path(folder)
        if not top.is_dir():
            raise PrismError(f"The --latents {named(top)} is no folder; give the folder of a cache of latents.")
        paths = sorted(Path(root) / name for root, _, names in os.walk(top) for name in names)
        tables = [path for path in paths if path.suffix == ".parquet" and cache_files.is_fastvideo(path)]
        tensors = [path for path in paths if path.suffix == ".safetensors" and not path.stem.endswith("_te")]
        architecture = cache_files.architecture_of(tensors)
        if tables and architecture:
            raise PrismError(
                f"The folder {named(top)} holds latents of two forms, in {quoted(tables[0].name, 80)} and "
                f"{quoted(tensors[0].name, 80)}; give the folder of one."
            )
        if not tables and not architecture:
            raise PrismError(_no_cache(top, paths))
        entries: dict[str, list[Entry]] = {}
        for name, entry in cache_files.rows(tables) if tables else cache_files.clips(tensors):
            entries.setdefault(name, []).append(entry)
        kind, used = (FASTVIDEO, tables) if tables else (MUSUBI, tensors)
        return cls(top, kind, architecture, _digest(top, used), entries)

    def find(self, path: str) -> list[Entry]:
        """The latents of a clip, by the name of its file: with its folders, without its ending, or the name alone, as
        FastVideo has it up to the first dot."""
        plain = path.replace("\\", "/")
        base = plain.rsplit("/", 1)[-1]
        names = [plain, os.path.splitext(plain)[0], base, os.path.splitext(base)[0]]
        names += [base.split(".")[0]] if self.kind == FASTVIDEO else []
        return next((self.entries[name] for name in names if self.entries.get(name)), [])

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape (C, F, H, W) of a latent, which is not read, as the file states it."""
        if self.kind == MUSUBI:
            return files.safetensors_header(entry.path)[cache_files.latent_key(entry.path)][1]
        cells = self._cells(entry, ("shape",))
        shapes = [cells.get(f"{name}_shape") for name in (LATENT, TRAJECTORY)]
        return next((tuple(shape[-4:]) for shape in shapes if isinstance(shape, list) and shape), ())

    def in_loop(self, vae: str, normalised_by_mean: bool, factor: str) -> bool:
        """True if the latents are on the scale of the sampling loop, False if on that of the VAE.

        Args:
            vae: the class of the pipeline's VAE.
            normalised_by_mean: the pipeline normalises by the VAE's latents_mean and latents_std.
            factor: the field of the VAE's configuration that the pipeline multiplies latents by, or "" for none.

        Raises:
            PrismError: where it is not known of this cache and this VAE.
        """
        if self.kind == FASTVIDEO:
            if vae in RAW_VAES:
                return False
            raise PrismError(
                f"The cache {named(self.folder)} is FastVideo's, which does not say how its latents are scaled; that "
                f"is known for {' and '.join(RAW_VAES)}, and the pipeline has {quoted(vae, 60)}. Encode the clips."
            )
        needed, scaled = cache_files.ARCHITECTURES[str(self.architecture)]
        expected = "scaling_factor" if self.architecture == "kandinsky5" else ""
        if vae != needed or (scaled and (factor != expected or normalised_by_mean == bool(expected))):
            raise PrismError(
                f"The cache {named(self.folder)} holds musubi-tuner's latents of {self.architecture}, made by "
                f"{needed}; the pipeline has {quoted(vae, 60)} or scales its latents otherwise. Give the pipeline that "
                "they were made for with --backbone."
            )
        return scaled

    def read(self, entry: Entry, in_loop: bool) -> Cached:
        """One clip's latents; `in_loop` as from the method of this name.

        Raises:
            PrismError: for a damaged entry; numbers that are NaN, infinite, or all zero in a frame or channel
                (musubi-tuner writes zeros for NaN); a shape or dtype that the entry contradicts; noise levels that do
                not fall from at most 1000.
        """
        if self.kind == MUSUBI:
            return Cached(cache_files.checked(cache_files.tensor(entry.path, str(self.architecture)), entry), in_loop)
        cells = self._cells(entry, PARTS)
        latent = cache_files.array(cells, LATENT, entry, 4)
        states, times = cache_files.array(cells, TRAJECTORY, entry, 5), cache_files.array(cells, TIMES, entry, 1)
        if latent is None and states is None:
            raise PrismError(f"There is no latent in {entry}; its {LATENT}_bytes are empty.")
        if states is None:
            return Cached(cache_files.checked(latent, entry), in_loop)
        if latent is not None:
            raise PrismError(
                f"There is a latent and a trajectory in {entry}, which may be two videos, and labels are about one; "
                f"empty the column {LATENT}_bytes or {TRAJECTORY}_bytes."
            )
        kept = cache_files.checked(states, entry)
        t = cache_files.levels(times, len(kept), entry)
        # FastVideo appends what a step returns, with the timestep that it began at: a state's own level is the next.
        return Cached(kept[-1], True, kept[:-1], t[1:]) if len(kept) > 1 else Cached(kept[-1], True)

    def _cells(self, entry: Entry, parts: tuple[str, ...]) -> dict[str, Any]:
        """A row's cells; rows that follow each other are read in one pass, few of them in memory."""
        path, row, opened = entry.path, entry.row, self._open
        try:
            if opened is None or opened[:2] != (path, parts) or row < opened[2]:
                opened = (path, parts, 0, None, cache_files.batches(path, parts))
            _, _, start, batch, batches = opened
            while batch is None or row >= start + len(batch):
                start, batch = start + (0 if batch is None else len(batch)), next(batches)
            self._open = (path, parts, start, batch, batches)
            return dict(batch.slice(row - start, 1).to_pylist()[0])
        except Exception as error:  # pyarrow's of a damaged file; StopIteration of one that has become shorter
            self._open = None
            raise PrismError(f"The latent in {entry} cannot be read ({reason(error, 120)}).") from error


def _digest(top: Path, paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        size, content = files.ends(path)
        whole.update(f"{path.relative_to(top).as_posix()}\0{size}\0".encode(errors="surrogateescape") + content)
    return whole.hexdigest()[:16]


def _no_cache(top: Path, paths: list[Path]) -> str:
    pickles = [path for path in paths if path.suffix.lower() in PICKLES]
    if pickles:
        return (
            f"The cache {named(top)} holds {quoted(pickles[0].name, 80)}, which may be a pickle; a pickle could run "
            "code and is never loaded. Write the cache with FastVideo or musubi-tuner, or leave --latents out."
        )
    endings = ", ".join(ending or "no ending" for ending, _ in Counter(path.suffix for path in paths).most_common(4))
    return (
        f"The folder {named(top)} is no cache of latents: no Parquet file has FastVideo's columns {LATENT}_bytes, "
        f"_shape and _dtype, and no safetensors file musubi-tuner's key latents_FxHxW_DTYPE; it has files of "
        f"{endings or 'no kind'}."
    )
