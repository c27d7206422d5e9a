"""More tiny real diffusers pipelines, offline and with random weights: Wan I2V and 2.2, SkyReels-V2, HunyuanVideo, ...

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video, without batch axis; "tokens" are what a block puts out for it, in the order frame, row, column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image, ImageOps
from tests.tiny import TEXT_WIDTH, text_encoder, tokenizer
from tokenizers import processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

IMAGE_WIDTH = 16


def _image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _call(height: int = 32, width: int = 48, num_frames: int = 9, **others: Any) -> dict[str, Any]:
    return {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": 6, **others}


def _quiet(pipe: Any) -> Any:
    """Put every module in eval mode and hide the progress bar."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unipc(shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


# -------------------------------------------------------------------------------------------------------- Wan, SkyReels


def _wan_vae(**changes: Any) -> AutoencoderKLWan:
    settings: dict[str, Any] = {"temperal_downsample": [False, True, True], "dim_mult": [1, 1, 1, 1], **changes}
    return AutoencoderKLWan(base_dim=3, z_dim=16, num_res_blocks=1, **settings)


def _wan_vae22() -> AutoencoderKLWan:
    """The VAE of Wan 2.2 5B: residual, 16 times smaller, 2x2 pixels packed in channels."""
    return _wan_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)


def _wan_transformer(kind: type = WanTransformer3DModel, **changes: Any) -> Any:
    settings: dict[str, Any] = {"in_channels": 16, "num_layers": 3, **changes}
    return kind(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **settings,
    )


def _clip_vision() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModel(config)


def _clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def wan21_i2v(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) + 4 mask + 16 image channels; tokens (18, 24); its attention assumes 512 text tokens."""
    torch.manual_seed(0)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(3.0),
        image_processor=_clip_processor(),
        image_encoder=_clip_vision(),
        transformer=_wan_transformer(in_channels=36, image_dim=IMAGE_WIDTH, added_kv_proj_dim=24, **changes),
    )
    return _quiet(pipe), _call(image=_image(32, 48), guidance_scale=4.0, max_sequence_length=512)


def wan21_i2v_last_image() -> tuple[Any, dict[str, Any]]:
    """As `wan21_i2v`, the last frame given too: two rows of image embeddings a video, joined by the denoiser."""
    pipe, call = wan21_i2v(pos_embed_seq_len=10)
    return pipe, {**call, "last_image": ImageOps.invert(call["image"])}


def wan22_a14b_t2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6); tokens (18, 24); three steps on `transformer`, then three on `transformer_2`."""
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(5.0),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(),
        boundary_ratio=0.875,
    )
    return _quiet(pipe), _call(guidance_scale=4.0, guidance_scale_2=3.0, max_sequence_length=12)


def wan22_a14b_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) + 4 mask + 16 image channels; tokens (18, 24); three steps on each transformer."""
    torch.manual_seed(0)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(5.0),
        transformer=_wan_transformer(in_channels=36),
        transformer_2=_wan_transformer(in_channels=36),
        boundary_ratio=0.9,
    )
    call = _call(image=_image(32, 48), guidance_scale=4.0, guidance_scale_2=3.0, max_sequence_length=12)
    return _quiet(pipe), call


def wan22_5b_t2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) of 64 x 96 pixels; tokens (18, 24); one timestep per token, all of them equal."""
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae22(),
        scheduler=_unipc(5.0),
        transformer=_wan_transformer(),
        expand_timesteps=True,
    )
    return _quiet(pipe), _call(64, 96, guidance_scale=4.0, max_sequence_length=12)


def wan22_5b_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), the first frame that of the image; tokens (18, 24), timestep 0 for the first frame's."""
    torch.manual_seed(0)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae22(),
        scheduler=_unipc(5.0),
        transformer=_wan_transformer(),
        expand_timesteps=True,
    )
    return _quiet(pipe), _call(64, 96, image=_image(64, 96), guidance_scale=4.0, max_sequence_length=12)


