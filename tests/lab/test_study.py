"""The study on a tiny pipeline: its table against a slow evaluation, averages, resuming, and the one look at test."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tests import kills, stores, tiny
from tests.zoo import VARIANTS

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import measure
from prism.judge import Judge
from prism.lab import ablations
from prism.lab.ablation_results import BASE, chosen, table
from prism.report.metrics import validate
from prism.training import TrainConfig
from prism.training.validation import LEVELS

TRAIN = dataclasses.replace(ablations.RECIPE, steps=4, prompts_per_step=2, learning_rate=1e-3, log_every=4)
ONLY = ("heads-2", "heads-across", "taps-2+3", "draws-2", "steps-2", "mixed-0.5")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished study: its configuration, folder, metrics, store and pipeline."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    pipe = tiny.wan()
    pipe.save_pretrained(folder / "pipe")
    store = stores.make(folder / "store")
    config = ablations.StudyConfig(
        data=folder / "store", backbone=str(folder / "pipe"), train=TRAIN, dim=16, tap=2, draws=2, device="cpu"
    )
    return config, folder / "out", ablations.run(config, folder / "out", only=ONLY), store, pipe


def judge_of(out, pipe, name, seed, init):
    return Judge.from_pretrained(out / "heads" / name / f"seed-{seed}" / f"head-{init}", pipe)


def slow(judges, store, draws=1):
    """Accuracy on validation pairs with the evaluator itself, its noise being that of the study's first draws."""
    shares = []
    for judge in judges:
        rows = measure(judge, store, "validation", LEVELS, num_draws=draws, seed=0, progress=False).rows
        shares += [row["without_ties"] for row in rows if row["dimension"] == "overall"]
    return np.mean(shares)


def test_accuracies_are_the_evaluators(made):
    config, out, metrics, store, pipe = made
    rows = {row["variant"]: row for row in metrics["study"]}
    assert set(rows) >= {BASE, "tap-3", *ONLY, "heads-5"}  # what costs no training is there unasked
    assert not {"tap-1", "taps-all", "width-64"} & set(rows)
    heads = {
        (name, seed, init): judge_of(out, pipe, name, seed, init)
        for name in (BASE, "tap-3") for seed in (0, 1) for init in (0, 1)
    }  # fmt: skip
    both = [Judge.average([heads[BASE, seed, 0], heads[BASE, seed, 1]]) for seed in (0, 1)]
    draws = [judge for key, judge in heads.items() if key[0] == BASE]
    assert rows["draws-2"]["accuracy"] == pytest.approx(slow(draws, store, 2))
    taps = [Judge.average([heads[BASE, seed, init], heads["tap-3", seed, init]]) for seed in (0, 1) for init in (0, 1)]
    expected = {"heads-2": both, "taps-2+3": taps}
    # One draw: the study averages over both draws' accuracies, the evaluator makes the first.
    from prism.lab.ablation_results import Results, Variant, replicates

    results = Results(out, store, config)
    for name, judges in expected.items():
        variant = Variant(
            name, "", "", members=(BASE, "tap-3") if name == "taps-2+3" else (), heads=2 if "heads" in name else 1
        )
        shares = []
        for heads_of, judge in zip(replicates(variant, config), judges):
            margins = results.margins(variant, heads_of)
            found = measure(judge, store, "validation", LEVELS, seed=0, progress=False).pairs.to_pylist()
            overall = [row["margin"] for row in found if row["dimension"] == "overall"]
            known = ~np.isnan(results.labels[:, 1 + 1])
            np.testing.assert_allclose(margins[:, 0, known, 2].ravel(), overall, rtol=1e-4, atol=1e-5)
            shares.append(results.right(variant, "overall"))
        assert rows[name]["accuracy"] == pytest.approx(shares[0].mean())
    assert rows[BASE]["difference"] == 0
    assert rows["steps-2"]["judges"] == 4
    assert rows["heads-across"]["judges"] == rows["heads-2"]["judges"] == 2
    validate(json.loads((out / "metrics.json").read_text()))
    assert {path.stem for path in (out / "results").iterdir()} == set(rows)
    assert "| `taps-2+3` |" in (out / "study.md").read_text()


