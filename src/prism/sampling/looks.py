"""The look of a cut: at the latents as they stand or ahead, said by the user or by the head's measured accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from prism.backbone import Backbone, prediction
from prism.backbone.steps import Steps
from prism.errors import PrismError, quoted
from prism.report import wording
from prism.report.wording import Row

Look = Literal["now", "ahead", "ahead-conditional"]

DEFAULT_JUDGE_AT = 700.0  # the noise level at which a head judges finished latents best (paper, Table 1)
CHANCE = 0.5  # the accuracy of a judge that sees nothing
LOSS = 0.1  # the loss of accuracy from `judge_at` to a cut's level from which on a look ahead is worth its rows


def checked(look: Any, cuts: Any) -> Look | tuple[Look, ...] | None:
    """A look: one for all cuts, one per cut of the schedule `cuts`, or None for the default of each."""
    if look is None or (isinstance(look, str) and look in get_args(Look)):
        return look  # type: ignore[return-value]
    several = tuple(look) if isinstance(look, list | tuple) else ()
    wrong = [each for each in several or (look,) if not (isinstance(each, str) and each in get_args(Look))]
    if wrong:
        raise PrismError(f"look is one of {', '.join(get_args(Look))}; found {quoted(wrong[0], 60)}.")
    if cuts is None or len(cuts) != len(several):
        counted = "no schedule" if cuts is None else f"a schedule of {len(cuts)}"
        raise PrismError(f"look names one per cut; found {len(several)} for {counted}.")
    return several


def per_cut(look: Look | Sequence[Look] | None, steps: Sequence[int], defaults: Sequence[Look]) -> tuple[Look, ...]:
    """The look of each cut at `steps`; a cut that was added behind those of the schedule looks as the last of them.

    defaults: the look by step, from `defaults`; empty: "now".
    """
    if look is None:
        return tuple(defaults[step - 1] if defaults else "now" for step in steps)
    if isinstance(look, str):
        return (look,) * len(steps)
    return (*look, *[look[-1]] * (len(steps) - len(look)))


def defaults(
    backbone: Backbone, judge: Any, weights: Mapping[str, float], steps: Steps, judge_at: float
) -> tuple[Look, ...]:
    """The look that a cut takes by default at each step of a call; empty where all look at the latents as they stand.

    A cut looks ahead where the accuracies beside the head tell it from chance at `judge_at`, and at the step's noise
    level either do not, each read at the measured level that is nearest, or are lower by `LOSS` or more, read between
    the measured levels. Heads without accuracies, steps whose level is not known beforehand and schedulers that do not
    tell what the denoiser predicts look at the latents as they stand.

    weights: by dimension, those that candidates are ranked by.
    """
    measured = _measured(getattr(judge, "evaluation", ()), weights)
    if not steps.levels or not measured or _is_chance(measured, judge_at):
        return ()
    enough = _accuracy(measured, judge_at) - LOSS
    try:
        prediction.check(backbone.pipe, backbone.family.counts_steps_by_calls)
    except PrismError:
        return ()
    low = [_is_chance(measured, t) or _accuracy(measured, t) <= enough for t in steps.levels]
    return tuple("ahead" if each else "now" for each in low) if any(low) else ()


def _measured(rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> dict[float, tuple[float, float]]:
    """By measured noise level, the best accuracy of the dimensions that rank candidates, and the best lower end of its
    95 % interval."""
    measured: dict[float, tuple[float, float]] = {}
    for row in rows:
        interval, accuracy = row.get("without_ties_ci95"), row.get("without_ties")
        if weights.get(row["dimension"], 0.0) and interval and interval[0] is not None and accuracy is not None:
            best, low = measured.get(float(row["t"]), (0.0, 0.0))
            measured[float(row["t"])] = max(best, accuracy), max(low, interval[0])
    return measured


def _is_chance(measured: Mapping[float, tuple[float, float]], t: float) -> bool:
    """True where the head is not told from chance at the measured level nearest to t; of two, at the noisier."""
    return measured[min(measured, key=lambda level: (abs(level - t), -level))][1] <= CHANCE


def _accuracy(measured: Mapping[float, tuple[float, float]], t: float) -> float:
    """The accuracy at t, between measured levels on the straight line, beyond them that of the last."""
    levels = sorted(measured)
    return float(np.interp(t, levels, [measured[level][0] for level in levels]))


def in_words(looks: Sequence[str]) -> str:
    """The looks of a run's cuts as a row of metrics.json says them: one if all are alike, else one per cut."""
    return looks[0] if len(set(looks)) == 1 else ",".join(looks)


def how(row: Row) -> str:
    """The cuts of a row of metrics.json, and where they look, in words."""
    cuts = [f"step {step} keeps {keep}" for step, keep in row["schedule"] or ()]
    each = row.get("look", "now").split(",")
    ahead = {"ahead": "looks ahead", "ahead-conditional": "looks ahead by the conditional pass"}
    if len(each) == len(cuts) > 1:
        cuts = [f"{cut} ({ahead[look]})" if look in ahead else cut for cut, look in zip(cuts, each)]
    elif each[0] in ahead:
        cuts.append(ahead[each[0]])
    level = "" if each == ["now"] else wording.judged_at(row)
    return ", ".join(part for part in (*cuts, level) if part) or wording.MISSING
