"""The two plots of a report as inline SVG, in colours that the page's light and dark styles define."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prism.report import wording
from prism.report.rows import AccuracyRow, BestOfNRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib draws in these placeholder colours; each is replaced by a CSS variable, so that one drawing suits both the
# light and the dark style.
INK, MUTED, GRID, ACCENT, PAPER = "#010203", "#020304", "#030405", "#040506", "#050607"
SERIES = ("#060708", "#070809", "#08090a", "#090a0b", "#0a0b0c")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    PAPER: "var(--card)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)},
}


class _Line(NamedTuple):
    """One judge's accuracies on one dimension, by rising t; `main` lines are drawn strong and with their interval."""

    name: str
    rows: Sequence[AccuracyRow]
    colour: str
    main: bool


class _Point(NamedTuple):
    """A strategy's share of full Best-of-N's denoiser rows, in percent, and its gain."""

    cost: float
    gain: float
    row: BestOfNRow


class Label(NamedTuple):
    """A name at a point of a plot, in data coordinates; `size` in points."""

    x: float
    y: float
    text: str
    colour: str
    size: float
    bold: bool


_STYLE = {"svg.fonttype": "none", "font.size": 10, "axes.unicode_minus": True, "path.simplify": False}


def accuracy_plot(rows: Sequence[AccuracyRow]) -> str:
    """Plot accuracy without ties against t: each judge's overall line with its interval, dimensions as thin lines.

    Returns an SVG element, or "" if no row has an accuracy.
    """
    lines = _accuracy_lines(rows)
    if not lines:
        return ""
    figure, axes = new_figure(4.9, 4.2 if sum(line.main for line in lines) > 1 else 3.5)
    axes.axhline(50, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate("chance", (0, 50), xytext=(0, 3), textcoords="offset points", color=MUTED, ha="right", fontsize=9)
    ends, levels = [], {row["t"] for line in lines for row in line.rows}
    for line in lines:
        t = [row["t"] for row in line.rows]
        value = [100 * share for row in line.rows if (share := row["without_ties"]) is not None]
        width, size = (2.2, 5) if line.main else (1.2, 0)
        intervals = [interval for row in line.rows if (interval := row["without_ties_ci95"])]
        if line.main and len(intervals) == len(line.rows):
            low, high = ([100 * interval[end] for interval in intervals] for end in (0, 1))
            axes.fill_between(
                t, low, high, color=line.colour, alpha=0.14 if line.colour == ACCENT else 0.09, linewidth=0
            )
        for (x0, x1), (y0, y1) in zip(pairwise(t), pairwise(value)):
            skipped = any(x0 < level < x1 for level in levels)  # a level in between was measured for other lines only
            style: Any = {"linestyle": (0, (2, 2.5)), "alpha": 0.7} if skipped else {}
            axes.plot([x0, x1], [y0, y1], color=line.colour, linewidth=width, solid_capstyle="round", **style)
        axes.plot(t, value, "o", color=line.colour, markersize=size, markeredgecolor=PAPER)
        ends.append((value[0], line))
    axes.set_xlim(1005, -15)  # as sampling goes: from noise on the left to clean on the right
    axes.set_xticks([1000, 800, 600, 400, 200, 0], ["1000\nnoise", "800", "600", "400", "200", "0\nclean"])
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, 45), max(top, 60))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel("noise level t of the latent that is judged", color=MUTED)
    _end_labels(axes, ends)
    return as_svg(figure, "Pairwise accuracy without ties against the noise level t")


def _accuracy_lines(rows: Sequence[AccuracyRow]) -> list[_Line]:
    """Overall lines of every judge and set; if there is only one judge, also its dimensions, as thin lines."""
    series: dict[tuple[Any, ...], list[AccuracyRow]] = {}
    for row in rows:
        if row["without_ties"] is not None:
            series.setdefault((wording.judge_name(row), row["set"], row["dimension"]), []).append(row)
    main, short = wording.main_dimension(rows), wording.short_names(rows)
    mains = [key for key in series if key[2] == main]
    sets = {key[1] for key in mains}
    lines = []
    if len(mains) == 1:
        others = [key for key in series if key not in mains]
        lines = [_Line(key[2], series[key], SERIES[i % len(SERIES)], False) for i, key in enumerate(others)]
    for i, key in enumerate(mains):
        judge = short[key[0]]
        name = key[2] if len(mains) == 1 else judge if len(sets) == 1 else f"{judge}, {key[1]}"
        lines.append(_Line(name, series[key], ACCENT if i == 0 else SERIES[(i - 1) % len(SERIES)], True))
    return [line._replace(rows=sorted(line.rows, key=lambda row: row["t"])) for line in lines]


