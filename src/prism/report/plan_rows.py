"""The rows of metrics.json that `prism plan` writes, as types."""

from __future__ import annotations

from typing import Any, TypedDict


class ReplayedRow(TypedDict):
    """One row of "front": a plan that no cheaper one beats, on all prompts.

    name: the plan in a few words. how: "replayed" on recorded candidates, or "played" (`prism plan --measured`).
    settings: its fields, as in plan.json. cost: its denoiser rows over those of one plain sample. share: the mean gain
    as a share of the oracle's; gain: the mean reward of the picks less that of a random pick; gain_sd: the same in
    pooled within-prompt standard deviations of the reward.
    """

    name: str
    how: str
    strategy: str
    settings: dict[str, Any]
    n: int
    cost: float
    denoiser_rows: float
    share: float
    share_ci95: list[float] | None
    gain: float
    gain_ci95: list[float] | None
    gain_sd: float
    prompts: int


class ChosenRow(ReplayedRow):
    """One row of "plans": the best plan within a budget on one half of the prompts, measured on the other.

    budget: in costs of one plain sample. chosen_share: its share on the half that chose it, `chosen_on` prompts.
    full_n, full_share: the largest Best-of-N in full within the budget (1: a random pick), on the same prompts.
    over_full: the difference of the shares, with its paired interval.
    """

    budget: float
    chosen_share: float
    chosen_on: int
    full_n: int
    full_share: float
    over_full: float
    over_full_ci95: list[float] | None


class PruneRow(TypedDict):
    """One row of "prune": what a cut loses, whatever comes after it.

    regret: the best of all candidates less the best of the survivors, as a share of the oracle's gain, of `keep`
    survivors of all candidates by one reading; by_chance: the same of survivors drawn at random.
    """

    look: str
    step: int
    t: float
    keep: int
    regret: float
    regret_ci95: list[float] | None
    by_chance: float


class SizeRow(TypedDict):
    """One row of "sizes": Best-of-n in full, and the perfect pick.

    share: of the oracle's gain among all candidates; oracle: that of the best of n. judge_gain: how far the judge's own
    score of its pick is above the mean candidate's, in within-prompt standard deviations of that score. more: the
    share less that of the row before, paired.
    """

    n: int
    share: float
    share_ci95: list[float] | None
    oracle: float
    judge_gain: float
    more: float | None
    more_ci95: list[float] | None


class Spread(TypedDict):
    """The field "spread": how much the reward differs between the seeds of a prompt.

    within, between: standard deviations of the reward among a prompt's candidates, and of prompts' means (without what
    their candidates' spread adds). best: the mean reward of the best of n over that of a random pick, in `within`.
    alike: prompts whose candidates all have the same reward.
    """

    within: float
    between: float
    best: float
    mean: float
    alike: int
    candidates: int
    prompts: int


class RivalRow(TypedDict):
    """One row of "rivals": at a budget the best plan that is replayed and the best that was played.

    Each is chosen on one half of the prompts and measured on the other. over: the played one's share less the replayed
    one's, with its paired interval. chosen: "replayed" or "played", which of them is the plan of the budget.
    """

    budget: float
    replayed: str
    replayed_share: float
    played: str
    played_share: float
    played_cost: float
    over: float
    over_ci95: list[float] | None
    chosen: str


class Agreement(TypedDict):
    """Plans that were replayed and played as well: the played share less the replayed one, over all `plans` of them."""

    plans: int
    apart: float
    apart_ci95: list[float] | None


class MeasuredFacts(TypedDict):
    """The field "measured": what was played, and what was left out.

    plans: played ones beside those replayed. prompts: played and recorded. not_played: recorded prompts without plays;
    not_recorded: played ones that are not among the prompts. not_on_all: plans that lack some of the prompts. no_plans:
    arms that are no plan of `best_of_n`. own_base: True if gains are over plain candidates of the same play, and
    scale: what they were multiplied by, so that a perfect pick of those gains what one of the recorded ones does.
    """

    plans: int
    prompts: int
    not_played: int
    not_recorded: int
    not_on_all: int
    no_plans: list[str]
    own_base: bool
    scale: float
    agreement: Agreement | None
