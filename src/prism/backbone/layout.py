"""Where things lie: latents of a sampling loop as (B, C, T, H, W), a block's output as tokens in raster order.

The forms that occur, by name: "BCTHW" and the like for plain axes ("BCHW": images, T = 1), "BLC" for tokens packed in
raster order from patches of one cell (LTX-Video), "BLC2" from patches of 2 x 2 cells (Flux, Qwen-Image).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["BCTHW", "BTCHW", "BTHWC", "BCHW", "BLC", "BLC2"]
TokenForm = Literal["BLD", "temporal", "frames"]  # plain | Latte's (B H W, T, D) | a U-Net's (B T, D, H, W)
Grid = tuple[int, int, int]
STANDARD = "BCTHW"


def channel_axis(layout: Layout) -> int:
    return layout.index("C")


def is_packed(layout: Layout) -> bool:
    return layout.startswith("BL")


def unpack(latents: Tensor, layout: Layout, grid: Grid | None = None) -> Tensor:
    """Latents of the loop as (B, C, T, H, W). `grid`: (T, H, W) in tokens, which packed latents do not tell."""
    if layout == "BCHW":
        return latents.unsqueeze(2)
    if not is_packed(layout):
        return latents.permute(*[layout.index(axis) for axis in STANDARD])
    assert grid is not None
    cells = latents.unflatten(1, grid)  # (B, T, H, W, C')
    if layout == "BLC":
        return cells.permute(0, 4, 1, 2, 3)
    return cells.unflatten(-1, (-1, 2, 2)).permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def pack(latents: Tensor, layout: Layout) -> Tensor:
    """(B, C, T, H, W) to the loop's form: the inverse of `unpack`."""
    if layout == "BCHW":
        return latents.squeeze(2)
    if not is_packed(layout):
        return latents.permute(*[STANDARD.index(axis) for axis in layout])
    if layout == "BLC2":
        latents = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)
    return latents.flatten(2).transpose(1, 2)


def tokens(output: Tensor, form: TokenForm, batch: int) -> Tensor:
    """A block's output as (B, L, D), raster order t, h, w."""
    if form == "temporal":
        return output.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
    if form == "frames":
        return output.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    return output


def per_row(t: Tensor | float, latents: Tensor) -> Tensor:
    """t as (B,) beside latents (B, ...)."""
    t = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    return t.expand(len(latents)) if t.ndim == 0 else t
