"""A ControlNet beside the denoiser: what it costs, and what it is told; the rest stands in the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.zoo.controlled import sd15_two_controlnets, sdxl_controlnet
from torch import Tensor

import prism
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.judge import Judge
from prism.team import Team
from prism.training.kept_conditionings import KeptConditionings

STEPS = 3


@pytest.fixture(scope="module")
def judge() -> Any:
    pipe, call = sdxl_controlnet()
    return Judge.untrained(pipe, dim=16), {**call, "num_inference_steps": STEPS}


def test_it_runs_the_rows_that_are_needed_and_the_ledger_counts_them(judge: Any) -> None:
    """Two groups of rows, as the denoiser has: of 3 candidates, of the two that are left, and of the winner."""
    judge, call = judge
    rows: list[int] = []

    def count(_net: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["sample"]))

    handle = judge.backbone.pipe.controlnet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        run = {"n": 3, "schedule": [(1, 2), (2, 1)], **call}
        found = prism.best_of_n(judge.backbone.pipe, judge, tiny.PROMPT, **run)
    finally:
        handle.remove()
    assert rows == [6, 6, 4, 2, 2, 2]  # the first shows the call's steps; of the winner's steps the first is recorded
    assert found.ledger.control_rows == found.ledger.to_dict()["control_rows"] == sum(rows)


def test_a_look_ahead_while_listening_runs_it_anew(judge: Any) -> None:
    """What is listened to ahead is what the judge says of the same latents outside the call."""
    judge, call = judge
    pipe, asked, conditioned = judge.backbone.pipe, list[Tensor](), judge.backbone.tokens

    def keep(noisy: Tensor, conditioning: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(noisy)
        return conditioned(noisy, conditioning, *args, **kwargs)

    judge.backbone.tokens = keep
    try:
        with prism.listen(judge, pipe, look="ahead", judge_at=500.0, num_draws=1) as heard:
            pipe(tiny.PROMPT, generator=torch.manual_seed(0), **call)
    finally:
        del judge.backbone.tokens
    outside = [judge.score(noisy, tiny.PROMPT, 500.0, **call) for noisy in asked]
    assert len(heard) == len(outside) == STEPS
    for step, scores in zip(heard, outside):
        assert torch.allclose(step.ahead, scores, atol=1e-5)
    with torch.no_grad():
        judge.backbone.pipe.controlnet.controlnet_mid_block.weight.mul_(3.0)
        judge.backbone.forget()
        assert (judge.score(asked[0], tiny.PROMPT, 500.0, **call) - outside[0]).abs().max() > 1e-4
        judge.backbone.pipe.controlnet.controlnet_mid_block.weight.div_(3.0)


def test_pictures_of_several_nets_are_no_pictures_of_several_prompts(tmp_path: Path) -> None:
    """And what one prompt's nets are told comes back from a file."""
    pipe, call = sd15_two_controlnets()
    backbone, texts = Backbone(pipe), [tiny.PROMPT, tiny.OTHER_PROMPT]
    both, (one,) = backbone.condition(texts, **call), [backbone.condition(texts[1:], **call)]
    noisy = torch.randn((1, *both.shape), generator=torch.manual_seed(0))  # type: ignore[union-attr]
    tokens = backbone.tokens(noisy.expand(2, *noisy.shape[1:]), both, 500.0, backbone.default_tap)
    alone = backbone.tokens(noisy, one, 500.0, backbone.default_tap)
    assert torch.allclose(tokens.visual[1], alone.visual[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokens.visual[0], alone.visual[0], atol=1e-3)
    kept = KeptConditionings(backbone, tmp_path, Team())
    assert kept.keep("one", one)
    back: Any = kept.read("one")
    assert back.control_levels == one.control_levels
    assert torch.equal(
        backbone.tokens(noisy, back, 900.0, backbone.default_tap).visual,
        backbone.tokens(noisy, one, 900.0, backbone.default_tap).visual,
    )


def test_what_a_window_of_steps_leaves_unknown_is_refused(judge: Any) -> None:
    judge, call = judge
    pipe, half = judge.backbone.pipe, {**call, "control_guidance_end": 0.5}
    ahead = prism.listen(judge, pipe, look="ahead", judge_at=500.0, num_draws=1)
    with pytest.raises(PrismError, match=r"works at some steps alone, and a look ahead does not know"), ahead:
        pipe(tiny.PROMPT, generator=torch.manual_seed(0), **half)
    with pytest.raises(PrismError, match=r"^control_guidance_end = \[0.5, 1.0\] differs between ControlNets"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **{**call, "control_guidance_end": [0.5, 1.0]})


def test_a_window_of_steps_is_one_of_noise_levels(judge: Any) -> None:
    """Of three steps the last one has no ControlNet: below the middle between its level and the one before."""
    judge, call = judge
    backbone = judge.backbone
    half = backbone.condition([tiny.PROMPT], **call, control_guidance_end=0.7)
    steps = backbone.steps({**call, **backbone.batch([tiny.PROMPT], [0], call)})
    middle = (steps.levels[1] + steps.levels[2]) / 2
    assert half.control_levels == (pytest.approx(middle), 1000.0)
    whole, none = (backbone.condition([tiny.PROMPT], **call, **more) for more in ({}, _scale(0.0)))
    noisy = torch.randn((2, *half.shape), generator=torch.manual_seed(0))
    rows, t = [0, 0], torch.tensor([middle + 1, middle - 1])
    tokens = [backbone.tokens(noisy, each[rows], t, judge.tap).visual for each in (half, whole, none)]
    assert torch.allclose(tokens[0][0], tokens[1][0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(tokens[0][1], tokens[2][1], rtol=1e-4, atol=1e-5)
    assert (tokens[1] - tokens[2]).abs().amax((1, 2)).min() > 1e-2


def _scale(scale: float) -> dict[str, float]:
    return {"controlnet_conditioning_scale": scale}


def test_a_patched_net_is_refused(judge: Any) -> None:
    judge, call = judge
    net, calls = judge.backbone.pipe.controlnet, list[int]()

    def every_other(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output if len(calls) % 2 else None

    handle = net.register_forward_hook(every_other)
    try:
        with pytest.raises(PrismError, match="goes by earlier calls"):
            prism.best_of_n(judge.backbone.pipe, judge, tiny.PROMPT, n=2, schedule=[(2, 1)], **call)
    finally:
        handle.remove()
