"""Calibration: measure how well a judge's probabilities of A, tie and B (Eq. 3-4) match the labels, and correct them.

A head that overfits its training pairs is too sure, and its eta is a setting, not learned. Both are corrected on
validation pairs by maximum likelihood: margins are divided by a temperature, and eta is fitted with it. No ranking
changes.
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
from prism.evaluation.intervals import prompt_interval
from prism.evaluation.measurement import Block, Measurement
from prism.judge import Judge
from prism.judge.objective import log_probabilities
from prism.report.rows import ReliabilityRow

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """The calibration of one dimension, as fitted on some pairs."""

    temperature: float
    """Margins are divided by it; above 1 where the judge was too sure."""
    eta: float
    """Tie threshold of Eq. 3-4 that goes with the divided margins."""
    tie_threshold: float
    """|margin|, before the division, up to which a pair is best called a tie; -1: never."""


def nll(labels: ArrayLike, margins: ArrayLike, eta: float, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of labels (n,) in {1, -1, 0} under Eq. 3-4, in nats."""
    outcome = torch.as_tensor(1 - np.asarray(labels, dtype=np.int64))  # 1, 0, -1 -> columns 0, 1, 2
    log_p = log_probabilities(torch.as_tensor(np.asarray(margins, dtype=np.float64)) / temperature, eta)
    return float(-log_p.gather(-1, outcome[:, None]).mean())


def calibration_error(labels: ArrayLike, margins: ArrayLike, eta: float, temperature: float = 1.0) -> float:
    """Expected calibration error of P(A preferred), in [0, 1].

    Each pair counts in both orders, so that it does not matter which video is called A. The probabilities go into
    equally full bins; the error is the mean over bins of |mean probability - share of pairs in which A was preferred|.
    """
    y, m = np.asarray(labels, dtype=np.float64), np.asarray(margins, dtype=np.float64)
    y, m = np.concatenate([y, -y]), np.concatenate([m, -m])
    p = log_probabilities(torch.as_tensor(m / temperature), eta)[:, 0].exp().numpy()
    return _error(p, (y == 1).astype(np.float64))


def _bins(p: np.ndarray) -> list[np.ndarray]:
    """Indices of probabilities (n,), sorted by probability, in equally full bins."""
    return np.array_split(np.argsort(p, kind="stable"), min(BINS, len(p)))


def _error(p: np.ndarray, outcomes: np.ndarray) -> float:
    """Expected calibration error of probabilities (n,) of outcomes (n,), which are 0, 1 or shares."""
    return float(sum(abs(p[part].sum() - outcomes[part].sum()) for part in _bins(p)) / len(p))


def _curve(p: np.ndarray, outcomes: np.ndarray) -> list[list[float]]:
    """[mean probability, mean outcome, number of pairs] per bin."""
    return [[float(p[part].mean()), float(outcomes[part].mean()), len(part)] for part in _bins(p)]


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
        slope, log_rest = parameters  # margins times slope / spread, eta = 1 + exp(log_rest)
        return nll(y, m * (slope / spread), 1 + math.exp(np.clip(log_rest, -12, 12)))

    optimum = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-10}).x
    slope = max(float(optimum[0]) / spread, 1e-6)  # positive, so that calibration reverses no ranking
    eta = 1 + math.exp(float(np.clip(optimum[1], -12, 12)))
    return Calibration(1 / slope, eta, pairwise_accuracy(y, m).threshold)


def calibrate(judge: Judge, measured: Measurement) -> list[dict[str, Any]]:
    """Calibrate a judge on its measurement on validation pairs, all noise levels together.

    Sets ``judge.calibration``, which ``Judge.probabilities`` uses and ``save_pretrained`` keeps.

    Returns:
        One row per dimension: dimension, pairs, temperature, eta, tie_threshold, and, on these very pairs,
        nll_before, nll_after, calibration_error_before, calibration_error_after (of P(A preferred)).
    """
    rows = []
    for dimension, (labels, margins) in margins_of(measured).items():
        calibration = asdict(fit(labels, margins))
        judge.calibration[dimension] = calibration
        rows.append({"dimension": dimension, "pairs": len(labels), **calibration})
        rows[-1] |= reliability(labels, margins, judge.eta, calibration)
    return rows


