"""Clips of files as people have them: variable rate, rotated, with alpha, as pictures, in Parquet."""

from __future__ import annotations

import io
import os
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.clips import KINDS, movie, numbers, picture

from prism.errors import PrismError
from prism.video import FramePolicy, probe, read_clip

STAMPS = [0, 40, 80, 120, 500, 900, 1300, 1700, 1740, 1780]  # milliseconds


# -- times


@pytest.mark.parametrize("name", ["a.mp4", "ffv1.mkv"])
def test_variable_rate_is_read_by_time_stamps(tmp_path, name):
    kind = name if name in KINDS else "faststart.mp4"
    path = movie(tmp_path / name, 10, kind, rate=25, stamps=STAMPS)
    clip = read_clip(path)
    assert clip.times == pytest.approx([stamp / 1000 for stamp in STAMPS], abs=2e-3)
    assert clip.fps == pytest.approx(9 / 1.78, abs=0.05)
    # 0, 0.25, 0.5, ... s: the nearest stamps
    clip = read_clip(path, FramePolicy(fps=4, num_frames=7, start="first"))
    assert numbers(clip.frames) == [0, 3, 4, 5, 5, 6, 6]  # 1.5 s is as near to 1.3 as to 1.7
    clip = read_clip(path, FramePolicy(num_frames=3, start="uniform"))
    assert numbers(clip.frames) == [0, 5, 9]  # 0, 0.89, 1.78 s


def test_a_file_that_begins_late_is_counted_from_its_first_frame(tmp_path):
    path = movie(tmp_path / "a.mkv", 10, "ffv1.mkv", stamps=[5000 + 125 * n for n in range(10)])
    clip = read_clip(path, FramePolicy(fps=4, num_frames=3, start="first"))
    assert numbers(clip.frames) == [0, 2, 4]
    assert clip.times == pytest.approx([0, 0.25, 0.5], abs=2e-3)
    assert (clip.info.num_frames, clip.info.held) == (10, 10)
    assert numbers(read_clip(path).frames) == list(range(10))


# -- upright, with square pixels


def corners(number, height, width):
    """Red, green over blue, black."""
    out = np.zeros((height, width, 3), np.uint8)
    out[: height // 2, : width // 2, 0] = out[: height // 2, width // 2 :, 1] = out[height // 2 :, : width // 2, 2] = (
        255
    )
    return out


