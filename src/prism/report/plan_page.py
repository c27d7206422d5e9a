"""The page and the terminal table of `prism plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism.report import wording
from prism.report.front_plot import Dot, front_plot, short
from prism.report.page import Section
from prism.report.plan_rows import Agreement, ChosenRow, MeasuredFacts, PruneRow, ReplayedRow, RivalRow, SizeRow, Spread
from prism.report.tables import Column, Table

CHOSEN = (
    "cost: denoiser rows over one plain sample’s. of oracle’s gain: the mean gain of the picks over that of a perfect "
    "pick. in full: the largest Best-of-N in full within the budget, and its N (1: a random pick). over it: the "
    "difference in percentage points, paired, with its interval. ◆: a search that was played, not replayed."
)
RIVALS = (
    "The best replayed and the best played plan within a budget, each chosen on one half of the prompts; shares and "
    "the paired difference are of the other half. ✓: the budget’s plan."
)
SIZES = (
    "more than before: what the last seed adds, in percentage points of the oracle’s gain, paired. perfect pick: the "
    "share that the best of as many seeds gets. judge’s own score: how far the judge rates its pick above a random "
    "one, in standard deviations between seeds."
)
PRUNE = "keeps 1, 2, 4: lost where so many go on, with the 95 % interval. at random: the same of blind cuts, in order."
FRONT = (
    "cost: denoiser rows over one plain sample’s. gain: mean reward of the picks less that of a random pick. in SD: "
    "the same in standard deviations between seeds of a prompt. ◆: a search that was played."
)


def sections(metrics: Mapping[str, Any], full: Sequence[ReplayedRow], dots: Sequence[Dot]) -> list[Section]:
    """The parts of the page of a metrics document of `prism plan`.

    full: Best-of-N in full by N. dots: all replayed plans.
    """
    front, plans, spread = metrics["front"], metrics["plans"], metrics["spread"]
    found = [
        Section(
            "Quality over cost",
            f"Each plan was {_replayed(metrics)} on {spread['prompts']} prompts with {spread['candidates']} recorded "
            "candidates each: what it would have picked, and what its denoiser rows would have cost. The oracle picks "
            f"the best finished video by {metrics['by']}{_mean(metrics)}; a random pick gains nothing."
            f"{_left_out(metrics)}",
            [(front_plot(front, plans, full, dots), front_caption(plans))],
            wide=True,
        ),
        Section(
            "A plan per budget",
            f"Chosen on {plans[0]['chosen_on']} prompts, measured on {plans[0]['prompts']} others, so that the choice "
            "flatters no number.",
            tables=[(chosen_table(plans), CHOSEN)],
        ),
        *played_section(metrics.get("rivals", ()), metrics.get("measured")),
        Section("Is there anything to choose?", spread_sentence(spread)),
    ]
    if metrics["sizes"]:
        lead = sizes_sentence(metrics["sizes"])
        found.append(Section("How many seeds", lead, tables=[(sizes_table(metrics["sizes"]), SIZES)]))
    if metrics["prune"]:
        found.append(
            Section(
                "What a cut loses",
                "The best of all candidates less the best of those that a cut keeps, as a share of the oracle’s gain: "
                "what no later choice can bring back.",
                tables=[(prune_table(metrics["prune"]), PRUNE)],
            )
        )
    found.append(Section("Every plan on the front", tables=[(front_table(front), FRONT)]))
    missing = "; ".join(f"{name}, as {why}" for name, why in metrics["not_replayed"].items())
    more = "" if metrics.get("measured") else " Played on the same prompts, they are compared too: --measured."
    found.append(Section("Not replayed", f"Recorded candidates say nothing of {missing}.{more}"))
    return found


def _replayed(metrics: Mapping[str, Any]) -> str:
    return "replayed (a search: played)" if metrics.get("measured") else "replayed"


def _mean(metrics: Mapping[str, Any]) -> str:
    names = metrics.get("mean_of")
    return f", the mean of {', '.join(names)}" if names else ""


def _left_out(metrics: Mapping[str, Any]) -> str:
    words = metrics.get("left_out")
    return f" Left out of the store: {words}." if words else ""


def played_section(rows: Sequence[RivalRow], facts: MeasuredFacts | None) -> list[Section]:
    """The part of the page on searches that were played; none without them."""
    if facts is None:
        return []
    lead = f"{rivals_sentence(rows)} {measured_sentence(facts)}"
    return [
        Section("Searches that were played", lead, tables=[(rivals_table(rows), RIVALS)] if rows else [], wrap=True)
    ]


def rivals_sentence(rows: Sequence[RivalRow]) -> str:
    """At which budgets a search that was played wins."""

    def at(budgets: Sequence[RivalRow]) -> str:
        return ", ".join(f"{row['budget']:g}" for row in budgets)

    chosen = [row for row in rows if row["chosen"] == "played"]
    above = [row for row in rows if row["over_ci95"] and row["over_ci95"][0] > 0]
    below = [row for row in rows if row["over_ci95"] and row["over_ci95"][1] < 0]
    parts = [
        f"A search that was played is the plan of the budgets {at(chosen)}"
        if chosen
        else "At no budget the plan is a search that was played"
    ]
    if above:
        parts.append(f"the best one is above the best replayed plan, beyond the interval, at {at(above)}")
    if below:
        parts.append(f"the best one is below the best replayed plan, beyond the interval, at {at(below)}")
    return "; ".join(parts) + "."


def measured_sentence(facts: MeasuredFacts) -> str:
    """On which prompts plans were played, what is left out, and whether plays agree with replays."""
    parts = [f"{facts['plans']} plans were played, and are compared on the {facts['prompts']} prompts that have both."]
    counts = {
        "recorded prompts were not played": facts["not_played"],
        "played prompts are not among them": facts["not_recorded"],
        "plans were not played on all of them": facts["not_on_all"],
    }
    if any(counts.values()):
        parts.append(f"Left out: {', '.join(f'{n} {words}' for words, n in counts.items() if n)}.")
    if facts["no_plans"]:
        parts.append(f"No plans of best_of_n are: {', '.join(facts['no_plans'])}.")
    if facts["own_base"]:
        parts.append(
            "A play’s gain is over the mean of the plain candidates that were played with it, and its share is of the "
            "gain of the best of them."
        )
    if facts["agreement"]:
        parts.append(agreement_sentence(facts["agreement"]))
    return " ".join(parts)


def agreement_sentence(agreement: Agreement) -> str:
    """How far plays are from replays of the same plans."""
    interval = agreement["apart_ci95"]
    between = "" if interval is None else f" ({wording.points_interval(interval)})"
    return (
        f"{agreement['plans']} more could also be replayed: played, their share is {wording.points(agreement['apart'])}"
        f"{between} points from that of their replays, which is the error of the comparison."
    )


def rivals_table(rows: Sequence[RivalRow]) -> Table[RivalRow]:
    """`rows` as in "rivals", one line per budget."""

    def marked(row: RivalRow, how: str) -> str:
        return f"{row['played' if how == 'played' else 'replayed']}{' ✓' if row['chosen'] == how else ''}"

    return Table(
        [
            Column("budget", lambda row: f"{row['budget']:g}"),
            Column("replayed", lambda row: marked(row, "replayed"), left=True),
            Column("share", lambda row: wording.percent(row["replayed_share"], 0), style="bold"),
            Column("played", lambda row: marked(row, "played"), left=True),
            Column("cost", lambda row: f"{row['played_cost']:.2f}"),
            Column("share", lambda row: wording.percent(row["played_share"], 0), style="bold"),
            Column("over it", lambda row: _over(row["over"], row["over_ci95"]), style="dim"),
        ],
        rows,
        "The best replayed and the best played plan",
        RIVALS,
    )


def front_caption(plans: Sequence[ChosenRow]) -> str:
    """What the plot shows and does not show."""
    return (
        "“6 seeds, 3:1 ahead” denoises six to step 3 and keeps the one whose predicted clean latents the judge rates "
        "best. The front is the best of many plans on the very prompts that measure it, so it flatters: rely on the "
        f"large points ({plans[0]['prompts']} prompts)."
    )


def cards(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline numbers: the plan of the first budget, and of the one that is best on the choosing half."""
    named: dict[str, ChosenRow] = {}
    for row in metrics["plans"]:
        named.setdefault(row["name"], row)
    best = max(named.values(), key=lambda row: row["chosen_share"])
    shown = list({row["name"]: row for row in (metrics["plans"][0], best)}.values())
    return [
        {
            "name": f"Budget {row['budget']:g}",
            "value": wording.percent(row["share"], 0),
            "text": f"of the oracle’s gain for {row['cost']:.2f} plain samples, 95 % interval "
            f"{wording.percent_interval(row['share_ci95'], 0)}: {short(row)}",
        }
        for row in shown
    ]


