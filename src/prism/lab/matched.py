"""All strategies at matched total cost: who plays with how many candidates at a budget, and what each one picks.

A budget is in costs of one plain sample, by denoiser rows in closed form, judging included; each arm takes the most
candidates that it pays for. Arms that only choose among seeds share what they sample: the first eight finished videos,
of which full takes all sets of n, and an arm's largest run, whose first candidates are a smaller run's. Arms whose
candidates part run by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling import best_of_n, plan_files
from prism.sampling.best_of_n import BestOfNResult
from prism.sampling.drafts import Draft
from prism.sampling.looks import DEFAULT_JUDGE_AT
from prism.sampling.noise_search import Evolution, LatentBeams, ZeroOrder
from prism.sampling.particles import FKSteering, Prune
from prism.sampling.plan import JudgedClean, Plan, Workload, judging_noise
from prism.sampling.racing import Race
from prism.sampling.strategies import Early, First, Full, Oracle

EIGHT = 8
"""Candidates of the fixed oracle: its gain is that of the best of the first eight seeds over their mean."""
MOST = 64
BUDGETS = (1.2, 1.5, 2.0, 3.0, 5.0, 8.0)
SLACK = 0.05
"""Share of a budget by which an arm may exceed it; the planner's plan does not."""
PLAIN, PLANNED, LONGER, FULL = "one plain sample", "the planner's plan", "one candidate, more steps", "full"
PIXEL, REFEREE = "full, by the pixel judge", "full, by the referee"

# (video (T, H, W, 3) in [0, 1], prompt) -> scores by name, with "overall"
Referee = Callable[[Any, str], Mapping[str, float]]


@dataclass(frozen=True)
class Arm:
    """A contestant. by: who judges its candidates. longer: its budget is spent on steps of one candidate."""

    plan: Plan
    by: Literal["prism", "pixel", "referee"] = "prism"
    longer: bool = False


def _arms(*judged: tuple[str, Plan]) -> dict[str, Arm]:
    arms = {PLAIN: Arm(First()), LONGER: Arm(First(), longer=True), **{name: Arm(plan) for name, plan in judged}}
    return arms | {PIXEL: Arm(Oracle(), "pixel"), REFEREE: Arm(Oracle(), "referee")}


ARMS = _arms(
    ("early 4:1", Early(schedule=[(4, 1)], look="now")),
    ("early 6:1", Early(schedule=[(6, 1)], look="now")),
    ("ahead 3:1", Early(schedule=[(3, 1)], look="ahead")),
    (FULL, Full()),
    ("draft, 3 steps", Draft()),
    ("draft, step cache", Draft(draft_cache="taylorseer:4,guidance:0.5")),
    ("race at 3", Race(first=3, most_draws=8, each_draws=2)),
    ("fk, one kept", FKSteering(keep=1, resampling_t_end=8)),
    ("beam, one kept", LatentBeams(keep=1)),
    ("prune", Prune()),
    ("evolution, one kept", Evolution(evolution_schedule=[4, 6, 8], keep=1)),
    ("zero-order", ZeroOrder()),
)
"""The arms of a run of 20 steps. Populations keep one candidate after their last step, which buys more of them."""

WHOLE = _arms(
    ("fk", FKSteering()),
    ("beam", LatentBeams()),
    ("evolution", Evolution()),
    ("prune of seeds", Prune(beta=None)),
)
"""Searches whose populations run to the end, as in their papers."""

FEW_STEPS = _arms(
    ("early 2:1", Early(schedule=[(2, 1)], look="now")),
    ("ahead 1:1", Early(schedule=[(1, 1)], look="ahead")),
    ("ahead 2:1", Early(schedule=[(2, 1)], look="ahead")),
    (FULL, Full()),
    ("fk, one kept", FKSteering(keep=1, resample_frequency=2)),
    ("beam, one kept", LatentBeams(keep=1, search_schedule=[1, 3])),
    ("prune", Prune()),
    ("evolution, one kept", Evolution(evolution_schedule=[1, 3], keep=1)),
    ("zero-order", ZeroOrder(judged_step=3)),
)
"""The arms of a run of 4 steps; where steps draw noise, children differ from the second step after they part."""


