"""Videos survive the way through an mp4 file."""

from __future__ import annotations

import contextlib
import math
import re
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.works import works

import prism
from prism import video as media
from prism.errors import PrismError


def moving_square(frames=9, height=64, width=48):
    video = np.full((frames, height, width, 3), 0.1, dtype=np.float32)
    for t in range(frames):
        video[t, 20:36, 3 * t : 3 * t + 16] = (0.9, 0.3, 0.2)
    return video


def test_round_trip_keeps_shape_order_and_colours(tmp_path):
    video = moving_square()
    media.write_video(tmp_path / "a.mp4", video, fps=8)
    read = media.read_video(tmp_path / "a.mp4")
    assert read.shape == video.shape
    assert read.dtype == np.float32
    assert 0 <= read.min() <= read.max() <= 1
    # chroma is halved in yuv420p: compare on average, and inside the square where colour is even
    assert np.abs(read - video).mean() < 0.01
    for t in range(len(video)):
        assert np.allclose(read[t, 26:30, 3 * t + 6 : 3 * t + 10].mean((0, 1)), (0.9, 0.3, 0.2), atol=0.03)


def test_the_file_is_what_browsers_play(tmp_path):
    media.write_video(tmp_path / "a.mp4", moving_square(), fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 8
        assert stream.frames == 9


@pytest.mark.parametrize(("channels", "rate"), [(1, 16000), (2, 16000), (1, 13000)])
def test_a_sound_is_heard_with_the_video(tmp_path, channels, rate):
    """From its first sample on: the encoder's delay is left out. A rate that AAC has not becomes the next."""

    def wave(rate):
        time = np.arange(rate) / rate
        return 0.5 * np.stack([np.sin(2 * np.pi * pitch * time * (1 + time)) for pitch in (440, 310)[:channels]])

    media.write_video(tmp_path / "a.mp4", moving_square(), fps=8, sound=(wave(rate), rate))
    with av.open(str(tmp_path / "a.mp4")) as container:
        track = container.streams.audio[0]
        assert (track.rate, track.channels) == (16000, channels)
        assert float(track.duration * track.time_base) == pytest.approx(1.0, abs=0 if rate == 16000 else 2e-3)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(track)], 1)[:, :15900]
    assert np.corrcoef(heard.ravel(), wave(16000)[:, :15900].ravel())[0, 1] > 0.99


def test_odd_sizes_lose_one_row_or_column(tmp_path):
    media.write_video(tmp_path / "a.mp4", moving_square(height=33, width=41), fps=8)
    assert media.read_video(tmp_path / "a.mp4").shape == (9, 32, 40, 3)


