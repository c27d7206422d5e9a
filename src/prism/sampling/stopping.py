"""Rules that end sampling early: a plain call whose videos are lost, by the clips of the judge's reference."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prism.backbone.wrapping import free_hooks
from prism.errors import PrismError, choice, number, quoted, whole
from prism.judge.reference import ENOUGH, Reference

if TYPE_CHECKING:
    from prism.sampling.listening import StepScores

NEAR = 25.0
"""How far, in t, a noise level may lie beyond the reference's levels: half a step of a call with 20 steps."""
HALF = 0.5  # share of the variance that is between prompts from which on it is said


class Rejected(Exception):
    """The end of a call that a rule gave up, see `Reject`.

    step: the scheduler's step, from 1, at which it was given up. t: the noise level of its latents, in [0, 1000].
    probability: of its best video to be preferred to one of those that it was compared with, in [0, 1].
    """

    def __init__(self, step: int, t: float, probability: float):
        super().__init__(step, t, probability)
        self.step, self.t, self.probability = step, t, probability

    def __str__(self) -> str:
        return (
            f"The call was given up at step {self.step} (t = {self.t:.0f}): its best video is preferred to another "
            f"with a probability of {self.probability:.2f}."
        )


@dataclass(frozen=True)
class Reject:
    """A rule that gives a plain call up at the first step at which all of its videos are lost.

    below: a video is lost where the probability that it is preferred to a random one of those that it is compared with
        is lower, in (0, 1), or where its score is not finite.
    by: the dimension of the judge that decides.
    against: what it is compared with. "reference": the clips of the judge's reference. "heard": the videos of the
        earlier calls of the same `listen`, at the same step, from the first step at which there are four or more; the
        calls must be of one prompt.
    prompt: what the videos show; they are compared with the reference's clips of this prompt where there are enough.
        None: with all clips.
    levels: the lowest and the highest noise level t, in [0, 1000], at which it may decide. None: from the lowest to the
        highest level of the reference (with "heard", all), but for levels at which the head was measured to be no
        better than chance.
    steps: the first and the last step, from 1, at which it may decide. None: all.
    """

    below: float
    by: str = "overall"
    against: Literal["reference", "heard"] = "reference"
    prompt: str | None = None
    levels: tuple[float, float] | None = None
    steps: tuple[int, int] | None = None


class Watch:
    """A rule `Reject` at work on the scores of a judge.

    Raises PrismError for a judge without a reference, and for a rule that could never decide.
    """

    def __init__(self, judge: Any, rule: Reject | float):
        rule = rule if isinstance(rule, Reject) else Reject(rule)
        self.rule = replace(rule, below=probability("reject", rule.below))
        choice("against", rule.against, ("reference", "heard"))
        self.judge, self.column = judge, column_of(judge, rule.by, "reject")
        self.reference = reference_of(judge, "reject", rule.by, rule.prompt) if rule.against == "reference" else None
        self.low, self.high = _levels(self.reference, rule.levels)
        self.steps = _steps(rule.steps)
        self.blind = _blind(judge, rule.by) if rule.levels is None else {}
        if self.reference is not None and all(map(self._is_blind, self.reference.levels)):
            raise PrismError(
                f"The head was measured to be no better than chance on {rule.by} at all levels of its reference, so "
                "that reject has nothing to go by; make a reference at other levels with prism reference --t."
            )
        self.past: dict[int, list[np.ndarray]] = {}  # scores (rows, num_dimensions) of the calls so far, by step
        self.heard, self.decided = 0, 0  # entries, and those of them at which it could decide

    def see(self, entry: StepScores) -> Rejected | None:
        """The exception that ends a call, if all rows of its scores at a step are lost."""
        scores = entry.scores.double().cpu().numpy()
        rivals = self._rivals(entry)
        self.past.setdefault(entry.step, []).append(scores[np.isfinite(scores).all(1)])
        self.heard += 1
        within = self.low <= entry.t <= self.high and self.steps[0] <= entry.step <= self.steps[1]
        if rivals is None or not within or self._is_blind(entry.t):
            return None
        self.decided += 1
        errors = np.broadcast_to(rivals.draw_errors(), scores.shape)
        wins = rivals.win_probability(self.judge, scores, errors, entry.t)[:, self.column]
        best = float(np.nan_to_num(wins).max())
        if best >= self.rule.below:
            return None
        free_hooks(self.judge.backbone.pipe)  # the call does not come to its end, where the pipeline does it
        return Rejected(entry.step, entry.t, best)

    def _rivals(self, entry: StepScores) -> Reference | None:
        """The clips that the scores of a step are compared with; None while there are too few."""
        if self.reference is not None:
            return self.reference.at(entry.t)
        past = np.concatenate(self.past.get(entry.step) or [np.empty((0, len(self.judge.dimensions)))])
        if len(past) < ENOUGH:
            return None
        keys = ("",) * len(past)
        return Reference((entry.t,), self.judge.dimensions, past[None], np.zeros_like(past)[None], keys, {})

    def _is_blind(self, t: float) -> bool:
        """True if the head was measured to be no better than chance at the measured level next to t."""
        return bool(self.blind) and self.blind[min(self.blind, key=lambda level: abs(level - t))]

    def close(self) -> None:
        """Warn if calls were made and no step of them could be decided."""
        if self.heard and not self.decided and self.reference is not None:
            last = "" if self.steps[1] == math.inf else f" to {self.steps[1]}"
            warnings.warn(
                f"No call was given up: reject decides at t from {self.low:g} to {self.high:g}, at steps from "
                f"{self.steps[0]}{last}, and no step of a call was one of these.",
                stacklevel=2,
            )


