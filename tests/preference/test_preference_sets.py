"""Readers of preference sets: labels against what was written by hand, traps of each format, hostile files."""

from __future__ import annotations

import contextlib
import json
import math
import pickle

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.preference.readers import column, touch, votes, write

from prism import PrismError, cli
from prism.preference import check, readers
from prism.preference.readers import read
from prism.preference.sets import RATINGS, VIDEOS, VOTES
from prism.video import write_video

VIDEOALIGN = [  # peers.md: A, B, same and invalid; a clip recurs
    {"path_A": "a/1.mp4", "path_B": "b/1.mp4", "prompt": "a cat", "VQ": "A", "MQ": "same", "TA": "B"},
    {"path_A": "a/1.mp4", "path_B": "c/1.mp4", "prompt": "a cat", "VQ": "B", "MQ": "invalid", "TA": ""},
    {"path_A": "a/2.mp4", "path_B": "b/2.mp4", "prompt": "a dog, running", "VQ": "invalid", "MQ": "", "TA": "invalid"},
    {"path_A": "a/3.mp4", "path_B": "a/3.mp4", "prompt": "a cow", "VQ": "A", "MQ": "A", "TA": "A"},
    {"path_A": "a/4.mp4", "path_B": "b/4.mp4", "prompt": "", "VQ": "A", "MQ": "A", "TA": "A"},
]
FPS = {"fps_A": 24, "num_frames_A": 81, "fps_B": "8", "num_frames_B": "49"}


