"""Public preference sets in the form they have: a few rows of each, its ties and its traps, labels by hand."""

from __future__ import annotations

import contextlib
import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.preference.readers import column, touch, votes, write

from prism import PrismError
from prism.preference import check, readers
from prism.preference.readers import FORMATS, read

CHAT = 'For this video, the text prompt is "{}",\nall the frames of video are as follows:\n<image>'


def dropped(found):
    return {why: [place.row for place in places] for why, places in found.dropped.items()}


def ratings(found, dimension):
    columns = zip(*(found.ratings[name].to_pylist() for name in ("video", "score", "dimension")))
    return [each[:2] for each in columns if each[2] == dimension]


VOTES = ["leftvote", "rightvote", "tievote", "bothbad_vote", ""]


def tiger(names):
    return [
        {"prompt": "a dog", **dict(zip(names, (f"{n}l.mp4", f"{n}r.mp4"))), "vote_type": v} for n, v in enumerate(VOTES)
    ]


@pytest.mark.parametrize("names", [("left_video", "right_video"), ("video_left", "video_right")])
def test_genai_bench_of_tiger_has_two_kinds_of_ties(tmp_path, names):
    touch(tmp_path, "videos/0l.mp4")
    found = read(write(tmp_path / "data.json", tiger(names)))
    assert found.form == "genai-bench-tiger"
    assert [vote[2] for vote in votes(found, "overall")] == [1, -1, 0, 0]
    assert column(found.votes, "given") == VOTES[:4]
    assert column(found.videos, "path")[0] == "videos/0l.mp4"
    assert dropped(found) == {"no label in any dimension": [4]}
    with pytest.raises(PrismError, match=r"column vote_type in row 0 .* found draw"):
        read(write(tmp_path / "data.json", [{**tiger(names)[0], "vote_type": "draw"}]))


def test_genai_bench_of_tiger_has_two_splits_that_are_kept_apart(tmp_path):
    for name in ("test-00000-of-00001.parquet", "test_v1-00000-of-00001.parquet"):
        write(tmp_path / name, tiger(("left_video", "right_video"))[:2])
    assert check.summary(read(tmp_path))["splits"] == {"test": 2, "test_v1": 2}


def test_genai_bench_of_cmu_compares_means_of_three(tmp_path):
    touch(tmp_path, "Gen2/00012.mp4")
    data = {"00012": {"prompt": "a cat", "models": {"Pika_v1": [3, 4, 2], "Gen2": [5, 4, 4], "Floor33": [2, 3, 4]}}}
    found = read(write(tmp_path / "genai_video.json", data))
    assert found.form == "genai-bench-cmu"
    assert column(found.videos, "model") == ["Pika_v1", "Gen2", "Floor33"]
    assert found.missing == ("Pika_v1/00012.mp4", "Floor33/00012.mp4")
    assert column(readers.pairs(found), "overall") == [-1, 0, 1]


def test_videodpo_counts_after_short_clips_are_taken_out(tmp_path):
    metadata = [
        {"basic": {"clip_path": f"{n}.mp4", "clip_duration": duration}, "misc": {"frame_caption": [f"prompt {n}"]}}
        for n, duration in enumerate([2.0, 0.5, 2.0, 1.0])
    ]
    pairs = [{"video1": 1, "video2": 0, "frame_caption": "a cat", "score": 0.75}, {"video1": 0, "video2": 2}]
    write(tmp_path / "metadata.json", metadata)
    found = read(write(tmp_path / "pair.json", pairs))
    assert votes(found, "overall") == [("0.mp4", "2.mp4", -1), ("0.mp4", "3.mp4", 1)]
    assert column(found.votes, "prompt") == ["a cat", "prompt 0"]
    assert column(found.votes, "p_a") == [0.25, None]
    assert votes(read(tmp_path), "overall") == votes(found, "overall")
    with pytest.raises(PrismError, match=r"column video1 in row 0 of pair.json .* a number below 3, .*; found 3"):
        read(write(tmp_path / "pair.json", [{"video1": 3, "video2": 0, "frame_caption": "a"}]))


def test_videodpo_without_metadata_has_a_folder_of_winners_and_one_of_losers(tmp_path):
    pairs = [{"video1": 0, "video2": 1, "frame_caption": "a cat"}, {"video1": 4, "video2": 7, "frame_caption": "b"}]
    found = read(write(tmp_path / "pair.json", pairs))
    assert votes(found, "overall") == [
        ("losevideos/000000.mp4", "winvideos/000000.mp4", -1),  # sides in the order of names: none gives it away
        ("losevideos/000003.mp4", "winvideos/000002.mp4", -1),
    ]


