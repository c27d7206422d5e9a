"""A denoiser that knows the answer: what a perfect one gives for a chosen clean latent, in its scheduler's own form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prism.backbone import Backbone, patches
from prism.backbone.denoiser_call import DenoiserCall


@dataclass
class Answers:
    """One call of a planted denoiser.

    timestep: the largest. noisy: (batch, ...) the latents that it was given. clean: those that its rows said.
    conditional: (batch,) bool, True for rows with the text. further: it is one of further guidance.
    """

    timestep: float
    noisy: Tensor
    clean: Tensor
    conditional: Tensor
    further: bool


def form(scheduler: Any, timestep: float) -> tuple[float, float]:
    """(a, b) of a perfect denoiser's output a x0 + b z at the scheduler's present step, for its input z.

    z = alpha x0 + sigma eps, on the scale of the input. Flow: eps - x0 (x0 - eps where sigmas rise). Else eps,
    alpha eps - sigma x0, or x0 itself. EDM: F of x0 = c_skip x + c_out F, for z = c_in x.
    """
    config, name = scheduler.config, type(scheduler).__name__
    index = getattr(scheduler, "step_index", None) or 0
    if "FlowMatch" in name or config.get("use_flow_sigmas"):
        share = float(scheduler.sigmas[index])
        if name.startswith("FlowMatch") and config.use_karras_sigmas:  # Cosmos 2: z = x0 + sigma eps, scaled
            share = share / (1 + share)
        return (1 / (1 - share), -1 / (1 - share)) if config.get("invert_sigmas") else (-1 / share, 1 / share)
    if name == "EDMEulerScheduler":
        sigma, data = float(scheduler.sigmas[index]), config.sigma_data
        return math.hypot(sigma, data) / (sigma * data), -data / sigma
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[index])
        alpha, sigma = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    else:
        alpha = math.sqrt(float(scheduler.alphas_cumprod[int(timestep)]))
        sigma = math.sqrt(1 - alpha**2)
    kinds = {"sample": (1.0, 0.0), "epsilon": (-alpha / sigma, 1 / sigma), "v_prediction": (-1 / sigma, alpha / sigma)}
    return kinds[config.prediction_type]


@contextmanager
def planted(backbone: Backbone, text: Tensor, apart: float = 0.3) -> Iterator[list[Answers]]:
    """While open, the pipeline's denoisers are perfect ones for clean latents chosen here; their calls are listed.

    The clean latent of a row is a pattern plus a part that its input decides, so that candidates differ. Where a row's
    text is not `text` (1, Lt, width), another pattern is added, of the size `apart`. Blocks run as ever: what a judge
    reads stays theirs.
    """
    family = backbone.family
    calls: list[Answers] = []

    def answer(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = DenoiserCall.of(module, args, kwargs, family)
        noisy, _, axis = call.parted()
        noisy = noisy.double()
        place = torch.arange(noisy[0].numel(), dtype=torch.float64).view(noisy.shape[1:])
        length = min(text.shape[1], call.text.shape[1])  # Latte pads and trims it
        texts = call.text.expand(call.batch, *call.text.shape[1:])[:, :length]
        shown = (texts - text[:, :length]).abs().flatten(1).amax(1) < 1e-3
        without = (~shown).double().view(-1, *[1] * (noisy.ndim - 1))
        clean = 0.5 * torch.cos(1.7 * place) + 0.4 * torch.tanh(noisy) + apart * without * torch.sin(0.9 * place)
        timestep = float(call.timestep.max())
        a, b = form(backbone.pipe.scheduler, timestep)
        turned = family.clock == "rising_flow" and not backbone.pipe.scheduler.config.get("invert_sigmas")
        if turned or family.name == "hidream":
            a, b = -a, -b  # the pipeline turns the sign around, as the timesteps (Lumina 2), or not (HiDream)
        sample = output if isinstance(output, Tensor) else output[0]
        if isinstance(sample, list):  # of rows
            for row, value in zip(sample, a * clean + b * noisy):
                row.copy_(value)
        else:  # Latte's has channels for a variance
            sample.narrow(axis, 0, noisy.shape[axis]).copy_(a * clean + b * noisy)
        further = any(call.arguments.get(name) for name in ("isolate_modalities", "spatio_temporal_guidance_blocks"))
        calls.append(Answers(timestep, noisy, clean, shown, further))

    with ExitStack() as stack:
        # Its outputs depend on a call's arguments alone, as those of the denoisers of trusted packages do.
        stack.enter_context(mock.patch.object(patches, "_TRUSTED", patches._TRUSTED | {"tests"}))
        for denoiser in backbone.denoisers:
            stack.callback(denoiser.register_forward_hook(answer, with_kwargs=True).remove)
        yield calls


def at_step(calls: list[Answers], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """At a step, what the rows with the text were given and what they said, and what the others said: (n, ...) each."""
    times = list(dict.fromkeys(each.timestep for each in calls))
    calls = [each for each in calls if each.timestep == times[step - 1] and not each.further]
    noisy = torch.cat([each.noisy[each.conditional] for each in calls])
    clean = torch.cat([each.clean[each.conditional] for each in calls])
    return noisy, clean, torch.cat([each.clean[~each.conditional] for each in calls])


def guided(backbone: Backbone, call: dict[str, Any], one: Tensor, other: Tensor) -> Tensor:
    """The clean latents (n, ...) that a pipeline's guidance, which is linear, makes of those with and without text."""
    if not len(other):
        return one
    name = backbone.family.guidance
    if name == "max_guidance_scale":  # a scale per frame
        frames = torch.linspace(call["min_guidance_scale"], call[name], one.shape[1], dtype=torch.float64)
        scale: Any = frames.view(1, -1, 1, 1, 1)
    else:
        scale = backbone.pipe.guider.guidance_scale if name == "guider" else call.get(name, backbone.default(name))
    scale = scale + 1 if backbone.family.name.startswith(("cosmos", "z-image")) else scale
    return other + scale * (one - other)
