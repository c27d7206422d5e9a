"""Strategies: none, random, full, early, draft, oracle; each a function from a search to its winners."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Tokens
from prism.errors import PrismError
from prism.sampling import ranking
from prism.sampling.plan import cut_rows
from prism.sampling.replay import Interceptor, OnCut
from prism.sampling.search import Search, _generator
from prism.team import merged
from prism.video import frames


def none(search: Search) -> list[int]:
    """The first seeds."""
    search.reserve = list(range(search.top_k, len(search.seeds)))
    return list(range(search.top_k))


def pick_random(search: Search) -> list[int]:
    """Seeds drawn at random, from the run's seed and the prompt."""
    draws = random.Random(f"{search.seed} {search.prompt}")
    picked = draws.sample(range(len(search.seeds)), search.top_k)
    search.reserve = [candidate for candidate in range(len(search.seeds)) if candidate not in picked]
    return picked


def full(search: Search) -> list[int]:
    """Every candidate to the end, judged re-noised; winners are decoded alone, from their recordings."""

    def sample() -> dict[int, Tensor]:
        for _ in search.sample_all(output_type="latent"):
            pass
        return dict(search.latents)

    return _judge_clean(search, sample, step=len(search.steps or ()))


def draft(search: Search) -> list[int]:
    """Every candidate to the end in a few coarse steps, judged re-noised; then the winners in full."""

    def sample() -> dict[int, Tensor]:
        for _ in search.sample_all(record=False, output_type="latent", num_inference_steps=search.draft_steps):
            pass
        drafts, search.latents = search.latents, {}
        return drafts

    return _judge_clean(search, sample, step=len(search.drafted or ()))


def oracle(search: Search) -> list[int]:
    """Every candidate to the end and decoded; `oracle(video, prompt)` says how good each is."""
    assert search.oracle is not None
    ask = search.oracle

    def look() -> dict[int, dict[str, float]]:
        answers: dict[int, dict[str, float]] = {}
        for videos in search.sample_all(output_type="np"):
            shown: dict[int, Any] = {}
            for candidate, video in videos.items():
                try:
                    shown[candidate] = frames(video, "its video")
                except PrismError as error:  # a VAE that overflows
                    search.warn_dropped(candidate, str(error).rstrip("."))
            for candidate, answer in zip(shown, ranking.ask(ask, list(shown.values()), search.prompt)):
                if all(math.isfinite(value) for value in answer.values()):
                    answers[candidate] = answer
                else:
                    search.warn_dropped(candidate, "the oracle's score of it is NaN or infinite")
        return answers

    answers = merged(search.team.agree(look))
    names, weights = ranking.columns(list(answers.values()), search.select_by)
    scores = {candidate: [answer[name] for name in names] for candidate, answer in answers.items()}
    step = len(search.steps or ())
    return search.rank(step, 0.0, scores, search.top_k, range(len(search.seeds)), names, weights)


def early(search: Search) -> list[int]:
    """Candidates are judged on the way and dropped by the schedule; those left are recorded up to the last cut.

    While the living candidates do not fit one batch, they go chunk by chunk to the next cut, and later rounds replay
    what was recorded. Once they do, one call carries all the cuts that are left, dead rows gated out. Processes that
    share a run meet after each cut, so they go round by round.
    """
    alive, probed = list(range(len(search.seeds))), {}
    left, backbone = len(alive), search.backbone
    for step, keep in search.schedule:
        calls, share = search.steps.calls[step - 1] if search.steps else 1, search.judge.tap / backbone.num_blocks
        probed[step] = cut_rows(left, keep, backbone.family.cfg, calls, share, backbone.listens)[1]
        left = keep
    cuts = list(search.schedule)
    while cuts:
        if search.team.alone and len(alive) <= search.batch_size:
            return _gate(search, sorted(alive), cuts, probed)
        alive = _round(search, alive, *cuts.pop(0), probed)
    return alive


