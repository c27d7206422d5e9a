"""The page of claims: each with its verdict, number and interval on top, then its figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism.report import wording
from prism.report.page import Section
from prism.report.rows import AnswerRow
from prism.report.tables import Column, Table

MARKS = {"holds": "●", "holds in part": "◐", "does not hold": "○", "cannot be told": "?"}
LONGEST = 60
"""Rows of a table that the page shows; the CSV beside it holds all."""


def answers_table(rows: Sequence[AnswerRow]) -> Table[AnswerRow]:
    """A line per claim."""
    return Table(
        [
            Column("claim", lambda row: row["claim"], left=True),
            Column("verdict", lambda row: f"{MARKS[row['verdict']]} {row['verdict']}", left=True),
            Column("number, 95 % interval", lambda row: row["number"], left=True),
            Column("heads", lambda row: str(len(row["seeds"])) if row["seeds"] else wording.MISSING),
            Column("prompts", lambda row: str(row["prompts"])),
            Column("in the paper", lambda row: row["source"], left=True),
        ],
        rows,
        "Claims",
    )


def sections(
    answers: Sequence[AnswerRow],
    titles: Mapping[str, str],
    figures: Mapping[str, Sequence[tuple[str, str]]],
    tables: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> list[Section]:
    """The claims on top, then a section per experiment. figures: (SVG, caption) by experiment; tables: rows by name."""
    first = Section(
        "Claims",
        "A claim holds where every difference that it speaks of is above zero beyond its 95 % interval, holds in "
        "part where some are and none is below, does not hold where one is below zero beyond its interval, and "
        "cannot be told where no interval is clear of zero. The refutation and the correlation have rules of their "
        "own, in their text.",
        tables=[(answers_table(answers), "")],
        wrap=True,
    )
    parts = [first]
    for row in answers:
        name = row["experiment"]
        lead = f"{row['claim']} {row['verdict'].capitalize()}. {row['text']}"
        shown = [(flat_table(rows[:LONGEST]), _caption(label, rows)) for label, rows in tables[name].items() if rows]
        parts.append(Section(titles[name], lead, figures[name], shown))
    return parts


def _caption(label: str, rows: Sequence[Any]) -> str:
    more = f" The first {LONGEST} of {len(rows)} rows; the file holds all." if len(rows) > LONGEST else ""
    return f"tables/{label}.csv.{more}"


def flat_table(rows: Sequence[Mapping[str, Any]]) -> Table[Mapping[str, Any]]:
    """A table of flat rows, a column per key; intervals are written beside what they are of."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.endswith("_ci95")]
    return Table([_column(name, rows) for name in names], rows)


def _column(name: str, rows: Sequence[Mapping[str, Any]]) -> Column[Mapping[str, Any]]:
    text = any(isinstance(row.get(name), str) for row in rows)
    return Column(name.replace("_", " "), lambda row: _cell(row, name), left=text)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, interval = row.get(name), row.get(f"{name}_ci95")
    if value is None:
        return wording.MISSING
    if isinstance(value, str) or not isinstance(value, float):
        return str(value)
    number = f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}".rstrip("0").rstrip(".") or "0"
    if interval is None:
        return number.replace("-", "−")
    return f"{value:.3f} ({interval[0]:.3f} … {interval[1]:.3f})".replace("-", "−")
