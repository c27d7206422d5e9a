"""More tiny real diffusers pipelines that make images with transformers; see `tests.zoo.images`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImageEditInpaintPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint
from tests.tiny import TEXT_WIDTH, WORDS, text_encoder, tokenizer
from tests.zoo.images import GIVEN, Built, _of, _qwen_edit, flux2_klein
from tests.zoo.latte_to_qwen import IMAGE_CALL, _clip_projected, _frame_vae
from tests.zoo.sounds import _model
from tests.zoo.unets import BETAS, _mask
from tests.zoo.wan_to_kandinsky import _image, _language, _quiet, _tokenizer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

GUIDED = {**IMAGE_CALL, "guidance_scale": 4.0}
UNLIMITED = {name: value for name, value in GUIDED.items() if name != "max_sequence_length"}


def ovis_image() -> Built:
    """Latents packed two by two as (6, 16); tokens (6, 24)."""
    torch.manual_seed(0)
    names = _tokenizer()
    names.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    pipe = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        text_encoder=Qwen3Model(Qwen3Config(**{**_language(), "head_dim": 8})),
        tokenizer=names,
        transformer=OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 4),
        ),
    )
    pipe.system_prompt, pipe.user_prompt_begin_id = "", 0
    return _quiet(pipe), GUIDED


def bria() -> Built:
    """Latents packed two by two as (6, 16); tokens (6, 24)."""
    torch.manual_seed(0)
    pipe = BriaPipeline(
        transformer=BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=[4, 4, 4],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
    )
    return _quiet(pipe), GUIDED


def prx() -> Built:
    """Latents (4, 4, 6); tokens (6, 24)."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own of its adapters' class
        pipe = PRXPipeline(
            transformer=_model(
                PRXTransformer2DModel,
                in_channels=4,
                context_in_dim=TEXT_WIDTH,
                hidden_size=24,
                mlp_ratio=1.0,
                num_heads=2,
                depth=3,
                axes_dim=[6, 6],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(16),
            vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        )
    return _quiet(pipe), {**UNLIMITED, "use_resolution_binning": False}


def cogview3_plus() -> Built:
    """Latents (4, 4, 6); tokens (6, 24)."""
    torch.manual_seed(0)
    pipe = CogView3PlusPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_frame_vae(),
        transformer=CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        ),
    )
    return _quiet(pipe), GUIDED


def hidream() -> Built:
    """Latents (4, 6, 8); tokens (12, 24), before 4 of padding and those of the text."""
    torch.manual_seed(0)
    llama = {**_language(), "num_hidden_layers": 2, "attn_implementation": "eager"}
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        text_encoder=_clip_projected(),
        tokenizer=tokenizer(16),
        text_encoder_2=_clip_projected(),
        tokenizer_2=tokenizer(16),
        text_encoder_3=text_encoder(),
        tokenizer_3=tokenizer(16),
        text_encoder_4=LlamaModel(LlamaConfig(**llama)),
        tokenizer_4=_tokenizer(),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
            text_emb_dim=32,
            axes_dims_rope=(4, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 1, 0],
        ),
    )
    pipe.default_sample_size = 8
    return _quiet(pipe), GUIDED


def hunyuan_dit() -> Built:
    """Latents (4, 4, 6); tokens (6, 24); the scheduler draws noise at each step."""
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    pipe = HunyuanDiTPipeline(
        vae=_frame_vae(),
        text_encoder=BertModel(bert),
        tokenizer=tokenizer(77),
        transformer=HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=24,
            num_layers=4,
            mlp_ratio=1.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=TEXT_WIDTH,
            pooled_projection_dim=8,
            text_len=77,
            text_len_t5=256,
        ),
        scheduler=DDPMScheduler(
            **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder(),
        tokenizer_2=tokenizer(256),
    )
    return _quiet(pipe), {**UNLIMITED, "use_resolution_binning": False}


def _qwen_edit_inpaint() -> Built:
    """Latents packed two by two as (8, 64); tokens (8, 24), before those of the image."""
    home = pipeline_qwenimage_edit_inpaint
    home.calculate_dimensions = lambda area, ratio: (64, 32, None)  # it makes a million pixels of any image
    pipe, call = _qwen_edit(QwenImageEditInpaintPipeline, home)
    return pipe, {**call, "image": _image(32, 64), "mask_image": _mask(32, 64), "strength": 0.8}


BUILDERS: dict[str, Callable[[], Built]] = {
    "flux2_klein_inpaint": lambda: _of(
        Flux2KleinInpaintPipeline, flux2_klein(), image=_image(8, 12), mask_image=_mask(8, 12), **GIVEN
    ),
    "qwen_image_edit_inpaint": _qwen_edit_inpaint,
    "ovis_image": ovis_image,
    "bria": bria,
    "prx": prx,
    "cogview3_plus": cogview3_plus,
    "hidream": hidream,
    "hunyuan_dit": hunyuan_dit,
}