def test_videoalign(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/1.mp4")
    found = read(write(tmp_path / "train.csv", [{**row, **FPS} for row in VIDEOALIGN]))
    assert (found.form, found.root) == ("videoalign", tmp_path)
    assert found.videos.schema == VIDEOS
    assert found.votes.schema == VOTES
    assert found.ratings.schema == RATINGS
    assert votes(found, "VQ") == [("a/1.mp4", "b/1.mp4", 1), ("a/1.mp4", "c/1.mp4", -1)]
    assert votes(found, "MQ") == [("a/1.mp4", "b/1.mp4", 0)]
    assert votes(found, "TA") == [("a/1.mp4", "b/1.mp4", -1)]
    clips = {row["video"]: row for row in found.videos.to_pylist()}
    assert [clips["a/1.mp4"][name] for name in ("fps", "num_frames", "split")] == [24, 81, "train"]
    assert [clips["b/1.mp4"][name] for name in ("fps", "num_frames")] == [8, 49]
    assert found.missing == ("c/1.mp4", "a/2.mp4", "b/2.mp4", "a/3.mp4")
    assert {why: [place.row for place in places] for why, places in found.dropped.items()} == {
        "no label in any dimension": [2],
        "both sides are the same clip": [3],
        "no prompt": [4],
    }
    assert column(found.votes, "row") == [0, 0, 0, 1]
    assert set(column(found.votes, "source")) == {"train.csv"}


def test_videogen_rewardbench_has_models_and_overall_and_a_users_own_dimension(tmp_path):
    row = {**VIDEOALIGN[0], "A_model": "sora", "B_model": "kling", "Overall": "A", "Style": "B", "MOS_A_VQ": "4.5"}
    other = {**row, "path_B": "c.mp4", "B_model": "wan", "Overall": "", "Style": "tie"}
    found = read(write(tmp_path / "bench.csv", [row, other]))
    assert found.dimensions == ("VQ", "MQ", "TA", "Style", "overall")
    assert readers.pairs(found).column_names[4:] == ["VQ", "MQ", "TA", "Style", "overall"]
    assert votes(found, "overall") == [("a/1.mp4", "b/1.mp4", 1)]
    assert votes(found, "Style") == [("a/1.mp4", "b/1.mp4", -1), ("a/1.mp4", "c.mp4", 0)]
    assert column(found.videos, "model") == ["sora", "kling", "wan"]
    assert found.ratings.to_pylist() == [
        {"video": "a/1.mp4", "prompt": "a cat", "dimension": "VQ", "annotator": None, "score": 4.5}
        | {"source": "bench.csv", "row": 0}
    ]


def test_an_unknown_label_is_refused_with_file_row_and_column(tmp_path):
    path = write(tmp_path / "train.csv", [*VIDEOALIGN[:2], {**VIDEOALIGN[0], "MQ": "left"}])
    with pytest.raises(PrismError, match=r"column MQ in row 2 of train.csv .* must hold one of a, b, .*; found left"):
        read(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_ones_own_pairs_are_in_the_order_of_the_clips(tmp_path, ending):
    rows = [
        {"prompt": "a cat", "chosen": "x.mp4", "rejected": "y.mp4", "annotator": "eve", "confidence": 0.75},
        {"prompt": "a cat", "chosen": "z.mp4", "rejected": "x.mp4", "annotator": "bob", "confidence": 1.0},
        {"prompt": "a cat", "chosen": None, "rejected": "x.mp4", "annotator": "bob", "confidence": 1.0},
    ]
    found = read(write(tmp_path / f"own.{ending}", rows))
    assert votes(found, "overall") == [("x.mp4", "y.mp4", 1), ("x.mp4", "z.mp4", -1)]
    assert column(found.votes, "annotator") == ["eve", "bob"]
    assert column(found.votes, "confidence") == [0.75, 1.0]
    assert {why: len(rows) for why, rows in found.dropped.items()} == {"a clip is not named": 1}


def test_clips_in_parquet_are_known_by_their_bytes(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    one, two = {"bytes": b"one", "path": "0.mp4"}, {"bytes": b"two", "path": "0.mp4"}
    table = pa.table(
        {
            "prompt": ["a cat", "a cat", "a cat"],
            "chosen": pa.array([one, two, None], kind),
            "rejected": pa.array([b"two", b"three", b"one"], pa.binary()),
        }
    )
    found = read(write(tmp_path / "train-00000-of-00001.parquet", table))
    assert column(found.videos, "path") == [
        f"train-00000-of-00001.parquet#{place}" for place in ("chosen/0", "rejected/0", "rejected/1")
    ]
    assert len(found.videos) == 3
    assert len(found.votes) == 2
    assert column(found.votes, "split") == ["train"] * 2
    assert {why: len(rows) for why, rows in found.dropped.items()} == {"a clip is not named": 1}


def test_ratings_become_pairs_of_each_prompt(tmp_path):
    rows = [
        {"prompt": "a cat", "video": "x.mp4", "annotator": "eve", "look": 3, "motion": "1.5", "note": "fine"},
        {"prompt": "a cat", "video": "x.mp4", "annotator": "bob", "look": 4, "motion": "", "note": "7 out of 9"},
        {"prompt": "a cat", "video": "y.mp4", "annotator": "eve", "look": 3.5, "motion": "nan", "note": ""},
        {"prompt": "a cat", "video": "z.mp4", "annotator": "eve", "look": 1, "motion": 2, "note": ""},
        {"prompt": "a dog", "video": "w.mp4", "annotator": "eve", "look": 1, "motion": "", "note": ""},
    ]
    found = read(write(tmp_path / "own.csv", rows))
    assert found.form == "ratings"
    assert found.dimensions == ("look", "motion")
    assert len(found.ratings) == 7
    table = readers.pairs(found)
    assert list(zip(*(column(table, name) for name in ("video_a", "video_b", "look", "motion")))) == [
        ("x.mp4", "y.mp4", 0, None),  # 3.5 is the mean of 3 and 4
        ("x.mp4", "z.mp4", 1, -1),
        ("y.mp4", "z.mp4", 1, None),
    ]
    assert column(table, "overall") == [None, None, None]
    assert column(readers.pairs(found, margin=0.5), "motion") == [None, 0, None]


def test_two_formats_that_fit_are_named_and_nothing_is_guessed(tmp_path, capsys):
    row = {**VIDEOALIGN[0], "chosen": "x.mp4", "rejected": "y.mp4"}
    path = write(tmp_path / "both.csv", [row])
    with pytest.raises(PrismError, match=r"fits several formats: chosen-rejected, videoalign; .* --form"):
        read(path)
    assert votes(read(path, "chosen-rejected"), "overall") == [("x.mp4", "y.mp4", 1)]
    assert read(path, "videoalign").dimensions == ("VQ", "MQ", "TA")
    with pytest.raises(PrismError, match="does not fit --form ratings"):
        read(path, "ratings")
    with pytest.raises(PrismError, match="--form must be one of"):
        read(path, "videoaling")
    assert cli.main(["data", "check", str(path)]) == 2
    assert capsys.readouterr().err.startswith("prism: ")


def test_a_folder_of_files_is_one_set_and_what_fits_nothing_is_left(tmp_path):
    write(tmp_path / "train.csv", VIDEOALIGN[:2])
    write(tmp_path / "test.csv", [VIDEOALIGN[0]])
    write(tmp_path / "dataset_infos.json", {"default": {"features": {}}})
    found = read(tmp_path)
    assert sorted(set(column(found.votes, "split"))) == ["test", "train"]
    facts = check.summary(found)
    assert facts["shared_prompts"] == ["a cat"]
    assert facts["shared_videos"] == ["a/1.mp4", "b/1.mp4"]


def test_rules_of_joining_annotators(tmp_path):
    said = {"p": "AAB", "q": "AAS", "r": "ABS", "s": "SSS", "t": "ASS"}
    words = {"A": "A", "B": "B", "S": "same"}
    rows = [
        {"path_A": f"{prompt}1", "path_B": f"{prompt}2", "prompt": prompt, "VQ": words[vote], "annotator": str(number)}
        for prompt, each in said.items()
        for number, vote in enumerate(each)
    ]
    rows.append({"path_A": "t2", "path_B": "t1", "prompt": "t", "VQ": "B", "annotator": "3"})  # sides changed: A again
    found = read(write(tmp_path / "own.csv", rows))
    majority, paper = readers.pairs(found), readers.pairs(found, "paper")
    assert column(majority, "VQ") == [1, 1, 0, 0, 0]
    assert column(paper, "VQ") == [None, 1, None, 0, 1]
    soft = readers.pairs(found, soft=True)
    assert np.allclose(column(soft, "VQ:p_a"), [2 / 3, 2 / 3, 1 / 3, 0, 1 / 2])
    assert np.allclose(column(soft, "VQ:p_b"), [1 / 3, 0, 1 / 3, 0, 0])
    facts = check.summary(found)
    assert facts["conflicts"] == 2
    assert facts["duplicates"] == 0
    assert facts["prompts"] == 5
    assert facts["dimensions"] == {"VQ": {"A": 2, "B": 0, "tie": 3, "missing": 0}}


def test_the_overall_label_follows_by_the_papers_rule(tmp_path):
    rows = [
        {"path_A": f"{n}a", "path_B": f"{n}b", "prompt": n, "VQ": q, "MQ": m, "TA": t}
        for n, (q, m, t) in enumerate(
            [("A", "same", "A"), ("A", "B", "same"), ("same", "same", "same"), ("B", "B", "")]
        )
    ]
    assert column(readers.pairs(read(write(tmp_path / "own.csv", rows))), "overall") == [1, None, 0, None]


# -- agreement


def test_alpha_is_that_of_krippendorffs_own_example():
    """Four observers, twelve units: Computing Krippendorff's Alpha-Reliability (2011), section C: 0.743."""
    n = 0
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
        [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
    ]
    counts = np.array([[unit.count(value) for value in range(1, 6)] for unit in zip(*observers)], dtype=float)
    assert check.alpha(counts) == pytest.approx(0.743, abs=5e-4)
    low, high = check.interval(counts, range(12))
    assert low < 0.743 < high
    assert check.alpha(np.array([[3.0, 0], [2, 0]])) is None
    assert check.interval(counts, [0] * 12) == (None, None)


def test_agreement_turns_votes_to_one_side_and_resamples_prompts(tmp_path):
    rows = [
        {"path_A": "a"[: n < 2] + f"{prompt}", "path_B": f"b{prompt}", "prompt": prompt, "VQ": vote, "annotator": n}
        for prompt, both in {"p": "AA", "q": "BB", "r": "AB", "s": "BB"}.items()
        for n, vote in enumerate(both)
    ]
    found = read(write(tmp_path / "own.csv", rows))
    counts = np.array([[0, 2], [2, 0], [1, 1], [2, 0]], dtype=float)
    agreed = check.agreement(found, "VQ")
    assert agreed["alpha"] == pytest.approx(check.alpha(counts))
    assert (agreed["units"], agreed["prompts"]) == (4, 4)
    swapped = [
        {**row, "path_A": row["path_B"], "path_B": row["path_A"], "VQ": "BA"[row["VQ"] == "B"]}
        if row["annotator"]
        else row
        for row in rows
    ]
    assert check.agreement(read(write(tmp_path / "other.csv", swapped)), "VQ") == agreed


def test_every_kind_of_clip_is_opened_where_it_stands(tmp_path):
    """An mp4, a picture and bytes in Parquet, with a root above the table or elsewhere; a broken one is named."""
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "a.mp4", np.zeros((4, 16, 16, 3), np.uint8), 8)
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 64)
    whole = (tmp_path / "a.mp4").read_bytes()
    table = pa.table({"prompt": ["p"] * 2, "chosen": [whole, b"broken"], "rejected": ["a.png", "broken.mp4"]})
    path = write(tmp_path / "data" / "own.parquet", table)
    facts = check.summary(read(path, root=tmp_path), open_clips=True)
    assert [each["path"] for each in facts["unreadable"]] == ["data/own.parquet#chosen/1", "broken.mp4"]
    assert facts["missing"] == []
    facts = check.summary(read(path, root=tmp_path / "other"), open_clips=True)
    assert [each["path"] for each in facts["unreadable"]] == [f"{path}#chosen/1"]
    assert facts["missing"] == ["a.png", "broken.mp4"]


# -- the command


def test_data_check_prints_what_is_in_a_set(tmp_path, capsys):
    touch(tmp_path, "a/1.mp4")
    path = write(tmp_path / "train.csv", VIDEOALIGN)
    assert cli.main(["data", "check", str(path), "--probe"]) == 0
    out = capsys.readouterr().out
    for words in (
        "Format: videoalign",
        "2 pairs of 6 clips for 3 prompts",
        "Missing files: 5 (",
        "Unreadable files: 1",
    ):
        assert words in out
    assert "Dropped rows, no prompt: 1 (row 4 of train.csv (the first is 0))" in out
    assert "Archives" not in out
    assert "follows from the others" in out.split("overall")[1]
    touch(tmp_path, "videos.tar.gz.aa", "b.zip")
    assert cli.main(["data", "check", str(path)]) == 0
    assert "unpack these and check again: 2 (b.zip; videos.tar.gz.aa)" in capsys.readouterr().out
    assert cli.main(["data", "check", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dimensions"]["MQ"] == {"A": 0, "B": 0, "tie": 1, "missing": 1}
    assert facts["unreadable"] is None
    assert cli.main(["data"]) == 2
    assert "prism data check" in capsys.readouterr().out


# -- what is wrong with a file


def refused(path, *words, **settings):
    with pytest.raises(PrismError) as caught:
        read(path, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_paths_that_climb_out_are_refused(tmp_path):
    for bad in ("../x.mp4", "a/../../x.mp4", "/etc/passwd", "..\\x.mp4", "C:\\x.mp4", "a\0b"):
        path = write(tmp_path / "own.jsonl", [{"prompt": "p", "chosen": bad, "rejected": "y.mp4"}])
        refused(path, "column chosen", "row 0 of own.jsonl", "leads out of", "--root")
    touch(tmp_path, "x.mp4")
    inside = [{"prompt": "p", "chosen": str(tmp_path / "x.mp4"), "rejected": "./a/../y.mp4"}]
    found = read(write(tmp_path / "own.jsonl", inside))
    assert column(found.videos, "path") == ["x.mp4", "y.mp4"]
    assert found.missing == ("y.mp4",)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
def test_byte_order_marks_are_read(tmp_path, encoding, ending):
    found = read(write(tmp_path / f"own.{ending}", [{"prompt": "käse", "chosen": "x", "rejected": "y"}], encoding))
    assert column(found.videos, "prompt") == ["käse"] * 2


def test_other_encodings_are_named(tmp_path):
    path = write(tmp_path / "own.csv", [{"prompt": "käse", "chosen": "x", "rejected": "y"}], "cp1252")
    refused(path, "own.csv is not utf-8: byte", "0xe4", "--encoding")
    assert column(read(path, encoding="cp1252").videos, "prompt") == ["käse"] * 2
    refused(path, "There is no encoding rot-26", encoding="rot-26")


def test_long_prompts_semicolons_and_tabs(tmp_path):
    long = "cat, " * 250_000
    assert (
        column(read(write(tmp_path / "a.csv", [{"prompt": long, "chosen": "x", "rejected": "y"}])).videos, "prompt")[0]
        == long
    )
    (tmp_path / "b.csv").write_text('prompt;chosen;rejected\r\n"a;b";x;y\r\n')
    (tmp_path / "c.tsv").write_text("prompt\tchosen\trejected\na, b\tx\ty\n")
    assert column(read(tmp_path / "b.csv").videos, "prompt")[0] == "a;b"
    assert column(read(tmp_path / "c.tsv").videos, "prompt")[0] == "a, b"


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na cat, a dog,x,y\n")
    refused(tmp_path / "a.csv", "row 0 of a.csv", "4 cells where the header has 3")
    (tmp_path / "b.csv").write_text('prompt,chosen,rejected\n"a cat,x,y\n')
    refused(tmp_path / "b.csv", "no whole CSV file")
    (tmp_path / "c.csv").write_text("prompt,prompt,chosen\n")
    refused(tmp_path / "c.csv", "column prompt twice")
    (tmp_path / "d.csv").write_text("")
    refused(tmp_path / "d.csv", "is empty")
    (tmp_path / "e.json").write_text("[" * 100_000)
    refused(tmp_path / "e.json", "not valid JSON")
    (tmp_path / "f.jsonl").write_text('{"prompt": 1}\n{"prompt": \n')
    refused(tmp_path / "f.jsonl", "Line 2 of")
    (tmp_path / "g.json").write_text("[1, 2]")
    refused(tmp_path / "g.json", "must hold objects")
    (tmp_path / "h.pt").write_bytes(pickle.dumps({"labels": 1}))
    refused(tmp_path / "h.pt", "pickle", "never loaded")
    (tmp_path / "i.parquet").write_bytes(b"PAR1 no PAR1")
    refused(tmp_path / "i.parquet", "not a whole Parquet file")
    (tmp_path / "j.mp4").write_bytes(b"")
    refused(tmp_path / "j.mp4", "no table of labels")
    refused(tmp_path / "k.csv", "There is no file or folder")
    refused(tmp_path / "l", "There is no file or folder")
    (tmp_path / "m").mkdir()
    refused(tmp_path / "m", "holds no table of labels")
    write(tmp_path / "n.csv", [{"left": 1, "right": 2}])
    refused(tmp_path / "n.csv", "has the columns of no known format: left, right")
    refused(tmp_path / "n.csv", "--root", root=tmp_path / "nowhere")
    refused("owner/absent-set", "the Hub gave no data set of this name: HF_HUB_OFFLINE")


def test_cells_that_are_of_another_kind(tmp_path):
    for prompt, words in ((["a"], "must hold a text"), ("\ud800", "whole characters"), (True, "a text")):
        refused(
            write(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": "x", "rejected": "y"}]), "column prompt", words
        )
    refused(write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": [1], "rejected": "y"}]), "column chosen")
    rated = [{"prompt": "p", "video": "x", "look": look} for look in (1, "fine")]
    refused(write(tmp_path / "c.jsonl", rated), "column look in row 1", "a finite number; found fine")
    refused(write(tmp_path / "d.jsonl", [rated[0], {**rated[0], "look": math.inf}]), "column look in row 1", "inf")
    own = {"prompt": "p", "chosen": "x", "rejected": "y"}
    for name in ("VQ:p_a", "split"):
        refused(write(tmp_path / "f.jsonl", [{**own, "dimension": name}]), name, "row 0 of f.jsonl", "rename")
    refused(write(tmp_path / "g.jsonl", [{**own, "confidence": -1}]), "confidence in row 0", "-1")
    row = {**VIDEOALIGN[0], "num_frames_A": 1.5, "num_frames_B": 1}
    refused(write(tmp_path / "e.csv", [row]), "number of frames of a/1.mp4", "1.5")


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cells_give_a_set_or_a_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "cells"
    names = data.draw(
        st.sampled_from(
            [
                ("prompt", "chosen", "rejected", "confidence"),
                ("prompt", "video", "look"),
                ("path_A", "path_B", "prompt", "VQ"),
            ]
        )
    )
    rows = [{name: data.draw(CELLS) for name in names} for _ in range(3)]
    with contextlib.suppress(PrismError):
        check.summary(read(write(folder / "own.jsonl", rows)))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["csv", "json", "jsonl", "parquet", "tsv"]))
def test_any_bytes_give_a_sentence(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    path.write_bytes(data)
    with pytest.raises(PrismError):
        read(path)
