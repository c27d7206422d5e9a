"""A race: noise draws are added to the candidates that are still contested, and losers go as soon as the lead is sure.

The readings of a candidate at one look are its scores under independent noise draws, the same draws for all candidates.
Given its latents, the differences of two candidates' readings are therefore independent and identically distributed
over draws, so that a test of their mean is a theorem and no model; it is about the judge's expected score at this look.
Readings at successive steps are not independent: each look is a race of its own, and nothing is averaged over steps.

Sources:
    betting: a mixture of test martingales (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
        betting", JRSS B 2024, section 4; Ville's inequality). It holds at all numbers of draws at once.
    bernstein: Theorem 4 of Maurer and Pontil, "Empirical Bernstein bounds and sample variance penalization", COLT 2009,
        with a union bound over the numbers of draws at which it is asked, as Mnih et al. (ICML 2008) race with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from prism.backbone.steps import Steps
from prism.errors import DRAWS, PrismError, choice, flag, number, quoted, whole
from prism.report import wording
from prism.report.wording import Row
from prism.sampling.plan import Candidate, Plan, Schedule, Workload, ahead_rows, default

if TYPE_CHECKING:
    from prism.sampling.search import Search

Bound = Literal["betting", "bernstein"]
_STAKES = np.linspace(0.05, 0.95, 19)  # shares of its wealth that a bettor stakes on each draw

# Readings of candidates, by their positions (c,), at draws (d,): (d, c) float64, NaN where a candidate is broken.
Read = Callable[[Sequence[int], Sequence[int]], np.ndarray]


def is_above(differences: np.ndarray, width: float, delta: float, bound: Bound = "betting", times: int = 1) -> Any:
    """True where the expected difference is sure to be above 0: wrong, where it is not, with probability `delta`.

    Args:
        differences: (draws, ...) float64, independent over draws; those beyond `width` count as `width`, so that what
            is tested is the expectation of the differences so limited, which are bounded for certain.
        width: above 0.
        delta: in (0, 1). With "betting" it bounds the probability to be wrong at any number of draws.
        bound: the test, see above.
        times: the number of times that "bernstein" is asked with more and more draws.

    Returns:
        (...) bool.
    """
    limited, draws = np.clip(differences / width, -1, 1), len(differences)
    if bound == "betting":
        stakes = _STAKES.reshape(-1, *[1] * limited.ndim)
        wealth = np.exp(np.log1p(stakes * limited).sum(1)).mean(0)  # its expectation is at most 1 if the mean is <= 0
        return wealth >= 1 / delta
    if draws < 2:
        return np.zeros(limited.shape[1:], bool)
    log = math.log(2 * times / delta)
    # On [-1, 1], of length 2: sqrt(2 V ln(2/delta) / n) + 7 * 2 ln(2/delta) / (3 (n - 1)).
    radius = np.sqrt(2 * limited.var(0, ddof=1) * log / draws) + 14 * log / (3 * (draws - 1))
    return limited.mean(0) > radius


def race(
    read: Read, n: int, keep: int, delta: float, most: int, each: int, width: float, bound: Bound = "betting"
) -> tuple[list[int], np.ndarray]:
    """Race n candidates; with probability 1 - delta none that belongs to the best `keep` is dropped.

    A candidate is dropped as soon as `keep` others are sure to be better (`is_above`). One of the best can be dropped
    only if one of the others is wrongly thought to be better, which are keep (n - 1) pairs: the union bound.

    Args:
        read: gives the readings.
        n, keep: numbers of candidates, and of those that are looked for.
        delta: probability of an error, in (0, 1).
        most, each: the most draws per candidate, and those that are added at a time.
        width: see `is_above`.
        bound: see `is_above`.

    Returns:
        left: positions of the candidates that are left, the highest mean first; more than `keep` if draws ran out.
        values: (draws, n) all readings, NaN where none was taken.
    """
    living, values = list(range(n)), np.empty((0, n))
    times, share = math.ceil(most / each), delta / (keep * max(1, n - 1))
    for start in range(0, most, each):
        draws = range(start, min(start + each, most))
        new = np.full((len(draws), n), np.nan)
        new[:, living] = read(living, draws)
        values = np.concatenate([values, new])
        living = [c for c in living if np.isfinite(new[:, c]).all()]
        table = values[:, living]
        better = is_above(table[:, :, None] - table[:, None, :], width, share, bound, times).sum(0)  # per candidate
        means = table.mean(0)
        order = sorted(range(len(living)), key=lambda at: (better[at] >= keep, -means[at], at))
        living = [living[at] for place, at in enumerate(order) if place < keep or better[at] < keep]
        if len(living) <= keep:
            break
    return living, values


@dataclass(frozen=True)
class Race(Plan):
    """Candidates judged by the clean latents predicted for them, with draws added until the lead is sure.

    At each look the predicted clean latents are re-noised to `judge_at`; a candidate is dropped when `top_k` others
    have a higher expected score there, with an error of at most `delta` over all looks. Those left at the last look are
    ranked by their mean.

    first, last, every: the looks come at these steps; None: one look, after a fifth of the steps.
    delta: probability, in (0, 1), that a look drops one of the `top_k` with the highest expected score at this look.
    most_draws, each_draws: the most noise draws per candidate and look, and those that are added at a time.
    width: differences of two candidates' scores beyond it count as `width`. The scores are log-odds (Eq. 3): 1 is a
        preference of 73 %.
    bound: the test, see `is_above`.
    conditional: predict by the conditional pass alone, which saves the losers' unconditional one.
    judge_at: noise level; None stands for the level of `best_of_n`.
    """

    strategy, looks_at, role = "race", "steps", "ours"

    first: int | None = None
    last: int | None = None
    every: int = 1
    delta: float = 0.1
    most_draws: int = 32
    each_draws: int = 4
    width: float = 1.0
    bound: Bound = "betting"
    conditional: bool = False
    judge_at: float | None = None

    def predicts(self) -> bool:
        return True

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Race:
        for name, value in (("first", self.first), ("last", self.last), ("every", self.every)):
            if value is not None or name == "every":
                whole(f"{name} of a race", value)
        if self.last is not None and self.last < (self.first or 1):
            raise PrismError(f"A race's last look, at step {self.last}, comes before its first, at {self.first or 1}.")
        most = whole("most_draws", self.most_draws, 1, DRAWS)
        whole("each_draws", self.each_draws, 1, most)
        if number("delta", self.delta, 0, 1, above=True) == 1:
            raise PrismError(f"delta must be a probability above 0 and below 1; found {quoted(self.delta, 80)}.")
        number("width", self.width, 0, above=True)
        choice("bound", self.bound, get_args(Bound))
        flag("conditional", self.conditional)
        return self

    def settled(self, load: Workload, steps: Steps | None = None) -> Race:
        """The plan with its looks. Raises PrismError for a look after the last step."""
        total = len(load.calls)
        ((fifth, _),) = default(total)
        first = (min(fifth, self.last or fifth)) if self.first is None else self.first
        last = first if self.last is None else self.last
        if last > total:
            raise PrismError(f"The race looks at step {last}, and the run has steps 1 to {total}.")
        return replace(self, first=first, last=last)

    def looks(self, load: Workload) -> list[int]:
        """The steps of the looks, rising; the last one always."""
        plan = self.settled(load)
        assert plan.first is not None
        assert plan.last is not None
        return sorted({*range(plan.first, plan.last, plan.every), plan.last})

    def cuts(self, load: Workload) -> Schedule:
        """The looks, with the most candidates that each may keep."""
        steps = self.looks(load)
        return (*((step, load.n) for step in steps[:-1]), (steps[-1], load.top_k))

    def rows(self, load: Workload) -> float:
        """The most denoiser rows that a run may take: nothing is dropped before the last look."""
        rows, done = 0.0, 0
        for step, keep in self.cuts(load):
            rows += load.n * sum(load.calls[done : step - 1]) + load.n * self.most_draws * load.tap_share
            rows += ahead_rows(load.n, keep, load.cfg, load.calls[step - 1], self.conditional)
            done = step
        return rows + load.top_k * sum(load.calls[done:])

    def winners(self, search: Search) -> list[Candidate]:
        alive, steps = list(search.candidates), self.looks(search.load)
        for step in steps:
            alive = self._look(search, alive, step, self.delta / len(steps), step == steps[-1])
            if len(alive) <= search.top_k:
                break
        return alive

    def _look(self, search: Search, alive: list[Candidate], step: int, delta: float, ends: bool) -> list[Candidate]:
        """The candidates that are left after the race at a step, best first; `top_k` of them if it `ends` there."""
        assert self.judge_at is not None
        level, predicted = self.judge_at, search.predict(alive, step, self.conditional)
        weights = [search.weights.get(name, 0.0) for name in search.judge.dimensions]
        readings: dict[Candidate, list[list[float]]] = {candidate: [] for candidate in alive}
        broken: set[Candidate] = set()

        def read(positions: Sequence[int], draws: Sequence[int]) -> np.ndarray:
            contested = [alive[position] for position in positions]
            values = np.full((len(draws), len(positions)), np.nan)
            for row, draw in zip(values, draws):
                local = {each: predicted[each] for each in contested if each in predicted and each not in broken}
                scores = search.judge_clean(partial(dict, local), level, 1, f"race {step} {draw}")
                broken.update(each for each in contested if each not in scores)
                for column, each in enumerate(contested):
                    if each in scores:
                        readings[each].append(scores[each])
                        row[column] = np.dot(weights, scores[each])
            return values

        left, _ = race(read, len(alive), search.top_k, delta, self.most_draws, self.each_draws, self.width, self.bound)
        means = {each: np.mean(rows, 0).tolist() for each, rows in readings.items() if each not in broken}
        survivors = [alive[position] for position in left]
        others = sorted(means.keys() - {*survivors}, key=lambda c: (-len(readings[c]), -np.dot(weights, means[c]), c))
        keep = search.top_k if ends else max(search.top_k, len(survivors))
        look = "ahead-conditional" if self.conditional else "ahead"
        best = search.rank(step, level, means, keep, alive, look=look, order=[*survivors, *others])
        search.scores[-1]["draws"] = [len(readings[each]) for each in search.scores[-1]["candidates"]]
        return best

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        cuts = [[cut["step"], len(cut["kept"])] for cut in scores]
        return {**super().settings(scores), "schedule": cuts, "judge_at": scores[0]["t"], "look": scores[0]["look"]}

    @staticmethod
    def how(row: Row) -> str:
        cuts = [f"step {step} keeps {keep}" for step, keep in row["schedule"] or ()]
        return ", ".join(part for part in ("draws until sure", *cuts, wording.judged_at(row)) if part)
