"""Evaluation of a store of several shapes, calls and generators: figures by hand, kept scores, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import forks, tiny
from tests.evaluation import mixed

from prism import cli, files
from prism.errors import PrismError
from prism.evaluation import (
    Measurement,
    accuracy_rows,
    bias_rows,
    generator_rows,
    measure,
    pairwise_accuracy,
    reliability_rows,
    swap_test,
)
from prism.evaluation.evaluator import noised
from prism.evaluation.facts import decoded, facts_of
from prism.judge import Judge


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return mixed.make(tmp_path_factory.mktemp("mixed") / "store")


@pytest.fixture(scope="module")
def judge():
    made = Judge.untrained(tiny.wan(), tap=2, dim=16, dimensions=("VQ", "overall"), seed=1)
    with torch.no_grad():
        made.head.mlp[-1].weight *= 30
    return made


@pytest.fixture(scope="module")
def measured(judge, store):
    made = measure(judge, store, timesteps=(700, 0), seed=5, batch_size=3, progress=False)
    return made


def pairs_of(store):
    """(place among the store's pairs, row) of the test pairs with a label."""
    return [(i, row) for i, row in enumerate(store.pairs.to_pylist()) if row["split"] == "test"]


def test_each_video_is_scored_with_its_call_and_shape(measured, judge, store):
    assert {store.shape_of(video) for video in store.videos["video"].to_pylist()} == set(mixed.SHAPES.values())
    scores = {}
    for row in store.videos.to_pylist():
        if row["split"] == "test":
            noisy = noised(judge.backbone, store.latents([row["video"]]), [row["video"]], 700, 0, 5)
            call = {**tiny.CALL_WAN, **json.loads(row["call"])}
            scores[row["video"]] = judge.score(noisy, [row["prompt"]], 700, **call)[0, 0].item()
    rows = [row for row in measured.pairs.to_pylist() if row["t"] == 700 and row["dimension"] == "VQ"]
    assert [row["row"] for row in rows] == [i for i, row in pairs_of(store)]
    for row, (_, pair) in zip(rows, pairs_of(store)):
        assert (row["video_a"], row["video_b"], row["label"]) == (pair["video_a"], pair["video_b"], pair["VQ"])
        assert row["score_a"] == pytest.approx(scores[row["video_a"]], abs=1e-4)
        assert row["margin"] == row["score_a"] - row["score_b"]


def test_the_public_evaluators_value_is_that_of_the_scores_in_the_stores_order(measured, store):
    for row in accuracy_rows(measured, "videoalign"):
        table = [r for r in measured.pairs.to_pylist() if (r["t"], r["dimension"]) == (row["t"], row["dimension"])]
        labels, margins = [r["label"] for r in table], [r["margin"] for r in table]
        assert row["with_ties_videoalign"] == pairwise_accuracy(labels, margins, method="videoalign").with_ties
    assert "with_ties_videoalign" not in accuracy_rows(measured)[0]
    with pytest.raises(PrismError, match="method"):
        accuracy_rows(measured, "genai")


def test_pairs_of_generators_by_hand(measured, store):
    models = {row["video"]: row["model"] for row in store.videos.to_pylist()}
    found = generator_rows(measured)
    assert {(row["model_a"], row["model_b"]) for row in found} == {
        (a, b) for a in mixed.MODELS for b in mixed.MODELS if a <= b
    }
    for row in found:
        right, people, judged = [], [], []
        for pair in measured.pairs.to_pylist():
            sides = (models[pair["video_a"]], models[pair["video_b"]])
            here = sorted(sides) == [row["model_a"], row["model_b"]]
            if here and (pair["t"], pair["dimension"]) == (row["t"], row["dimension"]) and pair["label"]:
                turn = 1 if sides[0] == row["model_a"] else -1
                right.append(pair["label"] * pair["margin"] > 0)
                people.append(pair["label"] * turn == 1)
                judged.append(pair["margin"] * turn > 0)
        assert (row["decided_pairs"], row["without_ties"]) == (len(right), pytest.approx(np.mean(right)))
        if row["model_a"] == row["model_b"]:
            assert row["people_share"] is row["difference"] is None
        else:
            shares = [row["people_share"], row["judge_share"], row["difference"]]
            assert shares == pytest.approx([np.mean(people), np.mean(judged), np.mean(judged) - np.mean(people)])


def test_bias_probes_by_hand(measured, store):
    videos = {row["video"]: row for row in store.videos.to_pylist()}
    columns = {"length": "clip_seconds", "resolution": None, "brightness": "clip_brightness", "motion": "clip_motion"}
    rows = bias_rows(measured)
    assert {row["probe"] for row in rows} == set(columns)  # one rate alone tells nothing
    for row in rows:
        people, judged, prompts = [], [], []
        for pair in measured.pairs.to_pylist():
            a, b = (videos[pair[f"video_{side}"]] for side in "ab")
            column = columns[row["probe"]]
            x, y = (
                (32 * 48 if v["call"] != "{}" else 32 * 32 for v in (a, b))
                if column is None
                else (a[column], b[column])
            )
            if (pair["t"], pair["dimension"]) != (row["t"], row["dimension"]) or not pair["label"] or None in (x, y):
                continue
            if abs(x - y) > 0.05 * max(x, y):
                people.append(pair["label"] * np.sign(x - y) > 0)
                judged.append(pair["margin"] * np.sign(x - y) > 0)
                prompts.append(pair["prompt"])
        assert (row["pairs"], row["prompts"]) == (len(people), len(set(prompts)))
        assert [row["people_share"], row["judge_share"]] == pytest.approx([np.mean(people), np.mean(judged)])
        low, high = row["difference_ci95"]
        assert low <= row["difference"] <= high
        assert row["difference"] == pytest.approx(np.mean(judged) - np.mean(people))
    assert measured.about["units"]["length"] == "seconds"


def test_facts_come_from_calls_and_decoded_frames_where_columns_are_missing(judge, store):
    videos = store.videos.drop_columns(["clip_seconds", "clip_brightness", "clip_motion"])
    bare = type(store)(store.folder, store.meta, videos, store.pairs, {})
    facts, units = facts_of(bare, ["v9-0", "v9-1"])
    assert facts["length"] == {"v9-0": 9.0, "v9-1": 9.0}
    assert units["length"] == "frames"
    assert facts["resolution"] == {"v9-0": 1024.0, "v9-1": 1536.0}
    assert "brightness" not in facts
    made = measure(judge, bare, timesteps=(700,), progress=False, decode=True)
    row = next(row for row in made.pairs.to_pylist() if "v9-1" in (row["video_a"], row["video_b"]))
    side = "a" if row["video_a"] == "v9-1" else "b"
    frames = judge.backbone.decode(store.latents(["v9-1"]))[0].double().numpy()
    luma = np.round(frames * 255) @ np.array([0.2126, 0.7152, 0.0722]) / 255
    expected = luma.mean(), np.abs(np.diff(luma, axis=0)).mean()
    assert (row[f"brightness_{side}"], row[f"motion_{side}"]) == pytest.approx(expected, abs=1e-5)
    assert decoded(judge.backbone, store, "v9-1", "") == pytest.approx(expected, abs=1e-5)


def test_margins_turn_their_sign_with_the_sides(judge, store):
    row = swap_test(judge, store, t=700)
    assert (row["pairs"], row["flipped"]) == (32, 0)
    assert row["largest_difference"] < 1e-5

    class First:
        """A judge that likes what comes first in a batch."""

        name, backbone, dimensions, eta, trained_on = "first", judge.backbone, ("VQ",), 5.0, {}

        def score(self, noisy_latents, prompts, t, **call):
            return -torch.arange(len(noisy_latents), dtype=torch.float32)[:, None]

    calls = dict(zip(store.videos["video"].to_pylist(), store.videos["call"].to_pylist()))
    alike = sum(calls[row["video_a"]] == calls[row["video_b"]] for _, row in pairs_of(store)[:32])
    assert swap_test(First(), store, t=700)["flipped"] == alike > 0  # the others are each alone in a batch
    assert swap_test(First(), store, t=700)["largest_difference"] == 2.0


def test_reliability_by_hand(measured, store):
    rows = reliability_rows(measured)
    assert [(row["t"], row["dimension"]) for row in rows] == [(t, d) for t in (700, 0) for d in ("VQ", "overall")]
    soft = {i: row["VQ:p_a"] for i, row in enumerate(store.pairs.to_pylist()) if row["VQ:p_a"] is not None}
    for row in rows:
        table = [r for r in measured.pairs.to_pylist() if (r["t"], r["dimension"]) == (row["t"], row["dimension"])]
        losses, p_better, better = [], [], []
        for pair in table:
            x = np.exp(pair["margin"])
            p = [x / (x + 5), 24 * x / ((x + 5) * (1 + 5 * x)), 1 / (1 + 5 * x)]
            q = [pair["label"] == 1, pair["label"] == 0, pair["label"] == -1]
            if row["dimension"] == "VQ" and pair["row"] in soft:
                q = [0.7, 0.2, 0.1]
            losses.append(-sum(b * np.log(a) for a, b in zip(p, q)))
            p_better += [p[0], p[2]]
            better += [q[0], q[2]]
        assert row["soft_pairs"] == (sum(pair["row"] in soft for pair in table) if row["dimension"] == "VQ" else 0)
        assert row["nll"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert sum(point[2] for point in row["curve"]) == len(better)
        assert sum(point[1] * point[2] for point in row["curve"]) == pytest.approx(sum(better), rel=1e-6)
        error = sum(abs(p - q) * n for p, q, n in row["curve"]) / len(better)
        assert row["calibration_error"] == pytest.approx(error)
        assert 0 < row["calibration_error_by_chance"] < 0.15
        assert row["refitted"]["eta"] > 1
        low, high = row["nll_ci95"]
        assert low < row["nll"] < high


def test_scores_that_were_kept_give_the_same_rows_to_the_bit(measured, tmp_path):
    measured.save(tmp_path / "scores.parquet")
    again = Measurement.load(tmp_path / "scores.parquet")
    for figures in (accuracy_rows, generator_rows, bias_rows, reliability_rows):
        assert json.dumps(figures(again)) == json.dumps(figures(measured))
    assert accuracy_rows(again) == measured.rows
    assert (again.settings, again.about) == (measured.settings, json.loads(json.dumps(measured.about)))


DAMAGES = {
    "a margin": lambda t: t.set_column(t.column_names.index("margin"), "margin", pa.array(np.zeros(len(t)))),
    "NaN": lambda t: t.set_column(t.column_names.index("score_a"), "score_a", pa.array(np.full(len(t), np.nan))),
    "labels": lambda t: t.set_column(t.column_names.index("label"), "label", pa.array([3] * len(t))),
    "texts": lambda t: t.set_column(t.column_names.index("t"), "t", pa.array(["x"] * len(t))),
    "levels": lambda t: t.set_column(t.column_names.index("t"), "t", pa.array(np.full(len(t), 2e3))),
    "no rows": lambda t: t.slice(0, 0),
    "no column": lambda t: t.drop_columns(["prompt"]),
    "null": lambda t: t.set_column(t.column_names.index("prompt"), "prompt", pa.nulls(len(t), pa.string())),
    "no notes": lambda t: t.replace_schema_metadata(None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_scores_is_one_sentence(damage, measured, tmp_path):
    measured.save(tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    pq.write_table(DAMAGES[damage](table), tmp_path / "scores.parquet")
    with pytest.raises(PrismError, match=r"scores.parquet is no whole measurement"):
        Measurement.load(tmp_path / "scores.parquet")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["eta", "calibration", "levels", "log_snr", "source", "units", "head_seed"]),
    st.one_of(st.none(), st.integers(-2, 3), st.text(max_size=3), st.lists(st.floats(), max_size=2),
              st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)), min_size=1))  # fmt: skip
def test_any_description_of_a_judge_ends_in_a_sentence_or_in_rows(measured, tmp_path, changes):
    Measurement([], measured.pairs, measured.settings, measured.tuning, {**measured.about, **changes}).save(
        tmp_path / "s.parquet"
    )
    try:
        again = Measurement.load(tmp_path / "s.parquet")
    except PrismError:
        return
    accuracy_rows(again), bias_rows(again), reliability_rows(again)


def test_dimensions_without_labels_are_left_out(store):
    other = Judge.untrained(tiny.wan(), tap=1, dim=16, dimensions=("VQ", "TA"))
    with pytest.warns(UserWarning, match="no labels of TA"):
        made = measure(other, store, timesteps=(700,), progress=False)
    assert {row["dimension"] for row in made.rows} == {"VQ"}
    with pytest.raises(PrismError, match=r"The judge scores TA, and the pairs of .* have labels of VQ, overall"):
        measure(Judge.untrained(tiny.wan(), tap=1, dim=16, dimensions=("TA",)), store, progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("processes")
    pipe = tiny.wan()
    pipe.save_pretrained(folder / "backbone")
    for seed in (1, 2):
        judge = Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "overall"), seed=seed)
        judge.save_pretrained(folder / f"head-{seed}", {"seed": seed})
    return folder


