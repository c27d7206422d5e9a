"""People compare a store's videos: what they get is the store's own pixels, and what they say comes back to its ids."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow as pa
import pytest
from tests import tiny

from prism.backbone import Backbone
from prism.cli import main
from prism.errors import PrismError
from prism.preference import LatentStore
from prism.preference.readers import read
from prism.preference.sets import joined
from prism.training.annotation import clip_name, export, read_back
from prism.training.collect import collect
from prism.training.collect import label as label_store
from prism.training.reward import Reward
from prism.video import frames, probe, read_video

TEXTS = ("a red circle moves right", "a blue square moves up")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


@pytest.fixture(scope="module")
def labelled(backbone, tmp_path_factory):
    def brightness(video, prompt):
        return {"light": float(video.mean())}

    out = tmp_path_factory.mktemp("collected") / "store"
    rewards = [Reward(brightness, "plain")]
    return collect(TEXTS, backbone, tiny.CALL_WAN, out, rewards, candidates=3, seed=5, progress=False).folder


@pytest.fixture
def store(labelled, tmp_path):
    return shutil.copytree(labelled, tmp_path / "store")


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def filled(path, answers):
    """The exported table with the answer to each pair of ids; A is the pair's first."""
    table = rows(path)
    for row in table:
        sides = tuple(row[name].removeprefix("clips/") for name in ("path_A", "path_B"))
        for (a, b), label in answers.items():
            if sides in ((clip_name(a), clip_name(b)), (clip_name(b), clip_name(a))):
                swap = {"A": "B", "B": "A"} if sides[0] == clip_name(b) else {}
                row["Overall"] = swap.get(label, label)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def test_an_export_shows_the_pixels_of_the_store_and_nothing_of_its_seeds(store, backbone, tmp_path):
    chosen = export(store, backbone, tmp_path / "out", dimensions=("VQ", "overall"), seed=1, fps=5)
    opened = LatentStore.open(store)
    assert len(chosen) == 6
    assert len({frozenset(pair[1:]) for pair in chosen}) == 6
    assert chosen != export(store, backbone, tmp_path / "again", seed=2)
    table = rows(tmp_path / "out" / "pairs.csv")
    assert list(table[0]) == ["path_A", "path_B", "prompt", "VQ", "Overall"]
    for (prompt, a, b), row in zip(chosen, table):
        assert (row["prompt"], row["VQ"], row["Overall"]) == (prompt, "", "")
        for video, name in ((a, row["path_A"]), (b, row["path_B"])):
            assert video not in name
            decoded = frames(backbone.decode(opened.latents([video]))[0], "a clip")
            shown = read_video(tmp_path / "out" / name)
            assert probe(tmp_path / "out" / name).fps == 5
            assert np.abs(np.asarray(shown) - decoded).mean() < 0.02  # x264 at 10
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text(encoding="utf-8"))
    assert [task["data"]["path_A"] for task in tasks] == [row["path_A"] for row in table]
    assert tasks[0]["data"]["video_B"] == "/data/local-files/?d=" + table[0]["path_B"]
    interface = ET.fromstring((tmp_path / "out" / "labels.xml").read_text(encoding="utf-8"))
    assert [each.get("name") for each in interface.iter("Choices")] == ["VQ", "Overall"]
    assert [each.get("value") for each in interface.find("Choices")] == ["A", "same", "B"]


def test_a_filled_table_becomes_labels_of_the_stores_own_pairs_beside_the_earlier_ones(
    store, backbone, tmp_path, capsys
):
    before = LatentStore.open(store)
    ids = sorted(set(before.pairs["video_a"].to_pylist()) | set(before.pairs["video_b"].to_pylist()))
    shard_of = dict(zip(before.videos["video"].to_pylist(), before.videos["shard"].to_pylist()))
    first, second = ([v for v in ids if shard_of[v] == shard] for shard in sorted({shard_of[v] for v in ids}))
    answers = {(first[1], first[0]): "A", (first[0], first[2]): "same", (second[0], second[1]): "B"}
    assert (
        main(
            ["data", "export", str(store), "--out", str(tmp_path / "out"), "--backbone", str(saved(backbone, tmp_path))]
        )
        == 0
    )
    filled(tmp_path / "out" / "pairs.csv", answers)
    assert main(["data", "import", str(store), str(tmp_path / "out" / "pairs.csv")]) == 0
    assert "6 pairs labelled in light, overall" in capsys.readouterr().out
    after = LatentStore.open(store)
    light = {(row["video_a"], row["video_b"]): row["light"] for row in before.pairs.to_pylist()}
    seen = 0
    for row in after.pairs.to_pylist():
        sides = (row["video_a"], row["video_b"])
        assert row["light"] == (light[sides] if sides in light else -light[sides[::-1]])
        for (a, b), label in answers.items():
            if set(sides) == {a, b}:
                seen += 1
                value = {"A": 1, "B": -1, "same": 0}[label]
                assert row["overall"] == (value if sides == (a, b) else -value)
    assert seen == 3
    assert sum(row["overall"] is not None for row in after.pairs.to_pylist()) == 3
    assert main(["data", "import", str(store), str(tmp_path / "out" / "pairs.csv")]) == 2
    assert "has labels in overall already; give --overwrite" in capsys.readouterr().err
    assert main(["data", "import", str(store), str(tmp_path / "out" / "pairs.csv"), "--overwrite"]) == 0
    assert LatentStore.open(store).pairs.equals(after.pairs)


