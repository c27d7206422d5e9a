"""Guidance by the judge: after a step, a callback of the stock call pushes latents along the gradient of their score.

Let a step lead from z = alpha x + sigma eps to z' = alpha' x + sigma' eps, as in `prism.sampling.edits`, and let
h = sqrt(alpha² + sigma²), the size of latents of that level. The push is

    z' + strength h' |z' / h' - z / h| g / |g|

per row, where g is the gradient of the judge's weighted score: with respect to z' at its own noise level (look="now"),
or with respect to x, the clean latents that the step predicts, re-noised to `judge_at` (look="ahead"). The latents
before and after the step give x = (sigma z' - sigma' z) / (alpha' sigma - alpha sigma'), whatever the denoiser
predicts (flow, epsilon, v) and without asking it; that of a multistep solver is extrapolated from its predictions.

Pushes are measured by the sampler's own step, not by the gradient: scores are log-odds on a scale of each head's own,
and their gradient grows by orders of magnitude with the noise level, while the step has the scale of the latents, and
becomes smaller as the picture settles. The step is measured at unit size (over h), where flow, DDPM and Karras form
agree; in the last, most of a step is that all latents shrink. A strength of 0.1 moves latents by a tenth of each step,
whatever judge, scheduler and number of steps. Nor are they measured by the step of classifier-free guidance, which a
callback does not see and calls without guidance do not have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prism.backbone import Backbone, Conditioning, Ragged, prediction
from prism.backbone.arguments import embedded_rows, normalised
from prism.backbone.pipeline import config_of
from prism.errors import PrismError, whole
from prism.judge.checks import noise_levels
from prism.judge.gradient import gradient_of, score_gradient
from prism.sampling import arguments, edits
from prism.sampling.guidance import Guidance, check_guided, guidance_of
from prism.sampling.looks import DEFAULT_JUDGE_AT
from prism.sampling.plan import Plan, generator_of, judging_noise

if TYPE_CHECKING:
    from prism.backbone.steps import Steps
    from prism.sampling.recording import Recording

_SCALED = ("euler", "edm")  # clocks whose denoisers take divided latents
_Counted = Callable[[int, int], AbstractContextManager[Any]]


class Guide:
    """Guidance of the calls of one prompt, by a judge.

    Args:
        guidance: its settings.
        judge: a `Judge` on the pipeline that is guided.
        prompt: what the videos show; None where the call gives embeddings.
        call: the pipeline's arguments.
        weights: by dimension, where `guidance.by` says none.

    Raises:
        PrismError: where the pipeline takes no callback, or its denoiser or scheduler cannot be guided.
    """

    def __init__(
        self,
        guidance: Guidance,
        judge: Any,
        prompt: str | None,
        call: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not hasattr(judge, "combined") or not hasattr(judge, "taps"):
            raise PrismError(
                f"guidance_by_judge needs a judge that reads hidden states, and found {type(judge).__name__}; load one "
                "with Judge.from_pretrained(head, pipe)."
            )
        backbone: Backbone = judge.backbone
        if guidance.by is not None:
            weights = arguments.ranking(judge, guidance.by, "by of guidance_by_judge")
        self.weights = arguments.ranking(judge, "overall") if not weights else dict(weights)
        if not backbone.takes("callback_on_step_end"):
            raise PrismError(
                f"{type(backbone.pipe).__name__} takes no callback_on_step_end, through which the judge would guide "
                "it; leave guidance_by_judge out."
            )
        if backbone.family.counts_steps_by_calls and not prediction.is_handed(backbone.pipe):
            raise PrismError(
                f"{type(backbone.pipe).__name__} steps copies of its scheduler, so that a callback does not see the "
                "noise level of its latents; leave guidance_by_judge out."
            )
        edits.check(backbone, {}, 2)
        backbone.family.check_scheduler(backbone.pipe.scheduler)
        self.judge, self.backbone, self.prompt = judge, backbone, prompt
        self.call = {name: value for name, value in call.items() if not name.startswith("callback_on_step_end")}
        level = arguments.judge_at_of(guidance.judge_at, DEFAULT_JUDGE_AT, backbone.t_range)
        if guidance.look == "ahead":
            noise_levels(backbone, [level])
        self.guidance, self.level = guidance, level
        self.counted: _Counted = lambda rows, blocks: nullcontext()
        self._conditions: dict[tuple[int, ...], Conditioning | Ragged] = {}

    def line(self) -> str:
        """The line of Python that makes the guidance, its weights included."""
        by = next(iter(self.weights)) if list(self.weights.values()) == [1.0] else self.weights
        return repr(replace(self.guidance, by=None if by == "overall" else by))

    def rows(self, steps: Steps) -> tuple[float, ...]:
        """The denoiser rows of guidance per candidate, at each of a call's steps."""
        self.check_steps(len(steps))
        if not steps.levels:
            raise PrismError(
                f"The noise levels of {type(self.backbone.pipe).__name__}'s steps are not those of its scheduler's "
                "timesteps, so that a callback does not know them; leave guidance_by_judge out."
            )
        share = self.guidance.passes() * self.judge.tap / self.backbone.num_blocks
        after = (*steps.levels[1:], None)
        return tuple(share if self.pushes_after(number, len(steps), t) else 0.0 for number, t in enumerate(after, 1))

    def pushes_after(self, step: int, count: int, t: float | None) -> bool:
        """True if a push follows a step of `count`, whose latents are at level t (None: unknown) afterwards."""
        first, last = self.guidance.steps or (2, count - 1)
        low, high = self.backbone.t_range
        readable = self.guidance.look == "ahead" or t is None or low <= t <= high
        return self.guidance.strength > 0 and first <= step <= min(last, count - 1) and readable

    def check_steps(self, count: int) -> None:
        """Raise PrismError where no step of a call of `count` is among those that pushes follow."""
        if self.guidance.strength and count < 3:
            raise PrismError(
                "guidance_by_judge pushes after step 2 at the earliest, and never after the last, and the call has "
                f"{count} step{'s' * (count > 1)}; leave it out, or take 3 steps or more."
            )
        if self.guidance.steps is not None and self.guidance.steps[0] >= count:
            raise PrismError(
                f"guidance_by_judge begins after step {self.guidance.steps[0]}, and the call has steps 1 to {count}, "
                "after whose last nothing follows; let it begin earlier."
            )

    def course(self, seeds: Sequence[int], generators: Sequence[torch.Generator | None]) -> Guided:
        """The guidance of one call, whose rows have these seeds and generators."""
        if self.guidance.strength:
            self.condition(seeds)  # before the call, so that what cannot be read is said before any work
        return Guided(self, seeds, generators)

    def condition(self, seeds: Sequence[int]) -> Conditioning | Ragged:
        """The conditioning of rows with these seeds."""
        draws = self.backbone.draws_conditions(self.call)
        key = tuple(seeds) if draws else (len(seeds),)
        if key not in self._conditions:
            prompts = [self.prompt or ""] * len(seeds)
            with torch.inference_mode(False):
                self._conditions[key] = self.backbone.condition(prompts, seeds if draws else None, **self.call)
        return self._conditions[key]

    def gradient(
        self, scheduler: Any, timestep: Any, step: int, latents: Tensor, clean: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """The gradient (B, ...) of the score after a step: of its latents, or of the clean ones that it predicts."""
        backbone, guidance = self.backbone, self.guidance
        condition, t = self.condition(seeds), level_after(backbone, scheduler, timestep)
        if hasattr(self.judge, "check_level"):
            self.judge.check_level(t if guidance.look == "now" else self.level)

        def backward(total: Tensor, source: Tensor) -> Tensor:
            with self.counted(len(source), self.judge.tap * (2 if guidance.checkpointed else 1)):
                return gradient_of(total, source)

        def of(source: Tensor, level: float, noisy: Callable[[Tensor], Tensor]) -> Tensor:
            return score_gradient(
                self.judge, source, condition, level, self.weights, noisy, guidance.checkpointed, backward
            )[1]

        if guidance.look == "now":
            scale = self._scale(scheduler, latents, timestep)
            return of(latents, t, lambda source: backbone.main(source) * scale)
        generator, gradients = judging_noise(step, "guidance"), []
        for _ in range(guidance.num_draws):
            shape = backbone.main(clean).shape
            noise = torch.randn((1, *shape[1:]), generator=generator).to(clean).expand(shape)

            def noised(source: Tensor, noise: Tensor = noise) -> Tensor:
                return backbone.add_noise(backbone.main(source), self.level, noise)

            gradients.append(of(clean, self.level, noised))
        return torch.stack(gradients).mean(0)

    def _scale(self, scheduler: Any, latents: Tensor, timestep: Any) -> float:
        """The number by which the loop's latents after a step are multiplied for the denoiser."""
        if self.backbone.family.clock not in _SCALED:
            return 1.0
        following = scheduler.timesteps[_index(scheduler, timestep)]
        scaled: Tensor = scheduler.scale_model_input(torch.ones_like(latents[:1]), following)
        return float(scaled.flatten()[0])


class Guided:
    """One call that is guided.

    Args:
        guide: of its prompt.
        seeds: per row.
        generators: per row, those of the call.
    """

    def __init__(self, guide: Guide, seeds: Sequence[int], generators: Sequence[torch.Generator | None]) -> None:
        self.guide, self.seeds, self.generators = guide, list(seeds), list(generators)
        self.before: Tensor | None = None
        self.states: list[Tensor | None] = []
        self.warned = False

    def after_step(
        self,
        pipe: Any,
        step: int,
        timestep: Any,
        latents: Tensor,
        rows: Sequence[int] | None = None,
        recordings: Mapping[int, Recording] | None = None,
    ) -> Tensor:
        """The latents (B, ...) to go on with after a step, counted from 1.

        rows: those that are pushed; None: all. recordings: by row, where its earlier pushes are kept.
        """
        scheduler, count = pipe.scheduler, getattr(pipe, "num_timesteps", None)
        count = count if isinstance(count, int) else len(scheduler.timesteps)
        self.guide.check_steps(count)
        states = [None if each is None else each.get_state() for each in self.generators]
        drawn = any(a is not None and b is not None and not torch.equal(a, b) for a, b in zip(self.states, states))
        if drawn and self.guide.guidance.look == "ahead" and self.guide.guidance.strength:
            raise PrismError(
                f"The steps of {type(scheduler).__name__} draw noise, so that the clean latents that they predict are "
                'not seen; guide by look="now", which is the default, or set another scheduler.'
            )
        pushed, corrected = latents, getattr(scheduler, "last_sample", None)
        if not isinstance(corrected, Tensor) or corrected.shape != latents.shape:
            corrected = None
        before = self.before if corrected is None else corrected
        t = None if step >= count else level_after(self.guide.backbone, scheduler, timestep)
        if before is not None and t is not None and self.guide.pushes_after(step, count, t):
            was, now = edits.levels(scheduler, timestep)
            which = list(range(len(latents))) if rows is None else list(rows)
            kept = [recordings[row] for row in which] if recordings else []
            push = self._pushes(scheduler, timestep, step, latents[which], before[which], (was, now), which, kept)
            pushed = latents.clone()
            pushed[which] = (latents[which].to(push) + push).to(latents.dtype)
            if corrected is not None:  # see `Editor`: as if the run had come from there
                place = 1 if config_of(scheduler).get("predict_x0", True) else 0
                scheduler.last_sample = corrected.clone()
                scheduler.last_sample[which] += (was[place] / now[place] * push).to(corrected.dtype)
        self.before = pushed.detach().clone()
        self.states = states
        return pushed

    def _pushes(
        self,
        scheduler: Any,
        timestep: Any,
        step: int,
        latents: Tensor,
        before: Tensor,
        levels: tuple[edits.Level, edits.Level],
        which: Sequence[int],
        recordings: Sequence[Recording],
    ) -> Tensor:
        """The pushes (B, ...), taken from the recordings where they were computed for the same latents."""
        found = [recording.push(step, latents[row]) for row, recording in enumerate(recordings)]
        missing = [row for row in range(len(latents)) if not found or found[row] is None]
        wide = torch.promote_types(latents.dtype, torch.float32)
        pushes = torch.empty(latents.shape, dtype=wide, device=latents.device)
        for row, push in enumerate(found):
            if push is not None:
                pushes[row] = push.to(pushes)
        if missing:
            z, old = latents[missing].to(wide), before[missing].to(wide)
            (alpha, sigma), (alpha_now, sigma_now) = levels
            clean = (sigma * z - sigma_now * old) / (alpha_now * sigma - alpha * sigma_now)
            seeds = [self.seeds[which[row]] for row in missing]
            gradient = self.guide.gradient(scheduler, timestep, step, z, clean, seeds)
            size, size_now = math.hypot(alpha, sigma), math.hypot(alpha_now, sigma_now)
            scaled = self._scaled(gradient, z - old * (size_now / size))
            pushes[missing] = torch.where(z == old, torch.zeros_like(scaled), scaled)  # given frames stay
            for row in missing if recordings else ():
                recordings[row].keep_push(step, latents[row], pushes[row])
        return pushes

    def _scaled(self, gradient: Tensor, stepped: Tensor) -> Tensor:
        """Gradients (B, ...) clipped, and scaled to `strength` lengths of the steps (B, ...); zero where not finite."""
        flat, guidance = gradient.flatten(1), self.guide.guidance
        fine = flat.isfinite().all(1)
        if not bool(fine.all()) and not self.warned:
            self.warned = True
            warnings.warn(
                "The gradient of the judge's score holds NaN or infinity, and the step is left as it is; sample in a "
                "wider dtype.",
                stacklevel=2,
            )
        flat = torch.where(fine[:, None], flat, torch.zeros_like(flat))
        if guidance.clip is not None:
            most = guidance.clip * flat.square().mean(1, keepdim=True).sqrt()
            flat = torch.minimum(torch.maximum(flat, -most), most)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        unit = torch.where(length > 0, flat / length, torch.zeros_like(flat))
        steps = torch.linalg.vector_norm(stepped.flatten(1), dim=1, keepdim=True)
        pushes: Tensor = (guidance.strength * steps * unit).view_as(gradient)
        return pushes


def guides_of(
    value: Any,
    plan: Plan,
    judge: Any,
    prompts: Sequence[str | None],
    calls: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float],
) -> list[Guide | None]:
    """A guide per prompt by the argument `guidance_by_judge`; Nones without it. Raises PrismError as `Guide` does."""
    guidance = guidance_of(value)
    if guidance is None:
        return [None] * len(prompts)
    check_guided(type(plan))
    return [Guide(guidance, judge, prompt, call, weights) for prompt, call in zip(prompts, calls)]