def test_shares_of_rapidata_are_probabilities_and_only_even_ones_tie(tmp_path):
    def row(first, second, shares, coherence):
        return {
            **{"prompt": "a cat", "file_name1": first, "file_name2": second, "model1": "wan", "model2": "sora"},
            **{"video1": f"https://example.org/{first}", "video2": f"https://example.org/{second}"},
            **{"weighted_results1_Preference": shares, "weighted_results2_Preference": 1 - shares},
            **{"weighted_results1_Coherence": coherence, "weighted_results2_Coherence": coherence and 1 - coherence},
        }

    touch(tmp_path, "videos/a.mp4")
    rows = [row("a.mp4", "b.mp4", 0.75, 0.5), row("b.mp4", "a.mp4", 0.75, None), row("a.mp4", "c.mp4", 0.45, 0.9)]
    found = read(write(tmp_path / "data" / "train-00000-of-00001.parquet", rows), root=tmp_path)
    assert found.dimensions == ("Coherence", "overall")
    assert votes(found, "overall") == [
        ("videos/a.mp4", "b.mp4", None),
        ("b.mp4", "videos/a.mp4", None),
        ("videos/a.mp4", "c.mp4", None),
    ]
    table = readers.pairs(found)
    assert column(table, "overall") == [0, -1]  # .75 for either side: even
    assert column(readers.pairs(found, margin=0.1), "overall") == [0, 0]
    assert column(table, "Coherence") == [0, 1]
    assert column(table, "overall:p_a") == [0.5, pytest.approx(0.45)]
    assert found.missing == ("b.mp4", "c.mp4")
    with pytest.raises(PrismError, match="weighted_results1_Preference in row 0"):
        read(write(tmp_path / "x.jsonl", [row("a.mp4", "b.mp4", 1.5, None)]))


def test_datapoints_clips_stand_in_the_table(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "prompt": ["a cat"],
            "video1": pa.array([{"bytes": b"GIF89a", "path": "0.gif"}], kind),
            "video2": pa.array([{"bytes": b"mp4", "path": "0.gif"}], kind),
            "weighted_results1_Prompt_Adherence": [0.2],
            "weighted_results2_Prompt_Adherence": [0.8],
        }
    )
    found = read(write(tmp_path / "train.parquet", table))
    assert column(found.videos, "path") == ["train.parquet#video1/0", "train.parquet#video2/0"]
    assert column(readers.pairs(found), "Prompt_Adherence") == [-1]


def test_visionreward(tmp_path):
    rows = [
        {
            "internal_id": str(n),
            "prompt": "a cat",
            "standard_answer": answer,
            "video1_path": "a",
            "video2_path": f"b{n}",
        }
        for n, answer in enumerate(["A", "B", None])
    ]
    found = read(write(tmp_path / "test.parquet", rows))
    assert votes(found, "overall") == [("a", "b0", 1), ("a", "b1", -1)]
    assert dropped(found) == {"no label in any dimension": [2]}


