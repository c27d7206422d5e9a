"""A denoiser's whole output for noisy latents, with gradients, and the target that it was trained towards.

The target follows from the form of the scheduler and from one step of the stock pipeline, which shows what the pipeline
makes of the denoiser's output before the scheduler takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prism.backbone import control, layout
from prism.backbone import noise as clocks
from prism.backbone.arguments import normalised, relevant, unguided
from prism.backbone.conditioning import Conditioning, Ragged
from prism.backbone.pipeline import config_of, explain_misfits
from prism.backbone.wrapping import StopCall, around, around_module, run_until_stopped
from prism.errors import PrismError, quoted

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone

FORMS = ("flow", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Target:
    """What a denoiser predicts of z_t = alpha z_0 + sigma eps, with the sign that its pipeline takes it with.

    form: "flow": eps - z_0; "epsilon": eps; "v_prediction": alpha eps - sigma z_0; "sample": z_0. sign: 1 or -1.
    """

    form: str
    sign: float = 1.0

    def of(self, backbone: Backbone, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output that a perfect denoiser would have, for clean latents and noise (B, ...) at t (B,)."""
        alpha, sigma = _scales(backbone, clean, t)
        values = {
            "flow": lambda: noise - clean,
            "epsilon": lambda: noise,
            "v_prediction": lambda: alpha * noise - sigma * clean,
            "sample": lambda: clean,
        }
        return self.sign * values[self.form]()

    def clean(self, backbone: Backbone, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean latents z_0 that an output (B, ...) predicts for noisy latents at t (B,)."""
        alpha, sigma = _scales(backbone, noisy, t)
        value = self.sign * output
        values = {
            "flow": lambda: (noisy - sigma * value) / (alpha + sigma),
            "epsilon": lambda: (noisy - sigma * value) / alpha,
            "v_prediction": lambda: (alpha * noisy - sigma * value) / (alpha**2 + sigma**2),
            "sample": lambda: value,
        }
        return values[self.form]()


def _scales(backbone: Backbone, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t (B,), shaped to multiply latents (B, ...)."""
    alpha, sigma, _ = backbone.family.level(backbone.pipe.scheduler, layout.per_row(t, like))
    shape = (-1, *[1] * (like.ndim - 1))
    return alpha.view(shape).to(like.device), sigma.view(shape).to(like.device)


def output(backbone: Backbone, noisy: Tensor, conditioning: Conditioning | Ragged, t: Tensor) -> Tensor:
    """The denoiser's output (B, ...) in float32 for noisy latents (B, ...) at t (B,), in their shape.

    Gradients reach whatever of the denoiser takes them. The caller holds the pipeline (`Backbone.held`).
    """
    if isinstance(conditioning, Ragged) or (backbone.family.batch_size_one and len(noisy) > 1):
        rows = range(len(noisy))
        return torch.cat([output(backbone, noisy[r : r + 1], conditioning[r], t[r : r + 1]) for r in rows])
    _, _, timestep = backbone.family.level(backbone.pipe.scheduler, layout.per_row(t, noisy))
    with explain_misfits(backbone.pipe):
        answer = _tensor(backbone.denoiser(**control.arguments(backbone, conditioning, noisy, timestep)))
    return _as_latents(backbone, answer, noisy).float()


@torch.no_grad()
def unconditioned(backbone: Backbone, call: Mapping[str, Any]) -> Conditioning:
    """The denoiser's conditioning for an empty prompt, one row, which guidance contrasts a prompt with."""
    with backbone.held():
        return backbone._capture([""], relevant(backbone.family, normalised(call)), 0)


def sampled_mask(conditioning: Conditioning | Ragged, like: Tensor) -> Tensor | None:
    """True where latents (B, ...) are denoised and not a condition that the pipeline puts in; None: everywhere."""
    parts = conditioning.parts if isinstance(conditioning, Ragged) else (conditioning,)
    if all(part.given is None for part in parts):
        return None
    return torch.cat([~part.given.expand(len(part), *like.shape[1:]) for part in parts if part.given is not None])


def target_of(backbone: Backbone, prompt: str, call: Mapping[str, Any]) -> Target:
    """The target of the backbone's denoiser, from its scheduler and one unguided step of `pipe(prompt, **call)`.

    Raises:
        PrismError: where the scheduler does not say what the model predicts, or the pipeline changes the denoiser's
            output in more than its sign.
    """
    form, scheduler, name = _form(backbone), backbone.pipe.scheduler, type(backbone.pipe).__name__
    if backbone.family.outputs > 1:
        raise PrismError(
            f"{name} denoises a sound beside the video, and only the video's latents are held here; tune it with its "
            "own trainer."
        )
    answers, taken = _first_step(backbone, prompt, call)
    if not answers or taken is None:
        raise PrismError(
            f"{name} hands its denoiser's output to no step of its scheduler, so that what the denoiser is trained "
            "towards is not known; tune it with its own trainer."
        )
    mask = sampled_mask(backbone.condition([prompt], **call), answers[0])
    step, seen = taken["model_output"].float(), [_alike(backbone, each, taken["model_output"]) for each in answers]
    mask = None if mask is None else _alike(backbone, mask, step)
    sign = next((sign for sign in (1.0, -1.0) if _comes_of(seen, sign * step, mask)), 0.0)
    if not sign:
        raise PrismError(
            f"{name} changes its denoiser's output before the scheduler takes it (from "
            f"{quoted(tuple(answers[0].shape))} to {quoted(tuple(step.shape))}), so that what the denoiser is trained "
            "towards is not known; tune it with its own trainer."
        )
    turned = bool(config_of(scheduler).get("invert_sigmas")) or taken.get("per_token_timesteps") is not None
    return Target(form, -sign if form == "flow" and turned else sign)


def _form(backbone: Backbone) -> str:
    """What the scheduler takes its model to predict, one of `FORMS`."""
    clock, scheduler = backbone.family.clock, backbone.pipe.scheduler
    kind = type(scheduler).__name__
    clocks.check(clock, scheduler)
    predicts = config_of(scheduler).get("prediction_type")
    if clock in clocks.FLOWS and predicts in (None, "flow_prediction"):
        return "flow"
    if clock in ("ddpm", "euler") and predicts in FORMS[1:]:
        return str(predicts)
    raise PrismError(
        f"What the denoiser of {type(backbone.pipe).__name__} predicts is not known: its {kind} says "
        f"{quoted(predicts, 60)}, and the family {backbone.family.name!r} counts noise as "
        f"{clock if isinstance(clock, str) else 'a clock of its own'}. Tuned are flow matching, epsilon, v_prediction "
        "and sample."
    )


def _first_step(backbone: Backbone, prompt: str, call: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any] | None]:
    """The denoiser's outputs, and the arguments of the scheduler's `step`, in the first step of a call without
    guidance, as far as the pipeline can do without it."""
    outputs: list[Tensor] = []
    steps: list[dict[str, Any]] = []

    def listen(inner: Any, *args: Any, **kwargs: Any) -> Any:
        answer = inner(*args, **kwargs)
        outputs.append(_tensor(answer).detach().float())
        return answer

    def stop(inner: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append({**dict(zip(("model_output", "timestep", "sample"), args)), **kwargs})
        raise StopCall

    arguments = normalised({name: value for name, value in call.items() if name != "output_type"})
    arguments |= {**unguided(backbone.family, arguments, backbone._call), "output_type": "latent"}
    arguments |= backbone.batch([prompt], [0], arguments)
    with torch.no_grad(), backbone.held(), ExitStack() as stack:
        for denoiser in backbone.denoisers:
            stack.enter_context(around_module(denoiser, listen))
        stack.enter_context(around(backbone.pipe.scheduler, "step", stop, reads=True))
        run_until_stopped(backbone.pipe, arguments)
    known = bool(steps) and isinstance(steps[0].get("model_output"), Tensor)
    return (outputs, steps[0]) if known else ([], None)


def _alike(backbone: Backbone, answer: Tensor, step: Tensor) -> Tensor:
    """An output without the channels of a learned variance and the frames in front that the scheduler does not take."""
    letters = backbone.family.layout
    if answer.ndim == step.ndim + 1 and answer.shape[2] == 1:  # the one frame of images that are no videos in the loop
        return answer[:, :, 0]
    if answer.ndim != step.ndim or answer.ndim != len(letters):
        return answer
    for axis, letter in enumerate(letters):
        left = answer.shape[axis] - step.shape[axis]
        if left > 0 and letter in "CT":
            answer = answer.narrow(axis, 0 if letter == "C" else left, step.shape[axis])
    return answer


def _comes_of(outputs: Sequence[Tensor], step: Tensor, mask: Tensor | None) -> bool:
    """True where the scheduler takes an output as it is, or two of them as guidance joins them: b + scale (a - b)."""
    if any(each.shape != step.shape for each in outputs):
        return False
    chosen = torch.ones_like(step, dtype=torch.bool) if mask is None or mask.shape != step.shape else mask
    values = [each.to(step.device)[chosen] for each in outputs]
    wanted, first = step[chosen], values[0]
    if len(values) > 1:
        difference = values[0] - values[1]
        scale = (wanted - values[1]) @ difference / (difference @ difference).clamp(min=1e-12)
        first = values[1] + scale * difference
    return torch.allclose(first, wanted, rtol=1e-2, atol=1e-3)


def _tensor(answer: Any) -> Tensor:
    """The first tensor of a denoiser's answer: itself, of a tuple, of diffusers' output class; rows may be listed."""
    first = answer if isinstance(answer, Tensor) else answer[0]
    if isinstance(first, list) and len({getattr(row, "shape", None) for row in first} - {None}) == 1:
        first = torch.stack(first)
    if not isinstance(first, Tensor):
        raise PrismError(f"The denoiser answers with a {type(first).__name__} where a tensor is needed to tune it.")
    return first


def _as_latents(backbone: Backbone, answer: Tensor, like: Tensor) -> Tensor:
    """A denoiser's answer without the channels of a learned variance. Raises PrismError for one of another shape."""
    for axis in (1, layout.channel_axis(backbone.family.layout)):  # tokens of an image follow the latents', too
        if answer.ndim == like.ndim and answer.shape[axis] > like.shape[axis]:
            answer = answer.narrow(axis, 0, like.shape[axis])
    if answer.shape != like.shape:
        raise PrismError(
            f"The denoiser of {type(backbone.pipe).__name__} answers with {quoted(tuple(answer.shape))} to latents "
            f"{quoted(tuple(like.shape))}, so that its error cannot be measured; tune it with its own trainer."
        )
    return answer
