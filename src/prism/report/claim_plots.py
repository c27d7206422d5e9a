"""Figures of claims: accuracy over noise, differences with their intervals, a map of numbers; as SVG and PNG too.

Figures are drawn in the placeholder colours of `prism.report.figures`, so that one drawing suits a page's light and
dark styles; `save` writes them in the light style's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prism import files
from prism.report.figures import ACCENT, GRID, INK, MUTED, PAPER, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = {
    INK: "#1d1f24",
    MUTED: "#5d616a",
    GRID: "#e4e2da",
    ACCENT: "#3f3ec9",
    PAPER: "#ffffff",
    **dict(zip(SERIES, ("#c2662d", "#2f8f6b", "#a8497f", "#7d7a2c", "#3c86b5"))),
}
_COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


class Line(NamedTuple):
    """A line of a plot: y with intervals (or None) over x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[Sequence[float] | None]
    main: bool = False


class Bar(NamedTuple):
    """A difference with its interval; bars of one group stand together."""

    name: str
    value: float
    interval: Sequence[float] | None
    group: str = ""


def over_levels(
    lines: Sequence[Line], x_label: str, percent: bool = True, chance: float | None = 0.5, falling: bool = True
) -> Figure:
    """Lines over noise levels, from noise on the left to clean on the right, or with `falling` off over a step."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(6.4, 4.0)
    scale = 100 if percent else 1
    if chance is not None:
        axes.axhline(scale * chance, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for number, line in enumerate(lines):
        colour = ACCENT if line.main else SERIES[(number - any(each.main for each in lines[:number])) % len(SERIES)]
        y = scale * np.asarray(line.y, dtype=float)
        if all(each is not None for each in line.intervals):
            low, high = (scale * np.array([each[end] for each in line.intervals]) for end in (0, 1))  # type: ignore[index]
            axes.fill_between(line.x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(line.x, y, "o-", color=colour, linewidth=2.2 if line.main else 1.4, markersize=4, label=line.name)
    if falling:
        axes.invert_xaxis()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label, color=MUTED)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    _legend(axes)
    return figure


def forest(bars: Sequence[Bar], x_label: str, zero: float | None = 0.0, scale: float = 100) -> Figure:
    """Differences with their intervals below each other; a dashed line at zero."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    figure, axes = new_figure(6.4, 1.0 + 0.32 * (len(bars) + 0.6 * (len(groups) - 1)))
    axes.grid(visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    if zero is not None:
        axes.axvline(scale * zero, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    places, names, height = [], [], 0.0
    for number, group in enumerate(groups):
        for bar in (bar for bar in bars if bar.group == group):
            colour = ACCENT if number == 0 else SERIES[(number - 1) % len(SERIES)]
            if bar.interval is not None:
                axes.plot(
                    [scale * end for end in bar.interval], [height, height], color=colour, linewidth=2.2, alpha=0.5
                )
            axes.plot(scale * bar.value, height, "o", color=colour, markersize=6)
            places.append(height)
            names.append(bar.name)
            height -= 1
        height -= 0.6
    axes.set_yticks(places, names)
    axes.set_ylim(height + 1.0, 0.7)
    for text in axes.get_yticklabels():
        text.set_color(INK)
    axes.set_xlabel(x_label, color=MUTED)
    return figure


def heat(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], x_label: str, y_label: str, low: float, high: float
) -> Figure:
    """A map of shares (rows, columns), each cell with its number in percent; darker cells are higher."""
    figure, axes = new_figure(1.6 + 0.72 * len(columns), 1.1 + 0.42 * len(rows))
    axes.grid(visible=False)
    for y in range(len(rows)):
        for x in range(len(columns)):
            value = float(values[y, x])
            share = min(max((value - low) / max(high - low, 1e-9), 0), 1)
            axes.fill_between(
                [x - 0.48, x + 0.48], y - 0.46, y + 0.46, color=ACCENT, alpha=0.06 + 0.5 * share, linewidth=0
            )
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=INK, fontsize=10)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(x_label, color=MUTED)
    axes.set_ylabel(y_label, color=MUTED)
    return figure


def _legend(axes: Any) -> None:
    """A legend below the plot, so that it never lies on data."""
    legend = axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9.5, handlelength=1.6
    )
    for text in legend.get_texts():
        text.set_color(INK)


def save(figure: Figure, path: Path, colours: Mapping[str, str] = LIGHT) -> None:
    """Write a figure as PATH.svg and PATH.png in colours of its own; the figure keeps them."""
    from matplotlib import rc_context

    for artist in figure.findobj():
        for name in _COLOURS:
            getter, setter = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if getter is not None and setter is not None:
                _recolour(getter(), setter, colours)
    figure.patch.set_facecolor(colours[PAPER])
    figure.patch.set_alpha(1)
    path.parent.mkdir(exist_ok=True)
    for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
        # the salt makes the names within an SVG the same in each process
        with files.new_file(path.with_suffix(suffix)) as work, rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(work, format=suffix[1:], **options)  # type: ignore[arg-type]


def _recolour(value: Any, setter: Any, colours: Mapping[str, str]) -> None:
    """Set a placeholder colour's own colour, its opacity kept; other values stay."""
    from matplotlib.colors import to_hex, to_rgba

    rows = value if isinstance(value, np.ndarray) and value.ndim == 2 else [value]
    try:
        found = [(to_hex(row), to_rgba(row)[3]) for row in rows]
    except (ValueError, TypeError):  # "none", "auto", several colours of another kind
        return
    if found and all(name in colours for name, _ in found):
        fresh = [to_rgba(colours[name], opacity) for name, opacity in found]
        setter(fresh if len(fresh) > 1 else fresh[0])
