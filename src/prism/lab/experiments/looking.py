"""The claim that the query looks at the main subject, and less at one that is broken (Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prism.errors import PrismError
from prism.evaluation import prompt_interval
from prism.lab import attention
from prism.lab.bench import BASE, Bench
from prism.lab.findings import CLAIMED, Drawing, Experiment, Finding, Tables, judged
from prism.report import wording
from prism.report.claim_plots import Bar, forest
from prism.shapeworld import grammar


def run(bench: Bench) -> Finding:
    """The share of the query's attention that falls on objects, over their share of the video; best against worst."""
    measured = bench.parts.once("looking", lambda: {"rows": _rows(bench)})["rows"]
    rows: list[dict[str, Any]] = []
    for t in CLAIMED:
        some = [row for row in measured if row["t"] == t]
        prompts = np.arange(len(some))
        lifts = {}
        for which in ("best", "worst"):
            columns = np.array([[row[f"{which}_attention"], row[f"{which}_area"]] for row in some])
            lifts[which] = float(columns[:, 0].sum() / columns[:, 1].sum())
            interval = prompt_interval(columns, prompts, attention.ratio, bench.seed)
            rows.append({"t": t, "videos": which, "lift": lifts[which], "lift_ci95": interval, "prompts": len(some)})
        columns = np.array(
            [[row[f"{which}_{name}"] for which in ("best", "worst") for name in ("attention", "area")] for row in some]
        )
        interval = prompt_interval(columns, prompts, _apart, bench.seed)
        rows.append({"t": t, "videos": "best less worst", "lift": lifts["best"] - lifts["worst"],
                     "lift_ci95": interval, "prompts": len(some)})  # fmt: skip

    def of(which: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["videos"] == which]

    looks = [None if (ci := row["lift_ci95"]) is None else [end - 1 for end in ci] for row in of("best")]
    less = [row["lift_ci95"] for row in of("best less worst")]
    on_objects, less_at_broken = judged(looks), judged(less)
    verdict = judged([*looks, *less])
    middle = next(row for row in of("best") if row["t"] == CLAIMED[1])
    apart = next(row for row in of("best less worst") if row["t"] == CLAIMED[1])
    number = (
        f"at t = {CLAIMED[1]} {middle['lift']:.2f} times the share of objects "
        f"({wording.signed_interval(middle['lift_ci95']).replace('+', '')}); best less worst "
        f"{wording.signed(apart['lift'])} ({wording.signed_interval(apart['lift_ci95'])})"
    )
    text = (
        f"That the query looks at objects more than at the ground: {on_objects}. That it looks less at broken ones "
        f"(the worst candidate of each prompt by the referee): {less_at_broken}. Objects are all that the prompt "
        "names, not the main one alone, and other heads' attention was not measured beside it. A map of attention says "
        "what was read, not why a score came out."
    )
    seeds = tuple(bench.seeds)[:1]
    return Finding(verdict, number, text, {"attention": rows}, middle["prompts"], seeds)


def _apart(sums: np.ndarray) -> np.ndarray:
    """The lift of the first two columns less that of the last two, as a statistic of `prompt_interval`."""
    return np.asarray(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])


def _rows(bench: Bench) -> list[dict[str, Any]]:
    """Per prompt and level, for its best and worst video by the labels: the shares of attention and of cells."""
    judge, store = bench.judges(BASE)[0], bench.tested
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
            weights = attention.look(judge, latents, prompt, t, bench.call, bench.seed)
            cells = attention.object_cells(decoded, prompt, weights.shape[1:])
            both = attention.shares(weights, cells)
            rows.append(
                {"prompt": prompt, "t": t}
                | {f"{which}_{name}": share[name] for which, share in zip(("best", "worst"), both)
                   for name in ("attention", "area")}
            )  # fmt: skip
    return [row for row in rows if row["best_area"] > 0 and row["worst_area"] > 0]


def _rewards(store: Any) -> list[str]:
    from prism.evaluation.recorded import reward_columns

    return [name for name in reward_columns(store) if name in store.dimensions or name == "overall"]


def draw(tables: Tables) -> Sequence[Drawing]:
    """How much more the query looks at objects than their share of the video."""
    bars = [
        Bar(f"t = {row['t']:g}, {row['videos']}", row["lift"], row["lift_ci95"], row["videos"])
        for row in tables["attention"]
        if row["videos"] != "best less worst"
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
