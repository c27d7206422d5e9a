"""Noise levels: for each form of diffusion, a monotone map from t in [0, 1000] (0 clean, 1000 noise) to (alpha, sigma,
model timestep), on the scale of the denoiser's input.

Where a scheduler divides its latents before the denoiser sees them (Allegro, Stable Video Diffusion, Cosmos), alpha and
sigma are divided too, so that a noisy latent is always what the denoiser takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from prism.backbone.pipeline import config_of
from prism.errors import PrismError, quoted

Clock = Literal["flow", "rising_flow", "ddpm", "euler", "edm"]
FLOWS = ("flow", "rising_flow")
_SCHEDULERS = {
    "flow": "a flow-matching one (FlowMatchEulerDiscreteScheduler, or another with use_flow_sigmas=True)",
    "ddpm": "one with alphas_cumprod (DDIM, DPM++) and no flow sigmas",
    "edm": "one in Karras' form, with sigma_min, sigma_max and continuous timesteps (EDMEulerScheduler)",
}


@dataclass(frozen=True)
class OwnClock:
    """A map from noise levels given as functions, for a model that none of the named clocks fits.

    level: (scheduler, t in [0, 1000], float32) -> (alpha, sigma, model timestep), float32 and shaped like t.
    t_of: (scheduler, model timestep) -> t, its inverse.
    """

    level: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    t_of: Callable[[Any, float], float]

    def __post_init__(self) -> None:
        for name in ("level", "t_of"):
            if not callable(getattr(self, name)):
                raise PrismError(f"{name} of an OwnClock must be a function; found {quoted(getattr(self, name), 80)}.")


def check(clock: Clock | OwnClock, scheduler: Any) -> None:
    """Raise PrismError for a scheduler of another form of diffusion than `clock`, whose timesteps mean other noise.

    Schedulers outside diffusers and an `OwnClock` are not checked: whoever wrote the family vouches for them.
    """
    if isinstance(clock, OwnClock) or not isinstance(scheduler, SchedulerMixin):
        return
    form = "ddpm" if clock == "euler" else "flow" if clock in FLOWS else clock
    if form not in forms(scheduler):
        raise PrismError(
            f"The noise levels of this {type(scheduler).__name__} cannot be told for the pipeline's model, which takes "
            f"{_SCHEDULERS[form]}; set such a scheduler, or take a strategy that judges nothing on the way."
        )


def forms(scheduler: Any) -> set[str]:
    """The forms of diffusion that a scheduler of diffusers may use."""
    config = scheduler.config
    if any("FlowMatch" in kind.__name__ for kind in type(scheduler).__mro__) or config.get("use_flow_sigmas"):
        return {"flow"}
    if config.get("sigma_max") is not None and config.get("timestep_type", "continuous") == "continuous":
        return {"edm"}
    if hasattr(scheduler, "alphas_cumprod"):
        return {"ddpm"}
    return set() if config.get("prediction_type") == "trigflow" else {"flow"}


def length(scheduler: Any) -> int:
    """The number of timesteps that the model was trained with, by its scheduler."""
    return config_of(scheduler).get("num_train_timesteps") or 1000


def level(clock: Clock | OwnClock, scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise level `t` in [0, 1000] as (alpha, sigma, model timestep), each float32 and shaped like `t`.

    flow (paper, Eq. 1): alpha = 1 - t/1000, sigma = t/1000, timestep = t; rising_flow counts timesteps from noise.
    ddpm: the scheduler's cumulative alphas at index t/1000 * T, and exactly clean at t = 0.
    euler: the same, but between whole indices sigma/alpha is interpolated, as Euler schedulers do.
    edm: log sigma between the scheduler's ends, sigma = 0 at t = 0, timestep = ln(sigma) / 4 (with a cosine
    scheduler, Stable Audio's, 2 / pi atan(sigma)); both divided by sqrt(sigma^2 + sigma_data^2) (Karras et al. 2022,
    c_in).

    Raises:
        PrismError: for t outside [0, 1000].
    """
    t = t.to(torch.float32)
    if not bool(((t >= 0) & (t <= 1000)).all()):
        raise PrismError(f"t must lie in [0, 1000], 0 clean and 1000 noise; found {t.tolist()}.")
    if isinstance(clock, OwnClock):
        return _own_level(clock, scheduler, t)
    if clock in FLOWS:
        timestep = t if clock == "flow" else 1000 - t
        return 1 - t / 1000, t / 1000, timestep * (length(scheduler) / 1000)
    check(clock, scheduler)
    if clock == "edm":
        low, high, data = _edm(scheduler)
        timestep = (low + (high - low) * t / 1000) / 4
        sigma = torch.where(t == 0, torch.zeros_like(t), (4 * timestep).exp())
        if _is_cosine(scheduler):
            timestep = (4 * timestep).exp().atan() / (math.pi / 2)
        scale = (sigma.square() + data**2).rsqrt()
        return scale, sigma * scale, timestep
    steps = len(scheduler.alphas_cumprod)
    if clock == "euler":
        index = (t.double() * steps / 1000).clamp(max=steps - 1).cpu()
        ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double().cpu()
        ratio = torch.from_numpy(np.interp(index, np.arange(steps), ratios)).to(t)
        alpha = torch.where(t == 0, torch.ones_like(t), (ratio.square() + 1).rsqrt())
        return alpha, torch.where(t == 0, torch.zeros_like(t), ratio * alpha), index.to(t)
    index = (t.double() * steps / 1000).floor().clamp(max=steps - 1).long()
    cumulative = scheduler.alphas_cumprod.to(t.device)[index].to(torch.float32)
    cumulative = torch.where(t == 0, torch.ones_like(cumulative), cumulative)
    return cumulative.sqrt(), (1 - cumulative).sqrt(), index.to(torch.float32)


