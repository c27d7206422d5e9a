"""A judge's agreement with people: pairwise accuracy with and without ties."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prism.errors import PrismError, choice, number
from prism.evaluation.intervals import numbers

NO_TIES = -1.0
"""The threshold at which no pair is called a tie: |margin| <= -1 never holds."""

METHODS = ("exact", "videoalign")


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
        threshold: margins of at most this size are called ties, none where it is negative. None: the best threshold on
            these very pairs, which flatters the judge; for an honest figure pass one that was chosen on validation
            pairs.
        method: ``"exact"`` tries every threshold, and none, and treats equal margins alike. ``"videoalign"`` gives the
            figure of VideoGen-RewardBench's public evaluator, which always calls at least one tie and may put a
            threshold between equal margins, so that it depends on the order of the pairs.

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
