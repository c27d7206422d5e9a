"""Guidance by the judge: pushes in closed form, winners that a stock call gives again, rows that really ran."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.machinery import seeded
from tests.sampling.conftest import Setting, made
from tests.zoo import VARIANTS

import prism
from prism import PrismError, cli, files
from prism.judge import Judge
from prism.sampling import Guidance, guided
from prism.sampling.guidance import guidance_of, parse
from prism.sampling.guiding import Guide, Guided
from prism.sampling.plan import Workload
from prism.sampling.strategies import Early, First, Full

STRENGTH = 0.3
PLAIN = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True}
SCHEDULERS: dict[str, tuple[str, Any]] = {
    "flow": ("wan-euler", lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "epsilon": ("cogvideox-dpm", lambda: DDIMScheduler(prediction_type="epsilon", **PLAIN)),
    "v": ("cogvideox-dpm", lambda: DDIMScheduler(prediction_type="v_prediction", **PLAIN)),
    "karras": ("cogvideox-dpm", lambda: EulerDiscreteScheduler(timestep_spacing="trailing")),
}


class Planted(Guide):
    """A guide with a score of its own: a . x (linear), or -|x - a|² / 2 (quadratic), of predicted clean latents."""

    def __init__(self, backbone: Any, guidance: Guidance, target: torch.Tensor, quadratic: bool) -> None:
        self.backbone, self.guidance, self.target, self.quadratic = backbone, guidance, target, quadratic
        self.clean: list[torch.Tensor] = []

    def gradient(self, scheduler: Any, timestep: Any, step: int, latents: Any, clean: Any, seeds: Any) -> torch.Tensor:
        self.clean.append(clean)
        return (self.target - clean) if self.quadratic else self.target.expand_as(clean)


def level(name: str, scheduler: Any, index: int) -> tuple[float, float]:
    """(alpha, sigma) of the loop's latents before the step of this index, from the scheduler's own table."""
    if name == "flow":
        return 1 - float(scheduler.sigmas[index]), float(scheduler.sigmas[index])
    if name == "karras":
        return 1.0, float(scheduler.sigmas[index])
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])]) if index < len(scheduler.timesteps) else 1.0
    return math.sqrt(kept), math.sqrt(1 - kept)


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pushes_are_the_closed_form(name: str, quadratic: bool) -> None:
    """A perfect denoiser of one clean latent x: each push is strength h' |z'/h' - z/h| along the planted gradient."""
    which, make = SCHEDULERS[name]
    scheduler, steps, shape = make(), 8, (2, 3, 5)
    scheduler.set_timesteps(steps)
    x, target = torch.randn(shape, generator=seeded(1)), torch.randn(shape[1:], generator=seeded(2))
    guide = Planted(made(which).judge().backbone, Guidance(STRENGTH, steps=(2, 5)), target, quadratic)
    course = Guided(guide, [0, 1], [None, None])
    alpha, sigma = level(name, scheduler, 0)
    z = alpha * x + sigma * torch.randn(shape, generator=seeded(0))
    pipe = SimpleNamespace(scheduler=scheduler, num_timesteps=steps)
    for step, timestep in enumerate(scheduler.timesteps, 1):
        (alpha, sigma), (alpha_now, sigma_now) = level(name, scheduler, step - 1), level(name, scheduler, step)
        eps = (z - alpha * x) / sigma
        answers = {"flow": eps - x, "epsilon": eps, "v": alpha * eps - sigma * x, "karras": eps}
        if name == "karras":
            scheduler.scale_model_input(z, timestep)
        before, after = z, scheduler.step(answers[name], timestep, z).prev_sample
        z = course.after_step(pipe, step, timestep, after)
        if not 2 <= step <= 5:
            assert z is after
            continue
        torch.testing.assert_close(guide.clean[-1], x, atol=2e-4, rtol=1e-4)
        gradient = (target - x) if quadratic else target.expand(shape)
        size, size_now = math.hypot(alpha, sigma), math.hypot(alpha_now, sigma_now)
        length = size_now * (after / size_now - before / size).flatten(1).norm(dim=1)
        push = STRENGTH * length[:, None, None] * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
        torch.testing.assert_close(z, after + push, atol=1e-3 * float(size_now), rtol=1e-4)
        assert torch.equal(course.after_step(pipe, step, timestep, z), z)  # a frame that no step moves is given
    assert len(guide.clean) == 8


