"""The steps of a run are those that its scheduler makes, whatever was asked for, and are known before any is made."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.machinery import seeded
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.backbone import FAMILIES, Backbone
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling import expected_rows
from prism.sampling.plan import default, resolve

SIGMAS = [1.0, 0.9, 0.8, 0.6, 0.3]
HEUN = diffusers.FlowMatchHeunDiscreteScheduler
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DDPM: dict[str, Any] = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


class Counter:
    """Rows of the denoisers that ran, and calls of the text encoders."""

    def __init__(self, pipe: Any) -> None:
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self.rows, self.texts, self.pipe = 0, 0, pipe
        for name, part in parts.items():
            if name.startswith(("transformer", "unet")):
                part.register_forward_pre_hook(self.denoise, with_kwargs=True)
            if name.startswith("text_encoder"):
                part.register_forward_pre_hook(self.encode)

    def denoise(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.rows += len(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)))

    def encode(self, *_: Any) -> None:
        self.texts += 1


def build(name: str, scheduler: Any = None, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A variant of the zoo with another scheduler and call; what is None is left out of the call."""
    pipe, call = VARIANTS[name]()
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {**call, **changes, "output_type": "latent"}
    return pipe, {name: value for name, value in call.items() if value is not None}


def prompt_of(pipe: Any) -> str | None:
    return tiny.PROMPT if Backbone(pipe).family.takes_prompts else None


def plain(pipe: Any, call: dict[str, Any], seed: int) -> torch.Tensor:
    prompt = {} if prompt_of(pipe) is None else {"prompt": tiny.PROMPT}
    return pipe(**prompt, generator=seeded(seed), **call)[0]


def assert_run(pipe: Any, call: dict[str, Any], steps: int, **options: Any) -> Any:
    """The run makes `steps` steps, costs what the closed form says, and its winner is the plain call's."""
    judge = Judge.untrained(pipe, dim=16)
    backbone, n = judge.backbone, 3
    result = prism.best_of_n(pipe, judge, prompt_of(pipe), n=n, batch_size=1, **options, **call)
    told = backbone.steps({**call, **backbone.batch([tiny.PROMPT], [0], call)})
    assert len(told) == steps
    strategy, drafts = options.get("strategy", "early"), options.get("draft_steps", 0)
    cuts = options.get("schedule") or default(steps)
    drafted = None
    if drafts:
        changed = {**call, "num_inference_steps": drafts}
        drafted = backbone.steps({**changed, **backbone.batch([tiny.PROMPT], [0], call)})
    rows = expected_rows(
        strategy, n, steps, backbone.family.cfg, backbone.guided(call), judge.tap / backbone.num_blocks,
        resolve(cuts, n, steps) if strategy == "early" else None,
        calls=told.calls, draft_calls=None if drafted is None else drafted.calls,
    )  # fmt: skip
    assert result.ledger.denoiser_rows == pytest.approx(rows)
    if hasattr(pipe, "guider"):  # a plain call starts where the one before stopped
        pipe.guider.set_state(None, None, None)
    assert torch.equal(result.video, plain(pipe, call, result.seed)[0])
    return result


@works(
    "Schedulers and steps",
    "one's own `sigmas` or `timesteps`, without `num_inference_steps`",
    "exact",
    "The scheduler is asked how many steps it makes before any cut is resolved.",
)
@pytest.mark.parametrize(
    ("variant", "changes", "steps"),
    [
        ("hunyuan", {"sigmas": SIGMAS}, 5),
        ("qwen_image", {"sigmas": SIGMAS}, 5),
        ("flux", {"sigmas": np.array(SIGMAS)}, 5),
        ("svd", {"sigmas": [100.0, 20.0, 5.0, 1.0, 0.1]}, 4),  # its scheduler's last sigma is the end
        ("sana_video_i2v", {"sigmas": SIGMAS}, 5),
    ],
)
def test_sigmas_say_the_steps(variant: str, changes: dict[str, Any], steps: int) -> None:
    pipe, call = build(variant, num_inference_steps=None, **changes)
    for schedule in (None, [(2, 2), (steps, 1)]):
        result = assert_run(pipe, call, steps, schedule=schedule)
        assert result.scores[0]["step"] == (max(1, round(0.2 * steps)) if schedule is None else 2)
    with pytest.raises(PrismError, match=f"cuts at step {steps + 1}, and the run has steps 1 to {steps}"):
        prism.best_of_n(pipe, Judge.untrained(pipe, dim=16), prompt_of(pipe), schedule=[(steps + 1, 1)], **call)


