"""What pipelines are given beside a prompt: images, videos, negative prompts; and which arguments are refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import ImageOps
from tests import tiny
from tests.works import works
from tests.zoo import VARIANTS
from tests.zoo.wan_to_kandinsky import _image

import prism
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.judge import Judge


def build(variant: str, without: str = "", **changes: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = VARIANTS[variant]()
    return pipe, {name: value for name, value in {**call, **changes}.items() if name != without}


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize(
    ("variant", "changes", "sentence"),
    [
        ("skyreels_v2_df", {"ar_step": 2}, "ar_step = 2 is not supported: frames would be denoised one after another"),
        ("skyreels_v2_df", {"overlap_history": 5, "base_num_frames": 5}, "overlap_history = 5 .* several windows"),
        ("skyreels_v2_df_i2v", {"addnoise_condition": 20}, "addnoise_condition = 20 .* global generator"),
        ("skyreels_v2_df", {"causal_block_size": 2}, "causal_block_size = 2 .* Leave it at None"),
        ("easyanimate_inpaint", {"strength": 0.5}, "strength = 0.5 .* global generator"),
        ("ltx_condition", {"denoise_strength": 0.5}, "denoise_strength = 0.5 .* Leave it at 1.0"),
    ],
)
def test_an_argument_that_a_judge_cannot_follow_is_refused(variant: str, changes: Any, sentence: str) -> None:
    pipe, call = build(variant, **changes)
    judge = Judge.untrained(Backbone(pipe), dim=16)
    with pytest.raises(PrismError, match=sentence):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **call)
    with pytest.raises(PrismError, match=sentence):
        judge.backbone.condition([tiny.PROMPT], **call)


def test_a_condition_beside_the_video_or_at_a_noise_level_of_its_own_is_refused() -> None:
    image = _image(32, 64)
    pipe, call = build("ltx_condition", "image", conditions=[LTXVideoCondition(image=image, frame_index=8)])
    backbone = Backbone(pipe)
    with pytest.raises(PrismError, match="give conditions at frame_index 0"):
        prism.best_of_n(pipe, Judge.untrained(backbone, dim=16), tiny.PROMPT, n=2, **call)
    call["conditions"] = [LTXVideoCondition(image=image, strength=0.5)]
    with pytest.raises(PrismError, match="give conditions in full strength"):
        backbone.condition([tiny.PROMPT], **call)


def test_a_last_image_is_shown_to_the_denoiser_where_it_stands() -> None:
    """SkyReels-V2 diffusion forcing carries a further latent frame for it: tokens are those inside the stock call."""
    image = _image(32, 48)
    pipe, call = build("skyreels_v2_df_i2v", last_image=ImageOps.invert(image))
    backbone, seen, taken = Backbone(pipe), [], []
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda _m, _a, k: taken.append(k), with_kwargs=True),
        backbone.blocks[0].register_forward_hook(lambda _m, _a, output: seen.append(output)),
    ]
    try:
        pipe(prompt=tiny.PROMPT, generator=generator(0), output_type="latent", **call)
    finally:
        for hook in hooks:
            hook.remove()
    conditioning = backbone.condition([tiny.PROMPT], **call)
    assert conditioning.given.flatten(3).any(3).flatten().tolist() == [True, False, False, True]
    for arguments, states in zip(taken[::2], seen[::2]):
        latents = backbone.denoiser_call(arguments).noisy.clone()
        latents[:, :, [0, -1]] = 7  # whatever stands there
        tokens = backbone.tokens(latents, conditioning, float(arguments["timestep"].max()), 1)
        assert tokens.grid == (4, 2, 3)
        assert torch.equal(tokens.visual, states)


@pytest.mark.parametrize("variant", ["cosmos1_v2w", "cosmos2", "cosmos25_image"])
def test_a_video_is_given_to_each_candidate(variant: str) -> None:
    pipe, call = build(variant, "image", video=[_image(32, 48)] * 5)
    judge = Judge.untrained(Backbone(pipe), dim=16)
    found = prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, batch_size=2, strategy="full", output_type="latent", **call)
    alone = pipe(prompt=tiny.PROMPT, generator=generator(found.seed), output_type="latent", **call)[0][0]
    torch.testing.assert_close(found.video, alone, atol=1e-4, rtol=1e-4)
    assert judge.backbone.condition([tiny.PROMPT, tiny.OTHER_PROMPT], **call).given.flatten(3).any(3)[0].any()


@pytest.mark.parametrize("variant", ["hunyuan_true_cfg", "hunyuan_i2v_true_cfg"])
def test_a_negative_prompt_may_stand_in_a_list(variant: str) -> None:
    pipe, call = build(variant, negative_prompt=["still"])
    judge = Judge.untrained(Backbone(pipe), dim=16)
    assert judge.backbone.guided(call)
    found = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=3, strategy="full", **call, output_type="latent")
    alone = pipe(prompt=tiny.PROMPT, generator=generator(found.seed), output_type="latent", **call)[0][0]
    torch.testing.assert_close(found.video, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["full", "draft"])
def test_latents_that_lose_a_frame_on_their_way_out_are_judged_whole(strategy: str) -> None:
    pipe, call = build("hunyuan_i2v_concat", output_type="np")
    judge = Judge.untrained(Backbone(pipe), dim=16)
    found = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, strategy=strategy, **call)
    video = pipe(prompt=tiny.PROMPT, generator=generator(found.seed), **call)[0][0]
    assert np.array_equal(found.video, video)
    assert found.latents.shape == (1, 4, 3, 4, 6)
    np.testing.assert_allclose(judge.backbone.decode(found.latents)[0].numpy(), video, atol=1e-5)


def negative_of(pipe: Any, variant: str, call: dict[str, Any]) -> dict[str, Any]:
    """A negative prompt as embeddings of one row, with what stands beside them, from the pipeline's own encoder."""
    names = {
        "sd3": ("_", "negative_prompt_embeds", "_", "negative_pooled_prompt_embeds"),
        "ltx": ("_", "_", "negative_prompt_embeds", "negative_prompt_attention_mask"),
        "sana_video": ("_", "_", "negative_prompt_embeds", "negative_prompt_attention_mask"),
        "hunyuan_true_cfg": (
            "negative_prompt_embeds",
            "negative_pooled_prompt_embeds",
            "negative_prompt_attention_mask",
        ),
        "qwen_image": ("negative_prompt_embeds", "negative_prompt_embeds_mask"),
        "hunyuan15": (
            *("negative_prompt_embeds", "negative_prompt_embeds_mask"),
            *("negative_prompt_embeds_2", "negative_prompt_embeds_mask_2"),
        ),
        "kandinsky5_t2v": (
            *("negative_prompt_embeds_qwen", "negative_prompt_embeds_clip", "negative_prompt_cu_seqlens"),
        ),
    }[variant]
    options: dict[str, Any] = {"sd3": {"prompt_2": None, "prompt_3": None}}.get(variant, {})
    if variant in ("ltx", "sd3"):
        options |= {"negative_prompt": "still", "max_sequence_length": call["max_sequence_length"]}
    with torch.no_grad():
        found = pipe.encode_prompt(prompt="still", **options)
    return {name: value for name, value in zip(names, found) if name != "_"}


