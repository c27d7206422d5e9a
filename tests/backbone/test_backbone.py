"""What the judge reads is what the sampler computes: tokens, conditioning, videos and the fingerprint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.zoo import VARIANTS

from prism.backbone import Backbone, Conditioning, layout
from prism.backbone.videos import denormalise
from prism.errors import PrismError

PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan-euler": (lambda: tiny.wan("euler"), tiny.CALL_WAN),
    "wan-unipc": (lambda: tiny.wan("unipc"), tiny.CALL_WAN),
    "cogvideox-ddim": (lambda: tiny.cogvideox("ddim"), tiny.CALL_COGVIDEOX),
}


@pytest.fixture(scope="module", params=PIPELINES)
def setting(request: pytest.FixtureRequest) -> tuple[Backbone, dict[str, Any]]:
    make, call = PIPELINES[request.param]
    return Backbone(make()), call


@pytest.fixture(scope="module")
def wan() -> Backbone:
    return Backbone(tiny.wan())


def noise_like(backbone: Backbone, call: dict[str, Any], n: int = 1) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(i) for i in range(n)]
    pipe, steps = backbone.pipe, {**call, "num_inference_steps": 1, "guidance_scale": 1.0}
    return pipe(prompt=[tiny.PROMPT] * n, generator=generator, output_type="latent", **steps).frames


@pytest.mark.parametrize("block", [1, 2, 3])
def test_tokens_are_those_of_the_stock_conditional_pass(setting: Any, block: int) -> None:
    """Tokens of latents at their step equal what a plain hook sees inside the pipeline's own call."""
    backbone, call = setting
    seen: list[tuple[torch.Tensor, Any, torch.Tensor]] = []  # states after the block, model timestep, latents
    latest: dict[str, Any] = {}

    def remember(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        latest.update(kwargs)

    def keep(_module: Any, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append((states, latest["timestep"], latest["hidden_states"]))

    handles = [
        backbone.denoiser.register_forward_pre_hook(remember, with_kwargs=True),
        backbone.blocks[block - 1].register_forward_hook(keep),
    ]
    try:
        backbone.pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(3), output_type="latent", **call)
    finally:
        for handle in handles:
            handle.remove()
    if backbone.family.cfg == "two_calls":
        seen = seen[::2]
    assert len(seen) == call["num_inference_steps"]
    conditioning = backbone.condition([tiny.PROMPT], **call)
    for states, timestep, latents in seen:
        tokens = backbone.tokens(latents[-1:], conditioning, timestep.flatten()[-1].float(), block)
        torch.testing.assert_close(tokens.visual, states[-1:], atol=2e-6, rtol=1e-5)


def test_stopping_early_changes_nothing_and_runs_less(setting: Any) -> None:
    backbone, call = setting
    conditioning = backbone.condition([tiny.PROMPT, tiny.OTHER_PROMPT], **call)
    latents = noise_like(backbone, call, 2)
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(backbone.blocks)]
    try:
        stopped = backbone.tokens(latents, conditioning, 700.0, 2)
        assert ran == [0, 1]
        whole = backbone.tokens(latents, conditioning, 700.0, 2, stop=False)
        assert ran == [0, 1, 0, 1, 2]
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(stopped.visual, whole.visual)
    assert not any(block._forward_hooks for block in backbone.blocks)


