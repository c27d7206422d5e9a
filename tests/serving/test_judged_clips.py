"""What the page says of a clip is what the judge says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import tiny

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.judge import Judge
from prism.serving.judged_clips import judged, opinion, overlaid, playable
from prism.video import read_clip, write_video

CALL = {**tiny.CALL_WAN, "output_type": "np"}


@pytest.fixture(scope="module")
def judge():
    return Judge.untrained(Backbone(tiny.wan("euler")), tap=1, dim=16)


@pytest.fixture
def clips(tmp_path):
    for number in range(2):
        frames = np.random.default_rng(number).random((CALL["num_frames"], CALL["height"], CALL["width"], 3))
        write_video(tmp_path / f"{number}.mp4", frames, 8)
    return [str(tmp_path / f"{number}.mp4") for number in range(2)]


def test_scores_and_opinion_are_the_judges(judge, clips):
    first, second = (judged(judge, clip, "a cat", CALL) for clip in clips)
    plain = judge.score_video(clips[0], "a cat", **CALL)
    assert torch.equal(first.scores.scores, plain.scores)
    assert torch.equal(first.scores.errors, plain.errors)
    assert 0 < first.attention.sum() <= 1 + 1e-5
    assert (first.attention.ndim, first.strip().shape[2]) == (3, 4)
    one, other = opinion(judge, first.scores, second.scores), opinion(judge, second.scores, first.scores)
    for name in judge.dimensions:
        assert one[name]["p_left"] + one[name]["p_tie"] + one[name]["p_right"] == pytest.approx(1)
        assert one[name]["p_left"] == pytest.approx(other[name]["p_right"])
        assert one[name]["left"] == pytest.approx(float(plain.scores[0, :, judge.dimensions.index(name)].mean()))
    with pytest.raises(PrismError, match="the judge needs its prompt"):
        judged(judge, clips[0], " ", CALL)


def test_a_head_without_a_query_is_scored_without_a_look(clips):
    plain = Judge.untrained(Backbone(tiny.wan("euler")), tap=1, dim=16, aggregation="mean")
    assert judged(plain, clips[0], "a cat", CALL, draws=1).attention is None


def test_frames_are_warm_where_the_weights_are():
    frames = np.full((9, 32, 32, 3), 100, np.uint8)
    weights = np.zeros((3, 4, 4))
    weights[0, 0, 0] = 1.0  # the first frames, top left
    lit = overlaid(frames, weights).astype(int)
    assert lit.shape == frames.shape
    assert lit[0, 0, 0, 0] - lit[0, 0, 0, 2] > 100
    assert abs(lit[0, -1, -1, 0] - lit[0, -1, -1, 2]) < 3
    assert abs(lit[-1, 0, 0, 0] - lit[-1, 0, 0, 2]) < 3


def test_what_browsers_do_not_play_is_converted(clips, tmp_path):
    assert str(playable(clips[0])) == clips[0]
    other = tmp_path / "0.mkv"
    other.write_bytes((tmp_path / "0.mp4").read_bytes())
    shown = playable(str(other))
    assert shown.suffix == ".mp4"
    assert read_clip(str(shown)).frames.shape == read_clip(clips[0]).frames.shape
