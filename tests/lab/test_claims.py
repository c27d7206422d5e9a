"""Bars against rows on either side of them."""

from __future__ import annotations

import pytest
from tests.report import rows

from prism.lab import claims


def comparison(low, t=899, **changes):
    row = {"judge": "prism", "against": "pixel", "t": t, "dimension": "overall", "set": "test"}
    return {**row, "difference": low + 0.02, "ci95": [low, low + 0.04], "pairs": 9, "prompts": 3, **changes}


def pick(strategy, share, low, cost, **changes):
    row = rows.pick(strategy, 0.5, cost, name=strategy, oracle_share=share, oracle_share_ci95=[low, share + 0.1])
    return {**row, "num_inference_steps": 20, **changes}


def met(comparisons, picks, overhead=0.01):
    found = claims.check(comparisons, picks, "early", "draft", overhead)
    assert all(set(row) == {"bar", "reached", "met"} for row in found)
    return [row["met"] for row in found]


EARLY = {"schedule": [[4, 1]]}


def test_all_is_well():
    picks = [pick("early", 0.51, 0.41, 0.27, **EARLY), pick("draft", 0.66, 0.56, 0.34)]
    assert met([comparison(0.001, t) for t in (899, 699, 499)], picks) == [True] * 6


@pytest.mark.parametrize(
    "early",
    [
        pick("early", 0.49, 0.41, 0.27, **EARLY),
        pick("early", 0.6, 0.39, 0.27, **EARLY),
        pick("early", 0.6, 0.5, 0.36, **EARLY),
        pick("early", 0.6, 0.5, 0.27, schedule=[[5, 1]]),  # after the first fifth
        pick("early", 0.6, 0.5, 0.27, schedule=[[2, 4], [4, 1]]),  # two cuts
    ],
)
def test_every_part_of_a_bar_must_hold(early):
    assert met([], [early])[3] is False


def test_another_schedule_does_not_stand_in_for_the_one_that_was_fixed():
    other = pick("early", 0.9, 0.8, 0.2, **EARLY) | {"name": "early 3:1"}
    assert met([], [other])[3] is None
    away = pick("early", 0.9, 0.8, 0.2, **EARLY) | {"set": "unseen"}
    assert met([], [away])[3] is None


def test_an_interval_that_touches_zero_misses():
    others = [comparison(0.1, 899, against="pixel-noisy"), comparison(0.1, 899, dimension="TA")]
    assert met([*others, comparison(0.0, 899), comparison(0.01, 699), comparison(0.01, 499, set="unseen")], [])[:3] == [
        False,
        True,
        None,
    ]


def test_overhead_is_the_worst_plans_share_of_its_time():
    def run(seconds, denoiser):
        parts = {"denoiser": denoiser, "head": 0.1, "vae": 0.2, "text": 5.0, "scheduler": 5.0}
        return {"ledger": {"seconds": seconds, "parts": parts}}

    records = [{"alone": {"early": [run(1.0, 0.68)], "full": [run(10.0, 9.6)]}}, {}]
    assert claims.overhead(records, ("early", "full")) == pytest.approx(0.02)
    assert claims.overhead(records, ("full",)) == pytest.approx(0.01)
    assert claims.overhead([{}], ("full",)) is None
    assert met([], [], overhead=None)[-1] is None
    assert met([], [], overhead=0.03)[-1] is False
