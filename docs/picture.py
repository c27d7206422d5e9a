"""Draw the README's picture from a demo run: `python docs/picture.py runs/demo docs/picture.png`.

Left, all candidates of the demo's shown prompt in the order of the judge at the cut, finished for the picture; right,
the quality of each strategy's pick against its cost.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import prism
from prism import files
from prism.report.page import film
from prism.report.wording import is_main, pooled, strategy_name

INK, MUTED, LINE, ACCENT = "#1d1f24", "#6b6f78", "#e4e2da", "#3f3ec9"


def main(run: Path, target: Path) -> None:
    metrics, config = files.read_json(run / "metrics.json"), files.read_json(run / "config.json")
    figure = Figure(figsize=(11, 4.7), dpi=160, facecolor="white")
    left, right = figure.add_gridspec(
        1, 2, width_ratios=(1.0, 1), left=0.115, right=0.985, top=0.87, bottom=0.13, wspace=0.22
    )
    _films(figure, left, metrics, config["call"])
    rows = [row for row in pooled(metrics["best_of_n"]) if is_main(row) and row["set"] == "test"]
    _costs(figure.add_subplot(right), rows)
    figure.savefig(target)


def _films(figure: Figure, place: Any, metrics: dict[str, Any], call: dict[str, Any]) -> None:
    seeds, fate = metrics["seeds"], {}  # candidate -> the last cut it saw; the later dropped before the earlier
    for cut in reversed(metrics["cuts"]):
        for candidate in sorted(cut["scores"], key=lambda candidate: -cut["scores"][candidate]):
            fate.setdefault(candidate, cut)
    order = list(fate)
    pipe = prism.shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seeds[int(candidate)]) for candidate in order]
    videos = pipe([metrics["prompt"]] * len(order), generator=generators, **call).frames
    rows = place.subgridspec(len(order), 1, hspace=0.1)
    for line, (candidate, video) in enumerate(zip(order, videos)):
        axes, picked = figure.add_subplot(rows[line]), int(candidate) == metrics["winner"]
        axes.imshow(film(np.asarray(video)), aspect="equal", interpolation="nearest", alpha=1.0 if picked else 0.55)
        axes.set_anchor("W")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=picked, color=ACCENT, linewidth=2.5)
        cut = fate[candidate]
        note = "kept" if picked else f"dropped at step {cut['step']}"
        style = {"color": ACCENT if picked else MUTED, "weight": "bold" if picked else "normal"}
        axes.set_ylabel(
            f"{note}\njudge {cut['scores'][candidate]:+.2f}", rotation=0, ha="right", va="center", size=8.5, **style
        )
    title = f"“{metrics['prompt']}”: one of {len(order)} finished"
    figure.text(0.014, 0.915, title, color=INK, size=11.5)


def _costs(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        x, y = 100 * row["denoiser_share_of_full"], row["referee_gain"]
        ours = row["strategy"] in ("early", "draft")
        colour = ACCENT if ours else MUTED
        axes.plot([x, x], row["referee_gain_ci95"], color=colour, linewidth=1.6, alpha=0.5)
        axes.plot(x, y, "o", color=colour, markersize=8 if ours else 6.5)
        on_left = x > 80
        near = [other for other in rows if other is not row and abs(100 * other["denoiser_share_of_full"] - x) < 25]
        close = [other for other in near if abs(other["referee_gain"] - y) < 0.12]
        rise = 0 if not close else 7 if y >= max(other["referee_gain"] for other in close) else -7
        axes.annotate(
            strategy_name(row),
            (x, y),
            xytext=(-9 if on_left else 9, rise),
            textcoords="offset points",
            ha="right" if on_left else "left",
            va="center",
            color=colour,
            size=11,
            weight="bold" if ours else "normal",
        )
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.set_xlim(0, 105)
    axes.set_xlabel(f"denoiser work, % of full Best-of-{rows[0]['n']}", color=MUTED)
    axes.set_title("gain over a random seed, in standard deviations", loc="left", color=INK, size=11, pad=12)
    axes.tick_params(colors=MUTED, length=0)
    axes.grid(axis="y", color=LINE)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
