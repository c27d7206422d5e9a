"""Where the query looks: its attention laid over the frames, and how much of it lies on the objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.evaluation import prompt_interval
from prism.judge import Judge
from prism.shapeworld import grammar, world

SEEN = 0.2  # distance in RGB from the ground from which a pixel is no ground
CELL = 0.1  # share of a cell's pixels, over its frames, from which the cell is an object's
CHOSEN = {"best": np.argmax, "worst": np.argmin}  # of a prompt's candidates, by the referee
TINT = np.array([1.0, 0.36, 0.10])


def look(judge: Judge, latents: Tensor, prompt: str, t: float, call: Mapping[str, Any], seed: int) -> Tensor:
    """(B, T, H, W) weights on the token grid for finished latents (B, ...), re-noised to t with one draw for all."""
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
    noisy = judge.backbone.add_noise(latents, t, noise.to(latents).expand_as(latents))
    return judge.attention(noisy, prompt, t, **call).cpu()


def object_cells(videos: Tensor, prompt: str, grid: Sequence[int]) -> Tensor:
    """(B, T, H, W) bool: the cells of the token grid that hold more than a trace of something other than the ground.

    videos: (B, FRAMES, SIZE, SIZE, 3) in [0, 1]. Raises ValueError for a prompt outside the grammar.
    """
    scene = grammar.parse(prompt)
    if scene is None:
        raise ValueError(f"prompt {prompt!r} is outside ShapeWorld's grammar: its ground is not known")
    thing = (videos - world.ground_image(scene.ground)).norm(dim=-1) > SEEN  # (B, FRAMES, SIZE, SIZE)
    frames = torch.stack([thing[:, span].float().mean(1) for span in spans(thing.shape[1], grid[0])], 1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1)[:, None], (grid[1], grid[2]))
    return pooled.view(len(videos), *grid) > CELL


def spans(frames: int, cells: int) -> list[slice]:
    """The frames of each latent frame of a causal VAE: the first alone, then equal runs."""
    if cells == 1:
        return [slice(0, frames)]
    run = (frames - 1) // (cells - 1)
    return [slice(0, 1), *(slice(1 + run * k, 1 + run * (k + 1)) for k in range(cells - 1))]


def shares(attention: Tensor, cells: Tensor) -> list[dict[str, float]]:
    """For each video: "attention", the share of what is paid to the video that falls on its object's cells; "area", the
    share of all cells that those are; "video", the share that the video gets as against the prompt.
    """
    total = attention.flatten(1).sum(1)
    on = (attention * cells).flatten(1).sum(1) / total
    area = cells.float().flatten(1).mean(1)
    return [
        {"attention": float(a), "area": float(b), "video": float(c)} for a, b, c in zip(on, area, total, strict=True)
    ]


def overlaid(video: np.ndarray, attention: np.ndarray, top: float | None = None) -> np.ndarray:
    """`video` (FRAMES, H, W, 3) in [0, 1] with the map (T, h, w) of one video as a warm light over it.

    A cell's light grows with its weight up to `top`; None: the map's largest.
    """
    top = float(attention.max()) if top is None else top
    frames, height, width = video.shape[:3]
    light = torch.as_tensor(attention, dtype=torch.float32)[:, None]
    light = torch.nn.functional.interpolate(light, (height, width), mode="bilinear", align_corners=False)[:, 0]
    weight = np.zeros((frames, height, width, 1), dtype=np.float32)
    for cell, span in enumerate(spans(frames, len(attention))):
        weight[span] = (light[cell].numpy() / max(top, 1e-12)).clip(0, 1)[..., None]
    weight = weight**0.8
    dimmed = 0.35 * video.mean(-1, keepdims=True) + 0.35 * video
    return (dimmed * (1 - weight) + weight * (0.7 * TINT + 0.5 * video)).clip(0, 1)


def rows(found: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The "attention" rows of metrics.json, one per noise level, for the best and for the worst candidates of prompts.

    found: one per prompt: "prompt", "values" (n,) by the referee, "looks" t -> shares of its n candidates.
    "lift" is the mean share of attention on the object over the mean share of cells that it takes: 1 where the query
    looks anywhere. Intervals are 95 % bootstrap intervals over prompts.
    """
    table = []
    for t in [] if not found else found[0]["looks"]:
        for which, choose in CHOSEN.items():
            rows_of = [entry["looks"][t][int(choose(entry["values"]))] for entry in found]
            columns = np.array([[row["attention"], row["area"], row["video"]] for row in rows_of])
            prompts = [entry["prompt"] for entry in found]
            mean = columns.mean(0)
            table.append(
                {
                    "t": float(t),
                    "candidates": which,
                    "referee": float(np.mean([choose_value(entry["values"], choose) for entry in found])),
                    "attention_share": float(mean[0]),
                    "area_share": float(mean[1]),
                    "video_share": float(mean[2]),
                    "lift": float(mean[0] / mean[1]) if mean[1] else None,
                    "lift_ci95": prompt_interval(columns, prompts, ratio, seed),
                    "prompts": len(found),
                }
            )
    return table


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def choose_value(values: Sequence[float], choose: Any) -> float:
    return float(values[int(choose(values))])