@pytest.mark.parametrize("shape", [(0, 64, 48, 3), (9, 64, 48, 5), (2, 9, 64, 48, 3), (7,), (1, 1, 9, 64, 48, 3)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(PrismError, match="has shape"):
        media.write_video(tmp_path / "a.mp4", np.zeros(shape, dtype=np.float32), fps=8)


def test_nan_is_refused_and_nothing_is_written(tmp_path):
    video = moving_square()
    video[3, 2, 1, 0] = np.nan
    with pytest.raises(PrismError, match="NaN"):
        media.write_video(tmp_path / "a.mp4", video, fps=8)
    assert not (tmp_path / "a.mp4").exists()


def test_unreadable_videos_are_named(tmp_path):
    with pytest.raises(PrismError, match="does not exist"):
        media.read_video(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(PrismError, match="cannot be read"):
        media.read_video(tmp_path / "a.mp4")
    with pytest.raises(PrismError, match="cannot be written"):
        media.write_video(tmp_path / "none" / "a.mp4", moving_square(), fps=8)


BYTES = (moving_square() * 255).round().astype(np.uint8)
EXACT = BYTES.astype(np.float32) / 255
PICTURES = [Image.fromarray(picture) for picture in BYTES]
TENSOR = torch.from_numpy(EXACT)
GREY = EXACT[..., :1]
KINDS = {
    "PIL": PICTURES,
    "PIL in a batch of one": [PICTURES],
    "PIL with alpha": [picture.convert("RGBA") for picture in PICTURES],
    "a tuple": tuple(PICTURES),
    "an iterator": iter(PICTURES),
    "bytes": BYTES,
    "bytes as int64": BYTES.astype(np.int64),
    "16 bits": BYTES.astype(np.uint16) * 257,
    "float32": EXACT,
    "float64": EXACT.astype(np.float64),
    "a list of arrays": list(EXACT),
    "nested lists": BYTES.tolist(),
    "a tensor": TENSOR,
    "channels after frames": TENSOR.permute(0, 3, 1, 2),
    "channels first": TENSOR.permute(3, 0, 1, 2),
    "a batch of one": TENSOR[None],
    "a batch of one, channels after frames": TENSOR.permute(0, 3, 1, 2)[None],
    "a batch of one, channels first": TENSOR.permute(3, 0, 1, 2)[None],
    "byte tensor": torch.from_numpy(BYTES).permute(0, 3, 1, 2),
    "a list of tensors": [picture.permute(2, 0, 1) for picture in TENSOR],
    "with a gradient": TENSOR.clone().requires_grad_(),
    "alpha": np.concatenate([EXACT, np.zeros_like(GREY)], -1),
    "alpha after frames": np.concatenate([EXACT, np.zeros_like(GREY)], -1).transpose(0, 3, 1, 2),
}
TO_A_GREY_LEVEL = {
    "bfloat16": TENSOR.bfloat16(),
    "float16": TENSOR.half(),
    "out of range by rounding": EXACT * np.float32(1.001) + np.float32(0.001),
    "palette": [picture.quantize(64) for picture in PICTURES],
}


@works(
    "Inputs and outputs", "Videos as PIL images, arrays or tensors of any dtype and layout", "works", "Scaled by kind"
)
@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_any_kind_are_one_kind(kind):
    array = media.frames(KINDS[kind])
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, EXACT, atol=1e-6)


@pytest.mark.parametrize("kind", TO_A_GREY_LEVEL)
def test_frames_that_were_rounded(kind):
    array = media.frames(TO_A_GREY_LEVEL[kind])
    assert 0 <= array.min() <= array.max() <= 1
    assert np.abs(array - EXACT).max() < 0.02


@pytest.mark.parametrize(
    "grey",
    [
        *(GREY, GREY[..., 0], torch.from_numpy(GREY).permute(0, 3, 1, 2), [frame.squeeze() for frame in GREY]),
        [Image.fromarray((frame.squeeze() * 255).round().astype(np.uint8)) for frame in GREY],
        [Image.fromarray(frame.squeeze()) for frame in GREY],  # of mode F
        [Image.fromarray((frame.squeeze() * 65535).round().astype(np.uint16)) for frame in GREY],  # of 16 bits
        (GREY > 0.5).astype(bool),
    ],
)
def test_grey_frames_are_grey(grey):
    array = media.frames(grey)
    assert array.shape == EXACT.shape
    expected = GREY > 0.5 if isinstance(grey, np.ndarray) and grey.dtype.kind == "b" else GREY
    np.testing.assert_allclose(array, np.repeat(expected, 3, 3), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "channels", "first"),
    [
        ((3, 3, 8, 3), 3, 1),  # the last axis is the channels
        ((3, 3, 8, 6), 1, 2),  # else the one behind the frames
        ((3, 4, 8, 6), 0, 2),  # three channels go before four
        ((8, 6, 3), 2, None),  # one picture
        ((3, 8, 6), 0, None),
        ((8, 6), None, None),
    ],
)
def test_which_axis_is_the_channels(shape, channels, first):
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = np.repeat(values[..., None], 3, -1) if channels is None else np.moveaxis(values, channels, -1)
    expected = expected if expected.ndim == 4 else expected[None]
    assert np.array_equal(media.frames(values), expected)


@works("Inputs and outputs", "The video of a pipeline's default output (PIL images)", "works", "`write_video` takes it")
def test_the_default_output_of_a_pipeline_is_written_as_it_looks(tmp_path):
    pipe = tiny.cogvideox()
    result = prism.best_of_n(pipe, None, tiny.PROMPT, strategy="none", n=1, **tiny.CALL_COGVIDEOX)
    assert isinstance(result.video[0], Image.Image)
    media.write_video(tmp_path / "a.mp4", result.video, fps=8)
    expected = np.stack([np.asarray(picture) for picture in result.video]) / 255
    assert np.abs(media.read_video(tmp_path / "a.mp4") - expected).mean() < 0.05


BAD = {
    "[-1, 1]": (EXACT * 2 - 1, r"scaled to \[-1, 1\]; give video / 2"),
    "[0, 255]": (EXACT * 255, r"scaled to \[0, 255\]; give video / 255"),
    "beyond rounding": (EXACT + 0.2, r"values from 0.302 to 1.1; values in \[0, 1\] are needed"),
    "far out": (EXACT * 1000 - 500, "values from"),
    "negative whole numbers": (BYTES.astype(np.int16) - 100, "whole numbers from -74"),
    "large whole numbers": (BYTES.astype(np.int32) * 300, "0 to 255 is needed"),
    "NaN": (np.full((2, 8, 8, 3), np.nan), "NaN"),
    "infinity": (torch.full((2, 3, 8, 8), math.inf), "NaN or infinity"),
    "complex": (EXACT.astype(np.complex64), "frames are needed"),
    "text": ("winner.mp4", "read a file with prism.video.read_video"),
    "None": (None, "frames are needed"),
    "a number": (3, "shape"),
    "a dict": ({"frames": EXACT}, "read a file|frames are needed"),
    "nothing": ([], "shape"),
    "texts": (["a.png", "b.png"], "a.png"),
    "several sizes": ([PICTURES[0], PICTURES[1].resize((8, 8))], "several kinds"),
    "several dtypes": ([EXACT[0], BYTES[1]], "several kinds"),
    "ragged": ([[[1, 2], [3]]], "frames"),
    "several videos": ([PICTURES, PICTURES], "2 videos"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_video_gets_a_sentence(tmp_path, kind):
    video, sentence = BAD[kind]
    with pytest.raises(PrismError, match=sentence) as caught:
        media.write_video(tmp_path / "a.mp4", video, fps=8)
    assert re.fullmatch(".{1,500}", str(caught.value))
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("fps", [math.nan, math.inf, 0, -8, 0.0001, 1e9, "8", None, True, [8], torch.ones(2)])
def test_fps_is_checked_and_the_range_said(tmp_path, fps):
    with pytest.raises(PrismError, match=r"fps must be a number from 0.1 to 240; found"):
        media.write_video(tmp_path / "a.mp4", EXACT, fps=fps)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("fps", [0.1, 240, 23.976, np.float32(8), torch.tensor(8), Fraction(24000, 1001)])
def test_fps_of_other_kinds(tmp_path, fps):
    media.write_video(tmp_path / "a.mp4", EXACT[:2], fps=fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(float(fps), rel=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 48), (2, 3), (64, 1)])
def test_small_videos_are_written(tmp_path, size):
    media.write_video(tmp_path / "a.mp4", np.zeros((2, *size, 3), dtype=np.uint8), fps=8)
    assert media.read_video(tmp_path / "a.mp4").max() < 0.1


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "a\0b.mp4", "folder"])
def test_odd_paths_get_a_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(PrismError, match=r"cannot be read|without pictures|does not exist"):
        media.read_video(tmp_path / name)
    with pytest.raises(PrismError, match="cannot be written"):
        media.write_video(tmp_path / name, EXACT, fps=8)