def rows_in(folder):
    metrics = files.read_json(folder / "metrics.json")
    return {name: value for name, value in metrics.items() if name not in ("timings", "environment")}


def test_one_and_two_processes_and_kept_scores_give_the_same_metrics(place, store, tmp_path, capsys):
    words = ["eval", "--backbone", str(place / "backbone"), "--data", str(store.folder), "--timesteps", "700,0"]
    plain = [*words, "--head", str(place / "head-1"), "--device", "cpu", "--ties", "videoalign", "--batch-size", "5"]
    assert cli.main([*plain, "--out", str(tmp_path / "1")]) == 0
    both = forks.run(cli.main, [*plain, "--out", str(tmp_path / "2")])
    assert [process.code for process in both] == [0, 0], both
    one = rows_in(tmp_path / "1")
    assert one == rows_in(tmp_path / "2")
    assert pq.read_table(tmp_path / "1/scores.parquet").equals(pq.read_table(tmp_path / "2/scores.parquet"))
    capsys.readouterr()
    kept = ["eval", "--from-scores", str(tmp_path / "1/scores.parquet"), "--ties", "videoalign"]
    assert cli.main([*kept, "--out", str(tmp_path / "again")]) == 0
    assert rows_in(tmp_path / "again") == one
    told = capsys.readouterr().out
    assert "Bias probes" in told
    assert "Swap test: " in told

    against = [*words, "--head", str(place / "head-2"), "--against", str(tmp_path / "1/scores.parquet")]
    assert cli.main([*against, "--out", str(tmp_path / "files")]) == 0
    both = [*words, "--head", str(place / "head-2"), "--against", str(place / "head-1")]
    assert cli.main([*both, "--out", str(tmp_path / "heads")]) == 0
    compared = rows_in(tmp_path / "heads")["judge_comparison"]
    assert compared == rows_in(tmp_path / "files")["judge_comparison"]
    assert {(Path(row["judge"]).name, Path(row["against"]).name) for row in compared} == {("head-2", "head-1")}
    page = (tmp_path / "heads" / "report.html").read_text()
    assert all(title in page for title in ("Per pair of generators", "Probabilities of better", "Accuracy of"))
    again = ["eval", "--from-scores", str(tmp_path / "files/scores.parquet"), "--against", against[-1]]
    assert cli.main([*again, "--out", str(tmp_path / "kept")]) == 0
    assert rows_in(tmp_path / "kept") == rows_in(tmp_path / "files")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--from-scores no.parquet", "no.parquet is no file"),
        ("--from-scores {0}/head-1/config.json", "is no whole measurement of a judge"),
        ("--from-scores {0}/x.parquet --seed 3", "leave --seed out"),
        ("--from-scores {0}/x.parquet --head {0}/head-1", "leave --head out"),
        ("--from-scores {0}/x.parquet --against {0}/head-1", "must be a scores.parquet too"),
        ("--against no.parquet", "The --against no.parquet is no file"),
        ("--ties none", "The --ties must be"),
    ],
)
def test_options_that_do_not_go_together(words, sentence, place, tmp_path, capsys):
    assert cli.main(["eval", *words.format(place).split(), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
