"""The two nouns of a search: the candidate, and the plan with its cuts, checks and cost in closed form."""

from __future__ import annotations

import operator
import random
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from prism.backbone.steps import passes
from prism.errors import PrismError, quoted, whole

if TYPE_CHECKING:
    from torch import Tensor

    from prism.backbone import Backbone
    from prism.backbone.steps import Steps
    from prism.report.wording import Role, Row
    from prism.sampling.looks import Look
    from prism.sampling.search import Search

CFG = Literal["two_calls", "one_batch"]

# (step, keep): after the conditional evaluation of the 1-based scheduler step, keep that many candidates.
Schedule = tuple[tuple[int, int], ...]


def generator_of(seed: int) -> torch.Generator:
    """A generator at the start of a seed's noise, on the CPU: the same numbers on every device."""
    return torch.Generator("cpu").manual_seed(seed)


def judging_noise(seed: int, key: str = "judge") -> torch.Generator:
    """The generator of the noise with which a run judges clean latents, from the run's seed and a word for its use.

    Not the seed's own: the first candidate's noise must not be the noise that all are judged with.
    """
    return generator_of(random.Random(f"{key} {seed}").randrange(2**62))


@dataclass(frozen=True, order=True)
class Edit:
    """Fresh noise for a candidate after a step of its run; `prism.sampling.edits` applies it.

    step: the scheduler's step, from 1, whose latents are edited. seed: the edit's own noise is drawn from it.
    weight: the share of that noise in the latents' noise, in [0, 1]; 0 changes nothing.
    """

    step: int
    seed: int
    weight: float


@dataclass(frozen=True, order=True)
class Candidate:
    """A possible video: a seed, and the edits that its run goes through.

    Candidates are ordered by `index`, then by their edits; ties in score go to the first. The index, a seed's position
    among the seeds of a run, keeps two candidates apart that were given the same seed.
    """

    index: int
    seed: int
    edits: tuple[Edit, ...] = ()

    def branch(self, edit: Edit) -> Candidate:
        """The candidate that parts from this one by one more edit."""
        return replace(self, edits=(*self.edits, edit))


def weighted(
    scores: Mapping[Candidate, Sequence[float]], names: Sequence[str], weights: Mapping[str, float]
) -> dict[Candidate, float]:
    """The weighted sum of each candidate's scores, whose columns have these names; weights by name."""
    return {c: sum(weights.get(name, 0.0) * value for name, value in zip(names, row)) for c, row in scores.items()}


def parse(text: str) -> Schedule:
    """A schedule from text: "5:1" keeps one candidate at step 5, "3:4,6:1" four at step 3 and one at step 6."""
    try:
        return tuple((int(step), int(keep)) for step, keep in (part.split(":") for part in text.split(",")))
    except ValueError:
        raise PrismError(
            f'The schedule "{quoted(text, 80)}" is not a list of STEP:KEEP; write for example 5:1 or 3:4,6:1.'
        ) from None


def keep_one(step: int) -> Schedule:
    """Keep a single candidate at `step`."""
    return ((step, 1),)


def halving(n: int, first: int, every: int = 1) -> Schedule:
    """Halve the candidates at step `first` and every `every` steps after it, until one is left."""
    if n < 1 or first < 1 or every < 1:
        raise PrismError(f"halving takes positive n, first and every; found {n}, {first} and {every}.")
    cuts, step = [], first
    while n > 1:
        n = (n + 1) // 2
        cuts.append((step, n))
        step += every
    return tuple(cuts) or keep_one(first)


def default(num_steps: int, top_k: int = 1) -> Schedule:
    """Keep `top_k` candidates after a fifth of the steps (step 10 of 50 in the paper's Table 2)."""
    return ((max(1, round(0.2 * num_steps)), top_k),)


def is_blind(schedule: Schedule) -> bool:
    """True if the first cut comes at step 1, where the latents are pure noise and a judge can see nothing."""
    return schedule[0][0] == 1


def warn_blind(schedule: Schedule, n: int, num_steps: int) -> None:
    """Warn if the first cut drops candidates by pure noise, see `is_blind`."""
    if is_blind(schedule) and schedule[0][1] < n:
        later = "Cut later (schedule), or take" if num_steps > 1 else "Take more steps, or"
        warnings.warn(
            f"The first cut comes at step 1 of {num_steps}, which sees pure noise: it drops candidates at "
            f"random. {later} the strategy full or draft.",
            stacklevel=3,
        )