@works(
    "Schedulers and steps",
    "a second-order scheduler (Heun, KDPM2) or PNDM, which makes more steps than are asked for",
    "exact",
    "Cuts, costs and drafts count the scheduler's own steps.",
)
@pytest.mark.parametrize(
    ("variant", "scheduler", "steps"),
    [
        ("wan21_t2v_euler", lambda: HEUN(shift=3.0), 11),
        ("cogvideox_ddim", lambda: diffusers.HeunDiscreteScheduler(**DDPM), 11),
        ("latte", lambda: diffusers.KDPM2DiscreteScheduler(**DDPM), 11),
        ("latte", lambda: diffusers.PNDMScheduler(beta_schedule="linear"), 15),
        ("cogvideox_ddim", lambda: diffusers.PNDMScheduler(beta_schedule="linear", skip_prk_steps=True), 7),
    ],
)
def test_schedulers_that_add_steps(variant: str, scheduler: Any, steps: int) -> None:
    pipe, call = build(variant, scheduler())
    result = assert_run(pipe, call, steps, schedule=[(2, 2), (7, 1)])
    assert [cut["step"] for cut in result.scores] == [2, 7]
    assert assert_run(pipe, call, steps, strategy="full").scores[0]["step"] == steps
    if steps != 15:  # with Runge-Kutta steps PNDM takes no fewer than four
        assert_run(pipe, call, steps, strategy="draft", draft_steps=3)


@works(
    "Callbacks and guidance",
    "costs of a guider that guides some of the steps",
    "works",
    "Counted step by step, beforehand as in the ledger.",
)
def test_costs_follow_a_guider() -> None:
    pipe, call = build("hunyuan15")
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.3, stop=0.9)
    for options in ({"schedule": [(1, 2), (4, 1)]}, {"strategy": "full"}, {"strategy": "draft", "draft_steps": 3}):
        assert_run(pipe, call, 6, **options)
    backbone = Backbone(pipe)
    assert backbone.steps({**call, **backbone.batch([tiny.PROMPT], [0], call)}).calls == (1, 2, 2, 2, 2, 1)
    assert backbone.guided(call)


@pytest.mark.filterwarnings("ignore:All 2 candidates have the same score at step 6:UserWarning")  # the oracle's
def test_asking_encodes_no_text_anew_and_runs_no_denoiser() -> None:
    pipe, call = build("wan21_t2v_unipc")
    judge, counter = Judge.untrained(pipe, dim=16), Counter(pipe)
    for seed in (0, 10):
        counter.texts = 0
        for schedule in ([(3, 1)], [(9, 1)]):
            counter.rows = 0
            if schedule == [(9, 1)]:
                with pytest.raises(PrismError, match="cuts at step 9, and the run has steps 1 to 6"):
                    prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, seed=seed, schedule=schedule, **call)
                assert counter.rows == 0
            else:
                ledger = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, seed=seed, schedule=schedule, **call).ledger
                assert counter.texts == ledger.text_encodings == 2  # the prompt and the empty one
    for strategy in ("full", "oracle", "none"):
        counter.texts = 0
        oracle = {"oracle": lambda video, prompt: 0.0} if strategy == "oracle" else {}
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, strategy=strategy, **oracle, **call)
        assert counter.texts == 2


def video_to_video() -> tuple[Any, dict[str, Any]]:
    """WanVideoToVideoPipeline, which PRISM has no row for, with a row of one's own."""
    pipe, call = build("wan21_t2v_unipc")
    other = diffusers.WanVideoToVideoPipeline(**{k: v for k, v in pipe.components.items() if "_2" not in k})
    other.set_progress_bar_config(disable=True)
    other.family = replace(FAMILIES["wan"], name="wan-v2v", pipelines=("WanVideoToVideoPipeline",), image_form="single")
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    call = {name: value for name, value in call.items() if name != "num_frames"}
    return other, {**call, "video": [frame] * 9}


@works(
    "Schedulers and steps",
    "`strength` of a video-to-video pipeline",
    "exact",
    "A cut counts the steps that are left, and one behind the last of them is refused before any work.",
)
def test_strength_leaves_fewer_steps() -> None:
    pipe, call = video_to_video()
    call |= {"strength": 0.5}
    result = assert_run(pipe, call, 3, schedule=[(2, 1)])
    assert result.scores[0]["t"] < 900
    assert_run(pipe, call, 3, strategy="full")
    counter = Counter(pipe)
    with pytest.raises(PrismError, match="cuts at step 4, and the run has steps 1 to 3"):
        prism.best_of_n(pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=3, schedule=[(4, 1)], **call)
    with pytest.raises(PrismError, match="WanVideoToVideoPipeline refused the call"):
        prism.best_of_n(
            pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=3, schedule=[(1, 1)], **{**call, "strength": 0.1}
        )
    assert counter.rows == 0


