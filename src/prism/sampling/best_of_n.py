"""Best-of-N: N seeds in, the best out, for little more than the price of one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from prism.backbone import Backbone
from prism.backbone.conditioning import is_single
from prism.backbone.obstacles import check_whole
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling import schedule as schedules
from prism.sampling.ledger import Ledger, Meter, expected_rows
from prism.sampling.processes import Team, merged
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
PER_PROMPT = ("image", "last_image", "video", "negative_prompt")  # arguments of which there may be one a prompt


@dataclass
class Pick:
    """A candidate that won.

    video: what the stock pipeline gives for it, its output's first row, in the `output_type` of the call.
    latents: its final latents (1, ...), as the denoiser is given them: `Backbone.decode` gives the video again.
    seed, index: its own. output: all that the pipeline gave for it, such as a sound beside the video.
    """

    video: Any
    latents: Tensor
    seed: int
    index: int
    output: Any = None

    def __repr__(self) -> str:
        return f"Pick(seed {self.seed}, {_size(self.video)})"


@dataclass
class BestOfNResult:
    """The winners of a Best-of-N run and how they were found.

    top: the `top_k` best, best first; `video`, `latents`, `seed`, `index` and `output` are the first one's.
    seeds: all candidates'.
    scores: one entry a cut: {"step", "t", "candidates", "scores": {dimension: [...]}, "kept"}; candidates by index.
    ledger: what the run cost.
    candidate_latents: with keep_latents, the final latents of all candidates that were sampled to the end, by index.
    """

    top: tuple[Pick, ...]
    seeds: tuple[int, ...]
    scores: list[dict[str, Any]]
    ledger: Ledger
    candidate_latents: dict[int, Tensor] | None = None

    def __repr__(self) -> str:
        more = f" and {len(self.top) - 1} more" if len(self.top) > 1 else ""
        cost = f"{self.ledger.denoiser_rows:.4g} denoiser rows, {self.ledger.seconds:.3g} s"
        return f"BestOfNResult(seed {self.seed}{more} of {len(self.seeds)} candidates, {_size(self.video)}, {cost})"

    @property
    def video(self) -> Any:
        return self.top[0].video

    @property
    def latents(self) -> Tensor:
        return self.top[0].latents

    @property
    def seed(self) -> int:
        return self.top[0].seed

    @property
    def index(self) -> int:
        return self.top[0].index

    @property
    def output(self) -> Any:
        return self.top[0].output


@overload
def best_of_n(pipe: Any, judge: Any, prompt: str | None, n: int | None = None, **options: Any) -> BestOfNResult: ...


@overload
def best_of_n(
    pipe: Any, judge: Any, prompt: list[str] | tuple[str, ...], n: int | None = None, **options: Any
) -> list[BestOfNResult]: ...


@torch.no_grad()
def best_of_n(
    pipe: Any,
    judge: Any,
    prompt: str | list[str] | tuple[str, ...] | None,
    n: int | None = None,
    schedule: Sequence[Sequence[int]] | str | None = None,
    strategy: str = "early",
    draft_steps: int | None = None,
    judge_at: float | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    top_k: int = 1,
    select_by: str | Mapping[str, float] = "overall",
    num_draws: int = 2,
    oracle: Callable[[Any, str], float] | None = None,
    keep_latents: bool = False,
    distribute: Literal["candidates", "prompts"] | None = None,
    progress: bool = False,
    **call: Any,
) -> BestOfNResult | list[BestOfNResult]:
    """Sample n candidates of a prompt, keep the best by the judge, and finish that one alone.

    `pipe(prompt, generator=torch.Generator("cpu").manual_seed(result.seed), **call)` gives the same video: to the bit
    with `batch_size=1`, to float tolerance with larger batches. The pipeline is afterwards as it was.

    Args:
        pipe: a diffusers pipeline of a supported family.
        judge: a `Judge` on this pipeline, or the folder or Hub id of one; None will do for the strategies none, random
            and oracle.
        prompt: one text, or a list of them, one run and one result each; None where the pipeline takes none (Stable
            Video Diffusion).
        n: number of candidates, 8 unless `seeds` are given. Candidate i has seed `seed + i`, or `seeds[i]`.
        schedule: cuts [(step, keep), ...] of the strategy early, or their text "5:1"; see `prism.sampling.schedule`.
            None: `top_k` are kept after a fifth of the steps.
        strategy: none (the first seeds), random (seeds drawn from `seed` and the prompt), full (all to the end, judged
            on their final latents), early (judged and dropped on the way), draft (judged on a coarse run of
            `draft_steps` steps), oracle (all to the end and decoded, `oracle` picks).
        draft_steps: steps of a draft; None: 15 % of the steps, at least 2.
        judge_at: noise level in (0, 1000] at which full and draft re-noise the latents they judge; None: 700.
        batch_size: candidates a denoiser call; None: all of them up to half a billion parameters, else 1. Halved, with
            a warning, where memory runs out.
        top_k: how many of the best are finished and returned, from 1 to n.
        select_by: the judge's dimension to rank by, or weights over its dimensions. Where a judge has no "overall",
            that is the mean of its dimensions, which is warned of.
        num_draws: noise draws that full and draft average over.
        oracle: `oracle(video, prompt) -> float`; video (T, H, W, 3) float32 in [0, 1].
        keep_latents: also return the final latents of every candidate that was sampled to the end.
        distribute: under `torchrun` or `accelerate launch`, what the processes share out: the candidates of each
            prompt, or the prompts. Every process must make the same call, with its pipeline on its own device, and gets
            the same results, tensors in host memory. None: each process for itself.
        progress: show a progress bar on a terminal.
        **call: the pipeline's own arguments, unchanged; with several prompts `image`, `last_image`, `video` and
            `negative_prompt` may be lists with one a prompt. `callback_on_step_end` is called for the winners' runs.

    Raises:
        PrismError: for a call that cannot be carried out; for NaN in a candidate's latents or scores, naming its seed.
    """
    if isinstance(judge, str | os.PathLike):
        judge = Judge.from_pretrained(judge, pipe)
    backbone = _backbone(pipe, judge, strategy)
    if backbone.partial:
        raise PrismError("Of this backbone the first blocks alone were loaded, which cannot sample; load it whole.")
    for name in sorted(RESERVED.keys() & call.keys()):
        raise PrismError(f"The argument {name!r} is reserved: {RESERVED[name]}.")
    several = isinstance(prompt, list | tuple)
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts:
        raise PrismError("prompt is an empty list; give at least one text.")
    if strategy not in ("none", "random"):
        check_whole(backbone.denoisers)
    backbone.check_call([text or "" for text in prompts], call)
    if distribute not in (None, "candidates", "prompts"):
        raise PrismError(f'distribute shares out "candidates" or "prompts"; found {distribute!r}.')
    num_steps = _positive("num_inference_steps", backbone.num_inference_steps(call))
    candidate_seeds = _seeds(n, seed, seeds)
    if _positive("top_k", top_k) > len(candidate_seeds):
        raise PrismError(f"top_k is {top_k}, and there are {len(candidate_seeds)} candidates.")
    options: dict[str, Any] = {
        "backbone": backbone,
        "judge": judge,
        "seeds": candidate_seeds,
        "seed": seed,
        "batch_size": _batch_size(backbone, batch_size, len(candidate_seeds)),
        "weights": ranking(judge, select_by) if strategy in ("full", "early", "draft") else {},
        "top_k": top_k,
        "guided": backbone.guided(call),
        "num_draws": _positive("num_draws", num_draws),
        "oracle": oracle,
        "select_by": select_by,
    }
    if strategy == "early":
        cuts = schedules.parse(schedule) if isinstance(schedule, str) else schedule
        options["schedule"] = schedules.resolve(
            schedules.default(num_steps, top_k) if cuts is None else cuts, len(candidate_seeds), num_steps, top_k
        )
        if call.get("strength") is None:
            schedules.warn_blind(options["schedule"], num_steps)
    elif schedule is not None:
        raise PrismError(f'A schedule belongs to the strategy "early", and this run\'s is "{strategy}"; leave it out.')
    if strategy == "oracle" and oracle is None:
        raise PrismError('The strategy "oracle" needs `oracle`, a function of a video and its prompt.')
    if strategy == "draft":
        options["draft_steps"] = _draft_steps(draft_steps, num_steps, call)
    low, high = backbone.t_range
    options["judge_at"] = min(max(DEFAULT_JUDGE_AT, low), high) if judge_at is None else float(judge_at)
    if not 0 < options["judge_at"] <= 1000:
        raise PrismError(f"judge_at is a noise level in (0, 1000]; found {judge_at}.")
    total = expected_rows(
        strategy,
        len(candidate_seeds),
        num_steps,
        backbone.family.cfg,
        options["guided"],
        getattr(judge, "tap", 0) / backbone.num_blocks,
        options.get("schedule"),
        options.get("draft_steps", 0),
        num_draws,
        top_k,
        backbone.listens,
    )
    team = Team(distribute is not None)
    told = (strategy, prompts, candidate_seeds, *(options.get(name) for name in ("schedule", "draft_steps", "top_k")))
    team.same("run", told)

    def run(place: int, among: Team) -> BestOfNResult:
        text = prompts[place] or ""
        own = _of_prompt(call, place, len(prompts)) if several else call
        search = Search(prompt=text, call=own, team=among, **options)
        hidden = None if progress and team.rank == 0 else True
        with tqdm(total=total / among.size, disable=hidden, unit="row", desc=text[:30], leave=False) as bar:
            return _run(search, strategy, Meter(backbone, judge, bar.update), keep_latents)

    places = range(len(prompts))
    if distribute == "prompts":
        parts = team.agree(lambda: {place: run(place, Team()) for place in places[team.rank :: team.size]})
        results = list(merged(parts).values())
    else:
        results = [run(place, team) for place in places]
    return results if several else results[0]


def _run(search: Search, strategy: str, meter: Meter, keep_latents: bool) -> BestOfNResult:
    """One prompt's search, and its winners finished."""
    with search.backbone.held(), meter.open():
        winners = _within_memory(search, STRATEGIES[strategy])
        try:
            finished = search.finish(winners)
        except torch.cuda.OutOfMemoryError:
            raise PrismError(
                "Memory ran out while the winner was finished; let the VAE decode in tiles (pipe.vae.enable_tiling()), "
                "or offload the pipeline's models (enable_model_cpu_offload)."
            ) from None
    latents = merged(search.team.agree(lambda: search.latents)) if keep_latents else None
    return BestOfNResult(
        top=tuple(Pick(given[0][0], z, search.seeds[c], c, given) for c, (given, z) in finished.items()),
        seeds=search.seeds,
        scores=search.scores,
        ledger=meter.ledger.with_counts_of(search.team.agree(lambda: meter.ledger)),
        candidate_latents=latents,
    )


