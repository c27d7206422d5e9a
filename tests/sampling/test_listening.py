"""`prism.listen`: the judge's scores of a plain call, which stays what it is and costs no denoiser call more."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler
from tests import tiny
from tests.machinery import seeded
from tests.sampling.conftest import Setting
from tests.sampling.test_steps import HEUN, Counter, build, plain, prompt_of
from tests.sampling.test_way_out import traces
from torch import Tensor

import prism
from prism.backbone import Backbone, layout
from prism.backbone.arguments import normalised
from prism.backbone.denoiser_call import DenoiserCall
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling.trajectory import sample

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT]


def left(pipe: Any) -> dict[str, Any]:
    """What a run could leave behind, without the values that every plain call leaves on scheduler and pipeline."""
    values = traces(pipe)
    return {name: None if name.startswith(("scheduler..", "pipe..")) else value for name, value in values.items()}


def denoised(pipe: Any, call: dict[str, Any], **changes: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """A plain call of two prompts with a callback: its latents, those after each step, and those it began with."""
    after: list[Tensor] = []
    first: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        after.append(tensors["latents"].clone())
        return tensors

    def begin(_module: Any, args: Any, kwargs: Any) -> None:
        first.append(kwargs["hidden_states"][-2:].clone())

    handle = pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        generators = [seeded(seed) for seed in range(2)]
        output = pipe(PROMPTS, generator=generators, callback_on_step_end=keep, **{**call, **changes})[0]
    finally:
        handle.remove()
    return output, after, first[0]


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_call_s_rows_are_scored_at_each_step(setting: Setting, guidance: float) -> None:
    pipe, judge = setting.pipe, setting.judge(2)
    call = {**setting.call, "output_type": "latent", "guidance_scale": guidance}
    expected, after, first = denoised(pipe, call)
    counter, before, rng = Counter(pipe), left(pipe), torch.get_rng_state()
    counted: list[int] = []
    for listened in (False, True):
        counter.rows = 0
        if listened:
            with prism.listen(judge, pipe) as scores:
                assert scores == []
                output, _, _ = denoised(pipe, call)
        else:
            output, _, _ = denoised(pipe, call)
        assert torch.equal(output, expected)
        counted.append(counter.rows)
    assert counted[0] == counted[1] == 2 * call["num_inference_steps"] * (2 if guidance > 1 else 1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert left(pipe) == before
    timesteps = pipe.scheduler.timesteps.tolist()
    assert [entry.step for entry in scores] == list(range(1, call["num_inference_steps"] + 1))
    for (step, t, found), noisy in zip(scores, [first, *after]):
        assert t == pytest.approx(timesteps[step - 1])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, judge.score(noisy, PROMPTS, t, **call), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_rows_are_judged_ahead_at_each_step(setting: Setting) -> None:
    """As the judge itself scores what each call alone predicts; the output stays the same to the bit."""
    pipe, judge = setting.pipe, setting.judge(2)
    call = {**setting.call, "output_type": "latent", "num_inference_steps": 3}
    expected, _, _ = denoised(pipe, call)
    counter, before, rng = Counter(pipe), left(pipe), torch.get_rng_state()
    with prism.listen(judge, pipe, look="ahead", judge_at=600) as scores:
        for _ in range(2):
            output, _, _ = denoised(pipe, call)
            assert torch.equal(output, expected)
    assert torch.equal(torch.get_rng_state(), rng)
    assert left(pipe) == before
    assert counter.rows == 2 * 3 * (2 * 2 + 2 * 2)  # both passes of two videos, and two draws of each
    assert [entry.step for entry in scores] == [1, 2, 3] * 2
    alone = [sample(judge.backbone, prompt, seed, call, (1, 2, 3)).predicted for seed, prompt in enumerate(PROMPTS)]
    for entry in scores:
        clean = torch.stack([predicted[entry.step - 1] for predicted in alone])
        mean, _ = judge.score_clean(clean, PROMPTS, 600, **call)
        torch.testing.assert_close(entry.ahead, mean, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(entry.ahead, entry.scores, atol=1e-3)
    with prism.listen(judge, pipe) as plainly:
        denoised(pipe, call)
    assert [entry.ahead for entry in plainly] == [None] * 3
    for entry, other in zip(scores, plainly):
        assert torch.equal(entry.scores, other.scores)


AHEAD = ["svd", "ltx_i2v", "hunyuan15", "hunyuan_i2v", "cosmos1_v2w_clean", "kandinsky5_i2v", "wan22_5b_i2v"]


@pytest.mark.parametrize("name", [*AHEAD, "wan22_a14b_t2v_low"])
def test_other_families_are_judged_ahead(name: str) -> None:
    pipe, call = build(name)
    call = {**call, "output_type": "latent", "num_inference_steps": 3}
    judge = Judge.untrained(Backbone(pipe, "transformer_2" if name.endswith("_low") else None), dim=16)
    expected = plain(pipe, call, 5)
    if hasattr(pipe, "guider"):
        pipe.guider.set_state(None, None, None)
    with prism.listen(judge, pipe, look="ahead", num_draws=1) as scores:
        assert torch.equal(plain(pipe, call, 5), expected)
    steps = [entry.step for entry in scores]
    assert len(steps) == (3 if not name.endswith("_low") else 1)
    prompt = prompt_of(pipe) or ""
    clean = sample(judge.backbone, prompt, 5, normalised(call), steps).predicted
    at = min(700.0, judge.backbone.t_range[1])
    for entry, latents in zip(scores, clean):
        scored, _ = judge.score_clean(latents[None], prompt_of(pipe), at, 1, **call, seeds=[5])
        torch.testing.assert_close(entry.ahead, scored, atol=2e-4, rtol=1e-4)


def test_looks_ahead_that_cannot_be_are_refused_before_any_call() -> None:
    pipe = tiny.wan()
    judge = Judge.untrained(pipe, tap=1, dim=16)
    for options, message in (
        ({"look": "ahead-conditional"}, "look is one of now, ahead, as both passes of a call run; found ahead-cond"),
        ({"look": "ahead", "judge_at": 0}, "judge_at"),
        ({"look": "ahead", "num_draws": 0}, "num_draws"),
        ({"judge_at": 600}, "judge_at is the level of looks ahead"),
    ):
        with pytest.raises(PrismError, match=message), prism.listen(judge, pipe, **options):
            raise AssertionError
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(PrismError, match='take look="now"'), prism.listen(judge, pipe, look="ahead"):
        raise AssertionError
    pipe, _ = build("wan22_a14b_t2v_low")
    judge = Judge.untrained(Backbone(pipe, "transformer_2"), dim=16)
    with pytest.raises(PrismError, match="found the level 990"), prism.listen(judge, pipe, look="ahead", judge_at=990):
        raise AssertionError


ODD = ["svd", "latte", "ltx_i2v", "opensora", "hunyuan15", "cosmos1", "skyreels_v2_df", "flux", "wan22_a14b_t2v"]


@pytest.mark.parametrize("name", [*ODD, "wan22_a14b_t2v_low", "kandinsky5_i2v", "allegro", "bare_module"])
def test_other_families(name: str) -> None:
    """Two calls a step or groups in one batch, schedulers that are copied or step twice, guiders, two denoisers."""
    pipe, call = build(name)
    backbone = Backbone(pipe, "transformer_2" if name.endswith("_low") else None)
    judge, family = Judge.untrained(backbone, dim=16), backbone.family
    noisy: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        latents = DenoiserCall.of(module, args, kwargs, family).noisy
        axis = layout.channel_axis(family.layout)
        own = latents.narrow(axis, 0, min(latents.shape[axis], family.channels(backbone.config, latents)))
        noisy.append(own[family.conditional(len(own), 1)].clone())

    handle = backbone.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    expected = plain(pipe, call, 5)
    count = len(noisy)
    if hasattr(pipe, "guider"):  # a plain call starts where the one before stopped
        pipe.guider.set_state(None, None, None)
    noisy.clear()
    with prism.listen(judge, pipe) as scores:
        assert torch.equal(plain(pipe, call, 5), expected)
    handle.remove()
    assert len(noisy) == count  # no denoiser call more
    own = backbone.steps({**call, **backbone.batch([tiny.PROMPT], [5], call)})
    read = [step for step, readable in enumerate(own.readable, 1) if readable]
    assert [entry.step for entry in scores] == (read if not name.endswith("_low") else [4, 5, 6])
    of_step = noisy[:: 2 if backbone.guided(call) and family.cfg == "two_calls" else 1]
    assert len(of_step) == len(scores)
    for (_, t, found), latents in zip(scores, of_step):
        scored = judge.score(latents, prompt_of(pipe), t, **call, seeds=[5])
        torch.testing.assert_close(found, scored, atol=1e-4, rtol=1e-4)


def test_calls_one_after_another_start_at_step_one(wan: Setting) -> None:
    """A second call, one after an interrupted one, and a scheduler that steps twice at a timestep."""
    pipe, call = build("wan21_t2v_euler", HEUN(shift=3.0), num_inference_steps=3)
    with prism.listen(Judge.untrained(pipe, dim=16), pipe) as scores:
        plain(pipe, call, 0)
        with pytest.raises(TimeoutError):
            pipe(tiny.PROMPT, generator=seeded(1), callback_on_step_end=_give_up, **call)
        plain(pipe, call, 0)
    assert [entry.step for entry in scores] == [1, 2, 3, 4, 5, 1, 1, 2, 3, 4, 5]
    assert torch.equal(scores[0].scores, scores[6].scores)
    pipe, call = build("cosmos1")
    with prism.listen(Judge.untrained(pipe, dim=16), pipe) as scores:
        plain(pipe, call, 0)
        plain(pipe, call, 0)
    steps = list(range(1, call["num_inference_steps"] + 1))
    assert [entry.step for entry in scores] == 2 * steps


def test_judges_and_searches_inside_are_not_listened_to(wan: Setting) -> None:
    judge, asked = wan.judge(2), []
    call = {**wan.call, "output_type": "latent"}

    def ask(_pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked.append(judge.score(tensors["latents"], tiny.PROMPT, float(timestep), **wan.call))
        return tensors

    with prism.listen(judge, wan.pipe) as scores:
        prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=2, **call)
        assert scores == []
        output = wan.pipe(tiny.PROMPT, generator=seeded(0), callback_on_step_end=ask, **call)[0]
    assert torch.equal(output, wan.stock(0)[1])
    assert [entry.step for entry in scores] == list(range(1, 7))
    assert len(asked) == 6


def test_every_way_out_leaves_the_pipeline_as_it_was(wan: Setting) -> None:
    judge = wan.judge(2)
    wan.stock(0)
    before, call = left(wan.pipe), {**wan.call, "callback_on_step_end": _give_up}
    with pytest.raises(TimeoutError), prism.listen(judge, wan.pipe) as scores:
        wan.pipe(tiny.PROMPT, generator=seeded(0), **call)
    assert len(scores) == 1
    handle = judge.head.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt), prism.listen(judge, wan.pipe) as scores:
        wan.pipe(tiny.PROMPT, generator=seeded(0), **wan.call)
    handle.remove()
    assert scores == []
    assert left(wan.pipe) == before
    # Another thread waits while it is open, and gets the pipeline afterwards.
    held = threading.Event()

    def hold() -> None:
        with judge.backbone.held():
            held.set()

    thread = threading.Thread(target=hold, daemon=True)
    with prism.listen(judge, wan.pipe):
        thread.start()
        assert not held.wait(0.2)
    assert held.wait(60)
    thread.join()


def test_what_cannot_be_listened_to_is_refused() -> None:
    pipe = tiny.wan("unipc")
    judge, other = Judge.untrained(pipe, tap=2, dim=16), Judge.untrained(tiny.wan("unipc"), dim=16)

    def refused(sentence: str, judge: Any = judge) -> None:
        before = traces(pipe)
        with pytest.raises(PrismError, match=sentence), prism.listen(judge, pipe):
            raise AssertionError("it was let in")
        assert traces(pipe) == before

    refused("put onto another pipeline", other)
    refused("needs a judge that reads hidden states, and found a judge of type str", "a judge")
    with prism.listen(judge, pipe):
        with pytest.raises(PrismError, match="listened to already"), prism.listen(judge, pipe):
            pass
        with pytest.raises(PrismError, match="listened to already"), prism.listen(judge, pipe):
            pass  # the first still listens
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    refused("cache skips blocks")
    pipe.transformer.disable_cache()
    inner, calls = pipe.transformer.forward, {}

    def remember(*args: Any, **kwargs: Any) -> Any:
        if "last" not in calls:
            calls["last"] = inner(*args, **kwargs)
        return calls["last"]

    pipe.transformer.forward = remember
    refused("is patched: .*remember")
    del pipe.transformer.forward
    pipe.transformer.compile(backend="eager")
    refused("compiled as a whole")


def test_the_lines_of_the_documentation_run(capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "prism.listen(judge, pipe) as" in code
    )
    pipe = tiny.wan("unipc")
    names = {"prism": prism, "torch": torch, "pipe": pipe, "judge": Judge.untrained(pipe, dim=16)}
    exec(compile(code, "judge.md", "exec"), {**names, "prompt": tiny.PROMPT, "call": tiny.CALL_WAN})
    assert len(capsys.readouterr().out.splitlines()) == tiny.CALL_WAN["num_inference_steps"]


def _give_up(*_: Any) -> dict[str, Any]:
    raise TimeoutError


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
