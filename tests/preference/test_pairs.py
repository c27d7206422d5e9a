"""Labels from scores, the paper's aggregation, and splits that leak."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from prism.errors import PrismError
from prism.preference import check_disjoint, group_by_prompt, pairs_from_scores, prompt_key

MARGINS = {"VQ": 0.3, "MQ": 0.4, "TA": 0.2}


def videos() -> pa.Table:
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(4) for _ in range(5)]
    scores = {name: np.round(rng.uniform(0, 1, 20), 1) for name in MARGINS}  # rounded: equal scores happen
    scores["TA"][3] = np.nan
    splits = ["train"] * 10 + ["validation"] * 5 + ["test"] * 5
    return pa.table({"video": [f"v{i}" for i in range(20)], "prompt": prompts, "split": splits, **scores})


def test_pairs_from_scores_equals_one_pair_at_a_time():
    table = videos()
    by_id = {row["video"]: row for row in table.to_pylist()}
    pairs = pairs_from_scores(table, MARGINS).to_pylist()
    expected = [{a, b} for a, b in itertools.combinations(by_id, 2) if by_id[a]["prompt"] == by_id[b]["prompt"]]
    assert [{pair["video_a"], pair["video_b"]} for pair in pairs] == expected
    assert len(expected) == 4 * 10
    for pair in pairs:
        a, b = by_id[pair["video_a"]], by_id[pair["video_b"]]
        assert (pair["prompt"], pair["split"]) == (a["prompt"], a["split"])
        votes = []
        for name, margin in MARGINS.items():
            difference = a[name] - b[name]
            vote = None if np.isnan(difference) else 0 if abs(difference) <= margin else 1 if difference > 0 else -1
            assert pair[name] == vote
            votes.append(vote)
        decided = {vote for vote in votes if vote}
        if None in votes or len(decided) == 2:
            assert pair["overall"] is None
        else:
            assert pair["overall"] == (decided.pop() if decided else 0)
    assert {pair["overall"] for pair in pairs} == {None, -1, 0, 1}


def test_pairs_from_scores_refuses():
    with pytest.raises(PrismError, match="no score column AQ"):
        pairs_from_scores(videos(), {"AQ": 0.1})
    with pytest.raises(PrismError, match="margin of VQ"):
        pairs_from_scores(videos(), {"VQ": -0.1})
    with pytest.raises(PrismError, match="overall"):
        pairs_from_scores(videos(), {"overall": 0.1})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.set_column(0, "video", pa.array(range(20))), "column video .* must hold texts, found 0 in row 0"),
        (lambda t: t.set_column(1, "prompt", pa.array([None] * 20)), "column prompt .* must hold texts, found None"),
        (
            lambda t: t.set_column(3, "VQ", pa.array(["good"] * 20)),
            "scores VQ of the videos must be numbers, found string",
        ),
        (lambda t: t.drop_columns(["split"]), "need one column split"),
        (lambda t: t.to_pylist(), "must be a table of pyarrow, found list"),
    ],
)
def test_pairs_from_scores_refuses_odd_tables(change, sentence):
    with pytest.raises(PrismError, match=sentence):
        pairs_from_scores(change(videos()), MARGINS)
    with pytest.raises(PrismError, match=r"tie margin of VQ must be a finite number; found 0\.3x"):
        pairs_from_scores(videos(), {"VQ": "0.3x"})


@pytest.mark.parametrize("prompt", [None, 3, ["a cat"], b"a cat", {"text": "a cat"}])
def test_a_prompt_that_is_no_text_is_named(prompt):
    with pytest.raises(PrismError, match=r"A prompt must be a text, found .*(None|3|a cat)"):
        prompt_key(prompt)


def test_groups_hold_every_labelled_pair_of_their_split():
    pairs = pairs_from_scores(videos(), MARGINS)
    groups = group_by_prompt(pairs, ("TA", "overall"), "train")
    assert [group.prompt for group in groups] == ["prompt 0", "prompt 1"]
    rebuilt = {
        (group.videos[a], group.videos[b]): tuple(None if np.isnan(x) else int(x) for x in labels)
        for group in groups
        for a, b, labels in zip(group.first, group.second, group.labels)
    }
    assert rebuilt == {
        (row["video_a"], row["video_b"]): (row["TA"], row["overall"])
        for row in pairs.to_pylist()
        if row["split"] == "train" and not (row["TA"] is None and row["overall"] is None)
    }
    assert len(rebuilt) == 16  # four pairs of the video without a TA score carry no label


def test_groups_refuse_unknown_dimensions_and_labels():
    pairs = pairs_from_scores(videos(), MARGINS)
    with pytest.raises(PrismError, match="no labels for AQ; they have VQ, MQ, TA, overall"):
        group_by_prompt(pairs, ("AQ",), "train")
    bad = pairs.set_column(pairs.column_names.index("VQ"), "VQ", pa.array([7] * len(pairs), pa.int8()))
    with pytest.raises(PrismError, match="must be 1, -1, 0 or null, found 7"):
        group_by_prompt(bad, ("VQ",), "train")
    words = pairs.set_column(pairs.column_names.index("VQ"), "VQ", pa.array(["A"] * len(pairs)))
    with pytest.raises(PrismError, match="must be 1, -1, 0 or null, found string"):
        group_by_prompt(words, ("VQ",), "train")


def leak(pairs: pa.Table, column: str, value: str) -> pa.Table:
    """The last pair (a test pair) with one entry replaced."""
    values = [*pairs[column].to_pylist()[:-1], value]
    return pairs.set_column(pairs.column_names.index(column), column, pa.array(values))


def test_check_disjoint_finds_a_planted_leak():
    pairs = pairs_from_scores(videos(), MARGINS)
    check_disjoint(pairs)
    with pytest.raises(PrismError, match="prompt 'prompt 0' is in the splits train and test"):
        check_disjoint(leak(pairs, "prompt", "prompt 0"))
    with pytest.raises(PrismError, match=r"prompt ' Prompt +0' is in the splits train and test"):
        check_disjoint(leak(pairs, "prompt", " Prompt  0"))
    with pytest.raises(PrismError, match="video 'v1' is in the splits train and test"):
        check_disjoint(leak(pairs, "video_b", "v1"))
