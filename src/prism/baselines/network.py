"""The pixel judge's network: convolutions over frames, then a small transformer over what is left and the prompt.

Time is seen by shifting a quarter of the channels a frame on and a quarter a frame back before a convolution (Lin et
al. 2019, Temporal Shift Module), which costs nothing and leaves dense planar convolutions, what CPUs are fastest at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SAID = 64  # width of the prompt's summary, which scales and shifts channels (FiLM, Perez et al. 2018)


class _Block(nn.Module):
    """Residual block of two planar convolutions; the first sees neighbouring frames, the prompt acts between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(_SAID, 2 * width)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        for parameter in self.film.parameters():  # at first the prompt changes nothing
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, frames: int, said: Tensor) -> Tensor:
        """(B * frames, C, H, W) to the same; said: (B, 64)."""
        # One number a video: statistics of a frame or channel would hide what judges look for, such as flicker.
        power = x.float().unflatten(0, (-1, frames)).square().mean((1, 2, 3, 4)).repeat_interleave(frames)
        y = x * (power + 1e-6).rsqrt().to(x.dtype)[:, None, None, None] * self.scale.to(x.dtype)
        y = self.first(_shift(F.relu(y), frames))
        scale, bias = self.film(said).repeat_interleave(frames, 0)[..., None, None].chunk(2, 1)
        return x + self.second(F.relu(y * (1 + scale) + bias))


def _shift(x: Tensor, frames: int) -> Tensor:
    """A quarter of the channels from the frame before, a quarter from the frame after; zeros beyond the ends."""
    part, videos = x.shape[1] // 4, x.unflatten(0, (-1, frames))
    before = F.pad(videos[:, :-1, :part], (0, 0, 0, 0, 0, 0, 1, 0))
    after = F.pad(videos[:, 1:, part : 2 * part], (0, 0, 0, 0, 0, 0, 0, 1))
    shifted = torch.cat([before, after, videos[:, :, 2 * part :]], 2).flatten(0, 1)
    return shifted.contiguous(memory_format=torch.channels_last)


class PixelNetwork(nn.Module):
    """Scores of videos of any length and of frames of at least 16 pixels a side.

    Args:
        text_width: width of the prompt's embeddings.
        num_dimensions: number of scores.
        width: channels at a quarter of the frames' size, a multiple of 8; twice as many at an eighth, and the
            transformer is three times as wide.
        layers: of the transformer.
        dropout: in the transformer's outputs and around the last layers.
    """

    def __init__(
        self, text_width: int, num_dimensions: int = 4, width: int = 64, layers: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"text_width": text_width, "num_dimensions": num_dimensions, "width": width}
        self.options |= {"layers": layers, "dropout": dropout}
        wide = 3 * width
        self.said = nn.Sequential(nn.Linear(text_width, _SAID), nn.ReLU())
        self.stem = nn.Conv2d(8, width, 4, stride=4)  # colours of two frames, and where: x, y
        self.fine = nn.ModuleList([_Block(width)])
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = nn.ModuleList([_Block(2 * width), _Block(2 * width)])
        self.pool = nn.Conv3d(2 * width, wide, 2, stride=2)
        self.place = nn.Linear(3, wide)
        self.text = nn.Linear(text_width, wide)
        layer = nn.TransformerEncoderLayer(
            wide, max(1, wide // 32), 4 * wide, dropout, "relu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for each in self.transformer.layers:
            each.self_attn.dropout = 0.0  # random numbers for every attention weight cost more than they help
        summary = 2 * wide + 4 * width
        self.norm = nn.LayerNorm(2 * wide)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(summary, 2 * width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(2 * width, num_dimensions, bias=False),
        )  # fmt: skip

    def forward(self, videos: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, num_dimensions) of videos (B, T, H, W, 3) in [0, 1] and text (B, Lt, text_width); mask: True if real."""
        real = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        said = self.said((text * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1))

        rows, where = len(videos), _grid(videos.shape[2:4], videos).permute(2, 0, 1)
        x = _even(videos * 2 - 1, 1).unflatten(1, (-1, 2)).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)  # (B, T/2, 6, H, W)
        frames, x = x.shape[1], x.flatten(0, 1)
        x = torch.cat([x, where.expand(len(x), -1, -1, -1)], 1).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for block in self.fine:
            x = block(x, frames, said)
        x = self.down(_even(_even(x, 2), 3))
        for block in self.coarse:
            x = block(x, frames, said)
        x = x.unflatten(0, (rows, frames)).transpose(1, 2)
        looks = [x.mean((2, 3, 4)), x.amax((2, 3, 4))]  # straight to the head: what it learns from first
        for axis in (2, 3, 4):
            x = _even(x, axis)
        x = self.pool(x)

        tokens = x.flatten(2).transpose(1, 2) + self.place(_grid(x.shape[2:], videos).flatten(0, 2))
        seen = tokens.shape[1]
        unreal = torch.cat([real.new_zeros(rows, seen), ~real], 1)
        read = self.transformer(torch.cat([tokens, self.text(text)], 1), src_key_padding_mask=unreal)[:, :seen]
        return self.head(torch.cat([self.norm(torch.cat([read.mean(1), read.amax(1)], 1)), *looks], 1)).float()


def _grid(sizes: torch.Size, like: Tensor) -> Tensor:
    """Coordinates in [-1, 1] of every place of a grid, (*sizes, len(sizes))."""
    axes = [torch.linspace(-1, 1, size, device=like.device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _even(x: Tensor, axis: int) -> Tensor:
    """An odd axis made even by repeating its first place: a causal VAE's first frame stands alone."""
    return torch.cat([x.narrow(axis, 0, 1), x], axis) if x.shape[axis] % 2 else x
