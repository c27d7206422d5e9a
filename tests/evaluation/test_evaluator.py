"""Evaluation by noise level against a slow computation of the same figures, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.errors import PrismError
from prism.evaluation import TIMESTEPS, evaluate, pairwise_accuracy, score_videos
from prism.judge import Judge
from prism.judge.objective import tie_margin
from prism.judge.scoring import noise as _noise
from prism.preference import prompt_key
from prism.report import metrics

pytestmark = pytest.mark.usefixtures("intervals_of_few")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("evaluation") / "store")


@pytest.fixture(scope="module")
def wan():
    return tiny.wan()


@pytest.fixture
def judge(wan):
    made = Judge.untrained(wan, tap=2, dim=32, dimensions=("VQ", "overall"))
    made.trained_on = {"seed": 3, "source": "renoised"}
    with torch.no_grad():
        made.head.mlp[-1].weight *= 30  # margins on both sides of the model's tie rule
    return made


def test_rows_equal_the_figures_computed_pair_by_pair(judge, store):
    rows = evaluate(judge, store, timesteps=(699, 0), num_draws=2, seed=5, batch_size=7, progress=False)
    assert [(row["t"], row["dimension"]) for row in rows] == [
        (699, "VQ"),
        (699, "overall"),
        (0, "VQ"),
        (0, "overall"),
    ]
    for row in rows:
        column = ("VQ", "overall").index(row["dimension"])
        draws = 2 if row["t"] else 1
        collected = {}
        for split in ("validation", "test"):
            labels, margins, prompts = [], [], []
            for group in store.groups(split):
                scores = score_videos(judge, store, [group], row["t"], draws, seed=5)  # alone: noise does not care
                for pair in store.pairs.to_pylist():
                    if pair["prompt"] == group.prompt and pair[row["dimension"]] is not None:
                        labels.append(pair[row["dimension"]])
                        margins.append(scores[pair["video_a"]][column] - scores[pair["video_b"]][column])
                        prompts.append(group.prompt)
            collected[split] = labels, margins, prompts
        labels, margins, prompts = collected["test"]
        tuned = pairwise_accuracy(labels, margins)
        threshold = pairwise_accuracy(*collected["validation"][:2]).threshold
        assert row["without_ties"] == pytest.approx(tuned.without_ties)
        assert row["with_ties"] == pytest.approx(tuned.with_ties)
        assert row["with_ties_validation_threshold"] == pytest.approx(
            pairwise_accuracy(labels, margins, threshold=threshold).with_ties
        )
        right = sum(y == (0 if abs(m) <= tie_margin(5) else math.copysign(1, m)) for y, m in zip(labels, margins))
        assert row["with_ties_model_rule"] == pytest.approx(right / len(labels))
        assert (row["pairs"], row["prompts"]) == (len(labels), len(set(prompts)))
        low, high = row["without_ties_ci95"]
        assert low <= row["without_ties"] <= high
        assert (row["judge"], row["head_seed"], row["source"], row["set"]) == ("prism", 3, "renoised", "test")
    assert rows[0]["log_snr"] == pytest.approx(2 * math.log(0.301 / 0.699))
    assert rows[2]["log_snr"] is None


def test_rows_fit_the_metrics_document(judge, store):
    rows = evaluate(judge, store, timesteps=TIMESTEPS, progress=False)
    assert len(rows) == 16
    metrics.document("eval", {}, 0, accuracy=rows)


def test_scores_are_the_judges_own_on_latents_noised_by_eq_1(judge, store):
    group = store.groups("test")[0]
    scores = score_videos(judge, store, [group], 0)
    expected = judge.score(store.latents(group.videos), group.prompt, 0, **tiny.CALL_WAN)
    np.testing.assert_allclose(np.stack([scores[video] for video in group.videos]), expected.numpy(), rtol=1e-5)
    one, again, other = (score_videos(judge, store, [group], 500, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one[video], again[video]) for video in group.videos)
    assert not any(np.array_equal(one[video], other[video]) for video in group.videos)


def test_noise_differs_by_seed_video_level_and_draw():
    keys = [(0, "a", 500, 0), (1, "a", 500, 0), (0, "b", 500, 0), (0, "a", 501, 0), (0, "a", 500, 1)]
    draws = torch.stack([_noise((64,), *key) for key in keys])
    assert len(draws.unique(dim=0)) == len(keys)
    assert torch.equal(_noise((64,), 0, "a", 500.0, 0), draws[0])


def test_a_judge_that_knows_the_answer_is_always_right(judge, store, monkeypatch):
    strength = {row["video"]: row["VQ"] for row in store.videos.to_pylist()}
    monkeypatch.setattr(
        "prism.evaluation.evaluator.score_levels",
        lambda judge, store, groups, *rest: [{v: np.array([strength[v]] * 2) for g in groups for v in g.videos}],
    )
    row = evaluate(judge, store, timesteps=(500,), progress=False)[0]
    assert row["without_ties"] == 1
    assert row["without_ties_ci95"] == [1, 1]
    assert row["with_ties"] == 1


def test_a_prompt_the_head_was_trained_on_is_refused(judge, store):
    prompt = store.groups("test")[1].prompt
    judge.trained_on["prompt_keys"] = [prompt_key(prompt.upper())]
    with pytest.raises(PrismError, match=f"trained on the prompt '{prompt}'"):
        evaluate(judge, store, timesteps=(500,), progress=False)
    assert evaluate(judge, store, split="train", timesteps=(500,), progress=False)  # asked for by name


def test_without_validation_pairs_there_is_no_threshold(wan, judge, tmp_path):
    store = stores.make(tmp_path / "store", prompts=(1, 0, 2))
    rows = evaluate(judge, store, timesteps=(500,), progress=False)
    assert all(row["with_ties_validation_threshold"] is None for row in rows)
    with pytest.raises(PrismError, match="no labelled pairs in the split validation"):
        evaluate(judge, store, split="validation", progress=False)


def test_bad_arguments(judge, store):
    with pytest.raises(PrismError, match="num_draws"):
        evaluate(judge, store, num_draws=0, progress=False)
    with pytest.raises(PrismError, match="at least one t from 0 to 1000"):
        evaluate(judge, store, timesteps=(), progress=False)
    with pytest.raises(PrismError, match=r"t must be a number from 0 to 1,000"):
        evaluate(judge, store, timesteps=(1500,), progress=False)
    with torch.no_grad():
        judge.head.mlp[-1].weight.fill_(float("nan"))
    with pytest.raises(PrismError, match=r"Row 0 has no finite score.*at t = 500 are the videos video-0"):
        evaluate(judge, store, timesteps=(500,), progress=False)


class Memory:
    """A judge that is no `Judge`: it has the answer, and looks at the prompts it is given."""

    name, dimensions, eta = "memory", ("VQ", "overall"), 5.0

    def __init__(self, backbone, store):
        self.backbone, self.trained_on = backbone, {"seed": 7, "source": "memory"}
        self.clean = {row["video"]: store.latents([row["video"]])[0] for row in store.videos.to_pylist()}
        self.rows = {row["video"]: row for row in store.videos.to_pylist()}

    def score(self, noisy_latents, prompts, t, **call):
        assert call == tiny.CALL_WAN
        scores = []
        for latents, prompt in zip(noisy_latents, prompts):
            video = min(self.clean, key=lambda name: float((latents - self.clean[name]).abs().sum()))
            assert self.rows[video]["prompt"] == prompt
            scores.append([self.rows[video]["VQ"]] * 2)
        return torch.tensor(scores)


def test_anything_that_scores_is_evaluated(judge, store):
    rows = evaluate(Memory(judge.backbone, store), store, timesteps=(0, 1), progress=False)
    assert [(row["judge"], row["head_seed"], row["source"], row["without_ties"]) for row in rows] == [
        ("memory", 7, "memory", 1)
    ] * 4
    broken = Memory(judge.backbone, store)
    broken.score = lambda noisy_latents, *_, **__: torch.full((len(noisy_latents), 2), torch.nan)
    with pytest.raises(PrismError, match=r"score of video 'video-0\d\d' at t = 0 is not a finite number"):
        evaluate(broken, store, timesteps=(0,), progress=False)
