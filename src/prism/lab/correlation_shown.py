"""A correlation over backbones as two figures, a verdict in one line, and a paragraph of what it shows and does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from prism.lab.correlation import FEWEST, Correlation
from prism.lab.findings import Verdict
from prism.report.figures import ACCENT, GRID, INK, MUTED, Label, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Answer(NamedTuple):
    """`word`: the verdict. `sentence`: why, with the numbers."""

    word: Verdict
    sentence: str


def verdict(found: Correlation) -> Answer:
    """Does judging power rise with generative quality? By Spearman's coefficient, since the claim is one of order.

    It holds where the p is below .05 and the interval of both axes' errors lies above zero, in part where p alone says
    so; it does not where the whole interval lies below .5, or p speaks for the opposite.
    """
    size, row = len(found.points), found.row("spearman")
    if size < FEWEST:
        return Answer("cannot be told", _too_few(found))
    if row is None or row["value"] is None:
        same = f"All {size} backbones have the same quality or judge alike, so that nothing correlates."
        return Answer("cannot be told", same)
    value, clear = row["value"], row["p"] < 0.05
    sentence = f"Over {size} backbones Spearman's coefficient is {_with_interval(row)}, {_p(row)}"
    sentence += f"; Pearson's {_with_interval(pearson)}" if (pearson := found.row("pearson")) else ""
    ends = row["value_ci95"]
    if value > 0 and clear and ends is not None and ends[0] > 0:
        return Answer("holds", f"{sentence}: the better a backbone generates, the better it judges.")
    if value > 0 and clear:
        return Answer("holds in part", f"{sentence}: judging power rises with quality, but the errors allow for none.")
    if (value < 0 and clear) or (ends is not None and ends[1] < 0.5):
        return Answer("does not hold", f"{sentence}: judging power does not rise with quality.")
    return Answer("cannot be told", f"{sentence}: no correlation can be told from chance.")


def _too_few(found: Correlation) -> str:
    """What fewer than five backbones allow to conclude, and what not."""
    size = len(found.points)
    if size < 2:
        return f"{size} backbone{'s' * (size != 1)} cannot correlate; name {FEWEST} or more."
    by_quality = sorted(found.points, key=lambda row: row["quality"])
    ordered = all(a["power"] < b["power"] for a, b in pairwise(by_quality))
    order = " < ".join(row["backbone"] for row in by_quality)
    judged = "they judge in the same order" if ordered else "they do not judge in that order"
    return (
        f"Of {size} backbones the order alone can be told: by quality {order}, and {judged}. No correlation can be: "
        f"of all orders of {size} the likeliest to convince has a two-sided p of {2 / math.factorial(size):.2g}, above "
        f".05; name {FEWEST} or more."
    )


def on(judged: str, sentence: str) -> str:
    """The sentence with the videos that it speaks of before it."""
    return f"On {judged}: {sentence[0].lower()}{sentence[1:]}"


def paragraph(found: Correlation, judged: str) -> str:
    """What it shows and what it does not, from the numbers. judged: the videos that were judged, in words."""
    size = len(found.points)
    if not size:
        return "There is no backbone to compare."
    lines = [on(judged, verdict(found).sentence)]
    row = found.row("spearman")
    if size >= FEWEST and row is not None and row["value"] is not None:
        lines += [text for text in (_others(row), _without(found), _given(found)) if text]
        lines.append(
            "The p takes the backbones to be exchangeable, which stages of one training are not. "
            if any(each["kind"] == "training" for each in found.left_out)
            else "The p takes the backbones to be exchangeable. "
        )
        lines[-1] += "A correlation does not say that generating well makes a backbone judge well: size, data and"
        lines[-1] += " training may make both."
    return " ".join(lines)


def _others(row: dict[str, Any]) -> str:
    if row["others_ci95"] is None:
        return ""
    low, high = map(shown, row["others_ci95"])
    return f"For other backbones of the kind the coefficient may lie from {low} to {high}."


def _without(found: Correlation) -> str:
    parts = []
    for kind, name in (("backbone", "one backbone"), ("training", "all stages of one training")):
        rows = [row for row in found.left_out if row["kind"] == kind and row["spearman"] is not None]
        if rows:
            low, high = (pick(rows, key=lambda row: row["spearman"]) for pick in (min, max))
            without = f" (without {low['left_out']})"
            parts.append(f"without {name} it is {shown(low['spearman'])}{without} to {shown(high['spearman'])}")
    return f"{'; '.join(parts)}.".capitalize() if parts else ""


def _given(found: Correlation) -> str:
    rows = [row for row in found.rows if row["coefficient"] == "spearman" and row["given"]]
    known = [f"given {row['given']} {_with_interval(row)}" for row in rows if row["value"] is not None]
    return f"Held fixed, it is {', '.join(known)}." if known else ""


def _with_interval(row: dict[str, Any]) -> str:
    ends = "" if row["value_ci95"] is None else f" ({' to '.join(map(shown, row['value_ci95']))})"
    return f"{shown(row['value'])}{ends}"


def _p(row: dict[str, Any]) -> str:
    shown = f"{row['p']:.1g}" if row["p"] < 0.001 else f"{row['p']:.3f}".lstrip("0")
    return f"p = {shown} ({'all orders counted' if row['p_method'] == 'exact' else row['p_method']})"


def shown(value: float | None) -> str:
    """A coefficient or share as journals print it: .93, -.10, 1."""
    if value is None:
        return "undefined"
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"


def draw(
    points: Sequence[Mapping[str, Any]], axes: Axes, quality: str = "generative quality", power: str = "judging power"
) -> None:
    """Judging power against quality on `axes`: a point per backbone with its name and the error bars of both axes, and
    stages of one training joined by a line. points: as in `Correlation`.
    """
    for run in dict.fromkeys(row["run"] for row in points if row["run"]):
        stages = [row for row in points if row["run"] == run]
        stages.sort(key=lambda row: row["compute"] or 0)
        if len(stages) > 1:
            axes.plot([row["quality"] for row in stages], [row["power"] for row in stages], color=GRID, linewidth=1.2)
    x, y = ([row[axis] for row in points] for axis in ("quality", "power"))
    across, up = (
        [[max(0.0, sign * (row[f"{axis}_ci95"][end] - row[axis])) for row in points] for end, sign in ((0, -1), (1, 1))]
        for axis in ("quality", "power")
    )
    axes.errorbar(x, y, up, across, fmt="none", ecolor=MUTED, elinewidth=0.8, alpha=0.6)
    axes.plot(x, y, "o", color=ACCENT, markersize=5)
    axes.set_xlabel(quality, color=MUTED)
    axes.set_ylabel(power, color=MUTED)
    labels = [Label(row["quality"], row["power"], row["backbone"], INK, 8.5, False) for row in points]
    place_labels(cast("Figure", axes.figure), axes, labels)


def draw_left_out(
    left_out: Sequence[Mapping[str, Any]], of_all: float | None, axes: Axes, coefficient: str = "spearman"
) -> None:
    """A coefficient on `axes` with each backbone, and each training, left out, beside that of all."""
    rows = [row for row in left_out if row[coefficient] is not None]
    rows.sort(key=lambda row: (row["kind"], row[coefficient]))
    places = range(len(rows))
    if of_all is not None:
        axes.axvline(of_all, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.plot([row[coefficient] for row in rows], places, "o", color=ACCENT, markersize=5)
    names = [f"training {row['left_out']}" if row["kind"] == "training" else row["left_out"] for row in rows]
    axes.set_yticks(list(places), names)
    axes.set_xlabel(f"{coefficient.capitalize()}’s coefficient without it", color=MUTED)
