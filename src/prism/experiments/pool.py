"""Several judges of one kind as one: the accuracy of heads of several seeds, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prism.evaluation import Measurement, prompt_interval

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
