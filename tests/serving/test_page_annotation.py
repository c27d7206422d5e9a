"""Annotation without a browser: orders, sides, repeats, the file of answers, several annotators, kills, agreement."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.errors import PrismError
from prism.preference import check, readers
from prism.serving import comparisons
from prism.serving.annotators import GAP, Annotation, order
from prism.serving.answers import Answer, Answers
from prism.serving.comparisons import Pair
from prism.video import write_video

PAIRS = [Pair(f"clips/{i}.mp4", f"clips/{i}b.mp4", f"prompt {i % 10}") for i in range(60)]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


def judge(annotation, name, choose, most=10**6):
    """Judge items until there are none; `choose(item)` gives "left", "right" or "tie". The items in order."""
    seen = []
    while len(seen) < most:
        item, done, _ = annotation.next(name)
        if item is None:
            break
        assert done == len(seen)
        assert annotation.record(name, item.key, dict.fromkeys(annotation.dimensions, choose(item)), 1.5)
        seen.append(item)
    return seen


def test_an_order_has_each_pair_once_and_a_share_again_on_the_other_side():
    items = order(PAIRS, "Ada", 0.05)
    first = {item.pair: (place, item.left) for place, item in enumerate(items) if not item.again}
    again = {item.pair: (place, item.left) for place, item in enumerate(items) if item.again}
    assert sorted(first, key=PAIRS.index) == PAIRS
    assert len(again) == 3  # 5 % of 60
    for pair, (place, left) in again.items():
        assert place - first[pair][0] >= GAP
        assert left != first[pair][1]
    assert items == order(PAIRS, "Ada", 0.05)
    assert [item.pair for item in items] != [item.pair for item in order(PAIRS, "Bo", 0.05)]
    assert Counter(left for _, left in first.values()).keys() == {"path_A", "path_B"}
    assert sum(item.again for item in order(PAIRS[:2], "Ada", 1.0)) == 2


def test_labels_are_of_the_clips_and_not_of_the_sides(tmp_path):
    annotation = Annotation(PAIRS, tmp_path / "answers.csv", ("VQ", "overall"), 0.05)
    items = judge(annotation, "Ada", lambda item: "left" if item.left == "path_A" else "right")  # always clip A
    rows = list(csv.DictReader((tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()))
    assert {(row["VQ"], row["Overall"]) for row in rows} == {("A", "A")}
    assert [row["left"] for row in rows] == [item.left for item in items if not item.again]
    assert {row["annotator"] for row in rows} == {"Ada"}
    assert {row["seconds"] for row in rows} == {"1.50"}
    preference_set = readers.read(tmp_path / "answers.csv")  # VideoAlign's columns, told by themselves
    assert preference_set.dimensions == ("VQ", "overall")
    assert len(preference_set.votes) == 2 * len(PAIRS)
    assert set(preference_set.votes["label"].to_pylist()) == {1}
    (person,) = annotation.annotators()
    assert (person["pairs"], person["repeats"], person["alike"]) == (60, 3, {"VQ": 1.0, "overall": 1.0})


def test_one_who_always_chooses_the_left_contradicts_himself(tmp_path):
    annotation = Annotation(PAIRS, tmp_path / "answers.csv", ("overall",), 0.1)
    judge(annotation, "Lefty", lambda item: "left")
    (person,) = annotation.annotators()
    assert (person["left"], person["alike"], person["repeats"]) == (1.0, {"overall": 0.0}, 6)


def test_it_goes_on_where_the_file_ends_and_takes_back(tmp_path):
    path = tmp_path / "answers.csv"
    first = Annotation(PAIRS, path, ("overall",), 0.05)
    before = judge(first, "Ada", lambda item: "tie", most=20)
    second = Annotation(PAIRS, path, ("overall",), 0.05)
    following, done, total = second.next("Ada")
    assert (done, total) == (20, 63)
    assert following == order(PAIRS, "Ada", 0.05)[20]
    assert second.undo("Ada")
    assert second.next("Ada")[0] == before[-1]
    assert first.next("Ada")[0] == before[-1]  # another process sees the replaced file
    assert not second.undo("Bo")
    item, _, _ = second.next("Ada")
    assert second.record("Ada", item.key, {"overall": "left"}, 1.0)
    assert not second.record("Ada", item.key, {"overall": "right"}, 1.0)  # sent twice
    assert len(path.read_text().splitlines()) - 1 + len(second.again.rows) == 20


def test_agreement_is_that_of_the_reader_and_repeats_count_no_vote(tmp_path):
    annotation = Annotation(PAIRS, tmp_path / "answers.csv", ("overall",), 0.2)
    chance = random.Random(0)
    votes = {name: {pair: chance.choice(("left", "right", "tie")) for pair in PAIRS} for name in ("Ada", "Bo")}
    for name in votes:
        judge(annotation, name, lambda item, name=name: votes[name][item.pair])
    rows = annotation.answers.rows
    counts = np.zeros((len(PAIRS), 3))
    for row in rows:
        counts[[pair.path_a for pair in PAIRS].index(row.path_a), ("A", "B", "same").index(row.labels[0])] += 1
    assert (counts.sum(1) == 2).all()
    assert annotation.agreement()["overall"]["alpha"] == pytest.approx(check.alpha(counts))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), min_size=1, max_size=5),
    cut=st.integers(0, 200),
)
def test_a_row_that_was_cut_is_put_aside_and_all_others_stay(rows, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    answers = Answers(folder / "answers.csv", ("VQ",))
    every = [Answer(a, b, text, ("A",), name, 1.25, "path_B", "2026-01-01") for a, b, text, name in rows]
    ends = []
    for answer in every:
        answers.add(answer)
        ends.append((folder / "answers.csv").stat().st_size)
    assert Answers(folder / "answers.csv", ("VQ",)).rows == every
    size = max(ends[-1] - cut, len(",".join(answers.columns)) + 2)
    os.truncate(folder / "answers.csv", size)
    whole = [answer for answer, end in zip(every, ends) if end <= size]
    if size in (*ends, len(",".join(answers.columns)) + 2):
        assert Answers(folder / "answers.csv", ("VQ",)).rows == whole
        return
    with pytest.warns(UserWarning, match="was cut off in the middle"):
        opened = Answers(folder / "answers.csv", ("VQ",))
    assert opened.rows == whole
    assert len(list(folder.glob("*.cut-*"))) == 1
    opened.add(every[0])
    assert Answers(folder / "answers.csv", ("VQ",)).rows == [*whole, every[0]]


def _annotate(path, name, until):
    annotation = Annotation(PAIRS, path, ("overall",), 0.05)
    judge(annotation, name, lambda item: "left", most=until)
    if until < 63:
        os.kill(os.getpid(), signal.SIGKILL)


def test_several_processes_write_one_file_and_a_kill_loses_nothing(tmp_path):
    path = tmp_path / "answers.csv"
    context = multiprocessing.get_context("fork")
    tasks = [
        context.Process(target=_annotate, args=(path, name, until)) for name, until in (("A", 63), ("B", 40), ("C", 63))
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
    answers = Annotation(PAIRS, path, ("overall",), 0.05)
    counts = Counter(row.annotator for row in [*answers.answers.rows, *answers.again.rows])
    assert counts == {"A": 63, "B": 40, "C": 63}
    assert {task.exitcode for task in tasks} == {0, -signal.SIGKILL}


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(PrismError, match=r"have the columns a, b, and this page writes path_A, path_B, prompt, VQ"):
        Answers(path, ("VQ",))
    Answers(tmp_path / "own.csv", ("VQ",)).add(Answer("a", "b", "p", ("A",), "Ada", 1, "path_A", "now"))
    (tmp_path / "own.csv").write_text((tmp_path / "own.csv").read_text().replace(",A,Ada", ",better,Ada"))
    with pytest.raises(PrismError, match=r"in row 2 .*better.* no judgement that this page wrote"):
        Answers(tmp_path / "own.csv", ("VQ",))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(PrismError, match="are no CSV in UTF-8"):
        Answers(tmp_path / "bytes.csv", ("VQ",))
    annotation = Annotation(PAIRS, tmp_path / "new.csv", ("VQ", "MQ"))
    with pytest.raises(PrismError, match="needs a judgement of MQ: left, right or tie"):
        annotation.record("Ada", annotation.next("Ada")[0].key, {"VQ": "left"}, 1.0)
    for name in ("", "  ", "x" * 61):
        with pytest.raises(PrismError, match="name of 1 to 60 letters"):
            annotation.next(name)


def test_pairs_of_a_folder_and_of_a_table(tmp_path):
    for name, prompt in (("a", "a cat"), ("b", "a cat"), ("c", "a cat"), ("d", "a dog"), ("e", None)):
        write_video(tmp_path / f"{name}.mp4", np.zeros((2, 16, 16, 3)), 8)
        if prompt:
            (tmp_path / f"{name}.txt").write_text(prompt)
    found = comparisons.opened(tmp_path)
    assert {frozenset((pair.path_a, pair.path_b)) for pair in found.pairs} == {
        frozenset(f"{name}.mp4" for name in each) for each in itertools.combinations("abc", 2)
    }
    assert found.left_out == {"clips have no prompt in a text file of the same name": 1}
    assert len(comparisons.opened(tmp_path, pairs_per_prompt=1).pairs) == 1
    assert found.clip("a.mp4") == tmp_path / "a.mp4"
    table = tmp_path / "pairs.csv"
    table.write_text("path_A,path_B,prompt,VQ\na.mp4,b.mp4,a cat,\nd.mp4,none.mp4,a dog,\na.mp4,,a cat,\n")
    found = comparisons.opened(tmp_path)
    assert found.pairs == (Pair("a.mp4", "b.mp4", "a cat"),)
    assert found.left_out == {"their clips are missing": 1, "a cell is empty": 1}
    table.write_text("path_A,path_B,prompt\n../a.mp4,b.mp4,a cat\n")
    with pytest.raises(PrismError, match="outside of its folder"):
        comparisons.opened(table)
    table.write_text("path_A,path_B,prompt\nx.mp4,y.mp4,a cat\n")
    with pytest.raises(
        PrismError, match=r"There is no pair to compare in .*1 were left out, as their clips are missing"
    ):
        comparisons.opened(table)
    table.write_text("path,prompt\nx.mp4,a cat\n")
    with pytest.raises(PrismError, match="has the columns path, prompt; pairs need path_A, path_B and prompt"):
        comparisons.opened(table)
    with pytest.raises(PrismError, match="There is no file or folder"):
        comparisons.opened(tmp_path / "nowhere")


def test_a_clip_that_browsers_do_not_play_is_converted(tmp_path):
    from PIL import Image

    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=125)
    (tmp_path / "b.gif").write_bytes((tmp_path / "a.gif").read_bytes())
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("red")
    found = comparisons.opened(tmp_path)
    shown = found.clip(found.pairs[0].path_a)
    assert shown.suffix == ".mp4"
    assert found.clip(found.pairs[0].path_a) == shown
    assert len(comparisons.opened(tmp_path).pairs) == 1  # what was converted is no clip of the folder
