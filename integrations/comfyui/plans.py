"""What a node's texts say: seeds, and the cuts of a plan."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism.errors import PrismError, quoted
from prism.sampling import plan as plans
from prism.sampling import plan_files
from prism.sampling.plan import Schedule
from prism.sampling.strategies import Early

LARGEST, MOST = 2**64 - 1, 1000  # the largest seed of KSampler; the most candidates


def seeds_of(text: str, first: int, count: int) -> list[int]:
    """Seeds from a text such as "3, 9, 12-15"; an empty one stands for `count` of them from `first`."""
    if not text.strip():
        seeds = [first + index for index in range(count)]
    else:
        seeds = []
        for part in re.split(r"[,\s]+", text.strip(" ,\n\t")):
            match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", part)
            if match is None:
                raise PrismError(f'seeds holds {quoted(part, 60)}; write them as "3, 9, 12-15".')
            low = int(match[1])
            high = int(match[2] or low)
            if high < low or high - low >= MOST:
                raise PrismError(
                    f"seeds holds {part}, which is no range of 1 to {MOST} seeds; put the lower one first."
                )
            seeds += range(low, high + 1)
    if not 1 <= len(seeds) <= MOST or max(seeds) > LARGEST:
        raise PrismError(f"seeds must be 1 to {MOST} numbers up to 2**64 - 1; found {len(seeds)}.")
    twice = [seed for index, seed in enumerate(seeds) if seed in seeds[:index]]
    if twice:
        raise PrismError(f"seeds names {twice[0]} twice, which would be the same video; leave one out.")
    return seeds


def early_plan(text: str, n: int, num_steps: int, look: str, judge_at: float, num_draws: int) -> Early:
    """The plan with resolved cuts for n candidates.

    text: cuts such as "5:1" or "3:4,6:1" (after step 3 keep four, after step 6 one); empty: one cut after a fifth of
    the steps; or a plan.json that `prism plan` wrote, whose look and level then hold too.
    """
    text = text.strip()
    if text.endswith(".json"):
        filed = plan_files.opened(Path(text))
        assert filed is not None
        made = filed.run.plan
        if not isinstance(made, Early):
            raise PrismError(
                f"{filed.where[0].upper() + filed.where[1:]} is of the strategy {made.strategy}, and this node runs "
                "early alone; plan with prism plan --strategies early."
            )
        if filed.run.n != n:
            raise PrismError(
                f"{filed.where[0].upper() + filed.where[1:]} is for {filed.run.n} candidates, and there are {n} seeds; "
                f"give {filed.run.n} seeds."
            )
        cuts, look = made.schedule or plans.default(num_steps), made.look or look  # type: ignore[assignment]
        judge_at, num_draws = made.judge_at or judge_at, made.num_draws
    else:
        cuts = plans.parse(text) if text else plans.default(num_steps)
    schedule = plans.resolve(cuts, n, num_steps)
    plans.warn_blind(schedule, n, num_steps)
    return Early(judge_at=judge_at, num_draws=num_draws, schedule=schedule, look=look)  # type: ignore[arg-type]


def in_words(schedule: Schedule) -> str:
    """Cuts as a node's text: "3:4,6:1"."""
    return ",".join(f"{step}:{keep}" for step, keep in schedule)


def report(found: Mapping[str, Any]) -> str:
    """A run's or a score's report as a table in Markdown, best first."""
    names = list(found["dimensions"])
    rows: Sequence[Mapping[str, Any]] = found["candidates"]
    head = ["rank", "seed" if found["kind"] == "best-of-n" else "sample", *names, "t", "what became of it"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        label = row["seed"] if found["kind"] == "best-of-n" else row["sample"]
        values = [row["scores"][name] for name in names]
        cells = [str(row["rank"]), str(label), *("-" if value is None else f"{value:+.2f}" for value in values)]
        lines.append(" | ".join([*cells, "-" if row["t"] is None else f"{row['t']:.0f}", row["fate"]]))
    if found["kind"] == "best-of-n":
        lines.append("")
        lines.append(
            f"{len(rows)} seeds, plan {found['plan']}, look {found['look']}, ranked by {found['rank_by']}: "
            f"{found['rows']:.1f} model rows, where one run takes {found['rows_of_one']:.0f} and all of them "
            f"{len(rows) * found['rows_of_one']:.0f}. KSampler with seed {found['seed']} gives the same latent."
        )
    return "\n".join(lines)


def as_json(found: Mapping[str, Any]) -> str:
    """The report as JSON."""
    return json.dumps(found, indent=2)