def chosen_table(rows: Sequence[ChosenRow]) -> Table[ChosenRow]:
    """`rows` as in "plans", one line per budget; fits 80 columns."""

    return Table(
        [
            Column("budget", lambda row: f"{row['budget']:g}"),
            Column("plan", lambda row: _judged(row), left=True),
            Column("cost", lambda row: f"{row['cost']:.2f}"),
            Column("share", lambda row: wording.percent(row["share"], 0), page="of oracle’s gain", style="bold"),
            Column("95 %\ninterval", lambda row: wording.percent_interval(row["share_ci95"], 0), style="dim"),
            Column("in\nfull", lambda row: f"{wording.percent(row['full_share'], 0)} ({row['full_n']})"),
            Column("over it", lambda row: _over(row["over_full"], row["over_full_ci95"]), style="dim"),
        ],
        rows,
        "A plan per budget, in costs of one plain sample",
        "in full: the largest Best-of-N in full within the budget, and its N (1: a random pick); over it: percentage "
        "points, paired, with their interval",
    )


def _over(value: float, interval: Sequence[float] | None) -> str:
    between = "" if interval is None else f" ({' … '.join(f'{100 * end:+.0f}' for end in interval)})"
    return f"{100 * value:+.0f}{between}".replace("-", "−")


def _judged(row: ReplayedRow) -> str:
    """A row's plan in few words, with the level and draws of what is re-noised: "3 seeds, 4:1 ahead at 700 × 2"."""
    if row["how"] == "played":
        return f"◆ {row['name']}"
    level, draws, words = row["settings"].get("judge_at"), row["settings"].get("num_draws", 1), short(row)
    if level is None:
        return words
    at = f" at {level:g}" + (f" × {draws}" if draws > 1 else "")
    return words.replace(" ahead", f" ahead{at}") if " ahead" in words else words + at


