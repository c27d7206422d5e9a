"""Mistakes get one sentence, and on every way out the pipeline is as it was."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.errors import PrismError


def traces(pipe: Any) -> dict[str, Any]:
    """Everything a run could leave behind: attributes and hooks of the pipeline's parts, by identity."""
    found: dict[str, Any] = {}
    parts = {"pipe": pipe, **{name: part for name, part in pipe.components.items() if part is not None}}
    for name, part in parts.items():
        modules = dict(part.named_modules()) if isinstance(part, torch.nn.Module) else {"": part}
        for path, module in modules.items():
            for attribute, value in vars(module).items():
                sized = isinstance(value, dict) and attribute.startswith("_") and "hooks" in attribute
                found[f"{name}.{path}.{attribute}"] = len(value) if sized else id(value)
    # The VAE of Wan renews its own scratch at each decode.
    scratch = ("vae.._feat_map", "vae.._conv_idx", "vae.._enc_feat_map", "vae.._enc_conv_idx")
    return {key: value for key, value in found.items() if key not in scratch}


def assert_as_before(setting: Setting, before: dict[str, Any]) -> None:
    assert traces(setting.pipe) == before
    video = setting.pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), **setting.call).frames[0]
    assert np.array_equal(video, setting.stock(0)[0])


class Explosion(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Explosion])
@pytest.mark.parametrize("where", ["head", "denoiser in the search", "denoiser in the finish", "vae", "text encoder"])
def test_an_interrupted_run_leaves_the_pipeline_as_it_was(setting: Setting, where: str, error: type) -> None:
    judge = setting.judge(2)
    setting.stock(0)
    before = traces(setting.pipe)
    left = {"denoiser in the search": 2, "denoiser in the finish": 6}.get(where, 1)

    def explode(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error

    pipe = setting.pipe
    module = {"head": judge.head, "vae": pipe.vae.decoder, "text encoder": pipe.text_encoder}.get(
        where, pipe.transformer
    )
    handle = module.register_forward_pre_hook(explode)
    try:
        with pytest.raises(error):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, schedule=[(3, 1)], **setting.call)
    finally:
        handle.remove()
    assert left == 0
    assert "score_tokens" not in vars(judge)
    assert_as_before(setting, before)


