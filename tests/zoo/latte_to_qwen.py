"""More tiny real diffusers pipelines, offline and with random weights: Latte, Stable Video Diffusion, LTX-Video, ...

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video, without batch axis; "tokens" are what a block puts out for one video, in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from tests.tiny import TEXT_WIDTH, text_encoder, tokenizer
from tests.zoo.wan_to_kandinsky import _call, _clip_text, _image, _language, _quiet, _tokenizer, _wan_vae
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


def _t5() -> Any:
    return text_encoder()


def _frame_vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 4,
            "norm_num_groups": 2,
            **changes,
        }
    )


def latte() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6); tokens (18, 24) after a temporal block, there as (6 places, 3 frames, 24)."""
    torch.manual_seed(0)
    pipe = LattePipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5(),
        vae=_frame_vae(),
        transformer=LatteTransformer3DModel(
            sample_size=4,
            num_layers=3,
            patch_size=2,
            attention_head_dim=12,
            num_attention_heads=2,
            caption_channels=TEXT_WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            video_length=3,
        ),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    call = {"height": 32, "width": 48, "video_length": 3, "num_inference_steps": 6, "guidance_scale": 4.0}
    return _quiet(pipe), {**call, "clean_caption": False}


def svd() -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 8, 12) + 4 channels of the image; a U-Net, whose first stage gives (3 frames, 32, 4, 6)."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        intermediate_size=24,
        patch_size=32,
    )
    pipe = StableVideoDiffusionPipeline(
        vae=_svd_vae(),
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            sample_size=16,
            in_channels=8,
            out_channels=4,
            cross_attention_dim=16,
            num_attention_heads=(2, 4),
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
            num_frames=3,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            num_train_timesteps=1000,
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
            steps_offset=1,
        ),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
    )
    call = {"height": 64, "width": 96, "num_frames": 3, "num_inference_steps": 6}
    return _quiet(pipe), {**call, "min_guidance_scale": 1.0, "max_guidance_scale": 2.5, "image": _image(64, 96)}


def _svd_vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4
    )


def _ltx(kind: type) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 5,
        upsample_factor=(1,) * 5,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    torch.nn.init.normal_(vae.latents_mean)
    torch.nn.init.uniform_(vae.latents_std, 0.5, 2.0)
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=TEXT_WIDTH,
        ),
    )
    return _quiet(pipe)


LTX_CALL = {"height": 32, "width": 64, "guidance_scale": 3.0, "max_sequence_length": 16}


def ltx() -> tuple[Any, dict[str, Any]]:
    """Latents packed as tokens (T' H' W', 8)."""
    return _ltx(LTXPipeline), _call(**LTX_CALL)


def ltx_i2v() -> tuple[Any, dict[str, Any]]:
    """As `ltx`; the first frame's tokens are the image's, at timestep 0."""
    return _ltx(LTXImageToVideoPipeline), {**_call(**LTX_CALL), "image": _image(32, 64)}


def mochi() -> tuple[Any, dict[str, Any]]:
    """Latents (12, 2, 4, 6); tokens (12, 32); sigmas rise from noise to the video."""
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=tokenizer(),
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=4,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
    )
    return _quiet(pipe), _call(num_frames=7, guidance_scale=4.0, max_sequence_length=16)


def allegro() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 2, 4, 6), divided by sqrt(sigma^2 + 1) for the network; tokens (12, 24)."""
    torch.manual_seed(0)
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=32
    )
    pipe = AllegroPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5(),
        vae=vae,
        transformer=AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            cross_attention_dim=24,
            sample_width=6,
            sample_height=4,
            sample_frames=2,
            caption_channels=TEXT_WIDTH,
        ),
        scheduler=EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    vae.enable_tiling()
    call = _call(num_frames=8, guidance_scale=4.0, max_sequence_length=16)
    return _quiet(pipe), {**call, "clean_caption": False}


def _sana(kind: type, scheduler: Any) -> Any:
    torch.manual_seed(0)
    pipe = kind(
        tokenizer=_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**{**_language(), "head_dim": 8})),
        vae=_wan_vae(),
        transformer=SanaVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=TEXT_WIDTH,
        ),
        scheduler=scheduler,
    )
    return _quiet(pipe)


SANA_CALL = {"height": 64, "width": 96, "frames": 9, "num_inference_steps": 6, "guidance_scale": 4.0}
SANA_CALL |= {"max_sequence_length": 16, "complex_human_instruction": [], "use_resolution_binning": False}
SANA_CALL |= {"clean_caption": False}


def sana_video() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 8, 12); tokens (72, 24)."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return _sana(SanaVideoPipeline, scheduler), dict(SANA_CALL)


def sana_video_i2v() -> tuple[Any, dict[str, Any]]:
    """As `sana_video`, the first frame given."""
    pipe = _sana(SanaImageToVideoPipeline, FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipe, {**SANA_CALL, "image": _image(64, 96)}


IMAGE_CALL = {"height": 32, "width": 48, "num_inference_steps": 6, "max_sequence_length": 16}


def _clip_projected() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            projection_dim=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            eos_token_id=1,
        )
    )


def sd3() -> tuple[Any, dict[str, Any]]:
    """Images: latents (4, 4, 6); tokens (6, 24)."""
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=24,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_frame_vae(shift_factor=0.06, scaling_factor=1.53),
        text_encoder=_clip_projected(),
        tokenizer=tokenizer(77),
        text_encoder_2=_clip_projected(),
        tokenizer_2=tokenizer(77),
        text_encoder_3=_t5(),
        tokenizer_3=tokenizer(),
    )
    return _quiet(pipe), {**IMAGE_CALL, "guidance_scale": 4.0}


def flux(in_channels: int = 16) -> tuple[Any, dict[str, Any]]:
    """Images: latents packed two by two as (6, 16); tokens (6, 24); the guidance is an input of the network."""
    torch.manual_seed(0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        text_encoder=_clip_text(),
        tokenizer=tokenizer(77),
        text_encoder_2=_t5(),
        tokenizer_2=tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=16,
            num_layers=1,  # the tap is a single-stream block's, as in the large model
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 4),
        ),
    )
    return _quiet(pipe), {**IMAGE_CALL, "guidance_scale": 3.5}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    """Images: latents packed two by two as (6, 64); tokens (6, 24)."""
    torch.manual_seed(0)
    text = _language(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 4),
        ),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return _quiet(pipe), {**IMAGE_CALL, "true_cfg_scale": 4.0, "negative_prompt": "still"}


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "latte": latte,
    "svd": svd,
    "ltx": ltx,
    "ltx_i2v": ltx_i2v,
    "mochi": mochi,
    "allegro": allegro,
    "sana_video": sana_video,
    "sana_video_i2v": sana_video_i2v,
    "sd3": sd3,
    "flux": flux,
    "qwen_image": qwen_image,
}