def front_table(rows: Sequence[ReplayedRow]) -> Table[ReplayedRow]:
    """`rows` as in "front", one line each."""
    return Table(
        [
            Column("cost", lambda row: f"{row['cost']:.2f}"),
            Column("rows", lambda row: wording.count(round(row["denoiser_rows"], 1)), style="dim"),
            Column("plan", lambda row: ("◆ " if row["how"] == "played" else "") + row["name"], left=True),
            Column("share", lambda row: wording.percent(row["share"], 0), page="of oracle’s gain", style="bold"),
            Column("95 %\ninterval", lambda row: wording.percent_interval(row["share_ci95"], 0), style="dim"),
            Column("gain", lambda row: f"{row['gain']:+.3f}".replace("-", "−"), page="gain"),
            Column("in SD", lambda row: wording.signed(row["gain_sd"])),
        ],
        rows,
    )


def sizes_table(rows: Sequence[SizeRow]) -> Table[SizeRow]:
    """`rows` as in "sizes", one line per number of seeds."""
    return Table(
        [
            Column("seeds", lambda row: str(row["n"])),
            Column("share", lambda row: wording.percent(row["share"], 0), page="of oracle’s gain", style="bold"),
            Column("95 %\ninterval", lambda row: wording.percent_interval(row["share_ci95"], 0), style="dim"),
            Column(
                "more than\nbefore", lambda row: wording.MISSING if row["more"] is None else wording.points(row["more"])
            ),
            Column("95 %\ninterval", lambda row: wording.points_interval(row["more_ci95"]), style="dim"),
            Column("perfect\npick", lambda row: wording.percent(row["oracle"], 0)),
            Column("judge’s own\nscore", lambda row: wording.signed(row["judge_gain"])),
        ],
        rows,
    )


