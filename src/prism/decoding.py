"""Decoding of files frame by frame, upright: videos by PyAV, pictures and animations by PIL."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prism.errors import PrismError, quoted, reason

MOST_PIXELS = 2**26  # per frame; 8K has half of that
MOST_FRAMES = 10**6  # per file
# No playlists or lists of files, which would open other files; no formats of devices.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,nut,ivf,h264,hevc,obu,m4v,"
    "yuv4mpegpipe,dv,rm,swf,gif,apng"
)
_STILLS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")  # PIL's EPS would run Ghostscript
_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
_MATRIX, _AS_IT_IS = "DISPLAYMATRIX", np.array([1, 0, 0, 0, 1, 0, 0, 0, 1])
_FASTEST = 0.1  # duration in seconds of an animation's frame whose stated duration is 0, as in browsers


@dataclass(frozen=True)
class Timeline:
    """The times at which the frames of a file are shown."""

    times: np.ndarray
    """(frames,) seconds since the first frame, ascending, for each frame that the file states, also missing ones."""
    end: float
    """Seconds at which the last frame ends."""
    held: int
    """Number of frames that exist; fewer than `times` if the file's end is missing."""
    timed: bool = True
    """False: the file states no times; `times` are made up from the frames' numbers."""
    whole: bool = True
    """False: the file's end is missing, and its number of frames is unknown."""


class Decoder(Protocol):
    """A file whose frames can be decoded by number."""

    def timeline(self) -> Timeline: ...

    def pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray, float]]:
        """Decode the frames with these ascending numbers. Yields number, upright (H, W, 3) uint8, and the width of a
        pixel over its height; frames that cannot be decoded are left out. Alpha is blended over black.
        """


def decoder(data: str | bytes, name: str) -> Decoder:
    """The decoder of a file (its path or bytes), chosen by its first bytes. Raises `PrismError` if it is no file."""
    if isinstance(data, str):
        if os.path.exists(data) and not os.path.isfile(data):  # reading a pipe may never end
            raise PrismError(f"{name} is no file.")
        try:
            with open(data, "rb") as file:
                head = file.read(200)
        except (OSError, ValueError) as error:
            raise PrismError(f"{name} cannot be read: {_reason(error)}.") from error
    else:
        head = data[:200]
    if not head:
        raise PrismError(f"{name} is empty (0 bytes).")
    if head.startswith(b"version https://git-lfs"):
        raise PrismError(f"{name} is a pointer of Git LFS and no video; run `git lfs pull` in its repository.")
    webp, avif = head[:4] == b"RIFF" and head[8:12] == b"WEBP", head[4:12] in (b"ftypavif", b"ftypavis")
    if webp or avif or head.startswith(_BEGINNINGS):
        return Animation(data, name)
    return Movie(data, name)


