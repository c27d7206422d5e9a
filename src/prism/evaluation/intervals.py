"""Confidence intervals of figures over pairs, which are not independent, as they share prompts and videos."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from prism.errors import SEEDS, PrismError, instance, quoted, whole

MOST_RESAMPLES = 1_000_000
MOST_KEPT = 2**22  # numbers of resamples that are kept for the next figure
FEWEST_PROMPTS = 10
"""Fewest prompts for an interval: with fewer even a widened one covers less than 95 %, and with one it is a point."""
MANY_PROMPTS = 30
"""With fewer prompts than these the percentiles of the bootstrap are widened."""
FEWEST_VIDEOS = 60
"""Fewest videos for an interval over videos; benchmarks/coverage.py measures its coverage with as many."""


def clustered_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic by resampling whole prompts, as pairs of one prompt are not independent.

    It equals `scipy.stats.bootstrap` of sums per prompt but for the random draws; BCa intervals cover no better here.
    With fewer than `MANY_PROMPTS` clusters the percentiles are widened by Student's t (Hesterberg 2015, section 4.3).

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
    times = (_resamples if draws * len(names) <= MOST_KEPT else _resamples.__wrapped__)(len(names), draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        results = numbers("What the statistic gives", statistic(times @ sums))
    results = results[np.isfinite(results)]  # a ratio is 0 / 0 where a resample holds no row that counts
    if not len(results):
        return float("nan"), float("nan")
    low, high = np.percentile(results, _percentiles(len(names)))
    return float(low), float(high)


@lru_cache(4)
def _resamples(clusters: int, draws: int, seed: int) -> np.ndarray:
    """How often each cluster was drawn, (draws, clusters): the same for all figures over the same prompts."""
    times = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
    return times.astype(np.float64)


def prompt_interval(
    values: ArrayLike,
    prompts: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> list[float] | None:
    """`clustered_bootstrap` over prompts as [low, high]; None below `FEWEST_PROMPTS` prompts, or without a result."""
    if len(np.unique(labels_of(prompts))) < FEWEST_PROMPTS:
        return None
    low, high = clustered_bootstrap(values, prompts, statistic, seed)
    return None if np.isnan(low) else [low, high]


def video_interval(values: ArrayLike, first: ArrayLike, second: ArrayLike) -> list[float] | None:
    """95 % interval [low, high] of a mean over pairs, for a new draw of videos of the same prompts.

    Two pairs are dependent where they share a video. The variance is that of Aronow, Samii and Assenova (2015): the sum
    of squares of the residuals' sums per video, minus that per pair of videos. As residuals are taken from the
    estimated mean, to which each pair adds the effects of two videos, the variance is multiplied by V / (V - 4) for V
    videos, and Student's t has V / 2 - 1 degrees of freedom. Prefer `prompt_interval` where there are enough prompts:
    it allows for other prompts too.

    Args:
        values: (n,) one per pair, such as 1 where the judge is right.
        first, second: (n,) names of the pair's videos.

    Returns:
        [low, high]; None below `FEWEST_VIDEOS` videos, or where no video is in two pairs.
    """
    rows, names = numbers("Values", values), [labels_of(side) for side in (first, second)]
    if rows.ndim != 1 or any(len(side) != len(rows) for side in names):
        raise PrismError("Values and the two videos must be lists of one length.")
    videos, indices = np.unique(np.concatenate(names), return_inverse=True)
    if len(videos) < FEWEST_VIDEOS or len(videos) == 2 * len(rows):
        return None
    from scipy import stats

    a, b = indices[: len(rows)], indices[len(rows) :]
    residuals = rows - rows.mean()
    of_video = np.bincount(a, residuals, len(videos)) + np.bincount(b, residuals, len(videos))
    _, dyads = np.unique(np.minimum(a, b) * len(videos) + np.maximum(a, b), return_inverse=True)
    of_dyad = np.bincount(dyads, residuals)
    variance = max((of_video**2).sum() - (of_dyad**2).sum(), (of_dyad**2).sum()) * len(videos) / (len(videos) - 4)
    half = stats.t.ppf(0.975, len(videos) / 2 - 1) * sqrt(variance) / len(rows)
    return [float(max(rows.mean() - half, rows.min())), float(min(rows.mean() + half, rows.max()))]


def _percentiles(clusters: int) -> list[float]:
    """The percentiles of a bootstrap distribution at the ends of a 95 % interval."""
    if not 2 <= clusters < MANY_PROMPTS:
        return [2.5, 97.5]
    from scipy import stats

    deviations = sqrt(clusters / (clusters - 1)) * stats.t.ppf(0.975, clusters - 1)
    tail = float(stats.norm.cdf(-deviations))
    return [100 * tail, 100 * (1 - tail)]


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
