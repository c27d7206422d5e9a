"""The frames that a policy takes of video files of every kind, told by their grey levels."""

from __future__ import annotations

import gc
import re
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from tests.clips import KINDS, movie, numbers

from prism import clips, decoding, video
from prism.errors import PrismError
from prism.video import FramePolicy, probe, read_clip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """24 frames at 8 per second, in every kind."""
    folder = tmp_path_factory.mktemp("clips")
    options = {"faststart.mp4": {"movflags": "+faststart"}}
    sizes = {"odd444.mp4": (47, 61), "ffv1.mkv": (47, 61)}
    return {
        kind: movie(folder / kind, kind=kind, size=sizes.get(kind, (48, 64)), **options.get(kind, {})) for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_frames_by_number(files, kind):
    clip = read_clip(files[kind])
    assert numbers(clip.frames) == list(range(24))
    assert clip.frames.dtype == np.uint8
    assert np.allclose(clip.times, np.arange(24) / 8, atol=2e-3)
    assert (clip.info.num_frames, clip.info.held) == (24, 24)
    assert clip.fps == pytest.approx(8, abs=0.01)
    assert clip.info.duration == pytest.approx(3, abs=0.01)
    assert probe(files[kind]) == clip.info
    assert clip.frames.shape[1:3] == ((47, 61) if kind in ("odd444.mp4", "ffv1.mkv") else (48, 64))


POLICIES = [
    (FramePolicy(num_frames=5, start="first"), [0, 1, 2, 3, 4], 8),
    (FramePolicy(num_frames=5), [9, 10, 11, 12, 13], 8),
    (FramePolicy(num_frames=4, start="uniform"), [0, 8, 15, 23], 3 * 8 / 23),
    (FramePolicy(fps=4), list(range(0, 24, 2)), 4),
    (FramePolicy(fps=4, num_frames=3, start="first"), [0, 2, 4], 4),
    (FramePolicy(fps=4, num_frames=4), [8, 10, 12, 14], 4),
    (FramePolicy(fps=16, num_frames=5, start="first"), [0, 0, 1, 1, 2], 16),
    (FramePolicy(fps=5, num_frames=5, start="first"), [0, 2, 3, 5, 6], 5),
    (FramePolicy(fps=8, num_frames=25), [*range(24), 23], 8),
    (FramePolicy(num_frames=1), [11], 8),
]


@pytest.mark.parametrize(("policy", "wanted", "fps"), POLICIES)
@pytest.mark.parametrize("kind", ["h264.mp4", "vp9.webm", "mpeg4.avi", "h264.ts"])
def test_a_policy_takes_the_frames_that_it_states(files, kind, policy, wanted, fps):
    clip = read_clip(files[kind], policy)
    assert numbers(clip.frames) == wanted
    assert clip.numbers.tolist() == wanted
    assert np.allclose(clip.times, np.array(wanted) / 8, atol=2e-3)
    assert clip.fps == pytest.approx(fps, abs=0.01)


WRONG = [
    ({"fps": 0}, "fps must be a number"),
    ({"fps": "8"}, "fps must be a number"),
    ({"num_frames": 0}, "num_frames must be a whole number"),
    ({"num_frames": True}, "num_frames must be a whole number"),
    ({"start": "last"}, "start must be one of first, middle, uniform"),
    ({"fit": "zoom"}, "fit must be one of crop, pad, stretch"),
    ({"height": 64}, "give both or neither"),
    ({"height": 64, "width": 0}, "width must be a whole number"),
    ({"start": "uniform"}, "needs num_frames and no fps"),
    ({"start": "uniform", "num_frames": 4, "fps": 8}, "needs num_frames and no fps"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG)
def test_a_policy_checks_itself(settings, sentence):
    with pytest.raises(PrismError, match=sentence):
        FramePolicy(**settings)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (FramePolicy(num_frames=25), "has 24 frames; the frame policy takes 25"),
        (FramePolicy(fps=4, num_frames=14), r"lasts 3 s; the frame policy takes 14 frames at 4 per second.*3.5 s"),
        (FramePolicy(fps=1000, num_frames=10**6), "lasts 3 s"),
    ],
)
def test_a_clip_that_is_too_short_is_refused(files, policy, sentence):
    with pytest.raises(PrismError, match=rf"h264.mp4 {sentence}"):
        read_clip(files["h264.mp4"], policy)


