"""Best-of-N: N seeds in, one video out, for little more than the price of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prism.backbone import Backbone
from prism.backbone.interceptor import state_kept
from prism.backbone.obstacles import check_whole
from prism.errors import PrismError
from prism.sampling import schedule as schedules
from prism.sampling.ledger import Ledger, Meter, expected_rows
from prism.sampling.strategies import STRATEGIES, Search

RESERVED = {
    "generator": "candidates draw from CPU generators seeded with seed + i; give seed or seeds",
    "latents": "every candidate starts from the noise of its own seed; give seed or seeds",
    "num_videos_per_prompt": "the number of candidates is n",
    "num_images_per_prompt": "the number of candidates is n",
    "prompt_embeds": "give the prompt as text",
}
DEFAULT_N = 8
DEFAULT_JUDGE_AT = 700.0  # where a head reads finished latents best, in the paper's Table 1 and here
SMALL_DENOISER = 500_000_000  # parameters up to which all candidates go in one batch


@dataclass
class BestOfNResult:
    """The winner of a Best-of-N run and how it was found.

    video: what the stock pipeline gives for the winner, its output's first row, in the `output_type` of the call.
    latents: the winner's final latents (1, ...), in the layout of the sampling loop.
    seed, index: the winner's. seeds: all candidates'.
    scores: one entry a cut: {"step", "t", "candidates", "scores": {dimension: [...]}, "kept"}; candidates by index.
    ledger: what the run cost.
    candidate_latents: with keep_latents, the final latents of all candidates that were sampled to the end, by index.
    """

    video: Any
    latents: Tensor
    seed: int
    index: int
    seeds: tuple[int, ...]
    scores: list[dict[str, Any]]
    ledger: Ledger
    candidate_latents: dict[int, Tensor] | None = None


@torch.no_grad()
def best_of_n(
    pipe: Any,
    judge: Any,
    prompt: str | None,
    n: int | None = None,
    schedule: Sequence[Sequence[int]] | str | None = None,
    strategy: str = "early",
    draft_steps: int | None = None,
    judge_at: float | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    select_by: str | Mapping[str, float] = "overall",
    num_draws: int = 2,
    oracle: Callable[[Any, str], float] | None = None,
    keep_latents: bool = False,
    progress: bool = False,
    **call: Any,
) -> BestOfNResult:
    """Sample n candidates of a prompt, keep the best by the judge, and finish that one alone.

    `pipe(prompt, generator=torch.Generator("cpu").manual_seed(result.seed), **call)` gives the same video: to the bit
    with `batch_size=1`, to float tolerance with larger batches. The pipeline is afterwards as it was.

    Args:
        pipe: a diffusers pipeline of a supported family.
        judge: a `Judge` on this pipeline; None will do for the strategies none, random and oracle.
        prompt: one text; None where the pipeline takes none (Stable Video Diffusion).
        n: number of candidates, 8 unless `seeds` are given. Candidate i has seed `seed + i`, or `seeds[i]`.
        schedule: cuts [(step, keep), ...] of the strategy early, or their text "5:1"; see `prism.sampling.schedule`.
            None: one is kept after a fifth of the steps.
        strategy: none (the first seed), random (a seed drawn from `seed` and the prompt), full (all to the end, judged
            on their final latents), early (judged and dropped on the way), draft (judged on a coarse run of
            `draft_steps` steps), oracle (all to the end and decoded, `oracle` picks).
        draft_steps: steps of a draft; None: 15 % of the steps, at least 2.
        judge_at: noise level in (0, 1000] at which full and draft re-noise the latents they judge; None: 700.
        batch_size: candidates a denoiser call; None: all of them up to half a billion parameters, else 1. Halved, with
            a warning, where memory runs out.
        select_by: the judge's dimension to rank by, or weights over its dimensions.
        num_draws: noise draws that full and draft average over.
        oracle: `oracle(video, prompt) -> float`; video (T, H, W, 3) float32 in [0, 1].
        keep_latents: also return the final latents of every candidate that was sampled to the end.
        progress: show a progress bar on a terminal.
        **call: the pipeline's own arguments, unchanged. `callback_on_step_end` is called for the winner's run.

    Raises:
        PrismError: for a call that cannot be carried out; for NaN in a candidate's latents or scores, naming its seed.
    """
    backbone = _backbone(pipe, judge, strategy)
    if backbone.partial:
        raise PrismError("Of this backbone the first blocks alone were loaded, which cannot sample; load it whole.")
    for name in sorted(RESERVED.keys() & call.keys()):
        raise PrismError(f"The argument {name!r} is reserved: {RESERVED[name]}.")
    if strategy not in ("none", "random"):
        check_whole(backbone.denoisers)
    backbone.check_call([prompt or ""], call)
    num_steps = _positive("num_inference_steps", backbone.num_inference_steps(call))
    candidate_seeds = _seeds(n, seed, seeds)
    prompt = prompt or ""
    search = Search(
        backbone=backbone,
        judge=judge,
        prompt=prompt,
        call=call,
        seeds=candidate_seeds,
        seed=seed,
        batch_size=_batch_size(backbone, batch_size, len(candidate_seeds)),
        weights=_weights(judge, select_by) if strategy in ("full", "early", "draft") else {},
        guided=backbone.guided(call),
        num_draws=_positive("num_draws", num_draws),
        oracle=oracle,
    )
    if strategy == "early":
        cuts = schedules.parse(schedule) if isinstance(schedule, str) else schedule
        search.schedule = schedules.resolve(
            schedules.default(num_steps) if cuts is None else cuts, len(candidate_seeds), num_steps
        )
    elif schedule is not None:
        raise PrismError(f'A schedule belongs to the strategy "early", and this run\'s is "{strategy}"; leave it out.')
    if strategy == "oracle" and oracle is None:
        raise PrismError('The strategy "oracle" needs `oracle`, a function of a video and its prompt.')
    if strategy == "draft":
        search.draft_steps = _draft_steps(draft_steps, num_steps, call)
    low, high = backbone.t_range
    search.judge_at = min(max(DEFAULT_JUDGE_AT, low), high) if judge_at is None else float(judge_at)
    if not 0 < search.judge_at <= 1000:
        raise PrismError(f"judge_at is a noise level in (0, 1000]; found {judge_at}.")
    total = expected_rows(
        strategy,
        len(candidate_seeds),
        num_steps,
        backbone.family.cfg,
        search.guided,
        getattr(judge, "tap", 0) / backbone.num_blocks,
        search.schedule,
        search.draft_steps,
        num_draws,
        backbone.listens,
    )
    with tqdm(total=total, disable=None if progress else True, unit="row", desc=prompt[:30], leave=False) as bar:
        meter = Meter(backbone, judge, bar.update)
        with state_kept(pipe), meter.open():
            winner = _within_memory(search, STRATEGIES[strategy])
            output = search.finish(winner)
    return BestOfNResult(
        video=output[0][0],
        latents=search.latents[winner][None],
        seed=candidate_seeds[winner],
        index=winner,
        seeds=candidate_seeds,
        scores=search.scores,
        ledger=meter.ledger,
        candidate_latents=dict(sorted(search.latents.items())) if keep_latents else None,
    )


def _within_memory(search: Search, strategy: Callable[[Search], int]) -> int:
    """The winner; where memory runs out the search starts anew with half the candidates a batch, which is said."""
    while True:
        try:
            return strategy(search)
        except torch.OutOfMemoryError:
            if search.batch_size == 1:
                raise PrismError(
                    "Memory ran out with a single candidate a batch; make the video smaller, or offload the pipeline's "
                    "models (enable_model_cpu_offload)."
                ) from None
            smaller = search.batch_size // 2
            warnings.warn(
                f"Memory ran out with {search.batch_size} candidates a batch; going on with {smaller}.", stacklevel=4
            )
            search.start_anew(smaller)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _backbone(pipe: Any, judge: Any, strategy: str) -> Backbone:
    if strategy not in STRATEGIES:
        raise PrismError(f'There is no strategy "{strategy}"; choose one of {", ".join(STRATEGIES)}.')
    if judge is None:
        if strategy in ("full", "early", "draft"):
            raise PrismError(f'The strategy "{strategy}" needs a judge; load one with Judge.from_pretrained.')
        return Backbone(pipe)
    if judge.backbone.pipe is not pipe:
        raise PrismError(
            "The judge was put onto another pipeline; use Judge.from_pretrained(head, pipe) with this one."
        )
    if strategy == "early" and not hasattr(judge, "score_tokens"):
        raise PrismError(
            'The strategy "early" reads hidden states on the way, and this judge reads none; use full or draft.'
        )
    return judge.backbone


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PrismError(f"{name} must be a whole number of at least 1; found {value!r}.")
    return value


def _seeds(n: int | None, seed: int, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The candidates' seeds, from `seed` counting up or as given."""
    if seeds is None:
        count = DEFAULT_N if n is None else _positive("n", n)
        found = [seed + index if isinstance(seed, int) else seed for index in range(count)]
    else:
        found = list(seeds)
        if not found or (n is not None and n != len(found)):
            raise PrismError(f"seeds must hold one seed a candidate; found {len(found)} for n = {n}.")
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise PrismError(f"A seed must be a whole number from 0 to 2**63 - 1; found {value!r}.")
    return tuple(found)


