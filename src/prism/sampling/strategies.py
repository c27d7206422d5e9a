"""The strategies none, random, early, draft, full and oracle: each a plan that picks the winners of a search."""

from __future__ import annotations

import math
import random
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from prism.backbone.steps import Steps
from prism.errors import PrismError, quoted
from prism.report import wording
from prism.report.wording import Row
from prism.sampling import looks
from prism.sampling.arguments import ask_oracle, oracle_columns
from prism.sampling.drafts import Draft
from prism.sampling.looks import Look
from prism.sampling.noise_search import Evolution, LatentBeams, ZeroOrder
from prism.sampling.particles import FKSteering, Population, Prune
from prism.sampling.plan import (
    CFG,
    Candidate,
    JudgedClean,
    Plan,
    Schedule,
    Workload,
    ahead_rows,
    cut_rows,
    default,
    resolve,
)
from prism.sampling.racing import Race
from prism.sampling.search import Search
from prism.team import merged
from prism.video import frames


class Blind(Plan):
    """A pick of candidates without looking at them."""

    @abstractmethod
    def draw(self, n: int, top_k: int, seed: int, prompt: str) -> list[int]:
        """The indices of the `top_k` of n candidates that are picked."""

    def winners(self, search: Search) -> list[Candidate]:
        drawn = self.draw(len(search.candidates), search.top_k, search.seed, search.prompt)
        picked = [search.candidates[index] for index in drawn]
        search.reserve = [candidate for candidate in search.candidates if candidate not in picked]
        return picked

    def completing(self, load: Workload) -> Sequence[int]:
        return [load.top_k] * len(load.calls)

    def rows(self, load: Workload) -> float:
        return float(sum(load.calls) * load.top_k)


@dataclass(frozen=True)
class First(Blind):
    """The first seeds."""

    strategy, role = "none", "plain"

    def draw(self, n: int, top_k: int, seed: int, prompt: str) -> list[int]:
        return list(range(top_k))

    @staticmethod
    def how(row: Row) -> str:
        return "first seed"


@dataclass(frozen=True)
class Random(Blind):
    """Seeds drawn at random, from the run's seed and the prompt."""

    strategy, role = "random", "luck"

    def draw(self, n: int, top_k: int, seed: int, prompt: str) -> list[int]:
        return random.Random(f"{seed} {prompt}").sample(range(n), top_k)

    @staticmethod
    def how(row: Row) -> str:
        return "any seed"


