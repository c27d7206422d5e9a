"""A judge's margins on labelled pairs: kept as one Parquet file, compared with another judge's, pooled, calibrated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

COLUMNS = ("judge", "t", "dimension", "prompt", "video_a", "video_b", "label", "margin")


@dataclass(frozen=True, eq=False)
class Measurement:
    """A judge measured on a split.

    rows: the "accuracy" rows of metrics.json.
    pairs: one row per t, dimension and labelled pair: judge, t, dimension, prompt, video_a, video_b, label (1 A
        preferred, -1 B, 0 tie) and margin (score of A minus score of B).
    settings: split, num_draws and seed of the noise, without which two judges were not measured alike.
    """

    rows: list[dict[str, Any]]
    pairs: pa.Table
    settings: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write everything as one Parquet file."""
        extra = json.dumps({"rows": self.rows, "settings": self.settings})
        pq.write_table(self.pairs.replace_schema_metadata({"prism": extra}), path)

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read what `save` wrote. Raises PrismError for a file that is missing or is none of these."""
        try:
            table = pq.read_table(path)
            extra = json.loads((table.schema.metadata or {})[b"prism"])
            return cls(extra["rows"], table.select(COLUMNS), extra["settings"])
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise PrismError(
                f"The file {path} is no whole measurement of a judge ({quoted(error, 150)}); measure anew."
            ) from error

    def decided(self) -> dict[tuple[float, str], tuple[list[tuple[str, str]], np.ndarray, np.ndarray]]:
        """(t, dimension) -> its decided pairs: (video_a, video_b), prompts (n,), and whether judged right (n,) bool."""
        columns = {name: self.pairs[name].to_numpy(zero_copy_only=False) for name in COLUMNS}
        wanted = columns["label"] != 0
        levels, dimensions = columns["t"][wanted], columns["dimension"][wanted]
        keys = list(dict.fromkeys(zip(levels.tolist(), dimensions.tolist())))
        found = {}
        for t, dimension in keys:
            rows = np.flatnonzero(wanted)[(levels == t) & (dimensions == dimension)]
            pairs = list(zip(columns["video_a"][rows].tolist(), columns["video_b"][rows].tolist()))
            right = columns["label"][rows] * columns["margin"][rows] > 0
            found[t, dimension] = pairs, columns["prompt"][rows], right
        return found


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
            known = ~np.isnan(labels[:, column])
            count = int(known.sum())
            arrays = [
                pa.array([judge] * count, pa.string()),
                pa.array([float(t)] * count, pa.float64()),
                pa.array([dimension] * count, pa.string()),
                *(pa.array(names[known], pa.string()) for names in (prompts, first, second)),
                pa.array(labels[known, column].astype(np.int8)),
                pa.array(values[known, column].astype(np.float64)),
            ]
            tables.append(pa.table(arrays, names=list(COLUMNS)))
    return pa.concat_tables(tables).combine_chunks()


def compare_judges(
    one: Measurement | Sequence[Measurement],
    other: Measurement | Sequence[Measurement],
    seed: int = 0,
    any_draws: bool = False,
) -> list[dict[str, Any]]:
    """How much more often one judge is right than another, on the same pairs under the same noise.

    The interval is the paired bootstrap's: what is resampled, whole prompts at a time, are the differences pair by
    pair, so that what is hard for both cancels.

    Args:
        one, other: measurements on the same split, levels, draws and seed. Several of one judge (heads of several
            seeds) count as their mean: the share of them that is right about a pair.
        seed: of the resampling.
        any_draws: the two may differ in how many noise draws a score is averaged over, where that is what is compared.

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
    rows = []
    for key in left[0]:
        if not all(key in found for found in [*left, *right]):
            continue
        pairs, prompts, _ = left[0][key]
        if any(found[key][0] != pairs for found in [*left, *right]):
            raise PrismError(
                f"The judges were measured on different pairs at t = {key[0]:g} in {key[1]}; use the same store."
            )
        gain = np.mean([found[key][2] for found in left], 0) - np.mean([found[key][2] for found in right], 0)
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
    found: list[Any] = [*measured] if isinstance(measured, list | tuple) else [measured]
    if not found or not all(isinstance(each, Measurement) for each in found):
        raise PrismError(
            f"There is no measurement to compare: give at least one of each judge (prism.evaluation.measure), found "
            f"{quoted(measured, 80)}."
        )
    return found


def _name(measured: Measurement) -> str:
    return measured.pairs["judge"][0].as_py()


MEANS = ("without_ties", "with_ties", "with_ties_validation_threshold", "with_ties_model_rule")


def accuracy(measured: Sequence[Measurement], seed: int = 0) -> list[dict[str, Any]]:
    """The "accuracy" rows of all judges, and where there are several, first those of all of them together.

    A pooled row's "head_seed" is None and its "head_seeds" names the judges; accuracies are the judges' means, and the
    interval resamples prompts, a pair counting with the share of judges that are right about it.
    """
    single = [row for each in measured for row in each.rows]
    if len(measured) < 2:
        return single
    decided = [each.decided() for each in measured]
    pooled = []
    for group in zip(*(each.rows for each in measured), strict=True):
        key = (float(group[0]["t"]), group[0]["dimension"])
        if any((float(row["t"]), row["dimension"]) != key for row in group):
            raise ValueError("judges that are pooled must be measured at the same levels, in the same order")
        row = {**group[0], "head_seed": None, "head_seeds": [row["head_seed"] for row in group]}
        for name in MEANS:
            known = [float(each[name]) for each in group if each[name] is not None]
            row[name] = float(np.mean(known)) if len(known) == len(group) else None
        if row["without_ties"] is not None:
            right = np.mean([found[key][2] for found in decided], 0)
            row["without_ties_ci95"] = prompt_interval(right, decided[0][key][1], seed=seed)
        pooled.append(row)
    return pooled + single


# -- calibration: Eq. 3-4 turn a margin into probabilities of A, tie and B. A head that has learned its training pairs
# by heart is too sure of itself, and its eta was set, not learned. Both are corrected on validation pairs by maximum
# likelihood: margins are divided by a temperature, and eta is fitted with it. No ranking changes.

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
