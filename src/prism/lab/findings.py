"""A claim's answer: its verdict, its main number, tables and figures; and the statistics that verdicts rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prism.errors import PrismError
from prism.evaluation import Measurement, prompt_interval
from prism.report import wording
from prism.runs import Parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prism.lab.bench import Bench

Verdict = Literal["holds", "holds in part", "does not hold", "cannot be told"]
Interval = Sequence[float] | None
Tables = Mapping[str, Sequence[Mapping[str, Any]]]
CLAIMED = (899, 699, 499)
"""The noise levels that claims are pooled over: where a sampler still has most of its way before it."""
MAIN = "overall"


@dataclass(frozen=True)
class Finding:
    """What an experiment yields, as JSON.

    number: the main number with its interval, in words. text: what the numbers show and do not show. tables: rows by
    name, each a flat dict. prompts: over which intervals are taken. seeds: of the heads; () where there are none.
    """

    verdict: Verdict
    number: str
    text: str
    tables: dict[str, list[dict[str, Any]]]
    prompts: int
    seeds: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Drawing:
    """A figure: its name (of the files), what it shows, and the drawn Figure."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Experiment:
    """A claim and how it is tested.

    claim, source: the claim in our words, and where it is made. kinds: the heads that it needs (`bench.kinds`). run:
    the finding. draw: the figures of a finding's tables. scales: at which it runs. trainings: how many groups of heads
    it trains and measures by itself, beside those of `kinds`, for the estimate of a run's time.
    """

    name: str
    title: str
    claim: str
    source: str
    run: Callable[[Bench], Finding]
    draw: Callable[[Tables], Sequence[Drawing]]
    kinds: Callable[[Bench], Sequence[str]] = field(default=lambda bench: ())
    scales: tuple[str, ...] = ("quick", "full")
    trainings: Callable[[Bench], float] = lambda bench: 0


class Damaged(PrismError):
    """A file of the run's folder that is not whole."""


def stored(parts: Parts, name: str) -> Measurement:
    """A measurement that the run's folder holds. Raises Damaged for one that is not whole."""
    try:
        return Measurement.load(parts.folder / name)
    except PrismError as error:
        raise Damaged(f"{error} Delete {parts.folder / name}, and it is made anew with --resume.") from error


def judged(intervals: Sequence[Interval]) -> Verdict:
    """The verdict on a claim that each of these differences is above zero, by their 95 % intervals.

    One below zero beyond its interval contradicts the claim, whatever the others say.
    """
    clear = [each for each in intervals if wording.clear(list(each) if each is not None else None)]
    above = [each for each in clear if each is not None and each[0] > 0]
    if not clear:
        return "cannot be told"
    if len(above) < len(clear):
        return "does not hold"
    return "holds" if len(above) == len(intervals) else "holds in part"


@dataclass(frozen=True, eq=False)
class Shares:
    """How often pairs were judged rightly. right: (pairs,) over levels and heads; prompts: (pairs,) of each pair."""

    right: np.ndarray
    prompts: np.ndarray

    def interval(self, seed: int = 0) -> list[float] | None:
        """95 % interval of the mean, over prompts."""
        return prompt_interval(self.right, self.prompts, seed=seed)

    def less(self, other: Shares) -> Shares:
        """The differences, pair by pair."""
        return Shares(self.right - other.right, self.prompts)

    def points(self, seed: int = 0) -> str:
        """A difference in words: "+1.2 points (+0.3 … +2.1)"."""
        return f"{wording.points(self.mean)} points{between(self.interval(seed))}"

    @property
    def num_prompts(self) -> int:
        """The number of prompts that the pairs are of."""
        return len(set(self.prompts.tolist()))

    @property
    def mean(self) -> float:
        """The share of pairs judged rightly."""
        return float(self.right.mean()) if len(self.right) else float("nan")


def shares(measured: Sequence[Measurement], levels: Sequence[float] = CLAIMED, dimension: str = MAIN) -> Shares:
    """The shares of a judge's heads on decided pairs, over levels (of those that were measured)."""
    by_level, prompts = [], np.zeros(0)
    for each in measured:
        decided = each.decided()
        for (t, name), (_, of_pair, right) in decided.items():
            if name == dimension and t in levels:
                by_level.append(right.astype(float))
                prompts = of_pair
    return Shares(np.mean(by_level, 0) if by_level else np.zeros(0), prompts)


def between(interval: Interval) -> str:
    """An interval of a difference of shares, in percentage points: " (+1.2 … +3.4)"; "" without one."""
    return "" if interval is None else f" ({wording.points_interval(list(interval))})"


def row_of(
    kind: str, what: str, measured: Sequence[Measurement], base: Sequence[Measurement], seed: int
) -> dict[str, Any]:
    """A row of a table of kinds of heads: accuracy over `CLAIMED` levels and the paired difference from the base."""
    ours, theirs = shares(measured), shares(base)
    apart = ours.less(theirs)
    single = [shares([each]).mean for each in measured]
    by_level = {f"at {t:g}": shares(measured, [t]).mean for t in CLAIMED if len(shares(measured, [t]).right)}
    return {
        "kind": kind,
        "what": what,
        "accuracy": ours.mean,
        "accuracy_ci95": ours.interval(seed),
        "difference": apart.mean,
        "difference_ci95": None if measured is base else apart.interval(seed),
        "spread": float(np.std(single, ddof=1)) if len(single) > 1 else None,
        **by_level,
        "heads": len(measured),
        "pairs": len(ours.right),
        "prompts": ours.num_prompts,
    }
