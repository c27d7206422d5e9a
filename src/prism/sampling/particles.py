"""Populations of candidates that part on the way, and the particle methods among them: fk and prune."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from prism.backbone.steps import Steps
from prism.errors import PrismError, flag, number, quoted, whole
from prism.report import wording
from prism.report.wording import Row
from prism.sampling.plan import Candidate, Edit, JudgedClean, Schedule, Workload, weighted
from prism.sampling.resampling import Particles, Potential, Resampling, effective_sample_size, normalised, resample

if TYPE_CHECKING:
    from prism.sampling.search import Search


def rng_of(search: Search, *what: Any) -> np.random.Generator:
    """A generator for one decision of a search: a function of the run's seed, the prompt and `what`."""
    return np.random.default_rng(seed_of(search, *what))


def seed_of(search: Search, *what: Any) -> int:
    """A seed, see `rng_of`."""
    return random.Random(" ".join(map(str, (search.seed, search.prompt, *what)))).randrange(2**62)


def parted(search: Search, parents: Sequence[Candidate], step: int, weight: float) -> list[Candidate]:
    """Children of the parents after a step, in order, with copies of their recordings.

    A parent goes on as it is; where it is listed again, its children part from it by fresh noise.
    """
    children: list[Candidate] = []
    for position, parent in enumerate(parents):
        edit = Edit(step, seed_of(search, "part", step, position), weight)
        children.append(search.branch(parent, edit) if parent in children else parent)
    return children


def step_list(name: str, steps: Any, num_steps: int | None = None) -> tuple[int, ...]:
    """Steps in rising order, from 1, checked; with `num_steps`, none of them the last or behind it."""
    try:
        listed = tuple(whole(f"A step of {name}", step) for step in steps)
    except TypeError:
        raise PrismError(f"{name} is a list of steps such as [4, 8]; found {quoted(steps, 80)}.") from None
    if not listed or list(listed) != sorted(set(listed)):
        raise PrismError(f"{name} holds one step or more in rising order; found {quoted(list(listed), 80)}.")
    if num_steps is not None and listed[-1] >= num_steps:
        raise PrismError(
            f"{name} has step {listed[-1]}, and the run has steps 1 to {num_steps}: candidates can part before the "
            "last one only."
        )
    return listed


def checked_keep(keep: Any) -> None:
    """Raise PrismError for a `keep` that is neither None nor a positive whole number."""
    if keep is not None:
        whole("keep", keep)


def one_of(name: str, value: Any, kind: Any) -> None:
    """Raise PrismError for a value that is not one of a Literal's."""
    if value not in get_args(kind):
        raise PrismError(f"{name} is one of {', '.join(get_args(kind))}; found {quoted(value, 60)}.")