@works(
    "Embeddings and encoders",
    "negative_prompt_embeds with masks and pooled vectors, or negative prompts in a list of one",
    "to rounding",
    "What a pipeline does not repeat for a batch is repeated.",
)
@pytest.mark.parametrize("variant", ["sd3", "ltx", "hunyuan_true_cfg", "qwen_image", "hunyuan15", "kandinsky5_t2v"])
def test_what_stands_beside_a_negative_prompt_is_repeated_for_a_batch(variant: str) -> None:
    pipe, call = build(variant, "negative_prompt")
    call |= {**negative_of(pipe, variant, call), "output_type": "latent"}
    if variant == "qwen_image":
        call["true_cfg_scale"] = 4.0
    found = prism.best_of_n(pipe, None, tiny.PROMPT, n=1, strategy="none", **call)
    backbone = Backbone(pipe)
    batch = backbone.batch([tiny.PROMPT] * 3, [0, 1, 2], call)
    many = pipe(**{**call, **batch})[0]
    if variant != "kandinsky5_t2v":  # whose texts depend on those beside them
        torch.testing.assert_close(many[:1], found.video[None], atol=1e-4, rtol=1e-4)
    judge = Judge.untrained(backbone, dim=16)
    best = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=3, strategy="early", **call)
    alone = pipe(prompt=tiny.PROMPT, generator=generator(best.seed), **call)[0][0]
    torch.testing.assert_close(best.video, alone, atol=1e-4, rtol=1e-4)
    wrong = {name: torch.cat([value, value]) for name, value in call.items() if name == "negative_prompt_embeds"}
    if wrong:
        with pytest.raises(PrismError, match="negative_prompt_embeds holds 2 rows for a prompt's candidates; give one"):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=3, **{**call, **wrong})


