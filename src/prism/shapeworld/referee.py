"""The referee: visual quality, motion quality and text alignment of a ShapeWorld video, each in [0, 1], from pixels and
prompt alone.

It stands where people stand for real models. It finds the object as what differs from the known ground, compares it
frame by frame with the four ideal shapes at the measured place and size, and follows place, size and colour over time:

- VQ: does each frame show one clean, evenly coloured shape on a clean ground?
- MQ: does it move smoothly, without flicker, without melting or vanishing?
- TA: are colour, shape and motion those of the prompt?
- overall: the mean of the three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import world

DIMENSIONS = ("VQ", "MQ", "TA", "overall")
# differences within a dimension that a viewer would call a tie
TIE_MARGINS = {"VQ": 0.03, "MQ": 0.03, "TA": 0.03}

_MIN_AREA = 12.0  # pixels; less is no object


def _ramp(value: Tensor, bad: float, good: float) -> Tensor:
    """0 at `bad` or worse, 1 at `good` or better, linear between."""
    return ((value - bad) / (good - bad)).clamp(0, 1)


@torch.no_grad()
def measure(videos: Tensor) -> dict[str, Tensor]:
    """What is seen, before any prompt: videos (B, T, H, W, 3) in [0, 1].

    Returns `alpha` (B, T, H, W) coverage; `area` (B, T) pixels; `centre` (B, T, 2) as (x, y); `colour` (B, T, 3) and
    its (B, 3) mean; `likeness` (B, T, shapes) soft intersection over union with each ideal shape; `residue` (B, T):
    root mean square of what one evenly coloured object on the ground leaves unexplained."""
    ground = torch.tensor(world.BACKGROUND)
    offset = videos.float() - ground
    strength = offset.norm(dim=-1)  # (B, T, H, W)
    # the object's own colour in each frame: the mean over the pixels that differ most, then coverage along that colour
    solid = (strength > 0.6 * strength.flatten(2).quantile(0.99, dim=2)[..., None, None]) & (strength > 0.2)
    weight = solid.float()
    count = weight.sum((2, 3)).clamp(min=1)
    direction = (offset * weight[..., None]).sum((2, 3)) / count[..., None]  # (B, T, 3)
    power = direction.square().sum(-1).clamp(min=0.04)
    alpha = ((offset * direction[:, :, None, None]).sum(-1) / power[..., None, None]).clamp(0, 1)
    alpha = torch.where(alpha < 0.15, torch.zeros(()), alpha)  # faint haze is residue, not object
    area = alpha.sum((2, 3))
    explained = alpha[..., None] * direction[:, :, None, None]
    residue = (offset - explained).square().mean((2, 3, 4)).sqrt()

    x, y = world.pixel_grid()
    safe = area.clamp(min=1e-3)
    centre = torch.stack([(alpha * x).sum((2, 3)) / safe, (alpha * y).sum((2, 3)) / safe], -1)
    radius = (area / torch.pi).sqrt().clamp(min=0.5)[..., None, None]
    dx, dy = x - centre[..., :1, None], y - centre[..., 1:, None]
    likeness = torch.empty(*area.shape, len(world.SHAPES))
    for index, shape in enumerate(world.SHAPES):
        ideal = world.coverage(shape, dx, dy, radius)
        likeness[..., index] = torch.minimum(alpha, ideal).sum((2, 3)) / torch.maximum(alpha, ideal).sum((2, 3)).clamp(
            min=1e-3
        )
    present = area >= _MIN_AREA
    likeness = likeness * present[..., None]
    return {
        "alpha": alpha, "area": area, "centre": centre, "present": present, "likeness": likeness, "residue": residue,
        "colour": direction + ground,
    }  # fmt: skip


def _visual_quality(seen: dict[str, Tensor]) -> Tensor:
    shapely = _ramp(seen["likeness"].amax(-1), 0.60, 0.90)
    clean = _ramp(seen["residue"], 0.10, 0.02)
    return (shapely * clean).mean(1)


def _motion_quality(seen: dict[str, Tensor]) -> Tensor:
    """Smoothness, constancy of colour and size, and of shape, multiplied; frames without an object count as broken."""
    present = seen["present"]
    triple = (present[:, 2:] & present[:, 1:-1] & present[:, :-2]).float()
    pair = (present[:, 1:] & present[:, :-1]).float()
    jerk = (seen["centre"][:, 2:] - 2 * seen["centre"][:, 1:-1] + seen["centre"][:, :-2]).norm(
        dim=-1
    )  # pixels a frame^2
    log_area = seen["area"].clamp(min=_MIN_AREA).log()
    pulse = (log_area[:, 2:] - 2 * log_area[:, 1:-1] + log_area[:, :-2]).abs()
    flicker = (seen["colour"][:, 1:] - seen["colour"][:, :-1]).norm(dim=-1)
    melt = (seen["likeness"][:, 1:] - seen["likeness"][:, :-1]).abs().amax(-1)
    three = _ramp(jerk, 2.0, 0.3) * _ramp(pulse, 0.2, 0.04) * triple
    two = _ramp(flicker, 0.3, 0.04) * _ramp(melt, 0.2, 0.02) * pair
    return three.mean(1) * two.mean(1)


def _text_alignment(seen: dict[str, Tensor], scenes: Sequence[world.Scene]) -> Tensor:
    present = seen["present"].float()
    share = present.mean(1)
    weight = present / present.sum(1, keepdim=True).clamp(min=1)

    palette = torch.tensor(list(world.COLOURS.values()))
    colour = (seen["colour"] * weight[..., None]).sum(1)  # (B, 3)
    of_colour = torch.softmax(-(colour[:, None] - palette).square().sum(-1) / (2 * 0.12**2), 1)
    likeness = (seen["likeness"] * weight[..., None]).sum(1)
    of_shape = torch.softmax(likeness / 0.03, 1)

    half = world.FRAMES // 3  # net change: mean of the last third minus mean of the first, scaled to the whole clip

    def net(series: Tensor) -> Tensor:
        w = present[..., None]
        early = (series * w)[:, :half].sum(1) / w[:, :half].sum(1).clamp(min=1)
        late = (series * w)[:, -half:].sum(1) / w[:, -half:].sum(1).clamp(min=1)
        return (late - early) * (world.FRAMES - 1) / (world.FRAMES - half)

    moved = net(seen["centre"]) / 25.0
    grown = net(0.5 * seen["area"].clamp(min=1).log()[..., None]) / 0.75
    change = torch.cat([moved, grown], 1)  # (B, 3) in units of the world's own motions
    wanted = torch.tensor(list(world.MOTIONS.values()), dtype=torch.float32)
    of_motion = torch.softmax(-(change[:, None] - wanted).square().sum(-1) / (2 * 0.25**2), 1)

    colours, shapes, motions = list(world.COLOURS), list(world.SHAPES), list(world.MOTIONS)
    rows = torch.arange(len(scenes))
    parts = (
        of_colour[rows, [colours.index(s.colour) for s in scenes]],
        of_shape[rows, [shapes.index(s.shape) for s in scenes]],
        of_motion[rows, [motions.index(s.motion) for s in scenes]],
    )
    return share * sum(parts) / 3


@torch.no_grad()
def batch(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Scores of videos (B, T, H, W, 3) in [0, 1]: a dict of (B,) tensors for VQ, MQ, TA and overall.

    Raises ValueError for a prompt outside the grammar.
    """
    scenes = []
    for prompt in prompts:
        scene = world.parse(prompt)
        if scene is None:
            raise ValueError(f"prompt {prompt!r} is outside ShapeWorld's grammar: the referee cannot judge it")
        scenes.append(scene)
    parts = []
    for start in range(0, len(scenes), 64):
        seen = measure(torch.as_tensor(videos[start : start + 64]))
        parts.append(
            torch.stack(
                [_visual_quality(seen), _motion_quality(seen), _text_alignment(seen, scenes[start : start + 64])]
            )
        )
    scores = torch.cat(parts, 1)
    return {"VQ": scores[0], "MQ": scores[1], "TA": scores[2], "overall": scores.mean(0)}


def score(video: Tensor, prompt: str) -> dict[str, float]:
    """Scores of one video (T, H, W, 3) in [0, 1] for its prompt."""
    return {name: float(value[0]) for name, value in batch(torch.as_tensor(video)[None], [prompt]).items()}
