"""Gains of denoising steps: differences of the judge's own scores, each state at its own noise level."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

from prism import Judge
from prism.errors import PrismError

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT]
CALL = tiny.CALL_WAN


@pytest.fixture(scope="module")
def judge():
    return Judge.untrained(tiny.wan())


@pytest.fixture(scope="module")
def trajectory(judge):
    """The states (2, 4, ...) of a stock call of 3 steps, and its timesteps."""
    states, pipe = [], judge.backbone.pipe

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    noise = torch.cat([torch.randn(1, 16, 3, 4, 4, generator=each) for each in generators])
    call = {**CALL, "num_inference_steps": 3, "latents": noise, "output_type": "latent"}
    pipe(PROMPTS, callback_on_step_end=keep, **call)
    return torch.stack([noise, *states], 1), pipe.scheduler.timesteps.clone()


def test_a_gain_is_the_difference_of_the_scores_before_and_after_a_step(judge, trajectory):
    states, timesteps = trajectory
    gains = judge.gains(states, timesteps, PROMPTS, **CALL)
    levels = [*timesteps.tolist(), 0.0]  # a flow's timesteps of 1000 are t
    scores = torch.stack([judge.score(states[:, k], PROMPTS, levels[k], **CALL)[:, 3] for k in range(4)], 1)
    assert gains.shape == (2, 3)
    torch.testing.assert_close(gains, scores[:, 1:] - scores[:, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(gains.sum(1), scores[:, -1] - scores[:, 0], rtol=0, atol=1e-5)
    assert gains.abs().min() > 1e-4  # the levels matter: a wrong one would show


def test_states_that_a_trainer_kept_alone_and_timesteps_per_row(judge, trajectory):
    states, timesteps = trajectory
    whole = judge.gains(states, timesteps, PROMPTS, "VQ", **CALL)
    some = judge.gains(states[:, 1:3], timesteps[1:3].expand(2, 2), PROMPTS, "VQ", **CALL)
    torch.testing.assert_close(some[:, 0], whole[:, 1], rtol=0, atol=1e-5)
    one = judge.gains(states[:1], timesteps.tolist(), PROMPTS[0], "VQ", **CALL)
    torch.testing.assert_close(one, whole[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"timesteps": [1000.0]}, r"one per state of all_latents \(4\), or one fewer .* found the shape \(1,\)"),
        ({"timesteps": "none"}, "found the shape"),
        ({"timesteps": [900.0, -1.0, 3.0]}, "A timestep must be a number from 0"),
        ({"timesteps": torch.zeros(3, 3)}, r"found the shape \(3, 3\)"),
        ({"all_latents": torch.zeros(2, 1, 16, 3, 4, 4)}, "two states or more"),
        ({"all_latents": [1]}, "must be a tensor"),
        ({"prompts": ["a", "b", "c"]}, "3 prompts for 2 rows"),
        ({"dimension": "beauty"}, "dimension must be one of VQ"),
    ],
)
def test_mistakes(judge, trajectory, change, sentence):
    states, timesteps = trajectory
    arguments = {"all_latents": states, "timesteps": timesteps, "prompts": PROMPTS, **change}
    with pytest.raises(PrismError, match=sentence):
        judge.gains(**arguments, **CALL)
