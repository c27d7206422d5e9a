"""Facts of clips that a judge may be biased by: length, rate, resolution, brightness, motion.

They come from columns of the store's videos, which `prism encode` writes. Where these are missing, length and
resolution come from the call of each video. Brightness and motion are measured on frames, as latents of different VAEs
cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from prism.clips import brightness_and_motion
from prism.errors import PrismError
from prism.preference import LatentStore
from prism.team import Team

COLUMNS = {
    "length": ("clip_seconds", "seconds"),
    "rate": ("clip_fps", "frames per second"),
    "resolution": ("clip_pixels", "pixels per frame"),
    "brightness": ("clip_brightness", "mean luma, 0 to 1"),
    "motion": ("clip_motion", "mean change of luma from frame to frame, 0 to 1"),
}
"""Probe -> column of the store's videos, and its unit."""
PROBES = tuple(COLUMNS)


def facts_of(store: LatentStore, videos: Iterable[str]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Facts of videos, probe -> video -> number, as far as the store has them, and the unit of each probe."""
    requested = set(videos)
    ids = store.videos["video"].to_pylist()
    facts: dict[str, dict[str, float]] = {}
    units: dict[str, str] = {}
    for probe, (column, unit) in COLUMNS.items():
        if column in store.videos.column_names and _is_number(store.videos[column].type):
            values = store.videos[column].cast(pa.float64()).to_pylist()
            facts[probe] = {
                video: value
                for video, value in zip(ids, values)
                if value is not None and np.isfinite(value) and video in requested
            }
            units[probe] = unit
    fallbacks = (("length", "frames", ("num_frames",)), ("resolution", COLUMNS["resolution"][1], ("height", "width")))
    for probe, unit, names in fallbacks:
        if not facts.get(probe):
            calls = {video: store.call_of(video) for video in ids if video in requested}
            facts[probe] = {
                video: float(np.prod([call[name] for name in names]))
                for video, call in calls.items()
                if all(isinstance(call.get(name), int) for name in names)
            }
            units[probe] = unit
    return {probe: values for probe, values in facts.items() if values}, units


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def decoded(backbone: Any, store: LatentStore, video: str, prompt: str) -> tuple[float, float]:
    """Brightness and motion of one video, decoded from its latents by the backbone's VAE."""
    call = store.call_of(video)
    latents: Tensor = store.latents([video])
    try:
        frames = backbone.decode(latents, num_frames=call.get("num_frames"))
    except PrismError:  # packed latents need the token grid, which costs a text encoding
        grid = backbone.condition([prompt], **call).grid
        frames = backbone.decode(latents, grid, call.get("num_frames"))
    return brightness_and_motion((frames[0] * 255).round().byte().cpu().numpy())


def decoded_facts(
    backbone: Any,
    store: LatentStore,
    videos: Sequence[tuple[str, str]],
    facts: Mapping[str, Mapping[str, float]],
    team: Team,
) -> dict[str, dict[str, float]]:
    """Brightness and motion of all videos, probe -> video -> number, measured on decoded frames where `facts` lacks
    them.

    videos: (video, prompt) each. team: the processes that share the decoding.
    """
    probes = ("brightness", "motion")
    lacking = [each for each in videos if not all(each[0] in facts.get(probe, {}) for probe in probes)]
    mine = lacking[team.rank :: team.size]
    parts = team.agree(lambda: {video: decoded(backbone, store, video, prompt) for video, prompt in mine})
    values = {video: pair for part in parts for video, pair in part.items()}
    return {
        probe: {**facts.get(probe, {}), **{video: pair[i] for video, pair in values.items()}}
        for i, probe in enumerate(probes)
    }
