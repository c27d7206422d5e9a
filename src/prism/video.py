"""Frames in any layout converted to one, mp4 files read and written, and clips of any video file (`read_clip`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from prism.clips import MOST_BYTES, Clip, ClipInfo, FramePolicy, probe, read_clip
from prism.errors import PrismError, number, quoted, whole

__all__ = ["Clip", "ClipInfo", "FramePolicy", "frames", "probe", "read_clip", "read_video", "videos", "write_video"]

FPS = (0.1, 240.0)  # frames per second that a file may have
_TOLERANCE = 0.5 / 255  # how far floats may lie outside [0, 1]: half a grey level, for rounding in half precision
_CHANNELS = (3, 4, 1)  # colour, colour and alpha, grey


def frames(video: Any, name: str = "The video") -> np.ndarray:
    """Frames of any library and layout as (T, H, W, 3) float32 in [0, 1].

    Takes a list of PIL images of any mode, or arrays and tensors (of any dtype, on any device, or lists of them) in the
    layouts (T, H, W, C), (T, C, H, W), (C, T, H, W), for one picture (H, W, C), (C, H, W) or (H, W), and with a batch
    axis of 1 in front. C is 3, 4 (alpha is dropped) or 1 (grey). If several axes could be the channels, an axis of size
    3 is preferred to one of 4 or 1; among equal sizes the last axis, then the one after the frames, then the first. An
    array of three axes none of which can be channels is grey frames (T, H, W).

    Items of a list or iterator are frames in the layouts of one picture; a list of one video is that video.

    Floats are in [0, 1]; values outside by up to half a grey level are clipped. Bytes, and whole numbers up to 255, are
    in [0, 255]; uint16 with larger values in [0, 65535].

    Raises `PrismError`, which begins with `name`, for other ranges, NaN, other shapes, or other types.
    """
    try:
        array = _array(video, name)
    except PrismError:
        raise
    except Exception as error:  # a closed or broken picture, a tensor without numbers, an iterator that fails
        raise PrismError(
            f"{name} cannot be read as frames ({type(error).__name__}: {quoted(error, 120)}); PIL images, arrays or "
            "tensors are needed."
        ) from error
    return _scaled(_arranged(array, name), name)


def videos(batch: Any, name: str = "The video") -> np.ndarray:
    """Videos of one size as (B, T, H, W, 3) float32 in [0, 1]: from an array of five axes, a list of videos as `frames`
    takes them, or a single video. Raises `PrismError` as `frames` does.
    """
    axes = len(batch.shape) if hasattr(batch, "shape") else None
    if axes != 5 and (
        axes is not None or _is_image(batch) or not isinstance(batch, Iterable) or isinstance(batch, str | bytes)
    ):
        batch = [batch]
    elif axes != 5:
        batch = list(batch)
        several = bool(batch) and (isinstance(batch[0], list | tuple) or len(getattr(batch[0], "shape", ())) > 3)
        batch = batch if several or not batch else [batch]
    arrays = [frames(video, f"{name} of row {row}" if len(batch) > 1 else name) for row, video in enumerate(batch)]
    sizes = sorted({video.shape[:3] for video in arrays})
    if len(sizes) != 1:
        raise PrismError(f"{name}s have the sizes {quoted(sizes, 120)}; videos of one size are needed.")
    return np.stack(arrays)


def write_video(
    path: str | os.PathLike[str],
    video: Any,
    fps: float,
    crf: int = 10,
    sound: tuple[np.ndarray, int] | None = None,
) -> None:
    """Write a video, as `frames` takes it, as an H.264 mp4 that browsers play (yuv420p, near-lossless by default).

    An odd H or W loses its last row or column, as yuv420p needs even sizes. fps: frames per second, 0.1 to 240.
    crf: x264's constant rate factor, 0 (lossless) to 51. sound: a waveform (1 or 2 channels, samples) in [-1, 1] and
    its samples per second, written beside the video as AAC, resampled where AAC has no such rate.
    Raises `PrismError` as `frames` does, for an fps or crf out of range, or if the file cannot be written.
    """
    import av

    rate = Fraction(number("fps", fps, *FPS)).limit_denominator(1000)
    array = frames(video, f"The video for {quoted(path, 120)}")
    pixels = (array * 255).round().astype(np.uint8)
    for axis in (1, 2):  # a single row or column is repeated, for an even size
        pixels = np.repeat(pixels, 2, axis) if pixels.shape[axis] == 1 else pixels
    pixels = np.ascontiguousarray(pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2])
    crf = whole("crf", crf, 0, 51)
    try:
        name = os.fsdecode(path)
        if "\0" in name:  # FFmpeg would cut the name there
            raise ValueError("its name holds a null character")
        with av.open(f"file:{name}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(crf), "preset": "medium"}
            form = "mono" if sound is not None and len(sound[0]) == 1 else "stereo"
            track = None if sound is None else container.add_stream("aac", rate=_aac_rate(sound[1]), layout=form)
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
            if sound is not None and track is not None:
                wave = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[0], np.float32), "fltp", form)
                wave.sample_rate, wave.pts = sound[1], 0  # so that a player leaves out the encoder's delay
                container.mux([*track.encode(wave), *track.encode()])
    except (OSError, ValueError, TypeError, av.FFmpegError) as error:
        raise PrismError(f"The video {quoted(str(path))} cannot be written: {_reason(error)}.") from error


def _aac_rate(rate: int) -> int:
    """The lowest rate from `rate` on that AAC has, or its highest; PyAV resamples."""
    import av

    rates = av.Codec("aac", "w").audio_rates or [rate]
    return min((each for each in rates if each >= rate), default=max(rates))


def read_video(path: Any) -> np.ndarray:
    """Every frame of a video (any source of `read_clip`) as (T, H, W, 3) float32 in [0, 1]. Raises `PrismError` as
    `read_clip` does, and for frames of more than 4 GiB; `read_clip` reads a part of such a video, or a smaller size.
    """
    frames = read_clip(path).frames
    if frames.size * 4 > MOST_BYTES:
        raise PrismError(
            f"The video {quoted(path)} is more than {MOST_BYTES / 2**30:.3g} GiB as float32 frames; read part of it, "
            "or a smaller size, with prism.video.read_clip."
        )
    read = frames.astype(np.float32)
    read /= np.float32(255)
    return read


def _reason(error: Exception) -> str:
    return quoted(getattr(error, "strerror", None) or error).rstrip(".")


# -- conversion of layouts and ranges


def _is_image(value: Any) -> bool:
    return hasattr(value, "mode") and hasattr(value, "convert")  # a PIL image, without importing PIL


def _array(value: Any, name: str) -> np.ndarray:
    """An array of numbers with unchanged values; pictures of a list are stacked."""
    if _is_image(value):
        deep = value.mode.startswith(("I", "F"))  # grey of more than 8 bits, which PIL would clip
        return np.asarray(value if deep else value.convert("RGB"))
    if isinstance(value, str | bytes | os.PathLike):
        raise PrismError(f"{name} is given as {quoted(value, 80)}; read a file with prism.video.read_video.")
    # A torch tensor, without importing torch; NumPy has no bfloat16.
    if hasattr(value, "detach") and hasattr(value, "is_floating_point"):
        value = value.detach().cpu()
        value = value.dequantize() if value.is_quantized else value
        value = value.to_dense() if value.is_sparse else value
        value = (value.float() if value.is_floating_point() else value).resolve_conj().resolve_neg().numpy()
    if isinstance(value, Sequence) or (isinstance(value, Iterable) and not hasattr(value, "__array__")):
        pictures = list(value)
        if pictures and not isinstance(pictures[0], int | float):
            arrays = [_frame(_array(picture, name), picture) for picture in pictures]
            kinds = sorted({f"{array.shape} {array.dtype}" for array in arrays})
            if len(kinds) > 1:
                raise PrismError(f"{name} has frames of several kinds, {quoted(', '.join(kinds), 120)}; one is needed.")
            return np.stack(arrays)
        value = pictures
    try:
        array = np.asarray(value)
    except Exception:
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise PrismError(f"{name} is {quoted(value, 80)}; frames are needed: PIL images, arrays or tensors.")
    return array


def _frame(array: np.ndarray, item: Any) -> np.ndarray:
    """(H, W, 3) of a list's item that is one picture; else the item. So the axis of the list is never the channels."""
    if isinstance(item, list | tuple) or array.ndim not in (2, 3):
        return array
    if array.ndim == 3:
        channels = next((axis for size in _CHANNELS for axis in (2, 0) if array.shape[axis] == size), None)
        if channels is None:
            return array
        array = np.moveaxis(array, channels, 2)[..., :3]
    return np.repeat(array.reshape(*array.shape[:2], -1), 3, 2) if array.ndim == 2 or array.shape[2] == 1 else array


