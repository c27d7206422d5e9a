"""Two judges on the same pairs: the difference of their accuracies, paired, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prism.errors import SEEDS, PrismError, flag, quoted, whole
from prism.evaluation.intervals import prompt_interval
from prism.evaluation.measurement import Measurement
from prism.report.rows import ComparisonRow


def compare_judges(
    one: Measurement | Sequence[Measurement],
    other: Measurement | Sequence[Measurement],
    seed: int = 0,
    any_draws: bool = False,
) -> list[ComparisonRow]:
    """The accuracy of one judge minus another's, on the same pairs under the same noise.

    The interval is a paired bootstrap: it resamples the differences of pairs, whole prompts at a time, so that pairs
    which are hard for both judges do not widen it.

    Args:
        one, other: measurements on the same split, levels, draws and seed. Several measurements of one judge (heads of
            several seeds) count as their mean: the share of the heads that are right about a pair.
        seed: of the resampling.
        any_draws: let the two differ in the number of noise draws that a score is averaged over.

    Returns:
        The "judge_comparison" rows of metrics.json, one per t and dimension that both have: judge, against, set, t,
        dimension, difference (accuracy without ties of `one` minus `other`'s), ci95 (None below 10 prompts), pairs
        (decided), prompts. For two single judges also better and worse (pairs that `one` or `other` alone is right
        about) and mcnemar_p, the exact two-sided p of McNemar's test, which, unlike ci95, assumes independent pairs.

    Raises:
        PrismError: where the two were not measured alike.
    """
    seed, any_draws = whole("seed", seed, 0, SEEDS), flag("any_draws", any_draws)
    ours, theirs = _several(one), _several(other)
    compared = [
        {name: value for name, value in measured.settings.items() if not (any_draws and name == "num_draws")}
        for measured in [*ours, *theirs]
    ]
    for settings in compared:
        if settings != compared[0]:
            raise PrismError(
                f"Judges are compared under the same noise on the same split, found {compared[0]} and {settings}; "
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
        gain: np.ndarray = np.mean([each[key][2] for each in left], 0) - np.mean([each[key][2] for each in right], 0)
        if not len(gain):
            continue
        rows.append(
            {
                "judge": ours[0].judge,
                "against": theirs[0].judge,
                "set": ours[0].settings["split"],
                "t": int(key[0]) if key[0].is_integer() else key[0],
                "dimension": key[1],
                "difference": float(gain.mean()),
                "ci95": prompt_interval(gain, prompts, seed=seed),
                "pairs": len(gain),
                "prompts": len(set(prompts.tolist())),
            }
        )
        if len(left) == len(right) == 1:
            better, worse = int((gain > 0).sum()), int((gain < 0).sum())
            rows[-1] |= {"better": better, "worse": worse, "mcnemar_p": mcnemar(better, worse)}
    return rows


def _several(measured: Measurement | Sequence[Measurement]) -> list[Measurement]:
    measurements: list[Any] = [*measured] if isinstance(measured, list | tuple) else [measured]
    if not measurements or not all(isinstance(each, Measurement) for each in measurements):
        raise PrismError(
            f"There is no measurement to compare: give at least one of each judge (prism.evaluation.measure), found "
            f"{quoted(measured, 80)}."
        )
    return measurements


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p of these numbers of pairs that one judge alone is right about, if both judges were equal."""
    from scipy import stats

    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
