"""The Open-Sora adapter: the published sampling loop to the bit, and what the matrix does not ask of a backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.zoo.opensora import TinySTDiT3, opensora
from torch import Tensor

import prism
from prism.backbone import Backbone
from prism.backbone.opensora import frames_of, timestep_ratio
from prism.errors import PrismError
from prism.judge import Judge
from prism.lab.pixel import PixelJudge, PixelNetwork


@pytest.fixture(scope="module")
def setting() -> tuple[Backbone, dict[str, Any]]:
    pipe, call = opensora()
    return Backbone(pipe), call


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def published(
    pipe: Any, prompts: list[str], z: Tensor, call: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The final latents and the timesteps, by the formulas of Open-Sora 1.2 with its timestep transform.

    t_i = 1 - i / steps becomes r t / (1 + (r - 1) t), r = sqrt(h w / 512^2) sqrt(5 (frames // 17)), without the second
    root for an image; v = v_null + s (v_text - v_null); z <- z + v (t_i - t_(i+1)); texts come first, then null texts
    with the masks of the texts.
    """
    n, steps, frames = len(prompts), call["num_inference_steps"], call["num_frames"]
    row = lambda value: torch.tensor([value] * n, dtype=dtype)  # noqa: E731
    height, width, count = row(call["height"]), row(call["width"]), row(frames)
    ids = pipe.tokenizer(prompts, max_length=12, padding="max_length", truncation=True, return_tensors="pt")
    text = pipe.text_encoder(**{name: ids[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    y = torch.cat([text[:, None], pipe.transformer.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]])
    r = (height * width / (512 * 512)).sqrt() * (count if frames == 1 else count // 17 * 5).sqrt()
    times = []
    for i in range(steps):
        t = torch.tensor([(1 - i / steps) * 1000] * n) / 1000
        times.append(r * t / (1 + (r - 1) * t) * 1000)
    told = {"mask": ids.attention_mask.repeat(2, 1), "fps": row(120 if frames == 1 else call["fps"]).repeat(2)}
    for i, t in enumerate(times):
        pred = pipe.transformer(torch.cat([z, z]), torch.cat([t, t]), y, height=height, width=width, **told)
        text_pred, null_pred = pred.chunk(2, dim=1)[0].chunk(2)
        v = null_pred + call["guidance_scale"] * (text_pred - null_pred)
        dt = (t - times[i + 1] if i + 1 < steps else t) / 1000
        z = z + v * dt[:, None, None, None, None]
    return z, times


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.float32, {"num_frames": 51, "width": 40, "num_inference_steps": 5}),
        (torch.float32, {"num_frames": 1}),
        (torch.bfloat16, {"height": 40}),  # the ratio is rounded to the model's dtype
    ],
)
@torch.no_grad()
def test_the_loop_is_the_published_one_to_the_bit(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    pipe, call = opensora()
    call |= changes
    pipe.transformer.to(dtype)
    prompts, seen = ["a cat runs", tiny.PROMPT], []  # of different lengths: a null text has its prompt's mask
    shape = (4, *pipe.vae.get_latent_size((call["num_frames"], call["height"], call["width"])))
    z = torch.stack([torch.randn(shape, generator=seeded(row), dtype=dtype) for row in range(2)])
    expected, times = published(pipe, prompts, z, call, dtype)
    handle = pipe.transformer.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    try:
        found = pipe(prompts, generator=[seeded(0), seeded(1)], output_type="latent", **call).frames
    finally:
        handle.remove()
    assert torch.equal(torch.stack(seen), torch.stack(times).repeat(1, 2))
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("tap", "keep"), [(1, 1), (3, 2)])  # read by a probe, and by listening
def test_scores_at_a_cut_are_those_of_the_conditional_rows(setting: Any, tap: int, keep: int) -> None:
    backbone, call = setting
    judge = Judge.untrained(backbone, tap=tap, dim=16)
    result = prism.best_of_n(backbone.pipe, judge, tiny.PROMPT, n=3, schedule=[(2, keep), (3, 1)], **call)
    cut, times = result.scores[0], []
    for place, seed in enumerate(result.seeds):
        seen: list[tuple[Tensor, Tensor]] = []
        handle = backbone.denoiser.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[:2]))
        try:
            backbone.pipe(tiny.PROMPT, generator=seeded(seed), output_type="latent", **call)
        finally:
            handle.remove()
        latents, timestep = seen[1]
        times.append(float(timestep[0]))
        expected = judge.score(latents[:1], [tiny.PROMPT], times[-1], **call)[0]
        found = torch.tensor([cut["scores"][name][place] for name in judge.dimensions])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert times == pytest.approx([cut["t"]] * 3)


