"""Clips: frames of a video file, chosen and resized by a `FramePolicy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prism.clip_sources import opened
from prism.decoding import MOST_FRAMES, Decoder, Timeline
from prism.errors import PrismError, choice, number, quoted, whole

STARTS = ("first", "middle", "uniform")
FITS = ("crop", "pad", "stretch")
MOST_BYTES = 4 * 2**30  # largest size of a clip's frames
_CLOSE = 1e-6  # times that differ by less (in seconds) count as equal


@dataclass(frozen=True)
class FramePolicy:
    """The choice of a video's frames, and their size. Raises `PrismError` for settings that contradict each other.

    With `fps`, frames are chosen by their time stamps: for each moment the nearest frame (the earlier of two equally
    near ones). So a file of variable rate is read at a constant one, and frames of a slower file are repeated.
    """

    fps: float | None = None
    """Frames per second that are taken. None: every frame as it comes."""
    num_frames: int | None = None
    """Number of frames that are taken; a clip that has fewer is refused. None: all of the clip."""
    start: str = "middle"
    """Position of the frames in the clip: "first" from its beginning, "middle" from its centre, "uniform" evenly from
    its first frame to its last (needs num_frames and no fps)."""
    height: int | None = None
    """Pixels of a frame; None, for height and width: as the file has them."""
    width: int | None = None
    """Pixels of a frame."""
    fit: str = "crop"
    """How a frame of another shape is brought to this size: "crop" cuts off both sides equally, "pad" adds black bars,
    "stretch" distorts."""

    def __post_init__(self) -> None:
        for name, low, high in (("num_frames", 1, MOST_FRAMES), ("height", 1, 16384), ("width", 1, 16384)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(f"The frame policy's {name}", getattr(self, name), low, high))
        if self.fps is not None:
            object.__setattr__(self, "fps", number("The frame policy's fps", self.fps, 0.001, 1000))
        choice("The frame policy's start", self.start, STARTS)
        choice("The frame policy's fit", self.fit, FITS)
        if (self.height is None) != (self.width is None):
            raise PrismError(f"The frame policy has height {self.height} and width {self.width}; give both or neither.")
        if self.start == "uniform" and (self.num_frames is None or self.fps is not None):
            raise PrismError(
                f'The frame policy start="uniform" spreads num_frames over the clip: it needs num_frames and no fps; '
                f"found num_frames {self.num_frames} and fps {self.fps}."
            )


@dataclass(frozen=True)
class ClipInfo:
    """Facts of a video file."""

    height: int
    """Pixels, upright and with square pixels."""
    width: int
    """Pixels."""
    num_frames: int
    """Number of frames that the file states."""
    held: int
    """Number of frames that exist; fewer if the end of the file is missing."""
    fps: float | None
    """Mean frames per second; None for one picture and for pictures without times."""
    duration: float | None
    """Seconds from the first frame to the end of the last; None as for fps."""


@dataclass(frozen=True)
class Clip:
    """Frames of a video file."""

    frames: np.ndarray
    """(T, H, W, 3) uint8."""
    times: np.ndarray
    """(T,) seconds since the file's first frame at which each frame begins; NaN for pictures without times."""
    numbers: np.ndarray
    """(T,) the frames' indices in the file, from 0."""
    fps: float | None
    """Frames per second of `frames`; None if unknown."""
    info: ClipInfo
    """Facts of the file."""


LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32) / 255
"""Weights of red, green and blue (BT.709), of bytes."""


