"""Layouts: convert latents of a sampling loop to (B, C, T, H, W), and a block's output to tokens in raster order.

Layouts by name: "BCTHW" and the like for plain axes ("BCHW": images, T = 1; "BCT", "BTC": sounds, H = W = 1),
"BLC" for tokens packed in raster order from patches of one cell (LTX-Video), "BLC2" from patches of 2 x 2 cells (Flux,
Qwen-Image); "BCHW2" for images whose channels hold squares of 2 x 2 cells (ERNIE-Image).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prism.errors import PrismError, instance, is_bool, quoted

Layout = Literal["BCTHW", "BTCHW", "BTHWC", "BCHW", "BCHW2", "BCT", "BTC", "BLC", "BLC2"]
TokenForm = Literal["BLD", "LBD", "temporal", "frames"]  # plain, two | Latte's (B H W, T, D) | a U-Net's (B T, D, H, W)
Grid = tuple[int, int, int]
STANDARD = "BCTHW"


def channel_axis(layout: Layout) -> int:
    """The index of the channels' axis."""
    return layout.index("C")


def is_packed(layout: Layout) -> bool:
    """True for latents that are packed into tokens, (B, L, C), and so do not show their grid."""
    return layout.startswith("BL")


def unpack(latents: Tensor, layout: Layout, grid: Grid | None = None) -> Tensor:
    """Latents of the loop as (B, C, T, H, W). `grid`: (T, H, W) in tokens, needed for packed latents."""
    if layout == "BCHW2":
        squares: Tensor = latents.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
        return squares.flatten(4, 5).flatten(2, 3).unsqueeze(2)
    if not is_packed(layout):
        missing = [axis for axis in STANDARD if axis not in layout]
        axes = layout + "".join(missing)
        return latents.reshape(*latents.shape, *[1] * len(missing)).permute(*[axes.index(axis) for axis in STANDARD])
    if grid is None:
        raise PrismError("Packed latents do not tell their grid (T, H, W) in tokens; give it.")
    cells: Tensor = latents.unflatten(1, grid)  # (B, T, H, W, C')
    if layout == "BLC":
        return cells.permute(0, 4, 1, 2, 3)
    cells = cells.unflatten(-1, (-1, 2, 2)).permute(0, 4, 1, 2, 5, 3, 6)
    return cells.flatten(5, 6).flatten(3, 4)


def pack(latents: Tensor, layout: Layout) -> Tensor:
    """(B, C, T, H, W) to the loop's form: the inverse of `unpack`."""
    if layout == "BCHW2":
        latents = latents[:, :, 0].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return latents.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    if not is_packed(layout):
        missing = [axis for axis in STANDARD if axis not in layout]
        permuted = latents.permute(*[STANDARD.index(axis) for axis in (*layout, *missing)])
        return permuted.flatten(len(layout) - 1) if missing else permuted
    if layout == "BLC2":
        latents = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)
    return latents.flatten(2).transpose(1, 2)


def from_squares(states: Tensor, grid: Grid, side: int = 8) -> Tensor:
    """Tokens (B, L, D) ordered by squares of `side` x `side`, reordered to raster order."""
    frames, height, width = grid
    squares: Tensor = states.unflatten(1, (frames, height // side, width // side, side, side))
    return squares.transpose(3, 4).flatten(1, 5)


def grid_of(coordinates: Tensor) -> Grid:
    """The grid (T, H, W) of tokens at `coordinates` (3, L).

    Raises PrismError where they are not a full grid in raster order, as where a condition's tokens come first.
    """
    grid = tuple(len(axis.unique()) for axis in coordinates)
    if grid[0] * grid[1] * grid[2] != coordinates.shape[1] or bool((coordinates[0].diff() < 0).any()):
        raise PrismError(
            "Conditions at later frames are tokens before the video's own, which a judge cannot tell apart; give "
            "conditions at frame_index 0."
        )
    return grid  # type: ignore[return-value]


def tokens(output: Tensor, form: TokenForm, batch: int) -> Tensor:
    """A block's output as (B, L, D), raster order t, h, w."""
    if form == "temporal":
        output = output.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
    elif form == "frames":
        output = output.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    elif form == "LBD":
        output = output.transpose(0, 1)
    return output


def text_rows(text: Tensor) -> Tensor:
    """The text of a denoiser call, before or after its embedder, as (B, Lt, width)."""
    if text.ndim < 3:
        raise PrismError(
            f"The text that the denoiser is given must be (B, tokens, width); found the shape {tuple(text.shape)}, so "
            "give prompt_embeds with an axis for tokens."
        )
    return text.flatten(1, -2)


def check_noise(noise: Any, latents: Tensor) -> None:
    """Raise PrismError unless noise has the shape of the latents (B, ...), or of one row of them."""
    instance("noise", noise, Tensor, "a tensor")
    if noise.shape[1:] != latents.shape[1:] or len(noise) not in (1, len(latents)):
        shapes = f"{tuple(noise.shape)} and {tuple(latents.shape)}"
        raise PrismError(f"noise must be of the latents' shape; found the shapes {shapes}.")


def per_row(t: Tensor | float, latents: Tensor) -> Tensor:
    """t as (B,), one per row of the latents. Raises PrismError unless it is a number in [0, 1000], or one per row."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.ndim < 2:
        shape = f" {tuple(latents.shape)} of {latents.dtype}" if isinstance(latents, Tensor) else ""
        raise PrismError(
            f"The latents must be a tensor (B, ...) of floating-point numbers; found a {type(latents).__name__}{shape}."
        )
    if latents.is_meta or latents.layout != torch.strided or len(latents) == 0:
        kind = "none of the numbers" if latents.is_meta else "no rows" if len(latents) == 0 else "a sparse layout"
        raise PrismError(f"The latents must be a dense tensor (B, ...) with at least one row; found {kind}.")
    try:
        if is_bool(t):
            raise TypeError
        levels = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        levels = latents.new_full((), torch.nan)
    if levels.ndim > 1 or len(levels.expand(1) if levels.ndim == 0 else levels) not in (1, len(latents)):
        raise PrismError(
            f"The noise level t must be a number, or one for each of the {len(latents)} rows of the latents; found the "
            f"shape {tuple(levels.shape)}."
        )
    if not bool(((levels >= 0) & (levels <= 1000)).all()):  # NaN fails too
        raise PrismError(f"The noise level t must be from 0 (clean) to 1000 (noise); found {quoted(t, 80)}.")
    return levels.expand(len(latents)) if levels.numel() == 1 else levels
