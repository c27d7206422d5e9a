"""Calibration: how far P(A preferred) can be believed, and the two numbers that make it so.

Eq. 3-4 turn a margin into probabilities of A, tie and B. A head that has learned its training pairs by heart is too
sure of itself, and its eta was set, not learned. Both are mended on validation pairs, by maximum likelihood: margins
are divided by a temperature, and eta is fitted beside it. No ranking changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from prism.errors import PrismError
from prism.evaluation.accuracy import pairwise_accuracy
from prism.evaluation.measurement import Measurement
from prism.judge import Judge
from prism.judge.objective import log_probabilities

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Of one dimension, on the pairs it was fitted on."""

    temperature: float
    """Margins are divided by it; above 1 where the judge was too sure."""
    eta: float
    """Tie threshold of Eq. 3-4 that goes with the divided margins."""
    tie_threshold: float
    """Undivided |margin| up to which calling a tie is right most often; -1: never call one."""


def nll(labels: ArrayLike, margins: ArrayLike, eta: float, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of labels (n,) in {1, -1, 0} under Eq. 3-4, in nats."""
    outcome = torch.as_tensor(1 - np.asarray(labels, dtype=np.int64))  # 1, 0, -1 -> columns 0, 1, 2
    log_p = log_probabilities(torch.as_tensor(np.asarray(margins, dtype=np.float64)) / temperature, eta)
    return float(-log_p.gather(-1, outcome[:, None]).mean())


def calibration_error(labels: ArrayLike, margins: ArrayLike, eta: float, temperature: float = 1.0) -> float:
    """Expected calibration error of P(A preferred), in [0, 1].

    Each pair counts both ways round, so that which video is called A does not matter. The probabilities go into
    equally full bins; the error is the mean over them of |mean probability - share of pairs where A was preferred|.
    """
    y, m = np.asarray(labels, dtype=np.float64), np.asarray(margins, dtype=np.float64)
    y, m = np.concatenate([y, -y]), np.concatenate([m, -m])
    p = log_probabilities(torch.as_tensor(m / temperature), eta)[:, 0].exp().numpy()
    order = np.argsort(p, kind="stable")
    parts = np.array_split(order, min(BINS, len(order)))
    return float(sum(abs(p[part].sum() - (y[part] == 1).sum()) for part in parts) / len(order))


def fit(labels: ArrayLike, margins: ArrayLike) -> Calibration:
    """The temperature and eta of maximum likelihood, and the best tie threshold.

    Args:
        labels: (n,) 1 (A preferred), -1 (B preferred) or 0 (tie).
        margins: (n,) score of A minus score of B.

    Raises:
        PrismError: where no pair is decided, or all margins are zero.
    """
    y, m = np.asarray(labels), np.asarray(margins, dtype=np.float64)
    spread = float(m.std()) if len(m) else 0.0
    if not (y != 0).any() or spread == 0:
        raise PrismError("A judge is calibrated on decided pairs with margins other than zero; there are none.")

    def loss(parameters: np.ndarray) -> float:
        slope, log_rest = parameters  # margins count slope / spread each: a judge that knows nothing has slope 0
        return nll(y, m * (slope / spread), 1 + math.exp(np.clip(log_rest, -12, 12)))

    found = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-10})
    slope = max(float(found.x[0]) / spread, 1e-6)  # a judge that is wrong more often than right must not be turned over
    eta = 1 + math.exp(float(np.clip(found.x[1], -12, 12)))
    return Calibration(1 / slope, eta, pairwise_accuracy(y, m).threshold)


def calibrate(judge: Judge, measured: Measurement) -> list[dict[str, Any]]:
    """Calibrate a judge on what was measured of it on validation pairs, all noise levels together.

    Sets ``judge.calibration``, which ``Judge.probabilities`` uses and ``save_pretrained`` keeps.

    Returns:
        One row per dimension: dimension, pairs, temperature, eta, tie_threshold, and of P(A preferred) before and
        after, on these very pairs: nll_before, nll_after, calibration_error_before, calibration_error_after.
    """
    rows = []
    for dimension, (labels, margins) in margins_of(measured).items():
        found = fit(labels, margins)
        judge.calibration[dimension] = asdict(found)
        rows.append({"dimension": dimension, "pairs": len(labels), **asdict(found)})
        rows[-1] |= reliability(labels, margins, judge.eta, asdict(found))
    return rows


def margins_of(measured: Measurement) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and margins of a measurement by dimension, all noise levels together."""
    columns = {name: measured.pairs[name].to_numpy(zero_copy_only=False) for name in ("dimension", "label", "margin")}
    wanted = {name: columns["dimension"] == name for name in dict.fromkeys(columns["dimension"].tolist())}
    return {name: (columns["label"][rows], columns["margin"][rows]) for name, rows in wanted.items()}


def reliability(labels: ArrayLike, margins: ArrayLike, eta: float, found: Mapping[str, float]) -> dict[str, float]:
    """Likelihood and calibration error on some pairs, before a calibration and after it."""
    after = (found["eta"], found["temperature"])
    return {
        "nll_before": nll(labels, margins, eta),
        "nll_after": nll(labels, margins, *after),
        "calibration_error_before": calibration_error(labels, margins, eta),
        "calibration_error_after": calibration_error(labels, margins, *after),
    }
