"""ShapeWorld's videos: a seeded renderer of the scenes that prompts describe, 17 frames of 64x64 pixels.

Shapes are drawn from signed distances with an edge one pixel soft, so the true value of every quantity that the referee
measures is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prism.shapeworld.grammar import (
    COLOURS,
    DEPTHS,
    DIRECTIONS,
    GROUNDS,
    GROWTH,
    PLACES,
    SHAPES,
    SIZES,
    SPEEDS,
    TIMES,
    WALLS,
    Scene,
    Thing,
    draw_scene,
    split_of,
)

SIZE = 64  # width and height in pixels
FRAMES = 17  # 1 + 4 * 4, as a causal video VAE with temporal compression 4 needs
FPS = 8
STRIPE = 16  # pixels per period of the stripes
GROWN = (0.65, 0.85)  # change of the log radius of a growing or shrinking shape
PAIR_RADIUS = (6.0, 8.0)
BESIDE = (18.0, 24.0)  # pixels that a shape travels beside a still one, and each of two that move at once
PASSING = (28.0, 34.0)  # pixels that a shape travels across the other
HALF = (15.0, 20.0)  # pixels that each shape travels where one moves after the other
BOUNCE = (14.0, 19.0)  # distance in pixels from the wall, eight frames before and after the bounce
TURN = 0.3  # roundness of a bounce, as a share of eight frames
MOVE_FRAMES = 9  # where one shape moves after the other: the first in frames 0 to 9, the second in 7 to 16


def extent(shape: str) -> tuple[float, float, float, float]:
    """The reach of a shape of radius 1 from its centroid: left, right, up, down."""
    if shape == "circle":
        return (1.0,) * 4
    if shape == "square":
        return (math.sqrt(math.pi) / 2,) * 4
    if shape == "cross":
        return (3 * math.sqrt(math.pi / 5) / 2,) * 4
    inradius = math.sqrt(math.pi / math.sqrt(27))
    return (inradius * math.sqrt(3), inradius * math.sqrt(3), 2 * inradius, inradius)


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Share of a pixel that a shape covers, in [0, 1]; (x, y) is the pixel's position relative to the shape's centroid.

    All shapes have the area of a circle of `radius` pixels, and their centroid at the origin. Shapes broadcast.
    """
    if shape == "circle":
        distance = torch.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius * (math.sqrt(math.pi) / 2)
    elif shape == "triangle":  # equilateral, tip up: inradius a / sqrt(12) with area a^2 sqrt(3) / 4
        inradius = radius * math.sqrt(math.pi / math.sqrt(27))
        distance = torch.maximum(y, x.abs() * (math.sqrt(3) / 2) - y / 2) - inradius
    elif shape == "cross":  # two bars 1 : 3, area 5 w^2 of the arm's width w
        half = radius * (math.sqrt(math.pi / 5) / 2)
        upright = torch.maximum(x.abs() - half, y.abs() - 3 * half)
        lying = torch.maximum(x.abs() - 3 * half, y.abs() - half)
        distance = torch.minimum(upright, lying)
    else:
        raise ValueError(f"shape is {shape!r}: use one of {', '.join(SHAPES)}")
    return (0.5 - distance).clamp(0, 1)


