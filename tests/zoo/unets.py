"""Tiny real diffusers pipelines with U-Nets: AnimateDiff, Stable Diffusion 1.5 and XL, each also from what it is given.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video or image, without batch axis; "tokens" are cells of the U-Net's middle, in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tests.tiny import tokenizer
from tests.zoo.editing import _video
from tests.zoo.latte_to_qwen import _clip_projected, _frame_vae
from tests.zoo.wan_to_kandinsky import _clip_text, _image, _quiet

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 6, "guidance_scale": 4.0}


def _unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {"cross_attention_dim": 8, "attention_head_dim": 8, "in_channels": 4, **changes}
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        **settings,
    )
    for part in unet.modules():
        if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (
            3,
            3,
        ):  # centred, as trained
            centre = part.weight.data[..., 1, 1].clone()
            part.weight.data.mul_(0.3)[..., 1, 1] = centre
    return unet


def _unet_xl(**changes: Any) -> UNet2DConditionModel:
    return _unet(
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        **{"projection_class_embeddings_input_dim": 64, **changes},
    )


def _motion() -> dict[str, Any]:
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="linspace", steps_offset=1)
    return {"motion_adapter": adapter, "scheduler": scheduler}


def _one_text(**changes: Any) -> dict[str, Any]:
    """The parts beside the U-Net that Stable Diffusion 1.5 has."""
    parts = {"vae": _frame_vae(), "text_encoder": _clip_text(), "tokenizer": tokenizer(77)}
    return {
        **parts,
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing", steps_offset=1),
        **changes,
    }


def _two_texts(**changes: Any) -> dict[str, Any]:
    """The parts beside the U-Net that Stable Diffusion XL has."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    parts = _one_text(text_encoder_2=_clip_projected(), tokenizer_2=tokenizer(77), scheduler=scheduler)
    return {**parts, **changes}


NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def animatediff() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 2, 8, 12); tokens (48, 32), there as (2 frames, 32, 4, 6)."""
    torch.manual_seed(0)
    pipe = AnimateDiffPipeline(unet=_unet(), **_one_text(**_motion()))
    return _quiet(pipe), {**CALL, "num_frames": 2}


def animatediff_v2v() -> tuple[Any, dict[str, Any]]:
    """As `animatediff`, from a video on."""
    torch.manual_seed(0)
    pipe = AnimateDiffVideoToVideoPipeline(unet=_unet(), **_one_text(**_motion()))
    return _quiet(pipe), {**CALL, "video": _video(64, 96, 2), "strength": 0.8}


def animatediff_sdxl() -> tuple[Any, dict[str, Any]]:
    """As `animatediff`, with the U-Net of Stable Diffusion XL."""
    torch.manual_seed(0)
    pipe = AnimateDiffSDXLPipeline(unet=_unet_xl(), **_two_texts(**_motion()))
    return _quiet(pipe), {**CALL, "num_frames": 2}


def sd15() -> tuple[Any, dict[str, Any]]:
    """Images: latents (4, 8, 12); tokens (24, 32), there as (32, 4, 6); its scheduler takes one step twice."""
    torch.manual_seed(0)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, timestep_spacing="trailing")
    return _quiet(StableDiffusionPipeline(unet=_unet(), **_one_text(scheduler=scheduler), **NO_CHECKER)), dict(CALL)


def sd15_img2img() -> tuple[Any, dict[str, Any]]:
    """As `sd15`, from an image on, with DDIM."""
    torch.manual_seed(0)
    pipe = StableDiffusionImg2ImgPipeline(unet=_unet(), **_one_text(), **NO_CHECKER)
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    return _quiet(pipe), {**call, "image": _image(64, 96), "strength": 0.8}


def sd15_inpaint() -> tuple[Any, dict[str, Any]]:
    """As `sd15`, + 1 channel of mask and 4 of the image outside it, with DDIM."""
    torch.manual_seed(0)
    pipe = StableDiffusionInpaintPipeline(unet=_unet(in_channels=9), **_one_text(), **NO_CHECKER)
    return _quiet(pipe), {**CALL, "image": _image(64, 96), "mask_image": _mask()}


def lcm() -> tuple[Any, dict[str, Any]]:
    """As `sd15`; the guidance is an input of the network, and each step draws noise."""
    torch.manual_seed(0)
    parts = {**_one_text(scheduler=LCMScheduler(**BETAS)), **NO_CHECKER}
    return _quiet(LatentConsistencyModelPipeline(unet=_unet(time_cond_proj_dim=8), **parts)), dict(CALL)


def _mask(height: int = 64, width: int = 96) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 3, height // 4, width * 5 // 6, height * 3 // 4))
    return mask


def sdxl() -> tuple[Any, dict[str, Any]]:
    """Images: latents (4, 8, 12); tokens (24, 32); sizes of image and crop in a dictionary."""
    torch.manual_seed(0)
    return _quiet(StableDiffusionXLPipeline(unet=_unet_xl(), **_two_texts())), dict(CALL)


def sdxl_img2img() -> tuple[Any, dict[str, Any]]:
    """As `sdxl`, from an image on."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLImg2ImgPipeline(unet=_unet_xl(), **_two_texts())
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    return _quiet(pipe), {**call, "image": _image(64, 96), "strength": 0.8}


def sdxl_inpaint() -> tuple[Any, dict[str, Any]]:
    """As `sdxl`, with what is outside the mask put back after each step."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLInpaintPipeline(unet=_unet_xl(), **_two_texts())
    return _quiet(pipe), {**CALL, "image": _image(64, 96), "mask_image": _mask(), "strength": 0.8}


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "animatediff": animatediff,
    "animatediff_v2v": animatediff_v2v,
    "animatediff_sdxl": animatediff_sdxl,
    "sd15": sd15,
    "sd15_img2img": sd15_img2img,
    "sd15_inpaint": sd15_inpaint,
    "lcm": lcm,
    "sdxl": sdxl,
    "sdxl_img2img": sdxl_img2img,
    "sdxl_inpaint": sdxl_inpaint,
}
