"""A recorded output is given again for what it was computed for and for nothing else, whoever changes what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LayerSkipConfig,
    SkipLayerGuidance,
)
from tests import tiny
from tests.machinery import few, seeded
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.backbone.denoiser_call import by_name
from prism.errors import PrismError

RUNS: dict[str, dict[str, Any]] = {
    "early": {"schedule": [(3, 2), (4, 1)]},
    "full": {"strategy": "full", "num_draws": 1},
    "draft": {"strategy": "draft", "draft_steps": 2, "num_draws": 1},
    "oracle": {"strategy": "oracle", "oracle": lambda video, prompt: float(video[:, :16].mean())},
}


WAN = "wan21_t2v_unipc"
SHORT = ("early", "full")


def build(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = VARIANTS[name]()
    return pipe, {**call, "num_inference_steps": 5, "output_type": "latent", **changes}


def assert_stock(pipe: Any, call: dict[str, Any], runs: Any = RUNS, ready: Callable[[], Any] = lambda: None) -> None:
    """At batch size 1 every strategy's winner is, to the bit, what a plain call with the same callback gives; `ready`
    puts back what the callback changed for good."""
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    for name in runs:
        ready()
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=few(name), seed=4, batch_size=1, **RUNS[name], **call)
        ready()
        plain = pipe(tiny.PROMPT, generator=seeded(result.seed), **call)[0]
        assert torch.equal(torch.as_tensor(result.video), plain[0]), name


# -- callbacks


def guidance_off(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The recipe of diffusers' documentation."""
    if step == 1:
        pipe._guidance_scale = 0.0
        pipe._true_cfg_scale = 0.0
    return tensors


def guidance_ramp(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 4.0 + step
    return tensors


@works(
    "Callbacks and guidance",
    "A callback that turns guidance off on the way, or ramps it (`pipe._guidance_scale`)",
    "exact",
    "What it changes is computed anew where the winner is finished; candidates are judged without it.",
)
@pytest.mark.parametrize(
    ("name", "callback"),
    [
        (WAN, guidance_off),  # one call a step from there on
        ("cogvideox_ddim", guidance_off),
        ("cogvideox_ddim", guidance_ramp),
        ("ltx", guidance_ramp),
        ("hunyuan_true_cfg", guidance_off),
    ],
)
def test_callbacks_that_change_the_guidance(name: str, callback: Any) -> None:
    pipe, call = build(name)
    without = pipe(tiny.PROMPT, generator=seeded(4), **call)[0]
    call["callback_on_step_end"] = callback
    changed = not torch.equal(pipe(tiny.PROMPT, generator=seeded(4), **call)[0], without)
    assert changed is (name != "hunyuan_true_cfg")
    assert_stock(pipe, call, RUNS if name.startswith("wan") else SHORT)


CHANGES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "text, given anew": lambda pipe, tensors: {"prompt_embeds": tensors["prompt_embeds"] * 0.9},
    "text, in place": lambda pipe, tensors: tensors["prompt_embeds"].mul_(0.9) is None or {},
    "text, behind autograd's back": lambda pipe, tensors: tensors["prompt_embeds"].data.mul_(0.999) is None or {},
    "one value of the text": lambda pipe, tensors: tensors["prompt_embeds"][0, 0, :1].mul_(1.5) is None or {},
    "latents": lambda pipe, tensors: {"latents": tensors["latents"] * 1.0001},
    "latents, with the global generator": lambda pipe, tensors: tensors["latents"].add_(0.1) is None or {},
    "a denoiser call of its own": lambda pipe, tensors: (
        pipe.transformer(tensors["latents"], torch.tensor([500]), tensors["prompt_embeds"]) and {}
    ),
    "the denoiser's own attributes": lambda pipe, tensors: setattr(pipe.transformer.blocks[0], "eps", 1.0) or {},
}