@pytest.mark.parametrize("strategy", ["none", "full", "early", "draft"])
def test_a_finished_run_leaves_the_pipeline_as_it_was(setting: Setting, strategy: str) -> None:
    judge = setting.judge(2)
    setting.stock(0)
    before, rng = traces(setting.pipe), torch.get_rng_state()
    prism.best_of_n(setting.pipe, judge, tiny.PROMPT, n=2, strategy=strategy, **setting.call)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_as_before(setting, before)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt": ""}, "The prompt is empty"),
    "blank prompt": ({"prompt": " \t"}, "The prompt is empty"),
    "no text": ({"prompt": None}, "The prompt is empty"),
    "one of several is empty": ({"prompt": ["a cat", ""]}, "The prompt is empty"),
    "no prompts": ({"prompt": []}, "prompt is an empty list"),
    "a negative prompt too few": ({"prompt": ["a cat"] * 3, "negative_prompt": ["a", "b"]}, "2 entries for 3 prompts"),
    "top of too many": ({"top_k": 4}, "top_k is 4, and there are 3 candidates"),
    "top of none": ({"top_k": 0}, "top_k must be a whole number"),
    "cuts below the top": ({"top_k": 2, "schedule": "3:1"}, "keeps 1 candidates at step 3, and top_k asks for 2"),
    "distributes what": ({"distribute": "steps"}, 'shares out "candidates" or "prompts"'),
    "n = 0": ({"n": 0}, "n must be a whole number from 1 to 10,000; found 0"),
    "n below zero": ({"n": -2}, "n must be a whole number"),
    "n no number": ({"n": 2.5}, "n must be a whole number"),
    "no seeds": ({"n": None, "seeds": []}, "seeds must hold one seed per candidate"),
    "too few seeds": ({"seeds": [1, 2]}, "found 2 for n = 3"),
    "seed below zero": ({"seed": -1}, "A seed must be a whole number from 0"),
    "seed no number": ({"seed": "1"}, "A seed must be a whole number from 0"),
    "unknown strategy": ({"strategy": "best"}, 'There is no strategy "best"'),
    "keeps too many": ({"schedule": [(2, 4)]}, "keeps 4 candidates at step 2, and only 3 are left"),
    "cuts after the end": ({"schedule": [(7, 1)]}, "cuts at step 7, and the run has steps 1 to 6"),
    "cuts out of order": ({"schedule": [(4, 2), (3, 1)]}, "cuts at step 3 after step 4"),
    "keeps none": ({"schedule": "3:0"}, "keeps 0 candidates"),
    "no schedule": ({"schedule": "soon"}, "is not a list of STEP:KEEP"),
    "schedule of another strategy": ({"strategy": "full", "schedule": "3:1"}, 'belongs to the strategy "early"'),
    "generator": ({"generator": torch.Generator()}, "'generator' is reserved"),
    "latents": ({"latents": torch.zeros(1)}, "'latents' is reserved"),
    "num_videos_per_prompt": ({"num_videos_per_prompt": 2}, "'num_videos_per_prompt' is reserved"),
    "unknown argument": ({"num_step": 3}, "takes no argument 'num_step'"),
    "argument the pipeline refuses": ({"height": 31}, "WanPipeline refused the call"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
    "no batch": ({"batch_size": 0}, "batch_size must be a whole number"),
    "no draws": ({"num_draws": 0}, "num_draws must be a whole number"),
    "unknown dimension": ({"select_by": "beauty"}, "no dimension 'beauty' to select by"),
    "no weights": ({"select_by": {"VQ": 0.0}}, "gives no dimension a weight"),
    "judge_at clean": ({"strategy": "full", "judge_at": 0}, "judge_at must be a number above 0, at most 1,000"),
    "judge_at beyond noise": ({"strategy": "draft", "judge_at": 1001}, "judge_at must be a number"),
    "long draft": ({"strategy": "draft", "draft_steps": 7}, "longer than the run of 6"),
    "no draft": ({"strategy": "draft", "draft_steps": 0}, "draft_steps must be a whole number"),
    "no judge": ({"judge": None}, "needs a judge"),
    "no oracle": ({"strategy": "oracle"}, "needs `oracle`"),
    # Values of other kinds.
    "prompt a dict": ({"prompt": {"prompt": "a cat"}}, "prompt must be a text or a list of texts; found {'prompt'"),
    "prompt bytes": ({"prompt": b"a cat"}, "prompt must be a text or a list of texts"),
    "prompt a number": ({"prompt": 3}, "prompt must be a text or a list of texts; found 3"),
    "prompts with a number": ({"prompt": ["a cat", 3]}, "found 3 in it"),
    "prompt no text": ({"prompt": "a cat \ud800"}, "holds characters that are no text"),
    "judge a number": ({"judge": 3}, "judge is 3 of type int, which scores nothing"),
    "judge a folder": ({"judge": "no/such/folder"}, "no/such/folder"),
    "judge a module": ({"judge": torch.nn.Linear(1, 1)}, "of type Linear, which scores nothing"),
    "judge a class": ({"judge": prism.Judge}, "which scores nothing"),
    "strategy a list": ({"strategy": ["full"]}, "There is no strategy"),
    "n text": ({"n": "3"}, "n must be a whole number"),
    "n true": ({"n": True}, "n must be a whole number"),
    "n too many": ({"n": 10**9}, "n must be a whole number from 1 to 10,000"),
    "seeds a number": ({"n": None, "seeds": 3}, "seeds must be a list of whole numbers; found 3"),
    "seeds text": ({"n": None, "seeds": "123"}, "seeds must be a list of whole numbers"),
    "seeds floats": ({"seeds": np.arange(3.0)}, "A seed must be a whole number"),
    "seeds true": ({"seeds": [True, 1, 2]}, "A seed must be a whole number"),
    "seed below": ({"seeds": [1, 2, -3]}, r"A seed must be a whole number from 0 to 2\*\*63 - 1; found -3"),
    "seed beyond": ({"seed": 2**63 - 2}, r"A seed must be a whole number from 0 to 2\*\*63 - 1; found 92"),
    "top_k true": ({"top_k": True}, "top_k must be a whole number"),
    "draws a float": ({"num_draws": 2.0}, "num_draws must be a whole number"),
    "draws too many": ({"num_draws": 10**6}, "num_draws must be a whole number from 1 to 1,000"),
    "schedule a number": ({"schedule": 3}, "schedule"),
    "schedule of floats": ({"schedule": [(2.5, 1)]}, "pair of whole numbers"),
    "schedule flat": ({"schedule": [3, 1]}, "pair of whole numbers"),
    "schedule nested": ({"schedule": [[(3, 1)]]}, "pair of whole numbers"),
    "schedule of texts": ({"schedule": ["3:1"]}, "pair of whole numbers"),
    "select_by a list": ({"select_by": ["VQ", "MQ"]}, "select_by must be a dimension, or weights"),
    "select_by a number": ({"select_by": 3}, "select_by must be a dimension, or weights"),
    "select_by NaN": ({"select_by": {"VQ": float("nan")}}, "weight of VQ must be a finite number; found nan"),
    "select_by infinite": ({"select_by": {"VQ": float("inf")}}, "weight of VQ must be a finite number"),
    "select_by text": ({"select_by": {"VQ": "1"}}, "weight of VQ must be a finite number"),
    "judge_at NaN": ({"strategy": "full", "judge_at": float("nan")}, "judge_at must be a number"),
    "judge_at text": ({"strategy": "full", "judge_at": "700"}, "judge_at must be a number"),
    "keep_latents text": ({"keep_latents": "yes"}, "keep_latents must be True or False; found yes"),
    "progress a number": ({"progress": 2}, "progress must be True or False"),
    "distribute a list": ({"distribute": ["prompts"]}, "distribute shares out"),
    "oracle no function": (
        {"strategy": "oracle", "oracle": 0.5},
        "oracle must be a function of a video",
    ),
    "oracle of a video": ({"strategy": "oracle", "oracle": lambda video: 1.0}, "called as oracle"),
    "guidance NaN": ({"guidance_scale": float("nan")}, "guidance_scale must be a number from -100 to 1000; found nan"),
    "guidance text": ({"guidance_scale": "5"}, "guidance_scale must be a number"),
    "steps a float": ({"num_inference_steps": 6.0}, "num_inference_steps must be a whole number from 1 to 10,000"),
    "steps too many": ({"num_inference_steps": 10**9}, "num_inference_steps must be a whole number from 1 to 10,000"),
    "no height": ({"height": 0}, "height must be a whole number from 1 to 16,384; found 0"),
    "frames below zero": ({"num_frames": -1}, "num_frames must be a whole number from 1 to 10,000; found -1"),
    "videos a prompt": ({"num_videos_per_prompt": "1"}, "num_videos_per_prompt must be a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_get_one_sentence(wan: Setting, name: str) -> None:
    arguments, sentence = BAD[name]
    before = traces(wan.pipe)
    arguments = {"judge": wan.judge(2), "prompt": tiny.PROMPT, "n": 3, **wan.call, **arguments}
    with pytest.raises(PrismError, match=sentence) as caught:
        prism.best_of_n(wan.pipe, **arguments)
    assert re.fullmatch(".{1,500}", str(caught.value))
    assert traces(wan.pipe).keys() - before.keys() <= {"transformer.._diffusers_hook"}  # the pipeline's own


def test_a_judge_on_another_pipeline(wan: Setting) -> None:
    with pytest.raises(PrismError, match="The judge was put onto another pipeline"):
        prism.best_of_n(tiny.wan("unipc"), wan.judge(), tiny.PROMPT, n=2, **wan.call)


def test_a_judge_that_reads_no_hidden_states(wan: Setting) -> None:
    """It scores latents, so it can pick among drafts and finished candidates; on the way there is nothing to read."""
    inner = wan.judge()
    judge = SimpleNamespace(backbone=inner.backbone, dimensions=inner.dimensions, score_clean=inner.score_clean)
    call = {**wan.call, "output_type": "latent"}
    ours = prism.best_of_n(wan.pipe, inner, tiny.PROMPT, n=3, strategy="draft", **call)
    theirs = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=3, strategy="draft", **call)
    assert theirs.scores == ours.scores
    assert torch.equal(theirs.latents, ours.latents)
    with pytest.raises(PrismError, match="reads none; use full or draft"):
        prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=3, **call)


