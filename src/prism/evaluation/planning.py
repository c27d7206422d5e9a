"""The quality of every plan, replayed or played: the front over cost, a plan per budget, what more seeds gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from prism.errors import PrismError
from prism.evaluation.intervals import prompt_interval
from prism.evaluation.measured import Measured, arm_of, steadied
from prism.report.front_plot import Dot, kind_of
from prism.report.plan_rows import ChosenRow, PruneRow, ReplayedRow, RivalRow, SizeRow, Spread
from prism.sampling import plan_files, planner
from prism.sampling.plan import Workload
from prism.sampling.plan_files import settings_of
from prism.sampling.planner import Run, Table
from prism.sampling.strategies import Early, Full

BUDGETS = (1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Budgets in costs of one plain sample for which plans are chosen where none is named."""
NEAR = 1e-9


@dataclass(frozen=True, eq=False)
class Replayed:
    """Every plan, replayed on every prompt, and behind them those that were played on the same prompts.

    costs: (K,) float64 in costs of one plain sample. gains: (K, P) float64, mean value of the picks over subsets of the
    plan's n candidates, less that of a random pick. played: how many of the last plans were played.
    """

    table: Table
    load: Workload
    runs: Sequence[Run]
    costs: np.ndarray
    gains: np.ndarray
    seed: int = 0
    played: int = 0

    @classmethod
    def of(cls, table: Table, load: Workload, seed: int = 0, measured: Measured | None = None) -> Replayed:
        """Replay every plan that the table can replay. Raises PrismError where no candidate is better than another.

        measured: plans that were played on the table's prompts.
        """
        if not table.oracle.any():
            raise PrismError(
                "All candidates of every prompt have the same reward, so that there is nothing to choose; take another "
                "--by, or a reward that tells them apart."
            )
        runs = planner.candidates(table)
        costs = np.array([planner.cost(run, load) for run in runs])
        gains = np.stack([planner.gains(table, run, load, seed) for run in runs])
        if measured is None:
            return cls(table, load, runs, costs, gains, seed)
        costs = np.concatenate([costs, measured.rows / sum(load.calls)])
        gains = np.concatenate([gains, measured.gains])
        return cls(table, load, [*runs, *measured.runs], costs, gains, seed, len(measured.runs))

    @property
    def replays(self) -> int:
        """The number of plans that are replayed; the others were played."""
        return len(self.runs) - self.played

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """The prompts, by index, that choose plans, and those that report them."""
        order = np.random.default_rng([self.seed, 13]).permutation(len(self.table.values))
        return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])

    @cached_property
    def spread(self) -> Spread:
        """How much the reward differs between a prompt's candidates, and between prompts."""
        values = self.table.values
        within = float(values.var(1, ddof=1).mean())
        between = max(0.0, float(values.mean(1).var(ddof=1)) - within / self.table.n)
        return {
            "within": within**0.5,
            "between": between**0.5,
            "best": float(self.table.oracle.mean()) / within**0.5,
            "mean": float(values.mean()),
            "alike": int((np.ptp(values, 1) == 0).sum()),
            "candidates": self.table.n,
            "prompts": len(values),
        }

    def bare(self, index: int, prompts: np.ndarray | None = None) -> ReplayedRow:
        """A plan's costs and gains on some prompts (None: all), without intervals."""
        run, prompts = self.runs[index], np.arange(len(self.table.values)) if prompts is None else prompts
        gain, oracle = self.gains[index, prompts], self.table.oracle[prompts]
        return {
            "name": name(run),
            "how": "replayed" if index < self.replays else "played",
            "strategy": run.plan.strategy,
            "settings": settings_of(run.plan),
            "n": run.n,
            "cost": float(self.costs[index]),
            "denoiser_rows": float(self.costs[index] * sum(self.load.calls)),
            "share": float(gain.sum() / oracle.sum()),
            "share_ci95": None,
            "gain": float(gain.mean()),
            "gain_ci95": None,
            "gain_sd": float(gain.mean()) / self.spread["within"],
            "prompts": len(prompts),
        }

    def row(self, index: int, prompts: np.ndarray | None = None) -> ReplayedRow:
        """A plan's costs and gains on some prompts (None: all), with intervals over prompts."""
        row = self.bare(index, prompts)
        if self.runs[index].plan.looks_at is not None:  # a blind plan's gain is zero by definition
            prompts = np.arange(len(self.table.values)) if prompts is None else prompts
            gain, oracle = self.gains[index, prompts], self.table.oracle[prompts]
            row["share_ci95"] = self._interval(np.stack([gain, oracle], 1), prompts, True)
            row["gain_ci95"] = self._interval(gain, prompts)
        return row

    def front(self) -> list[int]:
        """The plans of which no other is at most as dear and better, by index, from cheap to dear."""
        shares, best, kept = self.gains.mean(1), -np.inf, []
        for index in np.lexsort((-shares, self.costs)):
            if shares[index] > best + NEAR:
                kept.append(int(index))
                best = shares[index]
        return kept

    def best(self, budget: float, prompts: np.ndarray, among: slice = slice(None)) -> int | None:
        """The plan within a budget that gains most on some prompts, by index; of equal ones the cheapest.

        among: the plans to choose from, by index. None where all of them cost more.
        """
        affordable = np.arange(len(self.runs))[among]
        affordable = affordable[self.costs[affordable] <= budget + NEAR]
        if not len(affordable):
            return None
        merit = self.merits(prompts)[affordable]
        return int(affordable[np.lexsort((self.costs[affordable], -np.round(merit, 12)))[0]])

    def merits(self, prompts: np.ndarray) -> np.ndarray:
        """(K,) the gains by which plans are chosen: mean gains on some prompts, steadied by those of similar plans.

        The best of a thousand noisy means is mostly luck. What part of the perfect pick's gain a plan gets, among as
        many candidates, hardly differs between plans that differ little; so that part is averaged over neighbours
        (`_similarity`), and multiplied by the perfect pick's gain. With half of 120 ShapeWorld prompts choosing, 200
        times at random, this chose plans that gain 1.2 points more of the oracle's gain on the other half. A played
        plan gains what the best replayed one of its cost does, and what `measured.steadied` believes of the difference.
        """
        replays = self.runs[: self.replays]
        perfect = np.array([self._perfect[run.n][prompts].mean() for run in replays])
        merits = np.zeros(len(self.runs))
        for members, weights in self._neighbours:
            share = (weights @ self.gains[np.ix_(members, prompts)].mean(1)) / (weights @ perfect[members])
            merits[members] = share * perfect[members]
        if self.played:
            costs, rivals = self.costs[self.replays :], []
            for cost in costs:
                affordable = np.flatnonzero(self.costs[: self.replays] <= max(cost, 1) + NEAR)
                rivals.append(int(affordable[merits[affordable].argmax()]))
            excess = self.gains[self.replays :, prompts] - self.gains[rivals][:, prompts]
            arms = [arm_of(run) for run in self.runs[self.replays :]]
            merits[self.replays :] = merits[rivals] + steadied(excess, costs, arms)
        return merits

    @cached_property
    def _perfect(self) -> dict[int, np.ndarray]:
        """By n, (P,) the gain of the best of n random candidates."""
        ranks, sizes = np.sort(self.table.values, 1)[:, ::-1], {run.n for run in self.runs[: self.replays]}
        return {n: ranks @ _best_of(self.table.n, n) - self.table.values.mean(1) for n in sizes}

    @cached_property
    def _neighbours(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per kind of plan that judges: its plans by index, and their similarities."""
        kinds: dict[tuple[str, str], list[int]] = {}
        for index, run in enumerate(self.runs[: self.replays]):
            if run.plan.looks_at is not None:
                kinds.setdefault((run.plan.strategy, str(getattr(run.plan, "look", ""))), []).append(index)
        return [(np.array(each), _similarity([self.runs[index] for index in each])) for each in kinds.values()]

    def chosen(self, budget: float) -> ChosenRow:
        """The plan for a budget: chosen on one half of the prompts, measured on the other."""
        choosing, reporting = self.halves
        index = self.best(budget, choosing)
        assert index is not None  # a plain sample is within every budget
        fulls = [k for k, run in enumerate(self.runs) if isinstance(run.plan, Full) and self.costs[k] <= budget + NEAR]
        plain = next(k for k, run in enumerate(self.runs) if run.plan.looks_at is None)
        rival = max(fulls, key=lambda k: (self.runs[k].n, self.gains[k][choosing].mean()), default=plain)
        oracle, gains = self.table.oracle, self.gains
        apart = np.stack([gains[index, reporting] - gains[rival, reporting], oracle[reporting]], 1)
        share = float(gains[rival, reporting].sum() / oracle[reporting].sum())
        row = self.row(index, reporting)
        return {
            **row,
            "budget": float(budget),
            "chosen_share": float(gains[index, choosing].sum() / oracle[choosing].sum()),
            "chosen_on": len(choosing),
            "full_n": self.runs[rival].n,
            "full_share": share,
            "over_full": row["share"] - share,
            "over_full_ci95": None if index == rival else self._interval(apart, reporting, True),
        }

    def rivals(self, budgets: Sequence[float]) -> list[RivalRow]:
        """The best replayed and the best played plan of each budget that pays for a played one."""
        (choosing, reporting), rows = self.halves, list[RivalRow]()
        oracle = self.table.oracle[reporting]
        for budget in budgets if self.played else ():
            played = self.best(budget, choosing, slice(self.replays, None))
            replayed = self.best(budget, choosing, slice(self.replays))
            if played is None or replayed is None:
                continue
            mine, other = self.gains[played, reporting], self.gains[replayed, reporting]
            rows.append(
                {
                    "budget": float(budget),
                    "replayed": name(self.runs[replayed]),
                    "replayed_share": float(other.sum() / oracle.sum()),
                    "played": name(self.runs[played]),
                    "played_share": float(mine.sum() / oracle.sum()),
                    "played_cost": float(self.costs[played]),
                    "over": float((mine - other).sum() / oracle.sum()),
                    "over_ci95": self._interval(np.stack([mine - other, oracle], 1), reporting, True),
                    "chosen": "played" if self.best(budget, choosing) == played else "replayed",
                }
            )
        return rows

    def fulls(self) -> list[ReplayedRow]:
        """Best-of-N in full by N: one draw, at the highest level that was recorded."""
        level = max(self.table.levels("finished"), default=None)
        return [
            self.bare(index)
            for index, run in enumerate(self.runs[: self.replays])
            if isinstance(run.plan, Full) and (run.plan.judge_at, run.plan.num_draws) == (level, 1)
        ]

    def dots(self) -> list[Dot]:
        """Every plan as a point of the plot."""
        rows = [self.bare(index) for index in range(len(self.runs))]
        return [Dot(row["cost"], row["share"], kind_of(row)) for row in rows]

    def prune(self) -> list[PruneRow]:
        """What a cut from all candidates loses, by reading and number of survivors."""
        table, found = self.table, list[PruneRow]()
        ranks = np.sort(table.values, 1)[:, ::-1]
        for look in ("now", "ahead"):
            for step in table.steps(look):
                for t, draws in (table.levels(look) or {0.0: 1}).items() if look == "ahead" else [(0.0, 1)]:
                    scores = table.score(look, step, t if look == "ahead" else None, draws)
                    order = np.argsort(-scores, 1, kind="stable")
                    for keep in (each for each in (1, 2, 4) if each < table.n):
                        kept = np.take_along_axis(table.values, order[:, :keep], 1).max(1)
                        lost = np.stack([table.values.max(1) - kept, table.oracle], 1)
                        chance = table.values.max(1) - ranks @ _best_of(table.n, keep)
                        every = np.arange(len(lost))
                        found.append(
                            {
                                "look": look,
                                "step": step,
                                "t": t,
                                "keep": keep,
                                "regret": float(lost[:, 0].sum() / lost[:, 1].sum()),
                                "regret_ci95": self._interval(lost, every, True),
                                "by_chance": float(chance.sum() / table.oracle.sum()),
                            }
                        )
        return found

    def sizes(self) -> list[SizeRow]:
        """Best-of-n in full over n, by the level and draws that gain most with all candidates on the choosing half."""
        table, every = self.table, np.arange(len(self.table.values))
        replays = self.runs[: self.replays]
        fulls = [k for k, run in enumerate(replays) if isinstance(run.plan, Full) and run.n == table.n]
        if not fulls:
            return []
        plan = self.runs[max(fulls, key=lambda k: self.gains[k][self.halves[0]].mean())].plan
        scores = planner.deciding(table, plan, 0)
        by_judge = Table(scores, table.scores)
        spread = float(np.sqrt(scores.var(1, ddof=1).mean())) or 1.0
        ranks, rows, before = np.sort(table.values, 1)[:, ::-1], list[SizeRow](), None
        for n in planner.sizes(table.n):
            run = Run(n, plan)
            gain = planner.gains(table, run, self.load, self.seed)
            own = planner.gains(by_judge, run, self.load, self.seed)
            oracle = ranks @ _best_of(table.n, n) - table.values.mean(1)
            more = None if before is None else np.stack([gain - before, table.oracle], 1)
            rows.append(
                {
                    "n": n,
                    "share": float(gain.sum() / table.oracle.sum()),
                    "share_ci95": self._interval(np.stack([gain, table.oracle], 1), every, True),
                    "oracle": float(oracle.sum() / table.oracle.sum()),
                    "judge_gain": float(own.mean()) / spread,
                    "more": None if more is None else float(more[:, 0].sum() / more[:, 1].sum()),
                    "more_ci95": None if more is None else self._interval(more, every, True),
                }
            )
            before = gain
        return rows

    def _interval(self, columns: np.ndarray, prompts: np.ndarray, ratio: bool = False) -> list[float] | None:
        return prompt_interval(columns, prompts, (lambda sums: sums[:, 0] / sums[:, 1]) if ratio else None, self.seed)


def _similarity(runs: Sequence[Run]) -> np.ndarray:
    """(K, K) float64 weights of plans of one kind for each other: Gaussian in their settings.

    One standard deviation is one step of the first or the last cut, a factor of two in candidates or survivors, 200 of
    noise level, or one draw.
    """
    places = []
    for run in runs:
        cuts = getattr(run.plan, "schedule", None) or [(0, 1)]
        level, draws = getattr(run.plan, "judge_at", None) or 0.0, getattr(run.plan, "num_draws", 1)
        keep = cuts[0][1] if len(cuts) > 1 else 1
        places.append([cuts[0][0], cuts[-1][0], np.log2(keep), level / 200, draws, np.log2(run.n)])
    points = np.array(places, dtype=np.float64)
    squared = (points**2).sum(1)
    return np.asarray(np.exp(-np.maximum(squared[:, None] + squared - 2 * points @ points.T, 0) / 2))


def _best_of(n: int, size: int) -> np.ndarray:
    """(n,) how likely the best of `size` random ones of n is the first, the second, ... in order of value."""
    missed = stats.hypergeom.pmf(0, n, np.arange(n + 1), size)  # that none of the first r is drawn
    return np.asarray(missed[:-1] - missed[1:])


def name(run: Run) -> str:
    """A plan in a few words: "8 seeds, 4:1, ahead at 700, 2 draws"."""
    plan = run.plan
    parts = [plan.strategy if run.n == 1 else f"{run.n} seeds"]
    if isinstance(plan, Early):
        parts.append(",".join(f"{step}:{keep}" for step, keep in plan.schedule or ()))
    elif isinstance(plan, Full):
        parts.append("full")
    elif plan.looks_at is not None:
        parts += [*([plan.strategy] if run.n > 1 else []), *plan_files.differing(plan)]
    if isinstance(plan, Full) or (isinstance(plan, Early) and plan.predicts()):
        look = getattr(plan, "look", "")
        parts.append(f"{look if isinstance(look, str) else ' then '.join(look)} at {plan.judge_at:g}".strip())
        parts.append(f"{plan.num_draws} draw{'s' if plan.num_draws > 1 else ''}")
    return ", ".join(parts)
