"""A judge's agreement with labelled pairs, by noise level and dimension, with intervals clustered by prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prism.errors import PrismError
from prism.evaluation.accuracy import pairwise_accuracy, prompt_interval
from prism.evaluation.measurement import Measurement, pair_table
from prism.judge.objective import tie_margin
from prism.preference import LatentStore, PromptGroup, prompt_key

TIMESTEPS = (989, 949, 899, 699, 499, 299, 99, 0)
"""The noise levels of the paper's Table 1."""


class Scorer(Protocol):
    """What can be evaluated: a `Judge`, or anything else that scores noisy latents on a backbone."""

    name: str
    backbone: Any
    dimensions: tuple[str, ...]
    eta: float
    trained_on: dict[str, Any]

    def score(self, noisy_latents: Tensor, prompts: Sequence[str], t: float, **call: Any) -> Tensor:
        """(B, num_dimensions) float32 of latents at t."""


def evaluate(
    judge: Scorer,
    store: LatentStore,
    split: str = "test",
    timesteps: Sequence[float] = TIMESTEPS,
    num_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Accuracy of a judge on a split of a store: the rows of `measure`, whose arguments it takes."""
    return measure(judge, store, split, timesteps, num_draws, seed, batch_size, progress).rows


def measure(
    judge: Scorer,
    store: LatentStore,
    split: str = "test",
    timesteps: Sequence[float] = TIMESTEPS,
    num_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Measurement:
    """A judge's accuracy on a split of a store, with its margin on every pair.

    Each video is noised by its own draw, a function of (seed, video, t, draw), so that a figure does not depend on
    which other videos or levels are evaluated beside it, and all judges see the same noise. Each (video, t, draw) costs
    a `Judge` one truncated forward pass.

    Args:
        judge: a judge; every one of its dimensions needs a column in the store's pairs.
        store: opened store.
        split: the pairs to measure on. Those of "validation" choose ``with_ties_validation_threshold``'s threshold.
        timesteps: noise levels in [0, 1000], 0 clean.
        num_draws: noise draws a video's score is averaged over; at t = 0 one is all there is.
        seed: of noise and bootstrap.
        batch_size: videos in one forward pass.
        progress: show a progress bar (on a terminal).

    Returns:
        Its ``rows``, one per t and dimension, are the "accuracy" rows of metrics.json: judge, head_seed, source, t,
        log_snr, set, dimension, without_ties, without_ties_ci95, with_ties (threshold tuned on this very split, for
        comparison with published figures), with_ties_validation_threshold, with_ties_model_rule (Eq. 3-4's own rule,
        untuned), pairs and prompts (all labelled, ties included), decided_pairs and decided_prompts (those that
        without_ties and its interval are of). None where there is nothing to measure; no interval below 10 prompts.

    Raises:
        PrismError: where the split has no pairs, or shares a prompt with what the head was trained on.
    """
    if num_draws < 1 or batch_size < 1:
        raise PrismError(f"num_draws and batch_size must be 1 or more, found {num_draws} and {batch_size}.")
    if not timesteps:
        raise PrismError("There is no noise level to evaluate at; give at least one t from 0 to 1000.")
    groups = store.groups(split, judge.dimensions)
    if not groups:
        raise PrismError(f"The store {store.folder} has no labelled pairs in the split {split}.")
    validation = store.groups("validation", judge.dimensions) if split != "validation" else groups
    if split != "train":
        _check_leak(judge, [*groups, *validation], store)

    everything = {group.prompt: group for group in [*groups, *validation]}
    rows, margins = [], []
    passes = [(t, draw) for t in timesteps for draw in range(num_draws if t else 1)]
    videos = sum(len(group.videos) for group in everything.values())
    label = f"evaluate {judge.name}"
    shown = None if progress else True
    with judge.backbone.freed(), tqdm(total=len(passes) * videos, desc=label, unit="video", disable=shown) as bar:
        for t in timesteps:
            draws = num_draws if t else 1
            scores = score_videos(judge, store, list(everything.values()), t, draws, seed, batch_size, bar)
            rows += _rows(judge, groups, validation, scores, t, split, seed)
            margins.append(pair_margins(groups, scores)[1])
    table = pair_table(judge.name, groups, judge.dimensions, timesteps, margins)
    return Measurement(rows, table, {"split": split, "num_draws": num_draws, "seed": seed})


@torch.no_grad()
def score_videos(
    judge: Scorer,
    store: LatentStore,
    groups: Sequence[PromptGroup],
    t: float,
    num_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    bar: Any = None,
) -> dict[str, np.ndarray]:
    """Scores of the groups' videos at level t: video -> (num_dimensions,) float64, the mean over noise draws."""
    totals: dict[str, np.ndarray] = {}
    for videos, prompts, noisy in noised(judge.backbone, store, groups, t, num_draws, seed, batch_size):
        try:
            scores = judge.score(noisy, prompts, t, **store.call).double().cpu()
        except PrismError as error:
            raise PrismError(f"{error} (Its rows at t = {t:g} are the videos {', '.join(videos)}.)") from error
        bad = ~scores.isfinite().all(1)
        if bool(bad.any()):
            raise PrismError(
                f"The score of video {videos[int(bad.nonzero()[0])]!r} at t = {t:g} is not a finite number."
            )
        for video, row in zip(videos, scores.numpy()):
            totals[video] = totals.get(video, 0.0) + row
        if bar is not None:
            bar.update(len(videos))
    return {video: total / num_draws for video, total in totals.items()}


def noised(
    backbone: Any,
    store: LatentStore,
    groups: Sequence[PromptGroup],
    t: float,
    num_draws: int,
    seed: int,
    batch_size: int = 64,
) -> Iterator[tuple[list[str], list[str], Tensor]]:
    """The groups' videos at level t, in batches: (videos, their prompts, noisy latents), each draw a batch."""
    todo = [(video, group.prompt) for group in groups for video in group.videos]
    for start in range(0, len(todo), batch_size):
        videos, prompts = (list(column) for column in zip(*todo[start : start + batch_size]))
        latents = store.latents(videos)
        for draw in range(num_draws):
            noise = torch.stack([_noise(latents.shape[1:], seed, video, t, draw) for video in videos])
            yield videos, prompts, backbone.add_noise(latents, t, noise)  # Eq. 1


def _noise(shape: Sequence[int], seed: int, video: str, t: float, draw: int) -> Tensor:
    """The draw of one video, the same whatever is evaluated beside it."""
    key = f"{seed}/{video}/{float(t)}/{draw}".encode()
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))


