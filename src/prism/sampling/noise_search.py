"""Searches among noises near the good ones: latent beams, evolution, and zero-order search around the best noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prism.backbone.steps import Steps
from prism.errors import PrismError, number, whole
from prism.report.wording import Row
from prism.sampling.arguments import MAX_N
from prism.sampling.particles import (
    Branching,
    Population,
    checked_keep,
    in_words,
    parted,
    rng_of,
    seed_of,
    step_list,
)
from prism.sampling.plan import Candidate, Edit, Schedule, Workload, weighted
from prism.sampling.resampling import Particles

if TYPE_CHECKING:
    from prism.sampling.search import Search


@dataclass(frozen=True, kw_only=True)
class LatentBeams(Population):
    """Diffusion latent beam search (DLBS, Oshima et al. 2025, arXiv 2501.19252, Algorithm 1).

    At each search step every beam parts into candidates by fresh noise, each candidate is judged by the clean latents
    that the denoiser predicts of it at the next search step (the paper's look-ahead with one step, T' = 1; re-noised to
    `judge_at` here, decoded there), and the best `num_beams` of all go on. The first pool are the n seeds, where the
    paper starts from as many noises as beams. One candidate of each beam goes on as the deterministic sampler takes it.

    num_beams: the paper's B. num_candidates: children per beam, K; None: n over B. search_schedule: the steps; None:
    three in a row from a fifth of the steps on; the paper searches at every step. weight: the share of fresh noise. If
    the sampler draws noise of its own, children differ from the second step on: leave a step between search steps.
    """

    strategy = "beam"

    num_beams: int = 2
    num_candidates: int | None = None
    search_schedule: Sequence[int] | None = None
    weight: float = 0.7

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> LatentBeams:
        number("weight", self.weight, 0, 1, above=True)
        checked_keep(self.keep)
        if self.num_candidates is not None:
            whole("num_candidates", self.num_candidates, 1, MAX_N)
        if self.search_schedule is not None:
            step_list("search_schedule", self.search_schedule)
        if not top_k <= whole("num_beams", self.num_beams) <= n:
            raise PrismError(f"num_beams is {self.num_beams}; it must be from {top_k} (top_k) to {n}, the candidates.")
        return self

    def steps(self, load: Workload) -> tuple[int, ...]:
        count = len(load.calls)
        first = max(1, round(0.2 * count))
        steps = (
            range(first, max(first + 1, min(first + 3, count)))
            if self.search_schedule is None
            else self.search_schedule
        )
        return step_list("search_schedule", steps, count)

    def sizes(self, load: Workload) -> tuple[int, ...]:
        pool = self.num_beams * self._children(load.n)
        return (load.n, *[pool] * (len(self.steps(load)) - 1), self.num_beams)

    def _children(self, n: int) -> int:
        return max(1, n // self.num_beams) if self.num_candidates is None else self.num_candidates

    def next(
        self,
        search: Search,
        step: int,
        alive: Sequence[Candidate],
        scores: Mapping[Candidate, Sequence[float]],
        memory: Particles,
    ) -> list[Candidate]:
        """The children of the best beams; after the last step the beams themselves."""
        beams = search.rank(step, self.level, scores, self.num_beams, alive, look="ahead")
        if step == self.steps(search.load)[-1]:
            return beams
        children = self._children(len(search.candidates))
        pool = parted(search, [beam for beam in beams for _ in range(children)], step, self.weight)
        search.share(pool)
        return pool

    @staticmethod
    def how(row: Row) -> str:
        return in_words("beams", row)


@dataclass(frozen=True, kw_only=True)
class Evolution(Population):
    """Evolution of noise, after EvoSearch (He et al. 2025, arXiv 2505.17618, section 4 and its code).

    At each step of the schedule the population is judged; its elite goes on as it is, and children take the place of
    the rest: each has the best of a random 90 % of the population as its parent, and fresh noise in the place of a part
    of its own. The paper samples the whole population to the end for each judgement; here the clean latents that the
    denoiser predicts at that step are judged, so that generations cost no steps of their own. At the initial noise,
    where the paper starts, a prediction shows nothing.

    evolution_schedule: the steps; None: after a fifth, two and three fifths. population_size_schedule: sizes of the
    populations after each of them; None: n. elite_size: members that go on as they are. mutation_rate: the share of
    fresh noise; the paper's 0.2 at the initial noise, and its sampler's own noise later.
    """

    strategy = "evolution"

    evolution_schedule: Sequence[int] | None = None
    population_size_schedule: Sequence[int] | None = None
    elite_size: int = 2
    mutation_rate: float = 0.5

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Evolution:
        number("mutation_rate", self.mutation_rate, 0, 1, above=True)
        checked_keep(self.keep)
        if self.evolution_schedule is not None:
            step_list("evolution_schedule", self.evolution_schedule)
        try:
            schedule = () if self.population_size_schedule is None else self.population_size_schedule
            sizes = [whole("A population's size", size, 1, MAX_N) for size in schedule]
        except TypeError:
            raise PrismError("population_size_schedule is a list of sizes such as [8, 4].") from None
        if not 1 <= whole("elite_size", self.elite_size) <= min([n, *sizes]):
            raise PrismError(
                f"elite_size is {self.elite_size}; it must be from 1 to {min([n, *sizes])}, the smallest population."
            )
        return self

    def steps(self, load: Workload) -> tuple[int, ...]:
        count = len(load.calls)
        steps = self.evolution_schedule
        if steps is None:
            steps = sorted({max(1, round(share * count)) for share in (0.2, 0.4, 0.6)})
        steps = step_list("evolution_schedule", steps, count)
        sizes = self.population_size_schedule
        if sizes is not None and len(sizes) != len(steps):
            raise PrismError(
                f"population_size_schedule has {len(sizes)} sizes for the {len(steps)} steps of evolution_schedule; "
                "give one per step."
            )
        return steps

    def sizes(self, load: Workload) -> tuple[int, ...]:
        return load.n, *(self.population_size_schedule or [load.n] * len(self.steps(load)))

    def next(
        self,
        search: Search,
        step: int,
        alive: Sequence[Candidate],
        scores: Mapping[Candidate, Sequence[float]],
        memory: Particles,
    ) -> list[Candidate]:
        """The elite, and children of parents that are drawn by tournament."""
        overall = weighted(scores, search.judge.dimensions, search.weights)
        order = sorted(scores, key=lambda candidate: (-overall[candidate], candidate))
        size = self.sizes(search.load)[self.steps(search.load).index(step) + 1]
        elite, rng, parents = order[: self.elite_size], rng_of(search, "tournament", step), []
        for _ in range(size - len(elite)):
            drawn = rng.permutation(len(order))[: max(1, int(0.9 * len(order)))]
            parents.append(order[min(drawn)])
        children = [
            search.branch(parent, Edit(step, seed_of(search, "mutation", step, position), self.mutation_rate))
            for position, parent in enumerate(parents)
        ]
        losers = [candidate for candidate in order if candidate not in elite]
        search.close(step, self.level, scores, elite, losers, sorted(set(alive) - set(scores)))
        search.share([*elite, *children])
        return [*elite, *children]

    @staticmethod
    def how(row: Row) -> str:
        return in_words("evolved", row)


@dataclass(frozen=True, kw_only=True)
class ZeroOrder(Branching):
    """Zero-order search (Ma et al. 2025, arXiv 2501.09732, section 3.2): neighbours of the best noise, again and again.

    The pivot is the best of the n seeds, where the paper starts from one. In each round `neighbors` part from it by a
    little fresh noise after the step `edited_step`, and the best of these and the pivot is the next pivot. Instead of
    finished samples, the clean latents that the denoiser predicts at `judged_step` are judged, re-noised to `judge_at`;
    the winner alone goes on from there. Noise is replaced after a step and not before the first one, because a stock
    call draws its initial noise itself; after step 1 it has hardly changed, and the neighbours share that step.

    iterations: the rounds. neighbors: candidates per round. radius: the share of fresh noise. edited_step, judged_step:
    from 1; None: a fifth of the steps, at least one after `edited_step`. If the sampler draws noise of its own,
    neighbours differ from the second step after it on: judge no earlier.
    """

    strategy = "zero-order"

    iterations: int = 2
    neighbors: int = 4
    radius: float = 0.3
    edited_step: int = 1
    judged_step: int | None = None

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> ZeroOrder:
        number("radius", self.radius, 0, 1, above=True)
        for name, most in (("iterations", MAX_N), ("neighbors", MAX_N), ("edited_step", None)):
            whole(name, getattr(self, name), 1, most)
        if self.judged_step is not None and whole("judged_step", self.judged_step) <= self.edited_step:
            raise PrismError(
                f"judged_step is {self.judged_step}, and noise is edited after step {self.edited_step}; judge later."
            )
        return self

    def settled(self, load: Workload, steps: Steps | None = None) -> ZeroOrder:
        if self._judged(load) > len(load.calls):
            raise PrismError(
                f"Candidates would be judged at step {self._judged(load)}, and the run has {len(load.calls)}."
            )
        return self

    def _judged(self, load: Workload) -> int:
        return max(self.edited_step + 1, round(0.2 * len(load.calls))) if self.judged_step is None else self.judged_step

    def parts_at(self, load: Workload) -> int:
        return self.edited_step

    def cuts(self, load: Workload) -> Schedule:
        return ((self._judged(load), load.top_k),) * (1 + self.iterations)

    def rows(self, load: Workload) -> float:
        """The seeds up to the judged step; of neighbours the steps after the edited one; then the winners alone.

        If the sampler draws noise of its own, neighbours share one step more with the pivot.
        """
        judged = self._judged(load)
        rows = load.n * sum(load.calls[:judged]) + self.judging(load.n, load)
        each = self.neighbors * sum(load.calls[self.edited_step : judged]) + self.judging(self.neighbors, load)
        return rows + self.iterations * each + load.top_k * sum(load.calls[judged:])

    def winners(self, search: Search) -> list[Candidate]:
        step, seen = self._judged(search.load), list(search.candidates)
        scores = self.ahead(search, seen, step)
        best = search.rank(step, self.level, scores, search.top_k, seen, look="ahead")
        for iteration in range(self.iterations):
            seeds = [seed_of(search, "neighbor", iteration, position) for position in range(self.neighbors)]
            around = [search.branch(best[0], Edit(self.edited_step, seed, self.radius)) for seed in seeds]
            search.share([*best, *around])
            scores = {each: scores[each] for each in best} | self.ahead(search, around, step)
            best = search.rank(step, self.level, scores, search.top_k, [*best, *around], look="ahead")
        return best

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().settings(scores), "schedule": [[scores[-1]["step"], len(scores[-1]["kept"])]]}

    @staticmethod
    def how(row: Row) -> str:
        return in_words("noises near the best one", row)