def test_a_multistep_solver_keeps_pushes() -> None:
    """UniPC corrects each step from the latents before it, which are moved with it: its samples shift as Euler's do."""
    target, shifts = torch.randn(1, 4000, generator=seeded(2)), []
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), UniPCMultistepScheduler(**flow)):
        ends = []
        for strength in (0.0, 0.2):
            guide = Planted(made("wan-euler").judge().backbone, Guidance(strength), target, False)
            course, steps = Guided(guide, [0], [None]), 30
            scheduler.set_timesteps(steps)
            z, pipe = torch.randn(1, 4000, generator=seeded(0)), SimpleNamespace(scheduler=scheduler, num_timesteps=30)
            for step, timestep in enumerate(scheduler.timesteps, 1):
                answer = perfect(z, float(timestep) / 1000)
                z = course.after_step(pipe, step, timestep, scheduler.step(answer, timestep, z).prev_sample)
            ends.append(z)
        shifts.append(float((ends[1] - ends[0]) @ target.T / target.norm()))
    euler, unipc = shifts
    assert euler > 3
    assert unipc == pytest.approx(euler, rel=0.1)


def perfect(z: torch.Tensor, sigma: float, variance: float = 0.25) -> torch.Tensor:
    """The velocity of Gaussian clean latents of this variance, for z = (1 - sigma) x + sigma eps."""
    alpha = 1 - sigma
    clean = alpha * variance / (alpha**2 * variance + sigma**2) * z
    return (z - alpha * clean) / sigma - clean