def training_plot(history: Sequence[Mapping[str, Any]]) -> str:
    """Mean loss against optimiser steps, from a training run's history; "" for fewer than two entries."""
    if len(history) < 2:
        return ""
    figure, axes = new_figure(4.9, 3.5)
    steps, loss = [entry["step"] for entry in history], [entry["loss"] for entry in history]
    axes.plot(steps, loss, color=ACCENT, linewidth=2.2)
    axes.set_xlabel("optimiser step", color=MUTED)
    return as_svg(figure, "Training loss against optimiser steps")


def cost_plot(rows: Sequence[BestOfNRow]) -> str:
    """Plot the pick's gain against denoiser rows, each strategy with its interval and name; "" without gains.

    Points of one strategy with several settings are joined in the order of their cost. The setting that was fixed
    before the run (its name is the strategy's) is large; small numbers at the others are the step of the cut or the
    length of the draft. The right axis shows gains as shares of the oracle's gain.
    """
    points = [
        _Point(100 * row["denoiser_share_of_full"], row["referee_gain"], row)
        for row in rows
        if row["referee_gain"] is not None and row["denoiser_share_of_full"] is not None
    ]
    if not points:
        return ""
    figure, axes = new_figure(4.9, 4.2 if any(not wording.is_main(point.row) for point in points) else 3.5)
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    right = max(*(point.cost for point in points), 100.0)
    for several in _curves(points).values():
        line = sorted(several, key=lambda point: point.cost)
        costs, gains = [point.cost for point in line], [point.gain for point in line]
        axes.plot(costs, gains, color=_colour(line[0].row), linewidth=1.3, alpha=0.7)
    labels: list[Label] = []
    for x, y, row in points:
        colour = _colour(row)
        ours, main = wording.is_ours(row), wording.is_main(row)
        if row["referee_gain_ci95"] and not wording.is_blind(row):  # a blind pick's gain is chance
            width, alpha = (1.4, 0.55) if main else (0.8, 0.3)
            axes.plot([x, x], row["referee_gain_ci95"], color=colour, linewidth=width, alpha=alpha)
        size = 4.5 if not main else 8 if ours else 6.5
        one = len(row["schedule"] or [0]) == 1  # points with several cuts are hollow, and not on the curve
        fill = colour if main or one else "none"
        axes.plot(x, y, "o", color=colour, markersize=size, markerfacecolor=fill, markeredgewidth=1)
        if main:
            labels.insert(0, Label(x, y, wording.strategy_name(row), colour, 10.5 if ours else 10, ours))
        elif one:
            ahead = " ahead" if row.get("look", "now") != "now" else ""
            labels.append(Label(x, y, f"{wording.setting(row)}{ahead}", colour, 8, False))
    axes.set_xlim(0, right * 1.04)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.1f}".replace("-", "−").replace("+0.0", "0"))
    sizes = "/".join(str(n) for n in sorted({int(point.row["n"]) for point in points}))
    axes.set_xlabel(f"denoiser work, share of full Best-of-{sizes}", color=MUTED)
    _oracle_axis(axes, points)
    place_labels(figure, axes, labels)
    return as_svg(figure, "Quality of the picked video against denoiser work, by strategy")


def _colour(row: BestOfNRow) -> str:
    ours = wording.ours()
    if row["strategy"] in ours and row["judge"] == "prism":
        return (ACCENT, *SERIES[1:])[ours.index(row["strategy"]) % len(SERIES)]
    return INK if wording.role(row) == "reference" else MUTED


def _curves(points: Sequence[_Point]) -> dict[str, list[_Point]]:
    """Points of a strategy that was run with several settings of one number: early with one cut, and drafts."""
    curves: dict[str, list[_Point]] = {}
    for point in points:
        if wording.setting(point.row) is not None:
            curves.setdefault(f"{point.row['strategy']} {point.row.get('look', 'now')}", []).append(point)
    return {strategy: curve for strategy, curve in curves.items() if len(curve) > 1}


