"""Plans replayed on recorded scores: which plans there are for n candidates, what each picks, what each costs.

A plan that only reads and drops candidates never changes what one of them would have become. So once every candidate
was sampled to the end and scored wherever a plan may look, the pick of each such plan is table arithmetic, for any
subset of the candidates. Plans that change candidates, or sample them otherwise, are not replayed (`not_replayed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from typing import Literal, NamedTuple

import numpy as np

from prism.backbone.steps import Steps
from prism.errors import PrismError
from prism.sampling.looks import DEFAULT_JUDGE_AT
from prism.sampling.plan import Plan, Workload
from prism.sampling.strategies import STRATEGIES, Early, First, Full

MOST_SUBSETS = 200
"""Subsets of the candidates over which a plan of fewer of them is averaged: all of them, or as many at random."""
KEEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of candidates, and of survivors of a first cut, that are tried."""
UNRECORDED = {
    "draft": "its drafts are other samples than the recorded ones",
    "race": "it draws as much noise as it needs",
    "early, ahead-conditional": "stores hold what the denoiser predicts with guidance",
}
"""Plans that no table of recorded scores replays, and why; of others, see `not_replayed`."""


class Reading(NamedTuple):
    """One thing that was judged of every candidate.

    look: "now" (latents z_t at a step), "ahead" (clean latents predicted there, re-noised) or "finished" (final
    latents, re-noised). step: the scheduler's, from 1; 0 for finished ones. t: the noise level that was judged.
    draw: the number of the noise draw, from 0.
    """

    look: Literal["now", "ahead", "finished"]
    step: int
    t: float
    draw: int


@dataclass(frozen=True, eq=False)
class Table:
    """Recorded candidates of some prompts.

    values: (P, n) float64, what a pick is worth: the reward of each candidate's finished video.
    scores: by reading, (P, n) float64, the judge's deciding score.
    """

    values: np.ndarray
    scores: Mapping[Reading, np.ndarray]

    def __post_init__(self) -> None:
        drawn: dict[tuple[str, int], dict[float, list[int]]] = {}
        for look, step, t, draw in self.scores:
            drawn.setdefault((look, step), {}).setdefault(t, []).append(draw)
        object.__setattr__(self, "_drawn", drawn)
        object.__setattr__(self, "_means", {})

    @property
    def n(self) -> int:
        """The number of candidates per prompt."""
        return int(self.values.shape[1])

    @property
    def oracle(self) -> np.ndarray:
        """(P,) the gain of the best candidate over the mean of all, which is what a random pick gets."""
        best: np.ndarray = self.values.max(1) - self.values.mean(1)
        return best

    def steps(self, look: str) -> list[int]:
        """The steps at which a look was recorded."""
        return sorted(step for kind, step in self._drawn if kind == look)  # type: ignore[attr-defined]

    def levels(self, look: str) -> dict[float, int]:
        """The noise levels of a look at every step, with the number of draws."""
        found = [levels for (kind, _), levels in self._drawn.items() if kind == look]  # type: ignore[attr-defined]
        common = [t for t in found[0] if all(t in levels for levels in found)] if found else []
        return {t: min(len(levels[t]) for levels in found) for t in common}

    def score(self, look: str, step: int, t: float | None = None, num_draws: int = 1) -> np.ndarray:
        """(P, n) float64, means over the first `num_draws` draws; t None: the only level there is.

        Raises PrismError where that was not recorded.
        """
        key = (look, step, t, num_draws)
        means: dict[tuple[str, int, float | None, int], np.ndarray] = self._means  # type: ignore[attr-defined]
        if key not in means:
            levels = self._drawn.get((look, step), {})  # type: ignore[attr-defined]
            level = next(iter(levels), None) if t is None else t
            if level not in levels or len(levels[level]) < num_draws:
                raise PrismError(
                    f"The table holds no scores {look} at step {step}, level {level}, with {num_draws} draws."
                )
            means[key] = np.mean([self.scores[Reading(look, step, level, d)] for d in range(num_draws)], 0)  # type: ignore[arg-type]
        return means[key]

    def of(self, prompts: np.ndarray) -> Table:
        """The table of some prompts, by index."""
        return Table(self.values[prompts], {reading: scores[prompts] for reading, scores in self.scores.items()})


@dataclass(frozen=True)
class Run:
    """A plan for n candidates."""

    n: int
    plan: Plan


# -- which plans there are


def sizes(n: int) -> list[int]:
    """Numbers of candidates, from 2 to n: all up to 8, then fewer and fewer."""
    return sorted({*range(2, min(n, 8) + 1), *(size for size in KEEPS if 2 <= size <= n), *([n] if n > 1 else [])})


