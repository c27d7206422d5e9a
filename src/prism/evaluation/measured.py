"""Plans that were measured by playing them: lines of files, put beside replayed plans on the same prompts.

A line is one prompt, as JSON: {"prompt": text, "runs": [{"plan": {"strategy", "settings"} as plan.json writes them,
"n": its candidates, "rows": of the denoiser, "values": the reward of each play's winner}, ...]}. It may also hold
"values": by play, the rewards of plain candidates, as many as the store has of a prompt: the play's winners gain over
their mean, and the best of them is the oracle. Without it both are those of the store's candidates. Lines of one prompt
are taken together; other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prism import files
from prism.errors import PrismError, listed, number, quoted, whole
from prism.evaluation import recorded
from prism.evaluation.recorded import Recorded
from prism.report.plan_rows import Agreement, MeasuredFacts
from prism.sampling import plan_files, planner
from prism.sampling.looks import DEFAULT_JUDGE_AT
from prism.sampling.plan import JudgedClean, Plan, Workload
from prism.sampling.planner import Run, Table
from prism.sampling.strategies import Early

if TYPE_CHECKING:
    from prism.sampling import BestOfNResult

_FAR = 6.0
"""Standard errors between the mean rewards of plain candidates in lines and store, beyond which they are not of one."""
_MOST = 5.0
"""Within-prompt standard deviations beyond which a mean gain is none of the same reward."""
_ROWS = (0.5, 1.5)
"""Rows of a played run over those in closed form; some searches take what chance or the latents make of it."""


@dataclass(frozen=True)
class Play:
    """One plan on one prompt. values: by play, the winner's reward. plain: by play, those of plain candidates."""

    run: Run
    rows: float
    values: tuple[float, ...]
    plain: tuple[tuple[float, ...], ...] | None
    where: str

    def gain(self, mean: float) -> float:
        """The mean gain over plain candidates, or over the mean of those of the store."""
        base = [mean] * len(self.values) if self.plain is None else [np.mean(each) for each in self.plain]
        return float(np.mean(np.array(self.values) - base))


@dataclass(frozen=True, eq=False)
class Measured:
    """Played plans on the prompts of a table.

    rows: (K,) float64, mean denoiser rows. gains: (K, P) float64, mean reward of winners less that of a random pick.
    """

    runs: Sequence[Run]
    rows: np.ndarray
    gains: np.ndarray


