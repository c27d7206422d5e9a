"""Denoisers that give several tensors, such as a sound beside the video: recorded, answered and cut as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone.conditioning import by_name
from prism.backbone.family import Family, noisy_of
from prism.backbone.protocol import tensor_of
from prism.errors import PrismError

# By the denoiser's class, the shape of a row of its latents and the width of the packed row: how it is unpacked.
_forms: dict[tuple[Any, ...], Callable[[Tensor], Any]] = {}


def packing(wrapper: Callable[..., Any], denoiser: nn.Module, family: Family) -> Callable[..., Any]:
    """`wrapper(forward, ...)`, around a denoiser's call, that sees its outputs side by side in one tensor (B, N).

    Its caller gets them as the denoiser gives them, whether they were computed or come from a recording.
    """
    if family.outputs == 1:
        return wrapper

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = (type(denoiser).__name__, noisy_of(by_name(denoiser, args, kwargs), family).shape[1:])

        def pack(*args: Any, **kwargs: Any) -> Tensor:
            output = forward(*args, **kwargs)
            parts = list(output.values() if isinstance(output, Mapping) else output)[: family.outputs]
            if len(parts) < family.outputs or not all(isinstance(part, Tensor) for part in parts):
                raise PrismError(f"The denoiser gives {len(parts)} tensors; say in the family how many (outputs).")
            packed = torch.cat([part.flatten(1) for part in parts], 1)
            _forms[key, packed.shape[1]] = _unpacking(output, parts)
            return packed

        packed = tensor_of(wrapper(pack, *args, **kwargs))
        return _forms[key, packed.shape[1]](packed)

    return call


def _unpacking(output: Any, parts: list[Tensor]) -> Callable[[Tensor], Any]:
    """From a packed tensor to what the denoiser gave, in the same form with other rows."""
    form, names = type(output), list(output) if isinstance(output, Mapping) else []
    told = [(part.shape[1:], part.dtype) for part in parts]

    def unpack(packed: Tensor) -> Any:
        rows = packed.split([shape.numel() for shape, _ in told], 1)
        found = [row.unflatten(1, shape).to(dtype) for row, (shape, dtype) in zip(rows, told)]
        return form(**dict(zip(names, found))) if names else tuple(found)

    return unpack
