"""A small model of Open-Sora 1.2's shape, with random weights: the names and the call of the published one, own code.

Blocks come in pairs, one over the places of a frame and one over the frames of a place; tokens are (B, T S, C) between
them. Text is (B, 1, Lt, width) with a mask, and what the mask leaves out is dropped, as its packed attention does.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from tests.tiny import TEXT_WIDTH, text_encoder, tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from prism.backbone import OpenSoraPipeline

WIDTH, HEADS, TEXT_LENGTH = 24, 2, 12


def _waves(values: Tensor, width: int) -> Tensor:
    """(..., width): sines and cosines of values, which may be fractional."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=values.device) / (width // 2))
    angles = values[..., None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class Scalar(nn.Module):
    """Embeds a number a row."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(_waves(values, 16).to(self.mlp[0].weight.dtype))


class Caption(nn.Module):
    """Projects text, and holds the null text of guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(nn.Linear(TEXT_WIDTH, WIDTH), nn.GELU("tanh"), nn.Linear(WIDTH, WIDTH))
        self.register_buffer("y_embedding", torch.randn(TEXT_LENGTH, TEXT_WIDTH) / TEXT_WIDTH**0.5)

    def forward(self, caption: Tensor, train: bool = False) -> Tensor:
        return self.y_proj(caption)


class Block(nn.Module):
    """Attention over space or time, attention to the text, and an MLP, modulated by the timestep."""

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Tensor, T: int, S: int) -> Tensor:
        table = self.scale_shift_table + t.unflatten(1, (6, -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unsqueeze(2).unbind(1)
        states = (self.norm(x) * (1 + scale) + shift).unflatten(1, (T, S))
        states = (states.transpose(1, 2) if self.temporal else states).flatten(0, 1)
        if self.temporal:
            states = states + _waves(torch.arange(T, device=x.device), WIDTH).to(x.dtype)
        states = self.attn(states, states, states, need_weights=False)[0].unflatten(0, (len(x), -1))
        x = x + gate * (states.transpose(1, 2) if self.temporal else states).flatten(1, 2)
        x = x + self.cross_attn(x, y, y, key_padding_mask=~mask, need_weights=False)[0]
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class TinySTDiT3(nn.Module):
    """Called with x, timestep, y, mask, fps, height, width, gives (B, 2 C, T, H, W), float32: velocity and variance."""

    def __init__(self, depth: int = 3, in_channels: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH, patch_size=(1, 2, 2), in_channels=in_channels, depth=depth)
        self.input_sq_size, self.out_channels = 512, 2 * in_channels
        self.x_embedder = nn.Conv3d(in_channels, WIDTH, (1, 2, 2), (1, 2, 2))
        self.t_embedder, self.fps_embedder, self.y_embedder = Scalar(), Scalar(), Caption()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.spatial_blocks = nn.ModuleList([Block(temporal=False) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([Block(temporal=True) for _ in range(depth)])
        self.final_layer = nn.Linear(WIDTH, 4 * self.out_channels)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor,
        x_mask: Any = None,
        fps: Any = None,
        height: Any = None,
        width: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert x_mask is None
        dtype, (H, W) = self.x_embedder.weight.dtype, x.shape[3:]
        x = F.pad(x.to(dtype), (0, W % 2, 0, H % 2))
        t = self.t_embedder(timestep) + self.fps_embedder(fps)
        y = self.y_embedder(y.to(dtype), self.training).squeeze(1)
        x = self.x_embedder(x)
        T, h, w = x.shape[2:]
        scale = (height[0].item() * width[0].item()) ** 0.5 / self.input_sq_size
        rows, columns = (_waves(torch.arange(n, device=x.device) / scale, WIDTH // 2) for n in (h, w))
        places = torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], -1).flatten(0, 1)
        x = x.flatten(2).transpose(1, 2) + places.to(dtype).repeat(T, 1)
        modulation = self.t_block(t)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, y, modulation, mask.bool(), T, h * w)
            x = temporal(x, y, modulation, mask.bool(), T, h * w)
        x = self.final_layer(x).view(len(x), T, h, w, 2, 2, -1)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return x[..., :H, :W].float()


class TinyVAE(nn.Module):
    """Frames one by one through a 2-D autoencoder, then 17 of them into 5 and a rest by fours, padded in front.

    As the published one it normalises by itself, gives tensors, and draws from its posterior.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spatial_vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
        )
        self.register_buffer("shift", torch.tensor([-0.1, 0.34, 0.27, 0.98]).view(1, 4, 1, 1, 1))
        self.register_buffer("scale", torch.tensor([3.85, 2.32, 2.33, 3.06]).view(1, 4, 1, 1, 1))
        self.out_channels = 4

    def get_latent_size(self, size: Any) -> list[int]:
        frames, height, width = size
        return [frames // 17 * 5 + -(-(frames % 17) // 4), height // 8, width // 8]

    def encode(self, x: Tensor) -> Tensor:
        frames = self.spatial_vae.encode(x.transpose(1, 2).flatten(0, 1)).latent_dist.sample()
        parts = []
        for part in frames.unflatten(0, (len(x), -1)).transpose(1, 2).split(17, 2):
            padded = torch.cat([part[:, :, :1]] * (-part.shape[2] % 4) + [part], 2)
            parts.append(padded.unflatten(2, (-1, 4)).mean(3))
        return (torch.cat(parts, 2) - self.shift) / self.scale

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        parts = []
        for part in (z * self.scale + self.shift).split(5, 2):
            length, num_frames = min(17, num_frames), num_frames - 17
            parts.append(part.repeat_interleave(4, 2)[:, :, -length % 4 :])
        frames = torch.cat(parts, 2).transpose(1, 2)
        return self.spatial_vae.decode(frames.flatten(0, 1)).sample.unflatten(0, (len(z), -1)).transpose(1, 2)


def opensora() -> tuple[Any, dict[str, Any]]:
    """Latents (4, 5, 4, 6); 30 tokens of width 24."""
    torch.manual_seed(0)
    pipe = OpenSoraPipeline(TinySTDiT3().eval(), TinyVAE().eval(), text_encoder(), tokenizer())
    pipe._progress_bar_config = {"disable": True}
    call = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 6, "guidance_scale": 4.0}
    return pipe, {**call, "fps": 24, "max_sequence_length": TEXT_LENGTH}
