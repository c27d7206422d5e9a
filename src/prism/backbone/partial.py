"""A denoiser's first blocks alone, for a judge that stands by itself: later blocks are neither read nor allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from prism.backbone.families import family_named, is_denoiser
from prism.backbone.family import Family
from prism.errors import PrismError
from prism.files import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_pipeline(
    folder: Path, up_to: int, reads: str | None, kwargs: dict[str, Any]
) -> tuple[DiffusionPipeline, str, int]:
    """The pipeline in `folder` with the first `up_to` blocks of the denoiser that is read: it, its name, its number of
    blocks when whole. Of another denoiser one block is loaded.
    """
    index = read_json(folder / "model_index.json")
    family = family_named(index.get("_class_name", ""))
    names = [name for name in index if is_denoiser(name) and index[name][0] is not None]
    read = reads or names[0]
    if read not in names:
        raise PrismError(f"The pipeline in {folder} has no denoiser {read!r}; it has {', '.join(names)}.")
    dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
    loaded = {name: load_denoiser(folder, name, family, up_to if name == read else 1, dtype) for name in names}
    models = {name: model for name, (model, _) in loaded.items()}
    kind = getattr(diffusers, index["_class_name"])  # which knows, unlike its base class, that these are components
    return kind.from_pretrained(str(folder), **kwargs, **models), read, loaded[read][1]


def load_denoiser(folder: Path, name: str, family: Family, up_to: int, dtype: torch.dtype | None) -> tuple[Any, int]:
    """The denoiser in `folder/name` with its first `up_to` blocks, and how many it has.

    Only the shards that hold what is wanted are opened, so that others may be absent.

    Raises:
        PrismError: for a tap beyond the model, or where a file or a tensor is missing.
    """
    place = folder / name
    kind = getattr(diffusers, str(read_json(folder / "model_index.json")[name][1]))
    with init_empty_weights():
        model = kind.from_config(kind.load_config(str(place)))
    total = len(family.block_list(model))
    if not 1 <= up_to <= total:
        raise PrismError(f"The tap must lie in 1 to {total}, the denoiser's number of blocks; found {up_to}.")
    left = up_to
    for path in family.blocks:
        part = model.get_submodule(path)
        if not isinstance(part, nn.ModuleList):
            raise PrismError(f"Of {kind.__name__} no first blocks can be loaded alone; load the whole pipeline.")
        kept = min(left, len(part))
        del part[kept:]
        left -= kept
    model.load_state_dict(_tensors(place, list(model.state_dict()), dtype), assign=True)
    return model.eval(), total


def _tensors(place: Path, names: list[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """These tensors by name, from one file or from the shards that hold them."""
    index = place / f"{WEIGHTS}.index.json"
    where = read_json(index)["weight_map"] if index.is_file() else dict.fromkeys(names, WEIGHTS)
    found: dict[str, torch.Tensor] = {}
    for shard in sorted({where[name] for name in names if name in where}):
        path = place / shard
        if not path.is_file():
            raise PrismError(f"The file {path} is missing; it holds blocks that the head reads.")
        with safe_open(str(path), framework="pt") as opened:
            held = set(opened.keys())
            for name in names:
                if where.get(name) == shard and name in held:
                    found[name] = opened.get_tensor(name)
    missing = [name for name in names if name not in found]
    if missing:
        raise PrismError(f"The weights in {place} lack {missing[0]!r}; the download may not be complete.")
    cast = {name: value.to(dtype) if dtype and value.is_floating_point() else value for name, value in found.items()}
    return cast
