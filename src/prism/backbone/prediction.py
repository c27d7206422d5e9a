"""The clean latents that a denoiser predicts on the way, read off a step of the pipeline's scheduler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prism.backbone.pipeline import config_of
from prism.errors import PrismError

# What in a scheduler of diffusers tells the prediction, by class; others are refused, as they may mean something else.
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler")
_SOLVERS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
)
_GIVERS = (  # their steps return it second
    *("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler"),
)


class Prediction:
    """The clean latents predicted at one step: made before the step, while the scheduler stands at it, read after it.

    Args:
        scheduler: the pipeline's, of diffusers.
        step: the arguments of its `step` by name: model_output (with guidance), timestep, sample.

    Raises:
        PrismError: for a scheduler that does not tell what its model predicts.
    """

    def __init__(self, scheduler: Any, step: Mapping[str, Any]) -> None:
        kinds = {kind.__name__ for kind in type(scheduler).__mro__}
        self._clean: Tensor | None = None
        if isinstance(step.get("pred_original_sample"), Tensor):  # the pipeline makes it itself, as Cosmos does
            self._clean = step["pred_original_sample"]
        elif kinds & {*_FLOWS}:
            self._clean = _of_flow(scheduler, step)
        elif kinds & {*_SOLVERS} and _predicts_clean(scheduler):
            here = _at_step(scheduler, step["timestep"])
            self._clean = here.convert_model_output(step["model_output"], sample=step["sample"])
        elif not kinds & {*_GIVERS}:
            raise PrismError(
                f"The steps of {type(scheduler).__name__} do not tell the clean latents that the denoiser predicts; "
                "leave them out (--no-predicted), or set another scheduler."
            )

    def read(self, output: Any) -> Tensor:
        """The clean latents, in the layout and on the scale of the loop's last; `output`: what the step gave."""
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
    """x + (sigma of clean latents - sigma) v: z_t - sigma v, or z_t + (1 - sigma) v where sigma counts from noise."""
    sample, velocity = step["sample"].to(torch.float32), step["model_output"]
    tokens = step.get("per_token_timesteps")
    if tokens is not None:  # then the step goes up its velocity, which the pipeline has turned round
        clean: Tensor = sample + (tokens / config_of(scheduler)["num_train_timesteps"])[..., None] * velocity
    else:
        here = _at_step(scheduler, step["timestep"])
        target = 1.0 if config_of(scheduler).get("invert_sigmas") else 0.0
        clean = sample + (target - here.sigmas[here.step_index]) * velocity
    return clean.to(velocity.dtype)


def _at_step(scheduler: Any, timestep: Any) -> Any:
    """A copy of the scheduler that knows at which step it stands, as `step` finds out at its beginning."""
    here = copy.copy(scheduler)
    if here.step_index is None:
        here._init_step_index(timestep)
    return here


def _predicts_clean(scheduler: Any) -> bool:
    """True where a solver works on predicted clean latents, not on noise."""
    config = config_of(scheduler)
    if "predict_x0" in config:
        return bool(config["predict_x0"])
    return str(config.get("algorithm_type", "")).endswith("dpmsolver++")
