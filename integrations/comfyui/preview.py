"""Strips of what candidates looked like where they were judged: a linear map from latents to colours, and no decode.

The map is fitted once per VAE by least squares: a small picture of known colours is encoded, and its latents are
regressed on the mean colour of the pixels that each of them stands for. Without a VAE, ComfyUI's own factors are taken.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from prism.errors import reason

SIDE, FRAMES = 256, 9  # of the picture that a map is fitted on, in pixels and (for video) frames
HEIGHT, COLUMNS = 96, 6  # of a candidate's row: pixels, and frames beside one another
_fitted: WeakKeyDictionary[Any, LinearMap] = WeakKeyDictionary()  # by VAE, which goes when ComfyUI drops it


@dataclass(frozen=True)
class LinearMap:
    """Colours in [0, 1] of latents: `factors` (C, 3) and `bias` (3,), float32; `error`: the fit's, root mean square."""

    factors: Tensor
    bias: Tensor
    error: float | None = None

    def frames(self, latents: Tensor) -> Tensor:
        """(T, h, w, 3) float32 in [0, 1] of latents (C, h, w) or (C, T, h, w), a pixel a cell."""
        cells = latents.detach().float().cpu()
        cells = cells.unsqueeze(1) if cells.ndim == 3 else cells
        return (torch.einsum("cthw,cd->thwd", torch.nan_to_num(cells), self.factors) + self.bias).clamp(0, 1)


def fitted(vae: Any) -> LinearMap:
    """The map of a VAE of ComfyUI, fitted at its first use."""
    if vae not in _fitted:
        target = picture()
        latents = vae.encode(target[None].repeat(FRAMES, 1, 1, 1)).detach().float().cpu()
        if latents.ndim == 4:
            latents = latents[:1, :, None]  # each frame was encoded by itself
        size = tuple(latents.shape[-2:])
        colours = adaptive_avg_pool2d(target.movedim(-1, 0)[None], size)[0].flatten(1).T  # (cells, 3)
        cells = latents[0].flatten(2).movedim(0, -1)  # (T, cells, C); the picture stands still
        known = torch.cat([cells, torch.ones(*cells.shape[:2], 1)], -1).flatten(0, 1).double()
        wanted = colours.repeat(len(cells), 1).double()
        solution = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
        error = float((known @ solution - wanted).square().mean().sqrt())
        _fitted[vae] = LinearMap(solution[:-1].float(), solution[-1].float(), error)
        logging.info("PRISM: colours of latents are fitted with an error of %.3f.", error)
    return _fitted[vae]


def picture() -> Tensor:
    """(256, 256, 3) float32 in [0, 1]: patches of random colours in three sizes, soft gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(1, 3, side, side, generator=generator) for side in (4, 8, 16)]
    sharp = [interpolate(layer, (SIDE, SIDE), mode="nearest") for layer in layers]
    soft = interpolate(layers[1], (SIDE, SIDE), mode="bilinear")
    return (0.3 * sharp[0] + 0.25 * sharp[1] + 0.2 * sharp[2] + 0.25 * soft)[0].movedim(0, -1)


def of_model(latent_format: Any) -> LinearMap | None:
    """ComfyUI's own map of a latent format, or None where it has none. It gives colours from -1 to 1."""
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if factors is None:
        return None
    table, bias = torch.tensor(factors), getattr(latent_format, "latent_rgb_factors_bias", None)
    return LinearMap(table / 2, (torch.zeros(3) if bias is None else torch.tensor(bias)) / 2 + 0.5)


def map_of(vae: Any, latent_format: Any) -> LinearMap | None:
    """The map fitted on a VAE, else ComfyUI's; None where there is neither, so that strips stay grey."""
    if vae is not None:
        try:
            return fitted(vae)
        except Exception as error:  # a strip is no reason to lose a run
            logging.warning("PRISM: no colours could be fitted on this VAE (%s).", reason(error))
    return of_model(latent_format)


def strip(rows: Sequence[tuple[str, Tensor | None]], colours: LinearMap | None) -> Tensor:
    """An IMAGE (1, H, W, 3) float32 in [0, 1]: a row a candidate, its label above up to `COLUMNS` of its frames.

    rows: (label, latents (C, h, w) or (C, T, h, w), or None where nothing was predicted yet).
    """
    drawn = [_row(latents, colours) for _, latents in rows]
    width = max(row.shape[1] for row in drawn)
    canvas = Image.new("RGB", (max(width, 320), (HEIGHT + 16) * len(rows)), (24, 24, 24))
    pen = ImageDraw.Draw(canvas)
    for number, ((label, _), row) in enumerate(zip(rows, drawn)):
        top = number * (HEIGHT + 16)
        pen.text((4, top + 2), label.encode("ascii", "replace").decode(), fill=(230, 230, 230))
        canvas.paste(Image.fromarray((row * 255).round().byte().numpy()), (0, top + 16))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return pixels.view(1, canvas.height, canvas.width, 3).float() / 255


def _row(latents: Tensor | None, colours: LinearMap | None) -> Tensor:
    """(HEIGHT, W, 3) in [0, 1]: frames at equal distances, the first and the last among them."""
    if latents is None or colours is None or len(colours.factors) != latents.shape[0]:
        return torch.full((HEIGHT, HEIGHT, 3), 0.35)
    frames = colours.frames(latents)
    chosen = frames[torch.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().long()]
    width = max(1, round(HEIGHT * chosen.shape[2] / chosen.shape[1]))
    large = interpolate(chosen.movedim(-1, 1), (HEIGHT, width), mode="nearest").movedim(1, -1)
    return torch.cat(list(large), 1)
