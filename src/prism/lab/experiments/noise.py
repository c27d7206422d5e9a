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
    over_chance = None if interval is None else [end - 0.5 for end in interval]
    claimed: list[list[float] | None] = [row["difference_ci95"] for row in apart if row["t"] in CLAIMED]
    verdict = judged([over_chance, *claimed])
    if verdict == "holds" and not claimed:  # nothing was measured that could collapse
        verdict = "holds in part"
    clear = [row for row in apart if row["t"] in CLAIMED and wording.clear(row["difference_ci95"])]
    levels = ", ".join(f"{t:g}" for t in CLAIMED)
    text = (
        f"Over t = {levels} the judge orders {wording.percent(mine.mean)} of decided pairs rightly. "
        + (
            f"Against judges of decoded frames it is told apart in {len(clear)} of {len(claimed)} comparisons there."
            if claimed
            else "No judge of decoded frames was measured beside it, so that nothing is said about their collapse."
        )
        + " This does not show that judges of decoded frames trained at another size would fall as much."
    )
    number = f"{wording.percent(mine.mean)} ({wording.percent_interval(interval)}) at t = {levels}"
    if apart:
        first = next(iter(others))
        both = [t for t in CLAIMED if t in others[first].about["levels"]]
        pooled = shares(ours, both).less(shares([others[first]], both))
        number += f"; {pooled.points(bench.seed)} over {first} at "
        number += ", ".join(f"{t:g}" for t in both)
    tables = {"accuracy": rows, "against-pixels": apart}
    return Finding(verdict, number, text, tables, mine.num_prompts, tuple(bench.seeds))


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
