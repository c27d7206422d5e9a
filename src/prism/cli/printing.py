"""What a command says on the terminal when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def show(metrics: Mapping[str, Any], out: Path) -> None:
    """Print the tables that `metrics` has rows for, and where the files are."""
    from rich.console import Console

    from prism.report import wording
    from prism.report.tables import accuracy_table, best_of_n_table

    console = Console(highlight=False)
    if metrics["accuracy"]:
        console.print(accuracy_table(wording.pooled(metrics["accuracy"])))
    for rows in wording.by_set(wording.pooled(metrics["best_of_n"])).values():
        console.print(best_of_n_table(rows))
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True, markup=False)