def test_each_row_has_its_own_level_and_prompt(setting: Any) -> None:
    backbone, call = setting
    conditioning = backbone.condition([tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT], **call)
    latents = noise_like(backbone, call).expand(3, -1, -1, -1, -1)
    together = backbone.tokens(latents, conditioning, torch.tensor([900.0, 900.0, 100.0]), 2)
    for row, t in enumerate((900.0, 900.0, 100.0)):
        alone = backbone.tokens(latents[:1], conditioning[row], t, 2)
        torch.testing.assert_close(together.visual[row], alone.visual[0], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(together.visual[0], together.visual[1], atol=1e-3)
    assert not torch.allclose(together.visual[0], together.visual[2], atol=1e-3)


def test_integer_clocks_get_whole_timesteps() -> None:
    backbone = Backbone(tiny.wan("unipc"))
    conditioning = backbone.condition([tiny.PROMPT], **tiny.CALL_WAN)
    latents = noise_like(backbone, tiny.CALL_WAN)
    assert conditioning.timestep.dtype == torch.int64
    timesteps = [conditioning.call(latents, torch.tensor([t]))["timestep"].item() for t in (0.0, 500.9, 1000.0)]
    assert timesteps == [0, 500, 999]


def test_text_tokens_and_their_padding(wan: Backbone) -> None:
    tokens = wan.tokens(
        noise_like(wan, tiny.CALL_WAN, 2), wan.condition([tiny.PROMPT, "a cat runs"], **tiny.CALL_WAN), 500.0, 1
    )
    assert tokens.text is not None
    assert tokens.text_mask is not None
    assert tokens.text.shape == (2, 12, wan.widths[0])
    assert tokens.text_mask.sum(1).tolist() == [6, 4]  # words and the end token
    assert tokens[1:].text_mask.sum(1).tolist() == [4]  # type: ignore[union-attr]
    embeds = wan.pipe.encode_prompt(tiny.PROMPT, do_classifier_free_guidance=False, max_sequence_length=12)[0]
    torch.testing.assert_close(tokens.text[0], wan.denoiser.condition_embedder.text_embedder(embeds)[0])


def test_a_prompt_is_encoded_once(wan: Backbone) -> None:
    backbone, rows = Backbone(wan.pipe), []
    handle = wan.pipe.text_encoder.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    try:
        first = backbone.condition([tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT], **tiny.CALL_WAN)
        again = backbone.condition([tiny.PROMPT], **{**tiny.CALL_WAN, "num_inference_steps": 3, "guidance_scale": 1.0})
    finally:
        handle.remove()
    assert rows == [2]
    assert len(first) == 3
    assert torch.equal(first.arguments["encoder_hidden_states"][2:], again.arguments["encoder_hidden_states"])


def test_conditioning_rows_and_cat(setting: Any) -> None:
    backbone, call = setting
    both = backbone.condition([tiny.PROMPT, tiny.OTHER_PROMPT], **call)
    swapped = Conditioning.cat([both[1], both[0]])
    latents = noise_like(backbone, call, 2)
    tokens = backbone.tokens(latents, both, 600.0, 2).visual
    torch.testing.assert_close(backbone.tokens(latents.flip(0), swapped, 600.0, 2).visual.flip(0), tokens)
    torch.testing.assert_close(backbone.tokens(latents.flip(0), both[[1, 0]], 600.0, 2).visual.flip(0), tokens)


def test_capture_leaves_no_trace(setting: Any) -> None:
    backbone, call = setting
    pipe = backbone.pipe
    pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    scheduler, own, rng = dict(vars(pipe.scheduler)), dict(vars(pipe)), torch.get_rng_state()
    Backbone(pipe).condition(["a cat runs"], **call)
    assert {name: id(value) for name, value in vars(pipe.scheduler).items()} == {n: id(v) for n, v in scheduler.items()}
    assert {name: id(value) for name, value in vars(pipe).items()} == {name: id(value) for name, value in own.items()}
    assert torch.equal(torch.get_rng_state(), rng)
    assert "_compiled_call_impl" not in vars(pipe.transformer)


def test_decode_is_the_pipeline_decode_and_encode_its_inverse(setting: Any) -> None:
    backbone, call = setting
    generator = torch.Generator().manual_seed(4)
    latents = backbone.pipe(tiny.PROMPT, generator=generator, output_type="latent", **call).frames
    video = backbone.pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(4), output_type="np", **call).frames
    decoded = backbone.decode(latents)
    assert torch.equal(decoded, torch.as_tensor(video))
    encoded = backbone.encode(decoded)
    assert encoded.shape == latents.shape
    vae, pixels = backbone.pipe.vae, decoded.permute(0, 4, 1, 2, 3) * 2 - 1
    mode = denormalise(backbone.family, backbone.pipe, layout.unpack(encoded, backbone.family.layout))
    expected = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(mode, expected, atol=1e-5, rtol=1e-5)


def test_widths_and_taps(wan: Backbone) -> None:
    assert (wan.widths, wan.num_blocks, wan.default_tap) == ([24, 24, 24], 3, 1)


def test_fingerprint_tells_weights_from_architecture(wan: Backbone, tmp_path: Any) -> None:
    found = wan.fingerprint()
    other, deeper = Backbone(tiny.wan(seed=1)).fingerprint(), Backbone(tiny.wan(num_layers=2)).fingerprint()
    assert {name for name in found if found[name] != other[name]} == {"weights"}
    assert {name for name in found if found[name] != deeper[name]} == {"denoiser_config", "weights", "needs"}
    wan.pipe.save_pretrained(tmp_path / "pipe")
    assert Backbone.from_pretrained(str(tmp_path / "pipe"), local_files_only=True).fingerprint() == found


