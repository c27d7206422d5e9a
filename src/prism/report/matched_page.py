"""The tables of a contest at matched cost: shares of arms by budget, and each arm's cost, seconds and diversity."""

from __future__ import annotations

from collections.abc import Sequence

from prism.report import wording
from prism.report.page import Section
from prism.report.rows import MatchedRow
from prism.report.tables import Column, Table

BY_ARM = (
    "Share of the gain of the best of the first eight seeds, in percent, with its 95 % interval over prompts. "
    "▲ and ▼: above and below the planner’s plan of that budget (full Best-of-N where there is no plan), paired, "
    "beyond the interval; of many such comparisons one in forty is above by luck. –: the budget pays for no search "
    "of this kind."
)
DETAILS = (
    "Differences are paired, in percentage points, with their intervals. Rows are the denoiser’s; those for judging "
    "clean latents are among them. Seconds are the median and the 95th percentile of runs by themselves. Diversity: "
    "how far the winners of two seeds lie apart (root mean squared difference of latents) over two plain samples’."
)


def by_arm(rows: Sequence[MatchedRow]) -> Table[str]:
    """A line per arm with its share at each budget, and a mark where it is told from the planner's plan."""
    cells = {(row["arm"], row["budget"]): row for row in rows}

    def cell(arm: str, budget: float) -> str:
        row = cells.get((arm, budget))
        if row is None:
            return wording.MISSING
        interval = "" if row["share_ci95"] is None else f" ({wording.percent_interval(row['share_ci95'], 0)})"
        over = row["over_full_ci95"] if all(each["over_plan"] is None for each in rows) else row["over_plan_ci95"]
        mark = "" if over is None else " ▲" if over[0] > 0 else " ▼" if over[1] < 0 else ""
        return f"{wording.percent(row['share'], 0)}{interval}{mark}"

    def column(budget: float) -> Column[str]:
        return Column(f"{budget:g}", lambda arm: cell(arm, budget))

    budgets = sorted({row["budget"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in sorted(rows, key=lambda row: -row["budget"])))
    title = "Share of the oracle's gain at matched cost"
    return Table([Column("arm", str, left=True), *map(column, budgets)], arms, title, BY_ARM)


def details(rows: Sequence[MatchedRow]) -> Table[MatchedRow]:
    """A line per budget and arm."""

    def points(value: float | None, interval: list[float] | None) -> str:
        if value is None:
            return wording.MISSING
        return wording.points(value) + ("" if interval is None else f" ({wording.points_interval(interval)})")

    def seconds(value: float | None) -> str:
        return wording.MISSING if value is None else f"{value:.1f}"

    return Table(
        [
            Column("budget", lambda row: f"{row['budget']:g}"),
            Column("arm", lambda row: row["arm"], left=True),
            Column("n", lambda row: str(row["n"])),
            Column("share", lambda row: wording.percent(row["share"])),
            Column("95 % interval", lambda row: wording.percent_interval(row["share_ci95"])),
            Column("over the plan", lambda row: points(row["over_plan"], row["over_plan_ci95"])),
            Column("over full", lambda row: points(row["over_full"], row["over_full_ci95"])),
            Column("cost", lambda row: f"{row['cost']:.2f}"),
            Column("rows", lambda row: wording.count(round(row["denoiser_rows"], 1))),
            Column("for judging", lambda row: wording.count(round(row["judging_rows"], 1))),
            Column("VAE decodes", lambda row: wording.count(round(row["vae_decodes"], 1))),
            Column("seconds", lambda row: seconds(row["seconds"])),
            Column("p95", lambda row: seconds(row["seconds_p95"])),
            Column("diversity", lambda row: wording.MISSING if row["diversity"] is None else f"{row['diversity']:.2f}"),
        ],
        rows,
        "Each arm at each budget",
        DETAILS,
    )


SCHEDULES = {
    "plain": "All strategies",
    "few": "All strategies in four steps",
    "few-stochastic": "All strategies in four steps that draw noise",
}


def sections(rows: Sequence[MatchedRow], verdicts: Sequence[str]) -> list[Section]:
    """The parts of a page on one schedule: shares by budget with what they say, and the details."""
    prompts = " to ".join(str(each) for each in sorted({row["prompts"] for row in rows}))
    lead = f"{prompts} prompts. {' '.join(verdicts)}"
    name = SCHEDULES[rows[0]["schedule"]]
    return [
        Section(f"{name} at matched cost", lead, tables=[(by_arm(rows), BY_ARM)]),
        Section(f"{name}: cost, seconds and diversity", tables=[(details(rows), DETAILS)]),
    ]


def markdown(rows: Sequence[MatchedRow], verdicts: Sequence[str]) -> str:
    """Both tables of one schedule with their captions, and what they say."""
    parts = [f"{table.markdown()}\n\n{table.caption}" for table in (by_arm(rows), details(rows))]
    parts.append("\n".join(f"- {verdict}" for verdict in verdicts))
    same, compared = sum(row["same_pick"] for row in rows), sum(row["compared"] for row in rows)
    if compared:
        parts.append(f"Of {compared} runs by themselves, {same} pick what the shared runs say.")
    return "\n\n".join(parts)


def by_schedule(rows: Sequence[MatchedRow]) -> dict[str, list[MatchedRow]]:
    """The rows of each schedule, in their order."""
    grouped: dict[str, list[MatchedRow]] = {}
    for row in rows:
        grouped.setdefault(row["schedule"], []).append(row)
    return grouped