def test_dead_rows_may_be_nan(wan: Setting) -> None:
    """What becomes of a dropped candidate's latents is nobody's business."""
    judge = wan.judge(3)
    arguments: dict[str, Any] = {"n": 3, "schedule": [(2, 2), (5, 1)], "batch_size": 3}
    plain = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, **arguments, **wan.call)
    (dead,) = set(range(3)) - set(plain.scores[0]["kept"])
    step = type(wan.pipe.scheduler).step

    def spoiled(self: Any, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        (out,) = step(self, model_output, timestep, sample, **kwargs)
        out = out.clone()
        if len(out) == 3 and self.step_index >= 2:
            out[dead] = torch.nan
        return (out,)

    wan.pipe.scheduler.step = spoiled.__get__(wan.pipe.scheduler)
    try:
        result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, **arguments, **wan.call)
    finally:
        del wan.pipe.scheduler.step
    torch.testing.assert_close(result.latents, plain.latents, rtol=0, atol=1e-5)  # past a patch, called alone


def test_the_users_callback_sees_the_winner_s_run(wan: Setting) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def watch(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tensors["latents"].clone()))
        return tensors

    result = prism.best_of_n(
        wan.pipe,
        wan.judge(2),
        tiny.PROMPT,
        n=3,
        schedule=[(4, 1)],
        batch_size=1,
        callback_on_step_end=watch,
        **wan.call,
    )
    assert [step for step, _ in seen] == list(range(6))
    for (_, found), (expected, _) in zip(seen, wan.stock(result.seed)[2]):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_callback_that_changes_latents_is_honoured(wan: Setting, in_place: bool) -> None:
    """The finished video is still what a plain call with this callback gives."""

    def push(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return tensors
        return {"latents": tensors["latents"].mul_(0.9) if in_place else tensors["latents"] * 0.9}

    call = {**wan.call, "callback_on_step_end": push}
    result = prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=2, schedule=[(5, 1)], batch_size=1, **call)
    generator = torch.Generator("cpu").manual_seed(result.seed)
    plain = wan.pipe(tiny.PROMPT, generator=generator, **{**call, "output_type": "latent"}).frames
    assert torch.equal(result.latents, plain)
    assert not torch.equal(plain, wan.stock(result.seed)[1])


