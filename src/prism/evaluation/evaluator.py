"""A judge's agreement with labelled pairs, by noise level and dimension, with intervals clustered by prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prism.errors import DRAWS, SEEDS, PrismError, flag, number, quoted, whole
from prism.evaluation.accuracy import pairwise_accuracy, prompt_interval
from prism.evaluation.measurement import Measurement, pair_table
from prism.judge.objective import tie_margin
from prism.preference import LatentStore, PromptGroup, prompt_key
from prism.report.metrics import AccuracyRow
from prism.team import in_batches, ran_out

TIMESTEPS = (989, 949, 899, 699, 499, 299, 99, 0)
"""The noise levels of the paper's Table 1."""
Video = tuple[str, str]
"""A video and its prompt."""


class Scorer(Protocol):
    """Anything that can be evaluated: a `Judge`, or another object that scores noisy latents on a backbone."""

    name: str
    backbone: Any
    dimensions: tuple[str, ...]
    eta: float
    trained_on: dict[str, Any]

    def score(self, noisy_latents: Tensor, prompts: Sequence[str], t: float, **call: Any) -> Tensor:
        """(B, num_dimensions) float32 of latents at t."""


def evaluate(
    judge: Scorer,
    store: LatentStore | str | Path,
    split: str = "test",
    timesteps: Sequence[float] | None = None,
    num_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> list[AccuracyRow]:
    """Accuracy of a judge on a split of a store: the rows of `measure`, whose arguments it takes."""
    return measure(judge, store, split, timesteps, num_draws, seed, batch_size, progress).rows


def measure(
    judge: Scorer,
    store: LatentStore | str | Path,
    split: str = "test",
    timesteps: Sequence[float] | None = None,
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
        store: opened store, or its folder.
        split: the pairs to measure on. Those of "validation" choose ``with_ties_validation_threshold``'s threshold.
        timesteps: noise levels in [0, 1000], 0 clean; None: those of the paper's Table 1 at which the pipeline uses the
            denoiser that the judge reads.
        num_draws: noise draws a video's score is averaged over; at t = 0 one is all there is.
        seed: of noise and bootstrap.
        batch_size: videos in one forward pass; halved, with a warning, where memory runs out.
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
    num_draws, batch_size = whole("num_draws", num_draws, 1, DRAWS), whole("batch_size", batch_size)
    seed, progress = whole("seed", seed, 0, SEEDS), flag("progress", progress)
    check_judge(judge)
    store = LatentStore.of(store)
    levels = _levels(judge, timesteps)
    groups = store.groups(split, judge.dimensions)
    if not groups:
        raise PrismError(f"The store {store.folder} has no labelled pairs in the split {split}.")
    validation = store.groups("validation", judge.dimensions) if split != "validation" else groups
    if split != "train":
        _check_leak(judge, [*groups, *validation], store)

    everything = list({group.prompt: group for group in [*groups, *validation]}.values())
    passes = [(t, num_draws if t else 1) for t in levels]
    videos = sum(len(group.videos) for group in everything)
    total, label = sum(draws for _, draws in passes) * videos, f"evaluate {judge.name}"
    with judge.backbone.freed(), tqdm(total=total, desc=label, unit="video", disable=None if progress else True) as bar:
        scored = score_levels(judge, store, everything, passes, seed, batch_size, bar)
    rows: list[AccuracyRow] = []
    margins = []
    for t, scores in zip(levels, scored):
        rows += _rows(judge, groups, validation, scores, t, split, seed)
        margins.append(pair_margins(groups, scores)[1])
    table = pair_table(judge.name, groups, judge.dimensions, levels, margins)
    return Measurement(rows, table, {"split": split, "num_draws": num_draws, "seed": seed})


def check_judge(judge: Any) -> None:
    """Raise PrismError for an object that is no judge, such as a judge's folder, which has no pipeline."""
    if not all(hasattr(judge, name) for name in ("backbone", "dimensions", "score", "trained_on")):
        raise PrismError(
            f"A judge on a pipeline is needed, found {type(judge).__name__}; put one there with "
            "Judge.from_pretrained(head, pipe)."
        )


def _levels(judge: Scorer, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    """The noise levels to evaluate at, all within the range of t that the denoiser is used for."""
    low, high = getattr(judge.backbone, "t_range", (0.0, 1000.0))
    if timesteps is None:
        return tuple(t for t in TIMESTEPS if low <= t <= high) or ((low + high) / 2,)
    listed = np.asarray(timesteps, dtype=object)
    if listed.ndim != 1 or not len(listed):
        raise PrismError(
            f"timesteps must be a list of noise levels, at least one t from 0 to 1000; found {quoted(timesteps, 80)}."
        )
    checked = [number("The noise level t", t, 0, 1000) for t in listed]
    levels = tuple(t if isinstance(t, int) else level for t, level in zip(listed, checked))
    if len(set(levels)) < len(levels):
        raise PrismError(f"timesteps names a noise level more than once; found {quoted(timesteps, 80)}.")
    for t in levels:
        if not low <= t <= high:
            raise PrismError(
                f"The denoiser that the judge reads is used for t from {low:g} to {high:g}, found the level {t:g}; "
                "evaluate within."
            )
    return levels


def score_videos(
    judge: Scorer,
    store: LatentStore,
    groups: Sequence[PromptGroup],
    t: float,
    num_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Scores of the groups' videos at level t: video -> (num_dimensions,) float64, the mean over noise draws."""
    return score_levels(judge, store, groups, [(t, num_draws)], seed, batch_size)[0]


@torch.no_grad()
def score_levels(
    judge: Scorer,
    store: LatentStore,
    groups: Sequence[PromptGroup],
    passes: Sequence[tuple[float, int]],
    seed: int = 0,
    batch_size: int = 64,
    bar: Any = None,
) -> list[dict[str, np.ndarray]]:
    """Scores of the groups' videos, one dict per level as `score_videos` returns it.

    passes: (level, number of noise draws at it) pairs.

    A batch is scored at all levels before the next one: its latents are read and its prompts encoded once.
    """
    by_level: list[dict[str, np.ndarray]] = [{} for _ in passes]

    def work(batch: Sequence[Video]) -> None:
        videos, latents = [video for video, _ in batch], store.latents(video for video, _ in batch)
        before = None if bar is None else bar.n
        scored = []
        try:
            for t, draws in passes:
                total: Any = 0.0
                for draw in range(draws):
                    noisy = noised(judge.backbone, latents, videos, t, draw, seed)
                    total = total + _scores(judge, store, batch, noisy, t)
                    if bar is not None:
                        bar.update(len(batch))
                scored.append(total / draws)
        except Exception:
            if bar is not None:
                bar.update(before - bar.n)  # `in_batches` may try the batch again in halves
            raise
        for scores, rows in zip(by_level, scored):
            scores.update(zip(videos, rows))

    in_batches(videos_of(groups), batch_size, work, "evaluating")
    return by_level


def _scores(judge: Scorer, store: LatentStore, batch: Sequence[Video], noisy: Tensor, t: float) -> np.ndarray:
    """(rows, num_dimensions) float64, all finite."""
    videos, prompts = [video for video, _ in batch], [prompt for _, prompt in batch]
    try:
        scores = judge.score(noisy, prompts, t, **store.call).double().cpu()
    except PrismError as error:
        raise PrismError(f"{error} (Its rows at t = {t:g} are the videos {_some(videos)}.)") from error
    except Exception as error:
        if not ran_out(error):
            check_call(judge.backbone, store, prompts[0])
        raise
    bad = ~scores.isfinite().all(1)
    if bool(bad.any()):
        raise PrismError(f"The score of video {videos[int(bad.nonzero()[0])]!r} at t = {t:g} is not a finite number.")
    rows: np.ndarray = scores.numpy()
    return rows


def check_call(backbone: Any, store: LatentStore, prompt: str) -> None:
    """Raise PrismError where the pipeline does not take the store's call, whatever it raises itself."""
    try:
        backbone.condition([prompt], **store.call)
    except PrismError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise PrismError(
            f"The pipeline does not take the call in {store.folder / 'store.json'} ({type(error).__name__}: {reason}); "
            "mend the call there."
        ) from error


def videos_of(groups: Sequence[PromptGroup]) -> list[Video]:
    """The videos of groups, one after another."""
    return [(video, group.prompt) for group in groups for video in group.videos]


def noised(backbone: Any, latents: Tensor, videos: Sequence[str], t: float, draw: int = 0, seed: int = 0) -> Tensor:
    """Latents (B, ...) of some videos at level t, each under a draw of its own (Eq. 1)."""
    noise = torch.stack([_noise(latents.shape[1:], seed, video, t, draw) for video in videos])
    noisy: Tensor = backbone.add_noise(latents, t, noise)
    return noisy


def _some(names: Sequence[str]) -> str:
    """The first few names, cut short."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:36]} ..." for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _noise(shape: Sequence[int], seed: int, video: str, t: float, draw: int) -> Tensor:
    """The noise of one video's draw, the same whichever other videos are evaluated."""
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
) -> list[AccuracyRow]:
    """The "accuracy" rows of one noise level, one per dimension."""
    labels, margins, prompts = pair_margins(groups, scores)
    val_labels, val_margins, _ = pair_margins(validation, scores)
    rows: list[AccuracyRow] = []
    for column, dimension in enumerate(judge.dimensions):
        labelled = ~np.isnan(labels[:, column])
        y, m, clusters = labels[labelled, column], margins[labelled, column], prompts[labelled]
        tuned = pairwise_accuracy(y, m)
        decided = y != 0
        val_labelled = ~np.isnan(val_labels[:, column]) if len(val_labels) else np.zeros(0, dtype=bool)
        validated = None
        if val_labelled.any():
            threshold = pairwise_accuracy(val_labels[val_labelled, column], val_margins[val_labelled, column]).threshold
            validated = pairwise_accuracy(y, m, threshold=threshold).with_ties
        rows.append(
            {
                "judge": judge.name,
                "head_seed": judge.trained_on.get("seed"),
                "source": judge.trained_on.get("source", "untrained"),
                "t": t,
                "log_snr": _log_snr(judge, t),
                "set": split,
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
    groups: Sequence[PromptGroup], scores: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and margins (pairs, num_dimensions) and the index of each pair's prompt (pairs,), over all groups."""
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
    """Raise PrismError where a group's prompt is one that the head was trained on."""
    trained_on = set(judge.trained_on.get("prompt_keys", ()))
    for group in groups:
        if prompt_key(group.prompt) in trained_on:
            raise PrismError(
                f"The head was trained on the prompt {group.prompt!r} of {store.folder}; "
                "evaluate on prompts that it has not seen."
            )