def chat(question, answer, **cells):
    return {**cells, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_videofeedback_has_scores_and_prompt_inside_text_and_frames_as_pictures(tmp_path):
    answer = "visual quality: 3\ntemporal consistency: 2\ndynamic degree: 4\ntext-to-video alignment: 1\n"
    answer += "factual consistency: 2"
    rows = [
        chat(CHAT.format('a "big", old cat'), answer, id="p1", images=["p1_00.jpg", "p1_01.jpg"]),
        chat(CHAT.format('a "big", old cat'), answer.replace("3", "4"), id="p2", images=["p2_00.jpg"]),
        chat("<image>", answer, id="p3", images=["p3_00.jpg"]),
        chat(CHAT.format("a dog"), "good", id="p4", images=["p4_00.jpg"]),
    ]
    found = read(write(tmp_path / "train.json", rows))
    assert column(found.videos, "frames")[0] == ["p1_00.jpg", "p1_01.jpg"]
    assert column(found.videos, "path") == [None, None]
    assert column(found.videos, "prompt") == ['a "big", old cat'] * 2
    assert ratings(found, "visual quality") == [("p1", 3), ("p2", 4)]
    assert ratings(found, "temporal consistency") == [("p1", 2), ("p2", 2)]
    assert len(found.dimensions) == 5
    assert dropped(found) == {"no prompt in the question’s text": [2], "no scores in the answer’s text": [3]}


def test_videofeedback2_in_its_three_forms(tmp_path):
    question = 'We would like to evaluate a video. Text prompt: "a cat"'
    answer = (
        "<think>I see\nsharpness: 1\nvisual quality: 1</think>\n(1) visual quality: 3\n(2) text-to-video alignment: 4\n"
    )
    answer += "(3) physical/common-sense consistency: 2"
    rows = [
        chat(question, answer, videos=["videos/004250_a.mp4"]),
        chat(question, answer, videos=["videos/004250_b.mp4"]),
    ]
    chats = read(write(tmp_path / "sft.json", rows))
    solution = "<answer>visual quality: 3; text-to-video alignment: 4; physical/common-sense consistency: 2</answer>"
    problems = [
        {"problem_id": 1, "problem": question, "solution": solution, "path": f"videos/004250_{letter}.mp4"}
        for letter in "aba"
    ]
    answers = read(write(tmp_path / "rl.json", problems))
    tests = [
        {"video_name": f"videos/004250_{letter}", "prompt": "a cat", "visual_score": 3, "t2v_score": 4, "phy_score": 2}
        for letter in "ab"
    ]
    last = read(write(tmp_path / "test.json", tests))
    for found in (chats, answers, last):
        for dimension, score in {"visual quality": 3, "text-to-video alignment": 4}.items():
            assert ratings(found, dimension) == [(f"videos/004250_{letter}.mp4", score) for letter in "ab"]
        assert len(found.dimensions) == 3
        assert ratings(found, "physical/common-sense consistency")[0][1] == 2
        assert column(found.videos, "model") == ["a", "b"]
        assert column(found.videos, "prompt") == ["a cat"] * 2
    assert dropped(answers) == {"the clip was rated in an earlier row": [2]}


def test_pickapic(tmp_path):
    def row(first, second, labels, **cells):
        return {
            **{
                "caption": "a cat",
                "image_0_uid": first,
                "image_1_uid": second,
                "label_0": labels,
                "label_1": 1 - labels,
            },
            **{"jpg_0": first.encode(), "jpg_1": second.encode(), "model_0": "sdxl", "model_1": "sd2", "user_id": 7},
            **{"has_label": True, "are_different": True, "num_example_per_prompt": 4, **cells},
        }

    rows = [row("x", "y", 1.0), row("x", "z", 0.0), row("y", "z", 0.5), row("x", "x", 1.0, are_different=False)]
    found = read(write(tmp_path / "train.parquet", [*rows, row("x", "w", 1.0, has_label=False)]))
    assert votes(found, "overall") == [("x", "y", 1), ("x", "z", -1), ("y", "z", 0)]
    assert column(found.videos, "path") == ["train.parquet#jpg_0/0", "train.parquet#jpg_1/0", "train.parquet#jpg_1/1"]
    assert column(found.votes, "confidence") == [0.25] * 3
    assert column(found.votes, "annotator") == ["7"] * 3
    assert dropped(found) == {"both sides are the same clip": [3], "no label in any dimension": [4]}
    with pytest.raises(PrismError, match="column label_0 in row 0"):
        read(write(tmp_path / "train.parquet", [row("x", "y", 0.7)]))


def test_hpdv3_names_the_better_image_first(tmp_path):
    rows = [
        {"prompt": "a cat", "path1": "b.jpg", "path2": "a.jpg", "confidence": 0.9, "choice_dist": [9, 1]},
        {"prompt": "a cat", "path1": "a.jpg", "path2": "c.jpg", "confidence": None, "choice_dist": None},
    ]
    found = read(write(tmp_path / "train.json", rows))
    assert votes(found, "overall") == [("a.jpg", "b.jpg", -1), ("a.jpg", "c.jpg", 1)]
    assert column(found.votes, "p_b") == [0.9, None]
    table = readers.pairs(found)
    assert column(table, "overall:p_a") == [pytest.approx(0.1), None]
    assert column(table, "overall:weight") == [pytest.approx(0.9), None]


def test_imagerewarddb_ranks_images_of_a_prompt(tmp_path):
    rows = [
        {"image_path": f"{name}.webp", "prompt_id": "1", "prompt": "a cat", "rank": rank, "overall_rating": rating}
        for name, rank, rating in (("a", 1, 5), ("b", 2, 5), ("c", 2, 3))
    ]
    table = readers.pairs(read(write(tmp_path / "train.json", rows)))
    assert column(table, "overall") == [1, 1, 0]
    assert column(table, "overall_rating") == [0, 1, 1]


def test_groups_with_several_teachers(tmp_path):
    records = [
        {
            **{"sample_id": name, "image_path": f"images/{name}.jpg", "latent_x0_path": f"{name}.pt"},
            **{"teacher_score_raw": raw, "teacher_score_zscore": raw / 2, "teacher_score_zscore_clipped": raw / 2},
            **{"pickscore": pick, "imagereward_score": math.nan},
        }
        for name, raw, pick in (("a", -10.3, 0.8), ("b", 0.42, 0.7))
    ]
    found = read(write(tmp_path / "groups.jsonl", [{"group_id": "5b", "prompt": "a cat", "image_records": records}]))
    assert found.dimensions == ("hpsv3", "pickscore")
    table = readers.pairs(found)
    assert (column(table, "hpsv3"), column(table, "pickscore"), column(table, "overall")) == ([-1], [1], [None])


COLUMNS = {
    "chosen-rejected": "prompt chosen rejected dimension annotator confidence chosen_model split",
    "ratings": "prompt video dimension score annotator fps num_frames",
    "videoalign": "prompt path_A path_B VQ MQ fps_A num_frames_A MOS_A_VQ Style",
    "genai-bench-tiger": "prompt left_video right_video vote_type",
    "videodpo": "video1 video2 frame_caption score",
    "fractions": "prompt video1 video2 weighted_results1_Preference weighted_results2_Preference",
    "visionreward": "prompt video1_path video2_path standard_answer",
    "videofeedback": "id conversations images videos",
    "videofeedback2-answers": "problem solution path",
    "videofeedback2-test": "video_name prompt visual_score t2v_score phy_score",
    "pickapic": "caption image_0_uid image_1_uid image_0_url image_1_url label_0 label_1 num_example_per_prompt",
    "hpdv3": "prompt path1 path2 confidence choice_dist",
    "imagerewarddb": "prompt prompt_id rank image_path overall_rating",
    "groups": "prompt image_records",
    "label-studio": "data annotations",
}
LISTS = [[{"from": "human", "value": 'prompt: "x"'}, {"from": "gpt", "value": "look: 1"}], [{"image_path": "a"}]]
RESULTS = [{"from_name": "VQ", "value": {"choices": ["A"]}}, {"value": {"selected": "left"}}, {"value": 1}]
LISTS += [[{"result": RESULTS}]]
TASK = {"path_A": "a.mp4", "path_B": "b.mp4", "prompt": "x"}
CELLS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2)),
    st.sampled_from(["A", "a.mp4", "b.mp4", "0.5", 1, 0, 0.5, *LISTS, TASK]),
)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_cells_of_any_format_give_a_set_or_a_sentence(tmp_path_factory, data):
    form = data.draw(st.sampled_from(sorted(COLUMNS)))
    rows = [{name: data.draw(CELLS) for name in COLUMNS[form].split()} for _ in range(3)]
    path = write(tmp_path_factory.getbasetemp() / "any" / "own.jsonl", rows)
    with contextlib.suppress(PrismError):
        check.summary(read(path, form))


@settings(max_examples=60, deadline=None)
@given(CELLS, CELLS, CELLS)
def test_any_cells_of_objects_and_of_a_second_file_give_a_set_or_a_sentence(tmp_path_factory, first, second, third):
    folder = tmp_path_factory.getbasetemp() / "objects"
    path = write(folder / "genai_video.json", {"00012": {"prompt": first, "models": {"Gen2": second, "..": [3]}}})
    with contextlib.suppress(PrismError):
        check.summary(read(path, "genai-bench-cmu"))
    write(folder / "metadata.json", [{"basic": {"clip_path": first, "clip_duration": second}, "misc": third}])
    with contextlib.suppress(PrismError):
        read(write(folder / "pair.json", [{"video1": 0, "video2": 1, "frame_caption": "x"}]), "videodpo")


def test_every_format_is_among_the_hostile_ones():
    assert {*COLUMNS, "genai-bench-cmu"} == set(FORMATS)