def _of_prompt(call: Mapping[str, Any], place: int, prompts: int) -> dict[str, Any]:
    """The call of one of several prompts: its own of what was given as one a prompt."""
    own = dict(call)
    for name in PER_PROMPT:
        if isinstance(call.get(name), list | tuple) and not is_single(name, call[name]):
            if len(call[name]) != prompts:
                raise PrismError(
                    f"{name} has {len(call[name])} entries for {prompts} prompts; give one, or one a prompt."
                )
            own[name] = call[name][place]
    return own


def _within_memory(search: Search, strategy: Callable[[Search], list[int]]) -> list[int]:
    """The winners; where memory runs out the search starts anew with half the candidates a batch, which is said."""
    while True:
        try:
            return strategy(search)
        except torch.cuda.OutOfMemoryError:
            if search.batch_size == 1:
                raise PrismError(
                    "Memory ran out with a single candidate a batch; make the video smaller, or offload the pipeline's "
                    "models (enable_model_cpu_offload)."
                ) from None
            smaller = search.batch_size // 2
            warnings.warn(
                f"Memory ran out with {search.batch_size} candidates a batch; going on with {smaller}.", stacklevel=5
            )
            search.start_anew(smaller)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _size(video: Any) -> str:
    """The size of a video or image of any output type, for a line of text."""
    frames = getattr(video, "shape", None)
    if frames is not None:
        return " x ".join(map(str, frames))
    return f"{len(video)} frames" if isinstance(video, list | tuple) else type(video).__name__


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


def ranking(judge: Any, select_by: str | Mapping[str, float]) -> dict[str, float]:
    """Weights of the judge's dimensions by which candidates are ranked.

    "overall" of a judge that has none is the mean of its dimensions, with a warning. Raises PrismError for a dimension
    that it has not, or no weight at all.
    """
    if select_by == "overall" and "overall" not in judge.dimensions:
        warnings.warn(
            f"The judge has no dimension overall; candidates are ranked by the mean of {', '.join(judge.dimensions)}.",
            stacklevel=3,
        )
        return dict.fromkeys(judge.dimensions, 1 / len(judge.dimensions))
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