@dataclass(frozen=True)
class Seat:
    """An arm at a budget. n: its candidates; 1 without a search: one plain sample. rows: its cost in closed form.

    judged: the rows of those that judge, where the plan judges clean latents."""

    arm: str
    by: str
    plan: Plan
    n: int
    rows: float
    judged: float = 0.0
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """True if it is one plain sample, whose gain is zero in expectation."""
        return self.n == 1 and not self.changes and not isinstance(self.plan, ZeroOrder)

    def filed(self) -> dict[str, Any] | None:
        """The plan as plan.json writes it; None for arms that no such file runs."""
        if self.changes or self.plan.needs_oracle():
            return None
        return {"strategy": self.plan.strategy, "settings": plan_files.settings_of(self.plan)}

    @property
    def finished(self) -> bool:
        """True if it chooses among finished candidates by the scores that `Player.sample` makes."""
        return isinstance(self.plan, Oracle) or self.plan == Full()

    @property
    def nested(self) -> bool:
        """True if its candidates' scores are those of the first candidates of a larger run of the same plan."""
        if isinstance(self.plan, Draft):
            return not self.plan.adapts()
        return isinstance(self.plan, Early) and len(self.plan.schedule or ()) == 1


def workload(plan: Plan, judge: Judge, call: Mapping[str, Any], n: int) -> tuple[Plan, Workload]:
    """A plan for n candidates, checked and settled, and its workload. Raises PrismError where it takes no n."""
    load = Workload.of(judge.backbone, call, n, judge.tap)
    checked = plan.checked(n, 1, len(load.calls), call)
    load = replace(load, draft_calls=[load.calls[0]] * checked.drafts())
    return checked.settled(load), load


def seat(
    name: str, arm: Arm, judge: Judge, call: Mapping[str, Any], budget: float, slack: float = SLACK
) -> Seat | None:
    """An arm with as many candidates as a budget pays for; None where it pays for no search."""
    calls = Workload.of(judge.backbone, call, 1, judge.tap).calls
    sample = float(sum(calls))
    if arm.longer:
        steps = round(budget * len(calls))
        return Seat(name, arm.by, arm.plan, 1, steps * float(calls[0]), changes={"num_inference_steps": steps})
    if isinstance(arm.plan, First):
        return Seat(name, arm.by, arm.plan, 1, sample)
    best: Seat | None = None
    for n in range(1, MOST + 1):
        try:
            plan, load = workload(arm.plan, judge, call, n)
        except PrismError:  # it takes no so few candidates
            continue
        rows = plan.rows(load)
        if rows > budget * (1 + slack) * sample:
            break
        best = Seat(name, arm.by, arm.plan, n, rows, _judged(plan, load))
    if best is not None and best.plain:
        return replace(best, plan=First(), rows=sample, judged=0.0) if best.finished else None
    return best


def _judged(plan: Plan, load: Workload) -> float:
    """The rows of a plan's looks at clean latents."""
    if isinstance(plan, Race):
        return plan.rows(load) - replace(plan, most_draws=0).rows(load)
    if not isinstance(plan, JudgedClean) or (isinstance(plan, Early) and not plan.predicts()):
        return 0.0
    return plan.rows(load) - replace(plan, num_draws=0).rows(load)


def seats(
    arms: Mapping[str, Arm],
    judge: Judge,
    call: Mapping[str, Any],
    budgets: Sequence[float] = BUDGETS,
    plan: plan_files.Source | None = None,
    slack: float = SLACK,
) -> dict[tuple[str, float], Seat]:
    """Every arm at every budget that pays for it. plan: the file of `prism plan`, whose plans are an arm too."""
    taken: dict[tuple[str, float], Seat] = {}
    for budget in budgets:
        filed = None if plan is None else plan_files.opened(plan, budget)
        if filed is not None:
            settled, load = workload(filed.run.plan, judge, call, filed.run.n)
            judged = _judged(settled, load)
            taken[PLANNED, budget] = Seat(PLANNED, "prism", filed.run.plan, filed.run.n, settled.rows(load), judged)
        for name, arm in arms.items():
            if (sat := seat(name, arm, judge, call, budget, slack)) is not None:
                taken[name, budget] = sat
    return taken


@dataclass(frozen=True)
class Outcome:
    """What a seat kept: the referee's value, the winner's latents, and seconds where it ran by itself."""

    value: float
    latents: Tensor
    rows: float
    seconds: float | None = None
    decodes: int = 1
    same: bool | None = None  # where it ran beside the shared run: that it picked the same seed