def test_a_gradient_is_clipped_and_one_that_is_not_finite_is_left_out() -> None:
    guide = Planted(made("wan-euler").judge().backbone, Guidance(1.0, clip=1.5), torch.zeros(1), False)
    course = Guided(guide, [0, 1, 2], [None] * 3)
    gradient = torch.tensor([[1.0, -1.0, 10.0, 0.0], [math.nan, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    stepped = torch.full((3, 4), 3.0)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        push = course._scaled(gradient, stepped)
    limit = 1.5 * math.sqrt(102 / 4)
    cut = torch.tensor([1.0, -1.0, limit, 0.0])
    torch.testing.assert_close(push[0], 6.0 * cut / cut.norm())
    assert not push[1:].any()


RUNS = [  # pipeline, look, plan, candidates that make the steps 2 to 4
    ("wan-unipc", "ahead", Early(schedule=((3, 2), (4, 1)), look="now"), (3, 2, 1)),
    ("wan-unipc", "now", Early(schedule=((3, 1),), look="ahead", judge_at=600), (3, 1, 1)),
    ("wan-euler", "ahead", Full(num_draws=1), (3, 3, 3)),
    ("wan-euler", "now", First(), (1, 1, 1)),
    ("cogvideox-dpm", "now", Early(schedule=((3, 1),), look="now"), (3, 1, 1)),
]


@pytest.mark.parametrize(("which", "look", "plan", "alive"), RUNS)
def test_winners_rows_and_the_stock_call(which: str, look: Any, plan: Any, alive: tuple[int, ...]) -> None:
    setting = made(which)
    judge, pipe = setting.judge(2), setting.pipe
    call = {**setting.call, "output_type": "latent"}
    guidance = Guidance(0.2, look, steps=(2, 4), checkpointed=which == "wan-euler")
    rows, backward, handles = counted(pipe)
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, 3, plan=plan, batch_size=1, guidance_by_judge=guidance, **call)
    for handle in handles:
        handle.remove()
    stock = pipe(**guided(judge, guidance, tiny.PROMPT, seed=result.seed, **call))[0]
    assert torch.equal(stock, result.output[0])
    names = {"prism": prism, "pipe": pipe, "judge": judge, "prompt": tiny.PROMPT, "call": call}
    assert torch.equal(eval(result.reproduce, names)[0], stock)
    assert not torch.equal(stock, setting.stock(result.seed)[1])
    steps = judge.backbone.steps({"prompt": tiny.PROMPT, **call})
    load = Workload.of(judge.backbone, call, 3, judge.tap, steps)
    each = 2 / 3 * (3 if guidance.checkpointed else 2)
    load = Workload(load.n, load.calls, load.cfg, load.tap_share, guidance=(0, each, each, each, 0, 0))
    settled = plan.settled(load, steps)
    assert settled.guidance_rows(load) == pytest.approx(each * sum(alive))
    assert result.ledger.denoiser_rows == pytest.approx(settled.rows(load) + settled.guidance_rows(load))
    # Of checkpointed blocks the hook is set twice, and blocks that are computed again count as backward rows.
    came_back = sum(backward) / (2 if guidance.checkpointed else 1)
    assert result.ledger.denoiser_rows == pytest.approx(sum(rows) + came_back)
    assert result.ledger.backward_rows == pytest.approx(came_back * (2 if guidance.checkpointed else 1))


def counted(pipe: Any) -> tuple[list[float], list[float], list[Any]]:
    """Lists that fill with rows of blocks as they run forward, and as gradients come back to them; the hooks."""
    rows: list[float] = []
    backward: list[float] = []
    blocks = pipe.transformer.blocks if hasattr(pipe.transformer, "blocks") else pipe.transformer.transformer_blocks

    def count(_module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows.append(len(hidden) / len(blocks))
        if hidden.requires_grad and hidden.grad_fn is not None and torch.is_grad_enabled():
            hidden.register_hook(lambda gradient: backward.append(len(gradient) / len(blocks)))

    return rows, backward, [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]


@pytest.mark.parametrize("which", ["wan-unipc", "cogvideox-dpm"])
def test_no_strength_is_the_stock_call_and_batches_are_it_to_rounding(which: str) -> None:
    setting = made(which)
    judge, call = setting.judge(2), {**setting.call, "output_type": "latent"}
    assert torch.equal(setting.pipe(**guided(judge, 0.0, tiny.PROMPT, seed=1, **call))[0], setting.stock(1)[1])
    none = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, 2, batch_size=1, guidance_by_judge=0, **call)
    assert torch.equal(none.output[0], setting.stock(none.seed)[1])
    assert none.ledger.backward_rows == 0
    guidance = Guidance(0.2, look="now")
    batch = prism.best_of_n(
        setting.pipe, judge, tiny.PROMPT, 3, schedule=[(3, 2), (4, 1)], guidance_by_judge=guidance, **call
    )
    stock = setting.pipe(**guided(judge, guidance, tiny.PROMPT, seed=batch.seed, **call))[0]
    torch.testing.assert_close(batch.output[0], stock, atol=1e-4, rtol=1e-4)


def test_the_score_rises_with_the_strength(wan: Setting) -> None:
    """Of the judge that guides, by its weights, in a run that prefers them."""
    judge, call = wan.judge(2), {**wan.call, "output_type": "latent"}

    def score(strength: float) -> float:
        latents = wan.pipe(**guided(judge, Guidance(strength, by={"VQ": 2.0, "TA": -1.0}), tiny.PROMPT, **call))[0]
        scores = judge.score_clean(latents, tiny.PROMPT, 700.0, num_draws=8, **call)[0][0]
        return float(2 * scores[0] - scores[2])

    scores = [score(strength) for strength in (0.0, 1.0)]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.01


@pytest.mark.parametrize(
    ("variant", "look", "sentence"),
    [
        ("cogvideox_dpm", "ahead", "The steps of CogVideoXDPMScheduler draw noise"),
        ("hunyuan15", "now", "takes no callback_on_step_end, through which the judge would guide"),
        ("skyreels_v2_df", "now", "steps copies of its scheduler"),
        ("cosmos2", "now", "are not those of its scheduler's timesteps"),
    ],
)
def test_pipelines_that_cannot_be_guided_are_a_sentence(variant: str, look: Any, sentence: str) -> None:
    pipe, call = VARIANTS[variant]()
    judge = Judge.untrained(pipe, dim=16)
    with pytest.raises(PrismError, match=sentence):
        pipe(**guided(judge, Guidance(0.1, look), tiny.PROMPT, **{**call, "output_type": "latent"}))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("strong", "guidance_by_judge must be a number from 0 to 10; found strong"),
        (Guidance(-1), "strength of guidance_by_judge must be a number from 0 to 10; found -1"),
        (Guidance(0.1, steps=(1, 4)), "A step of guidance_by_judge must be a whole number of at least 2; found 1"),
        (Guidance(0.1, steps=(5, 4)), "end at step 4 before they begin at 5"),
        (Guidance(0.1, steps=3), "first and a last step such as"),
        (Guidance(0.1, steps=(6, 9)), "begins after step 6, and the call has steps 1 to 6"),
        (Guidance(0.1, clip=0), "clip of guidance_by_judge must be a number above 0; found 0"),
        (Guidance(0.1, "back"), "look of guidance_by_judge must be one of now, ahead"),
        (Guidance(0.1, "now", judge_at=500), "judge_at and num_draws of guidance_by_judge belong to look"),
        (Guidance(0.1, by="beauty"), "no dimension 'beauty'"),
        (Guidance(0.1, by={}), "by of guidance_by_judge gives no dimension a weight"),
    ],
)
def test_settings_that_are_none_are_a_sentence(wan: Setting, value: Any, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        prism.best_of_n(wan.pipe, wan.judge(1), tiny.PROMPT, 2, guidance_by_judge=value, **wan.call)


def test_a_call_too_short_for_a_push_is_refused(wan: Setting) -> None:
    call = {**wan.call, "num_inference_steps": 2}
    with pytest.raises(PrismError, match="the call has 2 steps; leave it out, or take 3 steps or more"):
        prism.best_of_n(wan.pipe, wan.judge(1), tiny.PROMPT, 2, guidance_by_judge=0.1, **call)
    with pytest.raises(PrismError, match="the call has 2 steps"):
        wan.pipe(**guided(wan.judge(1), 0.1, tiny.PROMPT, **{**call, "output_type": "latent"}))


@pytest.mark.parametrize("strategy", ["draft", "race", "fk"])
def test_strategies_whose_candidates_take_other_ways_are_refused(wan: Setting, strategy: str) -> None:
    with pytest.raises(PrismError, match=f'and this run\'s is "{strategy}"'):
        prism.best_of_n(wan.pipe, wan.judge(1), tiny.PROMPT, 2, strategy=strategy, guidance_by_judge=0.1, **wan.call)


def test_a_callback_of_the_callers_comes_first_and_guided_refuses_one(wan: Setting) -> None:
    judge, seen = wan.judge(1), []

    def callback(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    call = {**wan.call, "output_type": "latent"}
    result = prism.best_of_n(
        wan.pipe, judge, tiny.PROMPT, 2, batch_size=1, guidance_by_judge=0.2, callback_on_step_end=callback, **call
    )
    assert seen == list(range(6))
    assert result.reproduce == ""
    stock = wan.pipe(**guided(judge, 0.2, tiny.PROMPT, seed=result.seed, **call))[0]
    assert torch.equal(result.output[0], stock)
    with pytest.raises(PrismError, match="'callback_on_step_end' is set by guided itself"):
        guided(judge, 0.2, tiny.PROMPT, callback_on_step_end=callback, **call)


def test_text() -> None:
    assert parse("0.1") == Guidance(0.1)
    assert parse("0.2, look=ahead, steps=2-10, clip=3, by=VQ:1+TA:0.5") == Guidance(
        0.2, "ahead", (2, 10), 3.0, {"VQ": 1.0, "TA": 0.5}
    )
    ahead = parse("1,look=ahead,judge-at=500,num-draws=2,checkpointed=true")
    assert ahead == Guidance(1.0, "ahead", judge_at=500.0, num_draws=2, checkpointed=True)
    said = Guidance(0.2, "ahead", (2, 10), by="VQ")
    assert eval(repr(said), {"prism": prism}) == said
    assert guidance_of(None) is None


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.text(), st.from_regex(r"[0-9.]{1,4}(,[a-z_]{1,9}=[0-9a-z:+.-]{0,6}){0,3}", fullmatch=True)))
def test_any_text_is_guidance_or_a_sentence(text: str) -> None:
    with contextlib.suppress(PrismError):
        assert 0 <= parse(text).strength <= 10


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red circle moves right"
    words = [
        "sample",
        "--prompt",
        prompt,
        "--n",
        "1",
        "--strategy",
        "none",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main([*words, "--guidance-by-judge", "0.2,look=ahead"]) == 0
    metrics = files.read_json(tmp_path / "o" / "metrics.json")
    assert metrics["best_of_n"][0]["guidance_by_judge"] == "0.2,look=ahead"
    assert metrics["ledger"]["backward_rows"] > 0
    assert "pushed along the gradient of the judge" in (tmp_path / "o" / "report.html").read_text()
    assert "guided(judge, prism.sampling.Guidance(strength=0.2, look='ahead')" in metrics["reproduce"]
    words[-1] = str(tmp_path / "p")
    assert cli.main([*words, "--guidance-by-judge", "0.2,look=sideways"]) == 2
    assert cli.main([*words[:6], "draft", *words[7:], "--guidance-by-judge", "0.2"]) == 2
    capsys.readouterr()
    assert not (tmp_path / "p").exists()