def _arranged(array: np.ndarray, name: str) -> np.ndarray:
    """(T, H, W, 3) of an array in any of the layouts of `frames`."""
    shape = array.shape
    if array.ndim == 5 and len(array) == 1:
        array = array[0]
    if array.ndim == 5:
        raise PrismError(f"{name} has shape {shape}, which is {shape[0]} videos; give one of them.")
    picture = array.ndim == 3 and any(array.shape[axis] in _CHANNELS for axis in (2, 0))
    if array.ndim == 2 or picture:
        array = array[None]  # one frame
    if array.ndim == 3:
        array = array[..., None]  # grey frames
    axes = (3, 1) if picture else (3, 1, 0)
    channels = next(
        (axis for size in _CHANNELS for axis in axes if array.ndim == 4 and array.shape[axis] == size), None
    )
    if channels is None or 0 in array.shape:
        raise PrismError(
            f"{name} has shape {shape}; (frames, height, width, 3) or (frames, 3, height, width) is needed."
        )
    array = np.moveaxis(array, channels, 3)
    return np.repeat(array, 3, 3) if array.shape[3] == 1 else array[..., :3]


def _scaled(array: np.ndarray, name: str) -> np.ndarray:
    """An array of any kind of numbers as float32 in [0, 1]."""
    kind = array.dtype.kind
    if kind == "f" and not np.isfinite(array).all():
        raise PrismError(f"{name} holds NaN or infinity.")
    if kind == "b":
        return array.astype(np.float32)
    low, high = array.min(), array.max()
    if kind in "iu":
        most = 255 if high <= 255 else 65535
        if low < 0 or high > most or (most > 255 and (kind, array.itemsize) != ("u", 2)):
            raise PrismError(
                f"{name} holds whole numbers from {low} to {high}; 0 to 255 is needed, or uint16 up to 65535."
            )
        return array.astype(np.float32) / np.float32(most)
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        advice = "values in [0, 1] are needed"
        if low >= -1 - _TOLERANCE and high <= 1 + _TOLERANCE:
            advice = "it seems to be scaled to [-1, 1]; give video / 2 + 0.5"
        elif low >= 0 and 2 < high <= 255:
            advice = "it seems to be scaled to [0, 255]; give video / 255, or whole numbers"
        raise PrismError(f"{name} holds values from {low:.3g} to {high:.3g}; {advice}.")
    return array.astype(np.float32, copy=False).clip(0, 1)
