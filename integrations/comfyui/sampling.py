"""Runs of ComfyUI's own sampler: paused where a judge looks at a candidate, and later resumed exactly by replay.

Each candidate is a run of its own, with the noise of its seed, as KSampler would make it. A run that goes on after a
pause begins anew, and the model's answers of its first calls are those that were recorded: they are not computed again,
and whatever the sampler remembers or draws is as in a run without a pause. So the winner is, bit for bit, the latent
that KSampler gives for its seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Tokens
from prism.errors import PrismError
from prism.sampling.plan import judging_noise

from .judge import LoadedJudge
from .reading import KEY, Tapped

LOOKS = ("now", "ahead", "ahead-conditional")


class Paused(Exception):
    """The end of a run at a cut."""


@dataclass(eq=False)
class Candidate:
    """A seed, and what its run has given so far.

    recorded: the model's answers by call, a list with the predicted clean latents (1, C, ...) of each pass, on the CPU;
    None for a pass that the call leaves out.
    looks: one per cut that it came to: {"step", "t", "scores"}. clean: the last predicted clean latents.
    """

    seed: int
    recorded: list[list[Tensor | None]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    clean: Tensor | None = None
    dropped_at: int | None = None

    def forget(self) -> None:
        """Free the recorded answers of a candidate that goes no further."""
        self.recorded = []


@dataclass(frozen=True)
class Call:
    """The arguments of ComfyUI's KSampler that all candidates share.

    latent: the LATENT dictionary, of one sample. last_step: the step to end at, with `leftover` noise, as KSampler
    (Advanced) has it for models of two parts; None: the end.
    """

    positive: Any
    negative: Any
    latent: Mapping[str, Any]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    last_step: int | None = None
    leftover: bool = False


class Runs:
    """Runs of the sampler on a clone of a model, with the judge's hooks.

    Args:
        patcher: ComfyUI's MODEL. call: what all runs share; None: for `judged` alone.
        judge_at, num_draws, seed: the level, number and seed of the noise in which predicted clean latents are judged.

    Raises:
        PrismError: where the judge does not fit the model, or the latent holds several samples.
    """

    def __init__(
        self,
        patcher: Any,
        judge: LoadedJudge,
        call: Call | None = None,
        judge_at: float = 700.0,
        num_draws: int = 2,
        seed: int = 0,
    ) -> None:
        from comfy import sample
        from comfy.patcher_extension import WrappersMP

        self.judge, self.call, self.judge_at, self.num_draws, self.seed = judge, call, judge_at, num_draws, seed
        if "easycache" in patcher.model_options.get("transformer_options", {}):
            raise PrismError(
                "The model has a step cache (EasyCache or LazyCache), whose answers need a run without pauses; take "
                "that node off, or put it onto the model of a KSampler behind."
            )
        self.reader = judge.reader(patcher)
        self.model = patcher.clone()
        self.reader.install(self.model)
        for kind, wrapper in (
            (WrappersMP.SAMPLER_SAMPLE, self._run),
            (WrappersMP.PREDICT_NOISE, self._predict),
            (WrappersMP.CALC_COND_BATCH, self._answer),
        ):
            self.model.add_wrapper_with_key(kind, KEY, wrapper)
        if call is not None:
            fix: Any = sample.fix_empty_latent_channels
            scales = [
                call.latent.get(name) for name in list(inspect.signature(fix).parameters)[2:]
            ]  # of later versions
            self.samples = fix(patcher, call.latent["samples"], *scales)
            if len(self.samples) != 1:
                raise PrismError(
                    f"The latent holds {len(self.samples)} samples, and each candidate is one with a seed of its own; "
                    "give a latent with batch_size 1, and as many seeds as you want candidates."
                )
        self._candidate = Candidate(0)
        self._calls = 0  # of the model, since the run began
        self._pause: int | None = None
        self._look = "now"
        self._alone = False  # True while the conditional pass stands for both
        self._answered, self._rows = 0, 0.0  # calls that the model answered, and the rows that they took

    # -- what nodes call

    def look(self, candidate: Candidate, step: int, how: str) -> None:
        """Run a candidate to a step (from 1) and judge it there; adds to its `looks`."""
        assert self.call is not None
        looked = len(candidate.looks)
        self._sample(candidate, step, how)
        if len(candidate.looks) == looked:
            raise PrismError(
                f"The sampler {self.call.sampler_name} came to its end before step {step}, where the plan cuts; cut "
                "earlier, or take another sampler."
            )

    def finish(self, candidate: Candidate) -> Tensor:
        """The latents (1, C, ...) of a candidate's whole run, as KSampler returns them."""
        latents = self._sample(candidate, None, "now")
        candidate.forget()
        return latents

    def judged(self, latents: Tensor, positive: Any, t: float) -> list[Tensor]:
        """Scores (num_dimensions,) of finished latents (1, C, ...) at noise level t, by draw of the noise.

        The noise of a draw is the same for all latents of a shape, so that what it adds to their scores cancels.
        """
        from comfy import sample, samplers

        generator, draws = judging_noise(self.seed), []
        for _ in range(self.num_draws):
            noise = torch.randn(latents.shape, generator=generator)
            self._begin(Candidate(0), 1, "now")
            sampler, sigmas = samplers.sampler_object("euler"), torch.tensor([t / 1000, 0.0])
            sample.sample_custom(
                *(self.model, noise, 1.0, sampler, sigmas, positive, positive, latents), disable_pbar=True, seed=0
            )
            (seen,) = self._candidate.looks
            draws.append(torch.tensor([seen["scores"][name] for name in self.judge.dimensions]))
        return draws

    def rows_of_one(self) -> float:
        """The model rows of a run without cuts, such as the one that was made last."""
        return self._calls * self._rows / max(1, self._answered)

    # -- runs

    def _begin(self, candidate: Candidate, pause: int | None, how: str) -> None:
        self._candidate, self._pause, self._look = candidate, pause, how
        self._calls, self._alone = 0, False

    def _sample(self, candidate: Candidate, pause: int | None, how: str) -> Tensor:
        from comfy import sample, utils

        assert self.call is not None
        self._begin(candidate, pause, how)
        call, seed = self.call, candidate.seed
        noise = sample.prepare_noise(self.samples, seed, call.latent.get("batch_index"))
        latents: Tensor = sample.sample(
            *(self.model, noise, call.steps, call.cfg, call.sampler_name, call.scheduler),
            *(call.positive, call.negative, self.samples),
            denoise=call.denoise,
            last_step=call.last_step,
            force_full_denoise=not call.leftover,
            noise_mask=call.latent.get("noise_mask"),
            disable_pbar=not utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return latents

    # -- ComfyUI's wrappers

    def _run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a whole run: one that is paused ends here, with its noise in place of samples."""
        try:
            return executor(*args, **kwargs)
        except Paused:
            return args[4] if len(args) > 4 else kwargs["noise"]

    def _answer(self, executor: Any, model: Any, conds: list[Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of a call's passes: recorded, or given from the recording, so that guidance and what follows it run as ever.

        Where the judge reads, and where the conditional pass stands for all, that pass alone is computed.
        """
        if self.reader.active or self._alone:
            answers = executor(model, conds[:1], x, *args, **kwargs)
            return [answers[0]] * len(conds)
        candidate, number = self._candidate, self._calls
        self._calls += 1
        if number < len(candidate.recorded):
            return [
                torch.zeros_like(x) if each is None else each.to(x, copy=True) for each in candidate.recorded[number]
            ]
        before = self.reader.rows
        answers = executor(model, conds, x, *args, **kwargs)
        self._answered, self._rows = self._answered + 1, self._rows + self.reader.rows - before
        if self._pause is not None:
            kept = [None if cond is None else each.detach() for cond, each in zip(conds, answers)]
            candidate.recorded.append([None if each is None else each.to("cpu", copy=True) for each in kept])
        return answers

    def _predict(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of the model's guided answer, the predicted clean latents; at a cut the judge looks, and the run ends."""
        if self.reader.active or self._alone:
            return executor(x, timestep, *args, **kwargs)
        options = args[0] if args else kwargs["model_options"]
        sigmas, sigma = options["transformer_options"]["sample_sigmas"], float(timestep.flatten()[0])
        step = max(1, int((sigmas[:-1] >= sigma * (1 - 1e-5)).sum()))
        candidate = self._candidate
        if self._pause is None or step < self._pause:
            clean: Tensor = executor(x, timestep, *args, **kwargs)
            candidate.clean = clean.detach().to("cpu", copy=True)
            return clean
        if self._look == "now":
            scores, t = self.judge.scores(self._tapped(executor, x, timestep, args, kwargs))[0], 1000 * sigma
        else:
            self._alone = self._look == "ahead-conditional"
            try:
                clean = executor(x, timestep, *args, **kwargs)
            finally:
                self._alone = False
            candidate.clean = clean.detach().to("cpu", copy=True)
            scores, t = self._ahead(executor, clean, timestep, args, kwargs), self.judge_at
        self.judge.note_level(t)
        by_name = dict(zip(self.judge.dimensions, scores.tolist()))
        candidate.looks.append({"step": step, "t": t, "look": self._look, "scores": by_name})
        raise Paused

    def _ahead(self, executor: Any, clean: Tensor, timestep: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Scores (num_dimensions,) of predicted clean latents, re-noised to `judge_at`: the mean over draws."""
        level = executor.class_obj.inner_model.model_sampling
        generator, sigma = judging_noise(self.seed), torch.full_like(timestep, self.judge_at / 1000)
        total = torch.zeros(len(self.judge.dimensions))
        for _ in range(self.num_draws):
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            noisy = level.noise_scaling(sigma, noise, clean)
            total += self.judge.scores(self._tapped(executor, noisy, sigma, args, kwargs))[0]
        return total / self.num_draws

    def _tapped(self, executor: Any, x: Tensor, timestep: Tensor, args: Any, kwargs: Any) -> Tokens:
        try:
            with self.reader.reading():
                executor(x, timestep, *args, **kwargs)
        except Tapped as tapped:
            return tapped.tokens
        raise PrismError(
            f"The model's call did not come to block {self.reader.taps[-1]}, which the judge reads after: another node "
            "answers in its place (a cache, or a replaced block); take that node off this model."
        )


def ranked(candidates: Sequence[Candidate], weights: Mapping[str, float]) -> list[Candidate]:
    """Candidates by the weighted sum of their last look's scores, best first; equal ones by position, NaN last."""

    def worth(candidate: Candidate) -> float:
        value = sum(weight * candidate.looks[-1]["scores"][name] for name, weight in weights.items())
        return value if value == value and abs(value) != float("inf") else -float("inf")

    worths = {candidate: worth(candidate) for candidate in candidates}
    if all(value == -float("inf") for value in worths.values()):
        raise PrismError("No candidate has a finite score: the model gives NaN or infinity; take another dtype for it.")
    return sorted(candidates, key=lambda candidate: -worths[candidate])
