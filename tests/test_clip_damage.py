"""Clips of damaged and of hostile files: the frames that the policy takes, or one sentence that names the clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.clips import movie, numbers, picture

from prism.errors import PrismError
from prism.video import Clip, FramePolicy, probe, read_clip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """24 frames at 8 per second; the index of faststart.mp4 stands before its frames."""
    folder = tmp_path_factory.mktemp("damage")
    made = {
        kind: movie(folder / kind, kind=kind, **({"movflags": "+faststart"} if kind == "faststart.mp4" else {}))
        for kind in ("h264.mp4", "faststart.mp4", "ffv1.mkv", "mjpeg.avi", "vp9.webm", "h264.ts", "h264.flv")
    }
    pictures = [Image.fromarray(picture(number)) for number in range(24)]
    for name in ("a.gif", "a.webp", "a.png"):
        made[name] = folder / name
        pictures[0].save(made[name], save_all=True, append_images=pictures[1:], duration=125, loop=0, lossless=True)
    made["a.jpg"] = folder / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(made["a.jpg"])
    return {name: path.read_bytes() for name, path in made.items()}


CUTS = [("ffv1.mkv", 0.8), ("mjpeg.avi", 0.8), ("vp9.webm", 0.9), ("faststart.mp4", 0.99), ("h264.flv", 0.9)]


@pytest.mark.parametrize(("kind", "part"), CUTS)
def test_a_file_without_its_end_gives_what_it_holds_where_that_is_what_the_policy_takes(files, kind, part, tmp_path):
    path = tmp_path / kind
    path.write_bytes(files[kind][: int(len(files[kind]) * part)])
    info = probe(path)
    assert info.num_frames == 24  # as the file states
    assert 16 <= info.held < 24
    assert info.duration == pytest.approx(3, abs=0.01)
    assert numbers(read_clip(path, FramePolicy(num_frames=6)).frames) == [9, 10, 11, 12, 13, 14]  # the stated middle
    first = read_clip(path, FramePolicy(num_frames=info.held, start="first"))
    assert numbers(first.frames) == list(range(info.held))
    for policy in (None, FramePolicy(num_frames=2, start="uniform"), FramePolicy(fps=4)):
        with pytest.raises(PrismError, match=rf"{kind} is damaged: {info.held} of its 24 frames are there"):
            read_clip(path, policy)


@pytest.mark.parametrize(("kind", "part"), [("h264.ts", 0.7), ("a.gif", 0.7)])
def test_a_file_that_states_no_length_gives_its_beginning_alone(files, kind, part):
    data = files[kind][: int(len(files[kind]) * part)]
    assert numbers(read_clip(data, FramePolicy(num_frames=6, start="first")).frames) == [0, 1, 2, 3, 4, 5]
    for policy in (None, FramePolicy(num_frames=6), FramePolicy(num_frames=6, start="uniform")):
        with pytest.raises(PrismError, match=r"is damaged: it breaks off after .* and how many it had is not known"):
            read_clip(data, policy)


@pytest.mark.parametrize("kind", ["h264.mp4", "a.jpg", "a.webp"])
def test_a_file_of_which_nothing_is_left_without_its_end_is_refused(files, kind):
    size = int(len(files[kind]) * 0.7)
    with pytest.raises(PrismError, match=f"The video of {size:,} bytes cannot be read as a (video|picture)"):
        read_clip(files[kind][:size], FramePolicy(num_frames=1, start="first"))


def test_frames_that_lean_on_a_damaged_one_are_not_given(tmp_path):
    """A group of pictures is 6 frames: where its second is zeros, its others cannot be trusted."""
    noise = np.random.default_rng(0).integers(0, 60, (24, 48, 64, 3)).astype(np.uint8)

    def groups(stream):
        stream.options = {"g": "6", "bf": "0", "sc_threshold": "0"}

    path = movie(tmp_path / "a.mp4", draw=lambda n, h, w: noise[n] + np.uint8(6 * n), before=groups)
    good = read_clip(path).frames
    import av

    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    keys = [place for place, (_, _, key) in enumerate(packets) if key]
    assert keys[:3] == [0, 6, 12]
    data = bytearray(path.read_bytes())
    start, size, _ = packets[7]
    data[start : start + size] = bytes(size)
    assert np.array_equal(read_clip(bytes(data), FramePolicy(num_frames=7, start="first")).frames, good[:7])
    # The middle four are frames 11 to 14 counted from 1, of which two lean on the damaged one, which is frame 8.
    for policy, number in [(FramePolicy(num_frames=4), 11), (None, 8), (FramePolicy(num_frames=8, start="first"), 8)]:
        with pytest.raises(PrismError, match=rf"is damaged: frame {number} of 24, .* cannot be decoded"):
            read_clip(bytes(data), policy)
    taken = read_clip(bytes(data), FramePolicy(num_frames=2, start="uniform"))
    assert np.array_equal(taken.frames, good[[0, 23]])


BEGINNINGS = [
    b"",
    b"\0\0\0\x20ftypisom\0\0\0\0",
    b"\x1a\x45\xdf\xa3",
    b"RIFF\xff\0\0\0AVI LIST",
    b"RIFF\xff\0\0\0WEBPVP8X",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff\xe0",
    b"II*\0\x08\0\0\0",
    b"BM",
    b"P6 9 9 255\n",
    b"FLV\x01\x05",
    b"OggS",
    b"\0\0\0\x01g",
    b"#EXTM3U\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
]
POLICY = st.sampled_from(
    [
        None,
        FramePolicy(num_frames=3),
        FramePolicy(fps=4, num_frames=3, start="first", height=8, width=12),
        FramePolicy(num_frames=4, start="uniform", height=9, width=7, fit="pad"),
    ]
)


def read_or_refused(data, policy):
    try:
        clip = read_clip(data, policy)
    except PrismError as error:
        clip = error
    if isinstance(clip, PrismError):
        assert str(clip).startswith("The video of")
        return
    assert isinstance(clip, Clip)
    assert clip.frames.dtype == np.uint8
    assert len(clip.frames) == len(clip.times) == len(clip.numbers) >= 1
    if policy:
        assert len(clip.frames) == policy.num_frames
        if policy.height:
            assert clip.frames.shape[1:] == (policy.height, policy.width, 3)


@settings(max_examples=150, deadline=None)
@given(begin=st.sampled_from(BEGINNINGS), data=st.binary(max_size=400), policy=POLICY)
def test_bytes_of_any_kind_are_a_clip_or_a_sentence(begin, data, policy):
    read_or_refused(begin + data, policy)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_altered_files_are_a_clip_or_a_sentence(files, data):
    kind = data.draw(st.sampled_from(sorted(files)))
    altered = bytearray(files[kind])
    if data.draw(st.booleans()):
        altered = altered[: data.draw(st.integers(0, len(altered)))]
    for place in data.draw(st.lists(st.integers(0, max(0, len(altered) - 1)), max_size=12)) if altered else ():
        altered[place] = data.draw(st.integers(0, 255))
    read_or_refused(bytes(altered), data.draw(POLICY))


def test_a_file_that_states_more_pixels_than_are_read_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (9000, 9000)).save(path)
    with pytest.raises(PrismError, match=r"a\.png states 9000 x 9000 pixels"):
        read_clip(path, FramePolicy(height=8, width=8))