def pixel_grid(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres (x, y), each (SIZE, SIZE)."""
    line = torch.arange(SIZE, dtype=torch.float32, device=device) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def ground_image(ground: str) -> torch.Tensor:
    """The empty ground, (SIZE, SIZE, 3) in [0, 1]; stripes run upright."""
    base, stripe = (torch.tensor(colour) for colour in GROUNDS[ground])
    x, _ = pixel_grid()
    wave = (0.5 - 0.5 * torch.cos(2 * math.pi * x / STRIPE))[..., None]
    return base + wave * (stripe - base)


@dataclass(frozen=True)
class Path:
    """The path of one thing: per frame its centre (FRAMES, 2) as (x, y) and its radius (FRAMES,), in pixels."""

    centre: torch.Tensor
    radius: torch.Tensor


def _uniform(chance: random.Random, span: tuple[float, float]) -> float:
    return chance.uniform(*span)


def _steps(span: tuple[int, int] | None = None) -> torch.Tensor:
    """Progress from 0 to 1 per frame, (FRAMES, 1): even over the clip, or with soft start and end in frames `span`."""
    frame = torch.arange(FRAMES, dtype=torch.float32)[:, None]
    if span is None:
        return frame / (FRAMES - 1)
    share = ((frame - span[0]) / (span[1] - span[0])).clamp(0, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * share)


def _room(shape: str, radius: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The box, low (2,) and high (2,), in which `move` (FRAMES, 2) may start so that the shape stays at least a pixel
    inside the picture.
    """
    left, right, up, down = extent(shape)
    low = 1 - (move - radius[:, None] * torch.tensor([left, up])).amin(0)
    high = SIZE - 1 - (move + radius[:, None] * torch.tensor([right, down])).amax(0)
    return low, torch.maximum(low, high)


def _position(chance: random.Random, room: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A random position (2,) in a box."""
    low, high = room
    return low + torch.tensor([chance.random(), chance.random()]) * (high - low)


def _single(thing: Thing, chance: random.Random) -> Path:
    radius = torch.full((FRAMES,), _uniform(chance, SIZES[thing.size or "medium"]))
    words = thing.motion.split()
    if words[0] in GROWTH:
        log = GROWTH[words[0]] * _uniform(chance, GROWN) * (_steps()[:, 0] - 0.5)
        radius = radius * log.exp()
    move = torch.zeros(FRAMES, 2)
    if words[0] == "moves":
        speed = words[1] if len(words) == 3 else ""
        move = _steps() * torch.tensor(DIRECTIONS[words[-1]]) * _uniform(chance, SPEEDS[speed])
    elif words[0] == "bounces":
        way = torch.tensor(DIRECTIONS[WALLS[thing.motion.removeprefix("bounces off the ")]], dtype=torch.float32)
        since = (torch.arange(FRAMES)[:, None] - chance.uniform(6.5, 9.5)) / 8
        away = ((since**2 + TURN**2).sqrt() - TURN) / (math.sqrt(1 + TURN**2) - TURN)
        move = -way * away * _uniform(chance, BOUNCE)
        low, high = _room(thing.shape, radius, move)
        origin = _position(chance, (low, high))
        wall = torch.where(way > 0, high, low)  # its nearest point touches the wall
        return Path(torch.where(way != 0, wall, origin) + move, radius)
    return Path(_position(chance, _room(thing.shape, radius, move)) + move, radius)


def _pair(scene: Scene, chance: random.Random) -> list[Path]:
    first, second = scene.things
    radii = [torch.full((FRAMES,), _uniform(chance, PAIR_RADIUS)) for _ in range(2)]
    ways = [torch.tensor(DIRECTIONS.get(t.motion.split()[-1], (0, 0)), dtype=torch.float32) for t in scene.things]
    spans: tuple[tuple[int, int] | None, ...] = (None, None)
    if scene.relation.startswith("then"):
        spans = ((0, MOVE_FRAMES), (FRAMES - 1 - MOVE_FRAMES, FRAMES - 1))
    if "passes" in scene.relation:  # across the path of the first
        ways[1] = ways[0].flip(0) * chance.choice((-1, 1))
    travel = [_uniform(chance, BESIDE), _uniform(chance, BESIDE)]
    if scene.relation in DEPTHS:
        travel[0] = _uniform(chance, PASSING)
    elif scene.relation.startswith("then"):
        travel = [_uniform(chance, HALF), _uniform(chance, PASSING if "passes" in scene.relation else HALF)]
    moves = [_steps(span) * way * far for span, way, far in zip(spans, ways, travel, strict=True)]
    rooms = [_room(t.shape, r, m) for t, r, m in zip(scene.things, radii, moves, strict=True)]
    best, clearest = [], -math.inf
    for _ in range(40):
        origins = [_position(chance, room) for room in rooms]
        if scene.relation in (*PLACES, *DEPTHS):  # the middle of the path lies beside, or on, the still shape
            origins[0] = origins[1] - moves[0][-1] / 2
            if scene.relation in PLACES:
                side = torch.tensor(PLACES[scene.relation], dtype=torch.float32)
                reach = _reach(first.shape, radii[0], -side) + _reach(second.shape, radii[1], side)
                origins[0] += side * (reach + chance.uniform(2, 6)) + side.flip(0).abs() * chance.uniform(-5, 5)
            else:
                origins[0] += ways[0].flip(0).abs() * chance.uniform(-2.5, 2.5)
        elif "passes" in scene.relation:
            origins[1] = origins[0] + moves[0][-1] - moves[1][-1] / 2 + ways[0] * chance.uniform(-2.5, 2.5)
        # 0 where both stay inside the picture, and apart where they should, else below 0
        inside = torch.cat(
            [torch.cat([o - low, high - o]) for o, (low, high) in zip(origins, rooms, strict=True)]
        ).min()
        clear = min(float(inside), 0.0)
        if scene.relation in TIMES or "passes" in scene.relation:
            apart = (origins[0] + moves[0] - origins[1] - moves[1]).norm(dim=1) - 1.25 * (radii[0] + radii[1])
            # the one that passes must be apart from the first only while the first moves
            clear += min(float(apart[: 8 if "passes" in scene.relation else None].min()), 0.0)
        if clear > clearest:
            best, clearest = origins, clear
        if clear == 0:
            break
    return [Path(origin + move, radius) for origin, move, radius in zip(best, moves, radii, strict=True)]


def _reach(shape: str, radius: torch.Tensor, way: torch.Tensor) -> float:
    left, right, up, down = extent(shape)
    x, y = way.tolist()
    return float(radius[0]) * (right * max(x, 0) + left * max(-x, 0) + down * max(y, 0) + up * max(-y, 0))


def behind(scene: Scene) -> int:
    """The index of the thing that is behind the other, and so is drawn first."""
    return 0 if scene.relation in ("behind", "then passes in front of") else 1


def paths(scene: Scene, chance: random.Random) -> list[Path]:
    """The path of each thing of a scene; size, place and speed are drawn from `chance`."""
    return [_single(scene.things[0], chance)] if scene.kind == "single" else _pair(scene, chance)


def paint(scenes: Sequence[Scene], ways: Sequence[Sequence[Path]]) -> torch.Tensor:
    """Draw scenes whose things follow the given paths: (B, FRAMES, SIZE, SIZE, 3) float32 in [0, 1]."""
    x, y = pixel_grid()
    grounds = {name: ground_image(name) for name in GROUNDS}
    video = torch.stack([grounds[scene.ground].expand(FRAMES, -1, -1, -1) for scene in scenes])
    for layer in (0, 1):  # behind, then in front
        drawn: dict[str, list[tuple[int, int]]] = {}
        for row, scene in enumerate(scenes):
            order = [0] if scene.kind == "single" else [behind(scene), 1 - behind(scene)]
            if layer < len(order):
                drawn.setdefault(scene.things[order[layer]].shape, []).append((row, order[layer]))
        for shape, places in drawn.items():
            centre = torch.stack([ways[row][thing].centre for row, thing in places])[:, :, None, None]
            radius = torch.stack([ways[row][thing].radius for row, thing in places])[:, :, None, None]
            colour = torch.tensor([COLOURS[scenes[row].things[thing].colour] for row, thing in places])
            alpha = coverage(shape, x - centre[..., 0], y - centre[..., 1], radius)[..., None]
            rows = [row for row, _ in places]
            video[rows] = torch.lerp(video[rows], colour[:, None, None, None].expand_as(video[rows]), alpha)
    return video


def render(scenes: Sequence[Scene], seed: int) -> torch.Tensor:
    """One video per scene, (B, FRAMES, SIZE, SIZE, 3) float32 in [0, 1]. The paths of a scene follow from the seed and
    its index."""
    return paint(scenes, [paths(scene, random.Random(f"{seed} {i}")) for i, scene in enumerate(scenes)])


def sample(count: int, seed: int, pairs: float = 0.5) -> tuple[torch.Tensor, list[str]]:
    """`count` random videos (count, FRAMES, SIZE, SIZE, 3) and their prompts, none of split `unseen`; each shows two
    things with the probability `pairs`."""
    scenes: list[Scene] = []
    chance = random.Random(seed)
    while len(scenes) < count:
        scene = draw_scene(chance, "pair" if chance.random() < pairs else "single")
        if split_of(scene) != "unseen":
            scenes.append(scene)
    return render(scenes, seed), [scene.prompt for scene in scenes]