class Movie:
    """A video file, decoded by PyAV: one pass over the packets for the times, and one decoding pass that starts at the
    keyframe before the first frame asked for.

    Memory holds one decoded frame at a time, besides the codec's own reference frames.
    """

    def __init__(self, data: str | bytes, name: str):
        self.name = name
        self._data = data
        self._stamps: list[int] | None = None  # time stamps of the existing frames; None: not every frame has one
        self._matrix: np.ndarray | None = None  # display matrix: rotation and flips

    def timeline(self) -> Timeline:
        with self._open() as container:
            stream, stamps, total = self._stream(container), [], 0
            length, torn, latest = 0, False, None
            cut = self._torn(container.format.name)
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except Exception:  # FFmpeg's errors where the file breaks off
                    cut = True
                    break
                if packet is None:
                    break
                if packet.size == 0:
                    continue
                total += 1
                if total > MOST_FRAMES:
                    raise PrismError(f"{self.name} has more than {MOST_FRAMES:,} frames; cut it into clips.")
                torn = bool(packet.is_corrupt)
                cut = cut or torn
                if not packet.is_discard and not torn:
                    stamps.append(packet.pts)
                    latest = packet.dts
                    length = packet.duration or length
            base = stream.time_base or 1
            rate = stream.average_rate or stream.guessed_rate or 25
            stated, stated_seconds = stream.frames or 0, _seconds(stream.metadata.get("DURATION"))
            if container.format.name == "flv" and len(container.streams) == 1 and container.duration:
                stated_seconds = container.duration / 1e6
        if not stamps:
            raise PrismError(f"{self.name} holds no frames{' that are whole' if cut else ''}.")
        timed = None not in stamps and len(set(stamps)) == len(stamps)
        times = self._times(stamps, base) if timed else np.arange(len(stamps)) / float(rate)
        spacing = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        last = float(length * base) if timed and 0 < length * base < 3600 else 0.0
        spacing = spacing or last or 1 / float(rate)
        lost = stated - total + torn if stated else 0
        if stated_seconds is not None and self._stamps:  # the duration is counted from 0 of the file's clock
            stated_seconds -= float(self._stamps[0] * base)
        short = stated_seconds is not None and stated_seconds - times[-1] > 2.5 * spacing
        if timed and latest is not None and (lost > 0 or short or cut):
            # Frames shown after the last decoding time are not reliable: missing frames may belong between them.
            sure = max(1, int(np.searchsorted(np.array(self._stamps), latest, "right")))
            lost += len(times) - sure if lost > 0 else 0
            times = times[:sure]
        if lost <= 0 and short and stated_seconds is not None:
            lost = int((stated_seconds - times[-1]) / spacing + 1e-3) - 1
        held, lost = len(times), lost if 0 < lost < MOST_FRAMES else 0
        if lost:
            times = np.concatenate([times, times[-1] + spacing * np.arange(1, lost + 1)])
        end = float(times[-1]) + (spacing if lost or not last else last)
        return Timeline(times, end, held, whole=not cut or lost > 0)

    def _times(self, stamps: list[int], base: Any) -> np.ndarray:
        """Seconds since the first frame, in the order in which they are shown."""
        self._stamps = sorted(stamps)
        return np.array([float((stamp - self._stamps[0]) * base) for stamp in self._stamps])

    def _torn(self, container: str) -> bool:
        """True for a transport stream that ends in the middle of a packet, which FFmpeg ignores."""
        size = os.path.getsize(self._data) if isinstance(self._data, str) else len(self._data)
        return container == "mpegts" and all(size % packet for packet in (188, 192, 204))

    def pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray, float]]:
        if self._stamps is None:
            yield from self._counted(numbers)
            return
        stamps = [self._stamps[number] for number in numbers]
        count = 0
        for seeking in (True, False) if numbers[0] > 0 else (False,):
            for frame, pixels in self._matching(stamps, seeking):
                yield numbers[frame], *pixels
                count += 1
            if count:
                return

    def _matching(self, stamps: list[int], seeking: bool) -> Iterator[tuple[int, tuple[np.ndarray, float]]]:
        """The frames with these time stamps; none if seeking went past the first of them."""
        index = 0
        with self._open() as container:
            stream = self._stream(container)
            if seeking:
                try:
                    container.seek(stamps[0], stream=stream)
                except Exception:
                    return
            for first, frame in enumerate(self._frames(container, stream)):
                if frame is None or frame.pts is None:
                    continue
                if seeking and first == 0 and frame.pts > stamps[0]:
                    return
                while index < len(stamps) and stamps[index] < frame.pts:  # that frame could not be decoded
                    index += 1
                if index == len(stamps):
                    return
                if frame.pts == stamps[index]:
                    yield index, self._pixels(frame, stream)
                    index += 1
                    if index == len(stamps):
                        return

    def _counted(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray, float]]:
        chosen = set(numbers)
        with self._open() as container:
            stream = self._stream(container)
            for number, frame in enumerate(self._frames(container, stream)):
                if number in chosen and frame is not None:
                    yield number, *self._pixels(frame, stream)
                if number >= numbers[-1]:
                    return

    def _open(self) -> Any:
        import av

        options = {"format_whitelist": _CONTAINERS}
        if isinstance(self._data, str):
            options["protocol_whitelist"] = "file"
        file = f"file:{self._data}" if isinstance(self._data, str) else io.BytesIO(self._data)
        try:
            return av.open(file, options=options, metadata_errors="replace")
        except Exception as error:
            raise PrismError(f"{self.name} cannot be read as a video: {_reason(error)}.") from error

    def _stream(self, container: Any) -> Any:
        stream = container.streams.best("video")
        if stream is None:
            raise PrismError(f"{self.name} holds no video.")
        if stream.codec_context is None:
            raise PrismError(f"{self.name} is of a codec that FFmpeg here cannot decode.")
        context = stream.codec_context
        if context.width * context.height > MOST_PIXELS:
            raise PrismError(
                f"{self.name} states {context.width} x {context.height} pixels; at most {MOST_PIXELS:,} are read."
            )
        context.options = {"max_pixels": str(MOST_PIXELS)}
        return stream

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Decoded frames in the order in which they are shown; None for damaged ones: from an error to the next
        keyframe.
        """
        broken = False
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
            except Exception:
                return
            try:
                frames = packet.decode()
            except Exception:  # FFmpeg's of a damaged packet
                broken = True
                continue
            for frame in frames:
                broken = broken and not frame.key_frame
                yield None if broken or frame.is_corrupt else frame

    def _pixels(self, frame: Any, stream: Any) -> tuple[np.ndarray, float]:
        try:
            if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
                pixels = _over_black(frame.to_ndarray(format="rgba"))
            else:
                pixels = frame.to_ndarray(format="rgb24")
            ratio = float(stream.sample_aspect_ratio or 1)
            if self._matrix is None:  # read once: reading side data makes a reference cycle that delays freeing a frame
                matrices = [np.frombuffer(data, np.int32) for data in frame.side_data if data.type.name == _MATRIX]
                self._matrix = matrices[0].copy() if matrices and len(matrices[0]) == 9 else _AS_IT_IS
        except Exception as error:
            raise PrismError(f"{self.name} has a frame that cannot be converted: {_reason(error)}.") from error
        ratio = ratio if 1 / 8 <= ratio <= 8 else 1.0
        return _upright(pixels, ratio, self._matrix)


class Animation:
    """A picture, or an animated GIF, WebP or PNG, decoded by PIL."""

    def __init__(self, data: str | bytes, name: str):
        self.name = name
        self._data = data
        self._cut = False

    def timeline(self) -> Timeline:
        starts, now = [], 0.0
        lengths = []
        for _, picture in self._each():
            starts.append(now)
            lengths.append(float(picture.info.get("duration") or 0) / 1000 or _FASTEST)
            now += lengths[-1]
            several = getattr(picture, "is_animated", False)
        if not starts:
            raise PrismError(f"{self.name} holds no frames.")
        whole = (len(starts) == 1 and not several) or not (self._cut or self._cut_gif())
        return Timeline(np.array(starts), now, len(starts), timed=several, whole=whole)

    def pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray, float]]:
        chosen = set(numbers)
        for number, picture in self._each():
            if number in chosen:
                from PIL import ImageOps

                try:
                    pixels = _rgb(ImageOps.exif_transpose(picture) if number == 0 else picture)
                except Exception as error:
                    raise PrismError(f"{self.name} cannot be read as a picture: {_reason(error)}.") from error
                yield number, pixels, 1.0
            if number >= numbers[-1]:
                return

    def _each(self) -> Iterator[tuple[int, Any]]:
        from PIL import Image

        try:
            Image.init()
            formats = [each for each in _STILLS if each in Image.OPEN]  # not every Pillow reads AVIF
            with Image.open(
                self._data if isinstance(self._data, str) else io.BytesIO(self._data), "r", formats
            ) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise PrismError(
                        f"{self.name} states {picture.width} x {picture.height} pixels; at most {MOST_PIXELS:,} are "
                        "read."
                    )
                number, moving = 0, picture.format in ("GIF", "WEBP", "PNG") and getattr(picture, "is_animated", False)
                while number < MOST_FRAMES:
                    try:
                        picture.seek(number)
                        picture.load()
                    except EOFError:
                        return
                    except Exception:
                        if number == 0:
                            raise
                        self._cut = True  # the frames before the damage are used
                        return
                    yield number, picture
                    number += 1
                    if not moving:
                        return
        except PrismError:
            raise
        except Exception as error:  # PIL's decoders raise many kinds
            raise PrismError(f"{self.name} cannot be read as a picture: {_reason(error)}.") from error

    def _cut_gif(self) -> bool:
        """True for a GIF without its end mark; PIL reads such a file without an error."""
        if isinstance(self._data, bytes):
            head, tail = self._data[:4], self._data[-16:]
        else:
            with open(self._data, "rb") as file:
                head = file.read(4)
                file.seek(max(0, os.path.getsize(self._data) - 16))
                tail = file.read()
        return head == b"GIF8" and not tail.rstrip(b"\0").endswith(b";")


def _upright(pixels: np.ndarray, ratio: float, matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """A frame rotated by right angles and flipped as its display matrix says: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = (int(matrix[index]) for index in (0, 1, 3, 4))
    if abs(a) < abs(b):
        pixels, ratio, a, d = pixels.swapaxes(0, 1), 1 / ratio, c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return np.ascontiguousarray(pixels[::-1] if d < 0 else pixels), ratio


def _rgb(picture: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a picture of any mode of PIL."""
    if picture.mode.startswith(("I", "F")):  # grey of more than 8 bits, which PIL would clip
        grey = np.asarray(picture).astype(np.float64)
        grey = grey * (1 / 257 if grey.max(initial=0) > 255 else 1)
        return np.repeat(grey.clip(0, 255).round().astype(np.uint8)[..., None], 3, 2)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return _over_black(np.asarray(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _over_black(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 127) // 255).astype(np.uint8)


def _seconds(text: str | None) -> float | None:
    """Seconds of Matroska's "00:00:02.500000000"."""
    match = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d{1,12})?)", text or "", re.ASCII)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None)
    return quoted(text).rstrip(".") if text else reason(error)
