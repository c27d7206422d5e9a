"""A judge as a reward function of verl-omni, in the trainer's own process.

verl-omni calls it by keyword, one sample per call and all samples at once; they are scored in batches. Keys of the
reward's entry in its configuration arrive as further arguments.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import Tensor

from prism.errors import SEEDS, PrismError, number, quoted, whole
from prism.rewards.loaded import scorer_of, worker_of
from prism.rewards.scorer import LatentRow, Scorer


async def compute_score(
    solution_image: Any,
    extra_info: Mapping[str, Any],
    head: str,
    backbone: str,
    noise_level: float = 0.5,
    noise_seed: int | None = 0,
    score_scale: float = 1.0,
    score_bias: float = 0.0,
    device: str | None = None,
    dtype: str | None = None,
    call: Mapping[str, Any] | None = None,
    dimension: str | None = None,
    draws: int | None = None,
    **others: Any,
) -> dict[str, float]:
    """The reward of one sample of verl-omni, of finished latents: `rollout.pipeline.output_type` is latent or both.

    Args:
        solution_image: the latents, without rows, where the output type is latent.
        extra_info: the sample's, with ``latents_clean`` where the output type is both; ``prompt_embeds`` and what goes
            with them, else the ``prompt``.
        head: folder or id of the head; backbone: of the pipeline.
        noise_level: from 0 to 1, to which the latents are re-noised.
        noise_seed: of the noise; None: 0.
        score_scale, score_bias: the score is the judge's times the one plus the other.
        device, dtype, call, dimension, draws: as of `prism.rewards.loaded.scorer_of`.
        others: of the trainer, not read; one that is all but the name of an argument is refused.

    Returns:
        "score", and the judge's scores by dimension as "prism_VQ" and so on.

    Raises:
        PrismError: where the sample cannot be scored.
    """
    t = 1000 * number("noise_level", noise_level, 0, 1)
    seed = 0 if noise_seed is None else whole("noise_seed", noise_seed, 0, SEEDS)
    scale, bias = number("score_scale", score_scale), number("score_bias", score_bias)
    for name in others:
        if meant := _meant(name):
            raise PrismError(f"The reward has no key {quoted(name, 60)}; write {meant}, or leave it out.")
    if not isinstance(extra_info, Mapping):
        raise PrismError(f"extra_info must be a mapping; found {quoted(extra_info, 60)}.")
    settings = {"dimension": dimension, "draws": draws}
    scorer = await asyncio.to_thread(scorer_of, head, backbone, device, dtype, call, **settings)
    row = row_of(scorer, solution_image, extra_info, t, seed)
    (future,) = worker_of(scorer).submit(scorer.key(row), [row], scorer)
    scores = await asyncio.wrap_future(future)
    named = {f"prism_{name}": value for name, value in scorer.named(scores).items()}
    return {"score": scorer.reward(scores) * scale + bias, **named}


_OWN = [name for name in inspect.signature(compute_score).parameters if name != "others"]


@cache  # a trainer gives the same keys with every sample
def _meant(name: str) -> str | None:
    """The argument whose name a key of the trainer all but is."""
    return next(iter(get_close_matches(name, _OWN, 1, 0.85)), None)


def row_of(scorer: Scorer, solution: Any, extra_info: Mapping[str, Any], t: float, seed: int) -> LatentRow:
    """The row that a sample of verl-omni asks to score."""
    latents = extra_info.get("latents_clean")
    latents = solution if latents is None else latents
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise PrismError(
            "A judge needs the sample's finished latents; set verl-omni's rollout.pipeline.output_type to latent or "
            f"both (found {getattr(latents, 'dtype', type(latents).__name__)})."
        )
    latents = _one_row(latents, scorer)
    latents = latents.reshape(scorer.fitted(latents.shape))
    given = {name: value for name, value in extra_info.items() if isinstance(value, Tensor)}
    embeddings = {name: _rows(name, value) for name, value in scorer.embeddings(given).items()}
    if embeddings:
        return LatentRow(latents, t, seed, None, embeddings)
    prompt = extra_info.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise PrismError(
            "The sample has neither prompt_embeds nor a prompt in its extra_info; found "
            f"{quoted(sorted(extra_info), 120)}."
        )
    return LatentRow(latents, t, seed, prompt)


def _one_row(latents: Tensor, scorer: Scorer) -> Tensor:
    """Latents (1, ...) of latents with or without this axis."""
    for candidate in (latents.detach(), latents.detach()[None]):
        try:
            scorer.fitted(candidate.shape)
        except PrismError:
            continue
        if len(candidate) == 1:
            return candidate
    scorer.fitted(latents[None].shape)
    raise PrismError(f"One sample was expected, and its latents have the shape {tuple(latents.shape)}.")


def _rows(name: str, value: Tensor) -> Tensor:
    """Embeddings (1, ...), or a mask, of those of one sample with or without this axis."""
    axes = 3 if name == "prompt_embeds" else 2
    value = value.detach()
    return value if value.ndim >= axes else value[None]
