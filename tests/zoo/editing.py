"""Tiny real diffusers pipelines that take a video: video to video, editing, control; Helios, a window at a time.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video, without batch axis; "tokens" are what a block puts out for one video, in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    CogVideoXDDIMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXVideoToVideoPipeline,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LucyEditPipeline,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tests.tiny import TEXT_WIDTH, text_encoder, tokenizer
from tests.zoo.wan_to_kandinsky import (
    IMAGE_WIDTH,
    _call,
    _clip_processor,
    _clip_vision,
    _cogvideox_parts,
    _image,
    _quiet,
    _unipc,
    _wan_transformer,
    _wan_vae,
)


def _video(height: int = 32, width: int = 48, frames: int = 9) -> list[Image.Image]:
    pixels = np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def _without_frames(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "num_frames"}


def _wan_parts(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    parts = {"tokenizer": tokenizer(), "text_encoder": text_encoder(), "vae": _wan_vae(), "scheduler": _unipc(3.0)}
    return {**parts, **changes}


WAN_CALL = {"guidance_scale": 4.0, "max_sequence_length": 12}


def wan_v2v() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), from the third of six levels on; tokens (18, 24)."""
    pipe = WanVideoToVideoPipeline(**_wan_parts(), transformer=_wan_transformer())
    return _quiet(pipe), {**_without_frames(_call(**WAN_CALL)), "video": _video(), "strength": 0.8}


def lucy_edit() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) + 16 channels of the video; tokens (18, 24)."""
    pipe = LucyEditPipeline(**_wan_parts(), transformer=_wan_transformer(in_channels=32))
    return _quiet(pipe), {**_call(**WAN_CALL), "video": _video()}


def chrono_edit() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 2, 4, 6) + 4 mask + 16 image channels: the image and its edit; tokens (12, 24)."""
    transformer = _wan_transformer(
        ChronoEditTransformer3DModel, in_channels=36, image_dim=IMAGE_WIDTH, added_kv_proj_dim=24
    )
    parts = _wan_parts(image_processor=_clip_processor(), image_encoder=_clip_vision())
    call = _call(num_frames=5, image=_image(32, 48), guidance_scale=4.0, max_sequence_length=512)
    return _quiet(ChronoEditPipeline(**parts, transformer=transformer)), call


def wan_vace() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), a video and its mask as an argument of their own; tokens (18, 24)."""
    transformer = _wan_transformer(WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=96)
    mask = [Image.new("L", (48, 32), 255 * (index > 3)) for index in range(9)]
    return _quiet(WanVACEPipeline(**_wan_parts(), transformer=transformer)), {
        **_call(**WAN_CALL),
        "video": _video(),
        "mask": mask,
    }


def wan_animate() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), the first frame for the image, + 4 mask + 16 image channels; tokens (18, 24)."""
    transformer = _wan_transformer(
        WanAnimateTransformer3DModel,
        num_layers=4,
        in_channels=36,
        latent_channels=16,
        image_dim=IMAGE_WIDTH,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    parts = _wan_parts(image_processor=_clip_processor(), image_encoder=_clip_vision())
    call = {**_without_frames(_call()), "guidance_scale": 4.0, "max_sequence_length": 512, "image": _image(32, 48)}
    call |= {"pose_video": _video(frames=5), "face_video": _video(16, 16, 5), "segment_frame_length": 5}
    return _quiet(WanAnimatePipeline(**parts, transformer=transformer)), call


def cogvideox_v2v() -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 4, 6), frames first, from the third of six levels on; tokens (18, 32)."""
    torch.manual_seed(0)
    pipe = CogVideoXVideoToVideoPipeline(**_cogvideox_parts(CogVideoXDDIMScheduler))
    call = _without_frames(_call(guidance_scale=4.0, max_sequence_length=12))
    return _quiet(pipe), {**call, "video": _video(), "strength": 0.8}


def cogvideox_fun_control() -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 4, 6), frames first, + 4 channels of the control video; tokens (18, 32)."""
    torch.manual_seed(0)
    pipe = CogVideoXFunControlPipeline(**_cogvideox_parts(CogVideoXDDIMScheduler, in_channels=8))
    call = _without_frames(_call(guidance_scale=4.0, max_sequence_length=12))
    return _quiet(pipe), {**call, "control_video": _video()}


def helios() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), one window; tokens (18, 24) behind those of an empty history."""
    torch.manual_seed(0)
    transformer = HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=32,
        num_layers=3,
        rope_dim=(4, 4, 4),
    )
    parts = _wan_parts(scheduler=HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True))
    call = {**_call(**WAN_CALL), "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
    return _quiet(HeliosPipeline(**parts, transformer=transformer)), call


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "wan_v2v": wan_v2v,
    "lucy_edit": lucy_edit,
    "chrono_edit": chrono_edit,
    "wan_vace": wan_vace,
    "wan_animate": wan_animate,
    "cogvideox_v2v": cogvideox_v2v,
    "cogvideox_fun_control": cogvideox_fun_control,
    "helios": helios,
}
