"""prism reproduce on a tiny pipeline with a store of its own: against the evaluator, resuming, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism import cli, runs, shapeworld
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import measure
from prism.evaluation.recorded import Recorded
from prism.judge import Judge
from prism.lab import bench, front, reproduce
from prism.lab.experiments import cuts
from prism.lab.findings import CLAIMED
from prism.report.metrics import validate
from prism.training import train

pytestmark = pytest.mark.usefixtures("intervals_of_few")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of two experiments: its folder, metrics, store and pipeline."""
    folder = tmp_path_factory.mktemp("reproduce")
    torch.manual_seed(0)
    pipe = tiny.wan()
    pipe.save_pretrained(folder / "pipe")
    store = stores.make(folder / "store", prompts=(6, 3, 6))
    few = replace(bench.SCALES["quick"], seeds=2, dim=16, train=replace(bench.RECIPE, steps=3, prompts_per_step=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SCALES, "quick", few)
        options = {"data": folder / "store", "backbone": str(folder / "pipe"), "device": "cpu", "tap": 2}
        metrics = reproduce.run(folder / "out", ["noise-robustness", "query-and-pooling", "best-of-n"], **options)
        yield folder, metrics, store, pipe, options


def test_a_head_is_the_one_that_training_alone_gives(made, tmp_path):
    folder, _, store, pipe, _ = made
    saved = Judge.from_pretrained(folder / "out" / "heads" / "mean" / "seed-1" / "head", pipe)
    alone = Judge.untrained(pipe, tap=2, dim=16, dimensions=store.dimensions, seed=1, aggregation="mean")
    train(store, alone, replace(bench.RECIPE, steps=3, prompts_per_step=2, seed=1), tmp_path / "alone", progress=False)
    for name, weight in alone.head.state_dict().items():
        assert torch.equal(weight, saved.head.state_dict()[name]), name


def test_the_table_is_the_evaluators(made):
    folder, metrics, store, pipe, _ = made
    judges = [
        Judge.from_pretrained(folder / "out" / "heads" / "query" / f"seed-{seed}" / "head", pipe) for seed in (0, 1)
    ]
    rows = list(csv.DictReader((folder / "out" / "tables" / "accuracy.csv").open()))
    for t in (899, 499):
        each = [
            row["without_ties"]
            for judge in judges
            for row in measure(judge, store, "test", [t], progress=False).rows
            if row["dimension"] == "overall"
        ]
        written = next(row for row in rows if float(row["t"]) == t)
        assert float(written["without_ties"]) == pytest.approx(np.mean(each))
    heads = list(csv.DictReader((folder / "out" / "tables" / "heads.csv").open()))
    assert [row["kind"] for row in heads] == ["query", "mean", "linear", "queries-4", "queries-8", "eta-3", "eta-8"]
    assert {f"at {t:g}" for t in CLAIMED} <= set(heads[0])
    validate(metrics)


def test_a_claim_without_its_rival_holds_in_part_at_most(made):
    folder, metrics, *_ = made
    answers = {row["experiment"]: row for row in metrics["answers"]}
    assert answers["noise-robustness"]["verdict"] != "holds"
    assert "No judge of decoded frames was measured" in answers["noise-robustness"]["text"]
    command = f"prism reproduce query-and-pooling --scale quick --seed 0 --backbone {folder / 'pipe'} --data "
    assert answers["query-and-pooling"]["command"] == f"{command}{folder / 'store'} --tap 2"


def test_what_a_store_cannot_answer_is_said_on_the_page(made):
    folder, metrics, *_ = made
    assert "best-of-n" not in {row["experiment"] for row in metrics["answers"]}
    page = (folder / "out" / "report.html").read_text()
    assert "Left out: Early cuts." in page
    assert "http" not in page.replace("http://www.w3.org", "")  # no request leaves the page


def test_a_run_goes_on_and_adds_experiments(made, capsys):
    folder, _, _, _, options = made
    before = (folder / "out" / "findings" / "noise-robustness.json").read_bytes()
    with pytest.raises(PrismError, match="exists already; choose another --out, or continue with --resume"):
        reproduce.run(folder / "out", **options)
    metrics = reproduce.run(folder / "out", ["depth"], resume=True, **options)
    assert {"depth", "noise-robustness"} <= {row["experiment"] for row in metrics["answers"]}
    assert (folder / "out" / "findings" / "noise-robustness.json").read_bytes() == before
    assert "about 1 minute on" in capsys.readouterr().err
    depth = list(csv.DictReader((folder / "out" / "tables" / "depth.csv").open()))
    assert {row["block"] for row in depth} == {str(block) for block in range(1, Backbone(tiny.wan()).num_blocks + 1)}
    with pytest.raises(PrismError, match="differs in seed: it was 0 and is now 1"):
        reproduce.run(folder / "out", resume=True, seed=1, **options)
    config = folder / "out" / "config.json"
    identity = json.loads(config.read_text())
    config.write_text(json.dumps({**identity, "version": "0.0.1"}))
    with pytest.raises(PrismError, match="differs in version"):
        reproduce.run(folder / "out", resume=True, **options)
    config.write_text(json.dumps(identity))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["noise-robust"], "There is no experiment noise-robust; did you mean noise-robustness"),
        (["states"], "The experiment states runs at --scale full alone."),
        (
            ["--correlate", "a"],
            "Backbones are correlated by scores of their videos; give both --correlate and --quality.",
        ),
        (["--correlate", "a", "--quality", "b.csv"], "name their store with --data"),
        (["--batch-size", "0"], "--batch-size must be"),
        (["--tap", "0"], "--tap must be a whole number from 1 to 6; found 0"),
        (["--scale", "huge"], "The --scale is huge; choose quick or full."),
        (["--backbone", "nowhere"], "A backbone of your own needs labelled videos of its own; name their store with"),
    ],
)
def test_what_is_refused(words, sentence, tmp_path):
    with pytest.raises(PrismError, match=sentence):
        cli.run(["reproduce", *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_table_that_ships_answers_early_cuts_by_hand_too(monkeypatch, tmp_path):
    """Oracle: the pick of the largest score after step 4 among all eight candidates, by hand."""
    scores = Recorded.load_file(front.shipped())
    reading = next(each for each in scores.scores if each[:2] == ("now", 4))
    values, by_step = scores.reward("overall"), scores.scores[reading][..., 0]
    picked = np.take_along_axis(values, by_step.reshape(values.shape).argmax(1)[:, None], 1)[:, 0]
    share = (picked - values.mean(1)).sum() / (values.max(1) - values.mean(1)).sum()
    monkeypatch.setattr(cuts, "_parts", lambda bench, judge: [])
    backbone = Backbone(shapeworld.pipeline())
    parts = runs.claim(tmp_path / "run", {"command": "test"})
    finding = cuts.run(bench.Bench(parts, bench.SCALES["quick"], backbone, shapeworld.CALL))
    rows = {(row["n"], row["name"]): row for row in finding.tables["best-of-n"]}
    assert {n for n, _ in rows} == {3, 5, 8}
    assert rows[8, "cut at 4"]["share"] == pytest.approx(share, abs=1e-6)
    assert finding.prompts == len(values) == 200
    assert finding.seeds == (0,)
    assert "came with the package" in finding.text


def test_a_damaged_file_of_the_folder_is_named_and_answers_nothing(made):
    folder, _, _, _, options = made
    finding, table = (folder / "out" / name for name in ("findings/depth.json", "measured/depth-1-0.parquet"))
    whole = table.read_bytes()
    for path, damaged, words in (
        (finding, b"{", "depth.json"),
        (table, whole[:100], "depth-1-0.parquet, and it is made"),
    ):
        finding.unlink(missing_ok=True)
        path.write_bytes(damaged)
        with pytest.raises(PrismError, match=words):
            reproduce.run(folder / "out", ["depth"], resume=True, **options)
    table.unlink()
    reproduce.run(folder / "out", ["depth"], resume=True, **options)
    assert table.read_bytes() == whole
