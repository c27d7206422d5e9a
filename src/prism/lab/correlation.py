"""Does judging power follow generative quality? Coefficients over a few backbones, with what their errors allow to say.

Pearson's, Spearman's and Kendall's coefficient, each with an exact permutation p, an interval that carries the errors
of both axes, one for other backbones of the kind, and partial coefficients given size and training compute. Numbers
alone: nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from prism.errors import SEEDS, PrismError, quoted, whole
from prism.lab.coefficients import BY_NAME, MOST_EXACT, interval, others_interval, partial, permutation_p

FEWEST = 5
"""Fewest backbones for a conclusion: with four the smallest two-sided p is 2 / 4! = .083."""
DRAWS = 2000


@dataclass(frozen=True, eq=False)
class PerPrompt:
    """A quantity measured on prompts: its mean is that over all videos, pairs, ... of all prompts.

    sums: (S, P) of the values of each prompt, a row per head seed; a quantity without seeds has one. counts: (P,) how
    many values each sum has. prompts: P texts; prompts of the same text are resampled together on both axes.
    """

    sums: np.ndarray
    counts: np.ndarray
    prompts: tuple[str, ...]

    @property
    def mean(self) -> float:
        """The mean over values and seeds."""
        return float((self.sums.sum(1) / self.counts.sum()).mean())

    def draw(self, times: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """(draws,) means of resamples. times: (draws, P) how often each prompt was drawn.

        Seeds are resampled too. The mean of S resampled values varies by (S - 1) / S too little, so that its distance
        from the mean over seeds is stretched.
        """
        counts = times @ self.counts
        of_seeds = (times @ self.sums.T) / np.where(counts > 0, counts, np.nan)[:, None]
        mean, seeds = of_seeds.mean(1), self.sums.shape[0]
        if seeds == 1:
            return np.asarray(mean)
        taken = np.take_along_axis(of_seeds, chance.integers(seeds, size=of_seeds.shape), 1).mean(1)
        return np.asarray(mean + math.sqrt(seeds / (seeds - 1)) * (taken - mean))


@dataclass(frozen=True)
class Published:
    """A quantity of which the mean alone is known, and perhaps its standard error."""

    mean: float
    error: float = 0.0


@dataclass(frozen=True, eq=False)
class Point:
    """A backbone.

    quality: of its videos. power: accuracy of a head on it. parameters, compute: of the backbone and of its training,
    in any unit; None: unknown. run: the training that it is a stage of, if others here are stages of it too.
    """

    name: str
    quality: PerPrompt | Published
    power: PerPrompt | Published
    parameters: float | None = None
    compute: float | None = None
    run: str | None = None


@dataclass(frozen=True, eq=False)
class Correlation:
    """What `correlate` found.

    points: a row per backbone: backbone, run, parameters, compute, quality, quality_ci95, power, power_ci95.
    rows: a row per coefficient and what is held fixed: coefficient, given, value, value_ci95 (errors of both axes,
        these backbones), others_ci95 (other backbones, errors as they are), p, p_method, smallest_p, backbones. None
        where a value is not defined.
    left_out: a row per backbone, and per training with several stages, that is left out: left_out, kind, backbones,
        pearson, spearman, kendall.
    """

    points: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    left_out: list[dict[str, Any]]

    def row(self, coefficient: str, given: str = "") -> dict[str, Any] | None:
        """The row of a coefficient; None where it was not computed."""
        return next((row for row in self.rows if (row["coefficient"], row["given"]) == (coefficient, given)), None)


def resampled(points: Sequence[Point], seed: int = 0, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Quality and power (draws, K) of every backbone in resamples: of prompts, all backbones' and both axes' alike, and
    of each backbone's head seeds; of published figures with their standard error.
    """
    chance = np.random.default_rng(seed)
    measured = [each for point in points for each in (point.quality, point.power) if isinstance(each, PerPrompt)]
    names = {
        prompt: number for number, prompt in enumerate(dict.fromkeys(p for each in measured for p in each.prompts))
    }
    times = (
        chance.multinomial(len(names), np.full(len(names), 1 / len(names)), draws) if names else np.zeros((draws, 0))
    )

    def of(each: PerPrompt | Published) -> np.ndarray:
        if isinstance(each, PerPrompt):
            return each.draw(times[:, [names[prompt] for prompt in each.prompts]].astype(np.float64), chance)
        return each.mean + each.error * chance.standard_normal(draws)

    both = [np.stack([of(getattr(point, axis)) for point in points], 1) for axis in ("quality", "power")]
    return both[0], both[1]


# -- the whole


