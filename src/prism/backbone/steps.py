"""The steps that a stock call really makes, read from its scheduler at the call's first denoiser call.

`num_inference_steps` is their number for some schedulers and calls only: `sigmas` and `timesteps` replace it,
`strength` leaves out the first steps, and second-order schedulers take further ones in between.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prism.backbone.conditioning import cache_key
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import config_of
from prism.backbone.wrapping import capture
from prism.errors import PrismError

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone

_CACHED_CALLS = 64
_PLAIN = (str, int, float, bool, type(None))
# Arguments that change neither the number of steps nor their timesteps.
_IRRELEVANT = ("prompt", "negative_prompt", "generator", "output_type", "return_dict")


@dataclass(frozen=True)
class Steps:
    """The steps of a stock call, in order.

    timesteps: the scheduler's, one per step; empty where it does not hold them.
    calls: denoiser calls per step (families with guidance in one batch: groups of rows).
    readable: per step, True where the denoiser that is read runs it.
    levels: per step, the noise level in [0, 1000] of its latents; empty where it is not known beforehand.
    """

    timesteps: tuple[float, ...]
    calls: tuple[int, ...]
    readable: tuple[bool, ...]
    levels: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.calls)

    def check_cuts(self, steps: Sequence[int], reads: str) -> None:
        """Raise PrismError for a cut (a 1-based step) that does not run on the denoiser `reads`."""
        readable = [step for step, runs in enumerate(self.readable, 1) if runs]
        for step in steps:
            if step > len(self) or self.readable[step - 1]:
                continue
            possible = (
                f"cut at steps {readable[0]} to {readable[-1]}"
                if readable
                else "it runs none of this call's steps; take the strategy full or draft, or the other one's head"
            )
            raise PrismError(
                f"The schedule cuts at step {step}, which does not run on the denoiser that the head reads, {reads!r}; "
                f"{possible}."
            )

    @property
    def last_readable(self) -> int:
        """The last step that the denoiser that is read runs, or the call's last one where it runs none."""
        return max((step for step, runs in enumerate(self.readable, 1) if runs), default=len(self))

    def nearest_readable(self, step: int) -> int:
        """The step nearest to `step` that the denoiser that is read runs, or `step` where it runs none."""
        readable = [number for number, runs in enumerate(self.readable, 1) if runs]
        return min(readable, key=lambda number: abs(number - step), default=step)


def steps_of(backbone: Backbone, call: Mapping[str, Any]) -> Steps:
    """The steps of `pipe(**call)`, from the cache or by running the call up to its first denoiser call.

    Raises:
        PrismError: for a call that the pipeline refuses, or that makes no step.
    """
    pipe, scheduler = backbone.pipe, backbone.pipe.scheduler
    relevant = {n: value for n, value in call.items() if n not in _IRRELEVANT and not n.startswith("callback")}
    for name in ("timesteps", "sigmas"):
        if relevant.get(name) is not None:
            relevant[name] = repr([float(value) for value in relevant[name]])
    key = cache_key(relevant)
    if key is not None:
        guider = getattr(pipe, "guider", None)
        parts = (scheduler, config_of(scheduler), config_of(pipe), *((guider,) if guider is not None else ()))
        key += f"{is_guided(backbone, call)} "
        key += " ".join(type(part).__name__ + _plain(part) for part in parts)
        if key in backbone.steps_by_call:
            return backbone.steps_by_call[key]
    scheduled: list[tuple[int | None, list[float]]] = []  # number of steps, timesteps

    def look() -> None:
        timesteps = getattr(pipe.scheduler, "timesteps", None)
        values = [] if timesteps is None else [float(t) for t in timesteps]
        scheduled.append((getattr(pipe, "_num_timesteps", None), values))

    arguments = capture(pipe, backbone.denoisers, call, look)
    if not arguments:
        raise PrismError(
            f"{type(pipe).__name__} makes no denoiser call with these arguments; give more steps"
            + (", or a greater strength." if backbone.takes("strength") else ".")
        )
    count, timesteps = scheduled[0]
    first_call = backbone.denoiser_call(arguments)
    if count is None:  # the pipeline does not say: count from the first call's timestep on
        first = float(first_call.timestep.max()) * 1000 / backbone.family.pure_noise_timestep
        start = next((index for index, t in enumerate(timesteps) if abs(t - first) < 1e-2), 0)
        count = len(timesteps) - start or backbone.num_inference_steps(dict(call))
    timesteps = timesteps[-count:] if len(timesteps) >= count else []
    calls, readable = _calls(backbone, call, timesteps, count), _readable(backbone, timesteps, count)
    steps = Steps(tuple(timesteps), calls, readable, _levels(backbone, timesteps, first_call))
    if key is not None:
        backbone.steps_by_call[key] = steps
        for old in list(backbone.steps_by_call)[:-_CACHED_CALLS]:
            del backbone.steps_by_call[old]
    return steps


