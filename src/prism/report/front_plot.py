"""The plot of plans: quality over cost, the front, Best-of-N in full beside it, and the plan of each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from prism.report.figures import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    SERIES,
    Label,
    as_svg,
    new_figure,
    place_labels,
)
from prism.report.plan_rows import ChosenRow, ReplayedRow

Kind = Literal["now", "ahead", "both", "full", "played", ""]
COLOURS = {"now": SERIES[0], "ahead": ACCENT, "both": SERIES[1], "full": INK, "played": SERIES[2], "": MUTED}
_TICKS = (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Dot(NamedTuple):
    """A plan: its cost in plain samples, its share of the oracle's gain, and its kind (see `kind_of`)."""

    cost: float
    share: float
    kind: Kind


def kind_of(row: ReplayedRow) -> Kind:
    """What a row's plan looks at; "played" for one that was played."""
    if row["how"] == "played":
        return "played"
    if row["strategy"] == "full":
        return "full"
    look = row["settings"].get("look")
    return "" if look is None else "now" if look == "now" else "ahead" if isinstance(look, str) else "both"


def short(row: ReplayedRow) -> str:
    """A row's plan in few words: "6 seeds, 3:1 ahead"."""
    cuts, look = row["settings"].get("schedule") or (), row["settings"].get("look")
    if isinstance(look, list | tuple):
        words = ", ".join(f"{step}:{keep} {each}" for (step, keep), each in zip(cuts, look))
    else:
        words = ",".join(f"{step}:{keep}" for step, keep in cuts) + (" ahead" if look == "ahead" else "")
    return f"{row['n']} seeds, {words or row['strategy']}" if row["n"] > 1 else words or row["strategy"]


def front_plot(
    front: Sequence[ReplayedRow],
    chosen: Sequence[ChosenRow] = (),
    full: Sequence[ReplayedRow] = (),
    dots: Sequence[Dot] = (),
) -> str:
    """Plot shares of the oracle's gain over cost in plain samples; "" without a front.

    Args:
        front: the plans that no cheaper one beats, on all prompts.
        chosen: the plan per budget, measured on prompts that did not choose it; drawn large, with name and interval.
        full: Best-of-N in full by N, as the line to beat.
        dots: all plans; those that were played are diamonds.

    Returns:
        An SVG element in the page's colours.
    """
    if len(front) < 2:
        return ""
    figure, axes = new_figure(10.4, 5.2)
    axes.set_xscale("log", base=2)
    for kind, colour in COLOURS.items():
        some = [dot for dot in dots if dot.kind == kind]
        if some:
            x, y = [dot.cost for dot in some], [100 * dot.share for dot in some]
            few: Any = {"s": 16, "alpha": 0.8, "marker": "D"} if kind == "played" else {"s": 5, "alpha": 0.2}
            axes.scatter(x, y, color=colour, linewidths=0, **few)
    if full:
        line = [(1.0, 0.0), *((row["cost"], 100 * row["share"]) for row in sorted(full, key=lambda row: row["cost"]))]
        axes.plot(*zip(*line), color=INK, linewidth=1.2, linestyle=(0, (4, 2.5)), alpha=0.8)
        axes.plot(*zip(*line[1:]), "o", color=INK, markersize=3.4)
    xs, ys = [row["cost"] for row in front], [100 * row["share"] for row in front]
    last = max([*xs, *(row["cost"] for row in full), *(row["budget"] for row in chosen)])
    axes.plot([*xs, last], [*ys, ys[-1]], drawstyle="steps-post", color=ACCENT, linewidth=2, alpha=0.9)
    axes.fill_between([*xs, last], [*ys, ys[-1]], 0, step="post", color=ACCENT, alpha=0.05, linewidth=0)
    for row in front:
        axes.plot(row["cost"], 100 * row["share"], "o", color=COLOURS[kind_of(row)], markersize=3.4)
    labels: list[Label] = []
    for row in _distinct(chosen):
        cost, share, colour = row["cost"], 100 * row["share"], COLOURS[kind_of(row)]
        if row["share_ci95"]:
            ends = [100 * end for end in row["share_ci95"]]
            axes.plot([cost, cost], ends, color=colour, linewidth=1.6, alpha=0.6, solid_capstyle="round")
        axes.plot(cost, share, "o", color=colour, markersize=9, markeredgecolor=PAPER, markeredgewidth=1.4)
        labels.append(Label(cost, share, short(row), colour, 10, True))
    if not chosen:
        labels = [Label(row["cost"], 100 * row["share"], short(row), ACCENT, 8.5, False) for row in _apart(front)]
    labels += [Label(each["cost"], 100 * each["share"], str(each["n"]), INK, 8, False) for each in full]
    right = last * 1.03
    axes.set_xlim(0.97, right)
    ticks = [tick for tick in _TICKS if tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(_no_ticks())
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(min(bottom, -2), -30), max(top, 60))
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel("cost of one good video, in plain samples (denoiser rows, log scale)", color=MUTED)
    axes.set_title("share of the oracle’s gain", loc="left", color=MUTED, fontsize=9.5, pad=10)
    _gain_axis(axes, front)
    _legend(axes, bool(chosen), bool(full), {dot.kind for dot in dots})
    place_labels(figure, axes, labels)
    return as_svg(figure, "Quality of the picked video over its cost, by plan")