def saved(backbone, tmp_path):
    folder = tmp_path / "pipeline"
    backbone.pipe.save_pretrained(folder)
    return folder


def test_answers_outlive_a_second_export_and_a_reward_that_labels_anew(store, backbone, tmp_path):
    def darkness(video, prompt):
        return {"VQ": -float(video.mean()), "dark": -float(video.mean()), "even": 1.0}

    chosen = export(store, backbone, tmp_path / "out", dimensions=("MQ", "TA"), seed=1)
    table = rows(tmp_path / "out" / "pairs.csv")
    with open(tmp_path / "out" / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(row | {"MQ": "A", "TA": "B" * (number < 2)} for number, row in enumerate(table))
    answers = (tmp_path / "out" / "pairs.csv").read_bytes()
    export(store, backbone, tmp_path / "out", dimensions=("MQ", "TA"), seed=1, resume=True)
    assert (tmp_path / "out" / "pairs.csv").read_bytes() == answers
    opened = read_back(store, tmp_path / "out" / "pairs.csv")
    assert set(opened.dimensions) == {"light", "MQ", "TA"}  # no overall that nobody answered
    label_store(store, backbone, [Reward(darkness, "other")], progress=False)
    after = LatentStore.open(store)
    assert set(after.dimensions) == {"VQ", "MQ", "TA", "dark", "even", "overall"}
    by_pair = {(row["video_a"], row["video_b"]): row for row in after.pairs.to_pylist()}
    dark = {row["video"]: row["dark"] for row in after.videos.to_pylist()}
    assert len(by_pair) == 6
    for number, (_, a, b) in enumerate(chosen):
        row, sign = (by_pair[a, b], 1) if (a, b) in by_pair else (by_pair[b, a], -1)
        assert row["MQ"] == sign
        assert row["TA"] == (-sign if number < 2 else None)
        assert row["dark"] == sign * np.sign(dark[a] - dark[b])
    with pytest.raises(PrismError, match="People labelled MQ"):
        label_store(store, backbone, [Reward(lambda video, prompt: {"MQ": 1.0}, "third")], progress=False)
    assert LatentStore.open(store).pairs.equals(after.pairs)
    with open(tmp_path / "out" / "pairs.csv", "w", newline="") as file:  # a second file of other questions
        writer = csv.DictWriter(file, ["path_A", "path_B", "prompt", "style"])
        writer.writeheader()
        writer.writerows(
            {name: row[name] for name in table[0] if name not in ("MQ", "TA")} | {"style": "A"} for row in table
        )
    later = read_back(store, tmp_path / "out" / "pairs.csv")
    assert set(later.dimensions) == {*after.dimensions, "style"}
    label_store(store, backbone, [Reward(lambda video, prompt: {"flat": 1.0}, "third")], progress=False)
    assert set(LatentStore.open(store).dimensions) == {"flat", "MQ", "TA", "style"}


def annotated(task, number, **answers):
    results = [
        {"from_name": name, "to_name": "A", "type": "choices", "value": {"choices": [value]}}
        for name, value in answers.items()
    ]
    return {**task, "annotations": [{"completed_by": number, "result": results}]}


def test_label_studio_exports_come_back(store, backbone, tmp_path):
    chosen = export(store, backbone, tmp_path / "out", dimensions=("VQ", "overall"), seed=3)
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text(encoding="utf-8"))
    done = [annotated(tasks[0], 1, VQ="A", Overall="same"), annotated(tasks[1], 2, VQ="B", Overall="B"), tasks[2]]
    cancelled = {**annotated(tasks[3], 1, VQ="A"), "predictions": [{"result": []}]}
    cancelled["annotations"][0]["was_cancelled"] = True
    pairwise = {**tasks[4], "annotations": [{"completed_by": {"id": 7}, "result": [
        {"from_name": "pw", "type": "pairwise", "value": {"selected": "right"}},
        {"from_name": "note", "type": "textarea", "value": {"text": ["blurred"]}},
    ]}]}  # fmt: skip
    path = tmp_path / "out" / "export.json"
    path.write_text(json.dumps([*done, cancelled, pairwise]))
    answers = read(path)
    assert answers.form == "label-studio"
    assert answers.missing == ()
    assert {why: [each.row for each in places] for why, places in answers.dropped.items()} == {
        "no label in any dimension": [2, 3]
    }
    assert answers.votes["annotator"].to_pylist() == ["1", "1", "2", "2", "7"]
    read_back(store, path)
    labels = {(row["video_a"], row["video_b"]): row for row in LatentStore.open(store).pairs.to_pylist()}
    assert [labels[chosen[k][1:]]["VQ"] for k in (0, 1)] == [1, -1]
    assert [labels[chosen[k][1:]]["overall"] for k in (0, 1, 4)] == [0, -1, -1]
    flat = [
        {**tasks[k]["data"], "id": k, "VQ": "B", "Overall": "A", "annotator": 1, "annotation_id": k, "lead_time": 3.5}
        for k in range(2)
    ]  # JSON-MIN
    path.write_text(json.dumps(flat))
    read_back(store, path, overwrite=True)
    labels = {(row["video_a"], row["video_b"]): row for row in LatentStore.open(store).pairs.to_pylist()}
    assert [labels[chosen[k][1:]]["overall"] for k in (0, 1)] == [1, 1]


