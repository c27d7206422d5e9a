"""What is kept of each pair, and the paired comparison of two judges against brute force and closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests import stores, tiny

from prism.errors import PrismError
from prism.evaluation import Measurement, compare_judges, measure, measure_together, score_videos
from prism.evaluation.measurement import COLUMNS
from prism.judge import Judge

pytestmark = pytest.mark.usefixtures("intervals_of_few")

SETTINGS = {"split": "test", "num_draws": 1, "seed": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("measurement") / "store")


@pytest.fixture(scope="module")
def judges():
    pipe = tiny.wan()
    return [Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "overall"), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def measured(judges, store):
    return [measure(judge, store, timesteps=(699, 0), num_draws=2, seed=5, progress=False) for judge in judges]


def right(measurement, t, dimension):
    """Decided pairs judged right, one by one from the table."""
    return {
        (row["video_a"], row["video_b"]): row["label"] * row["margin"] > 0
        for row in measurement.pairs.to_pylist()
        if row["t"] == t and row["dimension"] == dimension and row["label"] != 0
    }


def made(name, outcomes, prompts):
    """A measurement whose pair i was judged right or not."""
    rows = [
        (name, 500.0, "overall", prompt, f"a{i}", f"b{i}", 1, 1.0 if outcome else -1.0)
        for i, (outcome, prompt) in enumerate(zip(outcomes, prompts))
    ]
    return Measurement([], pa.table(dict(zip(COLUMNS, zip(*rows)))), SETTINGS)


def test_every_labelled_pair_has_its_margin(measured, judges, store):
    table = measured[0].pairs.to_pylist()
    labelled = [
        (t, dimension, pair)
        for t, dimension, pair in itertools.product((699, 0), ("VQ", "overall"), store.pairs.to_pylist())
        if pair["split"] == "test" and pair[dimension] is not None
    ]
    assert len(table) == len(labelled)
    scores = {t: score_videos(judges[0], store, store.groups("test"), t, 2 if t else 1, seed=5) for t in (699, 0)}
    keyed = {(row["t"], row["dimension"], row["video_a"], row["video_b"]): row for row in table}
    for t, dimension, pair in labelled:
        row = keyed[t, dimension, pair["video_a"], pair["video_b"]]
        column = ("VQ", "overall").index(dimension)
        assert row["label"] == pair[dimension]
        assert row["margin"] == pytest.approx(scores[t][pair["video_a"]][column] - scores[t][pair["video_b"]][column])
        assert (row["prompt"], row["judge"]) == (pair["prompt"], "prism")
    for row in measured[0].rows:
        outcomes = list(right(measured[0], row["t"], row["dimension"]).values())
        assert row["without_ties"] == pytest.approx(np.mean(outcomes))


def test_judges_measured_together_are_those_measured_alone(measured, judges, store):
    together = measure_together(judges, store, timesteps=(699, 0), num_draws=2, seed=5, progress=False)
    for one, alone in zip(together, measured, strict=True):
        assert np.allclose(one.pairs["margin"].to_numpy(), alone.pairs["margin"].to_numpy(), rtol=1e-4, atol=1e-6)
        assert one.pairs.drop_columns(["margin", "score_a", "score_b"]).equals(
            alone.pairs.drop_columns(["margin", "score_a", "score_b"])
        )
        assert one.about == alone.about
        assert one.settings == alone.settings
    with pytest.raises(PrismError, match="give at least one"):
        measure_together([], store)


def test_the_difference_is_that_of_the_accuracies(measured):
    comparison = compare_judges(measured[0], measured[1])
    assert [(row["t"], row["dimension"]) for row in comparison] == [
        (699, "VQ"), (699, "overall"), (0, "VQ"), (0, "overall")
    ]  # fmt: skip
    for row, ours, theirs in zip(comparison, measured[0].rows, measured[1].rows):
        assert row["difference"] == pytest.approx(ours["without_ties"] - theirs["without_ties"])
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
        assert row["pairs"] == len(right(measured[0], row["t"], row["dimension"]))
        assert (row["judge"], row["against"], row["set"], row["prompts"]) == ("prism", "prism", "test", 4)
    for row in compare_judges(measured[0], measured[0]):
        assert (row["difference"], row["ci95"]) == (0, [0, 0])
    several = compare_judges(measured[:2], measured[2])
    for row, a, b, c in zip(several, *(measurement.rows for measurement in measured)):
        expected = (a["without_ties"] + b["without_ties"]) / 2 - c["without_ties"]
        assert row["difference"] == pytest.approx(expected)


def test_numbers_of_draws_are_compared_on_demand_alone(measured):
    other = replace(measured[1], settings={**measured[1].settings, "num_draws": 7})
    with pytest.raises(PrismError, match="measure both alike"):
        compare_judges(measured[0], other)
    assert compare_judges(measured[0], other, any_draws=True) == compare_judges(measured[0], measured[1])
    moved = replace(other, settings={**other.settings, "seed": 99})
    with pytest.raises(PrismError, match="measure both alike"):
        compare_judges(measured[0], moved, any_draws=True)


def test_the_interval_is_the_bootstrap_over_all_resamples_of_prompts():
    """Four prompts of unequal size: brute force over all 4^4 resamples with their weights."""
    prompts = ["p"] * 3 + ["q"] * 2 + ["r"] * 4 + ["s"]
    ours, theirs = [1, 1, 0, 1, 0, 1, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    row = compare_judges(made("prism", ours, prompts), made("pixel", theirs, prompts))[0]
    gains = {name: [o - t for o, t, p in zip(ours, theirs, prompts) if p == name] for name in "pqrs"}
    resamples = []
    for chosen in itertools.product("pqrs", repeat=4):
        values = [value for name in chosen for value in gains[name]]
        resamples.append(sum(values) / len(values))
    low, high = np.percentile(resamples, [2.5, 97.5])
    assert row["difference"] == pytest.approx(0.3)
    assert row["ci95"] == pytest.approx([low, high], abs=0.06)  # 2000 draws of 256 equally likely resamples
    assert (row["judge"], row["against"], row["pairs"], row["prompts"]) == ("prism", "pixel", 10, 4)


def test_what_is_hard_for_both_cancels():
    """One pair a prompt. Errors shared by both leave the sign test's spread: sqrt(discordant) / n."""
    generator = np.random.default_rng(0)
    n = 4000
    theirs = generator.random(n) < 0.6
    flipped = generator.random(n) < 0.05
    ours = theirs | flipped
    row = compare_judges(made("a", ours, [f"p{i}" for i in range(n)]), made("b", theirs, [f"p{i}" for i in range(n)]))
    discordant = int((ours != theirs).sum())
    spread = np.sqrt(discordant - discordant**2 / n) / n
    assert row[0]["difference"] == pytest.approx(discordant / n)
    assert (row[0]["ci95"][1] - row[0]["ci95"][0]) / 2 == pytest.approx(1.96 * spread, rel=0.08)


