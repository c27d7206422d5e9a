"""A tiny real SANA-WM pipeline: a video from an image and the camera's way; see `tests.zoo.conditioned`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)
from tests.tiny import TEXT_WIDTH
from tests.zoo.ltx2 import vae_of_ltx2
from tests.zoo.sounds import _model
from tests.zoo.wan_to_kandinsky import _image, _language, _quiet, _tokenizer
from transformers import Gemma2Config, Gemma2Model


def _vae() -> AutoencoderKLLTX2Video:
    vae = vae_of_ltx2()
    torch.nn.init.normal_(vae.latents_mean)
    torch.nn.init.uniform_(vae.latents_std, 0.5, 2.0)
    return vae


def sana_wm() -> tuple[Any, dict[str, Any]]:
    """Latents (8, 3, 4, 6), the first frame the image's at timestep 0; tokens (72, 32)."""
    torch.manual_seed(0)
    pipe = SanaWMPipeline(
        tokenizer=_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**{**_language(), "head_dim": 8})),
        vae=_vae(),
        transformer=_model(
            SanaWMTransformer3DModel,
            in_channels=8,
            num_layers=3,
            hidden_size=32,
            num_attention_heads=2,
            linear_head_dim=16,
            softmax_every_n=2,
            chunk_plucker_channels=24,
            caption_channels=TEXT_WIDTH,
            mlp_ratio=1.0,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 4.0}
    call |= {"max_sequence_length": 12, "chi_prompt": ["red"], "image": _image(32, 48)}
    return _quiet(pipe), {**call, "action": "w-8", "intrinsics": [40.0, 40.0, 24.0, 16.0]}


BUILDERS = {"sana_wm": sana_wm}
