"""What the judge says of a clip that somebody brings: scores, their place in the reference, where the query looks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prism import files
from prism.errors import PrismError
from prism.report.page import film
from prism.serving.comparisons import PLAYED

if TYPE_CHECKING:
    from prism.judge.scoring import VideoScores

DRAWS = 4  # noise draws per level, as of prism score
FRAMES = 8  # of a strip
TINT = np.array([255.0, 92.0, 26.0])


@dataclass(frozen=True)
class Judged:
    """A clip as the judge reads it.

    frames: (T, H, W, 3) uint8. scores: of this one clip. level: the noise level of `attention`, (T', H', W') weights on
    the token grid; None for heads that have no query.
    """

    frames: np.ndarray
    scores: VideoScores
    level: float
    attention: np.ndarray | None

    def strip(self) -> np.ndarray:
        """A film strip (H, W, 4) uint8 of the frames, warm where the query looks."""
        shown = self.frames if self.attention is None else overlaid(self.frames, self.attention)
        return film(shown, FRAMES)


def judged(
    judge: Any, path: str, prompt: str, call: Mapping[str, Any], image: str | None = None, draws: int = DRAWS
) -> Judged:
    """Read a clip as `prism score` does, and judge it.

    Raises:
        PrismError: for a clip that cannot be read, and a prompt or image that the pipeline lacks.
    """
    from prism.backbone.arguments import normalised
    from prism.backbone.videos import call_frames, encode_frames
    from prism.clips import read_clip
    from prism.judge.scoring import content_key, noise

    backbone = judge.backbone
    if backbone.family.takes_prompts and not prompt.strip():
        raise PrismError("Say what the clip should show: the judge needs its prompt.")
    policy, arguments = call_frames(backbone, dict(call))
    if image is not None:
        arguments = {**arguments, **normalised({"image": image})}
    frames = read_clip(path, policy).frames
    scores = judge.score_video([frames], prompt, None, draws, **arguments)
    level = float(scores.levels[0])
    attention = None
    try:
        shape = backbone.condition([prompt], **arguments).shape
        latents = encode_frames(backbone, frames, shape)
        drawn = noise(latents.shape[1:], 0, content_key(frames), level, 0)[None].to(latents)
        noisy = backbone.add_noise(latents, level, drawn)
        attention = judge.attention(noisy, prompt, level, **arguments)[0].float().cpu().numpy()
    except PrismError:
        if any(member.head.aggregation == "query" for member in judge.members):
            raise
    return Judged(frames, scores, level, attention)


def overlaid(frames: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Frames dimmed, and warm where the weights are large.

    Args:
        frames: (T, H, W, 3) uint8.
        attention: (T', H', W') weights; each is laid over its share of the frames.

    Returns:
        (T, H, W, 3) uint8.
    """
    count, height, width = frames.shape[:3]
    light = torch.from_numpy(np.ascontiguousarray(attention)).float()[None, None]
    size = (min(count, FRAMES * 4), height, width)
    light = torch.nn.functional.interpolate(light, size, mode="trilinear", align_corners=False)[0, 0]
    weight = (light / light.max().clamp(min=1e-12)).clamp(0, 1).numpy()[..., None] ** 0.8
    weight = weight[np.linspace(0, len(weight) - 1, count).round().astype(int)]
    grey = frames.mean(-1, keepdims=True)
    dimmed = 0.35 * grey + 0.35 * frames
    lit: np.ndarray = dimmed * (1 - weight) + weight * (0.7 * TINT + 0.5 * frames)
    return lit.clip(0, 255).astype(np.uint8)


def opinion(judge: Any, left: VideoScores, right: VideoScores) -> dict[str, dict[str, float]]:
    """Per dimension the mean scores of two clips over the levels, and the mean probabilities of left, tie and right
    (Eq. 3-4) over these."""
    margins = left.scores[0] - right.scores[0]  # (levels, num_dimensions)
    shares = judge.probabilities(margins).double().mean(0)
    return {
        name: {
            **{"left": float(left.scores[0, :, column].mean()), "right": float(right.scores[0, :, column].mean())},
            **dict(zip(("p_left", "p_tie", "p_right"), shares[column].tolist())),
        }
        for column, name in enumerate(left.dimensions)
    }


def playable(path: str) -> Path:
    """The file of a clip that a browser plays: itself, or an mp4 beside it in a folder of its own."""
    from prism.video import read_clip, write_video

    file = Path(path)
    if file.suffix.lower() in PLAYED:
        return file
    clip = read_clip(path)
    target = Path(tempfile.mkdtemp(prefix="prism-shown-")) / f"{file.stem}.mp4"
    with files.new_file(target) as work:
        write_video(work, clip.frames, clip.fps or 8.0, crf=16)
    return target
