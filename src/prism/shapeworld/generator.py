"""The embedded generator: its files, its video VAE and its pipeline, and how each is built, loaded and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from prism import files
from prism.errors import PrismError
from prism.shapeworld import grammar, world

ROOT = Path(__file__).parent / "assets"
MANIFEST = "manifest.json"


def asset_folder(name: str) -> Path:
    """The folder of an asset: `pipeline`, the weaker `early` and `small`, `candidates`, `head`, `pixel`, ...

    Raises PrismError where a file of its manifest is missing or differs from the one that was shipped.
    """
    folder = ROOT / name
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise PrismError(f"The embedded asset {manifest} is missing; install the package again.")
    for relative, digest in files.read_json(manifest).items():
        path = folder / relative
        if not path.is_file():
            raise PrismError(f"The embedded asset {path} is missing; install the package again.")
        if files.sha256(path) != digest:
            raise PrismError(f"The embedded asset {path} was altered; install the package again.")
    return folder


def write_manifest(folder: Path) -> None:
    """List every data file of an asset with its SHA-256."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, "README.md"))
    files.write_json(folder / MANIFEST, {str(path.relative_to(folder)): files.sha256(path) for path in paths})


LATENT_CHANNELS = 48
OFFSET, GAIN = 64.0, 4096.0  # make the encoder's last norm and SiLU linear, see `_write_linear_head`


