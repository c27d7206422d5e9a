"""Gains and costs of strategies, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import tiny

from prism.experiments.compare import Comparison, over_random, rows
from prism.judge import Judge
from prism.sampling.best_of_n import BestOfNResult
from prism.sampling.ledger import Ledger

VALUES = [np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 3.0])]
CALL = {"num_inference_steps": 4, "guidance_scale": 2.0}


def result(index: int, denoiser_rows: float) -> BestOfNResult:
    ledger = Ledger(denoiser_rows=denoiser_rows, vae_decodes=1, head_calls=2, seconds=0.5)
    return BestOfNResult(None, torch.zeros(1), index, index, (0, 1, 2), [], ledger)


@pytest.fixture
def done() -> Comparison:
    picks = {"full": [2, 2], "early": [1, 2], "random": [0, 0], "oracle": [2, 2]}
    cost = {"full": 24.0, "early": 12.0, "random": 8.0, "oracle": 24.0}
    return Comparison(
        prompts=["a", "b"],
        values=VALUES,
        results={name: [result(i, cost[name]) for i in indices] for name, indices in picks.items()},
        options={name: {"strategy": name} for name in picks} | {"early": {"strategy": "early", "schedule": [(2, 1)]}},
    )


def test_rows_against_hand_calculation(done):
    judge = Judge.untrained(tiny.wan(num_layers=2))
    table = {row["strategy"]: row for row in rows(done, judge, CALL, "test", seed=0)}
    spread = np.sqrt((1.0 + 3.0) / 2)  # the variances within the two prompts are 1 and 3
    assert table["early"]["referee_gain"] == pytest.approx((0 + 2) / 2 / spread)
    assert table["oracle"]["referee_gain"] == pytest.approx((1 + 2) / 2 / spread)
    assert table["early"]["oracle_share"] == pytest.approx(2 / 3)
    assert table["random"]["oracle_share"] == pytest.approx(-2 / 3)
    assert table["oracle"]["oracle_share_ci95"] == [1.0, 1.0]
    assert table["early"]["denoiser_share_of_full"] == 0.5
    assert table["early"]["vae_decodes"] == 2
    assert table["early"]["schedule"] == [[2, 1]]
    assert [table[name]["judge"] for name in ("early", "random", "oracle")] == ["prism", None, "referee"]
    low, high = table["early"]["referee_gain_ci95"]
    # resamples are {a, a}, {a, b}, {b, b}: gains 0, 1 and 2 over spreads 1, sqrt 2 and sqrt 3
    assert low == pytest.approx(0.0)
    assert high == pytest.approx(2 / np.sqrt(3))


def test_the_gain_over_random_is_paired(done):
    row = over_random(done, "early", seed=0)
    assert row["gain"] == pytest.approx((1 + 3) / 2 / np.sqrt(2))
    assert row["ci95"] == pytest.approx([1.0, np.sqrt(3)])
