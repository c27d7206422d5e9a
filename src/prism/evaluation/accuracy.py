"""A judge's agreement with people: pairwise accuracy with and without ties, and intervals clustered by prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prism.errors import SEEDS, PrismError, choice, instance, number, quoted, whole

NO_TIES = -1.0
"""The threshold at which no pair is called a tie: |margin| <= -1 never holds."""

METHODS = ("exact", "videoalign")

MOST_RESAMPLES = 1_000_000
FEWEST_PROMPTS = 10
"""Fewest prompts for an interval: with fewer it would be more than a fifth too narrow, and with one a single point.

(Student's t of n - 1 degrees of freedom over the normal quantile, times the root of n / (n - 1): 1.2 at 10, 1.6 at 5.)
"""


@dataclass(frozen=True)
class PairwiseAccuracy:
    """Shares in [0, 1]; NaN where there is no pair to count."""

    without_ties: float
    """Share of the decided pairs whose margin has the label's sign. A zero margin is wrong."""
    with_ties: float
    """Share of all pairs that are judged right when |margin| <= threshold is called a tie."""
    threshold: float
    """The threshold of ``with_ties``; ``NO_TIES`` (-1) where calling no pair a tie is best."""


def pairwise_accuracy(
    labels: ArrayLike, margins: ArrayLike, threshold: float | None = None, method: str = "exact"
) -> PairwiseAccuracy:
    """Accuracy of margins against labels (three-class accuracy of "Ties Matter", Deutsch et al. 2023).

    Args:
        labels: (n,) 1 (A preferred), -1 (B preferred) or 0 (tie).
        margins: (n,) score of A minus score of B.
        threshold: margins up to it are called ties; a negative one calls none. None: the best one on these very pairs,
            which flatters the judge; choose it on validation pairs and pass it for an honest figure.
        method: ``"exact"`` tries every threshold, none included, and moves equal margins together.
            ``"videoalign"`` gives what the public evaluator of VideoGen-RewardBench gives: it never tries to call no
            tie, and reads the accuracy in between equal margins, so that its value depends on the order of the pairs.

    Raises:
        PrismError: on labels other than 1, -1 and 0, margins that are not finite, or lengths that differ.
    """
    y, m = numbers("Labels", labels), numbers("Margins", margins)
    choice("The method", method, METHODS)
    threshold = None if threshold is None else number("The threshold", threshold)
    if y.ndim != 1 or y.shape != m.shape:
        raise PrismError(f"Labels and margins must be two lists of one length, found shapes {y.shape} and {m.shape}.")
    if not np.isin(y, (-1, 0, 1)).all():
        raise PrismError(
            "Labels must be 1 (A preferred), -1 (B preferred) or 0 (tie); leave out pairs without a label."
        )
    if not np.isfinite(m).all():
        raise PrismError(f"The margin of pair {np.flatnonzero(~np.isfinite(m))[0]} is not a finite number.")
    concordant = y * m > 0
    decided = int((y != 0).sum())
    without = concordant.sum() / decided if decided else np.nan
    if not len(y):
        return PairwiseAccuracy(np.nan, np.nan, NO_TIES if threshold is None else threshold)
    if threshold is None:
        right, threshold = _sweep(y, m, concordant, method)
    else:
        right = np.where(np.abs(m) <= threshold, y == 0, concordant).sum()
    return PairwiseAccuracy(float(without), float(right / len(y)), float(threshold))


def _sweep(y: np.ndarray, m: np.ndarray, concordant: np.ndarray, method: str) -> tuple[int, float]:
    """The largest number of right pairs over all thresholds, and the smallest threshold that reaches it."""
    size = np.abs(m)
    order = np.argsort(size, kind="stable")
    size = size[order]
    # Right pairs when the i smallest margins are called ties: the ties among these, and the concordant of the others.
    ties = np.concatenate([[0], np.cumsum(y[order] == 0)])
    decided = concordant.sum() - np.concatenate([[0], np.cumsum(concordant[order])])
    right = ties + decided
    thresholds = np.concatenate([[NO_TIES], size])
    if method == "exact":
        last_of_equals = np.concatenate([[True], size[:-1] < size[1:], [True]])
        right, thresholds = right[last_of_equals], thresholds[last_of_equals]
    else:
        right, thresholds = right[1:], thresholds[1:]
    best = int(np.argmax(right))
    return int(right[best]), float(thresholds[best])


def clustered_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic by resampling whole prompts, as the pairs of one are not independent.

    Args:
        values: (n,) or (n, k), one row per pair or candidate. To compare two judges pass their difference, row by row.
        clusters: (n,) labels, such as prompts.
        statistic: maps sums of ``values`` over resampled rows, (draws, k), to (draws,): ``lambda s: s[:, 0] / s[:, 1]``
            is a ratio of means. None: the mean over rows (``values`` of one column).
        seed: of the resampling; the same seed resamples the same way, so that two intervals can be compared.
        draws: number of resamples.

    Returns:
        (low, high); both NaN without rows.
    """
    rows, groups = numbers("Values", values), labels_of(clusters)
    seed, draws = whole("seed", seed, 0, SEEDS), whole("draws", draws, 1, MOST_RESAMPLES)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(groups) != len(rows):
        shapes = f"{rows.shape} and {groups.shape}"
        raise PrismError(f"Values and clusters must be lists of one length, found the shapes {shapes}.")
    if not len(rows):
        return float("nan"), float("nan")
    names, index = np.unique(groups, return_inverse=True)
    if statistic is None:
        if rows.shape[1] != 1:
            raise PrismError(f"The mean needs values of one column, found {rows.shape[1]}; pass a statistic.")
        rows = np.concatenate([rows, np.ones_like(rows)], axis=1)
        statistic = _ratio
    instance("statistic", statistic, Callable, "a function of sums (draws, k)")
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, index, rows)
    # How often each cluster was drawn, for all draws at once.
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        results = numbers("What the statistic gives", statistic(times @ sums))
    results = results[np.isfinite(results)]  # a resample may hold no row that counts
    if not len(results):
        return float("nan"), float("nan")
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


def prompt_interval(
    values: ArrayLike,
    prompts: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> list[float] | None:
    """`clustered_bootstrap` over prompts as [low, high]; None below `FEWEST_PROMPTS` prompts, or where none counts."""
    if len(np.unique(labels_of(prompts))) < FEWEST_PROMPTS:
        return None
    low, high = clustered_bootstrap(values, prompts, statistic, seed)
    return None if np.isnan(low) else [low, high]


def numbers(name: str, values: ArrayLike) -> np.ndarray:
    """An array of numbers as float64. Raises PrismError for anything else."""
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "biufO":
            raise TypeError
        array: np.ndarray = raw.astype(np.float64)
    except Exception:  # another library's array may raise any error
        raise PrismError(f"{name} must be an array of numbers, found {quoted(values, 80)}.") from None
    if array.ndim == 0:
        raise PrismError(f"{name} must be an array of numbers, found {quoted(values, 80)}.")
    return array


def labels_of(clusters: ArrayLike) -> np.ndarray:
    """An array (n,) of cluster names that can be sorted. Raises PrismError for anything else."""
    try:
        labels = np.asarray(clusters)
        if labels.ndim != 1:
            raise TypeError
        np.unique(labels)
    except Exception:
        raise PrismError(f"Clusters must be a list of names or numbers, found {quoted(clusters, 80)}.") from None
    return labels


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]