def record(path: str | Path, prompt: str, plan: Plan, result: BestOfNResult, value: float) -> None:
    """Append one run of a plan to a file that `prism plan --measured` reads.

    plan: as given to `best_of_n`; a plan that needs an oracle cannot be written. value: the reward of `result.video`,
    by the reward that labels the store.
    """
    if plan.needs_oracle():
        raise PrismError(f"The strategy {plan.strategy} needs a function that no file holds.")
    run = {
        "plan": {"strategy": plan.strategy, "settings": plan_files.settings_of(plan)},
        "n": len(result.seeds),
        "rows": float(result.ledger.denoiser_rows),
        "values": [number("value", value)],
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": prompt, "runs": [run]}) + "\n")


def read(
    paths: Sequence[str | Path], num_steps: int, named: Callable[[str], Plan | None] = lambda name: None
) -> tuple[dict[str, list[Play]], list[str]]:
    """The plays by prompt, and the names of arms that are no plans.

    num_steps: of a run. named: the plan of an arm, for lines whose runs lack it. A last line that a kill left
    unfinished is not read. Raises PrismError that names file, line and field for anything else that is no such line.
    """
    plays: dict[str, list[Play]] = {}
    others: dict[str, None] = {}
    for path in paths:
        for row, text in enumerate(_lines(path), 1):
            where = f"line {row} of {files.shown(Path(path))}"
            try:
                line = json.loads(text)
            except ValueError as error:
                raise PrismError(f"The {where} is no JSON: {quoted(error, 100)}.") from error
            prompt = line.get("prompt") if isinstance(line, dict) else None
            if not isinstance(prompt, str) or not prompt.strip():
                raise PrismError(f"The field 'prompt' of {where} must be a text; found {quoted(prompt, 60)}.")
            plain = None
            if line.get("values") is not None:
                name = f"The field 'values' of {where}"
                plain = tuple(_numbers(each, name) for each in _list(line["values"], name))
            for number_, run in enumerate(_list(line.get("runs"), f"The field 'runs' of {where}"), 1):
                play = _play(run, plain, num_steps, f"run {number_} in {where}", named)
                if isinstance(play, str):
                    others[play] = None
                elif play is not None:
                    plays.setdefault(prompt, []).append(play)
    if not plays:
        raise PrismError(
            f"No line of {', '.join(files.shown(Path(path)) for path in paths)} holds a plan that was played."
        )
    return plays, list(others)


def beside(
    scores: Recorded, plays: Mapping[str, Sequence[Play]], by: str, others: Sequence[str] = (), seed: int = 0
) -> tuple[Recorded, Measured, MeasuredFacts]:
    """The recorded prompts that were also played, what was played on all of them, and what is left out.

    Taken are the prompts and plans of which there are most, prompts times plans. Plans that the scores replay are
    left out, as replayed ones are averaged over subsets; `agreement` says how far the two are apart.

    Raises PrismError where too few prompts are left, or where values are not of the same reward, model or call.
    """
    table: dict[str, dict[str, list[Play]]] = {}  # by plan, by prompt
    runs: dict[str, Run] = {}
    stored = {prompt: row for row, prompt in enumerate(scores.prompts)}
    for prompt, every in plays.items():
        for play in every if prompt in stored else ():
            key = _key(play.run)
            runs.setdefault(key, play.run)
            table.setdefault(key, {}).setdefault(prompt, []).append(play)
    kept, prompts = _most({key: set(cells) for key, cells in table.items()})
    if len(prompts) < recorded.FEWEST:
        raise PrismError(
            f"Only {len(prompts)} of the {len(stored)} recorded prompts were also played by --measured; half of them "
            f"choose a plan and half report it, which takes {recorded.FEWEST} or more: play the store's own prompts."
        )
    part = scores.of([row for row, prompt in enumerate(scores.prompts) if prompt in prompts])
    rewards = part.reward(by)
    mean, spread = rewards.mean(1), float(np.sqrt(rewards.var(1, ddof=1).mean()))
    scale = _scale(part, rewards, plays)
    gains, rows = [], []
    for key in kept:
        cells = [table[key][prompt] for prompt in part.prompts]
        gain = np.array([np.mean([play.gain(each) for play in cell]) for cell, each in zip(cells, mean)])
        _check(runs[key], cells, float(gain.mean()), spread, part.load)
        gains.append(gain * scale)
        rows.append(np.mean([np.mean([play.rows for play in cell]) for cell in cells]))
    replayed = {_key(run): run for run in planner.candidates(part.table(by))}
    new = [index for index, key in enumerate(kept) if key not in replayed]
    both = [index for index, key in enumerate(kept) if key in replayed]
    if not new:
        raise PrismError("All plans of --measured can be replayed, and were; play searches, or more candidates.")
    measured = Measured(
        [runs[kept[index]] for index in new], np.array([rows[index] for index in new]), np.array(gains)[new]
    )
    facts: MeasuredFacts = {
        "plans": len(new),
        "prompts": len(part.prompts),
        "not_played": len(stored) - len(part.prompts),
        "not_recorded": len(set(plays) - prompts),
        "not_on_all": len(table) - len(kept),
        "no_plans": list(others),
        "own_base": any(play.plain is not None for prompt in part.prompts for play in plays[prompt]),
        "scale": scale,
        "agreement": _agreement(part.table(by), part.load, [(replayed[kept[k]], gains[k]) for k in both], seed),
    }
    return part, measured, facts


def steadied(excess: np.ndarray, costs: np.ndarray, arms: Sequence[str]) -> np.ndarray:
    """(K,) mean excesses, as they are believed: each nearer to its neighbours' and to all plans', by how noisy it is.

    Of a dozen searches that were played once per prompt, the best mean is mostly luck. How far a search is above the
    replayed plans hardly depends on the cost, so it is averaged over the same search at other costs (Gaussian, a factor
    of two is one standard deviation); then it is drawn towards the mean of all searches as far as the spread of their
    means is no more than noise (James and Stein). In a simulation of six searches at three costs, truly 10 ± 5 points
    below the replayed plans and played on 40 prompts, choosing by the plain means loses 5.8 points, and by these 0.4;
    where they are truly 0 ± 10 points apart, both gain 10.

    Args:
        excess: (K, P) by plan and prompt, over the best replayed plan of the same cost.
        costs: (K,).
        arms: the search of each plan, whatever its number of candidates.
    """
    same = np.array([[a == b for b in arms] for a in arms])
    weights = same * np.exp(-(np.log2(costs[:, None] / costs) ** 2) / 2)
    smooth = (weights / weights.sum(1, keepdims=True)) @ excess
    means: np.ndarray = smooth.mean(1)
    if len(means) < 3:
        return means
    noise = (smooth - smooth.mean(0)).var(1, ddof=1) / excess.shape[1]  # what all plans share moves none from another
    truth = max(0.0, float(means.var(ddof=1) - noise.mean()))
    centre = means.mean()
    believed: np.ndarray = centre + (means - centre) * (truth / np.maximum(truth + noise, 1e-300))
    return believed


def arm_of(run: Run) -> str:
    """A run's plan as text, whatever its number of candidates."""
    return _key(replace(run, n=0))


def _play(
    run: Any,
    plain: tuple[tuple[float, ...], ...] | None,
    num_steps: int,
    where: str,
    named: Callable[[str], Plan | None],
) -> Play | str | None:
    """A checked run; the name of an arm that is no plan; None for a plain sample, which is replayed."""
    if not isinstance(run, dict):
        raise PrismError(f"The {where} must be an object; found {quoted(run, 60)}.")
    arm, plan = run.get("arm"), run.get("plan")
    if "plan" not in run and isinstance(arm, str):
        of_arm = named(arm)
        plan = of_arm and {"strategy": of_arm.strategy, "settings": plan_files.settings_of(of_arm)}
    if plan is None and isinstance(arm, str):
        return arm
    if not isinstance(plan, dict):
        raise PrismError(f"The plan of {where} must be an object with strategy and settings; found {quoted(plan, 60)}.")
    n = whole(f"The number n of {where}", run.get("n"), 1, 10_000)
    if n == 1 and plan.get("strategy") != "zero-order":
        return None
    entry = {"strategy": plan.get("strategy"), "settings": plan.get("settings"), "n": n}
    made = _explicit(plan_files.run_of(entry, num_steps, where))
    rows = number(f"The rows of {where}", run.get("rows"), 0, above=True)
    values = _numbers(run.get("values"), f"The values of {where}")
    if plain is not None and len(plain) != len(values):
        raise PrismError(f"The {where} has {len(values)} values, and the line plain candidates of {len(plain)} plays.")
    return Play(made, rows, values, plain, where)


def _explicit(run: Run) -> Run:
    """A run with the level at which it judges clean latents."""
    plan = run.plan
    looks_now = isinstance(plan, Early) and not plan.predicts()
    if isinstance(plan, JudgedClean) and plan.judge_at is None and not looks_now:
        return replace(run, plan=replace(plan, judge_at=DEFAULT_JUDGE_AT))
    return run


def _lines(path: str | Path) -> list[str]:
    """The whole lines of a file, without empty ones at its end."""
    try:
        text = Path(path).read_bytes().rpartition(b"\n")[0].decode("utf-8")
    except (OSError, ValueError) as error:
        raise PrismError(
            f"The --measured {quoted(str(path), 150)} cannot be read: {quoted(error, 80)}; name a file of lines, see "
            "docs/plan.md."
        ) from error
    return text.splitlines()


def _list(value: Any, name: str) -> list[Any]:
    return listed(name, value, object, "entries")


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    values = tuple(number(name, each) for each in _list(value, name))
    if not values:
        raise PrismError(f"{name} must hold a number or more; it is empty.")
    return values


def _key(run: Run) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    settings = {name: plain(value) for name, value in plan_files.settings_of(run.plan).items()}
    return json.dumps([run.plan.strategy, run.n, settings], sort_keys=True)


def _most(prompts: Mapping[str, set[str]]) -> tuple[list[str], set[str]]:
    """The plans, and the prompts that all of them have, of which there are most: plans times prompts."""
    best: tuple[list[str], set[str]] = ([], set())
    counts = sorted({len(some) for some in prompts.values()}, reverse=True)
    for count in counts:
        some = [key for key in prompts if len(prompts[key]) >= count]
        common = set.intersection(*(prompts[key] for key in some))
        if len(some) * len(common) > len(best[0]) * len(best[1]) and len(common) >= min(recorded.FEWEST, counts[0]):
            best = some, common
    return best


def _scale(part: Recorded, rewards: np.ndarray, plays: Mapping[str, Sequence[Play]]) -> float:
    """The gain of a perfect pick of the store's candidates over that of one of the plays' own; 1 where they have none.

    Where these seeds are further apart than those, all gain more by luck. Refuses plain candidates whose rewards cannot
    be of the store's reward.
    """
    apart, noise, perfect = [], [], []
    n, within = rewards.shape[1], rewards.var(1, ddof=1)
    for row, prompt in enumerate(part.prompts):
        plain = [values for play in plays[prompt] if play.plain is not None for values in play.plain]
        if plain:
            apart.append(float(np.mean(np.concatenate(plain)) - rewards[row].mean()))
            noise.append(2 * within[row] / n)
            full = [np.max(values) - np.mean(values) for values in plain if len(values) == n]
            perfect += [(np.mean(full), rewards[row].max() - rewards[row].mean())] if full else []
    error = float(np.sqrt(np.sum(noise))) / max(len(apart), 1)
    if apart and abs(np.mean(apart)) > _FAR * error + 1e-9:
        raise PrismError(
            f"Plain candidates of --measured have a mean reward {np.mean(apart):+.3g} from the store's on the same "
            f"{len(apart)} prompts, which luck does not explain: the two are of different rewards (--by) or models."
        )
    if len(perfect) < len(part.prompts):
        return 1.0
    theirs, ours = np.sum(perfect, 0)
    return float(ours / theirs) if theirs > 0 else 1.0


def _check(run: Run, cells: Sequence[Sequence[Play]], gain: float, spread: float, load: Workload) -> None:
    """Refuse values of another reward, and rows of another call."""
    where = cells[0][0].where
    if abs(gain) > _MOST * spread:
        raise PrismError(
            f"The values of {where} are {gain:+.3g} from a random pick's on average, and seeds of a prompt differ by "
            f"{spread:.3g}: they are of another reward than --by."
        )
    rows = float(np.mean([play.rows for cell in cells for play in cell]))
    closed = closed_form(run, load)
    if not _ROWS[0] <= rows / closed <= _ROWS[1]:
        raise PrismError(
            f"The plan of {where} took {rows:.4g} denoiser rows, and with the store's call it takes {closed:.4g}: it "
            "was played with other steps or guidance."
        )


def closed_form(run: Run, load: Workload) -> float:
    """The denoiser rows of a run of any strategy, drafts included."""
    checked = run.plan.checked(run.n, 1, len(load.calls), {})
    load = replace(load, n=run.n, draft_calls=[load.calls[0]] * checked.drafts())
    return checked.settled(load).rows(load)


def _agreement(table: Table, load: Workload, both: Sequence[tuple[Run, np.ndarray]], seed: int) -> Agreement | None:
    """How far plans that were played are from their replays, as a share of the oracle's gain; None without such."""
    if not both:
        return None
    from prism.evaluation.intervals import prompt_interval

    apart = np.mean([gain - planner.gains(table, run, load, seed) for run, gain in both], 0)
    columns = np.stack([apart, table.oracle], 1)
    interval = prompt_interval(columns, np.arange(len(apart)), lambda sums: sums[:, 0] / sums[:, 1], seed)
    return {"plans": len(both), "apart": float(apart.sum() / table.oracle.sum()), "apart_ci95": interval}
