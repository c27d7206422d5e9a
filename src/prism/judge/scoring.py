"""Scores of finished videos: encoded by the backbone's VAE, re-noised to some levels, averaged over noise draws.

A video's noise is a function of its content, the seed, the level and the draw, so that its scores do not depend on the
other videos that are scored, their order or the batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone.layout import per_row
from prism.backbone.videos import call_frames, encode_frames
from prism.clips import FramePolicy, read_clip
from prism.errors import DRAWS, SEEDS, PrismError, listed, whole
from prism.judge.checks import noise_levels, trained_range
from prism.team import in_batches
from prism.video import frames

if TYPE_CHECKING:
    from prism.judge.judge import Judge

LEVELS = (699, 499)
"""Default noise levels of heads without measured accuracies: judging is best in the middle (paper, Table 1)."""


@dataclass(frozen=True)
class VideoScores:
    """Scores of videos at some noise levels, compared with the clips of the judge's reference if it has one."""

    levels: tuple[float, ...]
    """The noise levels, t from 0 (clean) to 1000 (noise)."""
    dimensions: tuple[str, ...]
    """The judge's dimensions."""
    scores: Tensor
    """(B, levels, num_dimensions) float64, the mean over noise draws; higher is better."""
    errors: Tensor
    """(B, levels, num_dimensions) standard error of that mean: 0 at t = 0, where no noise is drawn; NaN for a single
    draw elsewhere."""
    percentiles: Tensor | None = None
    """(B, levels, num_dimensions) from 0 to 100, NaN at levels that the reference does not have. See `Reference`."""
    win_probabilities: Tensor | None = None
    """(B, levels, num_dimensions) from 0 to 1, NaN as for percentiles. See `Reference`."""
    compared: tuple[int, ...] = ()
    """Per video the number of reference clips that it is compared with."""
    same_prompt: tuple[bool, ...] = ()
    """Per video True if these clips are of its own prompt, False if they are of all prompts of the reference."""


def score_video(
    judge: Judge,
    videos: Any,
    prompts: str | Sequence[str],
    t: float | Sequence[float] | None = None,
    num_draws: int = 4,
    seed: int = 0,
    policy: FramePolicy | None = None,
    batch_size: int = 16,
    **call: Any,
) -> VideoScores:
    """Scores of finished videos, with standard errors over noise draws and percentiles in the judge's reference.

    Args:
        videos: one or a list of what `prism.video.read_clip` takes (a file, a folder or list of pictures, bytes), or of
            frames as `prism.video.frames` takes them, which must be as many and of the size that ``call`` makes.
        prompts: one per video, or one for all.
        t: noise levels in [0, 1000]; None: those of the reference, else `default_levels`.
        num_draws: noise draws per level.
        seed: of the noise.
        policy: choice of a file's frames; None: as many consecutive frames as ``call`` makes, from the middle, cropped
            to its size.
        batch_size: rows per denoiser call; halved, with a warning, where memory runs out.
        **call: further arguments of the pipeline's call (height, num_frames, image, ...), for all videos.

    Raises:
        PrismError: where a clip cannot be read, or its frames give other latents than the pipeline makes.
    """
    items = _items(videos)
    texts = [prompts] * len(items) if isinstance(prompts, str) else listed("prompts", prompts)
    if len(texts) != len(items):
        raise PrismError(f"Each video needs its prompt; found {len(texts)} prompts for {len(items)} videos.")
    levels = default_levels(judge) if t is None else noise_levels(judge.backbone, [t] if np.ndim(t) == 0 else t, "t")
    stated, call = call_frames(judge.backbone, call)
    latents, keys = [], []
    for item, prompt in zip(items, texts):
        pixels = read_clip(item, policy or stated).frames if _is_source(item) else frames(item)
        shape = judge.backbone.condition([prompt], **call).shape  # type: ignore[union-attr]
        latents.append(encode_frames(judge.backbone, pixels, shape))
        keys.append(content_key(pixels))
    scores, errors = score_latents(judge, torch.cat(latents), keys, texts, levels, num_draws, seed, batch_size, **call)
    reference = judge.reference
    if reference is None:
        return VideoScores(levels, judge.dimensions, scores, errors)
    parts = [reference.of_prompt(text) for text in texts]
    compared = [part.beside(judge, scores[[i]], errors[[i]], levels) for i, part in enumerate(parts)]
    percentiles, wins = (torch.cat(each) for each in zip(*compared))
    counts, same = tuple(len(part.prompts) for part in parts), tuple(part is not reference for part in parts)
    return VideoScores(levels, judge.dimensions, scores, errors, percentiles, wins, counts, same)


