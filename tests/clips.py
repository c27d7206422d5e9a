"""Small files of every kind of video: frame i is of the grey level 8 i + 4, so that a frame tells its number."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

KINDS = {  # ending -> (codec, pixel format, options)
    "h264.mp4": ("libx264", "yuv420p", {"bf": "2", "g": "12"}),
    "faststart.mp4": ("libx264", "yuv420p", {"g": "6"}),
    "odd444.mp4": ("libx264", "yuv444p", {"g": "12"}),
    "hevc10.mp4": ("libx265", "yuv420p10le", {"x265-params": "log-level=none:keyint=8"}),
    "h264-10bit.mkv": ("libx264", "yuv422p10le", {"g": "12"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "8"}),
    "ffv1.mkv": ("ffv1", "bgr0", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"qmin": "1", "qmax": "2", "b": "4000000"}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {"qmin": "1", "qmax": "2"}),
    "h264.ts": ("libx264", "yuv420p", {"g": "12"}),
    "h264.flv": ("libx264", "yuv420p", {"g": "12"}),
}


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), 8 * number + 4, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of frames (T, H, W, 3), by the grey level of their middles; each must be even and sure."""
    rows, columns = frames.shape[1] // 4, frames.shape[2] // 4
    levels = frames[:, rows : -rows or None, columns : -columns or None].reshape(len(frames), -1).astype(float)
    assert levels.std(1).max() < 3
    found = (levels.mean(1) - 4) / 8
    assert np.abs(found - found.round()).max() < 0.4
    return [int(value) for value in found.round()]


def movie(path, count=24, kind="h264.mp4", rate=8, size=(48, 64), stamps=None, draw=picture, before=None, **options):
    """Write a video file; `stamps`: milliseconds at which frames begin; `before(stream)`: settings of one's own."""
    codec, pixels, settings = KINDS[kind]
    with av.open(str(path), "w", options={k: str(v) for k, v in options.items()}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.options = settings
        if stamps is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if before:
            before(stream)
        for number in range(count):
            array = draw(number, *size)
            frame = av.VideoFrame.from_ndarray(array, format="rgba" if array.shape[2] == 4 else "rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
