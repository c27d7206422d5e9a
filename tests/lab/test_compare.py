"""Gains and costs of strategies, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from prism.evaluation import intervals
from prism.lab.contest import agreement, rows

pytestmark = pytest.mark.usefixtures("intervals_of_few")
CALL = {"num_inference_steps": 4, "guidance_scale": 2.0}
PLANS = {
    "random": {"strategy": "random"},
    "early": {"strategy": "early", "schedule": ((2, 1),)},
    "early 3:1": {"strategy": "early", "schedule": ((3, 1),)},
    "full": {"strategy": "full", "judge_at": 700.0, "num_draws": 2},
    "oracle": {"strategy": "oracle"},
}
COST = {"full": 24.0, "early": 12.0, "early 3:1": 18.0, "random": 8.0, "oracle": 24.0}


def run(index: int, denoiser_rows: float, off: float = 0.0) -> dict:
    seconds = 0.5 + 0.25 * index  # of a pair of runs the median is the mean
    ledger = {"denoiser_rows": denoiser_rows, "vae_decodes": 1, "head_calls": 2, "seconds": seconds}
    return {"index": index, "off": off, "ledger": ledger}


def records(judges: int) -> list[dict]:
    """Two prompts of three candidates; the second judge's early pick is the best, the first's is the middle one."""
    picks = [
        {"full": [2, 2], "early": [1, 2], "early 3:1": [1, 2], "random": [0, 0], "oracle": [2, 2]},
        {"full": [2, 2], "early": [2, 2], "early 3:1": [2, 2], "random": [0, 0], "oracle": [2, 2]},
    ]
    values = [[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]
    found = [
        {
            "prompt": prompt,
            "values": {"overall": value},
            "picks": {name: pick[name][:judges] for name in PLANS},
        }
        for prompt, value, pick in zip("ab", values, picks)
    ]
    found[0]["alone"] = {name: [run(pick, COST[name]) for pick in found[0]["picks"][name]] for name in PLANS}
    return found


def test_rows_against_hand_calculation():
    table = {row["name"]: row for row in rows(records(1), PLANS, [7], CALL, "test", seed=0)}
    spread = np.sqrt((1.0 + 3.0) / 2)  # the variances within the two prompts are 1 and 3
    assert table["early"]["referee_gain"] == pytest.approx((0 + 2) / 2 / spread)
    assert table["oracle"]["referee_gain"] == pytest.approx((1 + 2) / 2 / spread)
    assert table["early"]["oracle_share"] == pytest.approx(2 / 3)
    assert table["random"]["oracle_share"] == pytest.approx(-2 / 3)
    assert table["oracle"]["oracle_share_ci95"] == [1.0, 1.0]
    # one run of two prompts was timed
    assert (table["early"]["denoiser_rows"], table["early"]["denoiser_share_of_full"]) == (24.0, 0.5)
    assert (table["early"]["vae_decodes"], table["early"]["seconds"], table["early"]["runs_timed"]) == (2, 1.5, 1)
    assert table["early 3:1"]["schedule"] == [[3, 1]]
    assert [table[name]["judge"] for name in ("early", "random", "oracle")] == ["prism", None, "referee"]
    assert [table[name]["head_seed"] for name in ("early", "random")] == [7, None]
    low, high = table["early"]["referee_gain_ci95"]
    # resamples are {a, a}, {a, b}, {b, b}: gains 0, 1 and 2 over spreads 1, sqrt 2 and sqrt 3
    assert low == pytest.approx(0.0)
    assert high == pytest.approx(2 / np.sqrt(3))


def test_judges_of_several_seeds_are_pooled_and_told_apart():
    table = rows(records(2), PLANS, [7, 8], CALL, "test", seed=0)
    early = [row for row in table if row["name"] == "early"]
    assert [(row["head_seed"], row.get("head_seeds")) for row in early] == [(None, [7, 8]), (7, None), (8, None)]
    # of the gains over the means 2 and 1: the first judge picks 0 and 2, the second 1 and 2
    assert [row["oracle_share"] for row in early] == pytest.approx([2.5 / 3, 2 / 3, 1.0])
    assert early[0]["denoiser_rows"] == early[1]["denoiser_rows"] == 24.0
    assert [row["name"] for row in table if row["name"] in ("random", "oracle")] == ["random", "oracle"]


def test_costs_may_come_from_other_prompts():
    without = [{name: value for name, value in record.items() if name != "alone"} for record in records(1)]
    table = {row["name"]: row for row in rows(without, PLANS, [7], CALL, "unseen", 0, measured=records(1))}
    assert table["full"]["denoiser_rows"] == 48.0


def test_few_prompts_have_no_interval(monkeypatch):
    monkeypatch.setattr(intervals, "FEWEST_PROMPTS", 3)
    table = rows(records(1), PLANS, [7], CALL, "test", seed=0)
    assert {(row["referee_gain_ci95"], row["oracle_share_ci95"]) for row in table} == {(None, None)}


def test_runs_by_themselves_are_compared_with_the_shared_one():
    found = records(2)
    found[0]["alone"]["early"][1] = run(0, 12.0, off=0.25)
    assert agreement(found) == {"prompts": 1, "runs": 10, "same_pick": 9, "largest_difference": 0.25}