def _oracle_axis(axes: Axes, points: Sequence[_Point]) -> None:
    """Draw the right axis: gains as shares of the best candidate's gain."""
    best: float | None = next((point.gain for point in points if wording.role(point.row) == "best"), None)
    if not best:
        return
    to_share, to_gain = 100 / best, best / 100
    conversions: Any = (lambda gain: to_share * gain, lambda share: to_gain * share)
    edge = axes.secondary_yaxis("right", functions=conversions)
    edge.set_yticks([0, 25, 50, 75, 100])
    edge.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    edge.set_ylabel("share of the oracle’s gain", color=MUTED)
    edge.tick_params(colors=MUTED, length=0, pad=4, labelsize=9.5)
    edge.spines["right"].set_visible(False)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, pad=6, labelsize=9.5)
    return figure, axes


def _end_labels(axes: Axes, ends: Sequence[tuple[float, _Line]]) -> None:
    """Write names at the right (clean) end of the lines, moved apart where lines are close."""
    low, high = axes.get_ylim()
    heights = _spread([end[0] for end in ends], gap=(high - low) * 0.062, low=low, high=high)
    for (_, line), height in zip(ends, heights):
        axes.annotate(
            line.name,
            (1.01, height),
            xycoords=("axes fraction", "data"),
            annotation_clip=False,
            va="center",
            color=line.colour,
            fontsize=10 if line.main else 9,
        )


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label]) -> None:
    """Write names next to their points, each where it overlaps the fewest points, lines and earlier names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    FigureCanvasAgg(figure).draw()  # computes the layout, and so lengths in pixels
    unit = figure.dpi / 72
    taken = []
    for line in axes.get_lines():
        ends = line.get_transform().transform(line.get_xydata())
        reach = (line.get_markersize() / 2 + 1 if line.get_marker() not in ("None", None, "") else 1) * unit
        steps = [ends] if len(ends) == 1 else [np.linspace(a, b, 40) for a, b in pairwise(ends)]
        taken += [(x - reach, y - reach, x + reach, y + reach) for x, y in np.concatenate(steps)]
    frame = axes.get_window_extent()
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        width, height = 0.6 * label.size * len(label.text) * unit, 1.1 * label.size * unit
        best = None
        for away in (6, 11, 17):
            for across, up in ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0)):
                middle = x + across * (away * unit + width / 2), y + up * (away * unit + height / 2 * (across == 0))
                box = Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)
                hits = sum(a < box.x1 and c > box.x0 and b < box.y1 and d > box.y0 for a, b, c, d in taken)
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                cost = hits + 0.2 * away + 1000 * outside
                if best is None or cost < best[0]:
                    best = cost, across, box
        assert best is not None
        _, across, box = best
        taken += [(box.x0, box.y0, box.x1, box.y1)] * 20
        anchor = {1: box.x0, 0: (box.x0 + box.x1) / 2, -1: box.x1}[across]
        axes.annotate(
            label.text,
            # Anchored at the side next to its point, so that larger text on a page grows away from the point.
            tuple(axes.transData.inverted().transform((anchor, (box.y0 + box.y1) / 2))),
            ha={1: "left", 0: "center", -1: "right"}[across],
            va="center",
            color=label.colour,
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            annotation_clip=False,
        )


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`values` moved apart by at least `gap`, inside [low, high], in the same order, close to where they were.

    The mean of the lowest and the highest solution is one too, and so is that mean limited to [low, high].
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    last = len(order) - 1
    result = [0.0] * len(values)
    for i, index in enumerate(order):
        pushed_up = max(values[order[j]] + (i - j) * gap for j in range(i + 1))
        pushed_down = min(values[order[j]] - (j - i) * gap for j in range(i, last + 1))
        middle = max((pushed_up + pushed_down) / 2, low + i * gap)
        result[index] = min(middle, high - (last - i) * gap)
    return result


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element with the page's width, font and colours, and `title` for screen readers."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(
        {**_STYLE, "svg.hashsalt": title}
    ):  # the salt keeps ids apart, and the same in every run
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(
        r"<svg\b[^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1
    )
    ids = dict.fromkeys(re.findall(r'\bid="([^"]+)"', text))
    prefix = re.sub(r"\W+", "-", title.lower())[:12]
    for name in ids:
        used = f"#{name}" in text
        text = text.replace(f' id="{name}"', f' id="{prefix}-{name}"' if used else "")
        text = text.replace(f'"#{name}"', f'"#{prefix}-{name}"').replace(f"url(#{name})", f"url(#{prefix}-{name})")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()
