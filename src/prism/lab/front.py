"""The demo's main figure: every plan of Best-of-N, replayed on the table of scores that ships with the package.

The table was scored beforehand (its README says how); the replay, the choice of a plan per budget and the intervals are
computed when the demo runs. What the judge sees at each cut is measured on the run's own candidates, with the table's
many prompts beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prism import shapeworld
from prism.evaluation import planning, prompt_interval
from prism.evaluation.recorded import Recorded
from prism.lab.attention import ratio
from prism.report import plan_page, wording
from prism.report.front_plot import front_plot
from prism.report.page import Section
from prism.report.rows import SightRow
from prism.report.tables import sight_table
from prism.sampling import plan_files
from prism.sampling.planner import Reading, Table

if TYPE_CHECKING:
    from prism.lab.contest import Record

FILE = "scores.parquet"
OVERALL = "overall"


def shipped() -> Path:
    """The table that ships: the head that ships, on 8 candidates of each of 200 test prompts."""
    return shapeworld.asset_folder("plan") / FILE


def plans() -> Path | None:
    """The plans that ship, chosen on validation prompts; None where there are none."""
    path = shapeworld.asset_folder("plan") / plan_files.FILE
    return path if path.is_file() else None


def shrink(source: Path, target: Path) -> None:
    """Write a table of scores again with the overall reward and scores alone, in float32."""
    scores = Recorded.load_file(source)
    column = scores.about["dimensions"].index(OVERALL)
    overall = {reading: values[..., [column]].astype(np.float32) for reading, values in scores.scores.items()}
    rewards = {OVERALL: scores.reward(OVERALL).astype(np.float32)}
    replace(scores, rewards=rewards, scores=overall, about={**scores.about, "dimensions": [OVERALL]}).save(target)


def replay(path: Path, seed: int) -> planning.Replayed:
    """Replay every plan on a table of scores."""
    scores = Recorded.load_file(path)
    return planning.Replayed.of(scores.table(OVERALL), scores.load, seed)


def fields(replayed: planning.Replayed) -> dict[str, Any]:
    """The fields of metrics.json, as `prism plan` writes them: front, plans, spread, by and replayed."""
    return {
        "front": [replayed.row(index) for index in replayed.front()],
        "plans": [replayed.chosen(budget) for budget in planning.BUDGETS],
        "spread": replayed.spread,
        "by": OVERALL,
        "replayed": len(replayed.runs),
    }


def section(metrics: Mapping[str, Any], replayed: planning.Replayed) -> Section:
    """The part of the page: the front over cost, and the plan per budget."""
    spread, plans = metrics["spread"], metrics["plans"]
    lead = (
        f"{metrics['replayed']:,} ways of spending Best-of-N (how many seeds, dropped at which steps, judged as they "
        "are or ahead), each replayed in this run. Their scores came with the package: "
        f"{spread['candidates']} candidates of each of {spread['prompts']} test prompts, judged by the head that "
        "ships. The oracle picks the best finished video; a random pick gains nothing."
    )
    plot = front_plot(metrics["front"], plans, replayed.fulls(), replayed.dots())
    note = (
        f"Each plan was chosen on {plans[0]['chosen_on']} prompts and measured on {plans[0]['prompts']} others. “in "
        "full”: Best-of-N in full within the same budget, and its N; “over it”: the difference in percentage points."
    )
    tables = [(plan_page.chosen_table(plans), note)]
    return Section("What a budget buys", lead, [(plot, plan_page.front_caption(plans))], tables, wide=True)


# -- what the judge sees at each cut


def sight(records: Sequence[Record], table: Table | None, seed: int) -> list[SightRow]:
    """The rows "sight" of metrics.json: the first judge's pairwise accuracy at each cut, on the candidates of contests.

    records: one per prompt: "prompt", "values", and "cuts", its readings with scores (judges, n). table: that ships.
    """
    rows: list[SightRow] = []
    values = np.array([record["values"][OVERALL] for record in records])
    for number, cut in enumerate(records[0].get("cuts", ()) if records else ()):
        scores = np.array([record["cuts"][number]["scores"][0] for record in records])
        share, interval = _accuracy(values, scores, seed)
        same = None if table is None else _same(table, cut)
        before, before_interval = (None, None) if table is None or same is None else _accuracy(table.values, same, seed)
        rows.append(
            {
                "look": cut["look"],
                "step": cut["step"],
                "t": cut["t"],
                "share": share,
                "share_ci95": interval,
                "prompts": len(records),
                "shipped": before,
                "shipped_ci95": before_interval,
                "shipped_prompts": 0 if table is None or same is None else len(table.values),
            }
        )
    return sorted(rows, key=lambda row: (row["step"], row["look"] != "now"))


def sight_section(rows: Sequence[SightRow]) -> Section:
    """The part of the page on them."""
    lead = (
        "Share of a prompt’s pairs of candidates that the judge orders as the referee orders the finished videos: "
        f"measured in this run on the {rows[0]['prompts']} prompts of Best-of-N, and beside it on the many prompts of "
        "the table that came with the package. Ahead: of the clean latents that the denoiser predicts at that step."
    )
    return Section("What the judge sees while a video is sampled", lead, tables=[(sight_table(rows), "")])


def sight_sentence(rows: Sequence[SightRow]) -> str:
    """The least noisy news first: the earliest cut at which the judge is told from chance."""
    row = next((row for row in rows if row["share_ci95"] and row["share_ci95"][0] > 0.5), None)
    if row is None:
        return ""
    look = "as the latents stand" if row["look"] == "now" else "looking ahead"
    return (
        f"While {row['prompts']} prompts were sampled, it already ordered {wording.percent(row['share'], 0)} of all "
        f"pairs of candidates rightly at step {row['step']}, {look} "
        f"({wording.percent_interval(row['share_ci95'], 0)})."
    )


def _same(table: Table, cut: Mapping[str, Any]) -> np.ndarray | None:
    """(P, n) the table's scores of the same reading, with as many of its draws as there are up to the cut's."""
    draws = [reading.draw for reading in table.scores if _is_near(reading, cut)]
    level = next((reading.t for reading in table.scores if _is_near(reading, cut)), None)
    wanted = min(len(draws), int(cut["num_draws"]))
    return table.score(cut["look"], cut["step"], level, wanted) if draws else None


def _is_near(reading: Reading, cut: Mapping[str, Any]) -> bool:
    return (reading.look, reading.step) == (cut["look"], cut["step"]) and abs(reading.t - cut["t"]) < 0.5


def _accuracy(values: np.ndarray, scores: np.ndarray, seed: int) -> tuple[float, list[float] | None]:
    """The share of pairs (of different value) that scores (P, n) order as values (P, n), with its interval."""
    first, second = np.triu_indices(values.shape[1], 1)
    better, margin = values[:, first] - values[:, second], scores[:, first] - scores[:, second]
    columns = np.stack([(better * margin > 0).sum(1), (better != 0).sum(1)], 1).astype(float)
    total = columns.sum(0)
    return float(total[0] / max(total[1], 1)), prompt_interval(columns, np.arange(len(columns)), ratio, seed)