@works(
    "Schedulers and steps",
    "a cut at a step of the other denoiser (Wan 2.2 A14B)",
    "refused",
    "Before any candidate is sampled, with the steps that can be cut at; the default cut is at one of them.",
)
def test_cuts_lie_on_the_denoiser_that_is_read() -> None:
    pipe, call = build("wan22_a14b_t2v")
    high, low = (Judge.untrained(Backbone(pipe, name), dim=16) for name in ("transformer", "transformer_2"))
    counter = Counter(pipe)
    for judge, schedule, possible in ((high, [(2, 2), (5, 1)], "1 to 3"), (low, [(2, 1)], "4 to 6")):
        with pytest.raises(PrismError, match=f"reads, {judge.backbone.reads!r}; cut at steps {possible}"):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, schedule=schedule, **call)
    assert counter.rows == 0
    for judge, step in ((high, 1), (low, 4)):
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, **call)
        assert result.scores[0]["step"] == step
        assert torch.equal(result.video, plain(pipe, call, result.seed)[0])
    several = prism.best_of_n(pipe, high, tiny.PROMPT, n=3, schedule=[(2, 2)], **call)
    assert [cut["step"] for cut in several.scores] == [2, 3]  # the last cut is the last that can be read
    with pytest.raises(PrismError, match="runs none of this call's steps"):
        prism.best_of_n(pipe, low, tiny.PROMPT, n=3, **{**call, "num_inference_steps": 1})


@works(
    "Schedulers and steps",
    "a scheduler of another form than the model's (DDIM on a flow model, flow matching on CogVideoX)",
    "refused",
    "`early` before any work, as its noise levels cannot be told; strategies that judge finished latents run.",
)
@pytest.mark.parametrize(
    ("variant", "scheduler"),
    [
        ("wan21_t2v_unipc", lambda: diffusers.DDIMScheduler()),
        ("wan21_t2v_unipc", lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")),
        ("ltx", lambda: diffusers.EulerDiscreteScheduler()),
        ("cogvideox_ddim", lambda: diffusers.FlowMatchEulerDiscreteScheduler()),
        ("cogvideox_ddim", lambda: diffusers.DPMSolverMultistepScheduler(**FLOW)),
        ("svd", lambda: diffusers.EulerDiscreteScheduler()),
    ],
)
def test_schedulers_of_another_form(variant: str, scheduler: Any) -> None:
    pipe, call = build(variant, scheduler())
    judge, counter = Judge.untrained(pipe, dim=16), Counter(pipe)
    name = re.escape(type(pipe.scheduler).__name__)
    with pytest.raises(PrismError, match=f"noise levels of this {name} cannot be told .* which takes ") as error:
        prism.best_of_n(pipe, judge, prompt_of(pipe), n=2, schedule=[(2, 1)], **call)
    assert (counter.rows, counter.texts) == (0, 0)
    assert len(str(error.value)) < 500


@works(
    "Schedulers and steps",
    "another scheduler of the model's form (DPM++, UniPC, Euler, LMS)",
    "exact",
    "The level of a cut is the scheduler's own.",
)
@pytest.mark.parametrize(
    ("variant", "scheduler"),
    [
        ("wan21_t2v_euler", lambda: diffusers.DPMSolverMultistepScheduler(**FLOW)),
        ("wan21_t2v_euler", lambda: diffusers.DPMSolverSinglestepScheduler(**FLOW, lower_order_final=True)),
        ("wan21_t2v_euler", lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=2000)),
        ("latte", lambda: diffusers.EulerDiscreteScheduler(**DDPM)),
        ("cogvideox_ddim", lambda: diffusers.DDIMScheduler(num_train_timesteps=2000, **DDPM)),
    ],
)
def test_schedulers_of_the_same_form(variant: str, scheduler: Any) -> None:
    pipe, call = build(variant, scheduler())
    result = assert_run(pipe, call, 6, schedule=[(3, 1)])
    steps = next(iter(Backbone(pipe).steps({**call, "prompt": tiny.PROMPT, "generator": seeded(0)}).timesteps[2:]))
    assert result.scores[0]["t"] == pytest.approx(1000 * steps / pipe.scheduler.config.num_train_timesteps, abs=1e-3)


def test_whole_timesteps_reach_to_the_schedulers_end() -> None:
    """Of 2000 timesteps the last is 1999."""
    pipe, call = build("cogvideox_ddim", diffusers.DDIMScheduler(num_train_timesteps=2000, **DDPM))
    backbone, times = Backbone(pipe), []
    conditioning = backbone.condition([tiny.PROMPT], **call)
    pipe.transformer.register_forward_pre_hook(lambda _m, _a, kw: times.append(kw["timestep"]), with_kwargs=True)
    for t in (1000.0, 750.0, 0.0):
        backbone.tokens(torch.zeros(1, *conditioning.shape), conditioning, t, 1)
    assert [int(time) for time in times] == [1999, 1500, 0]
