"""The frames of a video that a teacher looks at, and their size, by the rules of the published code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prism.errors import PrismError, number, quoted


def check(videos: Sequence[np.ndarray], prompts: Sequence[str], name: str, least: int = 1) -> None:
    """Raise PrismError for videos that are not (T, H, W, 3) uint8 with at least `least` frames, and for prompts that
    are not one text per video. The error names the teacher and the position of the video.
    """
    if isinstance(prompts, str) or len(videos) != len(prompts):
        count = "one text" if isinstance(prompts, str) else len(prompts)
        raise PrismError(f"The teacher {name} needs a prompt for each video; found {count} for {len(videos)}.")
    for position, (video, prompt) in enumerate(zip(videos, prompts)):
        shape, dtype = getattr(video, "shape", None), getattr(video, "dtype", type(video).__name__)
        if not isinstance(video, np.ndarray) or video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise PrismError(
                f"The teacher {name} takes frames (T, H, W, 3) of uint8; video {position} is {quoted(shape, 40)} of "
                f"{quoted(dtype, 40)}."
            )
        if len(video) < least or 0 in video.shape:
            raise PrismError(
                f"The teacher {name} needs {least} {'frame' if least == 1 else 'frames'} at least; video {position} "
                f"is {quoted(shape, 40)}."
            )
        if not isinstance(prompt, str):
            raise PrismError(f"The teacher {name} takes prompts of text; number {position} is {quoted(prompt, 60)}.")


def rate(fps: float | None, name: str) -> float:
    """The videos' frames per second, for a teacher that samples by time. Raises PrismError where it is unknown."""
    if fps is None:
        raise PrismError(
            f"The teacher {name} samples frames by time and was not told the videos' rate; give their frames per "
            "second."
        )
    return number(f"The frame rate for the teacher {name}", fps, 0, 1e4, above=True)


def by_time(total: int, fps: float, per_second: float = 2.0, floor: bool = True) -> np.ndarray:
    """Positions of frames that are sampled by time, as in qwen-vl-utils: an even number from 4 to 768, at most `total`,
    spread evenly from the first frame to the last.

    Args:
        total: frames of the video, at least 2.
        fps: of the video.
        per_second: frames to take per second.
        floor: round an odd count down to an even one; False: to the nearer even one, as in VideoAlign's copy.
    """
    most = min(768, total) // 2 * 2
    count = min(max(total / fps * per_second, 4), most)
    even = (math.floor(count / 2) if floor else round(count / 2)) * 2
    return spread(total, max(2, min(even, total)))


def spread(total: int, count: int) -> np.ndarray:
    """`count` positions from the first of `total` frames to the last, rounded."""
    return torch.linspace(0, total - 1, count).round().long().numpy()


def fitted(size: Sequence[int], least: int, most: int, factor: int = 28) -> tuple[int, int]:
    """The height and width nearest to a frame's `size` that are multiples of `factor` and have from `least` to `most`
    pixels in all (smart_resize of Qwen2-VL). Raises PrismError where one side is over 200 times the other.
    """
    height, width = size
    if max(height, width) > 200 * min(height, width):
        raise PrismError(f"A frame of {height} x {width} is too thin for this teacher: its sides differ 200 times.")
    rows, columns = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if rows * columns > most:
        scale = math.sqrt(height * width / most)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < least:
        scale = math.sqrt(least / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def resized(video: np.ndarray, height: int, width: int, whole: bool = True) -> Tensor:
    """Frames (T, H, W, 3) of uint8 as (T, 3, height, width) float32 from 0 to 255: bicubic, antialiased.

    whole: round to whole numbers from 0 to 255, as libraries do that resize pictures; those that resize floats do not,
        and leave the range a little.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255) if whole else pixels
    return pixels


def some(video: np.ndarray, count: int) -> np.ndarray:
    """`count` frames of a video, evenly spread from the first to the last; all frames of a shorter video."""
    return video[spread(len(video), min(count, len(video)))]


def square(video: np.ndarray, side: int) -> Tensor:
    """Frames (T, H, W, 3) of uint8, resized so that the shorter side is `side` and cropped to the middle square:
    (T, 3, side, side), whole numbers from 0 to 255 (BLIP's preprocessing).
    """
    height, width = video.shape[1:3]
    rows, columns = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    top, left = round((rows - side) / 2), round((columns - side) / 2)
    return resized(video, rows, columns)[..., top : top + side, left : left + side]


def letterbox(video: np.ndarray, side: int) -> Tensor:
    """Frames (T, H, W, 3) of uint8, whole on black squares: (T, 3, side, side), 0 to 255 (HPSv2's preprocessing)."""
    height, width = video.shape[1:3]
    rows, columns = (max(1, round(size * side / max(height, width))) for size in (height, width))
    above, left = (side - rows) // 2, (side - columns) // 2
    return F.pad(resized(video, rows, columns, whole=False), (left, side - columns - left, above, side - rows - above))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels (T, 3, H, W) from 0 to 255, normalised by each channel's mean and deviation (on a scale of 0 to 1)."""
    return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
