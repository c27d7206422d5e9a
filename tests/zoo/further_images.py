"""Further tiny real diffusers pipelines that make images with transformers; see `tests.zoo.images`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5I2IPipeline,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)
from tests.tiny import TEXT_WIDTH
from tests.zoo import wan_to_kandinsky
from tests.zoo.images import Built
from tests.zoo.latte_to_qwen import _frame_vae, qwen_image
from tests.zoo.more_images import GUIDED, UNLIMITED
from tests.zoo.sounds import _model
from tests.zoo.wan_to_kandinsky import _image, _language, _quiet, _tokenizer, _wan_vae22
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
)


def longcat_image() -> Built:
    """Latents packed two by two as (6, 64); tokens (6, 24)."""
    text = qwen_image()[0].text_encoder
    torch.manual_seed(0)
    pipe = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(latent_channels=16, shift_factor=0.12, scaling_factor=0.36),
        text_encoder=text,
        tokenizer=_tokenizer(),
        text_processor=None,
        transformer=LongCatImageTransformer2DModel(
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=[4, 4, 4],
        ),
    )
    pipe.tokenizer_max_length = 16
    return _quiet(pipe), {**UNLIMITED, "enable_prompt_rewrite": False}


def hunyuan_image() -> Built:
    """Latents (4, 4, 6); tokens (24, 20)."""
    text = qwen_image()[0].text_encoder
    torch.manual_seed(0)
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32),  # norms of 32 groups
            layers_per_block=1,
            spatial_compression_ratio=8,
            sample_size=32,
            scaling_factor=0.476986,
        ),
        text_encoder=text,
        tokenizer=_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
        tokenizer_2=ByT5Tokenizer(),
        transformer=HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=8,
            rope_axes_dim=(4, 6),
        ),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=4.0, adaptive_projected_guidance_start_step=2),
        ocr_guider=None,
    )
    pipe.tokenizer_2_max_length = 4
    pipe.tokenizer_max_length, pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = 16, "{}", 0
    return _quiet(pipe), {"height": 32, "width": 48, "num_inference_steps": 6}


def bria_fibo() -> Built:
    """Latents packed as (24, 16); tokens (24, 24), behind those of the text in single-stream blocks."""
    torch.manual_seed(0)
    pipe = BriaFiboPipeline(
        transformer=BriaFiboTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH * 2,
            axes_dims_rope=[4, 4, 4],
            text_encoder_dim=TEXT_WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_wan_vae22(),
        text_encoder=SmolLM3ForCausalLM(SmolLM3Config(**_language())),
        tokenizer=_tokenizer(),
    )
    return _quiet(pipe), {**GUIDED, "height": 64, "width": 96, "negative_prompt": "still"}


def krea2() -> Built:
    """Latents packed two by two as (6, 64); tokens (6, 24), behind those of the text."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    pipe = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_language(rope_parameters=rope))),
        tokenizer=_tokenizer(),
        transformer=_model(
            Krea2Transformer2DModel,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            timestep_embed_dim=16,
            text_hidden_dim=TEXT_WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=24,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 4),
        ),
        text_encoder_select_layers=(1, 2),
    )
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "", 0
    return _quiet(pipe), GUIDED


def lumina() -> Built:
    """Latents (4, 4, 6); tokens (6, 24); guidance moves three of the channels alone."""
    torch.manual_seed(0)
    pipe = LuminaPipeline(
        transformer=_model(
            LuminaNextDiT2DModel,
            sample_size=8,
            hidden_size=24,
            num_layers=3,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=TEXT_WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(),
        text_encoder=Gemma2Model(Gemma2Config(**{**_language(), "head_dim": 8})),
        tokenizer=_tokenizer(),
    )
    return _quiet(pipe), {**GUIDED, "clean_caption": False}


class _Pictures:
    """Stands in for Qwen's processor of texts and pictures, which needs torchvision: the text's tokens alone."""

    image_token_id = 3

    def __init__(self, names: Any) -> None:
        self.tokenizer = names

    def __call__(self, text: Any, images: Any, videos: Any, **settings: Any) -> Any:
        return self.tokenizer(text, **settings)


def kandinsky5_i2i() -> Built:
    """As `kandinsky5_t2i`, + 4 channels of the image and 1 of ones."""
    pipe = wan_to_kandinsky._kandinsky5(Kandinsky5I2IPipeline, vae=_frame_vae(), visual_cond=True)
    pipe.tokenizer = _Pictures(pipe.tokenizer)
    pipe.resolutions, pipe.prompt_template, pipe.prompt_template_encode_start_idx = [(48, 32)], "{}", 0
    call = {"height": 32, "width": 48, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 4.0}
    return pipe, {**call, "negative_prompt": "still", "image": _image(32, 48)}


BUILDERS: dict[str, Callable[[], Built]] = {
    "longcat_image": longcat_image,
    "hunyuan_image": hunyuan_image,
    "bria_fibo": bria_fibo,
    "krea2": krea2,
    "lumina": lumina,
    "kandinsky5_i2i": kandinsky5_i2i,
}
