"""Edits of a candidate on its way: a part of its noise is replaced by fresh noise, in a callback of the stock call.

Let a step lead from z = alpha x + sigma eps to z' = alpha' x + sigma' eps, where x and eps are what the sampler made of
the denoiser's answer; every first-order step has this form, and multistep solvers have it with an extrapolated x. The
latents before and after the step are two equations for x and eps, so that eps is known without asking the denoiser. An
edit of weight w replaces a part of it by fresh noise n:

    z' + sigma' (sqrt(1 - w²) - 1) eps + sigma' w n

This is the step that DDIM takes with a stochasticity of eta > 0 (Song et al. 2021, Eq. 12), and, since -eps / sigma' is
the score, a step of Langevin dynamics: it keeps the law of the latents at that level to first order in w², whatever the
data. For Gaussian data of variance v their variance V = alpha'² v + sigma'² becomes, with c = 1 - sqrt(1 - w²),
V - c² sigma'² alpha'² v / V: at w = 0.5 less than half a percent below. The plain form sqrt(1 - w²) z' + w sqrt(V) n
keeps the law of Gaussian data alone; of a video it would leave alpha'² w² v of noise that the sampler does not expect.
It is used after the first step, where z is not known to a callback and alpha' is small.

A sampler that draws noise of its own at each step is not edited: its generator goes on from the edit's seed, which is
what particle methods do (all that follows is drawn anew, whatever the weight).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone, noise
from prism.backbone.pipeline import config_of
from prism.errors import PrismError, listed, number, quoted, whole
from prism.sampling.plan import Edit, generator_of

Level = tuple[float, float]  # alpha, sigma

LARGEST_SEED = 2**63 - 1  # of torch's generators


def check(backbone: Backbone, call: Mapping[str, Any], step: int) -> None:
    """Raise PrismError for a call whose candidates cannot part after a step; 0: they do not."""
    name, scheduler = type(backbone.pipe).__name__, type(backbone.pipe.scheduler).__name__
    if step and not backbone.takes("callback_on_step_end"):
        raise PrismError(
            f"{name} takes no callback_on_step_end, through which candidates part on the way; take the strategy early "
            "or full."
        )
    if step and scheduler == "DPMSolverSinglestepScheduler":
        raise PrismError(
            f"The steps of {scheduler} go back to latents of earlier steps, so that candidates cannot part on the way; "
            "set another scheduler, or take the strategy early or full."
        )
    names = ("image", "last_image", "video", "conditions", "reference_conditions")
    given = [argument for argument in names if call.get(argument) is not None]
    if step == 1 and given:
        raise PrismError(
            f"Candidates would part after step 1, where the frames of {given[0]!r} cannot be told from noise; let them "
            "part at step 2 or later."
        )


def levels(scheduler: Any, timestep: Any) -> tuple[Level, Level]:
    """(alpha, sigma) of the loop's latents before and after the step at `timestep`, which the scheduler has just made.

    After the last step, whose latents are clean, both are those of clean latents.
    """
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = [float(t) for t in scheduler.timesteps].index(float(timestep)) + 1
    if getattr(scheduler, "sigmas", None) is not None and hasattr(scheduler, "step_index"):
        before, after = (_of_sigma(scheduler, scheduler.sigmas[i]) for i in (index - 1, index))
        return before, after
    steps = [int(t) for t in scheduler.timesteps[index - 1 : index + 1]]
    kept = [float(scheduler.alphas_cumprod[t]) for t in steps] + [1.0]
    first, second = ((share**0.5, (1 - share) ** 0.5) for share in kept[:2])
    return first, second


def _of_sigma(scheduler: Any, sigma: Tensor) -> Level:
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(torch.as_tensor(sigma))
        return float(alpha), float(sigma)
    value = float(sigma)
    if "flow" in noise.forms(scheduler):
        return (value, 1 - value) if config_of(scheduler).get("invert_sigmas") else (1 - value, value)
    return 1.0, value


def part_replaced(
    latents: Tensor, before: Tensor | None, fresh: Tensor, weight: float, was: Level, now: Level
) -> Tensor:
    """Latents in whose noise the share `weight` is replaced by `fresh`: see the module's text.

    before: the latents before the step, or None after the first one. Positions that the step left as they were, such as
    given frames, stay. was, now: (alpha, sigma) before and after the step.
    """
    (alpha, sigma), (alpha_now, sigma_now) = was, now
    z, rest = latents.float(), (1 - weight**2) ** 0.5
    edited: Tensor
    if before is None:
        edited = rest * z + weight * (alpha_now**2 + sigma_now**2) ** 0.5 * fresh
        return edited.to(latents.dtype)
    eps = (alpha_now * before.float() - alpha * z) / (alpha_now * sigma - alpha * sigma_now)
    edited = z + sigma_now * ((rest - 1) * eps + weight * fresh)
    return torch.where(before == latents, latents, edited.to(latents.dtype))


class Editor:
    """The edits of the rows of one call, applied at the end of each step.

    Args:
        edits: per row.
        generators: per row, the call's.
    """

    def __init__(self, edits: Sequence[Sequence[Edit]], generators: Sequence[torch.Generator | None]) -> None:
        self.edits, self.generators = [tuple(row) for row in edits], list(generators)
        self.last = max((edit.step for row in self.edits for edit in row), default=0)
        self.before: Tensor | None = None
        self.states: list[Tensor | None] = []

    def after_step(self, scheduler: Any, step: int, timestep: Any, latents: Tensor) -> Tensor:
        """The latents (rows, ...) to go on with after a step, counted from 1."""
        if step > self.last:
            return latents
        rows = [(row, edit) for row, edits in enumerate(self.edits) for edit in edits if edit.step == step]
        states = [None if each is None else each.get_state() for each in self.generators]
        moved = [old is not None and new is not None and not torch.equal(old, new)
                 for old, new in zip(self.states, states)]  # fmt: skip
        edited = latents
        for row, edit in rows:
            generator = self.generators[row]
            if moved and moved[row] and generator is not None:
                generator.manual_seed(edit.seed)
            elif edit.weight:
                edited = self._replaced(scheduler, row, edit, timestep, edited)
        self.before = edited.detach().clone()
        self.states = [None if each is None else each.get_state() for each in self.generators]
        return edited

    def _replaced(self, scheduler: Any, row: int, edit: Edit, timestep: Any, latents: Tensor) -> Tensor:
        here = slice(row, row + 1)
        old, corrected = latents[here], getattr(scheduler, "last_sample", None)
        if not isinstance(corrected, Tensor) or corrected.shape != latents.shape:
            corrected = None
        before = self.before if corrected is None else corrected
        was, now = levels(scheduler, timestep)
        fresh = torch.randn(old.shape, generator=generator_of(edit.seed)).to(old.device)
        new = part_replaced(old, None if before is None else before[here], fresh, edit.weight, was, now)
        edited, change = latents.clone(), new.float() - old.float()
        edited[here] = new
        if self.before is not None:  # as if the run had come from the other noise: the next edit of this step reads it
            self.before = self.before.clone()
            self.before[here] += (was[1] / now[1] * change).to(self.before.dtype)
        if corrected is not None:  # UniPC corrects its last step from these; x_t = (sigma_t / sigma_s) x_s + ...
            place = 1 if config_of(scheduler).get("predict_x0", True) else 0
            scheduler.last_sample = corrected.clone()
            scheduler.last_sample[here] += (was[place] / now[place] * change).to(corrected.dtype)
        return edited


def edited(seed: int, edits: Iterable[Edit | tuple[int, int, float]]) -> dict[str, Any]:
    """The arguments under which a stock call gives a winner that was edited: `pipe(prompt, **edited(...), **call)`.

    seed, edits: the winner's; an edit may be given as (step, seed, weight).

    Raises:
        PrismError: for a seed or edits that are none; during the call, for an edit after its last step.
    """
    generator = generator_of(whole("seed", seed, 0, LARGEST_SEED))
    row = [_checked(edit) for edit in listed("edits", edits, object, "edits (step, seed, weight)")]
    editor = Editor([row], [generator])

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        count = getattr(pipe, "num_timesteps", None)
        if isinstance(count, int) and editor.last >= count:
            raise PrismError(
                f"The latents are edited after step {editor.last}, and the call has steps 1 to {count}, after whose "
                "last nothing follows; give the call the steps that the edits were found with."
            )
        return {"latents": editor.after_step(pipe.scheduler, step + 1, timestep, tensors["latents"])}

    return {"generator": generator, "callback_on_step_end": callback}


def _checked(edit: Any) -> Edit:
    """An edit, or what stands for one, with its values checked."""
    try:
        step, seed, weight = (edit.step, edit.seed, edit.weight) if isinstance(edit, Edit) else edit
    except (TypeError, ValueError):
        raise PrismError(f"An edit is (step, seed, weight); found {quoted(edit, 80)}.") from None
    return Edit(
        whole("The step of an edit", step),
        whole("The seed of an edit", seed, 0, LARGEST_SEED),
        number("The weight of an edit", weight, 0, 1),
    )
