"""Pipelines that make sounds: what cannot be asked of them, their sounds as files, and sounds beside a video."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile

from prism.backbone.family import Family
from prism.backbone.pipeline import config_of
from prism.errors import PrismError, quoted


def check_pictures(pipe: Any, family: Family) -> None:
    """Raise PrismError for a pipeline of sounds, of which nothing that needs pictures can be asked."""
    if family.sampling_rate:
        raise PrismError(
            f"{type(pipe).__name__} makes sounds, which have no frames to encode, decode, preview or show to a reward; "
            "score its latents, or take the winner's sound of best_of_n."
        )


def sampling_rate(pipe: Any, family: Family) -> int:
    """Samples per second of the sounds that a pipeline makes; 0 for one of videos or images."""
    return rate_of(pipe, family.sampling_rate)


def soundtrack(pipe: Any, family: Family, output: Any) -> tuple[np.ndarray, int] | None:
    """The sound beside the first video of a pipeline's output, (channels, samples) float32 in [-1, 1], and its samples
    per second; None where the pipeline makes none."""
    rate = rate_of(pipe, family.soundtrack_rate)
    if not rate or len(output) < 2:  # an output holds no sound where none was asked for
        return None
    return np.atleast_2d(torch.as_tensor(output[1][0]).float().clamp(-1, 1).cpu().numpy()), rate


def rate_of(pipe: Any, path: str) -> int:
    """The number in a field of a part's configuration ("vae.sampling_rate"); 0 where there is none."""
    part, _, name = path.partition(".")
    return int(config_of(getattr(pipe, part, None)).get(name, 0)) if path else 0


def write_sound(path: str | os.PathLike[str], sound: Any, rate: int) -> None:
    """Write a waveform (channels, samples) or (samples,), full scale in [-1, 1], as a WAV file of 32-bit floats.

    Raises PrismError for another shape, NaN or infinity.
    """
    samples = np.asarray(sound, np.float32)
    if samples.ndim not in (1, 2) or not samples.size or not np.isfinite(samples).all():
        raise PrismError(f"The sound must be finite numbers (channels, samples); found {quoted(samples, 80)}.")
    wavfile.write(path, rate, samples.T)