def test_select_by_another_dimension_and_weights(wan: Setting) -> None:
    judge = wan.judge(2)
    for select_by in ("VQ", {"VQ": 1.0, "MQ": -2.0}):
        result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=4, schedule=[(2, 1)], select_by=select_by, **wan.call)
        scores = result.scores[0]["scores"]
        weights = {select_by: 1.0} if isinstance(select_by, str) else select_by
        total = [sum(weight * scores[name][i] for name, weight in weights.items()) for i in range(4)]
        assert result.index == max(range(4), key=total.__getitem__)


def test_seeds_and_the_random_strategy(wan: Setting) -> None:
    call = {**wan.call, "output_type": "latent", "num_inference_steps": 1}
    given = prism.best_of_n(wan.pipe, None, tiny.PROMPT, strategy="none", seeds=[7, 3], **call)
    assert (given.seed, given.seeds, given.index) == (7, (7, 3), 0)
    drawn = [prism.best_of_n(wan.pipe, None, tiny.PROMPT, strategy="random", seed=s, **call).index for s in range(6)]
    again = [prism.best_of_n(wan.pipe, None, tiny.PROMPT, strategy="random", seed=s, **call).index for s in range(6)]
    assert drawn == again
    assert len(set(drawn)) > 1
    assert all(0 <= index < 8 for index in drawn)


@works("Offload and memory", "Memory that runs out in a search", "warned", "Half the candidates go in a batch")
@pytest.mark.parametrize(
    "shortage",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError("Unable to allocate"),
    ],
    ids=["cuda", "cpu", "numpy"],
)
def test_where_memory_runs_out_batches_get_smaller(wan: Setting, shortage: Exception) -> None:
    """A denoiser that has room for two rows: the same winner, a warning for each halving, nothing left behind."""
    judge, arguments = wan.judge(2), {"n": 4, "schedule": [(2, 2), (4, 1)], **wan.call}
    expected = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, batch_size=1, **arguments)

    def full(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > room:
            raise shortage

    room = 2
    handle = wan.pipe.transformer.register_forward_pre_hook(full, with_kwargs=True)
    try:
        with pytest.warns(UserWarning, match="with 4 candidates per batch while sampling; going on with 2"):
            found = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, batch_size=4, **arguments)
        room = 0
        with (
            pytest.warns(UserWarning, match="going on with 1"),
            pytest.raises(PrismError, match="ran out with a single candidate"),
        ):
            prism.best_of_n(wan.pipe, judge, tiny.PROMPT, batch_size=2, **arguments)
    finally:
        handle.remove()
    assert found.seed == expected.seed
    assert len(found.scores) == 2
    np.testing.assert_allclose(found.video, expected.video, atol=1e-5)


