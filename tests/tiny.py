"""Tiny real diffusers pipelines with random weights, built offline from configs in a fraction of a second."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = [
    *(
        "a",
        "red",
        "green",
        "blue",
        "yellow",
        "circle",
        "square",
        "triangle",
        "moves",
        "left",
        "right",
        "up",
        "down",
        "still",
    ),
    *("cat", "runs"),
]
PROMPT = "a red circle moves right"
OTHER_PROMPT = "a blue square moves up"
TEXT_WIDTH = 32

CALL_WAN: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 6,
    "guidance_scale": 4.0,
    "max_sequence_length": 12,
}
CALL_COGVIDEOX: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 6,
    "guidance_scale": 4.0,
    "max_sequence_length": 12,
}


def tokenizer(max_length: int = 64) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that ends each text with `</s>`; unknown words become `<unk>`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def text_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def wan(scheduler: str = "euler", num_layers: int = 3, seed: int = 0) -> WanPipeline:
    """`WanPipeline` with latents (16, 3, 4, 4) and 12 tokens of width 24; scheduler `euler` or `unipc`."""
    torch.manual_seed(seed)
    schedulers = {
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "unipc": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    }
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=32,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae.eval(),
        scheduler=schedulers[scheduler](),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox(scheduler: str = "ddim", num_layers: int = 3, seed: int = 0) -> CogVideoXPipeline:
    """`CogVideoXPipeline` with latents (3, 4, 4, 4), 12 tokens of width 32; scheduler `ddim` or `dpm` (stochastic)."""
    torch.manual_seed(seed)
    schedulers = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        num_layers=num_layers,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=12,
    )
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=schedulers[scheduler](
            prediction_type="v_prediction",
            snr_shift_scale=3.0,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shapeworld() -> WanPipeline:
    """The embedded model's pipeline, untrained, shallow and narrow: latents (48, 5, 4, 4), videos (17, 64, 64, 3)."""
    from prism.shapeworld import generator

    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_config({**generator.build().config, "base_dim": 4, "decoder_base_dim": 4})
    return generator.assemble(vae, generator.build_transformer(layers=2, heads=1), generator.build_text_encoder())