class Player:
    """The seats on one prompt and one seed. alone: also run by itself each seat whose pick the shared runs say."""

    def __init__(
        self, judge: Judge, pixel: Any, referee: Referee, call: Mapping[str, Any], prompt: str, seed: int, alone: bool
    ) -> None:
        self.judge, self.pixel, self.referee, self.prompt, self.seed = judge, pixel, referee, prompt, seed
        self.call, self.alone = {**call, "output_type": "np"}, alone
        self.values: dict[int, float] = {}  # of candidates as they are, by index
        self.latents: dict[int, Tensor] = {}
        self.scores: dict[str, np.ndarray] = {}  # of the finished ones, by judge

    def sample(self, n: int) -> None:
        """Finish the first n candidates, and score them by the referee, the pixel judge and the judge."""

        def ask(video: Any, prompt: str) -> dict[str, float]:
            pixel = {} if self.pixel is None else {"pixel": self._pixel_value(video, prompt)}
            return {"overall": self._referee_value(video, prompt), **pixel}

        every = best_of_n(
            self.judge.backbone.pipe, None, self.prompt, n, seed=self.seed, strategy="oracle", oracle=ask,
            keep_latents=True, **self.call,
        )  # fmt: skip
        assert every.candidate_latents is not None
        self.scores = {name: np.array(column) for name, column in every.scores[0]["scores"].items()}
        self.scores["referee"] = self.scores.pop("overall")
        self.values = dict(enumerate(self.scores["referee"].tolist()))
        self.latents = {index: each.float().cpu() for index, each in every.candidate_latents.items()}
        full, latents = Full(), torch.stack([every.candidate_latents[index] for index in range(n)])
        by_ours, _ = self.judge.score_clean(
            latents, [self.prompt] * n, DEFAULT_JUDGE_AT, num_draws=full.num_draws,
            generator=judging_noise(self.seed), **self.call,
        )  # fmt: skip
        self.scores["prism"] = by_ours[:, self.judge.dimensions.index("overall")].cpu().numpy()

    def play(self, seats: Sequence[Seat], done: Callable[[], Any] = lambda: None) -> list[Outcome]:
        """What each seat keeps, in order; `done` is called after each."""
        self.sample(max([EIGHT, *(seat.n for seat in seats if seat.finished)]))
        largest: dict[str, Seat] = {}
        for each in seats:
            if each.nested and each.arm != PLANNED and each.n > getattr(largest.get(each.arm), "n", 0):
                largest[each.arm] = each
        memo: dict[tuple[str, int, str], Outcome] = {}
        columns: dict[str, np.ndarray] = {}
        for each in sorted(seats, key=lambda each: -each.n):
            key = (each.arm, each.n, f"{each.plan} {each.changes}")
            if key not in memo:
                memo[key] = self._outcome(each, largest, columns)
            done()
        return [memo[each.arm, each.n, f"{each.plan} {each.changes}"] for each in seats]

    def _outcome(self, seat: Seat, largest: Mapping[str, Seat], columns: dict[str, np.ndarray]) -> Outcome:
        if seat.plain:
            mean = float(np.mean([self.values[index] for index in range(EIGHT)]))
            return replace(self._alone(seat), value=mean) if self.alone else Outcome(mean, self.latents[0], seat.rows)
        if seat.finished:
            return self._shared(seat, self.scores[seat.by], seat.n if seat.by != "prism" else 1)
        if seat.arm not in largest:
            return self._alone(seat)
        if largest[seat.arm] == seat:
            result = self._run(seat)
            columns[seat.arm] = np.array(result.scores[0]["scores"]["overall"])
            return self._kept(result)
        return self._shared(seat, columns[seat.arm])

    def _shared(self, seat: Seat, scores: np.ndarray, decodes: int = 1) -> Outcome:
        """What the shared scores pick of the first n candidates, of equal ones the first."""
        index = int(scores[: seat.n].argmax())
        if index not in self.values:
            self._kept(self._run(replace(seat, plan=First(), n=1), first=index))
        value = self._expected(scores, seat.n) if seat.finished and seat.n <= EIGHT else self.values[index]
        outcome = Outcome(value, self.latents[index], seat.rows, None, decodes)
        if not self.alone:
            return outcome
        result = self._run(seat)
        ledger = result.ledger
        return replace(outcome, rows=ledger.denoiser_rows, seconds=ledger.seconds, same=result.index == index)

    def _expected(self, scores: np.ndarray, n: int) -> float:
        """The mean value of the picks over all sets of n of the first eight: what n seeds get, without their luck."""
        sets = np.array(list(combinations(range(EIGHT), n)))
        picks = sets[np.arange(len(sets)), scores[sets].argmax(1)]
        return float(np.array([self.values[index] for index in range(EIGHT)])[picks].mean())

    def _alone(self, seat: Seat) -> Outcome:
        return self._kept(self._run(seat), bool(seat.changes))

    def _kept(self, result: BestOfNResult, other: bool = False) -> Outcome:
        """A result's winner; other: it is no candidate as it is, though it has no edits."""
        index, value = result.seed - self.seed, self._referee_value(result.video, self.prompt)
        latents = result.latents[0].float().cpu()
        if not other and not result.top[0].edits:
            self.values.setdefault(index, value)
            self.latents.setdefault(index, latents)
        ledger = result.ledger
        return Outcome(value, latents, ledger.denoiser_rows, ledger.seconds, ledger.vae_decodes)

    def _run(self, seat: Seat, first: int = 0) -> BestOfNResult:
        plan, judge = seat.plan, self.judge
        if isinstance(plan, Oracle):
            plan = Oracle(self._pixel_value if seat.by == "pixel" else self._referee_value)
        return best_of_n(
            judge.backbone.pipe, judge, self.prompt, plan=plan, seed=self.seed,
            seeds=[self.seed + first + i for i in range(seat.n)], **{**self.call, **seat.changes},
        )  # fmt: skip

    def _referee_value(self, video: Any, prompt: str) -> float:
        return float(self.referee(video, prompt)["overall"])

    def _pixel_value(self, video: Any, prompt: str) -> float:
        scores = self.pixel.score_videos(torch.as_tensor(video)[None], [prompt])
        return float(scores[0, self.pixel.dimensions.index("overall")])


