"""Soft labels of pairs: probabilities and weights, in columns of their own beside a dimension's hard labels.

Beside a column DIM a table of pairs may have the columns

    DIM:p_a, DIM:p_b    probabilities in [0, 1] that A, that B is better; what is left of 1 is the tie's
    DIM:weight          how much the label counts in the loss, from 0 (not at all); a plain label counts 1

A null means: as the hard label says, with weight 1. Training reads them; accuracy goes by the hard labels alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from prism.errors import PrismError, quoted

PROBABILITIES = ("p_a", "p_b")
WEIGHT = "weight"
ROUNDING = 1e-6
"""By how much two float32 probabilities may sum to more than 1."""


def is_extra(column: str) -> bool:
    """Whether a column of pairs says more about a dimension, and is none itself: its name holds a colon."""
    return ":" in column


def check_soft(pairs: pa.Table, dimensions: Sequence[str], where: str) -> None:
    """Check the soft labels and weights of a table of pairs.

    Args:
        pairs: the table.
        dimensions: its columns of hard labels.
        where: what an error calls the table, such as its file.

    Raises:
        PrismError: on a column that belongs to no dimension, one probability without the other, probabilities outside
            [0, 1] or with a sum above 1, and weights that are negative or not finite.
    """
    for column in filter(is_extra, pairs.column_names):
        dimension, _, kind = column.rpartition(":")
        if kind not in (*PROBABILITIES, WEIGHT):
            raise PrismError(
                f"The column {quoted(column, 80)} of {where} is none that a store knows: after the colon comes p_a, "
                "p_b or weight. A dimension's name holds no colon; rename the column or leave it out."
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
        if (column := f"{dimension}:{kind}") in pairs.column_names:
            values[kind] = _numbers(pairs, column, where)
    sides = [values[kind] for kind in PROBABILITIES if kind in values]
    if len(sides) == 1:
        had, lacked = PROBABILITIES if "p_a" in values else PROBABILITIES[::-1]
        raise PrismError(
            f"The pairs of {where} have the column {quoted(f'{dimension}:{had}', 80)} without "
            f"{quoted(f'{dimension}:{lacked}', 80)}; give both probabilities or neither."
        )
    for kind, found in values.items():
        highest, wanted = (np.inf, "numbers from 0") if kind == WEIGHT else (1.0, "probabilities from 0 to 1")
        strange = (found < 0) | (found > highest)  # false of NaN, which stands for null here
        if strange.any():
            row = int(np.flatnonzero(strange)[0])
            raise PrismError(
                f"The column {quoted(f'{dimension}:{kind}', 80)} of {where} must hold {wanted}, found {found[row]:g} "
                f"in row {row}."
            )
    if sides:
        _check_sides(values["p_a"], values["p_b"], dimension, where)


def _check_sides(p_a: np.ndarray, p_b: np.ndarray, dimension: str, where: str) -> None:
    both = f"{quoted(f'{dimension}:p_a', 80)} and {quoted(f'{dimension}:p_b', 80)} of {where}"
    alone = np.isnan(p_a) != np.isnan(p_b)
    if alone.any():
        row = int(np.flatnonzero(alone)[0])
        raise PrismError(f"The columns {both} must be given both or neither; in row {row} one of them is null.")
    above = p_a + p_b > 1 + ROUNDING
    if above.any():
        row = int(np.flatnonzero(above)[0])
        raise PrismError(
            f"The columns {both} must sum to 1 at most (what is left is the tie's), found {p_a[row]:g} and "
            f"{p_b[row]:g} in row {row}."
        )


def _numbers(pairs: pa.Table, column: str, where: str) -> np.ndarray:
    """(pairs,) float64, NaN where null; no other value that is not finite as float32, in which training reckons."""
    kind = pairs[column].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise PrismError(
            f"The column {quoted(column, 80)} of {where} must hold numbers or null, found {quoted(str(kind), 80)}."
        )
    values: np.ndarray = pairs[column].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    given = pairs[column].is_valid().to_numpy()
    wild = given & ~(np.abs(values) <= np.finfo(np.float32).max)
    if wild.any():
        row = int(np.flatnonzero(wild)[0])
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
        weights: (pairs, num_dimensions) float64, NaN where a pair has none. Both are None where the table has no such
            column for any of the dimensions.

    Raises:
        PrismError: as `check_soft`, of these dimensions.
    """
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in (*PROBABILITIES, WEIGHT)}
    for dimension in dimensions:
        _check_dimension(pairs, dimension, where)
        for kind, columns in found.items():
            column = f"{dimension}:{kind}"
            known = column in pairs.column_names
            columns.append(_numbers(pairs, column, where) if known else np.full(len(pairs), np.nan))

    def has(kind: str) -> bool:
        return any(f"{dimension}:{kind}" in pairs.column_names for dimension in dimensions)

    sides = [np.stack(found[kind], 1) for kind in PROBABILITIES] if has("p_a") else []
    return np.stack(sides, -1) if sides else None, np.stack(found[WEIGHT], 1) if has(WEIGHT) else None