def _gate(
    search: Search, candidates: list[int], cuts: Sequence[tuple[int, int]], probed: Mapping[int, bool]
) -> list[int]:
    """All the cuts in one call of all the candidates, which ends at the last of them."""
    keeps, last, kept = dict(cuts), cuts[-1][0], candidates

    def on_cut(step: int, t: float, living: list[int], tokens: Tokens, finite: Tensor) -> list[int] | None:
        nonlocal kept
        kept = search.rank(step, t, search.score(t, living, tokens, finite), keeps[step], living)
        return None if step == last else kept

    _until_cut(search, candidates, {step: probed[step] for step in keeps}, on_cut)
    return kept


def _round(search: Search, candidates: Sequence[int], step: int, keep: int, probed: Mapping[int, bool]) -> list[int]:
    """Each chunk in a call of its own that ends at the cut; the survivors over all chunks."""
    scores: dict[int, Sequence[float]] = {}
    levels: list[float] = []

    def on_cut(_step: int, t: float, living: list[int], tokens: Tokens, finite: Tensor) -> None:
        scores.update(search.score(t, living, tokens, finite))
        levels.append(t)

    def sample() -> tuple[dict[int, Sequence[float]], list[float]]:
        for chunk in search.chunks(candidates):
            _until_cut(search, chunk, {step: probed[step]}, on_cut)
        return scores, levels

    parts = search.team.agree(sample)
    level = next(t for _, told in parts for t in told)
    return search.rank(step, level, merged(part for part, _ in parts), keep, candidates)


def _until_cut(search: Search, candidates: list[int], cuts: Mapping[int, bool], on_cut: OnCut) -> None:
    interceptor = Interceptor(
        search.backbone, candidates, search.recordings, cuts=cuts, tap=search.judge.taps, on_cut=on_cut
    )
    if interceptor.run(search.batch_call(candidates, output_type="latent")) is not None:
        raise PrismError(
            f"The pipeline made {interceptor.step - 1} scheduler steps, and the schedule cuts at step {max(cuts)}."
        )


def _judge_clean(search: Search, sample: Callable[[], Mapping[int, Tensor]], step: int) -> list[int]:
    """The best of the finished latents that `sample` makes, each re-noised to `judge_at` with the same draws."""

    refused: dict[int, str] = {}

    def scored(chunk: list[int], latents: Mapping[int, Tensor]) -> dict[int, list[float]]:
        stacked = torch.stack([latents[candidate] for candidate in chunk])
        # Not the run's own seed: the noise of its first candidate must not be the noise all are judged with.
        generator = _generator(random.Random(f"judge {search.seed}").randrange(2**62))
        prompts, draws = [search.prompt] * len(chunk), search.num_draws
        own: dict[str, Any] = {}
        if hasattr(search.judge, "score_tokens") and search.backbone.draws_conditions(search.call):
            own["seeds"] = [search.seeds[candidate] for candidate in chunk]
        try:
            mean, _ = search.judge.score_clean(
                stacked, prompts, search.judge_at, num_draws=draws, generator=generator, **search.call, **own
            )
        except PrismError as error:
            if len(chunk) == 1:
                refused[chunk[0]] = str(error)
                return {}
            return {c: row for candidate in chunk for c, row in scored([candidate], latents).items()}
        return search.finite_scores(chunk, mean)

    def judge() -> tuple[dict[int, list[float]], dict[int, str]]:
        latents = sample()
        chunks = search.chunks(latents)
        return {c: row for chunk in chunks for c, row in scored(chunk, latents).items()}, refused

    parts = search.team.agree(judge)
    scores = merged(part for part, _ in parts)
    for candidate, reason in merged(part for _, part in parts).items():
        if not scores:  # no fault of a candidate's
            raise PrismError(reason)
        if search.owners[candidate] == search.team.rank:
            search.warn_dropped(candidate, f"the judge refuses it ({reason.rstrip('.')})")
    return search.rank(step, search.judge_at, scores, search.top_k, range(len(search.seeds)))


STRATEGIES: dict[str, Callable[[Search], list[int]]] = {
    "none": none,
    "random": pick_random,
    "full": full,
    "early": early,
    "draft": draft,
    "oracle": oracle,
}