def prune_table(rows: Sequence[PruneRow]) -> Table[dict[int, PruneRow]]:
    """`rows` as in "prune", one line per reading and a column per number of survivors."""
    lines: dict[tuple[str, int, float], dict[int, PruneRow]] = {}
    for row in rows:
        lines.setdefault((row["look"], row["step"], row["t"]), {})[row["keep"]] = row
    keeps = sorted({row["keep"] for row in rows})

    def first(line: dict[int, PruneRow]) -> PruneRow:
        return next(iter(line.values()))

    def lost(keep: int) -> Column[dict[int, PruneRow]]:
        def cell(line: dict[int, PruneRow]) -> str:
            if keep not in line:
                return wording.MISSING
            interval = wording.percent_interval(line[keep]["regret_ci95"], 0)
            return f"{wording.percent(line[keep]['regret'], 0)} ({interval})"

        return Column(f"keeps {keep}", cell)

    def chance(line: dict[int, PruneRow]) -> str:
        return ", ".join(wording.percent(line[keep]["by_chance"], 0) for keep in keeps if keep in line)

    return Table(
        [
            Column("step", lambda line: str(first(line)["step"])),
            Column(
                "look",
                lambda line: "now" if first(line)["look"] == "now" else f"ahead, t = {first(line)['t']:g}",
                left=True,
            ),
            *(lost(keep) for keep in keeps),
            Column("at random", chance, style="dim"),
        ],
        list(lines.values()),
    )


def spread_sentence(spread: Spread) -> str:
    """How much the reward differs between seeds, and whether that is worth choosing for."""
    within, between = spread["within"], spread["between"]
    share = within**2 / (within**2 + between**2)
    alike = f" In {spread['alike']} prompts all candidates are rated alike." if spread["alike"] else ""
    return (
        f"Seeds of one prompt differ by a standard deviation of {within:.3g} in reward (mean {spread['mean']:.3g}), "
        f"prompts by {between:.3g}: {share:.0%} of the variance is between seeds of one prompt, which is all that "
        f"choosing can use. The best of {spread['candidates']} seeds is {spread['best']:.2f} standard deviations above "
        f"a random one.{alike}"
    )


def sizes_sentence(rows: Sequence[SizeRow]) -> str:
    """Where more seeds stop helping, or hurt, by full Best-of-N."""
    unsure = [row for row in rows if row["more_ci95"] and row["more_ci95"][0] <= 0]
    hurting = [row for row in rows if row["more_ci95"] and row["more_ci95"][1] < 0]
    sentence = "Every seed more, all sampled in full and judged: "
    if hurting:
        sentence += (
            f"from {hurting[0]['n']} seeds on, one more makes the pick worse, though the judge’s own score rises."
        )
    elif unsure:
        sentence += f"from {unsure[0]['n']} seeds on, what one more adds is no longer told from nothing."
    else:
        sentence += f"up to {rows[-1]['n']} seeds each one adds."
    own = f" The judge’s own score of its pick rises to {wording.signed(rows[-1]['judge_gain'])} standard deviations"
    return f"{sentence}{own}; where that rises and the reward does not, the pick follows the judge’s errors."