def _index(scheduler: Any, timestep: Any) -> int:
    """The position of the next timestep, after the step at `timestep`, which the scheduler has just made."""
    index = getattr(scheduler, "step_index", None)
    return [float(t) for t in scheduler.timesteps].index(float(timestep)) + 1 if index is None else int(index)


def level_after(backbone: Backbone, scheduler: Any, timestep: Any) -> float:
    """The noise level in [0, 1000] of the latents after a step."""
    following = float(scheduler.timesteps[_index(scheduler, timestep)])
    return backbone.family.t_of(scheduler, following * backbone.family.pure_noise_timestep / 1000)


def guided(
    judge: Any, guidance: Guidance | float, prompt: str | None = None, seed: int = 0, **call: Any
) -> dict[str, Any]:
    """The arguments of a stock call that a judge guides: `pipe(**prism.sampling.guided(judge, 0.1, prompt, **call))`.

    They are those of the call, with a generator and a callback. A strength of 0 changes nothing, to the bit.

    Args:
        judge: a `Judge` on the pipeline.
        guidance: its settings, or its strength alone.
        prompt: what the video shows; None where the pipeline takes none or the call gives embeddings.
        seed: of the call's CPU generator.
        **call: the pipeline's other arguments.

    Raises:
        PrismError: for what cannot be guided; during the call, for a denoiser through which no gradient comes.
    """
    settings = guidance_of(guidance)
    if settings is None:
        raise PrismError("guidance is None; give a strength such as 0.1, or a prism.sampling.Guidance.")
    seed = whole("seed", seed, 0, edits.LARGEST_SEED)
    for name in sorted({*arguments.RESERVED, "callback_on_step_end"} & call.keys()):
        raise PrismError(f"The argument {name!r} is set by guided itself; leave it out.")
    call = normalised(call)
    guide = Guide(settings, judge, prompt, call)
    guide.backbone.check_call([prompt or ""], call)
    generator = generator_of(seed)
    text = {"prompt": prompt} if guide.backbone.family.takes_prompts and not embedded_rows(call) else {}
    whole_call = {**call, **text, "generator": generator}
    if settings.strength:
        guide.rows(guide.backbone.steps({**whole_call, "generator": generator_of(seed)}))  # said before any work
    course = guide.course([seed], [generator])

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": course.after_step(pipe, step + 1, timestep, tensors["latents"])}

    return {**whole_call, "callback_on_step_end": callback}