def t_of(clock: Clock | OwnClock, scheduler: Any, timestep: float) -> float:
    """The noise level in [0, 1000] at which the model was called with `timestep`: the inverse of `level`."""
    if isinstance(clock, OwnClock):
        return min(1000.0, max(0.0, float(clock.t_of(scheduler, timestep))))
    check(clock, scheduler)
    if clock in FLOWS:
        share = min(1.0, timestep / length(scheduler))  # rounding may exceed 1
        return 1000.0 * (share if clock == "flow" else 1 - share)
    if clock == "edm":
        low, high, _ = _edm(scheduler)
        log_sigma = math.log(math.tan(timestep * math.pi / 2)) if _is_cosine(scheduler) else 4 * timestep
        return min(1000.0, max(0.0, 1000.0 * (log_sigma - low) / (high - low)))
    return 1000.0 * timestep / len(scheduler.alphas_cumprod)


def _own_level(clock: OwnClock, scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`level` of an `OwnClock`, checked: a user's function may return anything."""
    levels = clock.level(scheduler, t)
    several = levels if isinstance(levels, tuple | list) else [levels]
    if len(several) != 3 or not all(isinstance(each, Tensor) and each.shape == t.shape for each in several):
        shapes = ", ".join(str(tuple(e.shape)) if isinstance(e, Tensor) else type(e).__name__ for e in several[:4])
        raise PrismError(
            "The level of an OwnClock must give alpha, sigma and the model timestep, three tensors shaped like t, "
            f"{tuple(t.shape)}; found {shapes or 'nothing'}."
        )
    return several[0], several[1], several[2]


def _is_cosine(scheduler: Any) -> bool:
    return any("Cosine" in kind.__name__ for kind in type(scheduler).__mro__)


def _edm(scheduler: Any) -> tuple[float, float, float]:
    """ln sigma_min, ln sigma_max and sigma_data."""
    config = scheduler.config
    return math.log(config.sigma_min), math.log(config.sigma_max), float(config.get("sigma_data", 1.0))
