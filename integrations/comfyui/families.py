"""ComfyUI's model classes beside diffusers' of the same families: configurations, parameter names, calls, tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone import layout

Config = Mapping[str, Any]
Rules = tuple[tuple[str, str], ...]
LEVELS = (0.7, 0.35)  # the noise levels of the two rows of an example, as shares
TEXT, POOLED, CLIP = 32, 24, 1280  # widths of an example's texts, and of CLIP's picture in Wan 2.1


@dataclass(frozen=True)
class Example:
    """The same small inputs for both classes: `latents` (2, C, ...) and arguments by name."""

    latents: Tensor
    comfy: dict[str, Any]
    diffusers: dict[str, Any]


@dataclass(frozen=True)
class Match:
    """What is known of a ComfyUI model class and of the diffusers class that holds the same network.

    kind: the class's name in ComfyUI; diffusers: in diffusers. families: PRISM's, whose judges fit.
    blocks: (name in ComfyUI's patches, attribute) of its lists of blocks, in the order in which they run.
    patch: latent cells (T, H, W) a token. text: the modules that embed the text, one after another. text_first: blocks
    that hold both streams in one have the text's tokens in front.
    names: (pattern, replacement) rules from ComfyUI's parameter names to diffusers', each applied in turn; parts:
    parameters of ComfyUI that are several of diffusers', by the end of their module's name.
    config: ComfyUI's configuration as diffusers'; small: ComfyUI's with two heads, two blocks of a kind, little text.
    example: inputs for two such networks, by the small configuration and the family.
    normalised: ComfyUI's own latent format scales latents as diffusers' pipeline does (else its VAE does).
    """

    kind: str
    diffusers: str
    families: tuple[str, ...]
    blocks: tuple[tuple[str, str], ...]
    text: tuple[str, ...]
    names: Rules
    config: Callable[[Config], dict[str, Any]]
    small: Callable[[Config], dict[str, Any]]
    example: Callable[[Config, str], Example]
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    patch: tuple[int, int, int] = (1, 2, 2)
    text_first: bool = False
    normalised: bool = True

    def block(self, module: nn.Module, number: int) -> tuple[str, int]:
        """The name and index, in ComfyUI's patches, of a block counted from 1 through all lists."""
        index = number - 1
        for name, attribute in self.blocks:
            count = len(getattr(module, attribute))
            if index < count:
                return name, index
            index -= count
        raise IndexError(number)

    def embedded(self, module: nn.Module, context: Tensor) -> Tensor:
        """The text's tokens (B, Lt, D_vis), which do not see the timestep."""
        for name in self.text:
            context = module.get_submodule(name)(context)
        return layout.text_rows(context)

    def state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ComfyUI's parameters under diffusers' names. Those of the last layer, behind all blocks, keep theirs."""
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            module, _, leaf = name.rpartition(".")
            for end, several in self.parts:
                if module.endswith(end):
                    width = value.shape[0] // 3
                    if len(several) == 4:  # query, key and value, and the first layer of the MLP
                        width = state[f"{module.removesuffix(end)}.linear2.weight"].shape[0]
                    sizes = [width] * 3 + [value.shape[0] - 3 * width] * (len(several) == 4)
                    stem = self._renamed(f"{module.removesuffix(end)}.")
                    renamed |= {f"{stem}{part}.{leaf}": each for part, each in zip(several, value.split(sizes))}
                    break
            else:
                renamed[self._renamed(name)] = value
        return renamed

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with(defaults: Config, config: Config) -> dict[str, Any]:
    """The names of `defaults`, with a configuration's values where it has them."""
    return {name: config.get(name, value) for name, value in defaults.items()}


def _small_heads(config: Config, width: str, heads: str, **others: Any) -> dict[str, Any]:
    """A configuration with two heads of their usual width."""
    return {**config, width: 2 * (config[width] // config[heads]), heads: 2, **others}


# -- Wan 2.1 and 2.2


def _wan_config(config: Config) -> dict[str, Any]:
    sees_picture = config["model_type"] == "i2v"
    return {
        "patch_size": tuple(config.get("patch_size", (1, 2, 2))),
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"],
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": config.get("text_dim", 4096),
        "freq_dim": config.get("freq_dim", 256),
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "cross_attn_norm": config.get("cross_attn_norm", True),
        "eps": config.get("eps", 1e-6),
        "image_dim": CLIP if sees_picture else None,
        "added_kv_proj_dim": config["dim"] if sees_picture else None,
        "pos_embed_seq_len": config.get("flf_pos_embed_token_number"),
    }


def _wan_example(config: Config, family: str) -> Example:
    sees_picture = config["model_type"] == "i2v"
    rows = 512 if sees_picture else 7  # diffusers tells text from a picture by the text's usual 512 rows
    latents, text = _numbers(2, config["in_dim"], 2, 6, 4, seed=1), _numbers(2, rows, TEXT, seed=2)
    text[1, 5:] = 0.0
    timestep = 1000 * torch.tensor(LEVELS)
    comfy: dict[str, Any] = {"timestep": timestep, "context": text}
    diffusers = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
    if sees_picture:
        pictures = 2 if config.get("flf_pos_embed_token_number") else 1  # a first and a last frame
        comfy["clip_fea"] = _numbers(2, pictures * 257, CLIP, seed=3)
        diffusers["encoder_hidden_states_image"] = comfy["clip_fea"].view(2 * pictures, 257, CLIP)
    return Example(latents, comfy, diffusers)


_WAN = Match(
    kind="WanModel",
    diffusers="WanTransformer3DModel",
    families=("wan",),
    blocks=(("double_block", "blocks"),),
    text=("text_embedding",),
    names=(
        (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
        (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
        (r"^time_projection\.1\.", "condition_embedder.time_proj."),
        (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
        (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
        (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
        (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
        (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
        (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
        (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.(q|k|v)\.", r".to_\1."),
        (r"\.o\.", ".to_out.0."),
        (r"\.(k|v)_img\.", r".add_\1_proj."),
        (r"\.norm_k_img\.", ".norm_added_k."),
        (r"\.norm3\.", ".norm2."),  # ComfyUI's norm1 and norm2 have no weights
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
        (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    ),
    config=_wan_config,
    small=lambda config: _small_heads(config, "dim", "num_heads", ffn_dim=64, num_layers=2, text_dim=TEXT),
    example=_wan_example,
)

# -- HunyuanVideo and Flux, whose blocks are of one form

_TWO_STREAMS: Rules = (
    (r"^double_blocks\.", "transformer_blocks."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"^time_in\.", "time_text_embed.timestep_embedder."),
    (r"^vector_in\.", "time_text_embed.text_embedder."),
    (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
    (r"\.in_layer\.", ".linear_1."),
    (r"\.out_layer\.", ".linear_2."),
    (r"\.img_mod\.lin\.", ".norm1.linear."),
    (r"\.txt_mod\.lin\.", ".norm1_context.linear."),
    (r"\.modulation\.lin\.", ".norm.linear."),
    (r"\.img_attn\.norm\.query_norm\.(scale|weight)$", ".attn.norm_q.weight"),
    (r"\.img_attn\.norm\.key_norm\.(scale|weight)$", ".attn.norm_k.weight"),
    (r"\.txt_attn\.norm\.query_norm\.(scale|weight)$", ".attn.norm_added_q.weight"),
    (r"\.txt_attn\.norm\.key_norm\.(scale|weight)$", ".attn.norm_added_k.weight"),
    (r"\.norm\.query_norm\.(scale|weight)$", ".attn.norm_q.weight"),
    (r"\.norm\.key_norm\.(scale|weight)$", ".attn.norm_k.weight"),
    (r"\.img_attn\.proj\.", ".attn.to_out.0."),
    (r"\.txt_attn\.proj\.", ".attn.to_add_out."),
    (r"\.img_mlp\.", ".ff."),
    (r"\.txt_mlp\.", ".ff_context."),
    (r"\.(ff|ff_context|mlp)\.0\.", r".\1.net.0.proj."),
    (r"\.(ff|ff_context|mlp)\.2\.", r".\1.net.2."),
    (r"\.mlp\.net\.", ".ff.net."),
    (r"\.linear2\.", ".proj_out."),
)
_FUSED = (
    (".img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (".txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    (".self_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (".linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
)


def _two_streams_config(config: Config) -> dict[str, Any]:
    return {
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_layers": config["depth"],
        "num_single_layers": config["depth_single_blocks"],
        "pooled_projection_dim": config["vec_in_dim"],
        "guidance_embeds": config["guidance_embed"],
    }


def _hunyuan_config(config: Config) -> dict[str, Any]:
    return {
        **_two_streams_config(config),
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "text_embed_dim": config["context_in_dim"],
        "mlp_ratio": config["mlp_ratio"],
        "rope_theta": float(config["theta"]),
        "rope_axes_dim": tuple(config["axes_dim"]),
        "patch_size": config["patch_size"][-1],
        "patch_size_t": config["patch_size"][0],
    }


def _two_streams_small(config: Config) -> dict[str, Any]:
    less = {"context_in_dim": TEXT, "vec_in_dim": POOLED, "depth": 2, "depth_single_blocks": 2}
    return _small_heads(config, "hidden_size", "num_heads", **less)


def _hunyuan_example(config: Config, family: str) -> Example:
    latents, text = _numbers(2, config["in_channels"], 2, 6, 4, seed=1), _numbers(2, 7, TEXT, seed=2)
    pooled, timestep, mask = _numbers(2, POOLED, seed=3), 1000 * torch.tensor(LEVELS), torch.ones(2, 7).long()
    comfy = {"timestep": timestep, "context": text, "y": pooled}  # its mask is of one row
    diffusers = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
    diffusers |= {"pooled_projections": pooled, "encoder_attention_mask": mask}
    if config["guidance_embed"]:
        comfy["guidance"], diffusers["guidance"] = torch.full((2,), 6.0), torch.full((2,), 6000.0)
    return Example(latents, comfy, diffusers)


_HUNYUAN = Match(
    kind="HunyuanVideo",
    diffusers="HunyuanVideoTransformer3DModel",
    families=("hunyuan-video",),
    blocks=(("double_block", "double_blocks"), ("single_block", "single_blocks")),
    text=("txt_in.input_embedder",),
    names=(
        (r"^img_in\.", "x_embedder."),
        (r"^txt_in\.t_embedder\.", "context_embedder.time_text_embed.timestep_embedder."),
        (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
        (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
        (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
        (r"\.self_attn\.proj\.", ".attn.to_out.0."),
        (r"^(context_embedder.*)\.adaLN_modulation\.1\.", r"\1.norm_out.linear."),
        *_TWO_STREAMS,
    ),
    parts=_FUSED,
    config=_hunyuan_config,
    small=_two_streams_small,
    example=_hunyuan_example,
)


def _flux_config(config: Config) -> dict[str, Any]:
    return {
        **_two_streams_config(config),
        "in_channels": config["in_channels"] * config["patch_size"] ** 2,
        "joint_attention_dim": config["context_in_dim"],
        "axes_dims_rope": tuple(config["axes_dim"]),
    }


def _flux_example(config: Config, family: str) -> Example:
    latents, text = _numbers(2, config["in_channels"], 6, 4, seed=1), _numbers(2, 7, TEXT, seed=2)
    pooled, timestep = _numbers(2, POOLED, seed=3), torch.tensor(LEVELS)
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(2.0), indexing="ij"), -1)
    comfy = {"timestep": timestep, "context": text, "y": pooled}
    diffusers = {
        **{"hidden_states": layout.pack(latents[:, :, None], "BLC2"), "encoder_hidden_states": text},
        **{"pooled_projections": pooled, "timestep": timestep},
        **{"img_ids": places.view(-1, 3), "txt_ids": torch.zeros(7, 3)},
    }
    if config["guidance_embed"]:
        comfy["guidance"] = diffusers["guidance"] = torch.full((2,), 3.5)
    return Example(latents, comfy, diffusers)


_FLUX = Match(
    kind="Flux",
    diffusers="FluxTransformer2DModel",
    families=("flux",),
    blocks=(("double_block", "double_blocks"), ("single_block", "single_blocks")),
    text=("txt_in",),
    text_first=True,
    names=((r"^img_in\.", "x_embedder."), (r"^txt_in\.", "context_embedder."), *_TWO_STREAMS),
    parts=_FUSED,
    config=_flux_config,
    small=_two_streams_small,
    example=_flux_example,
)

# -- LTX-Video


def _ltx_config(config: Config) -> dict[str, Any]:
    defaults = {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28}
    channels = config.get("in_channels", 128)
    return _with({**defaults, "caption_channels": 4096}, config) | {"in_channels": channels, "out_channels": channels}


def _ltx_small(config: Config) -> dict[str, Any]:
    width = 2 * _ltx_config(config)["attention_head_dim"]
    less = {"num_attention_heads": 2, "cross_attention_dim": width, "caption_channels": TEXT, "num_layers": 2}
    return {**config, **less}


def _ltx_example(config: Config, family: str) -> Example:
    latents, text = _numbers(2, config.get("in_channels", 128), 2, 3, 2, seed=1), _numbers(2, 7, TEXT, seed=2)
    mask, timestep, rate = torch.ones(2, 7).long(), torch.tensor(LEVELS), 25
    mask[1, 5:] = 0
    comfy = {"timestep": timestep, "context": text, "attention_mask": mask, "frame_rate": rate}
    diffusers = {
        **{"hidden_states": layout.pack(latents, "BLC"), "timestep": 1000 * timestep},
        **{"encoder_hidden_states": text, "encoder_attention_mask": mask},
    }
    if family == "ltx-video-condition":  # frames at the pixels that they show, the first of them alone
        axes = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), torch.arange(2.0), indexing="ij")
        pixels = torch.stack(axes).flatten(1) * torch.tensor([8.0, 32.0, 32.0])[:, None]
        pixels[0] = (pixels[0] + 1 - 8).clamp(min=0) / rate
        diffusers["video_coords"] = pixels.expand(2, -1, -1)
    else:
        diffusers |= {"num_frames": 2, "height": 3, "width": 2, "rope_interpolation_scale": (8 / rate, 32, 32)}
    return Example(latents, comfy, diffusers)


_LTX = Match(
    kind="LTXVModel",
    diffusers="LTXVideoTransformer3DModel",
    families=("ltx-video", "ltx-video-condition"),
    blocks=(("double_block", "transformer_blocks"),),
    text=("caption_projection",),
    patch=(1, 1, 1),
    names=(
        (r"^patchify_proj\.", "proj_in."),
        (r"^adaln_single\.", "time_embed."),
        (r"\.(q|k)_norm\.", r".norm_\1."),
    ),
    config=_ltx_config,
    small=_ltx_small,
    example=_ltx_example,
    normalised=False,
)

# -- Qwen-Image


def _qwen_config(config: Config) -> dict[str, Any]:
    heads = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    sizes = {"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "joint_attention_dim": 3584}
    return _with({**heads, **sizes}, config)


def _qwen_example(config: Config, family: str) -> Example:
    channels = config.get("in_channels", 64) // config.get("patch_size", 2) ** 2
    latents, text = _numbers(2, channels, 1, 12, 8, seed=1), _numbers(2, 7, TEXT, seed=2)
    timestep = torch.tensor(LEVELS)
    diffusers = {
        **{"hidden_states": layout.pack(latents, "BLC2"), "timestep": timestep, "encoder_hidden_states": text},
        **{"encoder_hidden_states_mask": torch.ones(2, 7).bool(), "img_shapes": [[(1, 6, 4)]] * 2},
    }
    return Example(latents, {"timestep": timestep, "context": text}, diffusers)


_QWEN = Match(
    kind="QwenImageTransformer2DModel",
    diffusers="QwenImageTransformer2DModel",
    families=("qwen-image",),
    blocks=(("double_block", "transformer_blocks"),),
    text=("txt_norm", "txt_in"),
    names=(),
    config=_qwen_config,
    small=lambda config: {**config, "num_attention_heads": 2, "num_layers": 2, "joint_attention_dim": TEXT},
    example=_qwen_example,
)

MATCHES: Sequence[Match] = (_WAN, _HUNYUAN, _LTX, _QWEN, _FLUX)
