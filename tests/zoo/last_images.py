"""The last tiny real diffusers pipelines that make images with transformers; see `tests.zoo.images`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaFiboEditPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from tests.tiny import TEXT_WIDTH
from tests.zoo.further_images import bria_fibo, longcat_image
from tests.zoo.images import Built, flux2_klein, sana
from tests.zoo.latte_to_qwen import qwen_image
from tests.zoo.sounds import _model
from tests.zoo.wan_to_kandinsky import _image, _language, _quiet, _tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model


class _Speaker:
    """Stands in for Qwen's processor, which needs torchvision: the text's tokens."""

    merge_size = 2

    def __init__(self, names: Any) -> None:
        self.tokenizer, self.image_processor = names, self

    def apply_chat_template(self, messages: Any, tokenize: bool, **settings: Any) -> Any:
        return [[]] if tokenize else messages[-1]["content"][0]["text"]

    def __call__(self, text: Any = None, images: Any = None, **settings: Any) -> Any:
        if text is None:
            return {"pixel_values": torch.zeros(1), "image_grid_thw": torch.tensor([[1, 2, 2]])}
        return self.tokenizer(text, **settings)


def _heads(**changes: Any) -> dict[str, Any]:
    return {"num_layers": 3, "attention_head_dim": 12, "num_attention_heads": 2, **changes}


def nucleus() -> Built:
    """Latents packed two by two as (6, 64); tokens (6, 24); each expert chooses its tokens."""
    built = qwen_image()[0]
    torch.manual_seed(0)
    pipe = NucleusMoEImagePipeline(
        transformer=_model(
            NucleusMoEImageTransformer2DModel,
            **_heads(out_channels=16, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 4, 4), mlp_ratio=8.0),
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=built.text_encoder,
        processor=_Speaker(_tokenizer()),
    )
    for name, value in pipe.transformer.named_parameters():
        if "experts" in name:  # they begin as whatever memory holds
            torch.nn.init.normal_(value, std=0.3)
    pipe.default_return_index = -2
    call = {"height": 32, "width": 48, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 4.0}
    return _quiet(pipe), call


def qwen_image_21() -> Built:
    """Latents (24, 8) in raster order; tokens (24, 24), behind those of the text."""
    text = qwen_image()[0].text_encoder
    torch.manual_seed(0)
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=torch.randn(8).tolist(),
            latents_std=(torch.rand(8) + 0.5).tolist(),
            in_channels=3,
            out_channels=3,
        ),
        text_encoder=text,
        processor=_Speaker(_tokenizer("<|image_pad|>")),
        transformer=_model(
            QwenImage21Transformer2DModel,
            **_heads(in_channels=8, out_channels=8, context_in_dim=TEXT_WIDTH, mlp_ratio=1, axes_dims_rope=(4, 4, 4)),
        ),
    )
    call = {"height": 64, "width": 96, "num_inference_steps": 6, "true_cfg_scale": 4.0, "negative_prompt": "still"}
    return _quiet(pipe), {**call, "use_kv_cache": False}


def bria_fibo_2() -> Built:
    """Latents (4, 4, 6); tokens (6, 24), behind those of a gist of the text."""
    text, vae = qwen_image()[0].text_encoder, flux2_klein()[0].vae
    torch.manual_seed(0)
    pipe = BriaFibo2Pipeline(
        transformer=_model(
            BriaFibo2Transformer2DModel,
            in_channels=4,
            dim=24,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=TEXT_WIDTH * 2,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=2,
            gist_max_text_len=16,
            axes_dims=(4, 4, 4),
            axes_lens=(64, 32, 32),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text,
        processor=_Speaker(_tokenizer()),
    )
    pipe.text_encoder_out_layers = ((1, 2), (0, 1))
    call = {"height": 8, "width": 12, "num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "still"}
    return _quiet(pipe), call


def bria_fibo_edit() -> Built:
    """As `bria_fibo`, with the tokens of an image behind those of the latents."""
    pipe, call = bria_fibo()
    return _quiet(BriaFiboEditPipeline(**pipe.components)), {**call, "image": _image(64, 96), "_auto_resize": False}


def ernie_image() -> Built:
    """Latents (16, 4, 6), squares of 2 x 2 cells in their channels; tokens (24, 24), before those of the text."""
    vae = flux2_klein()[0].vae
    vae.register_to_config(batch_norm_eps=1e-5)  # which the pipeline takes, whatever the VAE's is
    torch.manual_seed(0)
    pipe = ErnieImagePipeline(
        transformer=_model(
            ErnieImageTransformer2DModel,
            hidden_size=24,
            num_attention_heads=2,
            num_layers=3,
            ffn_hidden_size=24,
            in_channels=16,
            out_channels=16,
            text_in_dim=TEXT_WIDTH,
            rope_axes_dim=(4, 4, 4),
        ),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**{**_language(), "head_dim": 8})),
        tokenizer=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _quiet(pipe), {"height": 16, "width": 24, "num_inference_steps": 6, "guidance_scale": 4.0, "use_pe": False}


class _Blind(Qwen2_5_VLForConditionalGeneration):
    """A text encoder that looks at no picture."""

    def forward(self, *args: Any, pixel_values: Any = None, image_grid_thw: Any = None, **settings: Any) -> Any:
        return super().forward(*args, **settings)


def longcat_image_edit() -> Built:
    """As `longcat_image`, with the tokens of an image behind those of the latents."""
    pipe, call = longcat_image()
    pipe.text_encoder.__class__ = _Blind
    pipeline_longcat_image_edit.calculate_dimensions = lambda area, ratio: (48, 32)  # it makes a million pixels
    names = _tokenizer("<|vision_start|>", "<|image_pad|>")
    parts = {**pipe.components, "tokenizer": names, "text_processor": _Speaker(names)}
    pipe = LongCatImageEditPipeline(**parts)
    pipe.tokenizer_max_length, pipe.prompt_template_encode_suffix = 16, "still"
    pipe.prompt_template_encode_prefix = "a <|vision_start|> <|image_pad|>"
    taken = {name: value for name, value in call.items() if name not in ("height", "width", "enable_prompt_rewrite")}
    return _quiet(pipe), {**taken, "image": _image(32, 48)}


def _sana_sprint(kind: type, **changes: Any) -> Built:
    """As `sana`; the guidance is an input of the network, and each step draws noise."""
    pipe, call = sana()
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    pipe = kind(**{**pipe.components, "transformer": transformer, "scheduler": SCMScheduler()})
    return _quiet(pipe), {**call, "intermediate_timesteps": None, **changes}


BUILDERS: dict[str, Callable[[], Built]] = {
    "nucleus": nucleus,
    "qwen_image_21": qwen_image_21,
    "bria_fibo_2": bria_fibo_2,
    "bria_fibo_2_edit": lambda: (bria_fibo_2()[0], {**bria_fibo_2()[1], "image": _image(16, 16)}),
    "bria_fibo_edit": bria_fibo_edit,
    "ernie_image": ernie_image,
    "longcat_image_edit": longcat_image_edit,
    "sana_sprint": lambda: _sana_sprint(SanaSprintPipeline),
    "sana_sprint_img2img": lambda: _sana_sprint(SanaSprintImg2ImgPipeline, image=_image(32, 64), strength=0.8),
}
TEXTS = {"bria_fibo_edit": ('{"edit_instruction": "a red circle"}', '{"edit_instruction": "a blue square"}')}
