"""What is logged: TRL's names, worked out by hand; trackers of accelerate, which are silent unless asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.errors import PrismError
from prism.judge import Judge
from prism.preference import LatentStore
from prism.training import TrainConfig, train
from prism.training.batches import Batches
from prism.training.logs import Trackers, flat, mean_entry

CONFIG = TrainConfig(steps=2, prompts_per_step=3, learning_rate=1e-3, log_every=2, checkpoint_every=0)
DIMENSIONS = ("VQ", "MQ")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return stores.make(tmp_path_factory.mktemp("logs") / "store")


def judge_for(pipe: Any) -> Judge:
    return Judge.untrained(pipe, tap=2, dim=16, dimensions=DIMENSIONS)


def test_an_entry_says_what_the_scores_were(store, tmp_path):
    """Oracle: scores of an untrained head (learning rate next to nothing), pair by pair."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-12, weight_decay=0, max_gradient_norm=0)
    judge = judge_for(tiny.wan())
    (entry,) = train(store, judge, config, tmp_path / "run", progress=False)["history"]
    groups = store.groups("train", DIMENSIONS)
    right, margins, rewards, extremes = ([[], []] for _ in range(4))
    by_band: dict[int, list[float]] = {}
    for step in range(2):
        batch = Batches(store, groups, judge.backbone, config).draw(step, range(3))
        scores = np.zeros((len(batch.t), 2))
        for row, prompt in enumerate(batch.prompts):
            conditioning = judge.backbone.condition([groups[prompt].prompt], **store.call)
            tokens = judge.backbone.tokens(batch.latents[row][None], conditioning, batch.t[row], 2)
            scores[row] = judge.score_tokens(tokens)[0].numpy()
            by_band.setdefault(int(batch.t[row] // 250), []).extend(scores[row])
        extremes[0].append(scores.min())
        extremes[1].append(scores.max())
        for column in range(2):
            rewards[column] += scores[:, column].tolist()
            for a, b, labels in zip(batch.first.tolist(), batch.second.tolist(), batch.labels.tolist()):
                if labels[column] in (1, -1):
                    margins[column].append(labels[column] * (scores[a, column] - scores[b, column]))
                    right[column].append(margins[column][-1] > 0)
    for column, name in enumerate(DIMENSIONS):
        assert entry["accuracy"][name] == pytest.approx(np.mean(right[column]))
        assert entry["margin"][name] == pytest.approx(np.mean(margins[column]), abs=1e-5)
        assert entry["mean_reward"][name] == pytest.approx(np.mean(rewards[column]), abs=1e-5)
    assert entry["min_reward"] == pytest.approx(np.mean(extremes[0]), abs=1e-5)
    assert entry["max_reward"] == pytest.approx(np.mean(extremes[1]), abs=1e-5)
    assert entry["epoch"] == 2 * 3 / len(groups)
    names = [f"{250 * band}-{250 * band + 250}" for band in sorted(by_band)]
    assert list(entry["bands"]) == names
    for band, name in zip(sorted(by_band), names):
        assert entry["bands"][name]["mean_reward"] == pytest.approx(np.mean(by_band[band]), abs=1e-5)
    gradients = [value.grad.flatten() for value in judge.head.parameters() if value.grad is not None]
    assert 0 < entry["grad_norm"] < 2 * float(torch.cat(gradients).norm()) + 10


def test_trackers_get_trls_names():
    shares = {"VQ": 0.5, "MQ": 1.0, "TA": None}
    entry = {"step": 4, "loss": 0.3, "accuracy": shares, "bands": {"0-250": {"accuracy": 0.5, "margin": None}}}
    assert flat(entry) == {
        "loss": 0.3, "accuracy": 0.75, "accuracy/VQ": 0.5, "accuracy/MQ": 1.0, "accuracy/t_0-250": 0.5,
    }  # fmt: skip
    assert flat({"step": 4, "validation": {"VQ": 0.5}}) == {"eval_accuracy": 0.5, "eval_accuracy/VQ": 0.5}
    other = {**entry, "loss": 0.5, "accuracy": {"VQ": 1.0, "MQ": 0.0, "TA": None}}
    both = mean_entry([entry, other])
    assert (both["step"], both["loss"], both["accuracy"]) == (4, 0.4, {"VQ": 0.75, "MQ": 0.5, "TA": None})


@pytest.fixture
def recorded(monkeypatch):
    """What trackers of two registered classes got; one of them fails at its second entry."""
    from accelerate import tracking

    calls: list[tuple[Any, ...]] = []

    class Noted(tracking.GeneralTracker):
        name = "noted"
        requires_logging_directory = True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            calls.append((self.name, run_name, logging_dir))

        @property
        def tracker(self):
            return calls

        def store_init_configuration(self, values):
            calls.append((self.name, values["steps"]))

        def log(self, values, step=None, **_):
            calls.append((self.name, step, values))

        def finish(self):
            calls.append((self.name, "end"))

    class Failing(Noted):
        name = "failing"

        def log(self, values, step=None, **_):
            raise ConnectionError("no network")

    for each in (Noted, Failing):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, each.name, each)
    return calls


def test_a_tracker_gets_each_entry_and_one_that_fails_ends_nothing(store, tmp_path, recorded):
    config = dataclasses.replace(CONFIG, steps=4, validate_every=4, report_to="noted, failing")
    with pytest.warns(UserWarning, match="tracker failing failed .*no network.*; the training goes on without it"):
        result = train(store, judge_for(tiny.wan()), config, tmp_path / "run", progress=False)
    noted = [call[1:] for call in recorded if call[0] == "noted"]
    assert noted[0] == ("prism", str(tmp_path / "run" / "logs"))
    assert noted[1] == (4,)
    assert noted[-1] == ("end",)
    assert noted[2:-1] == [(entry["step"], flat(entry)) for entry in result["history"]]
    assert {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "learning_rate", "grad_norm",
            "epoch", "accuracy/VQ"} <= noted[2][1].keys()  # fmt: skip


def test_names_that_are_no_trackers_are_refused(store, tmp_path):
    for names, sentence in (
        ("papyrus", "report_to names no tracker of accelerate, found papyrus; there are .*tensorboard"),
        ("clearml", "tracker clearml of report_to is not installed; pip install clearml"),
    ):
        with pytest.raises(PrismError, match=sentence):
            Trackers(names)
        config = dataclasses.replace(CONFIG, report_to=names)
        with pytest.raises(PrismError, match=sentence):
            train(store, judge_for(tiny.wan()), config, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


def test_without_trackers_none_is_looked_for(monkeypatch):
    def look():
        raise AssertionError("trackers are looked for")

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", look)
    trackers = Trackers("")
    trackers.start("x", {})
    trackers.log({"step": 1})
    with pytest.raises(AssertionError, match="looked for"):
        Trackers("tensorboard")