@dataclass(frozen=True)
class Early(JudgedClean):
    """Candidates judged while they are sampled, and dropped by a schedule.

    schedule: cuts (step, keep); None: the default cut, moved to a step that the head's denoiser runs.
    look: what is judged at a cut, or a tuple with one per cut. "now": the latents as they are. "ahead": the clean
    latents that the denoiser predicts at that step, re-noised to `judge_at`. "ahead-conditional": the same as its
    conditional pass alone predicts them, so that losers do not take the unconditional pass. None: see `looks.defaults`.
    """

    strategy, looks_at, role = "early", "steps", "ours"

    schedule: Sequence[Sequence[int]] | None = None
    look: Look | Sequence[Look] | None = None

    def predicts(self) -> bool:
        return any(look != "now" for look in ((self.look,) if isinstance(self.look, str) else self.look or ()))

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Early:
        if self.schedule is not None:
            resolve(self.schedule, n, sys.maxsize, top_k)  # finds errors that do not depend on the number of steps
        return replace(self, look=looks.checked(self.look, self.schedule))

    def settled(self, load: Workload, steps: Steps | None = None) -> Early:
        """The plan with resolved cuts. Raises PrismError for cuts after the last step."""
        cuts = self.schedule
        if cuts is None:
            ((step, keep),) = default(len(load.calls), load.top_k)
            cuts = ((step if steps is None or self.predicts() else steps.nearest_readable(step), keep),)
        last = None if steps is None or self.predicts() else steps.last_readable
        schedule = resolve(cuts, load.n, len(load.calls), load.top_k, last)
        each = looks.per_cut(self.look, [step for step, _ in schedule], load.looks)
        return replace(self, schedule=schedule, look=each[0] if len(set(each)) == 1 else each)

    def cuts(self, load: Workload) -> Schedule:
        return tuple((step, keep) for step, keep in self.schedule or ())

    def completing(self, load: Workload) -> Sequence[int]:
        keeps = dict(self.cuts(load))
        return list(
            accumulate(range(1, len(load.calls) + 1), lambda alive, step: keeps.get(step, alive), initial=load.n)
        )[1:]

    def rows(self, load: Workload) -> float:
        """The denoiser rows up to the last cut; after it the winners alone go on, from their recordings."""
        rows, alive, done = 0.0, load.n, 0
        for (step, keep), (cost, _) in zip(self.cuts(load), self.reads(load)):
            rows += alive * sum(load.calls[done : step - 1]) + cost
            alive, done = keep, step
        return rows + alive * sum(load.calls[done:])

    def reads(self, load: Workload) -> list[tuple[float, bool]]:
        """The rows that the step of each cut costs, and True if its scores are read by a probe; see `cut_rows`."""
        alive, costs = load.n, []
        for (step, keep), look in zip(self.cuts(load), self._looks(load)):
            calls = load.calls[step - 1]
            if look == "now":
                costs.append(cut_rows(alive, keep, load.cfg, calls, load.tap_share, load.listens))
            else:
                looking = ahead_rows(alive, keep, load.cfg, calls, look == "ahead-conditional")
                costs.append((looking + self.judging(alive, load), False))
            alive = keep
        return costs

    def winners(self, search: Search) -> list[Candidate]:
        """The candidates that are left after the last cut, best first.

        Where they do not fit into one batch, or it looks ahead, each chunk runs to the next cut, and later rounds take
        the steps before it from recordings. Once they fit, one call goes through all cuts that are left, with dead rows
        gated out. Processes that share a run gather scores after each cut, so that they always go cut by cut.
        """
        alive, cuts = list(search.candidates), list(self.cuts(search.load))
        ahead = list(self._looks(search.load))
        probed = {step: probe for (step, _), (_, probe) in zip(cuts, self.reads(search.load))}
        while cuts:
            look, (step, keep) = ahead[0], cuts[0]
            if look != "now":
                scores = self.ahead(search, alive, step, look == "ahead-conditional")
                alive = search.rank(step, self.level, scores, keep, alive, look=look)
            elif search.team.alone and len(alive) <= search.batch_size and set(ahead) == {"now"}:
                alive = search.run_through_cuts(sorted(alive), cuts, probed)
                break
            else:
                alive = search.run_to_cut(alive, step, keep, probed)
            del cuts[0], ahead[0]
        for cut in search.scores if self.predicts() else ():
            cut.setdefault("look", "now")
        return alive

    def _looks(self, load: Workload) -> tuple[Look, ...]:
        """The look of each cut."""
        return looks.per_cut(self.look, [step for step, _ in self.cuts(load)], load.looks)

    def look_at(self, step: int) -> Look:
        """The look of the cut at a step of the plan's schedule."""
        steps = [step for step, _ in self.schedule or ()]
        return dict(zip(steps, looks.per_cut(self.look, steps, ())))[step]

    def listened(self, load: Workload) -> list[int]:
        return [step for (step, _), look in zip(self.cuts(load), self._looks(load)) if look == "now"]

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        cuts, each = [[cut["step"], len(cut["kept"])] for cut in scores], [cut.get("look", "now") for cut in scores]
        levels = [cut["t"] for cut, look in zip(scores, each) if look != "now"]  # as they stand, at any level
        seen = {"judge_at": levels[0], "look": looks.in_words(each)} if levels else {"judge_at": None}
        return {**super().settings(scores), "schedule": cuts, **seen}

    @staticmethod
    def how(row: Row) -> str:
        return looks.how(row)


@dataclass(frozen=True)
class Full(JudgedClean):
    """Every candidate sampled to the end and judged; winners alone are decoded, from their recordings."""

    strategy, looks_at, role = "full", "finished", "reference"

    def completing(self, load: Workload) -> Sequence[int]:
        return [load.n] * len(load.calls)

    def rows(self, load: Workload) -> float:
        return load.n * sum(load.calls) + self.judging(load.n, load)

    def winners(self, search: Search) -> list[Candidate]:
        def sample() -> dict[Candidate, Tensor]:
            for _ in search.sample_all(output_type="latent"):
                pass
            return dict(search.latents)

        return self.best(search, sample)

    @staticmethod
    def how(row: Row) -> str:
        return wording.judged_at(row) or "judged clean"

    @staticmethod
    def cut_name(step: int) -> str:
        return "finished"


@dataclass(frozen=True)
class Oracle(Plan):
    """Every candidate sampled to the end and decoded; `oracle(video, prompt)` scores each video."""

    strategy, looks_at, role = "oracle", "videos", "best"

    oracle: Callable[[Any, Any], Any] | None = None
    select_by: str | Mapping[str, float] = "overall"

    def completing(self, load: Workload) -> Sequence[int]:
        return [load.n] * len(load.calls)

    def rows(self, load: Workload) -> float:
        return float(load.n * sum(load.calls))

    def decodes(self, load: Workload) -> int:
        return load.n + load.top_k

    def winners(self, search: Search) -> list[Candidate]:
        assert self.oracle is not None
        ask = self.oracle

        def look() -> dict[Candidate, dict[str, float]]:
            answers: dict[Candidate, dict[str, float]] = {}
            for videos in search.sample_all(output_type="np"):
                shown: dict[Candidate, Any] = {}
                for candidate, video in videos.items():
                    try:
                        sound = search.backbone.family.sampling_rate
                        shown[candidate] = video if sound else frames(video, "its video")
                    except PrismError as error:  # a VAE that overflows
                        search.warn_dropped(candidate, str(error).rstrip("."))
                for candidate, answer in zip(shown, ask_oracle(ask, list(shown.values()), search.prompt)):
                    if all(math.isfinite(value) for value in answer.values()):
                        answers[candidate] = answer
                    else:
                        search.warn_dropped(candidate, "the oracle's score of it is NaN or infinite")
            return answers

        answers = merged(search.team.agree(look))
        names, weights = oracle_columns(list(answers.values()), self.select_by)
        scores = {candidate: [answer[name] for name in names] for candidate, answer in answers.items()}
        ((step, keep),) = self.cuts(search.load)
        return search.rank(step, 0.0, scores, keep, search.candidates, names, weights)

    @staticmethod
    def how(row: Row) -> str:
        return "referee picks"


