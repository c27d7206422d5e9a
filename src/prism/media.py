"""Videos in and out of mp4 files."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from prism.errors import PrismError


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: float) -> None:
    """Write `frames`, (T, H, W, 3) floats in [0, 1], as an H.264 mp4 that browsers play (yuv420p, near-lossless).

    H and W that are odd lose their last row or column: yuv420p needs even sizes.
    Raises `PrismError` where the frames are no such array, hold NaN, or the file cannot be written.
    """
    import av

    array = np.asarray(frames, dtype=np.float32)
    if array.ndim != 4 or array.shape[-1] != 3 or min(array.shape) == 0 or min(array.shape[1:3]) < 2:
        raise PrismError(f"The video for {path} has shape {array.shape}; (frames, height, width, 3) is needed.")
    if not np.isfinite(array).all():
        raise PrismError(f"The video for {path} holds NaN or infinity; it is not written.")
    pixels = (array.clip(0, 1) * 255).round().astype(np.uint8)
    pixels = np.ascontiguousarray(pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2])
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "10", "preset": "medium"}
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    except (OSError, av.FFmpegError) as error:
        raise PrismError(f"The video {path} cannot be written: {error.strerror or error}.") from error


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """Read every frame of a video file as (T, H, W, 3) float32 in [0, 1]. Raises `PrismError` where it cannot."""
    import av

    if not Path(path).is_file():
        raise PrismError(f"The video {path} does not exist.")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise PrismError(f"The file {path} holds no video.")
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError) as error:
        raise PrismError(f"The video {path} cannot be read: {error.strerror or error}.") from error
    if not pictures:
        raise PrismError(f"The video {path} holds no frames.")
    return np.stack(pictures).astype(np.float32) / 255