def resolve(
    schedule: Sequence[Sequence[int]], n: int, num_steps: int, top_k: int = 1, last: int | None = None
) -> Schedule:
    """The schedule, checked against n candidates and a run of `num_steps`, and ending with `top_k` candidates.

    If the last cut keeps more than `top_k`, a cut to `top_k` is added at step `last` (None: the run's last step).
    Raises PrismError for a schedule that is empty or out of order, that cuts before the first or after the last step,
    or that keeps fewer than `top_k` candidates or more than are left.
    """
    cuts: list[tuple[int, int]] = []
    try:
        listed = None if isinstance(schedule, Mapping | bytes) else list(schedule)
    except Exception:  # iteration over an object of any library may raise anything
        listed = None
    if listed is None:
        raise PrismError(f"The schedule is a list of cuts such as [(5, 1)]; found {quoted(schedule, 80)}.")
    for cut in listed:
        try:
            step, keep = (whole("a cut", value, None) for value in cut)
        except (PrismError, TypeError, ValueError):
            raise PrismError(
                f"A cut of the schedule is a pair of whole numbers (step, keep); found {quoted(cut, 80)}."
            ) from None
        cuts.append((step, keep))
    if not cuts:
        raise PrismError("The schedule is empty; give at least one cut, for example [(5, 1)].")
    alive, previous = n, 0
    for step, keep in cuts:
        if step < 1 or step > num_steps:
            has = "counts its steps from 1" if num_steps == sys.maxsize else f"has steps 1 to {num_steps}"
            raise PrismError(f"The schedule cuts at step {step}, and the run {has}.")
        if step <= previous:
            raise PrismError(f"The schedule cuts at step {step} after step {previous}; put the cuts in rising order.")
        if keep < 1:
            raise PrismError(f"The schedule keeps {keep} candidates at step {step}; keep at least 1.")
        if keep > alive:
            raise PrismError(f"The schedule keeps {keep} candidates at step {step}, and only {alive} are left by then.")
        if keep < top_k:
            raise PrismError(f"The schedule keeps {keep} candidates at step {step}, and top_k asks for {top_k}.")
        alive, previous = keep, step
    last = max(previous, num_steps if last is None else last)
    if alive > top_k and previous == last:
        cuts[-1] = (last, top_k)
    elif alive > top_k:
        cuts.append((last, top_k))
    return tuple(cuts)


def cut_rows(
    alive: int, keep: int, cfg: CFG, guided: bool | int, tap_share: float, listens: bool = True
) -> tuple[float, bool]:
    """The rows that the step of a cut from `alive` to `keep` costs, and True if its scores are read by a probe.

    guided: True if an unconditional pass runs as well as the conditional one, or the number of passes in all.

    There are two ways to read the scores. Listening to the conditional pass costs that pass for all candidates; a
    second, unconditional call then runs the survivors only. A probe runs the conditional rows up to the tap,
    `tap_share` = k/L of a row each, and then the survivors in full. The cheaper of the two is taken; always the probe
    if the denoiser is compiled as a whole (`listens` is false).
    """
    calls = 1 + guided if isinstance(guided, bool) else guided
    listening = alive + (calls - 1) * keep if cfg == "two_calls" else calls * alive
    probing = alive * tap_share + calls * keep
    return (probing, True) if probing < listening or not listens else (float(listening), False)


def ahead_rows(alive: int, keep: int, cfg: CFG, calls: int, conditional: bool) -> float:
    """The rows that a look ahead at a step of `calls` passes costs, without its judging, if `keep` of `alive` go on.

    conditional: the prediction is that of the conditional pass alone, so that losers take no other. In one batch with
    the unconditional rows, the survivors' conditional rows are computed again.
    """
    if not conditional or calls == 1:
        return float(alive * calls)
    return float(alive + (calls - (cfg == "two_calls")) * keep)


@dataclass(frozen=True)
class Workload:
    """The part of a run's cost that its plan does not decide: the number of candidates and the cost of each.

    n: the number of candidates. top_k: the number of them that are finished.
    calls, draft_calls: denoiser passes (groups of rows) per step of the run and of a draft.
    cfg: guidance as a second call, or as a second group of rows.
    tap_share: k/L, the share of a row that a judge runs to score one latent by itself. listens: see `cut_rows`.
    looks: the look that a cut takes by default at each step; empty: "now" at all.
    guidance: rows of a judge's guidance per candidate that makes a step; empty: none is guided.
    """

    n: int
    calls: Sequence[int]
    cfg: CFG = "two_calls"
    tap_share: float = 0.0
    draft_calls: Sequence[int] = ()
    top_k: int = 1
    listens: bool = True
    looks: tuple[Look, ...] = ()
    guidance: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        call: Mapping[str, Any],
        n: int,
        tap: int,
        steps: Steps | None = None,
        drafted: Steps | None = None,
        top_k: int = 1,
    ) -> Workload:
        """The workload of `n` candidates; without `steps`, of the number of steps that the call asks for."""
        share, draft_calls = tap / backbone.num_blocks, () if drafted is None else drafted.calls
        if steps is None:
            calls: Sequence[int] = (passes(backbone, call),) * backbone.num_inference_steps(dict(call))
        else:
            calls = steps.calls
        listens = backbone.listens and not backbone.family.read_arguments
        return cls(n, calls, backbone.family.cfg, share, draft_calls, top_k, listens)


