"""A judge's margins on labelled pairs: saved as one Parquet file, compared, averaged over head seeds, calibrated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from prism.errors import SEEDS, PrismError, flag, quoted, whole
from prism.evaluation.accuracy import pairwise_accuracy, prompt_interval
from prism.judge import Judge
from prism.judge.objective import log_probabilities
from prism.preference import PromptGroup
from prism.report.metrics import AccuracyRow, ComparisonRow

COLUMNS = ("judge", "t", "dimension", "prompt", "video_a", "video_b", "label", "margin")


@dataclass(frozen=True, eq=False)
class Measurement:
    """A judge measured on a split.

    rows: the "accuracy" rows of metrics.json.
    pairs: one row per t, dimension and labelled pair: judge, t, dimension, prompt, video_a, video_b, label (1 A
        preferred, -1 B, 0 tie) and margin (score of A minus score of B).
    settings: split, num_draws and seed of the noise, without which two judges were not measured alike.
    """

    rows: list[AccuracyRow]
    pairs: pa.Table
    settings: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write everything as one Parquet file."""
        extra = json.dumps({"rows": self.rows, "settings": self.settings})
        pq.write_table(self.pairs.replace_schema_metadata({"prism": extra}), path)

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a file that `save` wrote. Raises PrismError for one that is missing or is not such a file."""
        try:
            table = pq.read_table(path)
            extra = json.loads((table.schema.metadata or {})[b"prism"])
            return cls(extra["rows"], table.select(COLUMNS), extra["settings"])
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise PrismError(
                f"The file {path} is no whole measurement of a judge ({quoted(error, 150)}); measure anew."
            ) from error

    def decided(self) -> dict[tuple[float, str], tuple[list[tuple[str, str]], np.ndarray, np.ndarray]]:
        """Decided pairs by (t, dimension): (video_a, video_b), prompts (n,), a mask (n,) of those judged right."""
        columns = {name: self.pairs[name].to_numpy(zero_copy_only=False) for name in COLUMNS}
        is_decided = columns["label"] != 0
        levels, dimensions = columns["t"][is_decided], columns["dimension"][is_decided]
        keys = list(dict.fromkeys(zip(levels.tolist(), dimensions.tolist())))
        decided = {}
        for t, dimension in keys:
            rows = np.flatnonzero(is_decided)[(levels == t) & (dimensions == dimension)]
            pairs = list(zip(columns["video_a"][rows].tolist(), columns["video_b"][rows].tolist()))
            right = columns["label"][rows] * columns["margin"][rows] > 0
            decided[t, dimension] = pairs, columns["prompt"][rows], right
        return decided


def pair_table(
    judge: str,
    groups: Sequence[PromptGroup],
    dimensions: Sequence[str],
    timesteps: Sequence[float],
    margins: Sequence[np.ndarray],
) -> pa.Table:
    """`Measurement.pairs` from the margins (pairs, num_dimensions) at each noise level, over all groups."""
    labels = np.concatenate([group.labels for group in groups])
    prompts = np.concatenate([np.full(len(group.labels), group.prompt, dtype=object) for group in groups])
    videos = [np.array(group.videos, dtype=object) for group in groups]
    first = np.concatenate([names[group.first] for names, group in zip(videos, groups)])
    second = np.concatenate([names[group.second] for names, group in zip(videos, groups)])
    tables = []
    for t, values in zip(timesteps, margins):
        for column, dimension in enumerate(dimensions):
            labelled = ~np.isnan(labels[:, column])
            count = int(labelled.sum())
            arrays = [
                pa.array([judge] * count, pa.string()),
                pa.array([float(t)] * count, pa.float64()),
                pa.array([dimension] * count, pa.string()),
                *(pa.array(names[labelled], pa.string()) for names in (prompts, first, second)),
                pa.array(labels[labelled, column].astype(np.int8)),
                pa.array(values[labelled, column].astype(np.float64)),
            ]
            tables.append(pa.table(arrays, names=list(COLUMNS)))
    return pa.concat_tables(tables).combine_chunks()


def compare_judges(
    one: Measurement | Sequence[Measurement],
    other: Measurement | Sequence[Measurement],
    seed: int = 0,
    any_draws: bool = False,
) -> list[ComparisonRow]:
    """The accuracy of one judge minus another's, on the same pairs under the same noise.

    The interval is a paired bootstrap's: it resamples the differences pair by pair, whole prompts at a time, so that
    pairs which are hard for both judges do not widen it.

    Args:
        one, other: measurements on the same split, levels, draws and seed. Several of one judge (heads of several
            seeds) count as their mean: the share of them that is right about a pair.
        seed: of the resampling.
        any_draws: let the two differ in the number of noise draws that a score is averaged over.

    Returns:
        The "judge_comparison" rows of metrics.json, one per t and dimension that both have: judge, against, set, t,
        dimension, difference (accuracy without ties of `one` minus `other`'s), ci95 (None below 10 prompts), pairs
        (decided), prompts.

    Raises:
        PrismError: where the two were not measured alike.
    """
    seed, any_draws = whole("seed", seed, 0, SEEDS), flag("any_draws", any_draws)
    ours, theirs = _several(one), _several(other)
    kept = [
        {name: value for name, value in measured.settings.items() if not (any_draws and name == "num_draws")}
        for measured in [*ours, *theirs]
    ]
    for settings in kept:
        if settings != kept[0]:
            raise PrismError(
                f"Judges are compared under the same noise on the same split, found {kept[0]} and {settings}; "
                "measure both alike."
            )
    left, right = [measured.decided() for measured in ours], [measured.decided() for measured in theirs]
    rows: list[ComparisonRow] = []
    for key in left[0]:
        if not all(key in decided for decided in [*left, *right]):
            continue
        pairs, prompts, _ = left[0][key]
        if any(decided[key][0] != pairs for decided in [*left, *right]):
            raise PrismError(
                f"The judges were measured on different pairs at t = {key[0]:g} in {key[1]}; use the same store."
            )
        gain = np.mean([each[key][2] for each in left], 0) - np.mean([each[key][2] for each in right], 0)
        if not len(gain):
            continue
        rows.append(
            {
                "judge": _name(ours[0]),
                "against": _name(theirs[0]),
                "set": ours[0].settings["split"],
                "t": int(key[0]) if key[0].is_integer() else key[0],
                "dimension": key[1],
                "difference": float(gain.mean()),
                "ci95": prompt_interval(gain, prompts, seed=seed),
                "pairs": len(gain),
                "prompts": len(set(prompts.tolist())),
            }
        )
    return rows


def _several(measured: Measurement | Sequence[Measurement]) -> list[Measurement]:
    measurements: list[Any] = [*measured] if isinstance(measured, list | tuple) else [measured]
    if not measurements or not all(isinstance(each, Measurement) for each in measurements):
        raise PrismError(
            f"There is no measurement to compare: give at least one of each judge (prism.evaluation.measure), found "
            f"{quoted(measured, 80)}."
        )
    return measurements


def _name(measured: Measurement) -> str:
    return measured.pairs["judge"][0].as_py()


Share = Literal["without_ties", "with_ties", "with_ties_validation_threshold", "with_ties_model_rule"]
MEANS: tuple[Share, ...] = ("without_ties", "with_ties", "with_ties_validation_threshold", "with_ties_model_rule")


def accuracy(measured: Sequence[Measurement], seed: int = 0) -> list[AccuracyRow]:
    """The "accuracy" rows of judges of several head seeds: first those of the mean over seeds, then each judge's.

    A row of the mean has "head_seed" None and the seeds in "head_seeds"; its accuracies are means over the judges. Its
    interval resamples prompts, and each pair counts with the share of judges that are right about it. A single judge
    has its own rows alone.
    """
    single = [row for each in measured for row in each.rows]
    if len(measured) < 2:
        return single
    decided = [each.decided() for each in measured]
    means: list[AccuracyRow] = []
    for group in zip(*(each.rows for each in measured), strict=True):
        key = (float(group[0]["t"]), group[0]["dimension"])
        if any((float(each["t"]), each["dimension"]) != key for each in group):
            raise ValueError("judges that are pooled must be measured at the same levels, in the same order")
        row: AccuracyRow = group[0].copy()
        row["head_seed"], row["head_seeds"] = None, [each["head_seed"] for each in group]
        for name in MEANS:
            shares = [share for each in group if (share := each[name]) is not None]
            row[name] = float(np.mean(shares)) if len(shares) == len(group) else None
        if row["without_ties"] is not None:
            right = np.mean([each[key][2] for each in decided], 0)
            row["without_ties_ci95"] = prompt_interval(right, decided[0][key][1], seed=seed)
        means.append(row)
    return means + single


# -- calibration: Eq. 3-4 turn a margin into probabilities of A, tie and B. A head that overfits its training pairs is
# too sure, and its eta was set, not learned. Both are corrected on validation pairs by maximum likelihood: margins are
# divided by a temperature, and eta is fitted together with it. No ranking changes.

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """The calibration of one dimension, as fitted on some pairs."""

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
        slope, log_rest = parameters  # margins are scaled by slope / spread; slope 0 fits a judge without any signal
        return nll(y, m * (slope / spread), 1 + math.exp(np.clip(log_rest, -12, 12)))

    optimum = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-10}).x
    slope = max(float(optimum[0]) / spread, 1e-6)  # positive: a judge that is mostly wrong keeps its order of videos
    eta = 1 + math.exp(float(np.clip(optimum[1], -12, 12)))
    return Calibration(1 / slope, eta, pairwise_accuracy(y, m).threshold)


def calibrate(judge: Judge, measured: Measurement) -> list[dict[str, Any]]:
    """Calibrate a judge on its measurement on validation pairs, all noise levels together.

    Sets ``judge.calibration``, which ``Judge.probabilities`` uses and ``save_pretrained`` keeps.

    Returns:
        One row per dimension: dimension, pairs, temperature, eta, tie_threshold, and of P(A preferred) before and
        after, on these very pairs: nll_before, nll_after, calibration_error_before, calibration_error_after.
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
    """Likelihood and calibration error on some pairs, before a calibration and after it."""
    after = (fitted["eta"], fitted["temperature"])
    return {
        "nll_before": nll(labels, margins, eta),
        "nll_after": nll(labels, margins, *after),
        "calibration_error_before": calibration_error(labels, margins, eta),
        "calibration_error_after": calibration_error(labels, margins, *after),
    }