# -- what breaks inside the pipeline, and what the caller's own functions raise


def broken(pipe: Any, judge: Any, **options: Any) -> str:
    """The sentence of a search in which the pipeline breaks."""
    with pytest.raises(PrismError) as caught:
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **options)
    assert caught.value.__cause__ is not None
    return str(caught.value)


@works("Inputs and outputs", "A pipeline that itself breaks on the way", "refused", "The step and its words are told")
@pytest.mark.parametrize("strategy", ["early", "full", "none"])
def test_a_pipeline_that_breaks_on_the_way_is_quoted(strategy: str) -> None:
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    schedule = {"schedule": [(5, 1)]} if strategy == "early" else {}
    plain = pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), **tiny.CALL_WAN, output_type="np").frames
    torch.set_default_dtype(torch.float64)  # which breaks UniPC's second order in the stock call as well
    try:
        with pytest.raises(RuntimeError, match="same dtype"):
            pipe(tiny.PROMPT, **tiny.CALL_WAN)
        told = broken(pipe, judge, strategy=strategy, **schedule, **tiny.CALL_WAN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert re.match("WanPipeline broke at step 3: RuntimeError: .*same dtype", told)
    again = pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), **tiny.CALL_WAN, output_type="np").frames
    np.testing.assert_array_equal(again, plain)


def test_an_empty_cause_is_told_by_its_kind() -> None:
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    pipe.scheduler = diffusers.HeliosScheduler()
    assert broken(pipe, judge, **tiny.CALL_WAN).startswith("WanPipeline refused the call: KeyError: None")


def test_a_scheduler_that_takes_other_arguments_is_named() -> None:
    pipe, call = VARIANTS["latte"]()
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    told = broken(pipe, judge, strategy="full", **call)
    assert told.startswith("CogVideoXDPMScheduler and LattePipeline do not go together (TypeError: missing a required")
    pipe.scheduler = diffusers.ScoreSdeVeScheduler()
    with pytest.raises(PrismError, match=r"lacks the member 'scheduler\.step'"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, strategy="full", **call)


class Mine(Exception):
    """A caller's own kind of exception."""


@works(
    "Callbacks and guidance", "An oracle, callback or hook that raises", "works", "Its own exception; all is put back"
)
@pytest.mark.parametrize("place", ["oracle", "callback", "hook"])
@pytest.mark.parametrize("error", [Mine("x"), ValueError("x"), IndexError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_what_the_callers_functions_raise_passes_as_it_is(wan: Setting, place: str, error: BaseException) -> None:
    calls: list[int] = []

    def fail(*_: Any) -> Any:
        calls.append(1)
        if place != "hook" or len(calls) > 3:  # on the way: what fails before is the call's
            raise error

    arguments: dict[str, Any] = {"n": 2, "strategy": "full", **wan.call}
    video, _, _ = wan.stock(1)
    before = traces(wan.pipe)
    if place == "oracle":
        arguments |= {"strategy": "oracle", "oracle": fail}
    elif place == "callback":
        arguments["callback_on_step_end"] = fail
    handle = wan.pipe.transformer.register_forward_pre_hook(fail) if place == "hook" else None
    try:
        with pytest.raises(type(error)) as caught:
            prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, **arguments)
    finally:
        if handle is not None:
            handle.remove()
    assert caught.value is error
    assert_as_before(wan, before)
    in_thread: list[Any] = []  # which would wait for ever for a lock that was kept
    generator = torch.Generator("cpu").manual_seed(1)
    thread = threading.Thread(
        target=lambda: in_thread.append(
            prism.best_of_n(wan.pipe, None, tiny.PROMPT, seeds=[1], strategy="none", **wan.call).video
        ),
        daemon=True,
    )
    thread.start()
    thread.join(60)
    np.testing.assert_array_equal(in_thread[0], video)
    np.testing.assert_array_equal(wan.pipe(tiny.PROMPT, generator=generator, **wan.call).frames[0], video)
