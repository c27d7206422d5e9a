"""Further tiny variants: pipelines given an image, a video or a negative prompt, and denoisers of other settings.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video, without batch axis; "tokens" are what a block puts out for one video, in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CosmosVideoToWorldPipeline,
    EasyAnimateInpaintPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    Kandinsky5T2VPipeline,
    LTXConditionPipeline,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
)
from diffusers.models.attention_dispatch import attention_backend
from diffusers.pipelines.easyanimate.pipeline_easyanimate_inpaint import get_image_to_video_latent
from tests.tiny import text_encoder, tokenizer
from tests.zoo import cosmos_and_more, latte_to_qwen, wan_to_kandinsky
from tests.zoo.wan_to_kandinsky import (
    IMAGE_WIDTH,
    _call,
    _clip_processor,
    _clip_text,
    _clip_vision,
    _hunyuan_transformer,
    _hunyuan_vae,
    _image,
    _language,
    _quiet,
    _tokenizer,
    _unipc,
    _wan_transformer,
    _wan_vae,
)
from transformers import LlamaConfig, LlamaModel, SiglipImageProcessor

TRUE_CFG: dict[str, Any] = {"true_cfg_scale": 4.0, "negative_prompt": "still"}


def skyreels_v2_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) + 4 mask + 16 image channels; tokens (18, 24)."""
    torch.manual_seed(0)
    pipe = SkyReelsV2ImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(5.0),
        image_processor=_clip_processor(),
        image_encoder=_clip_vision(),
        transformer=_wan_transformer(
            SkyReelsV2Transformer3DModel, in_channels=36, image_dim=IMAGE_WIDTH, added_kv_proj_dim=24
        ),
    )
    return _quiet(pipe), _call(image=_image(32, 48), guidance_scale=4.0, max_sequence_length=512)


def skyreels_v2_df_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), the first frame the image's at timestep 0; tokens (18, 24)."""
    torch.manual_seed(0)
    pipe = SkyReelsV2DiffusionForcingImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_wan_vae(),
        scheduler=_unipc(5.0),
        transformer=_wan_transformer(SkyReelsV2Transformer3DModel),
    )
    return _quiet(pipe), _call(image=_image(32, 48), guidance_scale=4.0, max_sequence_length=12, fps=16)


def kandinsky5_nabla() -> tuple[Any, dict[str, Any]]:
    """Latents (2, 16, 32, 4), channels last, + 4 + 1 channels of zeros; tokens (256, 32), in squares of 8 x 8."""
    window = {"attention_wT": 3, "attention_wH": 3, "attention_wW": 3, "attention_add_sta": True}
    window |= {"attention_type": "nabla", "attention_P": 0.9, "attention_method": "topcdf"}
    vae = wan_to_kandinsky._hunyuan_vae(4)  # of many cells, at each of which attention is slow here
    pipe = wan_to_kandinsky._kandinsky5(Kandinsky5T2VPipeline, vae, num_visual_blocks=2, **window)
    with attention_backend("native"):  # which `set_attention_backend` would change for every other model, too
        pipe.transformer.set_attention_backend("flex")
    call = _call(128, 256, 5, negative_prompt="still", guidance_scale=4.0, max_sequence_length=16)
    return pipe, {**call, "num_inference_steps": 3}


def hunyuan_true_cfg() -> tuple[Any, dict[str, Any]]:
    """As `hunyuan`, with a negative prompt: two calls a step."""
    pipe, call = wan_to_kandinsky.hunyuan()
    return pipe, {**call, **TRUE_CFG}


def hunyuan_i2v_true_cfg() -> tuple[Any, dict[str, Any]]:
    """As `hunyuan_i2v`, with a negative prompt, which is seen beside a black image: two calls a step."""
    pipe, call = wan_to_kandinsky.hunyuan_i2v()
    return pipe, {**call, **TRUE_CFG}


