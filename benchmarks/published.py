"""Published video models at their true configurations, with random weights: facts as data, and pipelines of them.

The facts are those of the model cards and of diffusers' conversion scripts. The denoiser and the VAE are diffusers'
own classes; text encoders are stand-ins of the right width, since a prompt is encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


@dataclass(frozen=True)
class Model:
    """What is published about a model: classes, configurations (None where diffusers' default is it), and its size."""

    pipeline: str
    denoiser: Mapping[str, Any]
    video: tuple[int, int, int]  # height, width, frames
    published_blocks: int
    vae: Mapping[str, Any] = field(default_factory=dict)
    vae_dtype: torch.dtype = torch.bfloat16  # on a GPU
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    text_width: int = 4096


_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
_WAN_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
_HUNYUAN = {"num_attention_heads": 24, "attention_head_dim": 128, "num_refiner_layers": 2, "mlp_ratio": 4.0}
_COGVIDEOX = {"num_attention_heads": 30, "attention_head_dim": 64, "num_layers": 30, "text_embed_dim": 4096}
_DDIM = {
    "prediction_type": "v_prediction",
    "snr_shift_scale": 3.0,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
MODELS: dict[str, Model] = {
    "wan2.1-1.3b": Model(
        "WanPipeline",
        _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        (480, 832, 81),
        30,
        _WAN_VAE,
        torch.float32,
        {"shift": 3.0},
    ),
    "cogvideox-2b": Model(
        "CogVideoXPipeline",
        _COGVIDEOX | {"max_text_seq_length": 226, "sample_width": 90, "sample_height": 60, "sample_frames": 49},
        (480, 720, 49),
        30,
        {"block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3},
        scheduler=_DDIM,
    ),
    "hunyuan-video": Model(  # 2 + 4 of its 20 + 40 blocks
        "HunyuanVideoPipeline",
        _HUNYUAN | {"num_layers": 2, "num_single_layers": 4},
        (720, 1280, 129),
        60,
        {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2},
        scheduler={"shift": 7.0},
    ),
    "wan2.1-14b": Model(  # 5 of its 40 blocks
        "WanPipeline",
        _WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 5},
        (720, 1280, 81),
        40,
        _WAN_VAE,
        torch.float32,
        {"shift": 5.0},
    ),
}
_CLASSES = {
    "WanPipeline": ("WanTransformer3DModel", "AutoencoderKLWan", "FlowMatchEulerDiscreteScheduler"),
    "CogVideoXPipeline": ("CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", "CogVideoXDDIMScheduler"),
    "HunyuanVideoPipeline": (
        "HunyuanVideoTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        "FlowMatchEulerDiscreteScheduler",
    ),
}


def filled(kind: type, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A module of this class and configuration with cheap random weights, built without its own initialisation."""
    with init_empty_weights(include_buffers=False):
        module = kind(**config)
    pool = torch.randn(2**20, device=device)
    kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
    for name, empty in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        own = torch.float32 if set(name.split(".")) & set(kept) else dtype
        value = torch.empty(empty.shape, dtype=own, device=device)
        if value.numel() == max(value.shape, default=1):  # a bias, or a norm's weight
            value.fill_(0.0 if leaf == "bias" else 1.0)
        else:
            scaled, flat = (pool * value[0].numel() ** -0.5).to(own), value.view(-1)
            for start in range(0, flat.numel(), len(pool)):
                flat[start : start + len(pool)] = scaled[: flat.numel() - start]
        module.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return module.to(device).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Knows no word: each becomes `<unk>`."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=4096
    )


def build(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline, with a text encoder of the right width and next to no weights."""
    denoiser, vae, scheduler = (getattr(diffusers, name) for name in _CLASSES[model.pipeline])
    small = {"vocab_size": 2, "intermediate_size": 8, "num_hidden_layers": 3}
    parts: dict[str, Any] = {"tokenizer": tokenizer()}
    if model.pipeline == "HunyuanVideoPipeline":
        pooled = model.denoiser.get("pooled_projection_dim", 768)
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
        llama = LlamaConfig(hidden_size=model.text_width, **heads, **small)
        clip = CLIPTextConfig(hidden_size=pooled, num_attention_heads=1, max_position_embeddings=77, **small)
        parts |= {"text_encoder": LlamaModel(llama), "text_encoder_2": CLIPTextModel(clip)}
        parts["tokenizer_2"] = tokenizer()
    else:
        t5 = T5Config(vocab_size=2, d_model=model.text_width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
        parts["text_encoder"] = T5EncoderModel(t5)
    parts = {name: part.to(device, dtype) if isinstance(part, nn.Module) else part for name, part in parts.items()}
    pipe = getattr(diffusers, model.pipeline)(
        transformer=filled(denoiser, model.denoiser, dtype, device),
        vae=filled(vae, model.vae, model.vae_dtype if device.type == "cuda" else torch.float32, device),
        scheduler=scheduler(**model.scheduler),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reduced(video: tuple[int, int, int], tokens: int | None) -> tuple[int, int, int]:
    """Height, width and frames with about as many tokens as asked for: the shape smaller, then the clip shorter."""
    height, width, frames = video
    if tokens is None:
        return video
    latent_frames = (frames - 1) // 4 + 1
    least = min(latent_frames, 5)
    for divisor in (1, 2, 3, 4, 6, 8, 12, 16):
        h, w = (max(2, round(side / 16 / divisor)) for side in (height, width))
        if h * w * least <= tokens:
            break
    return 16 * h, 16 * w, 4 * (max(1, min(latent_frames, tokens // (h * w))) - 1) + 1
