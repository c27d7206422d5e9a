"""Denoisers that give several tensors, such as a sound beside the video: recorded, answered and cut as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone.conditioning import by_name, has_rows
from prism.backbone.family import Family, noisy_of
from prism.backbone.protocol import tensor_of
from prism.checks import quoted
from prism.errors import PrismError
from prism.memory import ran_out


def check_form(denoiser: nn.Module, output: Any, family: Family) -> None:
    """Raise PrismError where the denoiser gives a tensor and its family says otherwise: a recording would answer in
    the other form, of which a pipeline may take the first row for the whole."""
    if family.outputs == 1 and isinstance(output, Tensor) != family.gives_tensor:
        raise PrismError(
            f"{type(denoiser).__name__} gives {'a plain tensor' if isinstance(output, Tensor) else 'no plain tensor'}; "
            f"say gives_tensor={isinstance(output, Tensor)} in the family {family.name!r}."
        )


@contextmanager
def rows_told(arguments: Mapping[str, Any], family: Family, whole: bool) -> Iterator[None]:
    """Where a denoiser breaks at some rows of its call, name the `arguments` that have as many and were left whole."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        batch = len(noisy_of(arguments, family))
        tensors = {name: v for name, v in arguments.items() if isinstance(v, Tensor) and v.ndim and len(v) == batch}
        left = [name for name, value in tensors.items() if not has_rows(name, value, batch, family)]
        if whole or batch == 1 or not left or ran_out(error):
            raise
        raise PrismError(
            f"The denoiser does not take some of its {batch} rows ({quoted(error, 120)}); it may have a row per sample "
            f"in {', '.join(left[:6])}: name these in batched of the family {family.name!r}, or say alone."
        ) from error


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