def test_bytes_are_read_as_the_file(files):
    policy = FramePolicy(num_frames=3)
    data = files["h264.mp4"].read_bytes()
    for source in (data, bytearray(data), memoryview(data)):
        assert np.array_equal(read_clip(source, policy).frames, read_clip(str(files["h264.mp4"]), policy).frames)
    with pytest.raises(PrismError, match=f"The video of {len(data[:100]):,} bytes cannot be read"):
        read_clip(data[:100])


def test_of_a_minute_few_frames_are_decoded_and_fewer_kept(tmp_path, monkeypatch):
    """Decoding begins at the keyframe before the first frame taken; only frames taken become pixels."""
    path = movie(tmp_path / "a.mp4", 1440, rate=24, draw=lambda n, h, w: np.full((h, w, 3), n % 31 * 8 + 4, np.uint8))
    decoded, converted = [], []
    frames, pixels = decoding.Movie._frames, decoding.Movie._pixels

    def counted(*given):
        for frame in frames(*given):
            decoded.append(frame.pts)
            yield frame

    def noted(self, frame, stream):
        converted.append(frame.pts)
        return pixels(self, frame, stream)

    monkeypatch.setattr(decoding.Movie, "_frames", counted)
    monkeypatch.setattr(decoding.Movie, "_pixels", noted)
    clip = read_clip(path, FramePolicy(fps=8, num_frames=9, height=24, width=32))
    wanted = [706 + 3 * k for k in range(9)]  # 60 s, the middle 9/8 s of it begin at 29.4375 s, nearest to frame 706
    assert clip.numbers.tolist() == wanted
    assert numbers(clip.frames) == [n % 31 for n in wanted]
    assert clip.frames.shape == (9, 24, 32, 3)
    assert len(converted) == 9
    assert len(decoded) <= 24 + 1 + 12


def test_a_film_of_1080p_needs_the_memory_of_the_frames_taken(tmp_path):
    fast = {"preset": "ultrafast", "g": "250"}
    path = movie(
        tmp_path / "a.mp4",
        31,
        rate=1,
        size=(1080, 1920),
        before=lambda stream: setattr(stream, "options", fast),
    )
    tracemalloc.start()
    clip = read_clip(path, FramePolicy(height=90, width=160))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers(clip.frames) == list(range(31))
    assert peak < 31 * 90 * 160 * 3 + 4 * 1080 * 1920 * 3  # of 193 MB that all frames would be


@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # met by gc
def test_decoded_frames_are_freed_at_once(files, monkeypatch):
    """They are FFmpeg's memory, which tracemalloc does not see; the garbage collector alone would free them late."""
    living, fit = [], clips._fit

    def counted(*given):
        living.append(sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects()))
        fit(*given)

    monkeypatch.setattr(clips, "_fit", counted)
    gc.collect()
    gc.disable()
    try:
        assert len(read_clip(files["h264.mp4"]).frames) == 24
    finally:
        gc.enable()
    assert len(living) == 24
    assert max(living) - living[0] <= 4


def test_the_page_runs_as_printed(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "videos.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    movie(tmp_path / "clip.mp4", 24, rate=16)
    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(compile(code, "videos.md", "exec"), seen)
    assert seen["clip"].frames.shape == (17, 60, 104, 3)
    assert seen["clip"].numbers.tolist() == list(range(3, 20))


def test_a_file_of_too_many_bytes_as_frames_names_the_way_out(files, monkeypatch):
    monkeypatch.setattr(video, "MOST_BYTES", 24 * 48 * 64 * 12 - 1)
    with pytest.raises(PrismError, match=r"as float32 frames; .* with prism.video.read_clip"):
        video.read_video(files["h264.mp4"])
    monkeypatch.setattr("prism.clips.MOST_BYTES", 24 * 48 * 64 * 3 - 1)
    with pytest.raises(PrismError, match=r"would be 24 frames of 48 x 64, .* give the frame policy"):
        read_clip(files["h264.mp4"])
    assert len(read_clip(files["h264.mp4"], FramePolicy(num_frames=23)).frames) == 23