@works(
    "Callbacks and guidance",
    "A callback that changes text or latents, given anew or in place, or calls the denoiser itself",
    "exact",
    "Recorded outputs are compared with what they were computed for; its own calls do not shift the count.",
)
@pytest.mark.parametrize("change", CHANGES)
def test_callbacks_that_change_what_the_denoiser_is_given(change: str) -> None:
    pipe, call = build(WAN)

    def callback(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> Any:
        return CHANGES[change](pipe, tensors) if step == 1 else {}

    call |= {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    assert_stock(pipe, call, SHORT)


class Scaled:
    """Attention that is scaled by what it holds."""

    def __init__(self, inner: Any):
        self.inner, self.scale = inner, torch.ones(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * self.scale


def louder(pipe: Any, state: dict[str, Any]) -> None:
    state["scale"] = 0.7


def other_weights(pipe: Any, state: dict[str, Any]) -> None:
    """As a moving average is put in for the last steps."""
    for value in pipe.transformer.parameters():
        value.data.copy_(0.9 * value.data)


def loaded_weights(pipe: Any, state: dict[str, Any]) -> None:
    pipe.transformer.load_state_dict({name: 0.95 * value for name, value in pipe.transformer.state_dict().items()})


def the_middle_of_a_weight(pipe: Any, state: dict[str, Any]) -> None:
    pipe.transformer.blocks[1].ffn.net[0].proj.weight.data[3, 1:-1] *= 0.5  # no version of a tensor tells it


def a_processors_tensor(pipe: Any, state: dict[str, Any]) -> None:
    for processor in pipe.transformer.attn_processors.values():
        processor.scale.mul_(0.5)


@works(
    "Callbacks and guidance",
    "A callback that changes weights (a moving average), tensors of attention processors, or what hooks go by",
    "exact",
    "From there on the winner is computed anew, and is the plain call's with this callback.",
)
@pytest.mark.parametrize("change", [louder, other_weights, loaded_weights, the_middle_of_a_weight, a_processors_tensor])
def test_callbacks_that_change_what_no_call_shows(change: Callable[[Any, dict[str, Any]], None]) -> None:
    pipe, call = build(WAN)
    state = {"scale": 1.0}
    pipe.transformer.set_attn_processor({name: Scaled(p) for name, p in pipe.transformer.attn_processors.items()})
    pipe.transformer.blocks[1].register_forward_hook(lambda module, args, output: output * state["scale"])
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

    def ready() -> None:
        state["scale"] = 1.0
        pipe.transformer.load_state_dict(weights)
        for processor in pipe.transformer.attn_processors.values():
            processor.scale = torch.ones(1)

    def callback(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            change(pipe, state)
        return {}

    assert_stock(pipe, {**call, "callback_on_step_end": callback}, SHORT, ready)


def test_a_callback_that_only_looks_costs_nothing() -> None:
    pipe, call = build(WAN)
    judge, seen = prism.Judge.untrained(pipe, tap=1, dim=16), []
    pipe.transformer.blocks[1].register_forward_hook(lambda *_: seen.append(1))  # and so does a hook

    def callback(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {}

    rows = [
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, **RUNS["early"], **each).ledger.denoiser_rows
        for each in (call, {**call, "callback_on_step_end": callback})
    ]
    assert rows[0] == rows[1]
    assert seen


@works(
    "Adapters and training",
    "A callback that switches LoRA adapters or their scales on the way",
    "exact",
    "From where they are switched the winner is computed anew, and is the plain call's with this callback.",
)
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (WAN, "another adapter"),
        (WAN, "another scale"),
        (WAN, "off"),
        (WAN, "merged"),
        ("cogvideox_ddim", "another scale"),
    ],
)
def test_callbacks_that_switch_adapters(name: str, how: str) -> None:
    peft = pytest.importorskip("peft")
    pipe, call = build(name)
    torch.manual_seed(7)
    for adapter in ("one", "two"):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter)

    def ready() -> None:
        pipe.transformer.unfuse_lora()
        pipe.transformer.enable_adapters()
        pipe.transformer.set_adapters(["one"], [1.0])

    def callback(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            if how == "another adapter":
                pipe.transformer.set_adapters(["two"], [1.0])
            elif how == "another scale":
                pipe.transformer.set_adapters(["one"], [0.9])
            elif how == "off":
                pipe.transformer.disable_adapters()
            else:
                pipe.transformer.fuse_lora(0.5)
        return tensors

    weights = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}

    def whole() -> None:
        ready()
        pipe.transformer.load_state_dict(weights)  # merged weights come back but for their last bits

    ready()
    before = pipe(tiny.PROMPT, generator=seeded(4), **call)[0]
    call["callback_on_step_end"] = callback
    assert not torch.equal(pipe(tiny.PROMPT, generator=seeded(4), **call)[0], before)  # it tells
    assert_stock(pipe, call, SHORT, whole)


@works(
    "Callbacks and guidance",
    "A guidance that calls the denoiser a third time, with layers skipped",
    "exact",
    "The three calls are told apart by what they are computed for and by what is hooked onto the denoiser.",
)
def test_a_third_call_of_a_guidance_is_not_the_first() -> None:
    pipe, call = build("hunyuan15")
    layers = LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    pipe.guider = SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=layers
    )
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(by_name(module, args, kwargs)), with_kwargs=True
    )
    pipe(tiny.PROMPT, generator=seeded(4), **call)
    handle.remove()
    assert len(calls) > 2 * 5  # it does call a third time
    assert_stock(pipe, call, SHORT)


