"""A judge's measurement: scores of a store's videos by noise level, alone or as one of several processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prism.errors import DRAWS, SEEDS, PrismError, flag, whole
from prism.evaluation.facts import COLUMNS, decoded_facts, facts_of
from prism.evaluation.measurement import Measurement, pair_table
from prism.evaluation.summary import accuracy_rows
from prism.judge.checks import noise_levels
from prism.judge.joint import JointJudge
from prism.judge.scoring import noise
from prism.preference import LatentStore, PromptGroup, prompt_key
from prism.report.rows import AccuracyRow
from prism.team import Team, in_batches, ran_out

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
    team: Team | None = None,
    decode: bool = False,
) -> Measurement:
    """A judge's accuracy on a split of a store, with its margin on every pair.

    Each video gets noise of its own, a function of (seed, video, t, draw), so that a figure does not depend on the
    other videos or levels that are evaluated, and all judges see the same noise. Each (video, t, draw) costs a `Judge`
    one truncated forward pass.

    Args:
        judge: a judge; its dimensions that the store has labels of are measured, and a warning names the others.
        store: opened store, or its folder.
        split: the pairs to measure on. Those of "validation" choose ``with_ties_validation_threshold``'s threshold.
        timesteps: noise levels in [0, 1000], 0 clean; None: those of the paper's Table 1 at which the pipeline uses the
            denoiser that the judge reads.
        num_draws: noise draws that a video's score is averaged over; at t = 0, without noise, it is one.
        seed: of noise and bootstrap.
        batch_size: videos in one forward pass; halved, with a warning, where memory runs out.
        progress: show a progress bar (on a terminal).
        team: the processes that share the videos; all of them call this and get the same result. None: this one alone.
        decode: decode the videos whose brightness and motion the store does not hold, for `bias_rows`.

    Returns:
        The measurement. Its ``rows``, one per t and dimension, are the "accuracy" rows of metrics.json: judge,
        head_seed, source, t, log_snr, set, dimension, without_ties, without_ties_ci95, with_ties (threshold tuned on
        this very split, for comparison with published figures), with_ties_validation_threshold, with_ties_model_rule
        (the rule of Eq. 3-4, untuned), pairs and prompts (all labelled, ties included), decided_pairs and
        decided_prompts (counted for without_ties and its interval). A value is None where there is nothing to measure,
        and an interval below 10 prompts.

    Raises:
        PrismError: where the split has no pairs, or shares a prompt with what the head was trained on.
    """
    return measure_together([judge], store, split, timesteps, num_draws, seed, batch_size, progress, team, decode)[0]


def measure_together(
    judges: Sequence[Any],
    store: LatentStore | str | Path,
    split: str = "test",
    timesteps: Sequence[float] | None = None,
    num_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    team: Team | None = None,
    decode: bool = False,
    joint: Callable[[Sequence[Any]], Scorer] = JointJudge,
) -> list[Measurement]:
    """Measure several judges on one backbone, all in the passes that one would take.

    Args:
        judges: of the same dimensions; several must be `Judge`s, unless `joint` is named.
        joint: makes one scorer of several judges, their scores side by side. The others are those of `measure`.

    Returns:
        The measurements, in order. With several judges scores may differ in rounding from those of each alone.

    Raises:
        PrismError: as `measure`; for no judges, or judges on different backbones or of different dimensions.
    """
    num_draws, batch_size = whole("num_draws", num_draws, 1, DRAWS), whole("batch_size", batch_size)
    seed, progress = whole("seed", seed, 0, SEEDS), flag("progress", progress)
    for judge in judges:
        check_judge(judge)
    if not judges:
        raise PrismError("There is no judge to measure: give at least one.")
    first, scorer = judges[0], judges[0] if len(judges) == 1 else joint(judges)
    store = LatentStore.of(store)
    levels = _levels(first, timesteps)
    dimensions = _labelled(first, store)
    groups = store.groups(split, list(dimensions))
    if not groups:
        raise PrismError(
            f"The store {store.folder} has no labelled pairs in the split {split}, "
            f"but in: {', '.join(sorted(set(store.pairs['split'].to_pylist()))) or 'none'}; measure another split, or "
            "make the store with more prompts or larger shares (held_out)."
        )
    validation = store.groups("validation", list(dimensions)) if split != "validation" else groups
    if split != "train":
        for judge in judges:
            _check_leak(judge, [*groups, *validation], store)

    everything = list({group.prompt: group for group in [*groups, *validation]}.values())
    passes = [(t, num_draws if t else 1) for t in levels]
    videos = sum(len(group.videos) for group in everything)
    label = f"evaluate {first.name if len(judges) == 1 else f'{len(judges)} judges'}"
    total, team = sum(draws for _, draws in passes) * videos, Team() if team is None else team
    hidden = None if progress and team.first else True
    with first.backbone.freed(), tqdm(total=total, desc=label, unit="video", disable=hidden) as bar:
        scored = score_levels(scorer, store, everything, passes, seed, batch_size, bar, team)
    facts, units = facts_of(store, [video for video, _ in videos_of(everything)])
    if decode and not first.backbone.family.sampling_rate:  # sounds have no brightness
        facts |= decoded_facts(first.backbone, store, videos_of(everything), facts, team)
        units |= {probe: COLUMNS[probe][1] for probe in ("brightness", "motion")}
    log_snr = [_log_snr(first, t) for t in levels]
    measured = []
    for number, judge in enumerate(judges):
        columns = {name: column + number * len(first.dimensions) for name, column in dimensions.items()}
        table = partial(
            pair_table, store, judge=judge.name, dimensions=columns, levels=levels, scores=scored, facts=facts
        )
        about = {
            "head_seed": judge.trained_on.get("seed"),
            "source": judge.trained_on.get("source", "untrained"),
            "eta": float(judge.eta),
            "dimensions": list(dimensions),
            "calibration": dict(getattr(judge, "calibration", {})),
            "levels": list(levels),
            "log_snr": log_snr,
            "units": units,
        }
        tuning = table("validation") if split != "validation" and validation else None
        settings = {"split": split, "num_draws": num_draws, "seed": seed}
        measured.append(Measurement([], table(split), settings, tuning, about))
        measured[-1].rows.extend(accuracy_rows(measured[-1]))
    return measured


def check_judge(judge: Any) -> None:
    """Raise PrismError for an object that is no judge, such as a judge's folder, which has no pipeline."""
    if not all(hasattr(judge, name) for name in ("backbone", "dimensions", "score", "trained_on")):
        raise PrismError(
            f"A judge on a pipeline is needed, found {type(judge).__name__}; put one there with "
            "Judge.from_pretrained(head, pipe)."
        )