def _batch_size(backbone: Backbone, batch_size: int | None, n: int) -> int:
    if backbone.family.alone:
        return 1
    if batch_size is not None:
        return min(n, _positive("batch_size", batch_size))
    return n if backbone.num_parameters <= SMALL_DENOISER else 1


def _weights(judge: Any, select_by: str | Mapping[str, float]) -> dict[str, float]:
    weights = {select_by: 1.0} if isinstance(select_by, str) else dict(select_by)
    for name in weights:
        if name not in judge.dimensions:
            raise PrismError(f"The judge has no dimension {name!r} to select by; it has {', '.join(judge.dimensions)}.")
    if not weights or not any(weights.values()):
        raise PrismError("select_by gives no dimension a weight; name one, for example overall.")
    return weights


def default_draft_steps(num_steps: int) -> int:
    """Steps of a draft where none are given: 15 % of the run's, at least 2 where it has as many."""
    return min(num_steps, max(2, round(0.15 * num_steps)))


def _draft_steps(draft_steps: int | None, num_steps: int, call: Mapping[str, Any]) -> int:
    for name in ("timesteps", "sigmas"):
        if call.get(name) is not None:
            raise PrismError(f"A draft chooses its own steps and cannot follow {name!r}; leave it out.")
    steps = default_draft_steps(num_steps) if draft_steps is None else _positive("draft_steps", draft_steps)
    if steps > num_steps:
        raise PrismError(f"A draft of {steps} steps is longer than the run of {num_steps}; make draft_steps smaller.")
    if steps == num_steps:
        warnings.warn(
            f'A draft of {steps} steps is as long as the run and saves nothing; take the strategy "full" or "early".',
            stacklevel=3,
        )
    return steps
