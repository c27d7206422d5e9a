"""The arguments of `best_of_n`, checked before any work; each mistake is a sentence."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Mapping
from typing import Any

from prism.backbone import Backbone
from prism.backbone.arguments import shows_adapters
from prism.errors import PrismError, number, quoted, whole
from prism.judge import Judge
from prism.sampling import ranking
from prism.sampling.plan import Plan

RESERVED = {
    "generator": "candidates draw from CPU generators seeded with seed + i; give seed or seeds",
    "latents": "every candidate starts from the noise of its own seed; give seed or seeds",
    "num_videos_per_prompt": "the number of candidates is n",
    "num_images_per_prompt": "the number of candidates is n",
}
DEFAULT_N, MOST = 8, 10_000  # candidates
SMALL_DENOISER = 500_000_000  # parameters up to which all candidates go in one batch


def backbone_of(pipe: Any, judge: Any, kind: type[Plan], oracle: Any) -> tuple[Backbone, Any]:
    """The backbone of a run and its judge, loaded where it is named by its folder."""
    if isinstance(pipe, Backbone):
        pipe = pipe.pipe
    if isinstance(pipe, str | os.PathLike):
        raise PrismError(
            f"pipe is {quoted(os.fspath(pipe), 120)}; load it first: DiffusionPipeline.from_pretrained(...)."
        )
    if _is_judge(pipe):
        raise PrismError("pipe is a judge; the arguments are best_of_n(pipe, judge, prompt).")
    if kind.needs_oracle():
        if oracle is None:
            raise PrismError(f'The strategy "{kind.strategy}" needs `oracle`, a function of a video and its prompt.')
        ranking.check(oracle)
    if judge is None:
        if kind.needs_judge():
            raise PrismError(f'The strategy "{kind.strategy}" needs a judge; load one with Judge.from_pretrained.')
        return Backbone(pipe), None
    if isinstance(judge, str | os.PathLike):
        judge = Judge.from_pretrained(judge, pipe)
    if not _is_judge(judge):
        raise PrismError(
            f"judge is {quoted(judge, 80)} of type {type(judge).__name__}, which scores nothing; load one with "
            "Judge.from_pretrained(head, pipe)."
        )
    if judge.backbone.pipe is not pipe:
        raise PrismError(
            "The judge was put onto another pipeline; use Judge.from_pretrained(head, pipe) with this one."
        )
    if kind.looks_at == "steps" and not hasattr(judge, "score_tokens"):
        raise PrismError(
            f'The strategy "{kind.strategy}" reads hidden states on the way, and this judge reads none; use full or '
            "draft."
        )
    return judge.backbone, judge


def _is_judge(value: Any) -> bool:
    scores = any(callable(getattr(value, name, None)) for name in ("score_clean", "score_tokens"))
    return scores and hasattr(value, "dimensions") and isinstance(getattr(value, "backbone", None), Backbone)


def draw_seed() -> int:
    """A seed drawn by the system, small enough to be typed."""
    return secrets.randbelow(2**31)


def seed_of(value: Any) -> int:
    """A seed that torch's generators take."""
    return whole("A seed", value, 0, 2**63 - 1)


def seeds_of(n: Any, seed: int, seeds: Any) -> tuple[int, ...]:
    """The candidates' seeds, from `seed` counting up or as given."""
    if seeds is None:
        count = DEFAULT_N if n is None else whole("n", n, 1, MOST)
        return tuple(seed_of(seed + index) for index in range(count))
    try:  # a set has no order, in which candidates could be numbered
        given = None if isinstance(seeds, str | bytes | Mapping | set | frozenset) else list(seeds)
    except TypeError:
        given = None
    if given is None:
        raise PrismError(f"seeds must be a list of whole numbers; found {quoted(seeds, 80)}.")
    if not 0 < len(given) <= MOST or (n is not None and whole("n", n, 1, MOST) != len(given)):
        raise PrismError(f"seeds must hold one seed per candidate, at most {MOST:,}; found {len(given)} for n = {n}.")
    found = tuple(map(seed_of, given))
    if len(set(found)) < len(found):
        twice = next(seed for seed in found if found.count(seed) > 1)
        warnings.warn(f"The seed {twice} is given more than once; its candidates are one and the same.", stacklevel=3)
    return found


def batch_size_of(backbone: Backbone, batch_size: Any, n: int, call: Mapping[str, Any]) -> int:
    """Candidates per denoiser call."""
    size = None if batch_size is None else min(n, whole("batch_size", batch_size))
    if backbone.family.batch_size_one or shows_adapters(call):
        return 1
    return size or (n if backbone.num_parameters <= SMALL_DENOISER else 1)


def top_k_of(top_k: Any, n: int) -> int:
    """How many of the candidates are finished."""
    count = whole("top_k", top_k)
    if count > n:
        raise PrismError(f"top_k is {count}, and there are {n} candidates.")
    return count


def judge_at_of(judge_at: Any, default: float, t_range: tuple[float, float]) -> float:
    """The noise level at which finished latents are judged."""
    low, high = t_range
    return min(max(default, low), high) if judge_at is None else number("judge_at", judge_at, 0, 1000, above=True)