@dataclass(frozen=True)
class Plan(ABC):
    """A strategy with its settings.

    A strategy is a class derived from this one and an entry of `prism.sampling.strategies.STRATEGIES`. Its fields are
    the arguments of `best_of_n` that it takes.

    strategy: its name. looks_at: the thing by which it compares candidates: hidden states during the run ("steps"),
    coarse runs ("drafts"), latents at the end ("finished"), decoded videos ("videos"), or nothing (None). role: its
    role in a report.
    """

    strategy: ClassVar[str]
    looks_at: ClassVar[Literal["steps", "drafts", "finished", "videos"] | None] = None
    role: ClassVar[Role] = ""

    @classmethod
    def needs_judge(cls) -> bool:
        """True if a judge scores the candidates."""
        return cls.looks_at in ("steps", "drafts", "finished")

    @classmethod
    def needs_oracle(cls) -> bool:
        """True if a function of the caller scores the candidates' videos."""
        return cls.looks_at == "videos"

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Plan:
        """The plan with its defaults filled in, checked against all that is known before any work.

        num_steps: the number of steps that the call asks for; the scheduler may make another number.
        """
        return self

    def fitted(self, backbone: Backbone) -> Plan:
        """The plan with what the pipeline's family decides. Raises PrismError where it does not fit the pipeline."""
        return self

    def settled(self, load: Workload, steps: Steps | None = None) -> Plan:
        """The plan with its cuts resolved against the steps that the run makes."""
        return self

    def predicts(self) -> bool:
        """True if it judges clean latents that the denoiser predicts on the way."""
        return False

    def listened(self, load: Workload) -> list[int]:
        """The steps of its cuts that judge noisy latents as they stand, which the head's own denoiser must run."""
        return [] if self.predicts() else [step for step, _ in self.cuts(load)]

    def parts_at(self, load: Workload) -> int:
        """The first step after which candidates part by edits; 0 if they never do."""
        return 0

    def drafts(self) -> int:
        """The number of steps of the coarse runs that it judges; 0 if it makes none."""
        return 0

    @abstractmethod
    def winners(self, search: Search) -> list[Candidate]:
        """The best `top_k` candidates, best first."""

    def adapts(self) -> bool:
        """True if a run's cost depends on what is sampled, so that `rows` are the most that it may take."""
        return False

    @abstractmethod
    def rows(self, load: Workload) -> float:
        """The denoiser rows of a run, in closed form; its cuts must be settled."""

    def completing(self, load: Workload) -> Sequence[int] | None:
        """The number of candidates that make each step to its end; None for plans whose runs a judge cannot guide."""
        return None

    def guidance_rows(self, load: Workload) -> float:
        """The denoiser rows that a judge's guidance adds to `rows`, its backward passes included."""
        return float(sum(map(operator.mul, load.guidance, self.completing(load) or ())))

    def decodes(self, load: Workload) -> int:
        """The VAE decodes of a run."""
        return load.top_k

    def cuts(self, load: Workload) -> Schedule:
        """The cuts (step, keep) at which candidates are ranked; for finished ones, the last step."""
        return () if self.looks_at is None else ((len(load.calls), load.top_k),)

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The settings that a row of metrics.json records of a run, from its result's `scores`."""
        return {"schedule": None, "draft_steps": None, "judge_at": None}

    @staticmethod
    @abstractmethod
    def how(row: Row) -> str:
        """The settings of a row of metrics.json in words."""

    @staticmethod
    def cut_name(step: int) -> str:
        """A cut in words."""
        return f"step {step}"


@dataclass(frozen=True, kw_only=True)
class JudgedClean(Plan):
    """Clean latents, final or predicted, re-noised to the level `judge_at`, and judged as the mean over `num_draws`.

    judge_at: None stands for the level of `best_of_n`.
    """

    judge_at: float | None = None
    num_draws: int = 2

    @property
    def level(self) -> float:
        """`judge_at`, which a run has filled in."""
        assert self.judge_at is not None
        return self.judge_at

    def judging(self, n: int, load: Workload) -> float:
        """The denoiser rows of judging n candidates."""
        return n * self.num_draws * load.tap_share

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().settings(scores), "judge_at": scores[0]["t"]}

    def best(self, search: Search, sample: Callable[[], Mapping[Candidate, Tensor]]) -> list[Candidate]:
        """The best candidates by the latents that `sample` makes."""
        scores = search.judge_clean(sample, self.level, self.num_draws)
        ((step, keep),) = self.cuts(search.load)
        return search.rank(step, self.level, scores, keep, search.candidates)

    def ahead(
        self, search: Search, candidates: Sequence[Candidate], step: int, conditional: bool = False
    ) -> dict[Candidate, list[float]]:
        """The judge's scores of the clean latents that the denoiser predicts for the candidates at a step."""
        look = partial(search.predict, candidates, step, conditional)
        return search.judge_clean(look, self.level, self.num_draws)