@pytest.mark.parametrize("variant", ["sd3", "flux"])
def test_a_second_prompt_is_repeated_for_a_batch(variant: str) -> None:
    pipe, call = build(variant, prompt_2=tiny.OTHER_PROMPT, output_type="latent")
    judge = Judge.untrained(pipe, dim=16)
    best = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=3, **call)
    alone = pipe(prompt=tiny.PROMPT, generator=generator(best.seed), **call)[0][0]
    torch.testing.assert_close(best.video, alone, atol=1e-4, rtol=1e-4)


@works(
    "Inputs and outputs",
    "an image whose latents the pipeline samples by the seed",
    "exact",
    "Each candidate is read with its own condition; outside a search `seeds` names it.",
)
@pytest.mark.parametrize("variant", ["ltx_i2v", "svd"])
def test_finished_latents_are_judged_with_their_own_condition(variant: str) -> None:
    """All were read with seed 0's."""
    pipe, call = build(variant, output_type="latent")
    judge = Judge.untrained(pipe, dim=16)
    prompt = tiny.PROMPT if judge.backbone.family.takes_prompts else None
    run = {"n": 2, "seed": 5, "strategy": "full", "batch_size": 2, "keep_latents": True}
    found = prism.best_of_n(pipe, judge, prompt, **run, **call)
    (cut,) = found.scores
    latents = torch.stack([found.candidate_latents[0], found.candidate_latents[1]])
    draws = {"num_draws": 2, **call}
    seed = random.Random("judge 5").randrange(2**62)
    own, _ = judge.score_clean(latents, [prompt or ""] * 2, cut["t"], generator=generator(seed), seeds=[5, 6], **draws)
    other, _ = judge.score_clean(latents, [prompt or ""] * 2, cut["t"], generator=generator(seed), **draws)
    overall = next(iter(judge.dimensions))
    assert cut["scores"][overall] == pytest.approx(own[:, 0].tolist(), abs=1e-5)
    assert cut["scores"][overall] != pytest.approx(other[:, 0].tolist(), abs=1e-5)
    with pytest.raises(PrismError, match="seeds must hold one seed per prompt; found 1 for 2"):
        judge.backbone.condition([prompt or ""] * 2, seeds=[5], **call)


def test_frames_that_a_loop_carries_beside_the_videos_are_dropped() -> None:
    pipe, call = build("skyreels_v2_df_i2v", last_image=ImageOps.invert(_image(32, 48)), output_type="np")
    found = prism.best_of_n(pipe, None, tiny.PROMPT, n=1, strategy="none", **call)
    backbone = Backbone(pipe)
    assert found.latents.shape[2] == 4
    video = backbone.decode(found.latents, num_frames=9)[0]
    np.testing.assert_allclose(video.numpy(), found.video, atol=1e-5)
    assert len(backbone.decode(found.latents)[0]) == 13
