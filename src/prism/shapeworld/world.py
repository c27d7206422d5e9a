"""The ShapeWorld: plain English prompts and a seeded, vectorised renderer of the videos they describe.

A scene is one coloured shape on a dark ground that moves, grows, shrinks or stays still for 17 frames of 64x64 pixels.
Shapes are signed distances with a one-pixel soft edge, so a batch is drawn in one pass and every quantity the referee
measures is known."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass

import torch

SIZE = 64  # pixels a side
FRAMES = 17  # 1 + 4 * 4, what a causal video VAE with temporal compression 4 takes
FPS = 8

BACKGROUND = (0.10, 0.10, 0.13)
COLOURS = {
    "red": (0.90, 0.13, 0.13),
    "green": (0.13, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.65, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
    "orange": (0.95, 0.50, 0.05),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross")
# motion -> (dx, dy) direction of the centre in image coordinates (y points down) and growth of the log radius
MOTIONS = {
    "moves right": (1, 0, 0),
    "moves left": (-1, 0, 0),
    "moves up": (0, -1, 0),
    "moves down": (0, 1, 0),
    "grows": (0, 0, 1),
    "shrinks": (0, 0, -1),
    "stays still": (0, 0, 0),
}
TRAVEL = (20.0, 30.0)  # pixels a moving shape covers in the whole clip
GROWTH = (0.65, 0.85)  # change of the log radius of a growing or shrinking shape
RADIUS = (8.0, 12.0)  # radius in pixels of the circle of equal area


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one word each from `COLOURS`, `SHAPES` and `MOTIONS`."""

    colour: str
    shape: str
    motion: str

    @property
    def prompt(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} {self.motion}"


SCENES = tuple(Scene(*words) for words in itertools.product(COLOURS, SHAPES, MOTIONS))
_BY_PROMPT = {scene.prompt: scene for scene in SCENES}
SPLITS = {"train": 140, "validation": 28, "test": 56}


def parse(prompt: str) -> Scene | None:
    """The scene that a prompt names, or None for a prompt outside the grammar (it can be sampled, not refereed)."""
    words = prompt.lower().strip().rstrip(".").split()
    return _BY_PROMPT.get(" ".join(words))


def prompts(split: str) -> list[str]:
    """Prompts of one split (`train` 140, `validation` 28, `test` 56): disjoint, in an order fixed by a hash of their
    text.
    """
    ordered = sorted(_BY_PROMPT, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
    start = 0
    for name, count in SPLITS.items():
        if name == split:
            return ordered[start : start + count]
        start += count
    raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}")


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Share of a pixel that a shape covers, in [0, 1]; (x, y) is the pixel's place relative to the shape's centroid.

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


def render(scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """Draw one video a scene: (B, FRAMES, SIZE, SIZE, 3) float32 in [0, 1]. Size, place and speed come from `generator`
    (CPU).
    """
    count = len(scenes)
    chance = torch.rand(count, 4, generator=generator)
    direction = torch.tensor([MOTIONS[s.motion] for s in scenes], dtype=torch.float32)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * chance[:, 0]
    travel = TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * chance[:, 1]
    growth = GROWTH[0] + (GROWTH[1] - GROWTH[0]) * chance[:, 1]

    time = torch.linspace(-0.5, 0.5, FRAMES)
    log_radius = radius.log()[:, None] + direction[:, 2:] * growth[:, None] * time  # (B, T)
    move = direction[:, None, :2] * travel[:, None, None] * time[None, :, None]  # (B, T, 2)
    # the path's middle lies where the largest shape stays inside at both ends (a big triangle's tip may touch the edge)
    reach = move.abs().amax(1) + 1.45 * log_radius.exp().amax(1, keepdim=True)
    slack = (SIZE / 2 - 1 - reach).clamp(min=0)
    centre = SIZE / 2 + (2 * chance[:, 2:] - 1) * slack
    centre = centre[:, None] + move

    x, y = pixel_grid()
    colour = torch.tensor([COLOURS[s.colour] for s in scenes])
    ground = torch.tensor(BACKGROUND)
    video = torch.empty(count, FRAMES, SIZE, SIZE, 3)
    for shape in SHAPES:
        rows = [i for i, s in enumerate(scenes) if s.shape == shape]
        if not rows:
            continue
        cx, cy, r = (v[rows][..., None, None] for v in (centre[..., 0], centre[..., 1], log_radius.exp()))
        alpha = coverage(shape, x - cx, y - cy, r)[..., None]
        video[rows] = ground + alpha * (colour[rows][:, None, None, None] - ground)
    return video


def sample(count: int, seed: int, among: list[str] | None = None) -> tuple[torch.Tensor, list[str]]:
    """`count` random videos and their prompts, drawn from `among` (default: every prompt of the grammar)."""
    generator = torch.Generator().manual_seed(seed)
    names = among or list(_BY_PROMPT)
    chosen = [names[i] for i in torch.randint(len(names), (count,), generator=generator)]
    return render([_BY_PROMPT[p] for p in chosen], generator), chosen