# By name, from cheap to expensive: the order in which reports list them.
STRATEGIES: dict[str, type[Plan]] = {
    kind.strategy: kind
    for kind in (First, Random, Early, Race, Draft, ZeroOrder, Prune, LatentBeams, FKSteering, Evolution, Full, Oracle)
}


def kind_of(strategy: Any) -> type[Plan]:
    """The class of a strategy's plan, by the strategy's name."""
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise PrismError(f'There is no strategy "{quoted(strategy, 60)}"; choose one of {", ".join(STRATEGIES)}.')
    return STRATEGIES[strategy]


def plan_of(strategy: str, **settings: Any) -> Plan:
    """The plan of a strategy with the settings that it takes. Raises PrismError for one of others, not at its default.

    until: where it is set, `judge_at` is of the rounds too, whatever the strategy.
    """
    kind = kind_of(strategy)
    taken = {field.name for field in fields(kind)}
    for name, what in _OF_SOME.items():
        value = settings.get(name)
        unsaid = value is None or (type(value) in (int, str) and value == _UNSAID.get(name))
        if not (unsaid or name in taken or (name == "judge_at" and settings.get("until") is not None)):
            owners = [f'"{each}"' for each, other in STRATEGIES.items() if name in {f.name for f in fields(other)}]
            listed = " or ".join([", ".join(owners[:-1]), owners[-1]][len(owners) == 1 :])
            raise PrismError(f'{what} belongs to the strategy {listed}, and this run\'s is "{strategy}"; leave it out.')
    return kind(**{name: value for name, value in settings.items() if name in taken})


# Settings that some strategies take, in words, and the values of them that say nothing.
_OF_SOME = {
    **{"schedule": "A schedule", "look": "A look", "oracle": "An oracle", "draft_cache": "A draft cache"},
    **{"draft_steps": "A length of drafts (draft_steps)", "judge_at": "A level to judge at (judge_at)"},
    "num_draws": "A number of noise draws (num_draws)",
}
_UNSAID: dict[str, Any] = {"look": "now", "num_draws": 2}


def warn_of_cost(plan: Plan, load: Workload) -> None:
    """Warn of a population that goes to the end and costs more than judging all candidates there alone."""
    full = Full().rows(load)
    if isinstance(plan, Population) and plan.going(load) > load.top_k and plan.rows(load) > full:
        least = replace(plan, keep=load.top_k)
        warnings.warn(
            f'The strategy "{plan.strategy}" takes {plan.rows(load) / full:.0%} of the denoiser rows of "full", since '
            f"it runs {plan.going(load)} candidates to the end and judges on the way too; with plan="
            f"{type(plan).__name__}(keep={load.top_k}) it takes {least.rows(load) / full:.0%}.",
            stacklevel=4,
        )


def expected_rows(
    strategy: str,
    n: int,
    num_steps: int,
    cfg: CFG,
    guided: bool,
    tap_share: float,
    schedule: Schedule | None = None,
    draft_steps: int = 0,
    num_draws: int = 2,
    top_k: int = 1,
    listens: bool = True,
    calls: Sequence[int] | None = None,
    draft_calls: Sequence[int] | None = None,
) -> float:
    """The denoiser rows of a `best_of_n` run, in closed form; the strategy early needs its `schedule`.

    num_steps, draft_steps: the numbers of steps that the scheduler makes. calls, draft_calls: denoiser passes per step
    of the run and of a draft, for guiders that guide some of the steps; None: two per step if guided, else one.
    tap_share, listens: see `cut_rows`.
    """
    calls = [1 + guided] * num_steps if calls is None else calls
    drafted = [1 + guided] * draft_steps if draft_calls is None else draft_calls
    load = Workload(n, calls, cfg, tap_share, drafted, top_k, listens)
    taken = {field.name for field in fields(kind_of(strategy))}
    return plan_of(strategy, schedule=schedule, **({"num_draws": num_draws} if "num_draws" in taken else {})).rows(load)
