"""Graded corruptions of ShapeWorld's clean renders: the faults that a generator may have, one at a time.

For a fault of position, colour or shape the scene is drawn again along the same paths, so that nothing else changes;
blur and noise are applied to the pixels. Strength 0 is the clean render, 1 the worst. The seed fixes the random choices
of a fault, so that only its size grows with strength."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from prism.shapeworld import grammar, world

BLUR = 3.0  # pixels, standard deviation at strength 1
NOISE = 0.10  # standard deviation at strength 1, in units of the pixels' range [0, 1]
FLICKER = 0.5  # share of its contrast that a thing loses in every other frame
JUMP = 7.0  # pixels a thing jumps aside for a frame
ODD_FRAMES = (2, 14, 6, 10)  # frames in which things jump or melt, in the order in which a growing strength adds them
DRIFT = 20.0  # pixels a still shape drifts
CORRUPTIONS = {
    "blur": "VQ",
    "noise": "VQ",
    "flicker": "MQ",
    "teleport": "MQ",
    "melt": "MQ",
    "wrong colour": "TA",
    "wrong direction": "TA",
    "wrong order": "TA",
    "missing object": "TA",
}
"""Kind -> the dimension that it should lower most."""


@dataclass
class _Look:
    """The position and appearance of one thing in each frame, which a fault changes."""

    shape: str
    centre: Tensor  # (FRAMES, 2) as (x, y), pixels
    radius: Tensor  # (FRAMES,) pixels
    colour: Tensor  # (FRAMES, 3)
    opacity: Tensor  # (FRAMES,) in [0, 1]
    melted: Tensor  # (FRAMES,) in [0, 1], share of another shape


def applies(kind: str, scene: grammar.Scene) -> bool:
    """Tell if a scene can have this fault: a wrong order needs two things that move."""
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind is {kind!r}: use one of {', '.join(CORRUPTIONS)}")
    return kind != "wrong order" or scene.relation == "while" or scene.relation.startswith("then")


def corrupt(scenes: Sequence[grammar.Scene], kind: str, strength: float, seed: int) -> Tensor:
    """Render scenes as `world.render(scenes, seed)` does, but with one fault: (B, FRAMES, SIZE, SIZE, 3) in [0, 1].

    Args:
        scenes: the content of each video.
        kind: one of `CORRUPTIONS`.
        strength: from 0 (clean) to 1.
        seed: fixes the render and the random choices of the fault.

    Raises:
        ValueError: for an unknown kind, a strength outside [0, 1], or a scene to which the kind does not apply."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: use a number from 0 to 1")
    for scene in scenes:
        if not applies(kind, scene):
            raise ValueError(f"{scene.prompt!r} has no order that could be wrong: it shows no two moves")
    if kind in ("blur", "noise"):
        video = world.render(scenes, seed).numpy()
        if kind == "blur":
            sigma = strength * BLUR
            video = gaussian_filter(video, (0, 0, sigma, sigma, 0), mode="nearest")
        else:
            video = video + strength * NOISE * np.random.default_rng(seed).standard_normal(video.shape)
        return torch.from_numpy(np.clip(video, 0, 1).astype(np.float32))
    videos = []
    for number, scene in enumerate(scenes):
        looks = [
            _Look(
                thing.shape, path.centre.clone(), path.radius.clone(),
                torch.tensor(grammar.COLOURS[thing.colour]).repeat(world.FRAMES, 1),
                torch.ones(world.FRAMES), torch.zeros(world.FRAMES),
            )
            for thing, path in zip(scene.things, world.paths(scene, random.Random(f"{seed} {number}")), strict=True)
        ]  # fmt: skip
        _FAULTS[kind](scene, looks, strength, random.Random(f"{kind} {seed} {number}"))
        videos.append(_draw(scene, looks))
    return torch.stack(videos)


def _draw(scene: grammar.Scene, looks: Sequence[_Look]) -> Tensor:
    """Draw one scene as `world.paint` does, with things that may change colour, shape and opacity."""
    x, y = world.pixel_grid()
    video = world.ground_image(scene.ground).expand(world.FRAMES, -1, -1, -1)
    for number in [0] if scene.kind == "single" else [world.behind(scene), 1 - world.behind(scene)]:
        look = looks[number]
        at = x - look.centre[:, 0, None, None], y - look.centre[:, 1, None, None], look.radius[:, None, None]
        alpha = world.coverage(look.shape, *at)
        if look.melted.any():
            other = "circle" if look.shape == "triangle" else "triangle"
            alpha = torch.lerp(alpha, world.coverage(other, *at), look.melted[:, None, None])
        alpha = (alpha * look.opacity[:, None, None])[..., None]
        video = torch.lerp(video, look.colour[:, None, None].expand_as(video), alpha)
    return video


