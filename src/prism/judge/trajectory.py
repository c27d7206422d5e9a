"""Gains of a trajectory: the score after each denoising step minus the score before it.

Both states are judged as the sampler left them, each at its own noise level, by a pass of the first blocks. A judge's
scores at two levels differ by more than quality: a gain says something beside the gains of other candidates of the same
prompt at the same step, as trainers compare them, and not beside those of other steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone.layout import per_row
from prism.errors import PrismError, choice, listed, number
from prism.team import in_batches

if TYPE_CHECKING:
    from prism.judge.judge import Judge


@torch.no_grad()
def gains(
    judge: Judge,
    all_latents: Tensor,
    timesteps: Any,
    prompts: str | Sequence[str],
    dimension: str | None = None,
    **call: Any,
) -> Tensor:
    """Gain in score of each denoising step of B trajectories. Along a row they sum to last score minus first.

    Args:
        all_latents: (B, states, ...) of the sampling loop: the noise, and the latents after each step. Where a trainer
            keeps some of them alone, these, in order.
        timesteps: the denoiser's timestep at each state, as the scheduler's; one list for all rows, or one per row.
            One fewer than the states: the last one is finished, at noise level 0.
        prompts: one per row, or one for all.
        dimension: of the score; None: "overall" where there is one, else the last.
        **call: further arguments of the pipeline's call.

    Returns:
        (B, steps) float32 on the CPU, one step fewer than states.

    Raises:
        PrismError: where there are not as many timesteps as states, or a state cannot be scored.
    """
    per_row(0, all_latents)  # refuses anything but latents
    if all_latents.ndim < 3 or all_latents.shape[1] < 2:
        raise PrismError(
            f"all_latents must be (B, states, ...) with two states or more; found the shape {tuple(all_latents.shape)}."
        )
    rows, states = all_latents.shape[:2]
    texts = [prompts] * rows if isinstance(prompts, str) else listed("prompts", prompts)
    if len(texts) != rows:
        raise PrismError(f"Each row of all_latents needs its prompt; found {len(texts)} prompts for {rows} rows.")
    fallback = "overall" if "overall" in judge.dimensions else judge.dimensions[-1]
    column = judge.dimensions.index(fallback if dimension is None else choice("dimension", dimension, judge.dimensions))
    levels = noise_levels_of(judge, timesteps, rows, states)
    scores = torch.empty(rows, states)

    def work(batch: Sequence[int]) -> None:
        chosen, some = list(batch), [texts[row] for row in batch]
        for state in range(states):
            latents = all_latents[chosen, state].to(judge.backbone.device)
            values = judge.score(latents, some, levels[chosen, state].to(latents.device), **call)
            scores[chosen, state] = values[:, column].float().cpu()

    with judge.backbone.held(), judge.backbone.freed():
        in_batches(range(rows), rows, work, "scoring")
    return scores.diff(dim=1)


def noise_levels_of(judge: Judge, timesteps: Any, rows: int, states: int) -> Tensor:
    """Noise levels t in [0, 1000] of states at these timesteps of the denoiser.

    Args:
        judge: whose family and scheduler say what a timestep means.
        timesteps: see `gains`.
        rows: B.
        states: per row.

    Returns:
        (rows, states) float32.
    """
    try:
        values = timesteps.detach().cpu().double().numpy() if isinstance(timesteps, Tensor) else timesteps
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        values = np.full((), np.nan)
    lists = values if values.ndim == 2 else values[None]
    if lists.ndim != 2 or lists.shape[1] not in (states - 1, states) or len(lists) not in (1, rows):
        raise PrismError(
            f"timesteps must be one per state of all_latents ({states}), or one fewer where the last state is "
            f"finished, for all rows or for each; found the shape {tuple(values.shape)}."
        )
    family, scheduler = judge.backbone.family, judge.backbone.pipe.scheduler
    low, high = judge.backbone.t_range
    unique, places = np.unique(lists, return_inverse=True)
    converted = [family.t_of(scheduler, number("A timestep", each, 0, 1e6)) for each in unique.tolist()]
    levels: Any = np.asarray(converted)[places].reshape(lists.shape)
    if levels.shape[1] < states:
        levels = np.concatenate([levels, np.zeros((len(levels), 1))], 1)
    if not ((levels >= low) & (levels <= high)).all():
        raise PrismError(
            f"The denoiser that the judge reads is used for t from {low:g} to {high:g}, and the states lie at t from "
            f"{levels.min():g} to {levels.max():g}; give those within alone."
        )
    return torch.from_numpy(np.broadcast_to(levels, (rows, states)).astype(np.float32))
