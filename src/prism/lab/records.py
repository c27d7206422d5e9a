"""A demo's contests: every plan on every prompt of a split, as records that are parts of the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from prism import shapeworld
from prism.runs import Clock, Parts

if TYPE_CHECKING:
    from prism.lab.demo import DemoConfig


def plans(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """The arguments of `best_of_n` by row of the table; the other schedules and draft lengths after the main ones."""
    clean = {"judge_at": config.judge_at, "num_draws": config.num_draws}
    by_name: dict[str, dict[str, Any]] = {
        "none": {"strategy": "none"},
        "random": {"strategy": "random"},
        "early": {"strategy": "early", "schedule": config.schedule},
        "draft": {"strategy": "draft", "draft_steps": config.draft_steps, **clean},
        "full": {"strategy": "full", **clean},
        "oracle": {"strategy": "oracle"},
    }
    if config.draft_steps is None:
        del by_name["draft"]
    for cuts in (*config.schedules, *config.ahead):
        name = "early " + ",".join(f"{step}:{keep}" for step, keep in cuts)
        if cuts in config.ahead:
            by_name[f"{name} ahead"] = {"strategy": "early", "schedule": cuts, "look": "ahead", **clean}
        if cuts in config.schedules:
            by_name[name] = {"strategy": "early", "schedule": cuts}
    for steps in config.drafts:
        by_name[f"draft {steps}"] = {"strategy": "draft", "draft_steps": steps, **clean}
    return by_name


def make_contest(
    joint: Any,
    config: DemoConfig,
    prompt: str,
    seeds: Sequence[int],
    call: dict[str, Any],
    names: Sequence[str] | None = None,
) -> Any:
    """The contest of a prompt, with all plans or those of `names`."""
    from prism.lab.contest import Contest
    from prism.shapeworld import referee

    played = {name: plan for name, plan in plans(config).items() if names is None or name in names}
    return Contest(joint, referee.batch, prompt, seeds, played, call, config.seed)


def contests(
    parts: Parts, joint: Any, config: DemoConfig, split: str, count: int, first_seed: int, call: dict[str, Any]
) -> list[dict[str, Any]]:
    """The records of every plan on the first `count` prompts of a split; each prompt is a part of the run.

    Candidate i of prompt j has the seed first_seed + 1000 j + i. On the first `config.alone` test prompts each plan is
    also run separately.
    """
    prompts, records = shapeworld.prompts(split, count), []
    clock = Clock(f"best of {config.n} on {split} prompts", len(prompts), 300 if config.full else 30)
    say(config, f"best of {config.n} on {len(prompts)} {split} prompts")
    for index, prompt in enumerate(tqdm(prompts, disable=None, desc=f"best of {config.n}, {split}", unit="prompt")):
        seeds = [first_seed + 1000 * index + i for i in range(config.n)]
        separately = split == "test" and index < config.alone
        name = f"{split}/{index:04d}"
        is_done = parts.has(f"{name}.json")

        def make(prompt: str = prompt, seeds: list[int] = seeds, separately: bool = separately) -> dict[str, Any]:
            return record(make_contest(joint, config, prompt, seeds, call), config, separately)

        records.append(parts.once(name, make))
        clock.tick(index + 1, not is_done)
    return records


def record(contest: Any, config: DemoConfig, separately: bool) -> dict[str, Any]:
    """A contest as JSON: the referee's values, each plan's picks and separate runs, each judge's scores of the finished
    latents, and the attention of the first judge's query.
    """
    from prism.lab import attention
    from prism.sampling.strategies import kind_of

    judge, looks = contest.joint.judges[0], {}
    for t in config.look_at:
        weights = attention.look(judge, contest.latents, contest.prompt, t, contest.call, config.seed)
        cells = attention.object_cells(contest.videos, contest.prompt, weights.shape[1:])
        looks[f"{t:g}"] = attention.shares(weights, cells)
    entry = {
        "prompt": contest.prompt,
        "seeds": list(contest.seeds),
        "values": {name: value.tolist() for name, value in contest.values.items()},
        "picks": {name: contest.picks(name) for name in contest.plans},
        "final": contest.final.tolist(),
        "looks": looks,
        "cuts": contest.readings(),
    }
    if separately:
        judged = {name: kind_of(plan["strategy"]).needs_judge() for name, plan in contest.plans.items()}
        count = len(contest.joint.judges)
        entry["alone"] = {
            name: [contest.run_separately(name, k) for k in range(count if judged[name] else 1)]
            for name in contest.plans
        }
    return entry


def say(config: DemoConfig, text: str) -> None:
    """Print a line per part of a run, also in a log."""
    if not config.full:
        print(f"prism: {text}", file=sys.stderr, flush=True)