def _distinct(chosen: Sequence[ChosenRow]) -> list[ChosenRow]:
    """One row per plan: several budgets may choose the same."""
    return list({(row["n"], row["name"]): row for row in reversed(chosen)}.values())[::-1]


def _apart(front: Sequence[ReplayedRow], factor: float = 1.18) -> list[ReplayedRow]:
    """Rows of the front that are far enough apart to be named."""
    kept: list[ReplayedRow] = []
    for row in front:
        if not kept or row["cost"] >= factor * kept[-1]["cost"]:
            kept.append(row)
    return kept


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _gain_axis(axes: Any, front: Sequence[ReplayedRow]) -> None:
    """Draw the right axis: gains in the reward's within-prompt standard deviations."""
    best = front[-1]
    if best["share"] <= 0:
        return
    scale = best["gain_sd"] / (100 * best["share"])
    edge = axes.secondary_yaxis("right", functions=(lambda share: share * scale, lambda gain: gain / scale))
    edge.yaxis.set_major_formatter(lambda value, _: f"{value:+.1f}".replace("-", "−").replace("+0.0", "0"))
    edge.set_ylabel("gain over a random pick, in standard deviations", color=MUTED)
    edge.tick_params(colors=MUTED, length=0, pad=4, labelsize=9.5)
    edge.spines["right"].set_visible(False)


def _legend(axes: Any, has_chosen: bool, has_full: bool, kinds: set[Kind]) -> None:
    from matplotlib.lines import Line2D

    plain: Any = {"linestyle": "none"}
    names: dict[Kind, str] = {"now": "any plan that looks now", "ahead": "any that looks ahead"}
    names |= {"both": "any that does both", "played": "any search that was played"}
    entries = [Line2D([], [], color=ACCENT, linewidth=2, label="front: the best at each cost, on all prompts")]
    if has_chosen:
        large: Any = {"markersize": 8, "markeredgecolor": PAPER}
        label = "plan of a budget: chosen on one half, measured on the other, 95 %"
        entries.append(Line2D([], [], color=ACCENT, label=label, marker="o", **plain, **large))
    if has_full:
        entries.append(
            Line2D([], [], color=INK, linestyle=(0, (4, 2.5)), label="every seed in full, by number of seeds")
        )
    entries += [
        Line2D(
            [],
            [],
            color=COLOURS[kind],
            marker="D" if kind == "played" else "o",
            markersize=3,
            label=names[kind],
            **plain,
        )
        for kind in names
        if kind in kinds
    ]
    common: Any = {"frameon": False, "fontsize": 9, "labelcolor": MUTED, "columnspacing": 3}
    axes.figure.legend(handles=entries, loc="outside lower center", ncols=2, **common)
