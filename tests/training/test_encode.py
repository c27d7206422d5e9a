"""Clips and a CSV become a store whose latents are those of the clips, whatever happens on the way."""

from __future__ import annotations

import contextlib
import csv
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import forks, tiny

from prism import files
from prism.backbone import Backbone
from prism.cli import main
from prism.clips import FramePolicy, read_clip
from prism.errors import PrismError
from prism.judge import Judge
from prism.preference import LatentStore
from prism.preference.readers import read
from prism.training import TrainConfig, train
from prism.training import encode as encoding
from prism.training.encode import encode
from prism.video import write_video

POLICY = FramePolicy(num_frames=9, height=32, width=32, start="first")
CALL = tiny.CALL_WAN
PROMPTS = 12


def make_set(folder: Path) -> Path:
    """Two clips of noise for each of some prompts, and VideoAlign's CSV; the files' sizes and lengths differ."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for place in range(PROMPTS):
        for side in "ab":
            size = (9 + place % 3, 32 + 4 * (place % 2), 40, 3)
            write_video(folder / f"{place}{side}.mp4", rng.uniform(size=size), 8)
        label = ("A", "B", "same")[place % 3]
        rows.append([f"{place}a.mp4", f"{place}b.mp4", f"prompt number {place}", label, "A", "B"])
    with (folder / "pairs.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path_A", "path_B", "prompt", "VQ", "MQ", "TA"])
        writer.writerows(rows)
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("set") / "clips")


def made(data, backbone, out, **options) -> LatentStore:
    options = {"held_out": (0.2, 0.2), "unit": 5, "progress": False, **options}
    return encode(read(data), backbone, CALL, POLICY, out, **options)


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_latents_are_those_of_the_clips_and_labels_those_of_the_file(data, backbone, tmp_path):
    store = made(data, backbone, tmp_path / "store")
    assert len(store.videos) == 2 * PROMPTS
    for video in ("3b.mp4", "11a.mp4"):
        expected = backbone.encode(read_clip(str(data.parent / video), POLICY).frames[None]).half().float()
        assert torch.equal(store.latents([video]), expected)
        clip = read_clip(str(data.parent / video), POLICY)
        row = next(row for row in store.videos.to_pylist() if row["video"] == video)
        luma = clip.frames @ np.array([0.2126, 0.7152, 0.0722]) / 255
        assert row["clip_brightness"] == pytest.approx(luma.mean(), abs=1e-6)
        assert row["clip_motion"] == pytest.approx(np.abs(np.diff(luma, axis=0)).mean(), abs=1e-6)
        facts = clip.info.duration, clip.info.fps, clip.info.height * clip.info.width
        assert (row["clip_seconds"], row["clip_fps"], row["clip_pixels"]) == pytest.approx(facts)
    by_pair = {row["video_a"]: row for row in store.pairs.to_pylist()}
    labels = [by_pair[f"{place}a.mp4"]["VQ"] for place in range(PROMPTS)]
    assert labels == [(1, -1, 0)[place % 3] for place in range(PROMPTS)]
    assert {row["MQ"] for row in by_pair.values()} == {1}
    assert store.call == CALL
    splits = dict(zip(store.videos["prompt"].to_pylist(), store.videos["split"].to_pylist()))
    assert set(splits.values()) == {"train", "validation", "test"}
    judge = Judge.untrained(backbone, tap=2, dim=32, dimensions=("VQ", "MQ"))
    config = TrainConfig(steps=2, prompts_per_step=2, validate_every=0)
    assert train(store, judge, config, tmp_path / "run", progress=False)["history"]


def test_a_run_that_broke_off_goes_on_to_the_same_files(data, backbone, tmp_path, monkeypatch):
    made(data, backbone, tmp_path / "whole")
    whole, calls = Backbone.encode, []

    def breaks(self, video):
        calls.append(video)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return whole(self, video)

    monkeypatch.setattr(Backbone, "encode", breaks)
    with pytest.raises(KeyboardInterrupt):
        made(data, backbone, tmp_path / "broken")
    made(data, backbone, tmp_path / "broken", resume=True)
    assert len(calls) == 13 + 24 - 10  # two units of five were whole
    assert sums(tmp_path / "broken") == sums(tmp_path / "whole")
    with pytest.raises(PrismError, match="differs in key: frames"):
        encode(
            read(data), backbone, CALL, FramePolicy(num_frames=9, height=32, width=32), tmp_path / "broken", resume=True
        )


def test_clips_that_cannot_be_read_are_told_and_left_out_with_their_pairs(data, backbone, tmp_path, capsys):
    again = make_set(tmp_path / "clips")
    (tmp_path / "clips" / "2a.mp4").write_bytes(b"no video")
    (tmp_path / "clips" / "4b.mp4").unlink()
    store = made(again, backbone, tmp_path / "store")
    assert re.search(r"2 clips could not be read .*2a\.mp4.* \.\.\.$", capsys.readouterr().err.strip())  # the first one
    assert len(store.videos) == 2 * PROMPTS - 2
    assert {row["video_a"] for row in store.pairs.to_pylist()} == {
        f"{p}a.mp4" for p in range(PROMPTS) if p not in (2, 4)
    }


@pytest.mark.parametrize("stops", [None, 4])
def test_clips_are_read_ahead_a_few_at_a_time_and_no_thread_is_left(data, backbone, tmp_path, monkeypatch, stops):
    read_one, encode_one, started, encoded = encoding.read_clip, Backbone.encode, [], []

    def reads(source, *arguments):
        started.append((Path(source).name, threading.current_thread() is threading.main_thread()))
        assert len(started) <= len(encoded) + encoding.AHEAD + 1  # else memory would hold more and more clips
        return read_one(source, *arguments)

    def encodes(self, video):
        if len(encoded) == stops:
            raise KeyboardInterrupt
        while len(started) < min(len(encoded) + 2, 2 * PROMPTS):  # the next one is being read by now
            time.sleep(0.001)
        result = encode_one(self, video)
        encoded.append(video)
        return result

    monkeypatch.setattr(encoding, "read_clip", reads)
    monkeypatch.setattr(Backbone, "encode", encodes)
    with pytest.raises(KeyboardInterrupt) if stops else contextlib.nullcontext():
        made(data, backbone, tmp_path / "store", unit=2 * PROMPTS)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prism-clips")]
    assert not any(main for _, main in started)
    if not stops:
        assert sorted(name for name, _ in started) == sorted(
            f"{place}{side}.mp4" for place in range(PROMPTS) for side in "ab"
        )


def test_another_size_than_the_pipelines_and_unknown_splits_are_refused(data, backbone, tmp_path):
    policy = FramePolicy(num_frames=5, height=32, width=32, start="first")
    with pytest.raises(PrismError, match="5 frames of 32 x 32 give latents"):
        encode(read(data), backbone, CALL, policy, tmp_path / "store", progress=False)
    with pytest.raises(PrismError, match="held_out must be two shares"):
        made(data, backbone, tmp_path / "other", held_out=(0.6, 0.4))


def test_two_processes_write_the_store_of_one(data, tmp_path, capsys):
    tiny.wan().save_pretrained(tmp_path / "pipe")
    words = ["encode", str(data), "--num-frames", "9", "--height", "32", "--width", "32", "--start", "first"]
    words += ["--unit", "5", "--device", "cpu", "--backbone", str(tmp_path / "pipe"), "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    assert "24 clips and 12 pairs" in capsys.readouterr().out
    two = forks.run(main, [*words, str(tmp_path / "two")])
    assert [process.code for process in two] == [0, 0], two
    assert ["24 clips and 12 pairs" in process.out for process in two] == [True, False]
    assert sums(tmp_path / "one") == sums(tmp_path / "two")