@dataclass(frozen=True, kw_only=True)
class Branching(JudgedClean):
    """A search that judges clean latents that the denoiser predicts at some steps, and whose candidates part."""

    looks_at = "steps"

    def predicts(self) -> bool:
        return True

    def finals(self, search: Search, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best candidates by their finished latents; all of them where `top_k` are left."""
        if len(candidates) == search.top_k:
            return list(candidates)

        def sample() -> dict[Candidate, Any]:
            for _ in search.sample_all(candidates=candidates, output_type="latent"):
                pass
            return {candidate: search.latents[candidate] for candidate in candidates if candidate in search.latents}

        scores = search.judge_clean(sample, self.level, self.num_draws)
        return search.rank(len(search.load.calls), self.level, scores, search.top_k, candidates)

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().settings(scores), "schedule": [[cut["step"], len(cut["kept"])] for cut in scores]}


@dataclass(frozen=True, kw_only=True)
class Population(Branching):
    """A population that is judged at some steps, where another one of the same lineages takes its place.

    keep: the number of candidates that go on after the last of these steps, the best by their scores there; None: the
    whole population, as in the papers. If more than `top_k` go on, they are sampled to the end and judged there.
    """

    keep: int | None = None

    @abstractmethod
    def steps(self, load: Workload) -> tuple[int, ...]:
        """The steps at which the population is judged. Raises PrismError for none, and for the last step."""

    @abstractmethod
    def sizes(self, load: Workload) -> tuple[int, ...]:
        """The population's size up to each of the steps, and after the last one."""

    @abstractmethod
    def next(
        self,
        search: Search,
        step: int,
        alive: Sequence[Candidate],
        scores: Mapping[Candidate, Sequence[float]],
        memory: Particles,
    ) -> list[Candidate]:
        """The population after a step. memory: the weights of the population's lineages, for those who use them."""

    def settled(self, load: Workload, steps: Steps | None = None) -> Population:
        self.steps(load)
        going = self.going(load)
        if not load.top_k <= going <= self.sizes(load)[-1]:
            raise PrismError(
                f"keep is {self.keep}; it must be from {load.top_k} (top_k) to {self.sizes(load)[-1]}, the candidates "
                "that are left after the last step of the search."
            )
        return self

    def going(self, load: Workload) -> int:
        """The number of candidates that go on after the last step."""
        return self.sizes(load)[-1] if self.keep is None else self.keep

    def parts_at(self, load: Workload) -> int:
        return self.steps(load)[0]

    def cuts(self, load: Workload) -> Schedule:
        (*steps, last), going = self.steps(load), self.going(load)
        end = ((len(load.calls), load.top_k),) if going > load.top_k else ()
        return (*zip(steps, self.sizes(load)[1:]), (last, going), *end)

    def rows(self, load: Workload) -> float:
        """Each population runs from one step to the next and is judged there; a copy takes over its parent's steps."""
        steps, rows, before = self.steps(load), 0.0, 0
        for step, size in zip(steps, self.sizes(load)):
            rows += size * sum(load.calls[before:step]) + self.judging(size, load)
            before = step
        going = self.going(load)
        return rows + going * sum(load.calls[before:]) + (self.judging(going, load) if going > load.top_k else 0.0)

    def winners(self, search: Search) -> list[Candidate]:
        alive, steps, memory = list(search.candidates), self.steps(search.load), self.start(len(search.candidates))
        for step in steps:
            scores = self.ahead(search, alive, step)
            if len(scores) < search.top_k:
                raise search.too_few()
            if step == steps[-1] and self.keep is not None:
                alive = search.rank(step, self.level, scores, self.keep, alive, look="ahead")
            else:
                alive = self.next(search, step, alive, scores, memory)
        return self.finals(search, alive)

    def start(self, n: int) -> Particles:
        """The weights of a population's lineages at the start."""
        return Particles.start(n, "diff", 0.0)


def in_words(what: str, row: Row) -> str:
    """What a row's search did, the steps before the end at which it judged its candidates, and the noise level."""
    steps = [str(step) for step, _ in row["schedule"] or () if step < row["num_inference_steps"]]
    at = f"step{'s' if len(steps) > 1 else ''} {', '.join(steps)}" if steps else wording.MISSING
    return ", ".join(part for part in (f"{what} at {at}", wording.judged_at(row)) if part)


@dataclass(frozen=True, kw_only=True)
class FKSteering(Population):
    """Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848, Algorithm 1): candidates are particles that are
    weighted by potentials of their rewards and resampled on the way.

    The reward is the judge's score of the clean latents that the denoiser predicts at a step, re-noised to `judge_at`.
    Particles that are taken twice part by fresh noise (`prism.sampling.edits`), and the first copy goes on as it was:
    the paper draws fresh noise for all at every step, which a deterministic sampler does not. In the end the paper's
    potential exp(lambda r(x_0)) would resample once more; here the best by that reward win.

    potential_type: "max", "add" or "diff", see `Particles.weigh`. lmbda: the strength of the tilt. resample_frequency,
    resampling_t_start, resampling_t_end: particles are resampled at every `resample_frequency`-th step from the start
    to the end, counted from 1; None: a fifth of the steps, from a fifth to four fifths. adaptive_resampling: resample
    only where the effective sample size is below half the particles; otherwise weights are carried on.
    resampling: "systematic", or the paper's "multinomial". weight: the share of fresh noise; 0.7 is about one step of
    DDIM with eta = 1 in 20 steps.
    """

    strategy = "fk"

    potential_type: Potential = "max"
    lmbda: float = 10.0
    resample_frequency: int | None = None
    resampling_t_start: int | None = None
    resampling_t_end: int | None = None
    adaptive_resampling: bool = False
    resampling: Resampling = "systematic"
    weight: float = 0.7

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> FKSteering:
        one_of("potential_type", self.potential_type, Potential)
        one_of("resampling", self.resampling, Resampling)
        number("lmbda", self.lmbda, 0)
        number("weight", self.weight, 0, 1, above=True)
        flag("adaptive_resampling", self.adaptive_resampling)
        for name in ("resample_frequency", "resampling_t_start", "resampling_t_end"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        checked_keep(self.keep)
        return self

    def steps(self, load: Workload) -> tuple[int, ...]:
        count = len(load.calls)
        fifth = max(1, round(0.2 * count))
        every = fifth if self.resample_frequency is None else self.resample_frequency
        start = fifth if self.resampling_t_start is None else self.resampling_t_start
        end = max(start, min(count - 1, 4 * fifth)) if self.resampling_t_end is None else self.resampling_t_end
        if start > end:
            raise PrismError(f"resampling_t_start is {start}, and resampling_t_end before it, {end}; swap them.")
        return step_list("The resampling", range(start, end + 1, every), count)

    def sizes(self, load: Workload) -> tuple[int, ...]:
        return (load.n,) * (len(self.steps(load)) + 1)

    def start(self, n: int) -> Particles:
        return Particles.start(n, self.potential_type, self.lmbda)

    def next(
        self,
        search: Search,
        step: int,
        alive: Sequence[Candidate],
        scores: Mapping[Candidate, Sequence[float]],
        memory: Particles,
    ) -> list[Candidate]:
        """The particles after a step: resampled, or the same where adaptive resampling sees no need."""
        overall = weighted(scores, search.judge.dimensions, search.weights)
        memory.weigh(np.array([overall.get(candidate, np.nan) for candidate in alive]))
        weights = memory.weights()
        lost = len(scores) < len(alive)
        if self.adaptive_resampling and not lost and effective_sample_size(weights) >= len(alive) / 2:
            children, parents = list(alive), list(alive)
        else:
            ancestors = resample(weights, self.resampling, rng_of(search, "resample", step))
            parents = [alive[ancestor] for ancestor in ancestors]
            children = parted(search, parents, step, self.weight)
            memory.take(ancestors)
        losers = sorted(set(scores) - set(parents), key=lambda candidate: (-overall[candidate], candidate))
        search.close(step, self.level, scores, {*parents}, losers, sorted(set(alive) - set(scores)))
        search.share(children)
        return children

    @staticmethod
    def how(row: Row) -> str:
        return in_words("particles resampled", row)


@dataclass(frozen=True, kw_only=True)
class Prune(Branching):
    """Reward-guided resampling and pruning (LatSearch, Zhao et al. 2026, arXiv 2603.14526, section 3.3 and its code).

    Candidates are the first seed and its variants. At each search step as many as are left are drawn by the softmax of
    their rewards over `temperature`, and only the distinct ones go on; after the last one the best by the sum of these
    probabilities over the steps. The reward is the judge's score of the clean latents that the denoiser predicts,
    re-noised to `judge_at`; the paper's own latent reward reads the noisy ones.

    beta: the noise of a variant is sqrt(1 - beta²) times the first seed's and beta times fresh one, as in the paper; it
    is edited after step 1. None: the n seeds take the place of variants. temperature: of the softmax. search_schedule:
    steps from 1; None: after 20, 30 and 40 % of the steps, the paper's 10, 15 and 20 of 50.
    """

    strategy = "prune"

    beta: float | None = 0.1
    temperature: float = 1.0
    search_schedule: Sequence[int] | None = None

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Prune:
        if self.beta is not None:
            number("beta", self.beta, 0, 1, above=True)
        number("temperature", self.temperature, 0, above=True)
        if self.search_schedule is not None:
            step_list("search_schedule", self.search_schedule)
        return self

    def settled(self, load: Workload, steps: Steps | None = None) -> Prune:
        self.steps(load)
        return self

    def steps(self, load: Workload) -> tuple[int, ...]:
        """The search steps. Raises PrismError for the last step of the run."""
        count = len(load.calls)
        steps = self.search_schedule
        if steps is None:
            steps = sorted({max(1 + (self.beta is not None and count > 2), round(share * count))
                            for share in (0.2, 0.3, 0.4)})  # fmt: skip
        return step_list("search_schedule", steps, count)

    def parts_at(self, load: Workload) -> int:
        return 0 if self.beta is None else 1

    def cuts(self, load: Workload) -> Schedule:
        *steps, last = self.steps(load)
        return (*((step, load.n) for step in steps), (last, load.top_k))

    def rows(self, load: Workload) -> float:
        """The rows to expect where the judge finds all candidates alike; fewer are left the better it tells them."""
        counts = [float(load.n)]
        for _ in self.steps(load)[1:]:
            counts.append(counts[-1] * (1 - (1 - 1 / counts[-1]) ** counts[-1]))
        return self.rows_of(load, counts)

    def rows_of(self, load: Workload, counts: Sequence[float]) -> float:
        """The rows of a run in which this many candidates were judged at each search step."""
        rows, before = 0.0, 0
        for step, count in zip(self.steps(load), counts):
            rows += count * (sum(load.calls[before:step]) + self.num_draws * load.tap_share)
            before = step
        return rows + load.top_k * sum(load.calls[before:])

    def winners(self, search: Search) -> list[Candidate]:
        alive = list(search.candidates)
        if self.beta is not None:
            first = alive[0]
            edits = [Edit(1, seed_of(search, "variant", position), self.beta) for position in range(1, len(alive))]
            alive = [first, *(search.branch(first, edit) for edit in edits)]
            search.share(alive)
        chances, steps = dict.fromkeys(alive, 0.0), self.steps(search.load)
        for step in steps:
            scores = self.ahead(search, alive, step)
            if len(scores) < search.top_k:
                raise search.too_few()
            overall = weighted(scores, search.judge.dimensions, search.weights)
            living = [candidate for candidate in alive if candidate in scores]
            weights = normalised(np.array([overall[candidate] for candidate in living]) / self.temperature)
            for candidate, weight in zip(living, weights):
                chances[candidate] += float(weight)
            drawn = {living[i] for i in resample(weights, "multinomial", rng_of(search, "resample", step))}
            order = sorted(living, key=lambda each: (each not in drawn, -chances[each], each))
            going = search.top_k if step == steps[-1] else max(len(drawn), search.top_k)
            survivors, losers = order[:going], order[going:]
            search.close(step, self.level, scores, survivors, losers, sorted(set(alive) - set(scores)))
            search.share(survivors)
            alive = survivors if step == steps[-1] else sorted(survivors)
        return alive

    @staticmethod
    def how(row: Row) -> str:
        return in_words("resampled and pruned", row)
