"""Soft labels of pairs: probabilities and weights, in separate columns next to a dimension's hard labels.

For a dimension DIM, a table of pairs may have the columns

    DIM:p_a, DIM:p_b    probabilities in [0, 1] that A, that B is better; the rest of 1 is that of a tie
    DIM:weight          how much the label counts in the loss, from 0 (not at all); a plain label counts 1

A null means the hard label, with weight 1. Training reads these columns; accuracy uses the hard labels only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from prism.errors import PrismError, quoted

PROBABILITIES = ("p_a", "p_b")
WEIGHT = "weight"
ROUNDING = 1e-6
"""Largest excess over 1 of the sum of two float32 probabilities."""


def is_extra(column: str) -> bool:
    """True for a column of soft labels: its name holds a colon, as no dimension's name does."""
    return ":" in column


def check_soft(pairs: pa.Table, dimensions: Sequence[str], where: str) -> None:
    """Check the soft labels and weights of a table of pairs.

    Args:
        pairs: the table.
        dimensions: its columns of hard labels.
        where: the table's name in an error, such as its file.

    Raises:
        PrismError: for a column that belongs to no dimension, one probability without the other, probabilities outside
            [0, 1] or with a sum above 1, and weights that are negative or not finite.
    """
    for column in filter(is_extra, pairs.column_names):
        dimension, _, kind = column.rpartition(":")
        if kind not in (*PROBABILITIES, WEIGHT):
            raise PrismError(
                f"The column {quoted(column, 80)} of {where} is not a column of pairs: after the colon must come p_a, "
                "p_b or weight, and a dimension's name has no colon. Rename the column or leave it out."
            )
        if dimension not in dimensions:
            raise PrismError(
                f"The column {quoted(column, 80)} of {where} needs a column {quoted(dimension, 80)} beside it, with "
                "the hard labels (1, -1, 0 or null)."
            )
    for dimension in dimensions:
        _check_dimension(pairs, dimension, where)


def _check_dimension(pairs: pa.Table, dimension: str, where: str) -> None:
    values = {}
    for kind in (*PROBABILITIES, WEIGHT):
        if (name := f"{dimension}:{kind}") in pairs.column_names:
            values[kind] = _numbers(pairs, name, where)
    sides = [values[kind] for kind in PROBABILITIES if kind in values]
    if len(sides) == 1:
        present, absent = PROBABILITIES if "p_a" in values else PROBABILITIES[::-1]
        raise PrismError(
            f"The pairs of {where} have the column {quoted(f'{dimension}:{present}', 80)} without "
            f"{quoted(f'{dimension}:{absent}', 80)}; give both probabilities or neither."
        )
    for kind, column in values.items():
        highest, allowed = (np.inf, "numbers from 0") if kind == WEIGHT else (1.0, "probabilities from 0 to 1")
        outside = (column < 0) | (column > highest)  # False for NaN, which stands for null here
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise PrismError(
                f"The column {quoted(f'{dimension}:{kind}', 80)} of {where} must hold {allowed}, found {column[row]:g} "
                f"in row {row}."
            )
    if sides:
        _check_sides(values["p_a"], values["p_b"], dimension, where)


def _check_sides(p_a: np.ndarray, p_b: np.ndarray, dimension: str, where: str) -> None:
    both = f"{quoted(f'{dimension}:p_a', 80)} and {quoted(f'{dimension}:p_b', 80)} of {where}"
    one_null = np.isnan(p_a) != np.isnan(p_b)
    if one_null.any():
        row = int(np.flatnonzero(one_null)[0])
        raise PrismError(f"The columns {both} must be given both or neither; in row {row} one of them is null.")
    above = p_a + p_b > 1 + ROUNDING
    if above.any():
        row = int(np.flatnonzero(above)[0])
        raise PrismError(
            f"The columns {both} must sum to 1 at most (the rest is the probability of a tie), found {p_a[row]:g} and "
            f"{p_b[row]:g} in row {row}."
        )


def _numbers(pairs: pa.Table, column: str, where: str) -> np.ndarray:
    """(pairs,) float64, NaN where null; other values must be finite in float32, as training computes in float32."""
    kind = pairs[column].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise PrismError(
            f"The column {quoted(column, 80)} of {where} must hold numbers or null, found {quoted(str(kind), 80)}."
        )
    values: np.ndarray = pairs[column].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    valid = pairs[column].is_valid().to_numpy()
    not_finite = valid & ~(np.abs(values) <= np.finfo(np.float32).max)
    if not_finite.any():
        row = int(np.flatnonzero(not_finite)[0])
        raise PrismError(
            f"The column {quoted(column, 80)} of {where} must hold finite numbers or null, found {values[row]:g} in "
            f"row {row}."
        )
    return values


def soft_labels(
    pairs: pa.Table, dimensions: Sequence[str], where: str = "the pairs"
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Probabilities that A and that B is better, and weights.

    Returns:
        soft: (pairs, num_dimensions, 2) float64, NaN where a pair has none.
        weights: (pairs, num_dimensions) float64, NaN where a pair has none. Both are None if the table has no such
            column for any of the dimensions.

    Raises:
        PrismError: as `check_soft`, for these dimensions.
    """
    by_kind: dict[str, list[np.ndarray]] = {kind: [] for kind in (*PROBABILITIES, WEIGHT)}
    for dimension in dimensions:
        _check_dimension(pairs, dimension, where)
        for kind, columns in by_kind.items():
            name = f"{dimension}:{kind}"
            exists = name in pairs.column_names
            columns.append(_numbers(pairs, name, where) if exists else np.full(len(pairs), np.nan))

    def has(kind: str) -> bool:
        return any(f"{dimension}:{kind}" in pairs.column_names for dimension in dimensions)

    sides = [np.stack(by_kind[kind], 1) for kind in PROBABILITIES] if has("p_a") else []
    return np.stack(sides, -1) if sides else None, np.stack(by_kind[WEIGHT], 1) if has(WEIGHT) else None
