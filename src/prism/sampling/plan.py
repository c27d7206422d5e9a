"""The plan of a run: which candidates are cut at which step, and what that costs in closed form."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prism.errors import PrismError, quoted, whole

if TYPE_CHECKING:
    from prism.sampling.search import Search


from typing import Literal

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


def settle(search: Search, strategy: str, cuts: Sequence[Sequence[int]] | None) -> float:
    """Set what the search has to know of its steps, and give the denoiser rows that it is going to cost.

    The call is run up to its first denoiser call for that, which encodes the prompt that all candidates share; an equal
    call before it spares even this. The strategies none and random go by `num_inference_steps`.

    Args:
        cuts: of the strategy early; None: the default cut, moved to a step that the head's denoiser runs.

    Raises:
        PrismError: for cuts behind the last step, or at steps of another denoiser than the head's; for a scheduler
            whose noise levels cannot be told.
    """
    backbone, n = search.backbone, len(search.seeds)
    if strategy == "early":
        backbone.family.check_scheduler(backbone.pipe.scheduler)
    if strategy not in ("none", "random"):
        first = list(range(n))[: search.batch_size]
        ask = lambda **changes: backbone.steps(search.batch_call(first, output_type="latent", **changes))  # noqa: E731
        search.steps = search.team.agree(ask)[search.team.rank]
        if strategy == "draft":
            drafts = search.team.agree(lambda: ask(num_inference_steps=search.draft_steps))
            search.drafted = drafts[search.team.rank]
    steps, drafted = search.steps, search.drafted
    if strategy == "early":
        assert steps is not None
        if cuts is None:
            ((step, keep),) = default(len(steps), search.top_k)
            cuts = ((steps.nearest_readable(step), keep),)
        search.schedule = resolve(cuts, n, len(steps), search.top_k, steps.last_readable)
        steps.check_cuts([step for step, _ in search.schedule], backbone.reads)
        if search.call.get("strength") is None:
            warn_blind(search.schedule, n, len(steps))
    return expected_rows(
        strategy,
        n,
        backbone.num_inference_steps(search.call) if steps is None else len(steps),
        backbone.family.cfg,
        backbone.guided(search.call),
        getattr(search.judge, "tap", 0) / backbone.num_blocks,
        search.schedule,
        0 if drafted is None else len(drafted),
        search.num_draws,
        search.top_k,
        backbone.listens,
        None if steps is None else steps.calls,
        None if drafted is None else drafted.calls,
    )


CFG = Literal["two_calls", "one_batch"]


# -- closed forms


def cut_rows(
    alive: int, keep: int, cfg: CFG, guided: bool | int, tap_share: float, listens: bool = True
) -> tuple[float, bool]:
    """Rows that the step of a cut from `alive` to `keep` costs, and whether its scores are read by a probe.

    `guided` says whether an unconditional pass runs beside the conditional one, or how many passes there are in all.

    Listening to the conditional pass costs that pass for all; a second, unconditional call then runs survivors only. A
    probe runs the conditional rows as far as the tap, `tap_share` = k/L of a row each, and then the survivors in full.
    The cheaper of the two is taken, or the probe where the denoiser is compiled as a whole (`listens` is false).
    """
    calls = 1 + guided if isinstance(guided, bool) else guided
    listening = alive + (calls - 1) * keep if cfg == "two_calls" else calls * alive
    probing = alive * tap_share + calls * keep
    return (probing, True) if probing < listening or not listens else (float(listening), False)


def early_rows(
    n: int, calls: Sequence[int], schedule: Schedule, cfg: CFG, tap_share: float, listens: bool = True
) -> float:
    """Denoiser rows of an early run with a resolved schedule, the winners finished from their recordings.

    calls: denoiser passes per step.
    """
    rows, alive, done = 0.0, n, 0
    for step, keep in schedule:
        rows += alive * sum(calls[done : step - 1]) + cut_rows(alive, keep, cfg, calls[step - 1], tap_share, listens)[0]
        alive, done = keep, step
    return rows + alive * sum(calls[done:])


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
    """Denoiser rows of a run of any strategy of `best_of_n`, in closed form; of early `schedule` says the rest.

    `num_steps` and `draft_steps` are those that the scheduler makes. `calls`, `draft_calls`: denoiser passes per step
    of the run and of a draft, where a guider guides some of the steps; None: two per step where guided, else one.
    `listens`: see `cut_rows`.
    """
    calls = [1 + guided] * num_steps if calls is None else calls
    drafted = sum([1 + guided] * draft_steps if draft_calls is None else draft_calls)
    if strategy in ("none", "random"):
        return float(sum(calls) * top_k)
    if strategy == "oracle":
        return float(n * sum(calls))
    if strategy == "full":
        return n * sum(calls) + n * num_draws * tap_share
    if strategy == "draft":
        return n * drafted + n * num_draws * tap_share + sum(calls) * top_k
    return early_rows(n, calls, schedule or (), cfg, tap_share, listens)
