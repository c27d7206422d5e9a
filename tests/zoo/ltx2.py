"""Tiny LTX-2 pipelines, which denoise a sound beside the video.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video, without batch axis; "tokens" are what a block puts out for one video, in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tests.tiny import TEXT_WIDTH, tokenizer
from tests.zoo.latte_to_qwen import _image, _language, _quiet
from transformers import Gemma2Config, Gemma2Model

# As by default, guidance of every kind is on. The default block of spatio-temporal guidance is the 28th.
CALL: dict[str, Any] = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 6, "max_sequence_length": 16}
CALL["spatio_temporal_guidance_blocks"] = [1]


def vae_of_ltx2() -> AutoencoderKLLTX2Video:
    """The tiny VAE of LTX-2, which SANA-WM has too."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=False,
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def _ltx2(kind: type, later: bool = False) -> Any:
    """later: as LTX-2.3 and later, whose text comes as wide as the tokens and is modulated by the noise level."""
    torch.manual_seed(0)
    vae = vae_of_ltx2()
    sounds = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        is_causal=True,
        mel_bins=8,
    )
    for part in (vae, sounds):
        torch.nn.init.normal_(part.latents_mean)
        torch.nn.init.uniform_(part.latents_std, 0.5, 2.0)
    language = {**_language(), "head_dim": 8}
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=3,
        caption_channels=TEXT_WIDTH,
        rope_type="split",
        rope_double_precision=False,
        use_prompt_embeddings=not later,
        cross_attn_mod=later,
        audio_cross_attn_mod=later,
        perturbed_attn=later,
        gated_attn=later,
        audio_gated_attn=later,
    )
    for name, value in transformer.named_parameters():
        if "scale_shift" in name and not value.any():
            value.data.normal_(0, 0.3)
    connectors = LTX2TextConnectors(
        caption_channels=language["hidden_size"],
        text_proj_in_factor=language["num_hidden_layers"] + 1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2 if later else 4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        per_modality_projections=later,
        video_hidden_dim=32,
        audio_hidden_dim=16,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=vae,
        audio_vae=sounds,
        text_encoder=Gemma2Model(Gemma2Config(**language)),
        tokenizer=tokenizer(),
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
    return _quiet(pipe)


def ltx2() -> tuple[Any, dict[str, Any]]:
    """Latents packed as tokens (3 x 4 x 8, 8); tokens (96, 32)."""
    return _ltx2(LTX2Pipeline), dict(CALL)


def ltx23() -> tuple[Any, dict[str, Any]]:
    """As `ltx2`, with what came in 2.3."""
    return _ltx2(LTX2Pipeline, later=True), dict(CALL)


def ltx2_i2v() -> tuple[Any, dict[str, Any]]:
    """As `ltx2`; the first frame's tokens are the image's, at timestep 0."""
    return _ltx2(LTX2ImageToVideoPipeline), {**CALL, "image": _image(32, 64)}


def ltx2_condition() -> tuple[Any, dict[str, Any]]:
    """As `ltx23`; the first frame's tokens are the condition's, at timestep 0."""
    return _ltx2(LTX2ConditionPipeline, later=True), {**CALL, "conditions": [LTX2VideoCondition(_image(32, 64), crf=0)]}


def ltx2_in_context() -> tuple[Any, dict[str, Any]]:
    """As `ltx2`; behind the video's tokens stand 32 of a frame near its end and 8 of a smaller video, to which fewer
    attend; all at timestep 0."""
    call = {**CALL, "conditions": [LTX2VideoCondition(_image(32, 64), -1, crf=0)], "reference_downscale_factor": 2}
    call["guidance_rescale"] = 0.0  # it goes by the spread of all tokens
    call |= {"reference_conditions": [LTX2ReferenceCondition([_image(32, 64)])], "conditioning_attention_strength": 0.5}
    return _ltx2(LTX2InContextPipeline), call


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "ltx2": ltx2,
    "ltx23": ltx23,
    "ltx2_i2v": ltx2_i2v,
    "ltx2_condition": ltx2_condition,
    "ltx2_in_context": ltx2_in_context,
}