def correlate(points: Sequence[Point], seed: int = 0, draws: int = DRAWS, most_exact: int = MOST_EXACT) -> Correlation:
    """All coefficients of quality and power over some backbones.

    draws: resamples of an interval. most_exact: see `permutation_p`.

    Raises:
        PrismError: for a backbone that is named twice, or has a value that is no finite number.
    """
    seed, draws = whole("seed", seed, 0, SEEDS), whole("draws", draws, 100, 1_000_000)
    _check(points)
    quality, power = (np.array([getattr(point, axis).mean for point in points]) for axis in ("quality", "power"))
    both = resampled(points, seed, draws) if points else (np.zeros((draws, 0)), np.zeros((draws, 0)))
    rows = []
    if len(points) >= 3:
        rows = [_row(name, quality, power, both, most_exact, seed) for name in BY_NAME]
        for given, held in _fixed(points).items():
            rows += [_partial_row(name, given, held, quality, power, both) for name in ("pearson", "spearman")]
    table = []
    for number, point in enumerate(points):
        row = {"backbone": point.name, "run": point.run, "parameters": point.parameters, "compute": point.compute}
        for axis, mean, drawn in (("quality", quality, both[0]), ("power", power, both[1])):
            ends = np.nanpercentile(drawn[:, number], [2.5, 97.5]).tolist()
            row |= {axis: float(mean[number]), f"{axis}_ci95": ends}
        table.append(row)
    return Correlation(table, rows, _left_out(points, quality, power))


def _check(points: Sequence[Point]) -> None:
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise PrismError(f"The backbone {quoted(name, 80)} is named {names.count(name)} times; name it once.")
    for point in points:
        for axis, each in (("generative quality", point.quality), ("judging power", point.power)):
            if not math.isfinite(each.mean):
                raise PrismError(
                    f"The {axis} of the backbone {quoted(point.name, 80)} is {each.mean}; give a number, or leave the "
                    "backbone out."
                )


def _fixed(points: Sequence[Point]) -> dict[str, np.ndarray]:
    """What can be held fixed, (K, G) of logarithms, by name: known of all, not the same for all, and K large enough."""
    columns = {}
    for name in ("parameters", "compute"):
        values = [getattr(point, name) for point in points]
        if all(value is not None and value > 0 for value in values) and max(values) > min(values):
            columns[name] = np.log(values)
    wanted = [(name,) for name in columns] + ([tuple(columns)] if len(columns) > 1 else [])
    fixed = {" and ".join(names): np.column_stack([columns[name] for name in names]) for names in wanted}
    return {given: held for given, held in fixed.items() if len(points) >= held.shape[1] + 4}


def _row(
    name: str, x: np.ndarray, y: np.ndarray, both: tuple[np.ndarray, np.ndarray], most_exact: int, seed: int
) -> dict[str, Any]:
    value = float(BY_NAME[name](x, y))
    p, method = permutation_p(name, x, y, most_exact, seed) if math.isfinite(value) else (None, None)
    ends = interval(value, BY_NAME[name](*both))
    return _entry(name, "", value, ends, others_interval(name, value, len(x)), p, method, len(x))


def _partial_row(
    name: str, given: str, held: np.ndarray, x: np.ndarray, y: np.ndarray, both: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    value, free = float(partial(name, x, y, held)), len(x) - 2 - held.shape[1]
    p = None
    if math.isfinite(value):
        p = 0.0 if abs(value) == 1 else float(2 * stats.t.sf(abs(value) * math.sqrt(free / (1 - value**2)), free))
    ends = interval(value, partial(name, *both, held))
    others = others_interval(name, value, len(x), held.shape[1])
    return _entry(name, given, value, ends, others, p, f"t with {free} degrees of freedom", len(x))


def _entry(
    name: str,
    given: str,
    value: float,
    ends: list[float] | None,
    others: list[float] | None,
    p: float | None,
    method: str | None,
    size: int,
) -> dict[str, Any]:
    return {
        "coefficient": name,
        "given": given,
        "value": value if math.isfinite(value) else None,
        "value_ci95": ends,
        "others_ci95": others,
        "p": p,
        "p_method": method,
        "smallest_p": min(1.0, 2 / math.factorial(size)) if not given else None,
        "backbones": size,
    }


def _left_out(points: Sequence[Point], x: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    runs = [point.run for point in points]
    several = [run for run in dict.fromkeys(runs) if run is not None and runs.count(run) > 1]
    masks = [("backbone", point.name, np.arange(len(points)) != number) for number, point in enumerate(points)]
    masks += [("training", run, np.array([other != run for other in runs])) for run in several]
    rows = []
    for kind, name, kept in masks:
        if kept.sum() < 3:
            continue
        values = {each: float(BY_NAME[each](x[kept], y[kept])) for each in BY_NAME}
        shown = {each: value if math.isfinite(value) else None for each, value in values.items()}
        rows.append({"left_out": name, "kind": kind, "backbones": int(kept.sum()), **shown})
    return rows