def _rows(
    judge: Scorer,
    groups: Sequence[PromptGroup],
    validation: Sequence[PromptGroup],
    scores: dict[str, np.ndarray],
    t: float,
    split: str,
    seed: int,
) -> list[dict[str, Any]]:
    labels, margins, prompts = pair_margins(groups, scores)
    val_labels, val_margins, _ = pair_margins(validation, scores)
    common = {
        "judge": judge.name,
        "head_seed": judge.trained_on.get("seed"),
        "source": judge.trained_on.get("source", "untrained"),
        "t": t,
        "log_snr": _log_snr(judge, t),
        "set": split,
    }
    rows = []
    for column, dimension in enumerate(judge.dimensions):
        known = ~np.isnan(labels[:, column])
        y, m, clusters = labels[known, column], margins[known, column], prompts[known]
        tuned = pairwise_accuracy(y, m)
        decided = y != 0
        val_known = ~np.isnan(val_labels[:, column]) if len(val_labels) else np.zeros(0, dtype=bool)
        validated = None
        if val_known.any():
            threshold = pairwise_accuracy(val_labels[val_known, column], val_margins[val_known, column]).threshold
            validated = pairwise_accuracy(y, m, threshold=threshold).with_ties
        rows.append(
            {
                **common,
                "dimension": dimension,
                "without_ties": _number(tuned.without_ties),
                "without_ties_ci95": prompt_interval((y * m > 0)[decided], clusters[decided], seed=seed),
                "with_ties": _number(tuned.with_ties),
                "with_ties_validation_threshold": None if validated is None else _number(validated),
                "with_ties_model_rule": _number(pairwise_accuracy(y, m, threshold=tie_margin(judge.eta)).with_ties),
                "pairs": len(y),
                "prompts": len(set(clusters.tolist())),
                "decided_pairs": int(decided.sum()),
                "decided_prompts": len(set(clusters[decided].tolist())),
            }
        )
    return rows


def pair_margins(
    groups: Sequence[PromptGroup], scores: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and margins (pairs, num_dimensions) and the prompt's number (pairs,), over all groups."""
    if not groups:
        return np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0, dtype=np.int64)
    margins = []
    for group in groups:
        values = np.stack([scores[video] for video in group.videos])
        margins.append(values[group.first] - values[group.second])
    sizes = [len(group.labels) for group in groups]
    labels = np.concatenate([group.labels for group in groups])
    return labels, np.concatenate(margins), np.repeat(np.arange(len(groups)), sizes)


def _log_snr(judge: Scorer, t: float) -> float | None:
    """2 ln(alpha / sigma) of the backbone at t; None where it is infinite."""
    alpha, sigma, _ = judge.backbone.family.level(judge.backbone.pipe.scheduler, torch.tensor([float(t)]))
    return 2 * math.log(float(alpha) / float(sigma)) if alpha > 0 and sigma > 0 else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _check_leak(judge: Scorer, groups: Sequence[PromptGroup], store: LatentStore) -> None:
    trained_on = set(judge.trained_on.get("prompt_keys", ()))
    for group in groups:
        if prompt_key(group.prompt) in trained_on:
            raise PrismError(
                f"The head was trained on the prompt {group.prompt!r} of {store.folder}; "
                "evaluate on prompts that it has not seen."
            )