def test_files_that_are_cut_or_altered_get_a_sentence_or_frames(tmp_path):
    media.write_video(tmp_path / "a.mp4", EXACT, fps=8)
    whole, rng = (tmp_path / "a.mp4").read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        altered = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(altered), 8):
            altered[place] = rng.integers(256)
        (tmp_path / "b.mp4").write_bytes(altered)
        with contextlib.suppress(PrismError):
            assert media.read_video(tmp_path / "b.mp4").ndim == 4


def test_a_video_that_is_read_is_what_the_codec_gives(tmp_path):
    media.write_video(tmp_path / "a.mp4", EXACT, fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    read = media.read_video(tmp_path / "a.mp4")
    assert read.dtype == np.float32
    assert np.array_equal(read, decoded.astype(np.float32) / np.float32(255))


def test_several_videos_are_one_array():
    assert np.array_equal(media.videos([PICTURES, BYTES, TENSOR]), np.stack([EXACT] * 3))
    assert np.array_equal(media.videos(np.stack([EXACT] * 2)), np.stack([EXACT] * 2))
    assert np.array_equal(media.videos(PICTURES), EXACT[None])
    for batch in ([], [EXACT, EXACT[:3]], "a.mp4", None):
        with pytest.raises(PrismError):
            media.videos(batch)


GREY_LISTS = {
    "PIL of 32 bits": [Image.fromarray(BYTES[index, ..., 0].astype(np.int32)) for index in range(3)],
    "arrays (H, W)": [BYTES[index, ..., 0] for index in range(3)],
    "tensors (H, W)": [torch.from_numpy(BYTES[index, ..., 0].copy()) for index in range(3)],
    "arrays (H, W, 1)": [BYTES[index, ..., :1] for index in range(3)],
}


@pytest.mark.parametrize("video", GREY_LISTS.values(), ids=GREY_LISTS)
def test_three_grey_frames_of_a_list_are_no_picture_in_colour(video):
    assert np.allclose(media.frames(video), np.repeat(EXACT[:3, ..., :1], 3, 3))


def test_three_frames_with_alpha_of_a_list_are_frames():
    assert np.array_equal(media.frames(list(KINDS["alpha"][:3])), EXACT[:3])


def test_big_endian_and_packed_numbers_are_numbers():
    assert np.array_equal(media.frames((BYTES.astype(np.uint16) * 257).astype(">u2")), EXACT)
    assert np.array_equal(media.frames(TENSOR.to_sparse()), EXACT)


def _closed():
    picture = Image.fromarray(BYTES[0])
    picture.close()
    return [picture]


def _failing():
    yield PICTURES[0]
    raise RuntimeError("no more")


ENDLESS: list = []
ENDLESS.append(ENDLESS)
UNREADABLE = {
    "closed": _closed(),
    "fails": _failing(),
    "itself": ENDLESS,
    "no numbers": TENSOR.to("meta"),
    "complex": TENSOR.to(torch.complex64),
    "complex, conjugated": TENSOR.to(torch.complex64).conj(),
}


@pytest.mark.parametrize("video", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_as_frames_is_a_sentence(video):
    with pytest.raises(PrismError, match="PIL images, arrays or tensors"):
        media.frames(video)


@pytest.mark.parametrize("crf", [-1, 52, "x", None, 1.5, True])
def test_crf_is_checked(tmp_path, crf):
    with pytest.raises(PrismError, match="crf must be a whole number from 0 to 51"):
        media.write_video(tmp_path / "a.mp4", BYTES, 8, crf=crf)


def test_a_name_of_a_video_is_never_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run: best.mp4", "pipe:1", b"bytes.mp4"):
        media.write_video(name, BYTES, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.mp4", "pipe:1", "run: best.mp4"]
    assert len(media.read_video("pipe:1")) == len(BYTES)
    with pytest.raises(PrismError, match="cannot be written"):
        media.write_video(None, BYTES, 8)
