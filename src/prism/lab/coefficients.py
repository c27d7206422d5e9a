"""Coefficients of correlation, partial ones, their exact permutation p, and their intervals.

Pearson's, Spearman's and Kendall's (tau-b). All take arrays (..., K), so that thousands of resamples are one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations, permutations

import numpy as np
from scipy import stats

MOST_EXACT = 13
"""Most backbones of which all orders are counted unless more are asked for; of 15 that takes half a minute."""
RANDOM_ORDERS = 99_999


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...,) of arrays (..., K); NaN where one of them is constant."""
    x, y = _centred(x), _centred(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.asarray(np.clip(ratio, -1, 1))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...,) of arrays (..., K); equal values share their mean rank."""
    return pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...,) tau-b of arrays (..., K)."""
    first, second = np.triu_indices(x.shape[-1], 1)
    a, b = (np.sign(values[..., first] - values[..., second]) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.asarray(ratio)


BY_NAME: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pearson": pearson,
    "spearman": spearman,
    "kendall": kendall,
}


def partial(name: str, x: np.ndarray, y: np.ndarray, held: np.ndarray) -> np.ndarray:
    """(...,) Pearson's or Spearman's coefficient of arrays (..., K), given the columns of `held` (K, G).

    The coefficient of what is left of both after a linear fit on `held`; Spearman's is that of all ranks.
    """
    if name == "spearman":
        x, y, held = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1), stats.rankdata(held, axis=0)
    fit = np.column_stack([np.ones(len(held)), _centred(held.T).T])
    keep = np.eye(len(held)) - fit @ np.linalg.pinv(fit)
    rest = [values @ keep for values in (x, y)]
    values = pearson(*rest)
    explained = [(each**2).sum(-1) <= 1e-18 * (_centred(all_) ** 2).sum(-1) for each, all_ in zip(rest, (x, y))]
    return np.where(explained[0] | explained[1], np.nan, values)


def _centred(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    return np.where(np.abs(centred) <= 1e-12 * np.abs(values).max(-1, keepdims=True), 0.0, centred)


# -- permutation p


def permutation_p(
    name: str, x: np.ndarray, y: np.ndarray, most_exact: int = MOST_EXACT, seed: int = 0
) -> tuple[float, str]:
    """Two-sided p of a coefficient if y had been dealt to the K backbones at random, and how it was counted.

    As in `scipy.stats.permutation_test`, it is twice the smaller one-sided p, and at most 1. All orders are counted, up
    to `most_exact` backbones; Kendall's without ties by the recursion of `scipy.stats.kendalltau`, for any number. Else
    99,999 random orders are, whose p is valid too, but rounded to 1e-5.
    """
    size = len(x)
    if name == "kendall":
        if len(np.unique(x)) == len(np.unique(y)) == size:
            return float(stats.kendalltau(x, y, method="exact").pvalue), "exact"
        if size > 8:  # the number of concordant pairs is no sum over backbones
            return _random_p(kendall, x, y, seed)
        found = stats.permutation_test(
            (y,), lambda values, axis: kendall(x, np.moveaxis(values, axis, -1)), permutation_type="pairings",
            n_resamples=np.inf, vectorized=True, alternative="two-sided",
        )  # fmt: skip
        return float(found.pvalue), "exact"
    if name == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    if size > most_exact:
        return _random_p(pearson, x, y, seed)
    return _counted_p(x, y), "exact"


def _random_p(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray, seed: int
) -> tuple[float, str]:
    found = stats.permutation_test(
        (y,), lambda values, axis: statistic(x, np.moveaxis(values, axis, -1)), permutation_type="pairings",
        n_resamples=RANDOM_ORDERS, vectorized=True, batch=10_000, alternative="two-sided",
        random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue), f"{RANDOM_ORDERS:,} random orders"


def _counted_p(x: np.ndarray, y: np.ndarray) -> float:
    """The p of sum(x * y) over all K! orders of y.

    They are counted in halves. For each choice of the values that the first half of the backbones gets, the sums of
    both halves are listed and sorted, and a binary search counts the pairs that reach the observed sum: for K = 12 that
    looks up 0.7 million sums in place of 479 million.
    """
    x, y = _centred(x), _centred(y)
    half, observed = len(x) // 2, float(x @ y)
    near = 1e-12 * float(np.abs(x).sum() * np.abs(y).max())  # sums that are equal but for rounding
    left, right = _dealt(x[:half]), _dealt(x[half:])
    above = below = 0
    everyone = np.arange(len(x))
    for chosen in combinations(range(len(x)), half):
        firsts = left @ y[list(chosen)]
        seconds = np.sort(right @ y[np.setdiff1d(everyone, chosen, assume_unique=True)])
        above += len(firsts) * len(seconds) - int(np.searchsorted(seconds, observed - near - firsts, "left").sum())
        below += int(np.searchsorted(seconds, observed + near - firsts, "right").sum())
    return min(1.0, 2 * min(above, below) / math.factorial(len(x)))


@cache
def _orders(size: int) -> np.ndarray:
    return np.array(list(permutations(range(size))), dtype=np.int64)


def _dealt(x: np.ndarray) -> np.ndarray:
    """(K!, K): every order of x."""
    return np.asarray(x[_orders(len(x))])


# -- intervals


def interval(value: float, draws: np.ndarray) -> list[float] | None:
    """95 % interval of a coefficient from its values in resamples: from the farther of two limits to the farther.

    Errors of the axes draw a coefficient towards zero, and resampling adds them once more. The percentiles of the
    resamples so lie too low (72 % cover the coefficient of the true values), the same mirrored about the value (the
    basic bootstrap) bring it back, but too far for ranks (86 %). Both together covered it in 97 to 100 % of
    simulations, and in 93 to 98 % where quality was four times as noisy (docs/correlation.md).
    """
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or not len(draws):
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return [max(-1.0, float(min(low, 2 * value - high))), min(1.0, float(max(high, 2 * value - low)))]


def others_interval(name: str, value: float, size: int, held: int = 0) -> list[float] | None:
    """95 % interval for other backbones of the kind, by Fisher's transformation; None where K is too small.

    Its variance is that of Fisher (1921) for Pearson's, Bonett and Wright (2000) for Spearman's, and Fieller, Hartley
    and Pearson (1957) for Kendall's coefficient.
    """
    free = size - held - (4 if name == "kendall" else 3)
    if free < 1 or not math.isfinite(value):
        return None
    variance = {"pearson": 1.0, "spearman": 1 + value**2 / 2, "kendall": 0.437}[name] / free
    if abs(value) == 1:
        return [value, value]
    z, half = math.atanh(value), stats.norm.ppf(0.975) * math.sqrt(variance)
    return [math.tanh(z - half), math.tanh(z + half)]