def probability(name: str, value: Any) -> float:
    """`value`, if it is a probability above 0 and below 1."""
    checked = number(name, value, 0, 1, above=True)
    if checked == 1:
        raise PrismError(f"{name} must be a probability above 0 and below 1; found {quoted(value, 80)}.")
    return checked


def reference_of(judge: Any, what: str, by: str, prompt: str | None, warns: bool = True) -> Reference:
    """The clips of the judge's reference that the option `what` compares a prompt's videos with: those of the prompt
    where there are enough, otherwise all.

    Warns, unless `warns` is false, where these tell the prompts apart more than the videos of one, as heads that are
    trained within prompts do.
    """
    reference = getattr(judge, "reference", None)
    if not isinstance(reference, Reference):
        raise PrismError(
            f"{what} compares scores with the clips of the judge's reference, and this judge has none; make one with "
            "prism reference --head FOLDER --data STORE, and load the head again."
        )
    part = reference if prompt is None else reference.of_prompt(prompt)
    shares = [(each or {}).get(by) for each in (reference.facts.get("between_prompts") or {}).values()]
    share = max((each for each in shares if each is not None), default=0.0)
    if warns and part is reference and share > HALF:
        named = "" if prompt is None else f" of the prompt {quoted(repr(prompt), 60)}"
        warnings.warn(
            f"The judge's reference has fewer than {ENOUGH} clips{named} to compare with, and {share:.0%} of the "
            f"variance of {by} in it is between prompts: the probabilities of {what} say more about the prompt than "
            "about a video; make a reference of a store with clips of the prompt.",
            stacklevel=4,
        )
    return part


def column_of(judge: Any, by: Any, what: str) -> int:
    """The position of the judge's dimension `by`, by which the option `what` decides."""
    names = judge.dimensions
    if not isinstance(by, str) or by not in names:
        raise PrismError(
            f"{what} decides by one dimension of the judge, which has {', '.join(names)}; found {quoted(by, 80)}."
        )
    return int(names.index(by))


def _blind(judge: Any, by: str) -> dict[float, bool]:
    """By the levels at which the head's accuracy was measured, True if its interval reaches down to one half."""
    rows = [row for row in getattr(judge, "evaluation", []) if row["dimension"] == by and row.get("without_ties_ci95")]
    return {float(row["t"]): row["without_ties_ci95"][0] <= 0.5 for row in rows}


def _levels(reference: Reference | None, levels: Any) -> tuple[float, float]:
    """The noise levels between which a rule may decide; levels: those that the caller names, or None."""
    low, high = (0.0, 1000.0) if reference is None else (min(reference.levels), max(reference.levels))
    wide = low - NEAR, high + NEAR
    if levels is None:
        return wide
    first, last = _two("levels", levels)
    first, last = number("The lowest of levels", first, 0, 1000), number("The highest of levels", last, 0, 1000)
    if first > last or max(first, wide[0]) > min(last, wide[1]):
        raise PrismError(
            f"levels must be two noise levels, the lower one first, that meet those of the judge's reference (t from "
            f"{low:g} to {high:g}); found {quoted(levels, 80)}."
        )
    return max(first, wide[0]), min(last, wide[1])


def _steps(steps: Any) -> tuple[int, float]:
    """The steps from which to which a rule may decide; infinity stands for no end."""
    if steps is None:
        return 1, math.inf
    first, last = _two("steps", steps)
    first, last = whole("The first of steps", first), whole("The last of steps", last)
    if first > last:
        raise PrismError(f"steps must be two steps, the earlier one first; found {quoted(steps, 80)}.")
    return first, last


def _two(name: str, values: Any) -> tuple[Any, Any]:
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise PrismError(f"{name} must be a pair (first, last); found {quoted(values, 80)}.")
    return values[0], values[1]
