"""A ControlNet beside the denoiser: it runs just before it, on the same noisy latents and timestep.

Inside a stock call its outputs are arguments of the denoiser as any other, and all that is done here is to run no rows
but those that are needed. Where PRISM calls the denoiser by itself, the ControlNet's captured call is run with the same
latents and timestep, and its outputs are put in under the names that the family says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prism.backbone import noise as clocks
from prism.backbone.conditioning import Conditioning, with_tensors
from prism.backbone.denoiser_call import DenoiserCall, by_name
from prism.backbone.pipeline import check_whole
from prism.backbone.wrapping import around_module
from prism.errors import PrismError

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone


def controlnet(backbone: Backbone) -> nn.Module | None:
    """The pipeline's ControlNet, or None where its family has none."""
    return backbone.pipe.controlnet if backbone.family.control_arguments else None


def check_networks(backbone: Backbone) -> None:
    """Raise PrismError where a cache or a patch stands in a denoiser or the ControlNet: see `check_whole`."""
    net = controlnet(backbone)
    check_whole(backbone.denoisers if net is None else (*backbone.denoisers, net))


def call_of(backbone: Backbone, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DenoiserCall:
    """A call of the ControlNet, which is read by the denoiser's facts: it takes the same latents."""
    family = backbone.family
    names = (*family.latents_argument, "latents")
    batched = family.batched_arguments | {"latents"}
    own = replace(family, control_arguments=(), latents_argument=names, batched_arguments=batched)
    return DenoiserCall(by_name(net, args, kwargs), own, backbone.config)


class Heard:
    """The ControlNet's last call."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.call: DenoiserCall | None = None

    def conditioning(self, samples: int) -> Conditioning | None:
        """What the last call was given besides latents and timestep, its conditional rows; None without a call."""
        if self.call is None:
            return None
        return Conditioning.of(self.call, self.call.conditional(samples), type(self.backbone.pipe))


@contextmanager
def heard(backbone: Backbone) -> Iterator[Heard]:
    """While open, the ControlNet's last call is kept, where there is one."""
    net, last = controlnet(backbone), Heard(backbone)

    def keep(inner: Any, *args: Any, **kwargs: Any) -> Any:
        last.call = call_of(backbone, net, args, kwargs)  # type: ignore[arg-type]
        return inner(*args, **kwargs)

    with nullcontext() if net is None else around_module(net, keep):
        yield last


def arguments(backbone: Backbone, conditioning: Conditioning, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
    """The denoiser's arguments for latents (B, ...) at the model timestep (B,), a ControlNet's outputs among them.

    The caller holds the pipeline (`Backbone.held`).
    """
    length = clocks.length(backbone.pipe.scheduler)
    named = conditioning.call(noisy, timestep, length)
    net, names = controlnet(backbone), backbone.family.control_arguments
    if net is None:
        return named
    if conditioning.control is None:
        raise PrismError(
            f"This conditioning holds no call of {type(backbone.pipe).__name__}'s ControlNet; capture it anew with "
            "Backbone.condition."
        )
    check_whole((net,))
    output = net(**conditioning.control.call(noisy, timestep, length))
    values = output if isinstance(output, tuple) and len(output) == len(names) else (output,)
    if len(values) != len(names):
        raise PrismError(
            f"{type(net).__name__} gives {len(values)} outputs; control_arguments of the family "
            f"{backbone.family.name!r} names {', '.join(names)}."
        )
    return named | dict(zip(names, with_tensors(values, lambda value: value.to(conditioning.dtype))))


def gated(backbone: Backbone, samples: int, alive: Callable[[], Sequence[int]]) -> AbstractContextManager[None]:
    """While open, the ControlNet's calls run the rows of the samples that are alive; the others' outputs are zeros."""
    net = controlnet(backbone)
    if net is None:
        return nullcontext()

    def run(inner: Any, *args: Any, **kwargs: Any) -> Any:
        living = list(alive())
        if len(living) == samples:
            return inner(*args, **kwargs)
        call = call_of(backbone, net, args, kwargs)
        rows = torch.tensor([row + group * samples for group in range(call.batch // samples) for row in living])

        def whole(value: Tensor) -> Tensor:
            zeros = value.new_zeros((call.batch, len(value) // len(rows), *value.shape[1:]))
            return zeros.index_copy_(0, rows.to(value.device), value.unflatten(0, (len(rows), -1))).flatten(0, 1)

        return with_tensors(inner(**call.rows(rows).arguments), whole)

    return around_module(net, run)


def shared(backbone: Backbone) -> tuple[str, ...]:
    """The call's arguments that are one for all prompts though they are lists: pictures for several ControlNets."""
    several = hasattr(controlnet(backbone), "nets") and not backbone.takes("control_image")
    return ("image",) if several else ()
