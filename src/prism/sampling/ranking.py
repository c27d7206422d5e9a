"""What candidates are ranked by: a dimension, or weights over the dimensions of a judge or of an oracle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from prism.checks import number, quoted
from prism.errors import PrismError


def ranking(judge: Any, select_by: str | Mapping[str, float]) -> dict[str, float]:
    """Weights of the judge's dimensions by which candidates are ranked.

    "overall" of a judge that has none is the mean of its dimensions, with a warning. Raises PrismError for a dimension
    that it has not, weights that are no finite numbers, or no weight at all.
    """
    return weights_over(judge.dimensions, select_by, "judge")


def weights_over(names: Sequence[str], select_by: str | Mapping[str, float], whose: str) -> dict[str, float]:
    """As `ranking`, over dimensions `names` of a judge, or of an oracle's answers."""
    weights = check_weights(select_by)
    if weights == {"overall": 1.0} and "overall" not in names:
        warnings.warn(
            f"The {whose} has no dimension overall; candidates are ranked by the mean of {', '.join(names)}.",
            stacklevel=4,
        )
        return dict.fromkeys(names, 1 / len(names))
    for name in weights:
        if name not in names:
            raise PrismError(
                f"The {whose} has no dimension {quoted(repr(name), 60)} to select by; it has {', '.join(names)}."
            )
    return weights


def check_weights(select_by: Any) -> dict[str, float]:
    """The weights by dimension that `select_by` gives, which are finite numbers and not all zero."""
    if isinstance(select_by, str):
        return {select_by: 1.0}
    if not isinstance(select_by, Mapping):
        raise PrismError(
            f'select_by must be a dimension, or weights by dimension such as {{"VQ": 1.0}}; found '
            f"{quoted(select_by, 80)}."
        )
    weights = {name: number(f"The weight of {quoted(name, 40)}", value) for name, value in select_by.items()}
    if not any(weights.values()):
        raise PrismError("select_by (--select-by) gives no dimension a weight; name one, for example overall.")
    return weights