def _labelled(judge: Scorer, store: LatentStore) -> dict[str, int]:
    """The judge's dimensions that the store has labels of, each with its column among the scores."""
    columns = {name: column for column, name in enumerate(judge.dimensions) if name in store.dimensions}
    missing = [name for name in judge.dimensions if name not in columns]
    if not columns:
        raise PrismError(
            f"The judge scores {', '.join(judge.dimensions)}, and the pairs of {store.folder} have labels of "
            f"{', '.join(store.dimensions) or 'nothing'}; measure a judge that scores one of these."
        )
    if missing:
        warnings.warn(
            f"The pairs of {store.folder} have no labels of {', '.join(missing)}, which the judge scores; they are "
            "left out.",
            stacklevel=3,
        )
    return columns


def _levels(judge: Scorer, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    """The noise levels to evaluate at, all within the range of t that the denoiser is used for."""
    if timesteps is not None:
        return noise_levels(judge.backbone, timesteps)
    low, high = getattr(judge.backbone, "t_range", (0.0, 1000.0))
    return tuple(t for t in TIMESTEPS if low <= t <= high) or ((low + high) / 2,)


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
    team: Team | None = None,
) -> list[dict[str, np.ndarray]]:
    """Scores of the groups' videos, one dict per level as `score_videos` returns it.

    passes: pairs of a level and the number of noise draws at it.
    team: the processes that share the batches. Batches and scores are the same for any number of processes.

    A batch is scored at all levels before the next one: its latents are read and its prompts encoded once.
    """
    team = Team() if team is None else team
    batches = batches_of(store, videos_of(groups), batch_size)

    def mine() -> list[dict[str, np.ndarray]]:
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
                        total = total + scores_of(judge, store, batch, noisy, t)
                        if bar is not None:
                            bar.update(len(batch) * team.size)
                    scored.append(total / draws)
            except Exception:
                if bar is not None:
                    bar.update(before - bar.n)  # `in_batches` may try the batch again in halves
                raise
            for scores, rows in zip(by_level, scored):
                scores.update(zip(videos, rows))

        rows = batch_size
        for batch in batches[team.rank :: team.size]:
            rows = in_batches(batch, rows, work, "evaluating")
        return by_level

    parts = team.agree(mine)
    return [{video: row for part in parts for video, row in part[level].items()} for level in range(len(passes))]