def brightness_and_motion(frames: np.ndarray) -> tuple[float, float]:
    """Mean luma of frames (T, H, W, 3) uint8, and the mean absolute change of a pixel's luma from frame to frame.

    Both are in [0, 1]. Motion counts all that changes: movement of things and of the camera, flicker, cuts; it is 0 of
    a single frame. Of large frames every so many pixels are taken, 128 to 255 along the shorter side.
    """
    step = max(1, min(frames.shape[1:3]) // 128)
    before, brightness, changes = None, [], []
    for frame in frames:
        luma = frame[::step, ::step] @ LUMA
        brightness.append(float(luma.mean(dtype=np.float64)))
        if before is not None:
            changes.append(float(np.abs(luma - before).mean(dtype=np.float64)))
        before = luma
    return float(np.mean(brightness)), float(np.mean(changes)) if changes else 0.0


CLIP_FACTS = ("clip_seconds", "clip_fps", "clip_pixels", "clip_brightness", "clip_motion")
"""Columns of a store's videos that say what a clip looks like."""


def clip_facts(clip: Clip) -> dict[str, float | None]:
    """The columns `CLIP_FACTS` of a file: of itself, and of the frames that were taken."""
    info = clip.info
    return _facts(info.duration, info.fps, info.height * info.width, clip.frames)


def frame_facts(frames: np.ndarray, fps: float | None = None) -> dict[str, float | None]:
    """The columns `CLIP_FACTS` of frames (T, H, W, 3) uint8 that were never a file; without fps they have no length."""
    seconds = None if fps is None else len(frames) / fps
    return _facts(seconds, fps, frames.shape[1] * frames.shape[2], frames)


def _facts(seconds: float | None, fps: float | None, pixels: int, frames: np.ndarray) -> dict[str, float | None]:
    return dict(zip(CLIP_FACTS, (seconds, fps, float(pixels), *brightness_and_motion(frames))))


def read_clip(source: Any, policy: FramePolicy | None = None, fps: float | None = None) -> Clip:
    """The frames of a video that a policy takes (default: all). The video is read frame by frame: memory holds the
    chosen frames at their final size, and one frame at the file's size.

    source: a video file of any kind that FFmpeg reads, a GIF, WebP or PNG (several pictures or one), a folder or list
    of picture files, the bytes of a file, or `FILE.parquet#COLUMN/ROW`: a cell with a file's bytes, or a struct
    {bytes, path} as the Image and Video features of datasets store it.
    fps: rate of a list or folder of pictures, which state none (default: the policy's).

    Frames are upright, with square pixels, 8 bits, and alpha over black. Raises `PrismError`, which names the clip,
    if it is no video, too short for the policy, damaged at a frame that the policy takes, or over 4 GiB as frames.
    """
    policy = FramePolicy() if policy is None else policy
    if not isinstance(policy, FramePolicy):
        raise PrismError(f"The frame policy must be a prism.video.FramePolicy; found {quoted(policy, 80)}.")
    rate = number("The fps of a clip", fps, 0.001, 1000) if fps is not None else policy.fps
    file, name = opened(source, rate)
    timeline = file.timeline()
    numbers = _taken(timeline, policy, name)
    frames, info = _decoded(file, timeline, numbers, policy, name)
    times = timeline.times[numbers] if timeline.timed else np.full(len(numbers), np.nan)
    played = policy.fps if policy.fps is not None and (timeline.timed or rate) else info.fps
    if policy.start == "uniform" and timeline.timed and times[-1] > times[0]:
        played = float((len(times) - 1) / (times[-1] - times[0]))
    return Clip(frames, times, numbers, played, info)


def probe(source: Any, fps: float | None = None) -> ClipInfo:
    """Facts of a video (any source of `read_clip`); decodes one frame. Raises `PrismError` as `read_clip` does."""
    rate = number("The fps of a clip", fps, 0.001, 1000) if fps is not None else None
    file, name = opened(source, rate)
    timeline = file.timeline()
    return _decoded(file, timeline, np.zeros(1, np.int64), FramePolicy(), name)[1]


def _taken(timeline: Timeline, policy: FramePolicy, name: str) -> np.ndarray:
    """Indices of the frames that a policy takes, ascending; a frame that is taken twice is listed twice."""
    times, count = timeline.times, len(timeline.times)
    if not timeline.whole and (policy.start != "first" or policy.num_frames is None):
        raise PrismError(
            f"{name} is damaged: it breaks off after {timeline.held} frames, and how many it had is not known; it can "
            'only be read by a frame policy with start="first" and num_frames.'
        )
    if policy.fps is None or not timeline.timed:
        needed = count if policy.num_frames is None else policy.num_frames
        if needed > count:
            raise PrismError(
                f"{name} has {count} frame{'s' if count > 1 else ''}; the frame policy takes {needed}. Give a longer "
                "video, or take fewer frames (num_frames)."
            )
        if policy.start == "uniform":
            numbers = _nearest(times, np.linspace(times[0], times[-1], needed))
        else:
            numbers = np.arange(needed) + ((count - needed) // 2 if policy.start == "middle" else 0)
    else:
        moments = max(1, int(timeline.end * policy.fps + 1e-3))
        needed = moments if policy.num_frames is None else policy.num_frames
        if needed > MOST_FRAMES or (needed - 1) / policy.fps > timeline.end + _CLOSE:
            raise PrismError(
                f"{name} lasts {timeline.end:.4g} s; the frame policy takes {needed:,} frames at {policy.fps:g} per "
                f"second, which is {needed / policy.fps:.4g} s. Give a longer video, or take fewer frames (num_frames) "
                "or more per second (fps)."
            )
        start = max(0.0, (timeline.end - needed / policy.fps) / 2) if policy.start == "middle" else 0.0
        numbers = _nearest(times, start + np.arange(needed) / policy.fps)
    if numbers[-1] >= timeline.held:
        raise PrismError(
            f"{name} is damaged: {timeline.held} of its {count} frames are there, and the frame policy takes frames up "
            f"to number {numbers[-1] + 1}; give a whole file, or take fewer frames (num_frames)."
        )
    return numbers


def _nearest(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """For each moment the index of the nearest time, the earlier one of two equally near."""
    after = np.searchsorted(times, moments).clip(1, max(1, len(times) - 1))
    before = after - 1
    after = after.clip(max=len(times) - 1)
    return np.where(times[after] - moments < moments - times[before] - _CLOSE, after, before)


def _decoded(
    file: Decoder, timeline: Timeline, numbers: np.ndarray, policy: FramePolicy, name: str
) -> tuple[np.ndarray, ClipInfo]:
    """(T, H, W, 3) uint8 of the frames by number, and the file's facts."""
    distinct = np.unique(numbers)
    frames: np.ndarray | None = None
    size, done = (0, 0), 0
    for index, pixels, ratio in file.pictures(distinct.tolist()):
        if frames is None:
            size = (pixels.shape[0], max(1, round(pixels.shape[1] * ratio)))
            height, width = policy.height or size[0], policy.width or size[1]
            if len(distinct) * height * width * 3 > MOST_BYTES:
                raise PrismError(
                    f"{name} would be {len(distinct):,} frames of {height} x {width}, over {MOST_BYTES >> 30} GiB; "
                    "give the frame policy num_frames, a lower fps, or height and width."
                )
            frames = np.zeros((len(distinct), height, width, 3), np.uint8)
        if index != distinct[done]:
            break
        _fit(frames[done], pixels, ratio, policy.fit if policy.height else "stretch")
        done += 1
    if frames is None or done < len(distinct):
        raise PrismError(
            f"{name} is damaged: frame {distinct[done] + 1} of {len(timeline.times)}, which the frame policy takes, "
            "cannot be decoded; give a whole file."
        )
    count = len(timeline.times)
    timed = timeline.timed and timeline.end > 0
    rate = (count - 1) / float(timeline.times[-1]) if timed and count > 1 else count / timeline.end if timed else None
    facts = ClipInfo(*size, count, timeline.held, rate, timeline.end if timed else None)
    return (frames if len(distinct) == len(numbers) else frames[np.searchsorted(distinct, numbers)]), facts


def _fit(out: np.ndarray, pixels: np.ndarray, ratio: float, fit: str) -> None:
    """Write a frame into (H, W, 3) of another size: bicubic, with anti-aliasing if it becomes smaller."""
    from PIL import Image

    (height, width), (rows, columns) = out.shape[:2], pixels.shape[:2]
    if (height, width) == (rows, columns) and (ratio == 1 or fit == "stretch"):
        out[:] = pixels
        return
    box, target = (0.0, 0.0, float(columns), float(rows)), (width, height)
    scales = width / (columns * ratio), height / rows
    if fit == "crop":
        wide, high = min(columns, width / max(scales) / ratio), min(rows, height / max(scales))
        left, top = (columns - wide) / 2, (rows - high) / 2
        box = (left, top, left + wide, top + high)
    elif fit == "pad":
        target = max(1, round(columns * ratio * min(scales))), max(1, round(rows * min(scales)))
        target = min(width, target[0]), min(height, target[1])
    resized = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC, box))
    top, left = (height - target[1]) // 2, (width - target[0]) // 2
    out[top : top + target[1], left : left + target[0]] = resized
