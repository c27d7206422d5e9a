"""ShapeWorld's generator: a stock diffusers `WanPipeline` built from configurations, with its call arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from . import grammar
from . import vae as video_vae

TEXT_LENGTH = 24  # tokens; the longest prompt of the grammar has 20
FLOW_SHIFT = 1.0  # of the sampler: these latents are small, and a larger shift samples no better


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar; anything else is `<unk>`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *grammar.words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A two-layer UMT5 encoder of width 64."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_transformer(layers: int = 6, heads: int = 4) -> WanTransformer3DModel:
    """A Wan transformer over 80 tokens (5x4x4 latent cells); width is 32 a head."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=video_vae.LATENT_CHANNELS,
        out_channels=video_vae.LATENT_CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * 32 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def assemble(vae: AutoencoderKLWan, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> WanPipeline:
    """The pipeline as users meet it: Euler flow scheduler, everything else stock."""
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_vae(run: Path) -> AutoencoderKLWan:
    """The VAE of a training run: trained, or as far as it is."""
    return AutoencoderKLWan.from_pretrained(run / "vae" if (run / "vae").is_dir() else run / "fitted").eval()


def load_generator(folder: Path) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """The transformer, in float32, and the text encoder that lie in a folder."""
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", use_safetensors=True).float()
    return transformer.eval(), UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True).eval()


def load(folder: str | Path, **parts: Any) -> WanPipeline:
    """Load a saved ShapeWorld pipeline with plain diffusers; its half-precision weights come up in float32.

    `parts` replace parts of it, such as `transformer=`.
    """
    bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    try:
        for log in bars:  # it takes a fraction of a second
            log.disable_progress_bar()
        pipe = WanPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **parts)
    finally:
        for log in bars:
            log.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_weaker(folder: Path, weaker: Path) -> WanPipeline:
    """The pipeline in `folder` with the transformer and text encoder of `weaker`."""
    transformer, text_encoder = load_generator(weaker)
    return load(folder, transformer=transformer, text_encoder=text_encoder)


def save_weaker(pipe: WanPipeline, folder: Path) -> None:
    """What `load_weaker` reads: the transformer in half precision, and the text encoder."""
    pipe.transformer.half().save_pretrained(folder / "transformer")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
