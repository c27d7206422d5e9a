"""Best-of-N: N seeds in, the best videos out, for little more than the cost of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prism.backbone import control
from prism.backbone.arguments import check_output_type, embedded_rows, normalised, of_prompt, texts
from prism.backbone.encodings import encoded_once
from prism.backbone.pipeline import check as check_protocol
from prism.errors import PrismError, flag, quoted, whole
from prism.sampling import arguments, plan_files
from prism.sampling.guidance import Guidance
from prism.sampling.guiding import guides_of
from prism.sampling.ledger import Ledger, Meter
from prism.sampling.looks import DEFAULT_JUDGE_AT, Look
from prism.sampling.plan import Candidate, Edit, Plan, parse
from prism.sampling.previews import Previews, Watch
from prism.sampling.recording import state_of
from prism.sampling.replay import check_noise, reproduction
from prism.sampling.rounds import Stop, Until
from prism.sampling.search import Search
from prism.sampling.strategies import kind_of, plan_of, warn_of_cost
from prism.team import Team, halved, merged, ran_out

T = TypeVar("T")


@dataclass
class Pick:
    """A candidate that won.

    video: the first row of the stock pipeline's output, in the `output_type` of the call; of a pipeline of sounds the
        waveform, (channels, samples) or (samples,).
    latents: its final latents (1, ...), in the denoiser's layout: `Backbone.decode` gives the video again.
    seed, index: the candidate's. output: the pipeline's whole output, which may hold sound too (LTX-2: `output.audio`).
    edits: the edits of its run: none, except where a strategy's candidates part on the way.
    """

    video: Any
    latents: Tensor
    seed: int
    index: int
    output: Any = None
    edits: tuple[Edit, ...] = ()

    def __repr__(self) -> str:
        return f"Pick(seed {self.seed}, {_size(self.video)})"


@dataclass
class BestOfNResult:
    """The winners of a Best-of-N run, with the scores that chose them and the cost.

    top: the `top_k` best, best first; `video`, `latents`, `seed`, `index` and `output` are the first one's.
    seeds: the seeds of all candidates.
    scores: one entry per cut: {"step", "t", "candidates", "scores": {dimension: [...]}, "kept", "dropped"}; candidates
        by index. "dropped" are those with NaN or infinity in their latents or scores. Where any cut looks ahead, each
        entry says its "look".
    ledger: the cost of the run.
    candidate_latents: with keep_latents, the final latents of all candidates that were sampled to the end, by index.
    previews: with previews, at each step of a cut that looks ahead the predicted video of each candidate there, kept or
        dropped: {step: {index: (T, H, W, 3) uint8}}.
    reproduce: the line of Python that gives the best video again. It is a plain call of the pipeline, or a call of this
        function if the pipeline gives its scheduler no generator for noise (few-step samplers). It is "" if that noise
        comes from torch's global generator, and for an edited winner of such a pipeline or of a call with a callback.
    stop: with until, how the run ended.
    """

    top: tuple[Pick, ...]
    seeds: tuple[int, ...]
    scores: list[dict[str, Any]]
    ledger: Ledger
    candidate_latents: dict[int, Tensor] | None = None
    reproduce: str = ""
    stop: Stop | None = None
    previews: dict[int, dict[int, np.ndarray]] | None = None

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


@torch.inference_mode(False)  # in case the caller is in inference mode, whose tensors keep no version counter
@torch.no_grad()
def best_of_n(
    pipe: Any,
    judge: Any,
    prompt: str | Sequence[str] | None,
    n: int | None = None,
    schedule: Sequence[Sequence[int]] | str | None = None,
    strategy: str = "early",
    plan: Plan | plan_files.Source | None = None,
    budget: float | None = None,
    until: float | None = None,
    max_n: int | None = None,
    look: Look | Sequence[Look] | None = None,
    draft_steps: int | None = None,
    draft_cache: str | Mapping[str, float | None] | None = None,
    judge_at: float | None = None,
    seed: int | None = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    top_k: int = 1,
    select_by: str | Mapping[str, float] = "overall",
    num_draws: int = 2,
    oracle: Callable[[Any, Any], Any] | None = None,
    keep_latents: bool = False,
    previews: bool | None = False,
    watch: Watch | None = None,
    guidance_by_judge: Guidance | float | None = None,
    distribute: Literal["candidates", "prompts"] | None = None,
    progress: bool = False,
    **call: Any,
) -> BestOfNResult | list[BestOfNResult]:
    """Sample n candidates of a prompt, keep the best by the judge, and finish that one alone.

    `pipe(prompt, generator=torch.Generator("cpu").manual_seed(result.seed), **call)` gives the same video: to the bit
    with `batch_size=1`, to float tolerance with larger batches. The pipeline is afterwards as it was.

    Args:
        pipe: a diffusers pipeline of a supported family.
        judge: a `Judge` on this pipeline, or the folder or Hub id of one. None is allowed
            for the strategies none, random and oracle.
        prompt: one text, or a list of them, one run and one result each. None where the pipeline takes none (Stable
            Video Diffusion), or where the call gives embeddings in its place (`prompt_embeds`, masks, pooled vectors):
            one row, or one per prompt for as many results.
        n: number of candidates, 8 unless `seeds` are given, at most 10,000. Candidate i has seed `seed + i`, or
            `seeds[i]`. If `seed` is None, one is drawn; see `result.seeds`.
        schedule: cuts [(step, keep), ...] of the strategy early, or their text "5:1"; see `prism.sampling.plan`.
            None: `top_k` are kept after a fifth of the steps.
        strategy: none (the first seeds), random (seeds drawn from `seed` and the prompt), full (all to the end, judged
            on their final latents), early (judged and dropped on the way), draft (judged on a coarse run of
            `draft_steps` steps), oracle (all to the end and decoded, `oracle` picks); and with candidates that part on
            the way zero-order, prune, beam, fk and evolution, see `prism.sampling.particles` and `noise_search`.
        plan: a strategy with its settings, such as `Early(schedule=((4, 1),), look="ahead")`, in place of `strategy`,
            `schedule`, `look`, `draft_steps`, `judge_at`, `num_draws` and `oracle`. Or a plan.json of `prism plan`, its
            folder or its content, whose number of candidates is taken too unless `n` or `seeds` are given.
        budget: costs of one plain sample that the run may have: of the plans in `plan` the one for this budget. Without
            `plan`, of those that the head carries, else the default cut of as many candidates as it pays for.
        until: go on in rounds of n candidates, whose seeds count on, until the best video so far is preferred to a
            random clip of the judge's reference with at least this probability, in (0, 1). Each round's winners are
            sampled to the end and judged at the reference's level next to `judge_at`; the best is decoded. See
            `result.stop`.
        max_n: the most candidates of a run with `until`, in whole rounds; None: 8 rounds.
        look: what early judges at a cut. "now": the noisy latents as they are. "ahead": the clean latents that the
            denoiser predicts there, re-noised to `judge_at`, where a judge sees more. "ahead-conditional": the same by
            the conditional pass alone, which saves the losers' unconditional one. Or a list with one per cut. None:
            ahead at cuts where the accuracies saved with the head do not tell it from chance, now at the others.
        draft_steps: steps of a draft; None: 15 % of the steps, at least 2, or with a draft_cache all of them.
        draft_cache: what drafts leave out of their steps: a step cache of diffusers with its number, and a share of
            guidance, as in "first-block:0.06,guidance:0.5" or {"taylorseer": 4}; see `prism.sampling.step_cache`.
            Without a number, that of the family. The judge and the winner run without it.
        judge_at: noise level in (0, 1000] to which clean latents are re-noised to be judged, by full, draft and looks
            ahead; None: 700.
        batch_size: candidates per denoiser call; None: all of them up to half a billion parameters, else 1. Halved,
            with a warning, where memory runs out.
        top_k: the number of best candidates that are finished and returned, from 1 to n.
        select_by: the judge's dimension to rank by, or weights over its dimensions. Where a judge has no "overall",
            that is the mean of its dimensions, which is warned of.
        num_draws: noise draws that full, draft and looks ahead average over.
        oracle: `oracle(video, prompt)` gives a number, or numbers by dimension, which `select_by` then weighs;
            video (T, H, W, 3) float32 in [0, 1], or a sound's waveform. With `oracle.batched = True` it is given
            `batch_size` videos (B, T, H, W, 3) and a list of B prompts at once, and gives B numbers.
        keep_latents: also return the final latents of every candidate that was sampled to the end.
        previews: at each cut that looks ahead, decode the video that the denoiser predicts of every candidate; see
            `result.previews`. Each is a VAE decode more. None: where there is such a cut; True demands one.
        watch: is told of each denoiser call and each cut of this process while the run goes on; what it raises ends it.
        guidance_by_judge: after each step push all candidates' latents along the gradient of the judge's score: a
            strength in steps of the sampler, such as 0.1, or a `Guidance`. Of none, random, early, full and oracle.
        distribute: under `torchrun` or `accelerate launch`, the work that processes divide: the candidates of each
            prompt, or the prompts. Every process must make the same call, with its pipeline on its own device, and gets
            the same results, tensors in host memory. None: each process for itself.
        progress: show a progress bar on a terminal.
        **call: the pipeline's own arguments, unchanged; with several prompts `image`, `last_image`, `video` and
            `negative_prompt` may be lists with one per prompt, and embeddings have a row each. Pictures may be PIL
            images of any mode, bytes, or paths of local files. `callback_on_step_end` is called for the winners' runs.

    Raises:
        PrismError: for a call that cannot be carried out, before any work where that can be known. A candidate with NaN
            in its latents or scores is dropped with a warning; fewer than `top_k` others are an error.
    """
    settings: dict[str, Any] = {"schedule": schedule, "look": look, "draft_steps": draft_steps, "judge_at": judge_at}
    settings |= {"num_draws": num_draws, "draft_cache": draft_cache, "oracle": oracle}
    filed = plan_files.opened(plan, budget)
    chosen: Any = plan if filed is None else filed.run.plan
    if chosen is not None or budget is not None:
        decides = "budget" if chosen is None else "plan"
        arguments.check_plan(chosen, settings | {"strategy": strategy}, best_of_n, decides)
    if chosen is not None:
        strategy, oracle = chosen.strategy, getattr(chosen, "oracle", None)
    kind = kind_of(strategy) if chosen is None else type(chosen)
    backbone, judge = arguments.backbone_of(pipe, judge, kind, oracle)
    if backbone.partial:
        raise PrismError("Of this backbone the first blocks alone were loaded, which cannot sample; load it whole.")
    call = normalised(call)
    for name in sorted(arguments.RESERVED.keys() & call.keys()):
        raise PrismError(f"The argument {name!r} is reserved: {arguments.RESERVED[name]}.")
    prompts = texts(prompt)
    several = not isinstance(prompt, str | None)
    if prompt is None and embedded_rows(call) > 1:
        several, prompts = True, [None] * embedded_rows(call)
    if (size := len(prompts)) == 0:
        raise PrismError("prompt is an empty list; give at least one text.")
    check_protocol(backbone.pipe, backbone.family)  # parts may have been replaced since the judge was put onto it
    check_output_type(backbone.pipe, call.get("output_type"))
    backbone.check_call([text or "" for text in prompts], call)
    if kind.looks_at is not None or until is not None:
        control.check_networks(backbone)
        check_noise(backbone.pipe, backbone.family.counts_steps_by_calls or backbone.family.outputs > 1)
    calls = [of_prompt(call, row, size, control.shared(backbone)) if several else call for row in range(size)]
    if distribute is not None and (not isinstance(distribute, str) or distribute not in ("candidates", "prompts")):
        raise PrismError(f'distribute shares out "candidates" or "prompts"; found {quoted(distribute, 60)}.')
    keep_latents, progress = flag("keep_latents", keep_latents), flag("progress", progress)
    previews = previews if previews is None else flag("previews", previews)
    arguments.check_weights(select_by)
    num_steps = whole("num_inference_steps", backbone.num_inference_steps(call))
    if budget is not None and filed is None:
        filed = plan_files.within(budget, backbone, judge, call)
        chosen, kind, strategy = filed.run.plan, type(filed.run.plan), filed.run.plan.strategy
    if filed is not None:
        plan_files.check_fits(filed, backbone, judge, call)
        n = filed.run.n if n is None and seeds is None else n
    team = Team() if distribute is None else Team.gathered()
    seed = arguments.seed_of(team.agree(arguments.draw_seed)[0] if seed is None else seed)
    candidate_seeds = arguments.seeds_of(n, seed, seeds)
    top_k = arguments.top_k_of(top_k, len(candidate_seeds))
    rule = Until.of(until, max_n, judge, select_by, candidate_seeds, seeds)
    options: dict[str, Any] = {
        "backbone": backbone,
        "judge": judge,
        "candidates": tuple(Candidate(index, each) for index, each in enumerate(candidate_seeds)),
        "seed": seed,
        "batch_size": arguments.batch_size_of(backbone, batch_size, len(candidate_seeds), call),
        "weights": arguments.ranking(judge, select_by) if kind.needs_judge() else {},
        "top_k": top_k,
        "watch": watch,
    }
    if chosen is None:
        cuts = parse(schedule) if isinstance(schedule, str) else schedule
        chosen = plan_of(strategy, **settings | {"schedule": cuts, "select_by": select_by, "until": until})
    settled = arguments.resolved(chosen, DEFAULT_JUDGE_AT, backbone.t_range)
    settled = settled.checked(len(candidate_seeds), top_k, num_steps, call).fitted(backbone)
    guides = guides_of(guidance_by_judge, settled, judge, prompts, calls, options["weights"])
    shared: dict[str, Any] = {"strategy": strategy, "prompt": prompts, "seeds": candidate_seeds}
    shared |= {field.name: getattr(settled, field.name) for field in fields(settled) if field.name != "oracle"}
    if rule is not None:
        level = getattr(settled, "judge_at", None) or arguments.judge_at_of(
            judge_at, DEFAULT_JUDGE_AT, backbone.t_range
        )
        rule = replace(rule, judge_at=level, keep_latents=keep_latents)
    shared |= {"until": until, "max_n": max_n, "top_k": top_k, "weights": options["weights"], "previews": previews}
    shared["guidance_by_judge"] = repr(guidance_by_judge)
    team.same(shared | call)

    def run(number: int, among: Team) -> BestOfNResult:
        text = prompts[number] or ""
        shown = Previews.of(previews, backbone)
        search = Search(prompt=text, call=calls[number], team=among, previews=shown, guide=guides[number], **options)
        hidden = None if progress and team.rank == 0 else True
        with tqdm(disable=hidden, unit="row", desc=text[:30], leave=False) as bar:

            def find(search: Search) -> list[Candidate]:
                ready = search.settle(settled)
                if search.team.rank == 0:
                    warn_of_cost(ready, search.load)
                if search.previews is not None and not search.previews.check(ready, search.load):
                    search.previews = None
                bar.reset(total=(ready.rows(search.load) + ready.guidance_rows(search.load)) / among.size)
                return ready.winners(search)

            def count(rows: float) -> None:
                bar.update(rows)
                if watch is not None:
                    watch.rows(meter.ledger.denoiser_rows, bar.total or 0.0)

            meter = Meter(backbone, judge, count)
            return _run(search, find, meter, keep_latents, rule)

    numbers = range(len(prompts))
    if distribute == "prompts":
        parts = team.agree(lambda: {number: run(number, Team()) for number in numbers[team.rank :: team.size]})
        results = list(merged(parts).values())
    else:
        results = [run(number, team) for number in numbers]
    return results if several else results[0]


def _run(
    search: Search,
    find: Callable[[Search], list[Candidate]],
    meter: Meter,
    keep_latents: bool,
    rule: Until | None = None,
) -> BestOfNResult:
    """The result of one prompt's search, whose winners are finished."""
    with search.backbone.held(), meter.open(), encoded_once(search.backbone):
        if search.guide is not None:
            search.guide.counted = meter.backward
        if search.call.get("callback_on_step_end") is not None:
            search.state = state_of(search.backbone.denoisers)
        stop = None
        if rule is None:
            winners = _within_memory(search, find)
        else:
            winners, stop = rule.draw(search, find, _within_memory)
        try:
            finished = search.finish(winners)
        except Exception as error:
            if not ran_out(error):
                raise
            raise PrismError(
                "Memory ran out while the winner was finished; let the VAE decode in tiles (pipe.vae.enable_tiling()), "
                "or offload the pipeline's models (enable_model_cpu_offload)."
            ) from None
    latents = None
    if keep_latents:
        sampled = merged(search.team.agree(lambda: search.latents))
        latents = {candidate.index: value for candidate, value in sampled.items() if not candidate.edits}
    noise = set().union(*search.team.agree(lambda: search.noise))
    videos = search.backbone.family.videos
    return BestOfNResult(
        top=tuple(Pick(videos(output)[0], z, c.seed, c.index, output, c.edits) for c, (output, z) in finished.items()),
        seeds=tuple(candidate.seed for candidate in search.candidates),
        scores=[_with_indices(cut) for cut in search.scores],
        ledger=meter.ledger.with_counts_of(search.team.agree(lambda: meter.ledger)),
        candidate_latents=latents,
        reproduce=reproduction(
            search.backbone.family.takes_prompts,
            next(iter(finished)),
            noise,
            search.call.get("callback_on_step_end") is not None,
            None if search.guide is None else search.guide.line(),
        ),
        stop=stop,
        previews=None if search.previews is None else search.previews.gathered(search.team),
    )


def _with_indices(cut: Mapping[str, Any]) -> dict[str, Any]:
    """A cut of a search with candidates by index; a branched candidate has the index of the one it began as."""
    return {**cut, **{name: [c.index for c in cut[name]] for name in ("candidates", "kept", "dropped")}}


def _within_memory(search: Search, strategy: Callable[[Search], T]) -> T:
    """The strategy's winners. Where memory runs out, the search starts anew with half the batch and a warning."""
    while True:
        try:
            return strategy(search)
        except Exception as error:
            if not ran_out(error):
                raise
        # Not in the except block, where the exception would keep the failed attempt's tensors alive.
        search.start_anew(halved(search.batch_size, "sampling", "candidate"))


def _size(video: Any) -> str:
    """The size of a video or image of any output type, for a line of text."""
    frames = getattr(video, "shape", None)
    if frames is not None:
        return " x ".join(map(str, frames))
    return f"{len(video)} frames" if isinstance(video, list | tuple) else type(video).__name__
