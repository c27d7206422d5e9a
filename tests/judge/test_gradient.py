"""The gradient of a judge's score with respect to latents, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import tiny
from tests.machinery import seeded

from prism.errors import PrismError
from prism.judge import Judge
from prism.judge.gradient import score_gradient
from prism.judge.joint import JointJudge

WEIGHTS = {"VQ": 1.0, "overall": -0.5}


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Two heads after different blocks of a tiny CogVideoX, all in float64."""
    pipe = tiny.cogvideox().to(torch.float64)
    judge = Judge.average([Judge.untrained(pipe, tap=tap, dim=16, seed=tap) for tap in (1, 2)])
    for member in judge.members:
        member.head.double()
    return judge


def inputs(judge: Judge, rows: int = 2) -> tuple[torch.Tensor, Any]:
    condition = judge.backbone.condition([tiny.PROMPT] * rows, **tiny.CALL_COGVIDEOX)
    return torch.randn(rows, 3, 4, 4, 4, generator=seeded(0), dtype=torch.float64), condition


def values(judge: Judge, latents: torch.Tensor, condition: Any, noisy: Callable[..., Any]) -> torch.Tensor:
    """(B,) the weighted score, with no gradient in it."""
    tokens = judge.backbone.tokens(noisy(latents), condition, 499.0, judge.taps)
    scores = judge.score_tokens(tokens)
    return scores @ scores.new_tensor([WEIGHTS.get(name, 0.0) for name in judge.dimensions])


@pytest.mark.parametrize("look", ["now", "ahead"])
def test_it_is_that_of_finite_differences(judge: Judge, look: str) -> None:
    latents, condition = inputs(judge)
    noise = torch.randn(latents.shape, generator=seeded(1), dtype=torch.float64)

    def noisy(z: torch.Tensor) -> torch.Tensor:
        return z if look == "now" else judge.backbone.add_noise(z, 499.0, noise)

    scores, gradient = score_gradient(judge, latents, condition, 499.0, WEIGHTS, noisy)
    assert torch.equal(scores, judge.score_tokens(judge.backbone.tokens(noisy(latents), condition, 499.0, judge.taps)))
    for seed in range(3):
        direction = torch.randn(latents.shape, generator=seeded(10 + seed), dtype=torch.float64)
        step = 1e-5 * direction
        slopes = (
            values(judge, latents + step, condition, noisy) - values(judge, latents - step, condition, noisy)
        ) / 2e-5
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slopes, rtol=1e-6, atol=1e-9)


def test_rows_checkpoints_and_joint_judges(judge: Judge) -> None:
    latents, condition = inputs(judge)
    _, both = score_gradient(judge, latents, condition, 499.0, WEIGHTS)
    _, again = score_gradient(judge, latents, condition, 499.0, WEIGHTS, checkpointed=True)
    torch.testing.assert_close(again, both, rtol=1e-12, atol=1e-15)
    for row in range(2):  # a row's gradient is that of its own score
        _, one = score_gradient(judge, latents[[row]], condition[row], 499.0, WEIGHTS)
        torch.testing.assert_close(one[0], both[row], rtol=1e-9, atol=1e-12)
    joint = JointJudge([judge, judge])
    for member in judge.members:
        member.head.double()  # which a judge is made with in float32
    _, both = score_gradient(judge, latents, condition, 499.0, WEIGHTS)
    _, doubled = score_gradient(joint, latents, condition, 499.0, {"0/VQ": 1.0, "1/overall": -0.5})
    torch.testing.assert_close(doubled, both, rtol=1e-9, atol=1e-12)
    assert all(value.grad is None for value in judge.backbone.denoiser.parameters())
    assert not torch.is_inference(both)


def test_it_comes_out_of_inference_mode(judge: Judge) -> None:
    latents, condition = inputs(judge)
    expected = score_gradient(judge, latents, condition, 499.0, WEIGHTS)[1]
    with torch.inference_mode():
        assert torch.equal(score_gradient(judge, latents.clone(), condition, 499.0, WEIGHTS)[1], expected)


def test_a_denoiser_that_cuts_gradients_is_a_sentence() -> None:
    judge = Judge.untrained(tiny.wan(), tap=1, dim=16)
    condition = judge.backbone.condition([tiny.PROMPT], **tiny.CALL_WAN)
    latents = torch.randn(1, 16, 3, 4, 4, generator=seeded(0))
    embed = judge.backbone.denoiser.patch_embedding
    handle = embed.register_forward_hook(lambda _module, _args, output: output.detach())
    try:
        with pytest.raises(PrismError, match="No gradient comes through the denoiser WanTransformer3DModel"):
            score_gradient(judge, latents, condition, 499.0, WEIGHTS)
    finally:
        handle.remove()
