"""The claim that the query looks at the main subject, and less at one that is broken (Fig. 6)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prism.errors import PrismError
from prism.evaluation import prompt_interval
from prism.lab import attention
from prism.lab.bench import BASE, Bench
from prism.lab.findings import CLAIMED, Drawing, Experiment, Finding, Tables, judged
from prism.report import wording
from prism.report.claim_plots import Bar, forest
from prism.shapeworld import grammar

UNTRAINED, LESS, LEARNED = "best, untrained query", "best less worst", "trained less untrained"


def run(bench: Bench) -> Finding:
    """The share of the query's attention that falls on objects, over their share of the video: of the best video
    against the worst, and of trained heads against the same heads before their training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This judge is untrained")  # heads before their training are meant to be
        measured = bench.parts.once("looking", lambda: {"rows": _rows(bench)})["rows"]
    rows: list[dict[str, Any]] = []
    for t in CLAIMED:
        some = [row for row in measured if row["t"] == t]
        prompts = np.arange(len(some))

        def lift(*names: str, some: Any = some) -> np.ndarray:
            return np.array([[row[name] for name in names] for row in some])

        sums = {
            "best": lift("best_attention", "best_area"),
            "worst": lift("worst_attention", "worst_area"),
            UNTRAINED: lift("best_untrained", "best_area"),
        }
        sums[LESS] = np.concatenate([sums["best"], sums["worst"]], 1)
        sums[LEARNED] = np.concatenate([sums["best"], sums[UNTRAINED]], 1)
        for which, columns in sums.items():
            statistic = attention.ratio if columns.shape[1] == 2 else _apart
            value = float(statistic(columns.sum(0, keepdims=True))[0])
            interval = prompt_interval(columns, prompts, statistic, bench.seed)
            rows.append({"t": t, "videos": which, "lift": value, "lift_ci95": interval, "prompts": len(some)})

    def of(which: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["videos"] == which]

    looks = [None if (ci := row["lift_ci95"]) is None else [end - 1 for end in ci] for row in of("best")]
    learned = [row["lift_ci95"] for row in of(LEARNED)]
    less = [row["lift_ci95"] for row in of(LESS)]
    verdict = judged([*looks, *learned, *less])
    middle, apart, over = (
        next(row for row in of(which) if row["t"] == CLAIMED[1]) for which in ("best", LESS, LEARNED)
    )
    number = (
        f"at t = {CLAIMED[1]} {middle['lift']:.2f} times the share of objects "
        f"({wording.signed_interval(middle['lift_ci95']).replace('+', '')}), {wording.signed(over['lift'])} "
        f"({wording.signed_interval(over['lift_ci95'])}) over the untrained query; best less worst "
        f"{wording.signed(apart['lift'])} ({wording.signed_interval(apart['lift_ci95'])})"
    )
    text = (
        f"That the query looks at objects more than at the ground: {judged(looks)}. That training made it look there, "
        f"more than the same heads before it: {judged(learned)}. That it looks less at broken ones (the worst "
        f"candidate of each prompt by the referee): {judged(less)}. Objects are all that the prompt names, not the "
        "main one alone. A map of attention says what was read, not why a score came out."
    )
    return Finding(verdict, number, text, {"attention": rows}, middle["prompts"], tuple(bench.seeds))


def _apart(sums: np.ndarray) -> np.ndarray:
    """The lift of the first two columns less that of the last two, as a statistic of `prompt_interval`."""
    return np.asarray(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])


def _rows(bench: Bench) -> list[dict[str, Any]]:
    """Per prompt and level, for its best and worst video by the labels: the shares of attention and of cells, of the
    mean map of all heads, and of all heads before their training."""
    heads = {"attention": bench.judges(BASE), "untrained": [bench.untrained(BASE, seed) for seed in bench.seeds]}
    store = bench.tested
    scores = store.videos.select(["video", "prompt", "split", *_rewards(store)]).to_pylist()
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in scores:
        if row["split"] == "test":
            grouped.setdefault(row["prompt"], []).append(row)
    if any(grammar.parse(prompt) is None for prompt in grouped):
        raise PrismError("The prompts are not ShapeWorld's, so that nothing says where in a video its objects are.")
    rows: list[dict[str, Any]] = []
    for prompt, videos in list(grouped.items())[: bench.scale.attended]:
        values = [float(np.mean([row[name] for name in _rewards(store)])) for row in videos]
        pair = [videos[int(np.argmax(values))]["video"], videos[int(np.argmin(values))]["video"]]
        latents = store.latents(pair)
        decoded = bench.backbone.decode(latents).cpu()
        for t in CLAIMED:
            found: dict[str, Any] = {"prompt": prompt, "t": t}
            for name, judges in heads.items():
                maps = [attention.look(judge, latents, prompt, t, bench.call, bench.seed) for judge in judges]
                weights = torch.stack(maps).mean(0)
                cells = attention.object_cells(decoded, prompt, weights.shape[1:])
                for which, share in zip(("best", "worst"), attention.shares(weights, cells)):
                    found |= {f"{which}_{name}": share["attention"], f"{which}_area": share["area"]}
            rows.append(found)
    return [row for row in rows if row["best_area"] > 0 and row["worst_area"] > 0]


def _rewards(store: Any) -> list[str]:
    from prism.evaluation.recorded import reward_columns

    return [name for name in reward_columns(store) if name in store.dimensions or name == "overall"]


def draw(tables: Tables) -> Sequence[Drawing]:
    """How much more the query looks at objects than their share of the video."""
    bars = [
        Bar(f"t = {row['t']:g}, {row['videos']}", row["lift"], row["lift_ci95"], row["videos"])
        for row in tables["attention"]
        if row["videos"] in ("best", "worst", UNTRAINED)
    ]
    figure = forest(bars, "attention on objects over their share of the video", zero=1.0, scale=1.0)
    caption = "One is attention that ignores objects. Best and worst video of each prompt by the referee."
    return [Drawing("attention", caption, figure)]


LOOKING = Experiment(
    "attention",
    "Where the query looks",
    "The query looks at the main subject, and less where it is malformed.",
    "Fig. 6",
    run,
    draw,
    kinds=lambda bench: [BASE],
)
