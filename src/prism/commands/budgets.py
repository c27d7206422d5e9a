"""Budgets of the command line, in plain samples, denoiser rows or seconds, and the plan that a budget or file names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism.errors import PrismError, number, quoted

if TYPE_CHECKING:
    from prism.sampling.plan_files import Filed


class Budget(NamedTuple):
    """A budget and its unit: "" (plain samples), "rows" or "s"."""

    value: float
    unit: str


def parse_budget(text: str) -> Budget:
    """A budget from text: 1.5, 200rows or 30s. Raises PrismError for less than one plain sample."""
    unit = next((unit for unit in ("rows", "s") if text.strip().endswith(unit)), "")
    try:
        value = float(text.strip().removesuffix(unit))
    except ValueError:
        raise PrismError(
            f"The --budget {quoted(text, 60)} must be a number of plain samples, or one with its unit: 200rows, 30s."
        ) from None
    value = number("The --budget", value, 0, above=True)
    if not unit and value < 1:
        raise PrismError(f"The --budget is {value:g} plain samples, and one video costs 1; give 1 or more.")
    return Budget(value, unit)


def in_samples(budget: Budget, rows: float, seconds: float | None) -> float:
    """A budget in costs of one plain sample, which takes so many rows and seconds."""
    sample = {"": 1.0, "rows": rows, "s": seconds}[budget.unit]
    assert sample is not None
    if budget.value < sample:
        unit = "rows" if budget.unit == "rows" else "seconds"
        raise PrismError(f"The --budget is {budget.value:g} {unit}, and a plain sample takes {sample:.3g}; give more.")
    return budget.value / sample


def seconds_per_sample(backbone: Any, call: Mapping[str, Any], prompt: str | None) -> float:
    """The seconds of one plain sample on this machine: of the second of two, unless the first takes a minute."""
    from prism.sampling import best_of_n

    def timed() -> float:
        start = time.perf_counter()
        best_of_n(backbone.pipe, None, prompt, n=1, strategy="none", **call)
        return time.perf_counter() - start

    first = timed()
    return first if first > 60 else timed()


def filed_plan(
    plan: Path | None, text: str | None, backbone: Any, judge: Any, call: Mapping[str, Any], prompt: str | None
) -> Filed:
    """The plan that --plan and --budget name, checked against the run.

    plan: file or folder; None: the head's plans, else the default cut. text: the budget; None: the file's only plan.
    """
    from prism.sampling import plan_files
    from prism.sampling.plan import Workload

    cost = None
    if text is not None:
        budget = parse_budget(text)
        rows = float(sum(Workload.of(backbone, call, 1, 0).calls))
        cost = in_samples(budget, rows, seconds_per_sample(backbone, call, prompt) if budget.unit == "s" else None)
    filed = plan_files.opened(plan, cost)
    if filed is None:
        assert cost is not None
        filed = plan_files.within(cost, backbone, judge, call)
    plan_files.check_fits(filed, backbone, judge, call)
    return filed