def test_a_prompt_too_long_is_said_once(wan: Backbone) -> None:
    backbone, prompt = Backbone(wan.pipe), " ".join(["red"] * 30)
    with pytest.warns(UserWarning, match="has 31 tokens and the pipeline takes 12; it is cut off"):
        backbone.condition([prompt], **tiny.CALL_WAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.condition([prompt], **{**tiny.CALL_WAN, "num_frames": 5})


@pytest.mark.parametrize(("variant", "limit"), [("latte", 120), ("easyanimate", 256)])
def test_a_limit_that_the_call_does_not_name_is_known(variant: str, limit: int) -> None:
    """The pipeline cuts the prompt off there: what follows does not reach the denoiser."""
    pipe, call = VARIANTS[variant]()
    backbone = Backbone(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.condition([" ".join(["red"] * (limit // 2))], **call)
    prompts = [" ".join(["red"] * 2 * limit + [last]) for last in ("circle", "square")]
    with pytest.warns(UserWarning, match=f"and the pipeline takes {limit}; it is cut off there. Shorten it\\."):
        one, other = (backbone.condition([prompt], **call) for prompt in prompts)
    assert isinstance(one, Conditioning)
    assert isinstance(other, Conditioning)
    name = backbone.family.text_argument
    assert torch.equal(one.arguments[name], other.arguments[name])


def test_bad_calls_get_one_sentence(wan: Backbone, tmp_path: Any) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([""], {}, "The prompt is empty"),
        (["  \n"], {}, "The prompt is empty"),
        ([tiny.PROMPT], {"wobble": 1}, "takes no argument 'wobble'"),
        (tiny.PROMPT, {}, "must be a list of texts"),
        ([tiny.PROMPT], {"height": 31}, "WanPipeline refused the call"),
    ]
    for prompts, extra, sentence in cases:
        with pytest.raises(PrismError, match=sentence):
            wan.condition(prompts, **{**tiny.CALL_WAN, **extra})
    for folder in (str(tmp_path / "nothing"), "/nothing", "./nothing"):
        with pytest.raises(PrismError, match=r"There is no folder .*nothing, and an id on the Hub is of the form"):
            Backbone.from_pretrained(folder, local_files_only=True)
    with pytest.raises(PrismError, match="must be a whole number from 1 to 3"):
        wan.tokens(noise_like(wan, tiny.CALL_WAN), wan.condition([tiny.PROMPT], **tiny.CALL_WAN), 500.0, 4)


@pytest.mark.parametrize("size", [None, "x", (1, 2), (1, 0, 2), 0, True, [1.5, 2, 2]])
def test_a_patch_size_that_is_none_is_told(size: Any) -> None:
    pipe = tiny.wan()
    family = Backbone(pipe).family
    pipe.transformer.register_to_config(patch_size=size)
    with pytest.raises(PrismError, match=r"patch_size must be a whole number from 1, or three of them; found"):
        family.patches(pipe.transformer.config)


@pytest.mark.parametrize("t", [True, torch.tensor(True), np.bool_(False)])
def test_a_noise_level_is_a_number(t: Any) -> None:
    with pytest.raises(PrismError, match="The noise level t must be from 0"):
        Backbone(tiny.wan()).add_noise(torch.zeros(1, 16, 3, 4, 4), t, torch.zeros(1, 16, 3, 4, 4))


def test_tokens_carry_gradients_on_demand_alone(setting: Any) -> None:
    backbone, call = setting
    conditioning = backbone.condition([tiny.PROMPT], **call)
    latents = noise_like(backbone, call).requires_grad_()
    plain = backbone.tokens(latents, conditioning, 700.0, 2)
    assert not plain.visual.requires_grad
    tokens = backbone.tokens(latents, conditioning, 700.0, 2, grad=True)
    torch.testing.assert_close(tokens.visual.detach(), plain.visual, atol=2e-6, rtol=1e-5)
    towards = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    slope = (torch.autograd.grad(tokens.visual.double().square().mean(), latents)[0] * towards).sum()
    with torch.no_grad():
        step = 1e-2
        ends = [
            backbone.tokens(latents + sign * step * towards, conditioning, 700.0, 2).visual.double().square().mean()
            for sign in (1, -1)
        ]
    assert float(slope) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=0.05, abs=1e-5)