def test_saved_and_loaded(measured, tmp_path):
    measured[0].save(tmp_path / "prism.parquet")
    loaded = Measurement.load(tmp_path / "prism.parquet")
    assert loaded.pairs.equals(measured[0].pairs)
    assert (loaded.rows, loaded.settings) == (measured[0].rows, measured[0].settings)
    assert compare_judges(loaded, measured[1]) == compare_judges(measured[0], measured[1])
    (tmp_path / "half.parquet").write_bytes((tmp_path / "prism.parquet").read_bytes()[:-9])
    for name in ("half.parquet", "none.parquet"):
        with pytest.raises(PrismError, match="no whole measurement"):
            Measurement.load(tmp_path / name)


def test_judges_that_were_not_measured_alike_are_refused(measured, judges, store):
    other_seed = measure(judges[1], store, timesteps=(699,), num_draws=2, seed=6, progress=False)
    with pytest.raises(PrismError, match="measure both alike"):
        compare_judges(measured[0], other_seed)
    prompts = ["p", "q"]
    with pytest.raises(PrismError, match="different pairs at t = 500 in overall"):
        compare_judges(made("a", [1, 0], prompts), made("b", [1, 0, 1], [*prompts, "r"]))
    with pytest.raises(PrismError, match="no measurement"):
        compare_judges([], measured[0])
    assert torch.is_grad_enabled()
