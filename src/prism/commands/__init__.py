"""The commands of `prism`: each a dataclass of its options with a `main`. Most of them end with `show`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def speaks() -> bool:
    """True in the first of the processes that a launcher started, which alone prints the results."""
    return os.environ.get("RANK", "0") == "0"


def show(metrics: Mapping[str, Any], out: Path) -> None:
    """Print the tables for which `metrics` has rows, and the path of the report."""
    from rich.console import Console

    from prism.report import wording
    from prism.report.evaluation_tables import evaluation_tables, swap_sentence
    from prism.report.plan_page import chosen_table
    from prism.report.tables import accuracy_table, beside_table, best_of_n_table, judges_table, sight_table

    console = Console(highlight=False)
    if metrics.get("plans"):
        console.print(chosen_table(metrics["plans"]))
    for picks in wording.by_set(wording.in_order(wording.pooled(metrics["best_of_n"]))).values():
        console.print(best_of_n_table(picks))
    if metrics.get("sight"):
        console.print(sight_table(metrics["sight"]))
    if metrics["accuracy"]:
        for name, rows in wording.by_set(wording.pooled(metrics["accuracy"])).items():
            several = len({wording.judge_name(row) for row in rows}) > 1
            console.print(judges_table(rows, f"Judges on {name} prompts") if several else accuracy_table(rows))
    for table in evaluation_tables(metrics).values():
        console.print(table)
    for row in metrics.get("swap", []):
        console.print(swap_sentence(row))
    if metrics.get("beside"):
        console.print(beside_table(metrics["beside"]))
    for part in metrics.get("origins", ()):
        text = f"{part['what']}. Computed now: {part['now']}. Came with the package: {part['package']}."
        console.print(text, markup=False)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True, markup=False)