def margins_of(measured: Measurement) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and margins of a measurement by dimension, all noise levels together."""
    columns = {name: measured.pairs[name].to_numpy(zero_copy_only=False) for name in ("dimension", "label", "margin")}
    masks = {name: columns["dimension"] == name for name in dict.fromkeys(columns["dimension"].tolist())}
    return {name: (columns["label"][mask], columns["margin"][mask]) for name, mask in masks.items()}


def reliability(labels: ArrayLike, margins: ArrayLike, eta: float, fitted: Mapping[str, float]) -> dict[str, float]:
    """Negative log-likelihood and calibration error on some pairs, before a calibration and after it."""
    after = (fitted["eta"], fitted["temperature"])
    return {
        "nll_before": nll(labels, margins, eta),
        "nll_after": nll(labels, margins, *after),
        "calibration_error_before": calibration_error(labels, margins, eta),
        "calibration_error_after": calibration_error(labels, margins, *after),
    }


# -- on a split

DRAWS = 200


def reliability_rows(measured: Measurement) -> list[ReliabilityRow]:
    """The "reliability" rows of metrics.json: one per noise level and dimension.

    For pairs with soft labels the outcomes are their probabilities. Where there are validation pairs at the same level,
    "refitted" holds the temperature and eta that fit these, for comparison with the judge's.
    """
    about, rows = measured.about, []
    seed, split = measured.settings["seed"], measured.settings["split"]
    for block in measured.blocks:
        if not len(block.labels):
            continue
        numbers = about.get("calibration", {}).get(block.dimension) or {"temperature": 1.0, "eta": about["eta"]}
        temperature, eta = float(numbers["temperature"]), float(numbers["eta"])
        outcomes, soft = _outcomes(block)
        log_p = _log_p(block, eta, temperature)
        p, losses = np.exp(log_p), _losses(outcomes, log_p)
        shares = outcomes.mean(0)
        shares[[0, 2]] = (shares[0] + shares[2]) / 2  # which video is called A is arbitrary
        sides = np.concatenate([p[:, 0], p[:, 2]]), np.concatenate([outcomes[:, 0], outcomes[:, 2]])
        row: ReliabilityRow = {
            "judge": measured.judge,
            "set": split,
            "t": measured.level(block.t),
            "dimension": block.dimension,
            "temperature": temperature,
            "eta": eta,
            "pairs": len(losses),
            "soft_pairs": int(soft.sum()),
            "nll": float(losses.mean()),
            "nll_ci95": prompt_interval(losses, block.prompts, seed=seed),
            "nll_of_shares": float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()),
            "calibration_error": _error(*sides),
            "calibration_error_by_chance": _by_chance(p, seed),
            "tie_calibration_error": _error(p[:, 1], outcomes[:, 1]),
            "curve": _curve(*sides),
            "tie_curve": _curve(p[:, 1], outcomes[:, 1]),
            "refitted": None,
        }
        tuning = measured.tuning_blocks.get((block.t, block.dimension))
        if split != "validation" and tuning is not None and tuning.decided.any() and tuning.margins.std() > 0:
            fitted = fit(tuning.labels, tuning.margins)
            again = _log_p(block, fitted.eta, fitted.temperature)
            both = np.exp(np.concatenate([again[:, 0], again[:, 2]]))
            row["refitted"] = {
                "temperature": fitted.temperature,
                "eta": fitted.eta,
                "nll": float(_losses(outcomes, again).mean()),
                "calibration_error": _error(both, sides[1]),
            }
        rows.append(row)
    return rows


def _log_p(block: Block, eta: float, temperature: float) -> np.ndarray:
    """(n, 3) log-probabilities of A preferred, tie and B preferred."""
    values: np.ndarray = log_probabilities(torch.as_tensor(block.margins / temperature), eta).numpy()
    return values


def _outcomes(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) shares of A preferred, tie and B preferred, 0 or 1 for a hard label; (n,) bool, True for soft labels."""
    hard = np.stack([block.labels == 1, block.labels == 0, block.labels == -1], 1).astype(np.float64)
    p_a, p_b = block.numbers["p_a"], block.numbers["p_b"]
    soft = ~np.isnan(p_a)
    return np.where(soft[:, None], np.stack([p_a, np.maximum(1 - p_a - p_b, 0), p_b], 1), hard), soft


def _losses(outcomes: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """(n,) cross-entropy in nats."""
    losses: np.ndarray = -np.where(outcomes > 0, outcomes * log_p, 0.0).sum(1)
    return losses


def _by_chance(p: np.ndarray, seed: int) -> float:
    """The mean calibration error of probabilities (n, 3) against hard labels that are drawn from them."""
    generator = np.random.default_rng(seed)
    sides = np.concatenate([p[:, 0], p[:, 2]])
    bins, errors = _bins(sides), []
    for u in generator.random((DRAWS, len(p))):
        outcomes = np.concatenate([u < p[:, 0], u >= p[:, 0] + p[:, 1]])
        errors.append(sum(abs(sides[part].sum() - outcomes[part].sum()) for part in bins) / len(sides))
    return float(np.mean(errors))