def batches_of(store: LatentStore, videos: Sequence[Video], batch_size: int) -> list[list[Video]]:
    """Videos in batches of at most `batch_size`, each of one kind (shape of latents, call, image), in order."""
    buckets: dict[int, list[Video]] = {}
    for kind, video in zip(store.kinds(video for video, _ in videos).tolist(), videos):
        buckets.setdefault(kind, []).append(video)
    return [bucket[at : at + batch_size] for bucket in buckets.values() for at in range(0, len(bucket), batch_size)]


def scores_of(judge: Scorer, store: LatentStore, batch: Sequence[Video], noisy: Tensor, t: float) -> np.ndarray:
    """Scores (rows, num_dimensions) float64, all finite, of a batch of videos of one call, noised to level t."""
    videos, prompts = [video for video, _ in batch], [prompt for _, prompt in batch]
    call = store.call_of(videos[0])
    try:
        scores = judge.score(noisy, prompts, t, **call).double().cpu()
    except PrismError as error:
        raise PrismError(f"{error} (Its rows at t = {t:g} are the videos {_some(videos)}.)") from error
    except Exception as error:
        if not ran_out(error):
            check_call(judge.backbone, store, prompts[0], call)
        raise
    bad = ~scores.isfinite().all(1)
    if bool(bad.any()):
        raise PrismError(f"The score of video {videos[int(bad.nonzero()[0])]!r} at t = {t:g} is not a finite number.")
    rows: np.ndarray = scores.numpy()
    return rows


def check_call(backbone: Any, store: LatentStore, prompt: str, call: Mapping[str, Any] | None = None) -> None:
    """Raise PrismError where the pipeline does not take a call of the store; None: the call that most videos have."""
    try:
        backbone.condition([prompt], **(store.call if call is None else call))
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
    """Latents (B, ...) of some videos at level t, each with noise of its own (Eq. 1)."""
    drawn = torch.stack([noise(latents.shape[1:], seed, video, t, draw) for video in videos])
    noisy: Tensor = backbone.add_noise(latents, t, drawn)
    return noisy


def _some(names: Sequence[str]) -> str:
    """The first few names, cut short."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:36]} ..." for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


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


def _check_leak(judge: Scorer, groups: Sequence[PromptGroup], store: LatentStore) -> None:
    """Raise PrismError where a group's prompt is one that the head was trained on."""
    trained_on = set(judge.trained_on.get("prompt_keys", ()))
    for group in groups:
        if prompt_key(group.prompt) in trained_on:
            raise PrismError(
                f"The head was trained on the prompt {group.prompt!r} of {store.folder}; "
                "evaluate on prompts that it has not seen."
            )