def test_variants_that_read_the_same_are_trained_together(made, tmp_path):
    _, out, _, store, pipe = made
    history = json.loads((out / "heads" / "steps-2" / "seed-0" / "history.json").read_text())
    assert history["head-0"][-1]["step"] == 2
    known = judge_of(out, pipe, "steps-2", 1, 0).trained_on
    assert (known["steps"], known["seed"]) == (2, 1)
    assert judge_of(out, pipe, "mixed-0.5", 0, 0).trained_on["source"] == "mixed"
    assert judge_of(out, pipe, "tap-3", 0, 0).tap == 3
    from prism.training import train

    alone = Judge.untrained(pipe, tap=3, dim=16, dimensions=store.dimensions, seed=1001)
    train(store, alone, dataclasses.replace(TRAIN, seed=1), tmp_path / "run", progress=False)
    together = judge_of(out, pipe, "tap-3", 1, 1)
    for name, value in alone.head.state_dict().items():
        assert torch.equal(value, together.head.state_dict()[name])


def test_resuming_trains_what_is_missing_alone(made, monkeypatch):
    config, out, metrics, _, _ = made
    trained = []
    import prism.training

    real = prism.training.train_together

    def noted(store, judges, configs, **options):
        trained.append(len(judges))
        return real(store, judges, configs, **options)

    monkeypatch.setattr(prism.training, "train_together", noted)
    with pytest.raises(PrismError, match="exists already"):
        ablations.run(config, out, only=ONLY)
    again = ablations.run(config, out, only=[*ONLY, "width-64"], resume=True)
    assert trained == [2, 2]  # two first weights in each of two seeds
    before = {row["variant"]: row for row in metrics["study"]}
    after = {row["variant"]: row for row in again["study"]}
    assert after.pop("width-64")["head"] == {"dim": 64}
    assert after == before
    with pytest.raises(PrismError, match="differs in draws: it was 2 and is now 1"):
        ablations.run(dataclasses.replace(config, draws=1), out, resume=True)


def test_a_variant_that_does_not_exist_is_not_confirmed_and_nothing_is_trained(made, tmp_path):
    config = made[0]
    for only in ((), ("taps",)):
        for name in ("nosuch", "taps"):  # a question is no variant
            with pytest.raises(PrismError, match="no variant") as error:
                ablations.run(config, tmp_path / "out", only=only, confirm=[name])
            assert len(str(error.value)) < 500 or "no question" in str(error.value)
            assert not (tmp_path / "out").exists()


def test_a_winner_is_confirmed_once(made):
    config, out, _, store, pipe = made
    metrics = ablations.run(config, out, only=ONLY, confirm=["heads-2"], resume=True)
    judge = Judge.from_pretrained(out / "confirmed" / "heads-2-1", pipe)
    assert len(judge.members) == 2
    assert set(judge.calibration) == set(store.dimensions)
    rows = [row for row in metrics["accuracy"] if row["judge"] == "heads-2"]
    assert {row["set"] for row in rows} == {"test"}
    mine = [row for row in rows if row["head_seed"] == 1]
    assert mine == [{**row, "judge": "heads-2"} for row in measure(judge, store, "test", progress=False).rows]
    assert {(row["judge"], row["against"]) for row in metrics["confirmed"]} == {("heads-2", BASE)}
    page = (out / "report.html").read_text()
    assert "<code>taps-2+3</code>" in page
    assert "Confirmed on test prompts" in page
    with pytest.raises(PrismError, match="looked at once"):
        ablations.run(config, out, only=ONLY, confirm=["heads-2"], resume=True)


def test_the_table():
    rows = table(6, 4, 500, 8, TrainConfig(steps=1000), trajectories=True)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert names[0] == BASE
    assert {"prompts-250", "per-prompt-4", "noise-1", "trajectory", "taps-2+4", "steps-250", "rate-3e-05"} <= set(names)
    assert all(sum([bool(row.train), bool(row.head), not row.trained]) == 1 for row in rows[1:])
    picked = chosen(rows, ["taps-1+4", "videos"])
    assert [row.name for row in picked][:2] == [BASE, "prompts-250"]
    assert {"tap-1", "taps-1+4"} <= {row.name for row in picked}
    with pytest.raises(PrismError, match="no variant and no question 'tapps'"):
        chosen(rows, ["tapps"])
    assert "trajectory" not in [row.name for row in table(6, 4, 500, 8, TrainConfig(), trajectories=False)]


