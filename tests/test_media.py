"""Videos survive the way through an mp4 file."""

from __future__ import annotations

import av
import numpy as np
import pytest

from prism import media
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


def test_odd_sizes_lose_one_row_or_column(tmp_path):
    media.write_video(tmp_path / "a.mp4", moving_square(height=33, width=41), fps=8)
    assert media.read_video(tmp_path / "a.mp4").shape == (9, 32, 40, 3)


@pytest.mark.parametrize("shape", [(9, 64, 48), (0, 64, 48, 3), (9, 64, 48, 4), (9, 1, 48, 3)])
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
