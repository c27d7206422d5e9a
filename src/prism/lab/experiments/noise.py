"""The claim that the judge keeps working in noise where judges of decoded frames collapse (Table 1, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism.evaluation.measurement import accuracy
from prism.lab.bench import BASE, Bench
from prism.lab.findings import CLAIMED, MAIN, Drawing, Experiment, Finding, Tables, judged, shares
from prism.report import wording
from prism.report.claim_plots import Line, over_levels


def run(bench: Bench) -> Finding:
    """Accuracy by noise level of the judge's heads and of each judge of decoded frames, on the same pairs."""
    ours, others = bench.measured([BASE])[BASE], bench.by_pixels()
    rows = _rows("prism", accuracy(ours, bench.seed))
    apart: list[dict[str, Any]] = []
    for name, measured in others.items():
        rows += _rows(name, measured.rows)
        for t in measured.about["levels"]:
            difference = shares(ours, [t]).less(shares([measured], [t]))
            apart.append({"against": name, "t": t, "difference": difference.mean,
                          "difference_ci95": difference.interval(bench.seed)})  # fmt: skip
    mine = shares(ours)
    interval = mine.interval(bench.seed)
    deciding = [None if interval is None else [end - 0.5 for end in interval]]
    words = []
    for name, measured in others.items():  # per judge of frames: less accurate in noise than ours, and than when clean
        both = [t for t in CLAIMED if t in measured.about["levels"]]
        pooled = shares(ours, both).less(shares([measured], both))
        deciding.append(pooled.interval(bench.seed))
        words.append(f"{pooled.points(bench.seed)} over {name} at {', '.join(f'{t:g}' for t in both)}")
        if 0 in measured.about["levels"]:
            fall = shares([measured], [0]).less(shares([measured], both))
            deciding.append(fall.interval(bench.seed))
            words[-1] += f", which falls by {fall.points(bench.seed)} from clean videos"
    verdict = judged(deciding)
    if verdict == "holds" and not others:  # nothing was measured that could collapse
        verdict = "holds in part"
    levels = ", ".join(f"{t:g}" for t in CLAIMED)
    text = (
        f"Over t = {levels} the judge orders {wording.percent(mine.mean)} of decided pairs rightly. {_clear(rows)} "
        + (
            "The claim is of these differences, each over all of its levels: the judge over chance, and over each "
            "judge of frames, which itself falls from clean videos. Judges of frames that ship were trained longer, on "
            "more prompts."
            if others
            else "No judge of decoded frames was measured beside it, so that nothing is said about their collapse."
        )
        + " This does not show that judges of decoded frames trained at another size would fall as much."
    )
    number = "; ".join([f"{wording.percent(mine.mean)} ({wording.percent_interval(interval)}) at t = {levels}", *words])
    tables = {"accuracy": rows, "against-pixels": apart}
    return Finding(verdict, number, text, tables, mine.num_prompts, tuple(bench.seeds))


def _clear(rows: Sequence[dict[str, Any]]) -> str:
    """The levels at which each judge is clear of chance, in a sentence."""
    by_judge: dict[str, list[str]] = {}
    for row in rows:
        ends = row["without_ties_ci95"]
        by_judge.setdefault(row["judge"], []).extend([f"{row['t']:g}"] if ends is not None and ends[0] > 0.5 else [])
    parts = [
        f"{judge} at t = {', '.join(levels)}" if levels else f"{judge} nowhere" for judge, levels in by_judge.items()
    ]
    return f"Clear of chance are {'; '.join(parts)}."


def _rows(judge: str, rows: Sequence[Any]) -> list[dict[str, Any]]:
    of_main = [row for row in rows if row["dimension"] == MAIN]
    kept = [row for row in of_main if row.get("head_seeds") or row["head_seed"] is None]
    names = ("t", "without_ties", "without_ties_ci95", "with_ties_validation_threshold", "decided_pairs",
             "decided_prompts")  # fmt: skip
    return [{"judge": judge, **{name: row[name] for name in names}} for row in kept or of_main]


def draw(tables: Tables) -> Sequence[Drawing]:
    """Accuracy over the noise level, a line per judge."""
    lines = []
    for judge in dict.fromkeys(row["judge"] for row in tables["accuracy"]):
        rows = [row for row in tables["accuracy"] if row["judge"] == judge and row["without_ties"] is not None]
        lines.append(
            Line(
                judge,
                [row["t"] for row in rows],
                [row["without_ties"] for row in rows],
                [row["without_ties_ci95"] for row in rows],
                judge == "prism",
            )
        )
    caption = (
        "Share of decided pairs ordered rightly against the noise level of what is judged, with 95 % intervals over "
        "prompts; the dashed line is chance."
    )
    return [Drawing("noise-robustness", caption, over_levels(lines, "noise level t (1000 noise, 0 clean)"))]


NOISE = Experiment(
    "noise-robustness",
    "Judging in noise",
    "The judge keeps working on noisy latents, where judges of decoded frames collapse.",
    "Table 1, Fig. 2",
    run,
    draw,
    kinds=lambda bench: [BASE],
)