def letters(frame):
    """The four quarters of a frame, in reading order."""
    height, width = frame.shape[:2]
    quarters = [frame[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join("rgb"[quarter.argmax()] if quarter.max() > 128 else "-" for quarter in quarters)


TURNS = [
    ((0, False, False), "rgb-", (48, 64)),
    ((90, False, False), "g-rb", (64, 48)),
    ((-90, False, False), "br-g", (64, 48)),
    ((180, False, False), "-bgr", (48, 64)),
    ((0, True, False), "gr-b", (48, 64)),
    ((0, False, True), "b-rg", (48, 64)),
    ((90, True, False), "-gbr", (64, 48)),
]


@pytest.mark.parametrize(("turn", "seen", "size"), TURNS)
def test_frames_are_upright(tmp_path, turn, seen, size):
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV writes no rotation")
    degrees, hflip, vflip = turn
    path = movie(
        tmp_path / "a.mp4",
        2,
        draw=corners,
        before=lambda stream: stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip),
    )
    clip = read_clip(path)
    assert letters(clip.frames[1]) == seen
    assert clip.frames.shape[1:3] == size == (probe(path).height, probe(path).width)
    small = read_clip(path, FramePolicy(height=size[0] // 2, width=size[1] // 2))
    assert letters(small.frames[0]) == seen


def test_a_phone_s_rotation_in_the_file_s_head_is_followed(tmp_path):
    """The matrix of tkhd, as phones write it, without PyAV's own writer."""
    path = movie(tmp_path / "a.mp4", 2, draw=corners)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    assert data[place : place + 4] == (65536).to_bytes(4, "big")
    matrix = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]  # a quarter to the right
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    assert letters(read_clip(bytes(data)).frames[0]) == "br-g"


def test_wide_pixels_become_square(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = movie(tmp_path / "a.mkv", 2, draw=corners, before=wide)
    assert read_clip(path).frames.shape == (2, 48, 128, 3)
    out = read_clip(path, FramePolicy(height=64, width=64, fit="pad")).frames[0]
    assert out[:19].max() == out[-19:].max() == 0
    assert letters(out[20:44]) == "rgb-"


@pytest.mark.parametrize("kind", ["h264.mp4", "picture"])
def test_a_fit_is_cut_barred_or_distorted(tmp_path, kind):
    """A frame of 48 x 96, white but for a black left third, to 32 x 32."""

    def third(number, height, width):
        out = np.full((height, width, 3), 255, np.uint8)
        out[:, : width // 3] = 0
        return out

    path = movie(tmp_path / "a.mp4", 2, size=(48, 96), draw=third)
    if kind == "picture":
        path = tmp_path / "a.png"
        Image.fromarray(third(0, 48, 96)).save(path)
    rows = {fit: read_clip(path, FramePolicy(height=32, width=32, fit=fit)).frames[0][..., 0] for fit in FITS}
    assert (rows["crop"][:, :4] < 128).all()  # the middle 48 of 96 columns: black up to 32 - 24 = 8, 5.3 of 32
    assert (rows["crop"][:, 7:] > 200).all()
    assert (rows["stretch"][:, :9] < 60).all()
    assert (rows["stretch"][:, 13:] > 200).all()
    assert rows["pad"][:8].max() == rows["pad"][-8:].max() == 0
    assert (rows["pad"][8:24, 13:] > 200).all()
    assert (rows["pad"][8:24, :9] < 60).all()


FITS = ("crop", "pad", "stretch")


# -- alpha, depth, colour


def veiled(number, height, width):
    """A white left half, opaque, and a white right half of which a quarter is seen."""
    out = np.full((height, width, 4), 255, np.uint8)
    out[:, width // 2 :, 3] = 64
    return out


@pytest.mark.parametrize("name", ["ffv1.mkv", "a.png", "a.webp", "palette.png", "a.gif"])
def test_alpha_lies_over_black(tmp_path, name):
    path, array = tmp_path / name, veiled(0, 48, 64)
    if name == "ffv1.mkv":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgra"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgba")))
            container.mux(stream.encode())
    elif name == "palette.png":
        Image.fromarray(array).quantize(4).save(path)
    elif name == "a.gif":  # it knows but seen and unseen
        image = Image.fromarray((array[..., 3] < 255).astype(np.uint8)).convert("P")
        image.putpalette([255, 255, 255, 255, 0, 0])
        image.save(path, transparency=1)
    else:
        Image.fromarray(array).save(path, **({"lossless": True, "exact": True} if "webp" in name else {}))
    out = read_clip(path).frames[0]
    assert (out[:, :32] > 250).all()
    assert np.abs(out[:, 32:].astype(int) - (0 if name == "a.gif" else 64)).max() <= 2


# -- animations and pictures


def animation(path, count=6, lengths=125, **options):
    pictures = [Image.fromarray(picture(number)) for number in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=lengths, loop=0, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_read_by_the_times_of_their_frames(tmp_path, name):
    lengths = [100, 100, 300, 100, 100, 200]
    path = animation(tmp_path / name, lengths=lengths, **({"lossless": True} if "webp" in name else {}))
    clip = read_clip(path)
    assert numbers(clip.frames) == [0, 1, 2, 3, 4, 5]
    assert clip.times == pytest.approx([0, 0.1, 0.2, 0.5, 0.6, 0.7])
    assert clip.info.duration == pytest.approx(0.9)
    clip = read_clip(path, FramePolicy(fps=5, start="first"))
    assert numbers(clip.frames) == [0, 2, 3, 4]  # 0, 0.2, 0.4 (nearest to 0.5), 0.6 s
    assert numbers(read_clip(path.read_bytes(), FramePolicy(num_frames=2)).frames) == [2, 3]


def test_folders_and_lists_are_frames_in_order(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(folder / f"frame_{number}.{'png' if number % 2 else 'jpg'}")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    clip = read_clip(folder)
    assert numbers(clip.frames) == list(range(12))  # 2 before 10
    assert clip.fps is None
    assert np.isnan(clip.times).all()
    assert (clip.info.fps, clip.info.duration) == (None, None)
    clip = read_clip(folder, FramePolicy(fps=4, num_frames=3, start="first"), fps=8)
    assert numbers(clip.frames) == [0, 2, 4]
    assert clip.times.tolist() == [0, 0.25, 0.5]
    clip = read_clip(folder, FramePolicy(fps=4, num_frames=3, start="first"))  # taken as what was asked for
    assert (numbers(clip.frames), clip.fps) == ([0, 1, 2], 4)
    files = [folder / "frame_7.png", str(folder / "frame_2.jpg"), (folder / "frame_5.png").read_bytes()]
    assert numbers(read_clip(files).frames) == [7, 2, 5]
    Image.fromarray(picture(9)[:-2]).save(folder / "frame_12.png")
    with pytest.raises(PrismError, match=r"Frame 12 .* x \d+, and those before it are .*; make the frames"):
        read_clip(folder)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.ppm", "a.gif"])
def test_a_picture_is_a_video_of_one_frame(tmp_path, name):
    Image.fromarray(picture(9)).save(tmp_path / name)
    for policy in (None, FramePolicy(num_frames=1), FramePolicy(num_frames=1, fps=8), FramePolicy(fps=8)):
        clip = read_clip(tmp_path / name, policy)
        assert numbers(clip.frames) == [9]
        assert clip.info.num_frames == 1
    with pytest.raises(PrismError, match=r"a\..* has 1 frame; the frame policy takes 2. Give a longer video"):
        read_clip(tmp_path / name, FramePolicy(num_frames=2, fps=8))


def test_pictures_of_other_modes(tmp_path):
    grey = picture(9)[..., 0]
    for mode, image in {
        "16": Image.fromarray(grey.astype(np.uint16) * 257),
        "L": Image.fromarray(grey),
        "1": Image.fromarray(np.full((48, 64), True)),
        "P": Image.fromarray(picture(9)).quantize(4),
        "CMYK": Image.fromarray(picture(9)).convert("CMYK"),
    }.items():
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image.save(path)
        assert np.abs(read_clip(path).frames.astype(int) - (255 if mode == "1" else 76)).max() <= 1


def test_a_camera_s_orientation_is_followed(tmp_path):
    image = Image.fromarray(corners(0, 48, 64))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    clip = read_clip(tmp_path / "a.jpg")
    assert clip.frames.shape == (1, 64, 48, 3)
    assert letters(clip.frames[0]) == "br-g"


# -- Parquet


def test_cells_of_parquet_are_files(tmp_path):
    data = [movie(tmp_path / f"{n}.mp4", 3 + n).read_bytes() for n in range(3)]
    png = io.BytesIO()
    Image.fromarray(picture(5)).save(png, "PNG")
    (tmp_path / "deep").mkdir()
    Image.fromarray(picture(6)).save(tmp_path / "deep" / "six.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "raw/bytes": pa.array(data, pa.binary()),
            "struct": pa.array([{"bytes": each, "path": "x.mp4"} for each in data], kind),
            "paths": pa.array([{"bytes": None, "path": f"{n}.mp4"} for n in range(3)], kind),
            "frames": pa.array([[{"bytes": png.getvalue()}, {"path": "deep/six.png"}]] * 3, pa.list_(kind)),
            "bad": pa.array([{"bytes": None, "path": None}, {"path": "../../etc/passwd"}, {"path": "none.mp4"}], kind),
            "single": pa.array([{"bytes": png.getvalue()}] * 3, kind),
            "numbers": [1, 2, 3],
        }
    )
    path = tmp_path / "set.parquet"
    pq.write_table(table, path, row_group_size=2)
    for column in ("raw/bytes", "struct", "paths"):
        for row in range(3):
            assert len(read_clip(f"{path}#{column}/{row}").frames) == 3 + row
    assert numbers(read_clip(f"{path}#frames/1").frames) == [5, 6]
    assert len(read_clip([f"{path}#single/1", f"{path}#single/2"]).frames) == 2
    for cell, sentence in {
        "bad/0": "holds None",
        "bad/1": "outside the Parquet file's folder",
        "bad/2": "does not exist",
        "numbers/0": "holds 1; a file's bytes",
        "raw/bytes/3": "the file has 3 rows, numbered from 0",
        "none/0": "has no column none; it has raw/bytes, struct",
    }.items():
        with pytest.raises(PrismError, match=rf"set\.parquet#{cell} .*{sentence}"):
            read_clip(f"{path}#{cell}")
    with pytest.raises(PrismError, match="there is no file"):
        read_clip(f"{tmp_path}/none.parquet#a/0")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(PrismError, match=r"no\.parquet#a/0 cannot be read from the Parquet file"):
        read_clip(f"{tmp_path}/no.parquet#a/0")


def test_nothing_to_read_is_a_sentence(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.mp4").write_text("<html>404</html>" * 50)
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/a.ts\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile a.ts\n")
    movie(tmp_path / "a.ts", 3, "h264.ts")
    for name, sentence in {
        "empty.mp4": "is empty",
        "folder": "is a folder without pictures",
        "pipe": "is no file",
        "text.mp4": "cannot be read as a video",
        "lfs.mp4": "is a pointer of Git LFS",
        "list.mp4": "cannot be read as a video",
        "concat.mp4": "cannot be read as a video",
        "none.mp4": "does not exist",
        "a\0b.mp4": "cannot be read",
        "x" * 300: "does not exist|cannot be read",
    }.items():
        with pytest.raises(PrismError, match=sentence):
            read_clip(f"{tmp_path}/{name}")
    for source, sentence in [
        ([], "holds none"),
        (3, "a path, bytes or a list"),
        (None, "a path, bytes or a list"),
        (b"", "is empty"),
        ([tmp_path / "pipe"], "Frame 0 .* is no file"),
        ([tmp_path / "none.png"], "Frame 0 .* cannot be read: No such file"),
        ([tmp_path / "a.ts"], "Frame 0 .* is no picture"),
    ]:
        with pytest.raises(PrismError, match=sentence):
            read_clip(source)
    with pytest.raises(PrismError, match=r"must be a prism\.video.FramePolicy"):
        read_clip(tmp_path / "a.ts", {"fps": 8})