def _odd(strength: float) -> Tensor:
    """The size of the fault in each frame, (FRAMES,) in [0, 1]; `ODD_FRAMES` join in one by one as strength grows."""
    size = torch.zeros(world.FRAMES)
    for number, frame in enumerate(ODD_FRAMES):
        size[frame] = min(max(strength * len(ODD_FRAMES) - number, 0.0), 1.0)
    return size


def _flicker(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    every_other = (torch.arange(world.FRAMES) + chance.randrange(2)) % 2
    for look in looks:
        look.opacity -= strength * FLICKER * every_other


def _teleport(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    for look in looks:
        for frame in ODD_FRAMES:  # towards the middle of the picture, so that nothing leaves it
            way = torch.tensor([chance.uniform(0.3, 1), chance.uniform(0.3, 1)])
            way = way / way.norm() * torch.where(look.centre[frame] < world.SIZE / 2, 1.0, -1.0)
            look.centre[frame] += _odd(strength)[frame] * JUMP * way


def _melt(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    for look in looks:
        look.melted += _odd(strength)


def _wrong_colour(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    """Blend each colour into another one, chosen so that the blends stay far from the ground and the other thing."""
    way = torch.linspace(0, 1, 5)[:, None]
    taken = {thing.colour for thing in scene.things}
    shunned = torch.cat([torch.tensor(grammar.GROUNDS[scene.ground]), *(look.colour[:1] for look in looks[1:])])
    for look in looks:
        before = look.colour[:1].clone()
        blends = {
            name: before + way * (torch.tensor(colour) - before)
            for name, colour in grammar.COLOURS.items()
            if name not in taken
        }
        clear = {name: float(torch.cdist(blend, shunned).min()) for name, blend in blends.items()}
        other = max(clear, key=lambda name: clear[name])
        taken.add(other)
        shunned = torch.cat([torch.tensor(grammar.GROUNDS[scene.ground]), blends[other]])
        look.colour += strength * (blends[other][-1] - before)


def _wrong_direction(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    """Turn all paths by up to a quarter turn, growth into shrinking, and let a still thing drift."""
    angle = strength * math.pi / 2 * chance.choice((-1, 1))
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    low, high = torch.full((2,), torch.inf), torch.full((2,), -torch.inf)
    for thing, look in zip(scene.things, looks, strict=True):
        if scene.things[0].motion == grammar.STILL:
            way = 1.0 if float(look.centre[0, 0]) < world.SIZE / 2 else -1.0
            look.centre[:, 0] += strength * DRIFT * way * torch.linspace(0, 1, world.FRAMES)
        look.centre = (look.centre - world.SIZE / 2) @ turn + world.SIZE / 2
        log = look.radius.log()
        look.radius = (log.mean() + (1 - 2 * strength) * (log - log.mean())).exp()
        left, right, up, down = world.extent(thing.shape)
        low = torch.minimum(low, (look.centre - look.radius[:, None] * torch.tensor([left, up])).amin(0))
        high = torch.maximum(high, (look.centre + look.radius[:, None] * torch.tensor([right, down])).amax(0))
    into = (1 - low).clamp(min=0) - (high - world.SIZE + 1).clamp(min=0)  # back into the frame
    for look in looks:
        look.centre += into


def _wrong_order(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    """Shift the two moves in time until they have changed places; of two simultaneous moves, delay one."""
    frame = torch.arange(world.FRAMES, dtype=torch.float32)
    delay = world.FRAMES - 1 - world.MOVE_FRAMES
    for number, look in enumerate(looks):
        if scene.relation == "while":
            waits = (2 * frame - (world.FRAMES - 1) * number).clamp(0, world.FRAMES - 1)
            when = torch.lerp(frame, waits, strength)
        else:
            when = (frame + (2 * number - 1) * strength * delay).clamp(0, world.FRAMES - 1)
        before = when.floor().long()
        after = (before + 1).clamp(max=world.FRAMES - 1)
        look.centre = torch.lerp(look.centre[before], look.centre[after], (when - before)[:, None])


def _missing(scene: grammar.Scene, looks: list[_Look], strength: float, chance: random.Random) -> None:
    """Remove one thing, from the end of the clip backwards."""
    look = chance.choice(looks)
    frame = torch.arange(world.FRAMES, dtype=torch.float32)
    look.opacity *= (world.FRAMES * (1 - strength) - frame).clamp(0, 1).round()


_FAULTS: dict[str, Callable[[grammar.Scene, list[_Look], float, random.Random], None]] = {
    "flicker": _flicker,
    "teleport": _teleport,
    "melt": _melt,
    "wrong colour": _wrong_colour,
    "wrong direction": _wrong_direction,
    "wrong order": _wrong_order,
    "missing object": _missing,
}
