"""Generative quality of real models from a table of VBench's scores, weighted as VBench weighs them.

The table has a row per backbone and a column per dimension: CSV, JSONL or any other table that PRISM reads. VBench's
own script counts a dimension that was not run as 0, so that a total over some of them means nothing; here a total needs
all sixteen. Facts of Vchitect/VBench, scripts/constant.py and cal_final_score.py (Apache 2.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism.errors import PrismError, quoted
from prism.lab.correlation import Published
from prism.preference.sources import Row, Source, open_source

QUALITY = {
    "subject_consistency": (0.1462, 1.0), "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0), "motion_smoothness": (0.706, 0.9975), "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0), "imaging_quality": (0.0, 1.0),
}  # fmt: skip
SEMANTIC = {
    "object_class": (0.0, 1.0), "multiple_objects": (0.0, 1.0), "human_action": (0.0, 1.0), "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0), "scene": (0.0, 0.8222), "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364), "overall_consistency": (0.0, 0.364),
}  # fmt: skip
"""Dimension -> the lowest and the highest score, which become 0 and 1."""
RANGES = {**QUALITY, **SEMANTIC}
HALF = "dynamic_degree"  # counts half
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
NAMES = ("backbone", "model", "name")
TOTALS = ("total", "total_score", "vbench_total")
NEAR = 0.002  # by how much a total in the table may differ from that of its dimensions: it was rounded


@dataclass(frozen=True)
class Quality:
    """What a table says: `of` each backbone, and `what` the number is, in words."""

    of: Mapping[str, Published]
    what: str


def read(path: str | Path, backbones: Sequence[str] = ()) -> Quality:
    """The quality of the backbones in a table; of those that are named, or of all.

    With all sixteen dimensions it is VBench's total, with some of them the mean of the normalised ones, dynamic degree
    counting half: a mean that may be compared within the table, but is no total. A column `error`, the standard error
    of that number, is optional.

    Raises:
        PrismError: for a table that names no backbone or no dimension, a backbone that is missing or named twice, a
            score that is missing, no number or out of range, and a total that its dimensions do not give.
    """
    file = Path(path)
    source = open_source(file, file.absolute().parent)
    label = next((name for name in NAMES if name in source.columns), None)
    if label is None:
        raise _no_column(source, f"a column {', '.join(NAMES[:-1])} or {NAMES[-1]} with the backbones' names")
    columns = {_plain(name): name for name in source.columns}
    present = [name for name in RANGES if name in columns]
    total = next((columns[name] for name in TOTALS if name in columns), None)
    if not present:
        raise _no_column(source, f"a column for each of VBench's dimensions ({', '.join(RANGES)})")
    missing = [name for name in RANGES if name not in columns]
    if total is not None and missing:
        raise PrismError(
            f"The table {quoted(str(file), 120)} has a {total} over {len(present)} of VBench's 16 dimensions, which "
            f"counts {missing[0]} as 0; take that column out, or add all dimensions."
        )
    rows: dict[str, Row] = {}
    for row in source:
        name = row.text(label)
        if name is None:
            raise row.wrong(label, "a backbone's name")
        if name.strip() in rows:
            raise PrismError(f"The backbone {quoted(name.strip(), 80)} is in {row.place} again; keep one row of it.")
        rows[name.strip()] = row
    absent = [name for name in backbones if name not in rows]
    if absent:
        raise PrismError(
            f"The table {quoted(str(file), 120)} has no scores of the backbone {quoted(absent[0], 80)}; it has those "
            f"of {quoted(', '.join(rows), 160) or 'none'}."
        )
    found = {
        name: Published(_of(rows[name], columns, present, total), _error(rows[name], columns))
        for name in (backbones or rows)
    }
    if missing:
        return Quality(found, f"mean of {len(present)} normalised VBench dimensions (no total: 16 make one)")
    return Quality(found, "VBench's total")


def total_of(scores: Mapping[str, float]) -> float:
    """VBench's total of scores in all sixteen dimensions."""
    quality, semantic = (_mean({name: scores[name] for name in group}) for group in (QUALITY, SEMANTIC))
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def _mean(scores: Mapping[str, float]) -> float:
    weights = {name: 0.5 if name == HALF else 1.0 for name in scores}
    values = {name: (score - RANGES[name][0]) / (RANGES[name][1] - RANGES[name][0]) for name, score in scores.items()}
    return math.fsum(weights[name] * values[name] for name in scores) / math.fsum(weights.values())


def _of(row: Row, columns: Mapping[str, str], present: Sequence[str], total: str | None) -> float:
    scores = {name: _score(row, columns[name]) for name in present}
    if len(present) < len(RANGES):
        return _mean(scores)
    value = total_of(scores)
    if total is not None and abs(_score(row, total) - value) > NEAR:
        raise PrismError(
            f"The {total} in {row.place} is {_score(row, total):.4f}, and its dimensions give {value:.4f}; a total "
            "over other dimensions or weights cannot be used: correct it, or take the column out."
        )
    return value


def _score(row: Row, column: str) -> float:
    """A score from 0 to 1, also from a text in percent ("97.3%")."""
    text = row.text(column) or ""
    percent = text.strip().endswith("%")
    cells = {**row.cells, column: text.strip().rstrip("%")} if percent else row.cells
    value = Row(cells, row.place).number(column)
    value = value / 100 if percent and value is not None else value
    if value is None or not 0 <= value <= 1:
        raise row.wrong(column, "a score from 0 to 1, or one in percent such as 97.3%")
    return value


def _error(row: Row, columns: Mapping[str, str]) -> float:
    value = row.number(columns["error"]) if "error" in columns else None
    if value is not None and value < 0:
        raise row.wrong(columns["error"], "a standard error of 0 or more")
    return value or 0.0


def _plain(name: str) -> str:
    """A column's name as VBench writes it in code: "Subject Consistency" is subject_consistency."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _no_column(source: Source, needed: str) -> PrismError:
    return PrismError(
        f"The table {quoted(source.name, 120)} has the columns {quoted(', '.join(source.columns), 160) or 'none'}; it "
        f"needs {needed}."
    )
