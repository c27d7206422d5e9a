"""When to cut and to how many: schedules of (step, keep), parsed, made and checked."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence

from prism.checks import quoted, whole
from prism.errors import PrismError

# (step, keep): after the conditional evaluation of the 1-based scheduler step, keep that many candidates.
Schedule = tuple[tuple[int, int], ...]


def parse(text: str) -> Schedule:
    """A schedule from text: "5:1" keeps one candidate at step 5, "3:4,6:1" four at step 3 and one at step 6."""
    try:
        return tuple((int(step), int(keep)) for step, keep in (part.split(":") for part in text.split(",")))
    except ValueError:
        raise PrismError(
            f'The schedule "{quoted(text, 80)}" is not a list of STEP:KEEP; write for example 5:1 or 3:4,6:1.'
        ) from None


def keep_one(step: int) -> Schedule:
    """Keep a single candidate at `step`."""
    return ((step, 1),)


def halving(n: int, first: int, every: int = 1) -> Schedule:
    """Halve the candidates at step `first` and then every `every` steps until one is left."""
    if n < 1 or first < 1 or every < 1:
        raise PrismError(f"halving takes positive n, first and every; found {n}, {first} and {every}.")
    cuts, step = [], first
    while n > 1:
        n = (n + 1) // 2
        cuts.append((step, n))
        step += every
    return tuple(cuts) or keep_one(first)


def default(num_steps: int, top_k: int = 1) -> Schedule:
    """Keep `top_k` candidates after a fifth of the steps (step 10 of 50 in the paper's Table 2)."""
    return ((max(1, round(0.2 * num_steps)), top_k),)


def is_blind(schedule: Schedule) -> bool:
    """Whether the first cut comes at step 1, where the latents are pure noise and a judge has nothing to see."""
    return schedule[0][0] == 1


def warn_blind(schedule: Schedule, n: int, num_steps: int) -> None:
    """Warn of a first cut that has nothing to see, and candidates to drop."""
    if is_blind(schedule) and schedule[0][1] < n:
        later = "Cut later (schedule), or take" if num_steps > 1 else "Take more steps, or"
        warnings.warn(
            f"The first cut comes at step 1 of {num_steps}, which sees pure noise: it drops candidates at "
            f"random. {later} the strategy full or draft.",
            stacklevel=3,
        )


def resolve(
    schedule: Sequence[Sequence[int]], n: int, num_steps: int, top_k: int = 1, last: int | None = None
) -> Schedule:
    """The schedule, checked against n candidates and a run of `num_steps`, and brought down to `top_k` candidates.

    A schedule whose last cut keeps more ends with a cut to `top_k` at the step `last`; None: the run's last one.
    Raises PrismError for one that is
    empty or out of order, cuts before the first or after the last step, or keeps fewer than `top_k` or more than there
    are.
    """
    cuts: list[tuple[int, int]] = []
    try:
        given = None if isinstance(schedule, Mapping | bytes) else list(schedule)
    except Exception:  # of whatever library
        given = None
    if given is None:
        raise PrismError(f"The schedule is a list of cuts such as [(5, 1)]; found {quoted(schedule, 80)}.")
    for cut in given:
        try:
            step, keep = (whole("a cut", value, None) for value in cut)
        except (PrismError, TypeError, ValueError):
            raise PrismError(
                f"A cut of the schedule is a pair of whole numbers (step, keep); found {quoted(cut, 80)}."
            ) from None
        cuts.append((step, keep))
    if not cuts:
        raise PrismError("The schedule is empty; give at least one cut, for example [(5, 1)].")
    alive, previous = n, 0
    for step, keep in cuts:
        if step < 1 or step > num_steps:
            has = "counts its steps from 1" if num_steps == sys.maxsize else f"has steps 1 to {num_steps}"
            raise PrismError(f"The schedule cuts at step {step}, and the run {has}.")
        if step <= previous:
            raise PrismError(f"The schedule cuts at step {step} after step {previous}; put the cuts in rising order.")
        if keep < 1:
            raise PrismError(f"The schedule keeps {keep} candidates at step {step}; keep at least 1.")
        if keep > alive:
            raise PrismError(f"The schedule keeps {keep} candidates at step {step}, and only {alive} are left by then.")
        if keep < top_k:
            raise PrismError(f"The schedule keeps {keep} candidates at step {step}, and top_k asks for {top_k}.")
        alive, previous = keep, step
    last = max(previous, num_steps if last is None else last)
    if alive > top_k and previous == last:
        cuts[-1] = (last, top_k)
    elif alive > top_k:
        cuts.append((last, top_k))
    return tuple(cuts)