def build(channels: int = LATENT_CHANNELS) -> AutoencoderKLWan:
    """An untrained VAE: 16x16x4 compression, `(B, 3, 17, 64, 64)` in [-1, 1] to `(B, channels, 5, 4, 4)`."""
    return AutoencoderKLWan(
        base_dim=48,
        decoder_base_dim=32,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=4,
        in_channels=48,
        out_channels=48,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def to_input(video: Tensor) -> Tensor:
    """Video (B, T, H, W, 3) in [0, 1] to the input of the VAE, (B, 3, T, H, W) in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3) * 2 - 1


def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of rows (N, D), computed in float64: mean (D,), the first `count` directions (count, D) and
    their variances (count,).
    """
    rows = rows.double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return mean.float(), vectors.flip(1)[:, :count].T.float(), values.flip(0)[:count].float()


def _fit_space(hidden: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halve space by principal components: hidden (B, C, T, H, W) to (B, width, T, H/2, W/2).

    Returns the result, its 2x2 kernel (width, C, 2, 2) and its bias (width,)."""
    channels = hidden.shape[1]
    blocks = hidden.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6)  # (B, T, h, w, C, 2, 2)
    rows = blocks.reshape(-1, channels * 4)
    mean, directions, _ = principal(rows, width)
    bias = -directions @ mean
    out = (rows @ directions.T + bias).reshape(*blocks.shape[:4], width).permute(0, 4, 1, 2, 3)
    return out, directions.reshape(width, channels, 2, 2), bias


def _fit_time(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Halve time after the first frame: each pair of frames, 2 C numbers, becomes C.

    The C directions are rotated so that the code of two equal frames is near that of one. Returns the result, its
    kernel (C, C, 2) and its bias (C,)."""
    width = hidden.shape[1]
    pairs = hidden[:, :, 1:].unfold(2, 2, 2).permute(0, 2, 3, 4, 5, 1)  # (B, t, H, W, 2, C)
    rows = pairs.reshape(-1, 2 * width)
    mean, directions, _ = principal(rows, width)
    still = hidden.permute(0, 2, 3, 4, 1).reshape(-1, width)
    coded = torch.cat([still, still], 1) @ directions.T
    # orthogonal Procrustes: the rotation that brings `coded` nearest to `still`
    u, _, v = torch.linalg.svd(still.T.double() @ coded.double())
    directions = (u @ v).float() @ directions / 2**0.5
    bias = -directions @ mean
    coded = (rows @ directions.T + bias).reshape(*pairs.shape[:4], width).permute(0, 4, 1, 2, 3)
    return torch.cat([hidden[:, :, :1], coded], 2), directions.reshape(width, 2, width).transpose(1, 2), bias


@torch.no_grad()
def fit_encoder(vae: AutoencoderKLWan, seed: int = 0, videos: int = 1024) -> float:
    """Write a linear code of pixel blocks into the encoder; return the share of pixel variance that the code loses.

    `videos` random videos are coded, which takes about a minute on one core."""
    video = to_input(world.sample(videos, seed)[0])
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    for name, parameter in encoder.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)

    patch = vae.config.patch_size
    hidden = patchify(video, patch)
    width = hidden.shape[1]
    encoder.conv_in.weight[torch.arange(width), torch.arange(width), -1, 1, 1] = 1.0

    resamplers = [block for block in encoder.down_blocks if hasattr(block, "resample")]
    for block in encoder.down_blocks:
        if block not in resamplers and hasattr(block.conv_shortcut, "weight"):
            keep = torch.arange(block.in_dim)
            block.conv_shortcut.weight[keep, keep] = 1.0
    last_width = encoder.norm_out.gamma.numel() - 1  # the last channel holds a constant
    for block, width in zip(resamplers, (resamplers[0].dim, last_width), strict=True):
        hidden, kernel, bias = _fit_space(hidden, width)
        conv = block.resample[1]
        conv.weight[:width, : kernel.shape[1], :2, :2] = kernel
        conv.bias[:width] = bias
        hidden, kernel, bias = _fit_time(hidden)
        block.time_conv.weight[:width, :width, 1:, 0, 0] = kernel
        block.time_conv.bias[:width] = bias

    _write_linear_head(vae, hidden)
    latents = torch.cat([encode(vae, chunk) for chunk in video.split(64)])
    # The loss: the residual of the best linear reconstruction of each block of pixels from its latent cell.
    lost = total = 0.0
    for frames, cells in ((video[:, :, :1], latents[:, :, :1]), (video[:, :, 1:], latents[:, :, 1:])):
        step = frames.shape[2] // cells.shape[2]
        blocks = frames.unfold(2, step, step).unfold(3, 16, 16).unfold(4, 16, 16).permute(0, 2, 3, 4, 1, 5, 6, 7)
        pixels = blocks.reshape(-1, 3 * step * 256)
        codes = cells.permute(0, 2, 3, 4, 1).reshape(len(pixels), -1)
        codes = torch.cat([codes, torch.ones(len(codes), 1)], 1).double()
        gram = codes.T @ codes + 1e-6 * torch.eye(codes.shape[1], dtype=torch.float64)
        fit = torch.linalg.solve(gram, codes.T @ pixels.double())
        lost += ((codes @ fit).float() - pixels).square().sum().item()
        total += (pixels - pixels.mean(0)).square().sum().item()
    return lost / total


def _write_linear_head(vae: AutoencoderKLWan, hidden: Tensor) -> None:
    """Write the last linear step of the code, which goes through the encoder's RMS norm and SiLU.

    A large constant channel turns the norm into a division by a constant, and an offset moves every value to where SiLU
    is the identity. Each channel is divided by the fourth root of its variance, so that strong components stay stronger
    than weak ones and more noise is needed to hide them."""
    encoder = vae.encoder
    width, channels = hidden.shape[1], vae.config.z_dim
    encoder.mid_block.attentions[0].proj.bias[:width] = OFFSET
    encoder.mid_block.attentions[0].proj.bias[width] = GAIN * (width + 1) ** 0.5
    encoder.norm_out.gamma.zero_()
    encoder.norm_out.gamma[:width] = GAIN

    rows = hidden.permute(0, 2, 3, 4, 1).reshape(-1, width)
    mean, directions, variances = principal(rows, channels)
    scale = variances**-0.25
    scale = scale / (scale.square() * variances).mean().sqrt()  # mean variance of one over the channels
    kernel = directions * scale[:, None]
    encoder.conv_out.weight[:channels, :width, -1, 1, 1] = kernel
    encoder.conv_out.bias[:channels] = -kernel @ (mean + OFFSET)
    encoder.conv_out.bias[channels:] = -20.0  # log-variance of the posterior: nearly no noise
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    both = torch.arange(2 * channels)
    vae.quant_conv.weight[both, both] = 1.0


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Video (B, 3, T, H, W) in [-1, 1] to latents (B, z_dim, t, h, w), which have mean 0 and deviation 1 already."""
    return vae.encode(video).latent_dist.mode()


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The decoder's output before unpatchify and clamp (which has no gradient outside [-1, 1]).

    The stock loop decodes one latent frame at a time. Thanks to its causal cache, one call for all frames after the
    first gives the same."""
    latents = vae.post_quant_conv(latents)
    cache: list = [None] * vae._cached_conv_counts["decoder"]
    first = vae.decoder(latents[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    rest = vae.decoder(latents[:, :, 1:], feat_cache=cache, feat_idx=[0])
    return torch.cat([first, rest], 2)


class LinearCode:
    """The fitted encoder as one matrix for a block of pixels, which gives the same latents much faster."""

    def __init__(self, first: Tensor, rest: Tensor, first_bias: Tensor, rest_bias: Tensor) -> None:
        self.maps = ((1, first, first_bias), (4, rest, rest_bias))

    @classmethod
    @torch.no_grad()
    def of(cls, vae: AutoencoderKLWan) -> LinearCode:
        """Compute the matrices from the responses of the fitted layers to unit impulses, in double precision."""
        encoder, frames, channels = vae.encoder, 5, vae.config.z_dim
        size = 3 * frames * 256
        impulses = torch.cat([torch.eye(size), torch.zeros(1, size)]).view(-1, 3, frames, 16, 16)
        hidden = patchify(impulses, vae.config.patch_size).double()
        for block in (layer for layer in encoder.down_blocks if hasattr(layer, "resample")):
            conv, time_conv = block.resample[1], block.time_conv
            hidden = F.pad(hidden, (0, 0, 0, 0, 0, 0, 0, conv.in_channels - hidden.shape[1]))
            flat = hidden.transpose(1, 2).flatten(0, 1)
            flat = F.conv2d(flat, conv.weight[:, :, :2, :2].double(), conv.bias.double(), stride=2)
            hidden = flat.unflatten(0, (len(impulses), -1)).transpose(1, 2)
            weight, bias = time_conv.weight[:, :, 1:].double(), time_conv.bias.double()
            hidden = torch.cat([hidden[:, :, :1], F.conv3d(hidden[:, :, 1:], weight, bias, stride=(2, 1, 1))], 2)
        head = encoder.conv_out
        bias = encoder.mid_block.attentions[0].proj.bias.double()
        gain = encoder.norm_out.gamma[0].double().squeeze() * len(bias) ** 0.5 / bias.norm()  # of the norm, all but 1
        kernel = head.weight[:channels, :-1, -1, 1, 1].double()
        cells = torch.einsum("zc,nct->nzt", kernel, gain * (hidden[:, :-1, :, 0, 0] + bias[:-1, None]))
        cells = (cells + head.bias[:channels, None].double()).float()
        bias, answers = cells[-1], (cells[:-1] - cells[-1]).view(3, frames, 256, channels, 2)
        first = answers[:, :1, ..., 0].reshape(-1, channels)
        rest = answers[:, 1:, ..., 1].reshape(-1, channels)
        return cls(first, rest, bias[:, 0], bias[:, 1])

    def __call__(self, video: Tensor) -> Tensor:
        """(B, T, H, W, 3) in [0, 1] to latents (B, z_dim, t, h, w)."""
        pixels, parts = to_input(video), []
        for (step, matrix, bias), frames in zip(self.maps, (pixels[:, :, :1], pixels[:, :, 1:]), strict=True):
            blocks = frames.unfold(2, step, step).unfold(3, 16, 16).unfold(4, 16, 16).permute(0, 2, 3, 4, 1, 5, 6, 7)
            cells = blocks.flatten(4) @ matrix + bias
            parts.append(cells.permute(0, 4, 1, 2, 3))
        return torch.cat(parts, 2)


TEXT_LENGTH = 24  # tokens; the longest prompt of the grammar has 20
FLOW_SHIFT = 1.0  # shift of the sampler's noise levels; a larger one samples no better, as these latents are small


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the grammar; any other word is `<unk>`."""
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


def build_transformer(layers: int = 6, heads: int = 4, channels: int = LATENT_CHANNELS) -> WanTransformer3DModel:
    """A Wan transformer over 80 tokens (5x4x4 latent cells); its width is 32 per attention head."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * 32 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def assemble(vae: AutoencoderKLWan, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> WanPipeline:
    """A stock Wan pipeline of these parts, with the Euler flow scheduler."""
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
    """The VAE of a training run; before its training ends, the one with a fitted encoder and an untrained decoder."""
    return AutoencoderKLWan.from_pretrained(run / "vae" if (run / "vae").is_dir() else run / "fitted").eval()


def load_generator(folder: Path) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """Load the transformer, in float32, and the text encoder of a folder."""
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", use_safetensors=True).float()
    return transformer.eval(), UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True).eval()


def load(folder: str | Path, **parts: Any) -> WanPipeline:
    """Load a saved ShapeWorld pipeline with plain diffusers, its half-precision weights in float32.

    `parts` are components to use in place of the saved ones, such as `transformer=`.
    """
    loggers = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    try:
        for log in loggers:  # loading takes a fraction of a second: no progress bar
            log.disable_progress_bar()
        pipe = WanPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **parts)
    finally:
        for log in loggers:
            log.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_weaker(folder: Path, weaker: Path) -> WanPipeline:
    """The pipeline in `folder` with the transformer and text encoder of `weaker`."""
    transformer, text_encoder = load_generator(weaker)
    return load(folder, transformer=transformer, text_encoder=text_encoder)


def save_weaker(pipe: WanPipeline, folder: Path) -> None:
    """Save what `load_weaker` reads: the transformer, in half precision, and the text encoder."""
    pipe.transformer.half().save_pretrained(folder / "transformer")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