def line(
    judge: Judge,
    pixel: Any,
    referee: Referee,
    call: Mapping[str, Any],
    prompt: str,
    seeds: Sequence[int],
    taken: Mapping[tuple[str, float], Seat],
    alone: bool = False,
    done: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """One prompt of the contest as JSON.

    seeds: of its plays; with two or more, `apart` says how far apart an arm's winners are.

    Returns {"prompt", "seeds", "values": by seed the referee's of the first eight candidates, "apart": the mean root
    mean squared difference of the latents of two of them, "runs": one per seat, {"arm", "budget", "plan" (of plan.json;
    None: no plan of `best_of_n`), "n", "rows" of the denoiser, "judged" those for judging clean latents, "decodes",
    "values" by seed, "seconds" by seed (None where the pick is a shared run's), "same" (where it ran beside that),
    "apart" (None with one seed)}}.
    """
    players = [Player(judge, pixel, referee, call, prompt, seed, alone) for seed in seeds]
    outcomes = list(zip(*(player.play(list(taken.values()), done) for player in players)))
    runs = []
    for ((name, budget), sat), each in zip(taken.items(), outcomes):
        runs.append(
            {
                "arm": name,
                "budget": budget,
                "plan": sat.filed(),
                "n": sat.n,
                "rows": float(np.mean([outcome.rows for outcome in each])),
                "judged": sat.judged,
                "decodes": each[0].decodes,
                "values": [outcome.value for outcome in each],
                "seconds": [outcome.seconds for outcome in each],
                "same": [outcome.same for outcome in each if outcome.same is not None],
                "apart": apart([outcome.latents for outcome in each]),
            }
        )
    plain = [apart([player.latents[index] for index in range(EIGHT)]) or 0.0 for player in players]
    values = [[player.values[index] for index in range(EIGHT)] for player in players]
    return {"prompt": prompt, "seeds": list(seeds), "values": values, "apart": float(np.mean(plain)), "runs": runs}


def apart(latents: Sequence[Tensor]) -> float | None:
    """The mean over pairs of the root mean squared difference; None for fewer than two."""
    pairs = [float((a - b).square().mean().sqrt()) for a, b in combinations(latents, 2)]
    return float(np.mean(pairs)) if pairs else None