# -- schedulers that draw noise


def stochastic_euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)


def sde(**changes: Any) -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **changes}
    return DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **flow)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "lcm": lambda: FlowMatchLCMScheduler(shift=3.0),
    "euler": stochastic_euler,
    "sde": sde,
}


def with_generator(pipe: Any, seed: int, call: dict[str, Any]) -> torch.Tensor:
    """The stock call with its generator handed to each step of the scheduler, as other pipelines do themselves."""
    generator = seeded(seed)
    pipe.scheduler.step = partial(type(pipe.scheduler).step, pipe.scheduler, generator=generator)
    try:
        return pipe(tiny.PROMPT, generator=generator, **call)[0]
    finally:
        del pipe.scheduler.step


@works(
    "Schedulers and steps",
    "Schedulers that draw noise at each step (`FlowMatchLCMScheduler`, stochastic sampling, `sde-dpmsolver++`)",
    "exact",
    "Steps draw from the candidate's own generator; `result.reproduce` is the line that gives the video again.",
)
@pytest.mark.parametrize(("name", "scheduler"), [(WAN, "lcm"), (WAN, "sde"), ("ltx", "euler")])
def test_schedulers_that_draw_noise(name: str, scheduler: str) -> None:
    pipe, call = build(name)
    pipe.scheduler = SCHEDULERS[scheduler]()
    judge, state = prism.Judge.untrained(pipe, tap=1, dim=16), torch.get_rng_state()
    for run, options in RUNS.items():
        for batch_size in (1, 2) if run == "early" else (1,):
            result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=batch_size, **options, **call)
            again = eval(result.reproduce, {**vars(prism), "pipe": pipe, "prompt": tiny.PROMPT, "call": call})
            assert again.seed == result.seed
            assert torch.equal(again.latents, with_generator(pipe, result.seed, call)), run
            if batch_size == 1:
                assert torch.equal(result.latents, again.latents), run
            torch.testing.assert_close(result.latents, again.latents, atol=5e-5, rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pipeline_that_gives_its_generator_is_left_alone() -> None:
    """CogVideoX hands its generator on itself: the plain call is the line that gives the video again."""
    pipe, call = build("cogvideox_dpm")
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, schedule=[(3, 1)], **call)
    again = eval(result.reproduce, {"torch": torch, "pipe": pipe, "prompt": tiny.PROMPT, "call": call})
    assert torch.equal(again.frames, result.latents)


class Jumpy(FlowMatchEulerDiscreteScheduler):
    """Draws from the global generator, and its step takes none."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        output = super().step(model_output, timestep, sample, return_dict=return_dict)
        return (output[0] + 0.01 * torch.randn_like(output[0]), *output[1:])


@works(
    "Schedulers and steps",
    "A scheduler whose steps draw from torch's global generator and take no generator",
    "refused",
    'Before any work, in a sentence; the strategies "none" and "random" run it as it is.',
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_noise_that_no_seed_gives_is_refused(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(scheduler: Any, num_inference_steps: int, device: Any, **kwargs: Any) -> None:
        FlowMatchEulerDiscreteScheduler.set_timesteps(scheduler, num_inference_steps, device, **kwargs)

    pipe, call = build(WAN)
    pipe.scheduler = Jumpy(shift=3.0)
    judge, state = prism.Judge.untrained(pipe, tap=1, dim=16), torch.get_rng_state()
    if dynamic:  # one that cannot be tried beforehand: its first step tells
        monkeypatch.setattr(Jumpy, "set_timesteps", picky)
    ran: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    for options in RUNS.values():
        ran.clear()
        with pytest.raises(PrismError, match="Jumpy in WanPipeline draw noise from torch's global generator"):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, **options, **call)
        assert len(ran) == (2 if dynamic else 0)
    handle.remove()
    if not dynamic:
        assert torch.equal(torch.get_rng_state(), state)
    result = prism.best_of_n(pipe, None, tiny.PROMPT, n=3, strategy="random", **call)
    assert result.reproduce == ""


def test_a_copied_scheduler_cannot_be_given_a_generator() -> None:
    pipe, call = build("skyreels_v2_df")
    pipe.scheduler = FlowMatchLCMScheduler(shift=3.0)
    with pytest.raises(PrismError, match="FlowMatchLCMScheduler in SkyReelsV2Diffusion"):
        prism.best_of_n(pipe, prism.Judge.untrained(pipe, tap=1, dim=16), tiny.PROMPT, n=3, **call)
