"""What people adapt, switch and replace on a pipeline: the winner is its plain call's, or a sentence says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from tests import tiny
from tests.machinery import few, seeded
from tests.works import works
from tests.zoo import VARIANTS, wan_to_kandinsky
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import prism
from prism.backbone.denoiser_call import by_name
from prism.errors import PrismError

WAN = "wan21_t2v_unipc"
EARLY: dict[str, Any] = {"schedule": [(2, 2), (3, 1)]}
RUNS: dict[str, dict[str, Any]] = {
    "early": EARLY,
    "full": {"strategy": "full", "num_draws": 1},
    "draft": {"strategy": "draft", "draft_steps": 2, "num_draws": 1},
    "none": {"strategy": "none"},
}


def build(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = VARIANTS[name]()
    return pipe, {**call, "num_inference_steps": 4, "output_type": "latent", **changes}


def assert_stock(pipe: Any, call: dict[str, Any], runs: Any = ("early", "full"), **options: Any) -> None:
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    for name in runs:
        run = {"n": few(name), "seed": 4, "batch_size": 1, **RUNS[name], **options}
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, **run, **call)
        plain = pipe(tiny.PROMPT, generator=seeded(result.seed), **call)[0]
        assert torch.equal(torch.as_tensor(result.video), torch.as_tensor(plain[0])), name


# -- IP-Adapters


def flux_adapter(pipe: Any) -> None:
    model, config = pipe.transformer, pipe.transformer.config
    torch.manual_seed(3)
    width, told = config.num_attention_heads * config.attention_head_dim, config.joint_attention_dim
    own = {n: p for n, p in model.attn_processors.items() if not n.startswith("transformer_blocks")}
    new = {
        n: FluxIPAdapterAttnProcessor(width, told, num_tokens=(4,), scale=[0.7])
        for n in model.attn_processors.keys() - own.keys()
    }
    model.set_attn_processor({**own, **new})
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(16, told, num_image_text_embeds=4)])


def sd3_adapter(pipe: Any) -> None:
    model, config = pipe.transformer, pipe.transformer.config
    torch.manual_seed(3)
    width, head = config.num_attention_heads * config.attention_head_dim, config.attention_head_dim
    kind = SD3IPAdapterJointAttnProcessor2_0
    model.set_attn_processor({n: kind(width, width, head, timesteps_emb_dim=width) for n in model.attn_processors})
    model.image_proj = IPAdapterTimeImageProjection(16, width, width, 1, 8, 2, num_queries=4, timestep_in_dim=width)


def with_encoder(pipe: Any) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    encoder = CLIPVisionModelWithProjection(config).eval()
    pipe.register_modules(image_encoder=encoder, feature_extractor=wan_to_kandinsky._clip_processor())


PICTURE = Image.new("RGB", (32, 32), (200, 30, 90))
SHOWN = torch.randn(1, 5, 16, generator=seeded(1))
IP: dict[str, tuple[str, Callable[[Any], None], dict[str, Any]]] = {
    "flux, embeddings": (
        "flux",
        flux_adapter,
        {
            "ip_adapter_image_embeds": [SHOWN[:, :1]],
            "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 16)],
            "true_cfg_scale": 3.0,
            "negative_prompt": "a",
        },
    ),
    "flux, a picture": ("flux", flux_adapter, {"ip_adapter_image": PICTURE}),
    "sd3, embeddings": (
        "sd3",
        sd3_adapter,
        {"ip_adapter_image_embeds": torch.cat([torch.zeros(1, 5, 16), SHOWN]), "guidance_scale": 4.0},
    ),
    "sd3, a picture": ("sd3", sd3_adapter, {"ip_adapter_image": PICTURE, "guidance_scale": 4.0}),
}


@works(
    "Adapters and training",
    "IP-Adapters (`ip_adapter_image`, `ip_adapter_image_embeds`) on Flux and Stable Diffusion 3",
    "exact",
    "Pipelines repeat their pictures for no batch, so candidates are sampled one by one; scores are of the pictures.",
)
@pytest.mark.parametrize("name", IP)
def test_ip_adapters(name: str) -> None:
    variant, adapt, told = IP[name]
    pipe, call = build(variant, **told)
    adapt(pipe)
    if "picture" in name:
        with_encoder(pipe)
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    seen: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(copy.deepcopy(by_name(module, args, kwargs))), with_kwargs=True
    )
    plain = {seed: pipe(tiny.PROMPT, generator=seeded(seed), **call)[0] for seed in (4, 5, 6)}
    handle.remove()
    for run, options in RUNS.items():  # in the default batches
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, seed=4, **options, **call)
        assert torch.equal(result.latents, plain[result.seed]), run
    latents = torch.cat([plain[4], plain[5]])
    texts = [tiny.PROMPT, tiny.OTHER_PROMPT]
    together = judge.score(latents, texts, 700.0, **call)
    alone = [judge.score(latents[row : row + 1], texts[row], 700.0, **call) for row in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)
    # The stock call's own conditional row, put together by hand: the second of two in one batch, or a call of its own.
    first, embeds = seen[0], "ip_adapter_image_embeds"
    hidden = first["joint_attention_kwargs"][embeds]
    row = slice(-1, None)
    if variant == "sd3":
        first |= {n: v[row] for n, v in first.items() if isinstance(v, torch.Tensor) and v.ndim and len(v) == 2}
        first["joint_attention_kwargs"] = {embeds: hidden[row]}
    level = first["timestep"].float() * (1000.0 if variant == "flux" else 1.0)
    with torch.no_grad():
        by_hand = judge.score_tokens(judge.backbone.read(first, 1, stop=True)[0])
    scored = judge.score(first["hidden_states"], tiny.PROMPT, level.item(), **call)
    torch.testing.assert_close(scored, by_hand, atol=1e-6, rtol=1e-5)


# -- a denoiser that is replaced


def wider(pipe: Any) -> None:
    config = {**tiny.wan().transformer.config, "num_attention_heads": 4}
    pipe.transformer = type(pipe.transformer).from_config(config).eval()


REPLACED: dict[str, Callable[[Any], None]] = {
    "wider": wider,
    "deeper": lambda pipe: setattr(pipe, "transformer", tiny.wan(num_layers=5).transformer),
    "of another family": lambda pipe: setattr(pipe, "transformer", tiny.cogvideox().transformer),
    "taken off": lambda pipe: setattr(pipe, "transformer", None),
}


@works(
    "Adapters and training",
    "A denoiser that is replaced by one of other blocks, or taken off, after a judge was put onto the pipeline",
    "refused",
    "Before any work; one of the same blocks (another finetune) takes its place and is read from then on.",
)
@pytest.mark.parametrize("how", REPLACED)
def test_a_replaced_denoiser_is_named_before_any_work(how: str) -> None:
    pipe, call = build(WAN)
    judge, ran = prism.Judge.untrained(pipe, tap=1, dim=16), []
    REPLACED[how](pipe)
    for part in (pipe.transformer, pipe.text_encoder):
        if part is not None:
            part.register_forward_pre_hook(lambda *_: ran.append(1))
    sentence = "transformer was " + ("taken off, found None" if how == "taken off" else "replaced: the judge was put")
    for options in RUNS.values():
        with pytest.raises(PrismError, match=sentence):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, **options, **call)
    with pytest.raises(PrismError, match=sentence):
        judge.score(torch.zeros(1, 16, 3, 4, 6), tiny.PROMPT, 700.0, **call)
    assert not ran


def test_a_finetune_in_the_denoisers_place_is_read() -> None:
    pipe, call = build(WAN)
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    latents = pipe(tiny.PROMPT, generator=seeded(4), **call)[0]
    before = judge.score(latents, tiny.PROMPT, 700.0, **call)
    pipe.transformer = tiny.wan(seed=5).transformer
    assert_stock(pipe, call)
    fresh = prism.Judge(prism.backbone.Backbone(pipe), judge.members)
    assert torch.equal(
        judge.score(latents, tiny.PROMPT, 700.0, **call), fresh.score(latents, tiny.PROMPT, 700.0, **call)
    )
    assert not torch.equal(fresh.score(latents, tiny.PROMPT, 700.0, **call), before)


# -- what holds


def two_adapters(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, name)
    pipe.set_adapters(["one", "two"], [0.4, 0.9])


@works(
    "Adapters and training",
    'Two LoRAs at once (`set_adapters`), and their scale by the call (`attention_kwargs={"scale": 0.3}`)',
    "exact",
    "The call's scale holds for the judge's own passes too, and is off again after them.",
)
@pytest.mark.parametrize(
    ("name", "argument"),
    [(WAN, "attention_kwargs"), ("cogvideox_ddim", "attention_kwargs"), ("flux", "joint_attention_kwargs")],
)
def test_a_scale_that_the_call_gives_the_adapters(name: str, argument: str) -> None:
    pipe, call = build(name)
    two_adapters(pipe)
    scales = [copy.deepcopy(m.scaling) for m in pipe.transformer.modules() if hasattr(m, "merged_adapters")]
    with_scale = {**call, argument: {"scale": 0.3}}
    assert_stock(pipe, with_scale, RUNS)
    judge, latents = prism.Judge.untrained(pipe, tap=1, dim=16), pipe(tiny.PROMPT, generator=seeded(4), **call)[0]
    found = [judge.score(latents, tiny.PROMPT, 700.0, **each) for each in (call, with_scale)]
    assert not torch.equal(*found)
    left = [m.scaling for m in pipe.transformer.modules() if hasattr(m, "merged_adapters")]
    assert left == [pytest.approx(each) for each in scales]  # diffusers multiplies and divides
    rows = [
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, **EARLY, **each).ledger.denoiser_rows
        for each in (call, with_scale)
    ]
    assert rows[0] == rows[1]  # and nothing is computed twice for it


@works(
    "Adapters and training",
    "A LoRA that is hot-swapped (`load_lora_weights(hotswap=True)`), between calls or by a callback",
    "exact",
    "Weights are looked at where each run begins and at the end of each step of one with a callback.",
)
def test_a_hot_swapped_adapter() -> None:
    peft = pytest.importorskip("peft")

    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = tiny.wan().transformer
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        return {f"transformer.{n}": v.clone() for n, v in peft.get_peft_model_state_dict(model).items()}

    pipe, call = build(WAN)
    first, second = weights(1), weights(2)

    def swap(pipe: Any, given: dict[str, torch.Tensor]) -> None:
        pipe.load_lora_weights(dict(given), adapter_name="own", hotswap=True)

    def callback(pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            swap(pipe, second)
        return {}

    pipe.load_lora_weights(dict(first), adapter_name="own")
    judge, found = prism.Judge.untrained(pipe, tap=1, dim=16), []
    for given in (first, second):
        swap(pipe, given)
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, seed=4, batch_size=1, **EARLY, **call)
        assert torch.equal(result.latents, pipe(tiny.PROMPT, generator=seeded(result.seed), **call)[0])
        found.append(result.scores[0]["scores"]["overall"])
    assert found[0] != found[1]
    call["callback_on_step_end"] = callback
    swap(pipe, first)
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, seed=4, batch_size=1, **EARLY, **call)
    swap(pipe, first)
    assert torch.equal(result.latents, pipe(tiny.PROMPT, generator=seeded(result.seed), **call)[0])


CHANGES: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "fuse_qkv_projections": (WAN, lambda pipe: pipe.transformer.fuse_qkv_projections(), {}),
    "pipe.fuse_qkv_projections": ("cogvideox_ddim", lambda pipe: pipe.fuse_qkv_projections(), {}),
    "set_attention_backend": (WAN, lambda pipe: pipe.transformer.set_attention_backend("_native_math"), {}),
    "enable_attention_slicing": (WAN, lambda pipe: pipe.enable_attention_slicing(), {}),
    "vae tiling and slicing": (
        WAN,
        lambda pipe: (pipe.vae.enable_tiling(), pipe.vae.enable_slicing()),
        {"output_type": "pt"},
    ),
    "skip_guidance_layers": ("sd3", lambda pipe: None, {"skip_guidance_layers": [0], "guidance_scale": 4.0}),
    "guidance_rescale": ("ltx", lambda pipe: None, {"guidance_rescale": 0.7, "guidance_scale": 4.0}),
}


@works(
    "Caches and patches",
    "`fuse_qkv_projections`, attention backends and slicing, VAE tiling, `skip_guidance_layers`, `guidance_rescale`",
    "exact",
    "They are the pipeline's own, and the plain call's winner is found with them.",
)
@pytest.mark.parametrize("change", CHANGES)
def test_settings_of_the_pipeline(change: str) -> None:
    name, make, told = CHANGES[change]
    pipe, call = build(name, **told)
    with attention_backend("native"):  # which `set_attention_backend` would change for every other model, too
        make(pipe)
        assert_stock(pipe, call)


@works(
    "Callbacks and guidance",
    "A callback that ends the run (`pipe._interrupt = True`) or puts another scheduler in",
    "exact",
    "Candidates are judged without it, the winner is finished with it as in a plain call.",
)
@pytest.mark.parametrize("how", ["interrupt", "scheduler"])
def test_callbacks_that_end_the_run_or_swap_its_scheduler(how: str) -> None:
    def callback(pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and how == "interrupt":
            pipe._interrupt = True
        elif step == 1:
            old = pipe.scheduler
            pipe.scheduler = type(old).from_config(old.config, solver_order=1)
            pipe.scheduler.set_timesteps(4)
            pipe.scheduler._step_index = old._step_index
        return {}

    pipe, call = build(WAN)
    whole = pipe(tiny.PROMPT, generator=seeded(4), **call)[0]
    call["callback_on_step_end"] = callback
    assert not torch.equal(pipe(tiny.PROMPT, generator=seeded(4), **call)[0], whole)
    assert_stock(pipe, call)


@works(
    "Precision and quantisation",
    "`torch.autocast` around the search and the plain call",
    "exact",
    "The judge's own passes run in it too.",
)
@pytest.mark.parametrize("name", [WAN, "cogvideox_ddim"])
def test_inside_autocast(name: str) -> None:
    pipe, call = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert_stock(pipe, call, RUNS)


@works(
    "Callbacks and guidance",
    "Guiders that skip or smooth layers, adapt or project (`AutoGuidance`, `AdaptiveProjectedGuidance`)",
    "exact",
    "Each pass of a step is told apart from the others.",
)
@pytest.mark.parametrize("guider", ["AutoGuidance", "AdaptiveProjectedGuidance"])
def test_guiders(guider: str) -> None:
    pipe, call = build("hunyuan15")
    layers = diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    pipe.guider = getattr(diffusers, guider)(**({"auto_guidance_config": layers} if guider == "AutoGuidance" else {}))
    assert_stock(pipe, call, ("early",))


@works(
    "Threads and processes",
    "One set of parts in two pipelines (`from_pipe`), and a copy of a pipeline",
    "exact",
    "Each takes a judge of its own; a judge that was put onto the other one is refused, before any work.",
)
def test_pipelines_of_the_same_parts() -> None:
    pipe, call = build(WAN)
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    for other in (diffusers.WanPipeline.from_pipe(pipe), copy.deepcopy(pipe)):
        other.set_progress_bar_config(disable=True)
        with pytest.raises(PrismError, match="was put onto another pipeline"):
            prism.best_of_n(other, judge, tiny.PROMPT, n=3, **call)
        assert_stock(other, call, ("early",))
    assert_stock(pipe, call, ("early",))


# -- pipelines that PRISM does not read


def animatediff(kind: type) -> Any:
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 2}
    unet = diffusers.UNet2DConditionModel(
        **sizes,
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
    )
    motion = diffusers.MotionAdapter((8, 16), motion_layers_per_block=1, motion_norm_num_groups=2)
    vae = diffusers.AutoencoderKL(
        **sizes, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2
    )
    parts = {"vae": vae, "text_encoder": wan_to_kandinsky._clip_text(), "tokenizer": wan_to_kandinsky._tokenizer()}
    return kind(**parts, unet=unet, motion_adapter=motion, scheduler=diffusers.DDIMScheduler())


@works(
    "Families of one's own",
    "AnimateDiff with PAG",
    "refused",
    "Its guidance runs a third group of rows; the sentence says so.",
)
def test_animatediff_with_pag_is_refused() -> None:
    pipe = animatediff(diffusers.AnimateDiffPAGPipeline)
    with pytest.raises(PrismError, match="AnimateDiffPAGPipeline is not supported: its guidance runs a third group"):
        prism.Judge.untrained(pipe)
    assert isinstance(pipe.unet, nn.Module)
