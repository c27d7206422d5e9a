"""A ControlNet beside the denoiser: it runs just before it, on the same noisy latents and timestep.

Inside a stock call its outputs are arguments of the denoiser as any other, and all that is done here is to run no rows
but those that are needed. Where PRISM calls the denoiser by itself, the ControlNet's captured call is run with the same
latents and timestep, and its outputs are put in under the names that the family says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from prism.errors import PrismError, quoted

WINDOW = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}
"""Arguments of a pipeline's call, the share of its steps at which a ControlNet begins and ends, with their defaults."""

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
        self.scales: set[str] = set()

    def conditioning(self, denoiser_call: DenoiserCall, samples: int) -> Conditioning | None:
        """What the last call, which goes with one of the denoiser, was given besides latents and timestep, its
        conditional rows; None without a call.

        Raises PrismError where calls differ in the ControlNet's strength."""
        call = self.call
        if call is None:
            return None
        if len(self.scales) > 1:
            raise PrismError(
                f"{type(self.backbone.pipe).__name__}'s ControlNet works at some steps alone, and a look ahead does "
                f'not know at which; take look="now", or leave {" and ".join(WINDOW)} out.'
            )
        if _is_by_frames(self.backbone):
            noisy = call.noisy.unflatten(0, (-1, denoiser_call.noisy.shape[2])).transpose(1, 2)
            call = replace(call, arguments={**call.arguments, call.noisy_name: noisy})
        return Conditioning.of(call, call.conditional(samples), type(self.backbone.pipe))


def _is_by_frames(backbone: Backbone) -> bool:
    """True where a ControlNet of images takes the frames of videos (B, C, T, H, W) as rows (AnimateDiff)."""
    return backbone.family.token_form == "frames" and backbone.family.layout == "BCTHW"


@contextmanager
def heard(backbone: Backbone) -> Iterator[Heard]:
    """While open, the ControlNet's last call is kept, where there is one."""
    net, last = controlnet(backbone), Heard(backbone)

    def keep(inner: Any, *args: Any, **kwargs: Any) -> Any:
        last.call = call_of(backbone, net, args, kwargs)  # type: ignore[arg-type]
        last.scales.add(repr(last.call.arguments.get("conditioning_scale")))
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
    works = _works(backbone, conditioning, timestep)
    if not any(works):
        return named
    told = conditioning.control.call(noisy, timestep, length)
    if _is_by_frames(backbone):
        name, timed, frames = conditioning.control.noisy, conditioning.control.timed, noisy.shape[2]
        told |= {name: told[name].transpose(1, 2).flatten(0, 1), timed: told[timed].repeat_interleave(frames, 0)}
    with torch.set_grad_enabled(torch.is_grad_enabled() and noisy.requires_grad):  # the net itself is never tuned
        output = net(**told)
    values = output if isinstance(output, tuple) and len(output) == len(names) else (output,)
    if len(values) != len(names):
        raise PrismError(
            f"{type(net).__name__} gives {len(values)} outputs; control_arguments of the family "
            f"{backbone.family.name!r} names {', '.join(names)}."
        )

    def fitted(value: Tensor) -> Tensor:
        value = value.to(conditioning.dtype)
        if all(works):
            return value
        kept = torch.tensor(works, dtype=value.dtype, device=value.device).repeat_interleave(len(value) // len(works))
        return value * kept.view(-1, *[1] * (value.ndim - 1))

    return named | dict(zip(names, with_tensors(values, fitted)))


def _works(backbone: Backbone, conditioning: Conditioning, timestep: Tensor) -> list[bool]:
    """Whether the ControlNet works at each row's model timestep (B,)."""
    if conditioning.control_levels is None:
        return [True] * len(timestep)
    (low, high), scheduler = conditioning.control_levels, backbone.pipe.scheduler
    return [low <= backbone.family.t_of(scheduler, each) <= high for each in timestep]


# -- the steps at which it works


def full_time(backbone: Backbone, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with a ControlNet that works at all steps."""
    return {**call, **{name: value for name, value in WINDOW.items() if backbone.takes(name)}}


def window(backbone: Backbone, call: Mapping[str, Any]) -> tuple[float, float] | None:
    """The first and the last share of the steps of a call at which the ControlNet works; None: at all of them.

    Raises PrismError for several ControlNets that work at different steps.
    """
    if not backbone.family.control_arguments:
        return None
    ends = []
    for name, whole in WINDOW.items():
        value = call.get(name, whole)
        values = set(value) if isinstance(value, list | tuple) else {value}
        if len(values) != 1:
            raise PrismError(f"{name} = {quoted(value, 60)} differs between ControlNets; give one for all of them.")
        ends.append(values.pop())
    first, last = ends
    return None if (first, last) == tuple(WINDOW.values()) else (first, last)


def levels(backbone: Backbone, call: Mapping[str, Any]) -> tuple[float, float] | None:
    """The lowest and the highest noise level at which the ControlNet works in `pipe(**call)`, by the nearest step;
    None: at all.

    Raises PrismError where the levels of the steps are not known.
    """
    ends = window(backbone, call)
    if ends is None:
        return None
    steps = backbone.steps(call)
    count, ts = len(steps), steps.levels
    if not ts:
        raise PrismError(
            f"The noise levels of {type(backbone.pipe).__name__}'s steps are not those of its scheduler's timesteps, "
            f"so that it is not known at which its ControlNet works; leave {' and '.join(WINDOW)} out."
        )
    works = [i for i in range(count) if not (i / count < ends[0] or (i + 1) / count > ends[1])]  # as the pipelines do
    if not works:
        return 1001.0, -1.0
    before, behind = works[0] - 1, works[-1] + 1
    high = 1000.0 if before < 0 else (ts[before] + ts[before + 1]) / 2
    low = 0.0 if behind == count else (ts[behind] + ts[behind - 1]) / 2
    return low, high


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