def test_heads_outlive_a_scoring_that_fails(made, tmp_path, monkeypatch):
    """They are kept before they are scored; the next run scores them and trains none of them again."""
    config, _, _, _, _ = made
    config = dataclasses.replace(config, seeds=1, inits=1, draws=1)
    import prism.training
    from prism.lab import ablation_results

    real, trained = ablation_results.score_heads, []
    train_together = prism.training.train_together

    def noted(store, judges, configs, **options):
        trained.append(len(judges))
        return train_together(store, judges, configs, **options)

    def fail(*_):
        raise PrismError("The denoiser cannot be read there.")

    monkeypatch.setattr(prism.training, "train_together", noted)
    monkeypatch.setattr(ablation_results, "score_heads", fail)
    with pytest.raises(PrismError, match="cannot be read there"):
        ablations.run(config, tmp_path / "out", only=["steps-2"])
    assert len(list((tmp_path / "out" / "heads").rglob("model.safetensors"))) == sum(trained) > 0
    assert not list((tmp_path / "out").rglob("scores*"))
    monkeypatch.setattr(ablation_results, "score_heads", real)
    count = len(trained)
    metrics = ablations.run(config, tmp_path / "out", only=["steps-2"], resume=True)
    assert len(trained) == count
    whole = ablations.run(config, tmp_path / "whole", only=["steps-2"])
    assert {row["variant"]: row for row in metrics["study"]} == {row["variant"]: row for row in whole["study"]}


def test_a_killed_study_goes_on_with_nothing_lost_or_done_twice(made, tmp_path):
    config = dataclasses.replace(made[0], seeds=1, inits=1, draws=1)
    out = tmp_path / "out"

    def work(folder=out):
        return ablations.run(config, folder, only=["steps-2"], confirm=["steps-2"], resume=True)

    whole = work(tmp_path / "whole")
    for where, point in (("heads/base", 9), ("heads/steps-2", 2), ("confirmed", 9)):
        assert kills.dies(work, out / where, point)
        assert not (out / "confirmed" / "steps-2.json").exists()
        finished = {
            path: path.stat().st_mtime_ns for path in out.glob("heads/*/seed-0/*") if path.parent.name[0] != "."
        }
        again = work()
        for part in ("study", "accuracy", "confirmed", "calibration"):
            assert again[part] == whole[part]
        assert finished.items() <= {path: path.stat().st_mtime_ns for path in out.glob("heads/*/seed-0/*")}.items()
        assert not list(out.rglob(".*"))
        with pytest.raises(PrismError, match="looked at once"):
            work()
        shutil.rmtree(out)


def test_a_denoiser_that_is_used_at_high_noise_alone_is_studied_there(made, tmp_path):
    """Wan 2.2 A14B: the denoiser that is read is never asked below t = 875, nor are its heads."""
    pipe, call = VARIANTS["wan22_a14b_t2v"]()
    shape = Backbone(pipe).condition([tiny.PROMPT], **call).shape
    pipe.save_pretrained(tmp_path / "pipe")
    folder = tmp_path / "store"
    stores.make(folder, prompts=(2, 2, 2), per_prompt=3, meta={"call": call}, shape=shape)
    config = ablations.StudyConfig(
        data=folder,
        backbone=str(tmp_path / "pipe"),
        train=TRAIN,
        dim=16,
        tap=1,
        seeds=1,
        inits=1,
        draws=1,
        device="cpu",
    )
    metrics = ablations.run(config, tmp_path / "out", only=["steps-2"], confirm=["steps-2"])
    assert {tuple(row["by_level"]) for row in metrics["study"]} == {("899",)}
    assert {row["t"] for row in metrics["accuracy"]} == {989, 949, 899}
    assert "| 899 |" in (tmp_path / "out" / "study.md").read_text()


def test_a_study_is_one_process(made, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrismError, match="prism study works in one process, and WORLD_SIZE says 2"):
        ablations.run(made[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