def schedules(n: int, steps: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Schedules of one or two cuts at some of the steps, which end with one of n candidates."""
    for step in steps:
        yield ((step, 1),)
    for first, second in combinations(steps, 2):
        for keep in KEEPS[1:]:
            if keep < n:
                yield ((first, keep), (second, 1))


def blind(table: Table) -> Iterator[Run]:
    """One candidate: the plain sample that all others are compared with."""
    yield Run(1, First())


def looking_now(table: Table) -> Iterator[Run]:
    """Early, by the latents as they are; step 1 is left out, which is pure noise."""
    for n in sizes(table.n):
        for cuts in schedules(n, [step for step in table.steps("now") if step > 1]):
            yield Run(n, Early(schedule=cuts, look="now"))


def looking_both_ways(table: Table) -> Iterator[Run]:
    """Early with two cuts, one of which looks ahead, at every level and number of draws that were recorded."""
    both = [step for step in table.steps("now") if step > 1 and step in table.steps("ahead")]
    for n in sizes(table.n):
        for cuts in schedules(n, both):
            for t, draws in table.levels("ahead").items() if len(cuts) > 1 else ():
                for num_draws in range(1, draws + 1):
                    yield Run(n, Early(schedule=cuts, look=("now", "ahead"), judge_at=t, num_draws=num_draws))
                    yield Run(n, Early(schedule=cuts, look=("ahead", "now"), judge_at=t, num_draws=num_draws))


def looking_ahead(table: Table) -> Iterator[Run]:
    """Early, by predicted clean latents, at every level and number of draws that were recorded."""
    for n in sizes(table.n):
        for cuts in schedules(n, table.steps("ahead")):
            for t, draws in table.levels("ahead").items():
                for num_draws in range(1, draws + 1):
                    yield Run(n, Early(schedule=cuts, look="ahead", judge_at=t, num_draws=num_draws))


def finished(table: Table) -> Iterator[Run]:
    """Full, at every level and number of draws that were recorded."""
    for n in sizes(table.n):
        for t, draws in table.levels("finished").items():
            for num_draws in range(1, draws + 1):
                yield Run(n, Full(judge_at=t, num_draws=num_draws))


GENERATORS: list[Callable[[Table], Iterable[Run]]] = [blind, looking_now, looking_ahead, looking_both_ways, finished]
"""Every kind of plan that is compared: a further one is a function here, and its scores in `deciding`."""


def not_replayed() -> dict[str, str]:
    """The strategies that judge and cannot be replayed, and why."""
    judging = [name for name, kind in STRATEGIES.items() if kind.needs_judge() and kind not in (Early, Full)]
    return {**dict.fromkeys(judging, "its candidates part from the recorded ones"), **UNRECORDED}


def candidates(table: Table) -> list[Run]:
    """Every plan that the table can replay."""
    return [run for generate in GENERATORS for run in generate(table)]


# -- what they pick, and what they cost


def deciding(table: Table, plan: Plan, step: int) -> np.ndarray:
    """The scores (P, n) by which a plan cuts at a step. Raises PrismError for a plan that no table replays."""
    if isinstance(plan, Full):
        return table.score("finished", 0, plan.judge_at, plan.num_draws)
    if isinstance(plan, Early) and plan.look_at(step) == "ahead":
        return table.score("ahead", step, plan.judge_at, plan.num_draws)
    if isinstance(plan, Early) and plan.look_at(step) == "now":
        return table.score("now", step)
    raise PrismError(f"A plan of the strategy {plan.strategy} cannot be replayed from recorded scores.")


def subsets(n: int, size: int, seed: int = 0, most: int = MOST_SUBSETS) -> np.ndarray:
    """Subsets of n candidates, (S, size) int64, in rising order: all of them, or `most` different ones at random."""
    if comb(n, size) <= most:
        return np.array(list(combinations(range(n), size)), dtype=np.int64)
    random, chosen = np.random.default_rng([seed, n, size]), set[tuple[int, ...]]()
    while len(chosen) < most:
        chosen.add(tuple(sorted(random.choice(n, size, replace=False).tolist())))
    return np.array(sorted(chosen), dtype=np.int64)


def picks(table: Table, plan: Plan, members: np.ndarray, load: Workload) -> np.ndarray:
    """The candidates that a plan picks.

    members: (S, N) int64, subsets of the candidates in rising order; of equal scores the first wins, as in a run.
    Returns (P, S) int64.
    """
    settled = plan.settled(replace(load, n=members.shape[1]))
    alive = np.broadcast_to(members, (len(table.values), *members.shape))
    for step, keep in settled.cuts(replace(load, n=members.shape[1])):
        scores = np.take_along_axis(deciding(table, settled, step)[:, None], alive, -1)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., :keep]
        alive = np.sort(np.take_along_axis(alive, best, -1), -1)
    first: np.ndarray = alive[..., 0]
    return first


def gains(table: Table, run: Run, load: Workload, seed: int = 0) -> np.ndarray:
    """(P,) float64: the mean value of the picks over subsets of `run.n` candidates, less that of a random pick."""
    if run.plan.looks_at is None:
        return np.zeros(len(table.values))
    chosen = picks(table, run.plan, subsets(table.n, run.n, seed), load)
    gain: np.ndarray = np.take_along_axis(table.values, chosen, 1).mean(1) - table.values.mean(1)
    return gain


def rows(run: Run, load: Workload) -> float:
    """The denoiser rows of a run, in closed form."""
    load = replace(load, n=run.n)
    return run.plan.settled(load).rows(load)


def cost(run: Run, load: Workload) -> float:
    """The denoiser rows of a run over those of one plain sample."""
    return rows(run, load) / sum(load.calls)


def largest(load: Workload, budget: float, steps: Steps | None = None, most: int = 10_000) -> Run:
    """The run of the default cut and look with the largest number of candidates that fits a budget in plain samples.

    steps: those of the call; None: the head's denoiser runs all of them.
    """

    def run(n: int) -> Run:
        return Run(n, Early(judge_at=DEFAULT_JUDGE_AT).settled(replace(load, n=n), steps))

    low, high = 1, most + 1  # the cost rises with n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(run(middle), load) <= budget + 1e-9 else (low, middle)
    return run(low) if low > 1 else Run(1, First())
