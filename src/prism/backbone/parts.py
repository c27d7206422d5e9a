"""A pipeline's parts, read alike whatever they are wrapped in: configuration, dtype, device, output tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prism.errors import PrismError

if TYPE_CHECKING:
    pass


def unwrapped(part: Any) -> Any:
    """The model inside whatever compiles (torch), adapts (peft), shards, replicates or quantises it as a whole."""
    while (inner := _inside(part)) is not None:
        part = inner
    return part


def _inside(part: Any) -> Any:
    held = getattr(part, "__dict__", {})
    children = held.get("_modules", {})
    if "base_model" in children and hasattr(part, "get_base_model"):  # of peft
        return part.get_base_model()
    if list(children) == ["module"]:  # DistributedDataParallel, DataParallel, DeepSpeed
        return children["module"]
    names = ("_orig_mod", "_fsdp_wrapped_module", "_wrapped")  # torch.compile, FSDP, optimum-quanto
    return next((held.get(name, children.get(name)) for name in names if name in held or name in children), None)


def config_of(part: Any) -> Mapping[str, Any]:
    """What a part says of its configuration: a mapping as in diffusers, an object with fields, or nothing."""
    config = getattr(unwrapped(part), "config", None)
    if config is None or isinstance(config, Mapping):
        return config or {}
    fields: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return fields


def dtype_of(part: Any) -> torch.dtype:
    """Of a module: as it says itself, else its first parameter's."""
    found = getattr(part, "dtype", None)
    return found if isinstance(found, torch.dtype) else _first_parameter(part).dtype


def device_of(pipe: Any, denoiser: nn.Module) -> torch.device:
    """Where the pipeline runs: as it says itself, else where its denoiser lies."""
    found = getattr(pipe, "_execution_device", None)
    return _first_parameter(denoiser).device if found is None else found


def tensor_of(output: Any, name: str = "sample") -> Tensor:
    """The tensor that a part gives: itself, first in a tuple or list, or under `name`. Else a PrismError."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    tensor = output if isinstance(output, Tensor) else getattr(output, name, None)
    if not isinstance(tensor, Tensor):
        raise PrismError(f"A {type(output).__name__} was given where a tensor, or an output with .{name}, is needed.")
    return tensor


def _first_parameter(part: Any) -> Tensor:
    parameters = part.parameters() if isinstance(part, nn.Module) else ()
    return next(iter(parameters), torch.empty(0))


def is_denoiser(name: str) -> bool:
    """Whether a pipeline's component of this name is a denoiser: transformer, transformer_2, unet."""
    return name.split("_")[0] in ("transformer", "unet")