def _levels(backbone: Backbone, timesteps: Sequence[float], first: DenoiserCall) -> tuple[float, ...]:
    """Noise levels by the scheduler's timesteps, if these are what the denoiser is given at the first step."""
    family, scheduler = backbone.family, backbone.pipe.scheduler
    try:
        scale = family.pure_noise_timestep / 1000
        levels = tuple(family.t_of(scheduler, timestep * scale) for timestep in timesteps)
        agrees = bool(levels) and abs(levels[0] - first.t(scheduler)) < 2  # some are rounded for the denoiser
    except PrismError:  # a scheduler of another form than the model's
        return ()
    return levels if agrees else ()


def _calls(backbone: Backbone, call: Mapping[str, Any], timesteps: Sequence[float], count: int) -> tuple[int, ...]:
    """`passes` of each step; a guider may turn guidance on for some of them."""
    if backbone.family.guidance != "guider":
        return (passes(backbone, call),) * count
    guider, requested = copy.copy(backbone.pipe.guider), backbone.num_inference_steps(dict(call))
    calls = []
    for step in range(count):
        guider.set_state(step=step, num_inference_steps=requested, timestep=None)
        calls.append(guider.num_conditions)
    return tuple(calls)


def is_guided(backbone: Backbone, call: Mapping[str, Any]) -> bool:
    """Tell whether `pipe(**call)` runs unconditional passes too, at some of its steps at least."""
    name = backbone.family.guidance
    if getattr(backbone.pipe, "is_turbo", False):  # ACE-Step, distilled: its call ignores the scale
        return False
    if name == "guider":
        guider = copy.copy(backbone.pipe.guider)
        if guider is None:  # HunyuanImage, distilled
            return False
        if hasattr(guider, "set_state"):  # it holds the last step of an earlier call
            guider.set_state(step=None, num_inference_steps=None, timestep=None)
        return bool(guider.num_conditions > 1)
    if name == "true_cfg_scale":  # guidance besides the embedded one; needs a negative prompt
        negative = any(call.get(f"negative_prompt{kind}") is not None for kind in ("", "_embeds"))
        return negative and _is_above(backbone, call, name, 1.0)
    return _is_above(backbone, call, name, backbone.family.guidance_off)


def passes(backbone: Backbone, call: Mapping[str, Any]) -> int:
    """The denoiser's passes (groups of rows) in a step of `pipe(**call)`: the conditional one and those of guidance."""
    further = backbone.family.further_guidance.items()
    return 1 + is_guided(backbone, call) + sum(_is_above(backbone, call, name, least) for name, least in further)


def _is_above(backbone: Backbone, call: Mapping[str, Any], name: str, least: float) -> bool:
    """True where an argument, or the one of that name for the sound beside the video, is above a number."""
    values = (call.get(each, backbone.default(each)) for each in (name, f"audio_{name}"))
    return any(value is not None and value > least for value in values)


def _readable(backbone: Backbone, timesteps: Sequence[float], count: int) -> tuple[bool, ...]:
    """Per step, True where the denoiser that is read runs it, by the pipeline's `boundary_ratio`."""
    ratio = config_of(backbone.pipe).get("boundary_ratio")
    if ratio is None or len(backbone.denoisers) == 1 or not timesteps:
        return (True,) * count
    boundary = ratio * config_of(backbone.pipe.scheduler).get("num_train_timesteps", 1000)
    return tuple((t < boundary) == backbone.reads.endswith("_2") for t in timesteps)


def _plain(part: Any) -> str:
    """The simple values that an object or a mapping holds, as text."""
    values = part if isinstance(part, Mapping) else vars(part)
    return repr(sorted((name, value) for name, value in values.items() if isinstance(value, _PLAIN)))
