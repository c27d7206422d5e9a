"""What an experiment of the laboratory found: tables, figures, a paragraph, and a verdict on the claim in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOLDS, IN_PART, FAILS, UNCLEAR = "holds", "holds in part", "does not hold", "cannot be told"


class Verdict(NamedTuple):
    """`word`: holds, holds in part, does not hold, cannot be told. `sentence`: why, with the numbers."""

    word: str
    sentence: str


@dataclass(frozen=True)
class Finding:
    """An experiment's results.

    tables: rows by the table's name, for CSV files. figures: by name, what draws each on a matplotlib `Axes`. text: a
    paragraph of what it shows and does not show.
    """

    verdict: Verdict
    text: str
    tables: Mapping[str, list[dict[str, Any]]]
    figures: Mapping[str, Callable[[Axes], None]] = field(default_factory=dict)


def shown(value: float | None) -> str:
    """A coefficient or share as journals print it: .93, -.10, 1."""
    if value is None:
        return "undefined"
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"