def skyreels_v2() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6); tokens (18, 24)."""
    torch.manual_seed(0)
    pipe = SkyReelsV2Pipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(8.0),
        transformer=_wan_transformer(SkyReelsV2Transformer3DModel),
    )
    return _quiet(pipe), _call(guidance_scale=4.0, max_sequence_length=12)


def skyreels_v2_df(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), a timestep for each latent frame, `fps` as a list; tokens (18, 24)."""
    torch.manual_seed(0)
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(8.0),
        transformer=_wan_transformer(SkyReelsV2Transformer3DModel, **changes),
    )
    return _quiet(pipe), _call(guidance_scale=4.0, max_sequence_length=12, fps=16)


# --------------------------------------------------------------------------------------------------------- HunyuanVideo

HUNYUAN_I2V_TEMPLATE: dict[str, Any] = {
    "template": (
        "<|start_header_id|>system<|end_header_id|><image> describe<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    ),
    "crop_start": 9,
    "image_emb_start": 3,
    "image_emb_end": 7,
    "image_emb_len": 4,
}


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """The tokenizer of tests.tiny with room for the prompt templates and with further tokens that are not split."""
    made = tokenizer(512)
    made.add_tokens(list(special), special_tokens=True)
    return made


def _clip_text() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=37,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def _language(**changes: Any) -> dict[str, Any]:
    """Settings shared by the decoder-only text encoders."""
    return {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "initializer_range": 0.5,
        **changes,
    }


def _hunyuan_vae(width: int = 8) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(width,) * 4, layers_per_block=1, norm_num_groups=4
    )


def _hunyuan_transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    settings: dict[str, Any] = {"in_channels": 4, **changes}
    return HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,  # the tap is the first single-stream block's, as it is one of these in the large model
        num_single_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **settings,
    )


def hunyuan() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6); tokens (18, 20), beside 16 text tokens; the guidance is an input of the network."""
    torch.manual_seed(0)
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**_language())),
        tokenizer=_tokenizer(),
        transformer=_hunyuan_transformer(),
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip_text(),
        tokenizer_2=_tokenizer(),
    )
    return _quiet(pipe), _call(guidance_scale=6.0, max_sequence_length=16)


def hunyuan_i2v(condition: str = "token_replace") -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6), the first frame the image's (or, `latent_concat`, + 4 + 1 channels); tokens (18, 20)."""
    torch.manual_seed(0)
    names = _tokenizer("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
    encoder = LlavaConfig(
        vision_config=_clip_vision().config,
        text_config=LlamaConfig(**_language()),
        image_token_index=names.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        pad_token_id=0,
    )
    channels = {"token_replace": 4, "latent_concat": 9}[condition]
    pipe = HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(encoder),
        tokenizer=names,
        transformer=_hunyuan_transformer(in_channels=channels, image_condition_type=condition),
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip_text(),
        tokenizer_2=_tokenizer(),
        image_processor=_clip_processor(),
    )
    template = dict(HUNYUAN_I2V_TEMPLATE)
    call = _call(image=_image(32, 48), guidance_scale=6.0, max_sequence_length=16, prompt_template=template)
    return _quiet(pipe), call


# ----------------------------------------------------------------------------------------------------- HunyuanVideo 1.5


def _hunyuan15(kind: type, **others: Any) -> Any:
    """Either 1.5 pipeline, with as few text and image tokens as its attributes allow (they are not saved with it)."""
    names = _tokenizer()
    # more than the 108 tokens before the prompt that the pipeline crops: an empty prompt needs a token, too
    names.chat_template = (
        "{% for message in messages %}{{ message.role }} : one two three four five six seven eight : "
        "{{ message.content }} {% endfor %}"
    )
    text = Qwen2_5_VLTextConfig(**_language(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}))
    glyphs = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = kind(
        text_encoder=Qwen2_5_VLTextModel(text),
        tokenizer=names,
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=8,
            image_embed_dim=IMAGE_WIDTH,
            rope_axes_dim=(2, 4, 4),
            target_size=40,
        ),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(glyphs),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        **others,
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 16, 4, 4
    return _quiet(pipe)


