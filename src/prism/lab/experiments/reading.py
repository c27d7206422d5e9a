"""The claims on the head: a query beats pooling; more queries, other eta and other densities of t change little
(Table 3, supplement Table 4, Fig. 2); and which block is read at which noise level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism.lab.bench import BASE, Bench
from prism.lab.findings import Drawing, Experiment, Finding, Tables, judged, row_of, shares
from prism.report import wording
from prism.report.claim_plots import Bar, forest, heat

POOLED = ("mean", "linear")
VARIED = ("queries-4", "queries-8", "eta-3", "eta-8", "clean", "noise")
WITHIN = 0.02
"""A difference of accuracy that counts as none, as the paper's own differences between these variants are smaller."""


def _kinds(bench: Bench) -> list[str]:
    return [BASE, *POOLED, *(VARIED if bench.scale.name == "full" else VARIED[:4])]


def run(bench: Bench) -> Finding:
    """Accuracy of each kind of head, and its paired difference from the paper's."""
    names = _kinds(bench)
    measured = bench.measured(names)
    rows = [row_of(name, bench.kinds[name].what, measured[name], measured[BASE], bench.seed) for name in names]
    base = shares(measured[BASE])
    over = [base.less(shares(measured[name])) for name in POOLED]
    verdict = judged([each.interval(bench.seed) for each in over])
    varied = [row for row in rows if row["kind"] in names and row["kind"] not in (BASE, *POOLED)]
    same = [row for row in varied if (ci := row["difference_ci95"]) and max(map(abs, ci)) <= WITHIN]
    other = [row for row in varied if wording.clear(row["difference_ci95"])]
    mean, linear = (each.points(bench.seed) for each in over)
    number = f"query over mean token {mean}, over a linear probe {linear}"
    text = (
        f"A query against the mean token: {mean}; against a linear probe on it: {linear}. "
        f"Of {len(varied)} variants of the query head {len(other)} are told from it, and {len(same)} are shown to be "
        f"within {100 * WITHIN:.0f} points of it. Heads of other sizes, or trained longer, may differ otherwise."
    )
    return Finding(verdict, number, text, {"heads": rows}, base.num_prompts, tuple(bench.seeds))


def draw(tables: Tables) -> Sequence[Drawing]:
    """Differences from the paper's head."""
    rows = [row for row in tables["heads"] if row["kind"] != BASE]
    bars = [
        Bar(row["what"], row["difference"], row["difference_ci95"], "pooling" if row["kind"] in POOLED else "variants")
        for row in rows
    ]
    label = "accuracy less that of one query, percentage points"
    caption = "Paired differences over t = 899, 699 and 499, with 95 % intervals over prompts."
    return [Drawing("query-and-pooling", caption, forest(bars, label))]


READING = Experiment(
    "query-and-pooling",
    "One query against pooling",
    "A learnable query reads the preference better than pooled tokens do.",
    "Table 3, supplement Table 4",
    run,
    draw,
    kinds=_kinds,
)


# -- depth


def _depths(bench: Bench) -> list[str]:
    return [f"depth-{block}" for block in range(1, bench.backbone.num_blocks + 1)]


def run_depth(bench: Bench) -> Finding:
    """Accuracy by block and noise level; whether the best block is told from the first."""
    names = _depths(bench)
    measured = bench.measured(names)
    rows = [
        {"block": block, "t": t, "accuracy": shares(measured[name], [t]).mean,
         "accuracy_ci95": shares(measured[name], [t]).interval(bench.seed)}
        for block, name in enumerate(names, 1) for t in bench.levels
    ]  # fmt: skip
    chosen = shares(measured[f"depth-{bench.tap}"])
    first = chosen.less(shares(measured[names[0]]))
    last = chosen.less(shares(measured[names[-1]]))
    over = [
        {"block": block, "difference": (each := chosen.less(shares(measured[name]))).mean,
         "difference_ci95": each.interval(bench.seed)}
        for block, name in enumerate(names, 1)
    ]  # fmt: skip
    over_first, over_last = first.points(bench.seed), last.points(bench.seed)
    number = f"block {bench.tap} of {len(names)} over block 1 {over_first}, over the last {over_last}"
    text = (
        f"{number[0].upper()}{number[1:]}. The paper reads after 12 of 30 blocks; 5 blocks were worse there, and 15 "
        "slightly better. Which block is best may differ on another backbone."
    )
    prompts = chosen.num_prompts
    tables = {"depth": rows, "against-chosen": over}
    return Finding(judged([first.interval(bench.seed)]), number, text, tables, prompts, tuple(bench.seeds))


def draw_depth(tables: Tables) -> Sequence[Drawing]:
    """The map of accuracies by block and noise level."""
    rows = tables["depth"]
    blocks, levels = sorted({row["block"] for row in rows}), sorted({row["t"] for row in rows}, reverse=True)
    by_cell = {(row["block"], row["t"]): row["accuracy"] for row in rows}
    values = np.array([[by_cell[block, t] for t in levels] for block in blocks])
    caption = "Share of decided pairs ordered rightly, in percent, by the block that is read and the noise level."
    figure = heat(
        values, [f"{block}" for block in blocks], [f"{t:g}" for t in levels], "noise level t", "block", 0.5, 0.8
    )
    return [Drawing("depth", caption, figure)]


DEPTH = Experiment(
    "depth",
    "Which block is read",
    "Middle blocks read the preference better than the first ones.",
    "Table 3",
    run_depth,
    draw_depth,
    kinds=_depths,
)