def hunyuan_i2v_concat() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6) + 4 image channels + 1 of mask; of 9 decoded frames the last 5 remain; tokens (18, 20)."""
    return wan_to_kandinsky.hunyuan_i2v("latent_concat")


def hunyuan_skyreels_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6) + 4 image channels; tokens (18, 20); two calls a step."""
    torch.manual_seed(0)
    pipe = HunyuanSkyreelsImageToVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**_language())),
        tokenizer=_tokenizer(),
        transformer=_hunyuan_transformer(in_channels=8),
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip_text(),
        tokenizer_2=_tokenizer(),
    )
    return _quiet(pipe), _call(image=_image(32, 48), max_sequence_length=16, **TRUE_CFG)


def ltx_condition(noise: float = 0.15) -> tuple[Any, dict[str, Any]]:
    """As `ltx_i2v`; the given tokens get noise anew at each step, as much as `noise` at the first one."""
    pipe = latte_to_qwen._ltx(LTXConditionPipeline)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    call = _call(**latte_to_qwen.LTX_CALL, image=_image(32, 64), image_cond_noise_scale=noise)
    return pipe, call


def easyanimate_inpaint() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6), 1 channel of mask and 4 of the video as an argument of their own; tokens (18, 32)."""
    pipe, call = cosmos_and_more.easyanimate(EasyAnimateInpaintPipeline, in_channels=9)
    pipe.vae.register_to_config(cache_mag_vae=True)  # as in the models' own configuration
    video, mask = get_image_to_video_latent(_image(32, 48), None, 9, (32, 48))
    return pipe, {**call, "video": video, "mask_video": mask}


def cosmos1_v2w(sigma: float = 0.001) -> tuple[Any, dict[str, Any]]:
    """As `cosmos1`, the first latent frame given, with a little noise anew at each call."""
    pipe, call = cosmos_and_more.cosmos1(CosmosVideoToWorldPipeline, in_channels=17)
    return pipe, {**call, "image": _image(32, 48), "augment_sigma": sigma}


def cosmos25_image() -> tuple[Any, dict[str, Any]]:
    """As `cosmos25`, the first latent frame given."""
    pipe, call = cosmos_and_more.cosmos25()
    return pipe, {**call, "image": _image(32, 48)}


def motif_video_i2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) + 16 image channels + 1 of mask; tokens (18, 24), beside 4 of the image."""
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    pipe, call = cosmos_and_more.motif_video("MotifVideoImage2VideoPipeline", feature_extractor=processor)
    return pipe, {**call, "image": _image(32, 48)}


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "wan21_i2v_last_image": wan_to_kandinsky.wan21_i2v_last_image,
    "wan22_a14b_t2v_low": wan_to_kandinsky.wan22_a14b_t2v,
    "skyreels_v2_i2v": skyreels_v2_i2v,
    "skyreels_v2_df_i2v": skyreels_v2_df_i2v,
    "skyreels_v2_df_fps": lambda: wan_to_kandinsky.skyreels_v2_df(inject_sample_info=True),
    "cogvideox15_i2v": lambda: wan_to_kandinsky.cogvideox_i2v("1.5"),
    "hunyuan_true_cfg": hunyuan_true_cfg,
    "hunyuan_i2v_true_cfg": hunyuan_i2v_true_cfg,
    "hunyuan_i2v_concat": hunyuan_i2v_concat,
    "hunyuan_skyreels_i2v": hunyuan_skyreels_i2v,
    "kandinsky5_nabla": kandinsky5_nabla,
    "ltx_condition": ltx_condition,
    "ltx_condition_clean": lambda: ltx_condition(0.0),
    "easyanimate_inpaint": easyanimate_inpaint,
    "cosmos1_v2w": cosmos1_v2w,
    "cosmos1_v2w_clean": lambda: cosmos1_v2w(0.0),
    "cosmos25_image": cosmos25_image,
    "motif_video_i2v": motif_video_i2v,
}