def hunyuan15() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 2, 3) + 4 + 1 channels of zeros; tokens (18, 20), beside 24 of text, glyphs and image."""
    torch.manual_seed(0)
    return _hunyuan15(HunyuanVideo15Pipeline), _call()


def hunyuan15_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 2, 3) + 4 image channels + 1 of mask; tokens (18, 20); the size follows from the image's shape."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    pipe = _hunyuan15(
        HunyuanVideo15ImageToVideoPipeline,
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
    )
    return pipe, {"image": _image(32, 48), "num_frames": 9, "num_inference_steps": 6}


# ------------------------------------------------------------------------------------------------------------ CogVideoX


def _cogvideox_parts(scheduler: type, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"in_channels": 4, **changes}
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=TEXT_WIDTH,
            num_layers=3,
            sample_width=6,
            sample_height=4,
            sample_frames=9,
            patch_size=2,
            max_text_seq_length=12,
            use_rotary_positional_embeddings=True,
            **settings,
        ),
        "scheduler": scheduler(
            prediction_type="v_prediction",
            snr_shift_scale=1.0,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    }


def cogvideox15() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 4, 4, 6), frames first and one of them padding; patches of two frames: tokens (12, 32)."""
    torch.manual_seed(0)
    pipe = CogVideoXPipeline(**_cogvideox_parts(CogVideoXDPMScheduler, patch_size_t=2, patch_bias=False))
    return _quiet(pipe), _call(guidance_scale=4.0, max_sequence_length=12)


def cogvideox_i2v(version: str = "1.0") -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 4, 6), frames first, + 4 image channels; tokens (18, 32); version `1.5` is like `cogvideox15`."""
    torch.manual_seed(0)
    changes: dict[str, dict[str, Any]] = {
        "1.0": {"use_learned_positional_embeddings": True},
        "1.5": {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8},
    }
    parts = _cogvideox_parts(CogVideoXDDIMScheduler, in_channels=8, **changes[version])
    call = _call(image=_image(32, 48), guidance_scale=4.0, max_sequence_length=12)
    return _quiet(CogVideoXImageToVideoPipeline(**parts)), call


# ---------------------------------------------------------------------------------------------------------- Kandinsky 5


def _template_tokenizer() -> PreTrainedTokenizerFast:
    names = _tokenizer()
    # with a token before the text the template is 128 tokens long, which is what the pipeline crops
    names.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", 1)]
    )
    return names


def _qwen() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config=_language(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _opened(model: torch.nn.Module, std: float) -> None:
    """The gates of new blocks are closed: they would pass their input on, whatever the text."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)


def _kandinsky5(kind: type, vae: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        axes_dims=(4, 6, 6),
        **{"num_visual_blocks": 3, "visual_cond": True, **changes},
    )
    _opened(transformer, 0.01)
    pipe = kind(
        transformer=transformer,
        vae=vae or _hunyuan_vae(),
        text_encoder=_qwen(),
        tokenizer=_template_tokenizer(),
        text_encoder_2=_clip_text(),
        tokenizer_2=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    return _quiet(pipe)


def kandinsky5_t2v() -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 6, 4), channels last, + 4 + 1 channels of zeros; tokens (18, 32)."""
    call = _call(negative_prompt="still", guidance_scale=4.0, max_sequence_length=16)
    return _kandinsky5(Kandinsky5T2VPipeline), call


def kandinsky5_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (5, 4, 6, 4), channels last, + 4 channels of zeros + 1 of mask; tokens (30, 32); NaN below 5 frames."""
    call = _call(num_frames=17, negative_prompt="still", guidance_scale=4.0, max_sequence_length=16)
    return _kandinsky5(Kandinsky5I2VPipeline), {"image": _image(32, 48), **call}


# image=[image] * N where the N candidates have a generator each; the others take the one image as it is
IMAGE_PER_CANDIDATE = frozenset({"hunyuan_i2v", "cogvideox_i2v", "kandinsky5_i2v"})

BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "wan21_i2v": wan21_i2v,
    "wan22_a14b_t2v": wan22_a14b_t2v,
    "wan22_a14b_i2v": wan22_a14b_i2v,
    "wan22_5b_t2v": wan22_5b_t2v,
    "wan22_5b_i2v": wan22_5b_i2v,
    "skyreels_v2": skyreels_v2,
    "skyreels_v2_df": skyreels_v2_df,
    "hunyuan": hunyuan,
    "hunyuan_i2v": hunyuan_i2v,
    "hunyuan15": hunyuan15,
    "hunyuan15_i2v": hunyuan15_i2v,
    "cogvideox15": cogvideox15,
    "cogvideox_i2v": cogvideox_i2v,
    "kandinsky5_t2v": kandinsky5_t2v,
    "kandinsky5_i2v": kandinsky5_i2v,
}
