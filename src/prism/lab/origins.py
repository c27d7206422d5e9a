"""What a demo computed, and what came with the package: said on its page, on the terminal and in metrics.json.

A reader must be able to tell the two apart, since a short run leans on weights and scores that longer runs left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from prism.report import wording
from prism.report.page import Section
from prism.report.tables import Column, Table

if TYPE_CHECKING:
    from prism.lab.demo import DemoConfig


class OriginRow(TypedDict):
    """One row of "origins": a part of the demo, what this run computed of it, and what came with the package."""

    what: str
    now: str
    package: str


def rows(config: DemoConfig, metrics: Mapping[str, Any]) -> list[OriginRow]:
    """A row per part of a demo with these settings."""
    parts: list[OriginRow] = []
    if config.front:
        spread = metrics["spread"]
        parts.append(
            {
                "what": "What a budget buys",
                "now": f"the replay of {metrics['replayed']:,} plans, the plan of each budget, the intervals",
                "package": f"the judge’s and the referee’s scores of {spread['prompts']} prompts × "
                f"{spread['candidates']} candidates",
            }
        )
    parts.append(
        {
            "what": f"Best-of-{config.n}",
            "now": f"all candidates of {config.prompts} prompts, their scores at every cut, the referee’s scores",
            "package": "the judge" if config.shipped else wording.MISSING,
        }
    )
    parts.append(
        {
            "what": "Accuracy by noise level",
            "now": "every score" + (f", and a head trained for {config.train.steps} steps" if config.shipped else ""),
            "package": _of_accuracy(config),
        }
    )
    if config.matched or config.few_steps:
        parts.append(
            {
                "what": "All strategies at matched cost",
                "now": f"every run of every strategy on {max(config.matched, config.few_steps)} prompts, and the "
                "referee’s scores",
                "package": "the judge, and the plan of each budget (chosen on validation prompts)",
            }
        )
    return parts


def _of_accuracy(config: DemoConfig) -> str:
    """What came with the package for the accuracies: judges, and the videos that they are measured on."""
    names = ["the judge"] if config.shipped else []
    if config.pixel and not (config.fresh or config.full):
        names.append("the two pixel judges")
    if not config.labelled and not config.fresh:
        names.append("the test videos (as latents) and their labels")
    return ", ".join(names) or wording.MISSING


def section(metrics: Mapping[str, Any]) -> Section:
    """The part of the page."""
    return Section(
        "Computed in this run, and shipped with the package",
        "The embedded generator, its prompts and the referee always come with the package.",
        tables=[(table(metrics["origins"]), "")],
        wrap=True,
    )


def table(parts: list[OriginRow]) -> Table[OriginRow]:
    """`parts` as in "origins", one line each."""
    return Table(
        [
            Column("", lambda row: row["what"], left=True, style="bold"),
            Column("computed in this run", lambda row: row["now"], left=True),
            Column("came with the package", lambda row: row["package"], left=True),
        ],
        parts,
        "Computed in this run, and shipped with the package",
    )
