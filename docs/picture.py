"""Draw the README's pictures, light and dark, from a full run, and keep its main numbers for the demo to show beside
its own: `python docs/picture.py [FOLDER]`, of docs/evidence where no folder is named.

Left, all candidates of the run's shown prompt in the order of the judge at the cut, finished for the picture; right,
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
from prism.lab.claims import FULL_RUN, summary
from prism.report.figures import Label, place_labels
from prism.report.page import film
from prism.report.wording import is_blind, is_main, is_ours, pooled, role, strategy_name

DOCS = Path(__file__).parent
LIGHT = {"paper": "#ffffff", "ink": "#1d1f24", "muted": "#5d616a", "line": "#e4e2da", "accent": "#3f3ec9"}
DARK = {"paper": "#0d1117", "ink": "#ececea", "muted": "#a4a8b2", "line": "#2e3138", "accent": "#a3a5ff"}


def main(run: Path) -> None:
    metrics, config = files.read_json(run / "metrics.json"), files.read_json(run / "config.json")
    videos = _finished(metrics, config["call"])
    for name, colours in (("picture.png", LIGHT), ("picture-dark.png", DARK)):
        figure = Figure(figsize=(11, 4.9), dpi=160, facecolor=colours["paper"])
        left, right = figure.add_gridspec(
            1, 2, width_ratios=(1.16, 1), left=0.098, right=0.985, top=0.83, bottom=0.115, wspace=0.12
        )
        _films(figure, left, metrics, videos, colours)
        rows = [row for row in pooled(metrics["best_of_n"]) if is_main(row) and row["set"] == "test"]
        _costs(figure, figure.add_subplot(right), rows, colours)
        figure.savefig(DOCS / name)
    files.write_json(FULL_RUN, summary(metrics))


def _finished(metrics: dict[str, Any], call: dict[str, Any]) -> dict[str, np.ndarray]:
    """Candidate -> its video; the later dropped before the earlier, the better before the worse."""
    order: list[str] = []
    for cut in reversed(metrics["cuts"]):
        ranked = sorted(cut["scores"], key=lambda candidate: -cut["scores"][candidate])
        order += [candidate for candidate in ranked if candidate not in order]
    pipe = prism.shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(metrics["seeds"][int(candidate)]) for candidate in order]
    videos = pipe([metrics["prompt"]] * len(order), generator=generators, **call).frames
    return {candidate: np.asarray(video) for candidate, video in zip(order, videos)}


def _films(
    figure: Figure, place: Any, metrics: dict[str, Any], videos: dict[str, np.ndarray], colours: dict[str, str]
) -> None:
    rows, step = place.subgridspec(len(videos), 1, hspace=0.1), metrics["cuts"][0]["step"]
    for line, (candidate, video) in enumerate(videos.items()):
        axes, picked = figure.add_subplot(rows[line]), int(candidate) == metrics["winner"]
        axes.set_facecolor(colours["paper"])
        axes.imshow(film(video, count=11), aspect="equal", interpolation="nearest", alpha=1.0 if picked else 0.5)
        axes.set_anchor("W")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=picked, color=colours["accent"], linewidth=2.5)
        cut = next(cut for cut in reversed(metrics["cuts"]) if candidate in cut["scores"])
        axes.set_ylabel(
            f"{'kept' if picked else 'dropped'}\njudge {cut['scores'][candidate]:+.2f}",
            rotation=0,
            ha="right",
            va="center",
            size=8.5,
            color=colours["accent"] if picked else colours["muted"],
            weight="bold" if picked else "normal",
        )
    words = f"“{metrics['prompt']}”"
    figure.text(0.014, 0.945, words, color=colours["ink"], size=11.5, weight="bold", va="center")
    explained = f"The judge keeps one of {len(videos)} at step {step}. Faded: dropped there, finished for this picture"
    figure.text(0.014, 0.892, explained, color=colours["muted"], size=9.5, va="center")


def _costs(figure: Figure, axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    labels = []
    for row in rows:
        x, y = 100 * row["denoiser_share_of_full"], row["referee_gain"]
        ours = is_ours(row)
        colour = colours["accent" if ours else "muted"]
        if not is_blind(row) and row["referee_gain_ci95"]:
            axes.plot([x, x], row["referee_gain_ci95"], color=colour, linewidth=1.6, alpha=0.5)
        axes.plot(x, y, "o", color=colour, markersize=8 if ours else 6.5)
        name = "perfect pick" if role(row) == "best" else strategy_name(row)
        labels.append(Label(x, y, name, colour, 11, ours))
    axes.set_facecolor(colours["paper"])
    axes.axhline(0, color=colours["muted"], linewidth=1, linestyle=(0, (2, 3)))
    axes.set_xlim(0, 105)
    axes.set_ylim(bottom=-0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.1f}".replace("-", "−").replace("+0.0", "0"))
    axes.set_xlabel(f"denoiser work, share of full Best-of-{rows[0]['n']}", color=colours["muted"])
    left = axes.get_position().x0 - 0.035
    figure.text(left, 0.945, "What a pick gains, and what it costs", color=colours["ink"], size=11.5, weight="bold",
                va="center")  # fmt: skip
    unit = f"over a random pick, in standard deviations; {rows[0]['prompts']} prompts, 95 % intervals"
    figure.text(left, 0.892, unit, color=colours["muted"], size=9.5, va="center")
    axes.tick_params(colors=colours["muted"], length=0)
    axes.grid(axis="y", color=colours["line"])
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours["line"])
    place_labels(figure, axes, labels)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "evidence")
