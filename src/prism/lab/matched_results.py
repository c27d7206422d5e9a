"""What a contest at matched cost says: each arm's share of the oracle's gain at each budget, and who is ahead of whom.

A line is one prompt, as `prism.lab.matched.line` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prism.evaluation import prompt_interval
from prism.lab.attention import ratio
from prism.lab.matched import ARMS, FEW_STEPS, FULL, PLANNED, REFEREE, WHOLE
from prism.report.rows import MatchedRow

Line = Mapping[str, Any]


def merged(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One line per prompt, in order; runs that were added later are put to those of the first line of their prompt.

    To each run its "gains" by seed are added, over the mean of its own line's candidates: lines may have other seeds.
    """
    by_prompt: dict[str, dict[str, Any]] = {}
    for line in lines:
        first, mean = by_prompt.setdefault(line["prompt"], {**line, "runs": []}), np.array(line["values"]).mean(1)
        present = {(run["arm"], run["budget"]) for run in first["runs"]}
        new = [run for run in line["runs"] if (run["arm"], run["budget"]) not in present]
        first["runs"] = [*first["runs"], *({**run, "gains": np.array(run["values"]) - mean} for run in new)]
    return list(by_prompt.values())


def dictionary(run: Mapping[str, Any]) -> str:
    """Where the planner has a run's plan: "replayed", "measured" (with --measured), or "" where it is no plan."""
    arm = {**FEW_STEPS, **WHOLE, **ARMS}.get(run["arm"])
    plan = run.get("plan")
    if "plan" not in run and arm is not None and not (arm.longer or arm.plan.needs_oracle()):
        plan = {"strategy": arm.plan.strategy}
    return "" if plan is None else "replayed" if plan["strategy"] in ("none", "early", "full") else "measured"


def rows(lines: Sequence[Line], sample: float, seed: int = 0, schedule: str = "plain") -> list[MatchedRow]:
    """A row per arm and budget, with 95 % intervals over prompts.

    A gain is the referee's value of what was kept less the mean of the first eight seeds; shares are of the mean gain
    of the best of the eight. A prompt that was played with several seeds counts once, by its mean. Differences to the
    planner's plan and to full Best-of-N at the same budget are paired, over the prompts that have both.

    sample: the denoiser rows of one plain sample. seed: of the intervals. schedule: of the steps, by name.
    """
    table: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    oracle: dict[str, float] = {}
    spread: dict[str, float] = {}
    for line in merged(lines):
        values, prompt = np.array(line["values"]), line["prompt"]
        oracle[prompt] = float((values.max(1) - values.mean(1)).mean())
        spread[prompt] = line["apart"]
        for run in line["runs"]:
            table.setdefault((run["arm"], run["budget"]), {})[prompt] = run
    gains = {key: {prompt: float(run["gains"].mean()) for prompt, run in runs.items()} for key, runs in table.items()}

    def share(by_prompt: Mapping[str, float]) -> tuple[float, list[float] | None]:
        prompts = list(by_prompt)
        columns = np.array([[by_prompt[prompt], oracle[prompt]] for prompt in prompts])
        interval = prompt_interval(columns, prompts, ratio, seed)
        return float(columns[:, 0].sum() / columns[:, 1].sum()), interval

    def over(key: tuple[str, float], rival: str) -> tuple[float | None, list[float] | None]:
        other = gains.get((rival, key[1]))
        both = [] if other is None or rival == key[0] else [prompt for prompt in gains[key] if prompt in other]
        return share({p: gains[key][p] - other[p] for p in both}) if both and other else (None, None)

    found: list[MatchedRow] = []
    for key in sorted(table, key=lambda key: (key[1], list(table).index(key))):
        (arm, budget), runs = key, table[key]
        seconds = [each for run in runs.values() for each in run["seconds"] if each is not None]
        twice = {prompt: run["apart"] for prompt, run in runs.items() if run["apart"] is not None}
        (mine, interval), plan, full = share(gains[key]), over(key, PLANNED), over(key, FULL)
        same = [each for run in runs.values() for each in run["same"]]
        found.append(
            {
                "schedule": schedule,
                "arm": arm,
                "budget": budget,
                "dictionary": dictionary(next(iter(runs.values()))),
                "n": next(iter(runs.values()))["n"],
                "prompts": len(runs),
                "share": mine,
                "share_ci95": interval,
                "over_plan": plan[0],
                "over_plan_ci95": plan[1],
                "over_full": full[0],
                "over_full_ci95": full[1],
                "cost": float(np.mean([run["rows"] for run in runs.values()])) / sample,
                "denoiser_rows": float(np.mean([run["rows"] for run in runs.values()])),
                "judging_rows": float(np.mean([run["judged"] for run in runs.values()])),
                "vae_decodes": float(np.mean([run["decodes"] for run in runs.values()])),
                "seconds": float(np.median(seconds)) if seconds else None,
                "seconds_p95": float(np.percentile(seconds, 95)) if seconds else None,
                "runs_timed": len(seconds),
                "diversity": sum(twice.values()) / sum(spread[prompt] for prompt in twice) if twice else None,
                "same_pick": sum(same),
                "compared": len(same),
            }
        )
    return found


def verdicts(table: Sequence[MatchedRow]) -> list[str]:
    """A sentence per budget: which arms are above the planner's plan (where there is none, full Best-of-N), and which
    below, beyond the interval of the paired difference. The referee as judge is a ceiling and no rival.
    """
    planned = any(row["arm"] == PLANNED for row in table)
    reference = PLANNED if planned else "full Best-of-N"
    sentences = []
    for budget in sorted({row["budget"] for row in table}):
        above, below, level = list[str](), list[str](), list[str]()
        unknown = 0
        for row in table:
            if row["budget"] != budget or row["arm"] in (REFEREE, PLANNED if planned else FULL):
                continue
            interval = row["over_plan_ci95"] if planned else row["over_full_ci95"]
            if interval is None:
                unknown += 1
                continue
            (above if interval[0] > 0 else below if interval[1] < 0 else level).append(row["arm"])
        parts = [f"above {reference}: {', '.join(above) or 'none'}", f"below it: {', '.join(below) or 'none'}"]
        parts.append(f"not told from it: {', '.join(level) or 'none'}")
        if unknown:
            parts.append(f"without an interval: {unknown}")
        where = {row["arm"]: row["dictionary"] for row in table}
        sentences.append(f"Budget {budget:g}: {'; '.join(parts)}.{_in_dictionary(above, where) if planned else ''}")
    return sentences


def _in_dictionary(above: Sequence[str], where: Mapping[str, str]) -> str:
    """Which of the arms above the planner's plan are in its dictionary."""
    kinds = {
        "measured": "in the planner's dictionary with --measured",
        "replayed": "in the planner's dictionary",
        "": "no plan of best_of_n",
    }
    grouped = {words: [arm for arm in above if where[arm] == kind] for kind, words in kinds.items()}
    parts = [f"{', '.join(arms)}: {words}" for words, arms in grouped.items() if arms]
    return f" Of those above, {'; '.join(parts)}." if parts else ""
