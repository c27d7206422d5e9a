"""Weights of teachers: read from a folder or a repository of the Hub, adapters merged; nothing is unpickled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prism import files
from prism.errors import PrismError, quoted
from prism.judge import hub

FETCHED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")  # of a repository; pickles stay there
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONVERT = 'convert it once as docs/teachers.md shows under "Weights that are pickles"'


def folder(source: str, revision: str | None = None, patterns: Sequence[str] = FETCHED) -> Path:
    """The folder `source`, or the snapshot of the Hub's repository of that name.

    Raises PrismError where there is neither, or where a folder is given with a revision.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise PrismError(f"{files.shown(path)} is on this machine and has no revision {quoted(revision, 60)}.")
        if not path.is_dir():
            raise PrismError(f"{files.shown(path)} is a file; name the folder that holds configuration and weights.")
        return path
    if not hub.REPOSITORY.fullmatch(source):
        raise PrismError(f"There is no folder {quoted(source, 120)}; name a folder or a repository user/name.")
    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the Hub's client raises many kinds
        raise PrismError(
            f"There is no folder {source}, and no model of this name came from the Hub: {hub.why(error, revision)}."
        ) from error


def base(source: str, patterns: Sequence[str] = FETCHED) -> Path:
    """The folder of the model that a teacher was made from, as from `folder`."""
    try:
        return folder(source, patterns=patterns)
    except PrismError as error:
        raise PrismError(f"Its base model is missing, which base=FOLDER names: {error}") from error


def config(path: Path, types: Sequence[str]) -> Any:
    """The transformers configuration in a folder.

    Raises PrismError where it cannot be read, or its model_type is none of `types`.
    """
    from transformers import AutoConfig

    try:
        read = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise PrismError(
            f"The model in {files.shown(path)} has no readable config.json: {quoted(error, 120)}."
        ) from error
    if read.model_type not in types:
        raise PrismError(
            f"The model in {files.shown(path)} is a {quoted(read.model_type, 60)}; {' or '.join(types)} is needed."
        )
    return read


def tensors(path: Path, names: Sequence[str] = ("model.safetensors",)) -> dict[str, Tensor] | None:
    """The tensors by name in the first of these files that a folder has, or in the shards of its index; None without
    any.

    Raises PrismError where the file is damaged, or there is a pickle of that name instead.
    """
    for name in names:
        if (path / name).is_file():
            return files.load_safetensors(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            listed = files.read_json(index)
            listed = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(listed, dict) or not all(isinstance(part, str) for part in listed.values()):
                raise PrismError(f"The file {index} has no weight_map of names of files; download it again.")
            shards = sorted({Path(part).name for part in listed.values()})
            return {key: value for shard in shards for key, value in files.load_safetensors(path / shard).items()}
    for name in names:
        for suffix in PICKLES:
            if (pickle := (path / name).with_suffix(suffix)).exists():
                raise PrismError(f"The file {files.shown(pickle)} is a pickle, which is never opened; {CONVERT}.")
    return None


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model that was wrapped by peft, under the names of the plain model."""
    return {re.sub(r"^base_model\.model\.|\.base_layer(?=\.)|\.default(?=\.)", "", name): state[name] for name in state}


def merged(state: Mapping[str, Tensor], rank: int, alpha: float, rslora: bool, where: Path) -> dict[str, Tensor]:
    """A state with the LoRA pairs (A, B) merged into their weights: W + alpha / rank B A (Hu et al. 2021), or
    alpha / sqrt(rank) with rsLoRA. Raises PrismError for a pair without a weight of its shape.

    where: the adapter's folder, for errors.
    """
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    result = {name: value for name, value in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if ".lora_" not in name:
            continue
        stem, _, part = name.rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise PrismError(f"The adapter in {files.shown(where)} has {quoted(name, 100)}; only linear LoRA is read.")
        if part == "B.weight":
            continue
        up, weight = state.get(f"{stem}.lora_B.weight"), result.get(f"{stem}.weight")
        if up is None or weight is None or (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise PrismError(
                f"The adapter in {files.shown(where)} does not fit its base model: {quoted(stem, 100)} has no weight "
                "of its shape; name the base that it was trained on with base=."
            )
        result[f"{stem}.weight"] = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
    return result


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters take no memory until `fill` sets them; its computed buffers exist."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def fill(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, device: str, where: Path) -> Any:
    """Load a state into a model, which may be on the meta device; return it for inference, in `dtype` on `device`.

    Raises PrismError where names or shapes differ. where: the weights' folder, for errors.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted({*shapes, *state}):
        expected, actual = shapes.get(name), tuple(state[name].shape) if name in state else None
        if expected != actual:
            raise PrismError(
                f"The weights in {files.shown(where)} are not of this teacher: {quoted(name, 100)} is "
                f"{actual or 'missing'}, and {expected or 'nothing'} is needed."
            )
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(cast, assign=True)
    return model.requires_grad_(False).eval().to(device)


def chosen(device: str | None, dtype: str | torch.dtype | None) -> tuple[str, torch.dtype]:
    """The device, by default a GPU where there is one, and the dtype, by default bfloat16 there and float32 on CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise PrismError(f"The device of a teacher must be such as cuda or cpu; found {quoted(device, 60)}.") from error
    if dtype is None:
        return device, torch.float32 if kind == "cpu" else torch.bfloat16
    value = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise PrismError(f"The dtype of a teacher must be float32, bfloat16 or float16; found {quoted(dtype, 60)}.")
    return device, value
