"""What strategies share, against each strategy run by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import tiny

from prism import Judge
from prism.errors import PrismError
from prism.judge.joint import JointJudge
from prism.lab import contest as module
from prism.lab.contest import Contest, pick

PLANS = {
    "none": {"strategy": "none"},
    "random": {"strategy": "random"},
    "early": {"strategy": "early", "schedule": ((2, 1),)},
    "early 1:3,4:1": {"strategy": "early", "schedule": ((1, 3), (4, 1))},
    "early 2:2": {"strategy": "early", "schedule": ((2, 2),)},
    "early 2:1 ahead": {"strategy": "early", "schedule": ((2, 1),), "look": "ahead", "judge_at": 600.0, "num_draws": 2},
    "early 1:2,3:1 both": {
        "strategy": "early",
        "schedule": ((1, 2), (3, 1)),
        "look": ("ahead", "now"),
        "judge_at": 600.0,
        "num_draws": 1,
    },
    "draft": {"strategy": "draft", "draft_steps": 2, "judge_at": 600.0, "num_draws": 2},
    "draft 3": {"strategy": "draft", "draft_steps": 3, "judge_at": 600.0, "num_draws": 2},
    "full": {"strategy": "full", "judge_at": 600.0, "num_draws": 2},
    "oracle": {"strategy": "oracle"},
}
SEEDS = (5, 9, 2, 11)


def brightness(videos, prompts):
    return {"overall": torch.as_tensor(videos).float().mean((1, 2, 3, 4))}


@pytest.fixture(scope="module")
def contest():
    pipe = tiny.wan()
    one = Judge.untrained(pipe, tap=1, dim=16, seed=1)
    two = Judge.average([Judge.untrained(one.backbone, tap=tap, dim=16, seed=seed) for tap, seed in ((1, 2), (2, 3))])
    return Contest(JointJudge([one, two]), brightness, tiny.PROMPT, SEEDS, PLANS, tiny.CALL_WAN, seed=4)


def test_a_joint_judge_scores_by_each_judge(contest):
    joint, latents = contest.joint, contest.latents
    together = joint.score(latents, tiny.PROMPT, 500.0, **tiny.CALL_WAN)
    apart = [judge.score(latents, tiny.PROMPT, 500.0, **tiny.CALL_WAN) for judge in joint.judges]
    assert torch.allclose(together, torch.cat(apart, 1), atol=1e-6)
    assert joint.dimensions[:5] == ("0/VQ", "0/MQ", "0/TA", "0/overall", "1/VQ")
    assert joint.taps == (1, 2)


@pytest.mark.parametrize("name", PLANS)
def test_every_strategy_by_itself_picks_what_the_shared_run_says(contest, name):
    for k in range(2):
        run = contest.run_separately(name, k)
        assert run["index"] == contest.picks(name)[k]
        assert run["off"] < 1e-5
        assert run["ledger"]["denoiser_rows"] > 0


def test_judges_pick_for_themselves(contest):
    """Else the test above would pass with one judge's scores for all."""
    assert any(len(set(contest.picks(name))) > 1 for name in ("early", "draft", "full"))
    assert not np.allclose(contest.final[0], contest.final[1])


def test_the_cuts_have_the_form_that_best_of_n_gives_them(contest):
    shared, real = contest.cuts_of("early 1:3,4:1", 1), contest.play("early 1:3,4:1", 1).scores
    assert [(cut["step"], cut["candidates"], cut["kept"]) for cut in shared] == [
        (cut["step"], cut["candidates"], cut["kept"]) for cut in real
    ]
    assert [cut["t"] for cut in shared] == pytest.approx([cut["t"] for cut in real])
    for cut, other in zip(shared, real):
        assert cut["scores"]["overall"] == pytest.approx(other["scores"]["overall"], abs=1e-5)


def test_scores_that_differ_are_a_bug_and_said_so(contest, monkeypatch):
    monkeypatch.setitem(contest.cuts, 2, contest.cuts[2] + 1)
    with pytest.raises(PrismError, match="bug in prism"):
        contest.run_separately("early", 0)


def test_plans_whose_candidates_part_are_refused(contest):
    with pytest.raises(PrismError, match="candidates of the plan mine part on the way, so that no scores are shared"):
        Contest(contest.joint, brightness, tiny.PROMPT, SEEDS, {"mine": {"strategy": "fk"}}, tiny.CALL_WAN, seed=4)


def test_a_schedule_is_followed_by_hand():
    scores = {2: np.array([0.1, 0.9, 0.5, 0.9]), 4: np.array([9.0, 0.3, 8.0, 0.4])}
    assert pick(((2, 1),), scores) == 1  # of equals the first
    assert pick(((2, 2), (4, 1)), scores) == 3
    assert pick(((2, 3), (4, 1)), scores) == 2
    assert module.survivors([0, 2, 3], scores[2], 2) == [2, 3]
