"""The clean latents that a denoiser predicts on the way, read off a step of the pipeline's scheduler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prism.backbone.pipeline import config_of
from prism.errors import PrismError

# Classes of diffusers' schedulers, by the way to the predicted clean latents; others are refused, because what their
# model predicts is not certain.
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler")
_SOLVERS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
)
_RETURNING = (  # `step` returns the predicted clean latents, second in its tuple
    *("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler"),
)


_HANDING = {"CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"}  # they hand their prediction to the step


_REPACKING = {"SanaWMPipeline"}  # they step tokens in place of their latents


def is_handed(pipe: Any) -> bool:
    """True where a pipeline hands the predicted clean latents to its scheduler's step, after asking it for them."""
    return not _HANDING.isdisjoint(base.__name__ for base in type(pipe).__mro__)


def check(pipe: Any, counts_steps_by_calls: bool) -> None:
    """Raise PrismError where a pipeline's steps do not tell what its denoiser predicts, as far as it can be known."""
    if is_handed(pipe):
        return
    if counts_steps_by_calls:
        raise PrismError(
            f"{type(pipe).__name__} steps copies of its scheduler, so that the predicted clean latents are not seen; "
            'take look="now" (--look now).'
        )
    if not _REPACKING.isdisjoint(base.__name__ for base in type(pipe).__mro__):
        raise PrismError(
            f"{type(pipe).__name__} steps tokens in place of its latents, so that the predicted clean latents are not "
            'seen; take look="now" (--look now).'
        )
    if _way(pipe.scheduler) is None:
        raise PrismError(
            f"The steps of {type(pipe.scheduler).__name__} do not tell the clean latents that the denoiser predicts; "
            'take look="now" (--look now), or set another scheduler.'
        )


def _way(scheduler: Any) -> tuple[str, ...] | None:
    """The group of schedulers, of those above, by whose way the prediction is found; None where there is none."""
    kinds = {kind.__name__ for kind in type(scheduler).__mro__}
    for group in (_FLOWS, _SOLVERS, _RETURNING):
        if kinds.intersection(group) and (group is not _SOLVERS or _predicts_clean(scheduler)):
            return group
    return None


class Prediction:
    """The clean latents predicted at one step. Make it before the scheduler's `step`, and `read` it afterwards.

    Args:
        scheduler: the pipeline's, of diffusers.
        step: the arguments of its `step` by name: model_output (with guidance), timestep, sample.

    Raises:
        PrismError: for a scheduler from whose steps the prediction cannot be read.
    """

    def __init__(self, scheduler: Any, step: Mapping[str, Any]) -> None:
        way = _way(scheduler)
        self._clean: Tensor | None = None
        if isinstance(step.get("pred_original_sample"), Tensor):  # the pipeline computes it, as Cosmos' do
            self._clean = step["pred_original_sample"]
        elif way is _FLOWS:
            self._clean = _of_flow(scheduler, step)
        elif way is _SOLVERS:
            solver = _at_step(scheduler, step["timestep"])
            self._clean = solver.convert_model_output(step["model_output"], sample=step["sample"])
        elif way is None:
            raise PrismError(
                f"The steps of {type(scheduler).__name__} do not tell the clean latents that the denoiser predicts; "
                "leave them out (--no-predicted), or set another scheduler."
            )

    def read(self, output: Any) -> Tensor:
        """The clean latents, of the shape and on the scale of those that the loop ends with.

        output: the value that the scheduler's `step` returned.
        """
        if self._clean is not None:
            return self._clean
        clean: Any = getattr(output, "pred_original_sample", None)
        if clean is None:
            clean = getattr(output, "denoised", None) if hasattr(output, "prev_sample") else output[1]
        if not isinstance(clean, Tensor):
            raise PrismError(
                f"A step gave a {type(output).__name__} without the predicted clean latents; leave them out "
                "(--no-predicted), or set another scheduler."
            )
        return clean


def _of_flow(scheduler: Any, step: Mapping[str, Any]) -> Tensor:
    """z_t + (sigma_0 - sigma_t) v, where sigma_0, that of clean latents, is 0, or 1 with `invert_sigmas`."""
    sample, velocity = step["sample"].to(torch.float32), step["model_output"]
    tokens = step.get("per_token_timesteps")
    if tokens is not None:  # such a step adds the velocity, because the pipeline has changed its sign
        clean: Tensor = sample + (tokens / config_of(scheduler)["num_train_timesteps"])[..., None] * velocity
    else:
        current = _at_step(scheduler, step["timestep"])
        target = 1.0 if config_of(scheduler).get("invert_sigmas") else 0.0
        clean = sample + (target - current.sigmas[current.step_index]) * velocity
    return clean.to(velocity.dtype)


def _at_step(scheduler: Any, timestep: Any) -> Any:
    """A copy of the scheduler with its `step_index` set, as `step` sets it first."""
    current = copy.copy(scheduler)
    if current.step_index is None:
        current._init_step_index(timestep)
    return current


def _predicts_clean(scheduler: Any) -> bool:
    """True where a solver works on predicted clean latents, not on noise."""
    config = config_of(scheduler)
    if "predict_x0" in config:
        return bool(config["predict_x0"])
    return str(config.get("algorithm_type", "")).endswith("dpmsolver++")