def test_the_conditional_rows_are_kept_where_guidance_cannot_be_turned_off(setting: Any) -> None:
    backbone, call = setting
    pipe, _ = opensora()
    pipe.family = replace(pipe.family, guidance="none")  # the capture meets both groups
    prompts = [tiny.PROMPT, "a cat runs"]
    found, expected = (each.condition(prompts, **call) for each in (Backbone(pipe), backbone))
    assert torch.equal(found.arguments["y"], expected.arguments["y"])
    assert torch.equal(found.arguments["mask"], expected.arguments["mask"])


def test_rounding_above_pure_noise_is_pure_noise(setting: Any) -> None:
    """r / (1 + (r - 1)) may round to a little more than 1."""
    backbone = setting[0]
    family, pipe = backbone.family, backbone.pipe
    over = 0
    for height in range(16, 512, 8):
        pipe.scheduler.set_timesteps(2, timestep_ratio(height, 48, 17, torch.empty(0)))
        first = float(pipe.scheduler.timesteps[0])
        over += first > 1000
        assert family.t_of(pipe.scheduler, first) == pytest.approx(min(first, 1000.0))
        assert family.t_of(pipe.scheduler, first) <= 1000
    assert over


def test_latents_that_patches_do_not_cover(setting: Any) -> None:
    """Of 240 x 426 the published VAE makes 30 x 53 cells, which the denoiser pads to whole tokens."""
    backbone, call = setting
    call = {**call, "width": 56}
    latents = torch.randn(1, 4, 5, 4, 7)
    tokens = backbone.tokens(latents, backbone.condition([tiny.PROMPT], **call), 500.0, 1)
    assert (tokens.grid, tokens.visual.shape[1]) == ((5, 2, 4), 40)


def test_text_and_its_padding(setting: Any) -> None:
    backbone, call = setting
    conditioning = backbone.condition([tiny.PROMPT, "a cat runs"], **call)
    tokens = backbone.tokens(torch.randn(2, 4, 5, 4, 6), conditioning, 500.0, 1)
    assert tokens.text is not None
    assert tokens.text_mask is not None
    assert tokens.text.shape == (2, 12, 24)
    assert tokens.text_mask.sum(1).tolist() == [6, 4]
    judge = PixelJudge(backbone, PixelNetwork(tiny.TEXT_WIDTH, 1), ["overall"])
    assert judge.text([tiny.PROMPT], **call)[0].shape == (1, 12, tiny.TEXT_WIDTH)


def test_a_video_is_encoded_the_same_each_time(setting: Any) -> None:
    """The published VAE draws from its posterior with the global generator."""
    backbone, state = setting[0], torch.get_rng_state()
    video = torch.rand(1, 17, 32, 48, 3, generator=seeded())
    assert torch.equal(backbone.encode(video), backbone.encode(video))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("frames", [1, 17, 34, 51, 102])
def test_frames_of_latents(setting: Any, frames: int) -> None:
    assert frames_of(setting[0].pipe.vae.get_latent_size((frames, 32, 48))[0]) == frames


def test_bad_calls_get_one_sentence(setting: Any) -> None:
    backbone, call = setting
    for changes, sentence in (
        ({"num_frames": 9}, "num_frames must be 1 or at least 17; found 9"),
        ({"max_sequence_length": 20}, "max_sequence_length must be at most 12 for this model; found 20"),
        ({"negative_prompt": "bad"}, "OpenSoraPipeline takes no argument 'negative_prompt'"),
    ):
        with pytest.raises(PrismError, match=sentence):
            backbone.condition([tiny.PROMPT], **{**call, **changes})


def test_another_model_of_the_same_class_is_told_apart(setting: Any) -> None:
    found = setting[0].fingerprint()
    pipe, _ = opensora()
    assert Backbone(pipe).fingerprint() == found
    pipe.transformer = TinySTDiT3(depth=2)
    other = Backbone(pipe).fingerprint()
    assert {name for name in found if found[name] != other[name]} == {"denoiser_config", "weights", "needs"}