@torch.no_grad()
def score_latents(
    judge: Judge,
    latents: Tensor,
    keys: Sequence[str],
    prompts: Sequence[str],
    levels: Sequence[float],
    num_draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    **call: Any,
) -> tuple[Tensor, Tensor]:
    """Scores of finished latents, each row under noise draws of its own (Eq. 1).

    Args:
        latents: (B, ...) normalised latents of finished videos.
        keys: per row, a text that its noise follows from: a digest of its content (`content_key`), or its name.
        prompts: one per row.
        levels: noise levels in [0, 1000].
        num_draws: noise draws per level; at t = 0, without noise, it is one.
        seed: of the noise.
        batch_size: rows per denoiser call.
        **call: further arguments of the pipeline's call.

    Returns:
        mean: (B, levels, num_dimensions) float64 on the CPU, over draws.
        error: (B, levels, num_dimensions) float64, its standard error: 0 at t = 0; NaN for a single draw elsewhere.
    """
    num_draws, batch_size = whole("num_draws", num_draws, 1, DRAWS), whole("batch_size", batch_size)
    seed = whole("seed", seed, 0, SEEDS)
    per_row(0, latents)  # refuses anything but latents
    latents = latents.cpu()
    means, errors = [], []
    with judge.backbone.held(), judge.backbone.freed():
        for t in levels:
            scores = _draws(judge, latents, keys, prompts, t, num_draws if t else 1, seed, batch_size, call)
            means.append(scores.mean(1))
            spread = scores.std(1) if num_draws > 1 and t else torch.full_like(means[-1], torch.nan if t else 0.0)
            errors.append(spread / num_draws**0.5)
    return torch.stack(means, 1), torch.stack(errors, 1)


def _draws(
    judge: Judge,
    latents: Tensor,
    keys: Sequence[str],
    prompts: Sequence[str],
    t: float,
    num_draws: int,
    seed: int,
    batch_size: int,
    call: dict[str, Any],
) -> Tensor:
    """(B, num_draws, num_dimensions) float64 scores at one level."""
    scores = torch.empty(len(latents), num_draws, len(judge.dimensions), dtype=torch.float64)

    def work(batch: Sequence[tuple[int, int]]) -> None:
        rows = [row for row, _ in batch]
        drawn = torch.stack([noise(latents.shape[1:], seed, keys[row], t, draw) for row, draw in batch])
        noisy = judge.backbone.add_noise(latents[rows], t, drawn)
        values = judge.score(noisy, [prompts[row] for row in rows], t, **call).double().cpu()
        for (row, draw), value in zip(batch, values):
            scores[row, draw] = value

    in_batches([(row, draw) for row in range(len(latents)) for draw in range(num_draws)], batch_size, work, "scoring")
    return scores


def noise(shape: Iterable[int], seed: int, key: str, t: float, draw: int) -> Tensor:
    """Noise of one video's draw at one level, the same whichever other videos are scored.

    Returns:
        (...) float32 of the shape.
    """
    text = f"{seed}/{key}/{float(t)}/{draw}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))


def content_key(video: np.ndarray) -> str:
    """Digest of a video's frames as bytes.

    Args:
        video: (T, H, W, 3) uint8, or float in [0, 1].
    """
    pixels = video if video.dtype == np.uint8 else (video * 255).round().astype(np.uint8)
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def head_digest(judge: Judge) -> str:
    """The first digits of the SHA-256 of the heads' weights, taps and shares."""
    digest = hashlib.sha256()
    for member in judge.members:
        digest.update(f"{member.tap}/{member.share}".encode())
        for name, value in member.head.state_dict().items():
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def default_levels(judge: Judge) -> tuple[float, ...]:
    """The noise levels to judge at: those of the judge's reference; without one, the two with the best saved
    accuracies; without these, those of `LEVELS` at which the head was trained and its denoiser is used."""
    low, high = judge.backbone.t_range
    if judge.reference is not None:
        return judge.reference.levels
    shares: dict[float, list[float]] = {}
    for row in judge.evaluation:
        if row.get("without_ties") is not None and low <= row["t"] <= high:
            shares.setdefault(float(row["t"]), []).append(row["without_ties"])
    if shares:
        best = sorted(shares, key=lambda t: float(np.mean(shares[t])), reverse=True)[: len(LEVELS)]
        return tuple(sorted(best, reverse=True))
    trained = trained_range(judge.trained_on)
    low, high = max(low, trained[0]), min(high, trained[1])
    return tuple(t for t in LEVELS if low <= t <= high) or ((low + high) / 2,)


def _items(videos: Any) -> list[Any]:
    """A list of videos, from one or several."""
    if isinstance(videos, str | bytes | os.PathLike) or getattr(videos, "ndim", None) == 4:
        return [videos]
    try:
        items = list(videos)
    except TypeError:
        items = [videos]
    if items and not isinstance(items[0], list | tuple) and not _is_source(items[0]) and _axes(items[0]) < 4:
        items = [items]  # the frames of one
    if not items:
        raise PrismError("There is no video to score; give at least one.")
    return items


def _axes(item: Any) -> int:
    return int(getattr(item, "ndim", 0))


def _is_source(item: Any) -> bool:
    """True for what `read_clip` takes; others are frames."""
    paths = (str, bytes, bytearray, os.PathLike)
    return isinstance(item, paths) or (isinstance(item, list | tuple) and bool(item) and isinstance(item[0], paths))
