"""The contest at matched cost, played: a line per prompt, by several processes or as the parts of a run.

Who plays is in `prism.lab.matched`, what the lines say in `prism.lab.matched_results`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusers import FlowMatchEulerDiscreteScheduler

from prism.judge import Judge
from prism.lab import front, judges, matched, matched_results
from prism.lab.matched import Seat
from prism.report import matched_page
from prism.report.page import Section
from prism.report.rows import MatchedRow
from prism.runs import Clock, Parts
from prism.sampling import plan_files
from prism.shapeworld import grammar, referee

if TYPE_CHECKING:
    from prism.lab.demo import DemoConfig

AGAIN = 1_000_000  # added to the seed of a prompt's second play
SCHEDULES = {"plain": matched.ARMS, "few": matched.FEW_STEPS, "few-stochastic": matched.FEW_STEPS}
"""The arms by schedule: the call's own steps, four steps, and four steps that draw noise."""
FEW = 4


@dataclass(frozen=True)
class Rules:
    """How a contest is played.

    again: the first prompts that are played with two seeds, for diversity. alone: the first prompts whose shared runs
    are also made by themselves, for seconds. arms: by name; None: all. whole: also searches whose populations run on.
    """

    schedule: str = "plain"
    split: str = "test"
    prompts: int = 200
    seed: int = 0
    again: int = 20
    alone: int = 5
    budgets: tuple[float, ...] = matched.BUDGETS
    arms: tuple[str, ...] | None = None
    whole: bool = False


class Turn(NamedTuple):
    """A prompt that is to be played. number: its position in the split."""

    number: int
    prompt: str
    seeds: tuple[int, ...]
    seats: Mapping[tuple[str, float], Seat]
    alone: bool


class Game:
    """A contest with its judges, and who plays at which budget.

    plan: the file of `prism plan`, whose plans are an arm too. Raises PrismError for a plan of other steps.
    """

    def __init__(
        self, rules: Rules, judge: Judge, pixel: Any, call: Mapping[str, Any], plan: plan_files.Source | None = None
    ) -> None:
        self.rules, self.judge, self.pixel, self.call = rules, judge, pixel, call
        arms = SCHEDULES[rules.schedule] | (matched.WHOLE if rules.whole else {})
        chosen = {name: arm for name, arm in arms.items() if rules.arms is None or name in rules.arms}
        chosen = {name: arm for name, arm in chosen.items() if arm.by != "pixel" or pixel is not None}
        self.seats = matched.seats(chosen, judge, call, rules.budgets, plan)

    def turns(self, lines: Sequence[Mapping[str, Any]] = (), part: tuple[int, int] = (1, 1)) -> list[Turn]:
        """The prompts to play, with the seats that the lines of finished ones lack.

        part: (k, n): every n-th prompt from the k-th on.
        """
        rules, turns = self.rules, list[Turn]()
        present = {line["prompt"]: line["runs"] for line in matched_results.merged(lines)}
        for index, prompt in enumerate(grammar.prompts(rules.split, rules.prompts)):
            have = {(run["arm"], run["budget"]) for run in present.get(prompt, [])}
            missing = {key: seat for key, seat in self.seats.items() if key not in have}
            if missing and index % part[1] == part[0] - 1:
                seeds = (rules.seed, rules.seed + AGAIN) if index < rules.again else (rules.seed,)
                turns.append(Turn(index, prompt, seeds, missing, index < rules.alone))
        return turns

    def play(self, turn: Turn, done: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        """The line of a prompt. done: called after each run of a seat."""
        return matched.line(
            self.judge, self.pixel, referee.score, self.call, turn.prompt, turn.seeds, turn.seats, turn.alone, done
        )

    def rows(self, lines: Sequence[Mapping[str, Any]]) -> list[MatchedRow]:
        """The summary of lines, an arm at a budget each."""
        sample = matched.seats({matched.PLAIN: matched.ARMS[matched.PLAIN]}, self.judge, self.call, [1.0])
        return matched_results.rows(lines, sample[matched.PLAIN, 1.0].rows, self.rules.seed, self.rules.schedule)


@contextlib.contextmanager
def scheduled(backbone: Any, call: Mapping[str, Any], schedule: str) -> Iterator[dict[str, Any]]:
    """The call with the steps of a schedule; the pipeline's scheduler is put back afterwards."""
    pipe, before = backbone.pipe, backbone.pipe.scheduler
    if schedule == "plain":
        yield dict(call)
        return
    config = {**before.config, "stochastic_sampling": schedule == "few-stochastic"}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    try:
        yield {**call, "num_inference_steps": FEW}
    finally:
        pipe.scheduler = before


def as_parts(game: Game, parts: Parts, share: tuple[int, int] = (1, 1)) -> list[dict[str, Any]]:
    """The lines of a game, each a part of a run, so that a killed one goes on. share: as `part` of `Game.turns`."""
    schedule, lines = game.rules.schedule, list[dict[str, Any]]()
    turns = game.turns(part=share)
    clock = Clock(f"all strategies at matched cost, {schedule} steps", len(turns))
    for count, turn in enumerate(turns, 1):
        name = f"matched/{schedule}-{turn.number:04d}"
        is_done = parts.has(f"{name}.json")
        lines.append(parts.once(name, lambda turn=turn: game.play(turn)))  # type: ignore[misc]
        clock.tick(count, not is_done)
    return lines


def games(config: DemoConfig, backbone: Any, pixel: Any, call: Mapping[str, Any]) -> Iterator[Game]:
    """The games of a demo with these settings, each on the schedule that it is played on until the next one is taken.

    The head that ships judges, and the plans that ship (of validation prompts) are an arm of the plain schedule.
    """
    for schedule, prompts in zip(SCHEDULES, (config.matched, config.few_steps, config.few_steps)):
        if prompts:
            with scheduled(backbone, call, schedule) as own_call:
                rules = Rules(schedule, prompts=prompts, seed=config.seed, budgets=config.budgets)
                yield Game(
                    rules, judges.shipped(backbone), pixel, own_call, front.plans() if schedule == "plain" else None
                )


def of_demo(
    parts: Parts, config: DemoConfig, backbone: Any, others: Sequence[Any], call: Mapping[str, Any]
) -> list[MatchedRow]:
    """The rows "matched" of metrics.json. others: the pixel judges, of which the first plays."""
    rows = list[MatchedRow]()
    for game in games(config, backbone, others[0] if others else None, call):
        rows += game.rows(as_parts(game, parts))
    return rows


def fields(rows: Sequence[MatchedRow]) -> dict[str, Any]:
    """The fields of metrics.json: matched, and by schedule the verdicts; none without rows."""
    if not rows:
        return {}
    grouped = matched_page.by_schedule(rows)
    return {"matched": rows, "verdicts": {name: matched_results.verdicts(some) for name, some in grouped.items()}}


def sections(metrics: Mapping[str, Any]) -> list[Section]:
    """The parts of the demo's page."""
    grouped = matched_page.by_schedule(metrics.get("matched", []))
    return [part for name, some in grouped.items() for part in matched_page.sections(some, metrics["verdicts"][name])]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, ready to be added to: one that a kill left unfinished is cut off."""
    if not path.exists():
        return []
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    with path.open("r+b") as file:
        file.truncate(len(whole) + len(end))
    return [json.loads(line) for line in whole.splitlines()]
