"""The files of latent caches: FastVideo's rows and musubi-tuner's safetensors, each number checked.

Sources: FastVideo 2f3d407 (`dataset/dataloader/schema.py`, `record_schema.py`), musubi-tuner 30c658c
(`dataset/cache_io.py`, `image_video_dataset.py`, `*_cache_latents.py`). Nothing is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from prism import files
from prism.errors import PrismError, quoted, reason
from prism.preference.pairs import named

ARCHITECTURES = {
    "wan": ("AutoencoderKLWan", True),
    "hunyuan_video": ("AutoencoderKLHunyuanVideo", False),
    "hunyuan_video_1_5": ("AutoencoderKLHunyuanVideo15", False),
    "kandinsky5": ("AutoencoderKLHunyuanVideo", True),
}
"""musubi-tuner's architectures: the class of their VAE, and True where the file holds latents on the scale of the
sampling loop, False where it holds the VAE's own, which its training scales."""
LATENT, TRAJECTORY, TIMES = "vae_latent", "trajectory_latents", "trajectory_timesteps"
PARTS = ("bytes", "shape", "dtype")
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
}
_KEY = re.compile(r"latents_(\d{1,6})x(\d{1,6})x(\d{1,6})_[a-z0-9_]+")
# STEM_00000-025_0832x0480_ARCH, with -00 of a section behind 025, or STEM_0832x0480_ARCH of a picture
_NAME = re.compile(
    r"(?P<stem>.+?)(_(?P<start>\d{5,9})-(?P<count>\d{3,9})(?P<section>-\d+)?)?_\d{4,9}x\d{4,9}_(?P<architecture>[^_]+)",
    re.DOTALL,
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Entry(NamedTuple):
    """The place of one latent: a file of the cache, and its row."""

    path: Path
    row: int = 0

    def __str__(self) -> str:
        return (
            f"{'row ' + str(self.row) + ' of ' if self.path.suffix == '.parquet' else ''}{quoted(str(self.path), 150)}"
        )


# -- FastVideo


def is_fastvideo(path: Path) -> bool:
    files.check_regular(path)
    try:
        columns = set(pq.read_schema(path).names)
    except Exception as error:
        raise PrismError(f"The file {named(path)} is not a whole Parquet file ({quoted(error, 150)}).") from error
    return any(columns >= {f"{name}_{part}" for part in PARTS} for name in (LATENT, TRAJECTORY))


def rows(tables: list[Path]) -> Iterator[tuple[str, Entry]]:
    """The clips' names in FastVideo's tables: file_name, else id."""
    for path in tables:
        try:
            with pq.ParquetFile(path) as table:
                column = next((name for name in ("file_name", "id") if name in table.schema_arrow.names), None)
                names = table.read(columns=[column])[column].to_pylist() if column else []
        except Exception as error:
            raise PrismError(f"The file {named(path)} cannot be read ({reason(error, 150)}).") from error
        for row, name in enumerate(names):
            if isinstance(name, str) and name.strip():
                yield name.replace("\\", "/"), Entry(path, row)


def batches(path: Path, parts: tuple[str, ...]) -> Iterator[Any]:
    with pq.ParquetFile(path) as table:
        columns = [f"{name}_{part}" for name in (LATENT, TRAJECTORY, TIMES) for part in parts]
        present = [column for column in columns if column in table.schema_arrow.names]
        yield from table.iter_batches(batch_size=1024 if parts == ("shape",) else 1, columns=present)


def array(cells: Mapping[str, Any], name: str, entry: Entry, axes: int) -> Tensor | None:
    """The numbers in a row's cells NAME_bytes, NAME_shape and NAME_dtype, float32; None if there are none.

    A batch axis of one in front is taken away.

    Returns:
        (...) float32, of so many axes.
    """
    data, shape, kind = (cells.get(f"{name}_{part}") for part in PARTS)
    if not data:
        return None
    dtype = _DTYPES.get(str(kind).removeprefix("torch."))
    if dtype is None:
        raise PrismError(f"The {name}_dtype in {entry} must be one of {', '.join(_DTYPES)}; found {quoted(kind, 60)}.")
    if not isinstance(data, bytes):
        raise PrismError(f"The {name}_bytes in {entry} must hold bytes; found {quoted(data, 60)}.")
    sizes = list(shape) if isinstance(shape, list) else []
    valid = bool(sizes) and all(isinstance(size, int) and size > 0 for size in sizes)
    if not valid or math.prod(sizes) * dtype.itemsize != len(data):
        raise PrismError(
            f"The {name}_shape in {entry} is {quoted(shape, 80)}, of {kind}, and {name}_bytes holds {len(data):,} "
            "bytes; they do not fit each other."
        )
    numbers = torch.frombuffer(bytearray(data), dtype=dtype).view(sizes).float()
    if numbers.ndim == axes + 1 and len(numbers) == 1:
        numbers = numbers[0]
    if numbers.ndim != axes:
        raise PrismError(f"The {name}_shape in {entry} must have {axes} axes; found {quoted(shape, 80)}.")
    return numbers


def levels(times: Tensor | None, count: int, entry: Entry) -> Tensor:
    """The noise levels of a trajectory, checked to fall and to be as many as its states.

    Args:
        times: (count,) float32 in [0, 1000].
        count: states of the trajectory.
        entry: where they stand, for the message.

    Returns:
        (count,) float32, `times`.
    """
    if times is None or len(times) != count:
        have = "none" if times is None else len(times)
        raise PrismError(f"The trajectory in {entry} has {count} states and {have} timesteps; one a state is needed.")
    if not bool(((times >= 0) & (times <= 1000)).all()) or not bool((times.diff() < 0).all()):
        raise PrismError(
            f"The {TIMES} in {entry} must fall, from at most 1000 to at least 0; found {times[:4].tolist()}."
        )
    return times


# -- musubi-tuner


def architecture_of(tensors: list[Path]) -> str | None:
    """The architecture that files of musubi-tuner state, by the first one that holds latents; None if none does."""
    for path in tensors:
        if any(_KEY.fullmatch(key) for key in files.safetensors_header(path)):
            architecture = metadata(path).get("architecture")
            if architecture in ARCHITECTURES:
                return architecture
            sections = "; its files are sections of a clip" if architecture == "framepack" else ""
            raise PrismError(
                f"The file {named(path)} holds latents of {quoted(architecture, 60)}{sections}; caches of musubi-tuner "
                f"are read for {', '.join(ARCHITECTURES)}. Encode the clips."
            )
    return None


def metadata(path: Path) -> dict[str, str]:
    with files.safetensors_told(path), safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def clips(tensors: list[Path]) -> Iterator[tuple[str, Entry]]:
    """The clips' names in the names of musubi-tuner's files; the size there is that of the clip's file."""
    for path in tensors:
        match = _NAME.fullmatch(path.stem)
        if match and not match["section"]:
            yield match["stem"], Entry(path)


def latent_key(path: Path) -> str:
    """The key of the latents in a file of musubi-tuner, among those of images, controls and masks."""
    keys = [key for key in files.safetensors_header(path) if _KEY.fullmatch(key)]
    if len(keys) != 1:
        raise PrismError(f"The file {named(path)} holds {len(keys)} tensors latents_FxHxW_DTYPE; one is needed.")
    return keys[0]


def tensor(path: Path, architecture: str) -> Tensor:
    """The latents in a file of musubi-tuner of that architecture.

    Returns:
        (C, F, H, W) float32.
    """
    stated = metadata(path).get("architecture")
    if stated != architecture:
        raise PrismError(
            f"The file {named(path)} states the architecture {quoted(stated, 60)}, and others {architecture}; give a "
            "folder of one."
        )
    key = latent_key(path)
    with files.safetensors_told(path), safe_open(path, framework="pt") as opened:
        latent: Tensor = opened.get_tensor(key)
    sizes = tuple(int(size) for size in key.split("_")[1].split("x"))
    if latent.ndim != 4 or tuple(latent.shape[1:]) != sizes or latent.dtype not in FLOATS:
        raise PrismError(
            f"The tensor {quoted(key, 80)} in {named(path)} is {tuple(latent.shape)} of {latent.dtype}; (channels, "
            "frames, height, width) as in its name, of float32, float16 or bfloat16, is needed."
        )
    return latent.float()


# -- both


def checked(latent: Tensor | None, entry: Entry) -> Tensor:
    """Latents, refused where they hold what float16 cannot, or zeros that stand for NaN.

    Args:
        latent: (..., C, F, H, W) float32.
        entry: where they stand, for the message.

    Returns:
        (..., C, F, H, W) float32, `latent`.
    """
    assert latent is not None
    if not bool(latent.half().isfinite().all()):
        raise PrismError(
            f"The latent in {entry} holds NaN, infinity, or numbers beyond float16; encode the clip again."
        )
    frames, channels = latent.abs().amax((-4, -2, -1)), latent.abs().amax((-3, -2, -1))
    if not bool(frames.all()) or not bool(channels.all()):
        raise PrismError(
            f"The latent in {entry} is zero in all of a frame or channel, which stands for NaN where musubi-tuner "
            "wrote it; encode the clip again."
        )
    return latent
