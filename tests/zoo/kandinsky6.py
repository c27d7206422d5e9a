"""A tiny Kandinsky 6, which denoises a sound beside the video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    PiflowScheduler,
)
from tests.tiny import TEXT_WIDTH
from tests.zoo.wan_to_kandinsky import (
    _call,
    _clip_text,
    _hunyuan_vae,
    _opened,
    _quiet,
    _qwen,
    _template_tokenizer,
    _tokenizer,
)


def kandinsky6(distilled: bool = False) -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 6, 4), channels last, + 4 + 1 channels of zeros; tokens (18, 32), beside 12 of a sound.

    distilled: it gives three predictions a step, between which its scheduler goes on without it.
    """
    torch.manual_seed(0)
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=12 if distilled else 4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        in_audio_dim=2,
        out_audio_dim=6 if distilled else 2,
        model_dim_a=16,
        ff_dim_a=24,
        axes_dims_a=(4, 2, 2),
        ca_rope=False,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    sounds = MMAudioVAE(8, 2, 8, (1, 2), 1, sample_rate=256, n_fft=16, hop_length=4)
    for model in (transformer, sounds):
        _opened(model, 0.05)
    pipe = Kandinsky6TI2VAPipeline(
        transformer=transformer,
        vae=_hunyuan_vae(),
        text_encoder=_qwen(),
        tokenizer=_template_tokenizer(),
        text_encoder_2=_clip_text(),
        tokenizer_2=_tokenizer(),
        scheduler=PiflowScheduler(n_grid=3) if distilled else FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=sounds,
        vocoder=MMAudioVocoder(8, 8, (2, 2), (4, 4), (3,), ((1, 3),)),
    )
    guided = {"guidance_scale": 1.0} if distilled else {"guidance_scale": 4.0, "negative_prompt": "still"}
    return _quiet(pipe), _call(max_sequence_length=16, **guided)


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {"kandinsky6": kandinsky6}
