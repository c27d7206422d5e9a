"""A run's steps, cuts and cost, settled before anything is sampled: the scheduler is asked which steps there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism.sampling import schedule as schedules
from prism.sampling.ledger import expected_rows

if TYPE_CHECKING:
    from prism.sampling.strategies import Search


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
            ((step, keep),) = schedules.default(len(steps), search.top_k)
            cuts = ((steps.nearest_readable(step), keep),)
        search.schedule = schedules.resolve(cuts, n, len(steps), search.top_k, steps.last_readable)
        steps.check_cuts([step for step, _ in search.schedule], backbone.reads)
        if search.call.get("strength") is None:
            schedules.warn_blind(search.schedule, n, len(steps))
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