def test_earlier_labels_keep_their_meaning_where_people_saw_the_sides_exchanged():
    before = pa.table({
        **{"prompt": ["p", "p"], "video_a": ["x", "x"], "video_b": ["y", "z"], "split": ["train", "train"]},
        **{"m": pa.array([1, -1], pa.int8()), "m:p_a": pa.array([0.7, None], pa.float32())},
        **{"m:p_b": pa.array([0.2, None], pa.float32()), "m:weight": pa.array([3, None], pa.float32())},
    })  # fmt: skip
    sides = {"prompt": ["p"], "video_a": ["y"], "video_b": ["x"], "split": ["train"]}
    new = pa.table({**sides, "overall": pa.array([1], pa.int8())})
    first, second = joined(before, new, ["overall"]).to_pylist()
    assert [first[name] for name in ("video_a", "video_b", "m", "overall")] == ["y", "x", -1, 1]
    assert [round(first[f"m:{name}"], 6) for name in ("p_a", "p_b", "weight")] == [0.2, 0.7, 3]
    assert [second[name] for name in ("video_a", "video_b", "m", "overall")] == ["x", "z", -1, None]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("path_A,path_B,prompt,Overall\nclips/1.mp4,clips/2.mp4,p,A\n", "clips/1.mp4 is none of the store"),
        (
            "path_A,path_B,prompt,Overall\nclips/1.mp4,clips/2.mp4,p,left\n",
            "Overall in row 0 of answers.csv .* must hold one of a, b, same",
        ),
        ("path_A,path_B,prompt,Overall\n", "The answers hold no label"),
        ('[{"data": 3, "annotations": []}]', "an object with path_A, path_B and prompt"),
        ('[{"data": {}, "annotations": [3]}]', "a list of objects"),
        (
            '[{"data": {}, "annotations": [{"result": [{"from_name": "x", "value": {"choices": ["C"]}}]}]}]',
            "one of a, b",
        ),
        ('[{"data": {}, "annotations": [{"result": 3}]}]', "must hold a list"),
    ],
)
def test_answers_of_something_else_are_refused_and_the_store_stays(store, tmp_path, table, words):
    path = tmp_path / ("answers.json" if table.startswith("[") else "answers.csv")
    path.write_text(table)
    before = LatentStore.open(store).pairs
    with pytest.raises(PrismError, match=words):
        read_back(store, path)
    assert LatentStore.open(store).pairs.equals(before)


def test_an_export_that_was_stopped_goes_on_and_another_is_refused(store, backbone, tmp_path):
    export(store, backbone, tmp_path / "out", seed=1)
    clips = sorted((tmp_path / "out" / "clips").iterdir())
    clips[2].unlink()
    times = [clip.stat().st_mtime_ns for clip in clips if clip.exists()]
    export(store, backbone, tmp_path / "out", seed=1, resume=True)
    assert sorted((tmp_path / "out" / "clips").iterdir()) == clips
    assert [clip.stat().st_mtime_ns for k, clip in enumerate(clips) if k != 2] == times
    with pytest.raises(PrismError, match="seed"):
        export(store, backbone, tmp_path / "out", seed=2, resume=True)
    assert len(export(store, backbone, tmp_path / "few", pairs_per_prompt=1)) == 2
    for arguments, words in (
        ({"split": "tests"}, "no split tests"),
        ({"dimensions": ()}, "need a question"),
        ({"dimensions": ("a:b",)}, "cannot have this name"),
        ({"dimensions": ("VQ", "VQ")}, "twice among the questions"),
        ({"dimensions": ("path_A",)}, "stands for something else"),
        ({"dimensions": ("prompt",)}, "cannot have this name"),
    ):
        with pytest.raises(PrismError, match=words):
            export(store, backbone, tmp_path / "never", **arguments)
    assert not (tmp_path / "never").exists()
