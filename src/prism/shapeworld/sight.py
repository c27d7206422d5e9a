"""The referee's measurements: the ground, the things on it, and the centre, size and shape of each in every frame.

Nearly all pixels of a video are ground. Only the others are measured, as one flat list, which makes the referee fast
enough for thousands of videos. docs/referee.md gives every formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism.shapeworld import grammar, world

MIN_AREA = 12.0  # pixels; anything smaller does not count as a thing
HAZE = 0.15  # coverage below which a pixel counts as not covered
FAINT = 0.03  # offset from the ground below which no coverage can reach HAZE
LOST = 0.04  # share of its usual area that a thing may lose and still be in full view
_EDGE = 3  # width of the border, in pixels, from which the ground is recognised
_PALETTE = torch.tensor(list(grammar.COLOURS.values()))
_GROUNDS = torch.stack([world.ground_image(name) for name in grammar.GROUNDS])  # (4, H, W, 3)
_EXTENTS = torch.tensor([world.extent(shape) for shape in grammar.SHAPES])  # (shapes, 4): left, right, up, down
_COLOUR_INDEX = {name: index for index, name in enumerate(grammar.COLOURS)}


def ramp(value: Tensor, bad: float, good: float) -> Tensor:
    """0 at `bad` or worse, 1 at `good` or better, linear between."""
    return ((value - bad) / (good - bad)).clamp(0, 1)


def mean(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the last axis; 0 where nothing has weight."""
    return (value * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)


def likelihood(features: Tensor, classes: Tensor, spread: Tensor | float) -> Tensor:
    """Probabilities of classes (K, F) for features (..., F): Gaussian kernels of width `spread`, normalised."""
    return torch.softmax(-((features[..., None, :] - classes) / spread).square().sum(-1) / 2, -1)


class _Pixels:
    """The P pixels of B videos that differ from the ground: what they show, and in which frame and video they are."""

    def __init__(self, videos: Tensor, empty: Tensor) -> None:
        size = world.SIZE**2
        offset = videos - empty[:, None]
        self.strength = offset.norm(dim=-1).flatten(2)  # (B, T, H * W)
        self.shape = self.strength.shape[:2]
        self.frames = self.shape.numel()
        places = (self.strength.flatten() > FAINT).nonzero()[:, 0]
        self.frame = places // size  # (P,) in B * T
        self.video = self.frame // self.shape[1]
        self.x, self.y = (line.flatten()[places % size] for line in world.pixel_grid())
        self.seen = videos.flatten(0, 3)[places]  # (P, 3)
        self.offset = offset.flatten(0, 3)[places]
        self.ground = self.seen - self.offset
        self.far = self.strength.flatten()[places]

    def sum(self, values: Tensor) -> Tensor:
        """Sums (B, T, ...) by frame of values (P, ...)."""
        out = values.new_zeros((self.frames, *values.shape[1:]))
        return out.index_add_(0, self.frame, values).view(*self.shape, *values.shape[1:])


@torch.no_grad()
def measure(videos: Tensor, scenes: Sequence[grammar.Scene]) -> dict[str, Tensor]:
    """Measure videos (B, T, H, W, 3) in [0, 1] whose scenes all have the same number of things, N = 1 or 2.

    Returns `ground` (B, grounds) probabilities; `area` (B, N, T) pixels; `centre` (B, N, T, 2) as (x, y), interpolated
    where nothing is seen; `colour` (B, N, T, 3); `likeness` (B, N, T, shapes) soft intersection over union with each
    ideal shape; `right_colour` (B, N) probability; `residue` (B, T): root mean square of what evenly coloured things on
    the ground leave unexplained; `visible` (B, N, T): the thing can be seen; `hidden` (B, N, T): it is partly or wholly
    behind the other thing; `loss` (B, N, T): share of its usual area that is not visible; `legible` (B, N, T): enough
    of it is visible to measure its centre."""
    videos = videos.float()
    edge = torch.ones(world.SIZE, world.SIZE, dtype=torch.bool)
    edge[_EDGE:-_EDGE, _EDGE:-_EDGE] = False
    misfit = (videos[:, :, edge][:, None] - _GROUNDS[:, edge][None, :, None]).abs().mean(-1).clamp(max=0.2).mean((2, 3))
    pixels = _Pixels(videos, _GROUNDS[misfit.argmin(1)])
    single = len(scenes[0].things) == 1
    alphas, colour, right_colour = (_one if single else _two)(pixels, scenes)

    painted, area, centre, likeness = torch.zeros_like(pixels.offset), [], [], []
    for thing, alpha in enumerate(alphas):
        paint = colour[:, thing].flatten(0, 1)[pixels.frame]
        painted += alpha[:, None] * (paint - pixels.ground)
        area.append(pixels.sum(alpha))
        safe = area[-1].clamp(min=1e-3)
        centre.append(torch.stack([pixels.sum(alpha * pixels.x) / safe, pixels.sum(alpha * pixels.y) / safe], -1))
        likeness.append(_likeness(pixels, alpha, area[-1], centre[-1]))
    left = (pixels.offset - painted).square().sum(1) - pixels.far.square()
    residue = pixels.strength.square().sum(2) + pixels.sum(left)
    seen = {
        "ground": torch.softmax(-misfit / 0.015, 1), "area": torch.stack(area, 1), "centre": torch.stack(centre, 1),
        "colour": colour, "likeness": torch.stack(likeness, 1), "right_colour": right_colour,
        "residue": (residue.clamp(min=0) / (3 * world.SIZE**2)).sqrt(),
    }  # fmt: skip
    return seen | _occlusion(seen)


def _likeness(pixels: _Pixels, alpha: Tensor, area: Tensor, centre: Tensor) -> Tensor:
    """(B, T, shapes) soft intersection over union with each ideal shape of the same area at the same middle.

    Both have the same area A, so that the union is 2 A minus the intersection, which needs the covered pixels alone."""
    covered = alpha > 0
    alpha, frame = alpha[covered], pixels.frame[covered]
    middle = centre.flatten(0, 1)[frame]
    radius = (area.flatten() / torch.pi).sqrt().clamp(min=0.5)[frame]
    dx, dy = pixels.x[covered] - middle[:, 0], pixels.y[covered] - middle[:, 1]
    ideal = torch.stack([world.coverage(shape, dx, dy, radius) for shape in grammar.SHAPES], 1)
    common = torch.zeros(area.numel(), len(grammar.SHAPES)).index_add_(0, frame, torch.minimum(alpha[:, None], ideal))
    common = common.view(*area.shape, -1)
    return common / (2 * area[..., None] - common).clamp(min=1e-3) * (area >= MIN_AREA)[..., None]


def _solid_colour(pixels: _Pixels, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colour (B, T, 3), per frame, of those pixels of a mask (P,) that differ most from the ground, and the number
    of these pixels (B, T).
    """
    top = torch.zeros(pixels.frames).scatter_reduce_(0, pixels.frame[mask], pixels.far[mask], "amax")
    solid = (mask & (pixels.far > 0.6 * top[pixels.frame]) & (pixels.far > 0.2)).float()
    count = pixels.sum(solid)
    return pixels.sum(pixels.seen * solid[:, None]) / count.clamp(min=1)[..., None], count


def _coverage(pixels: _Pixels, alpha: Tensor) -> Tensor:
    """Coverage (P,) with haze, and stains far from the covered middle, set to 0."""
    alpha = torch.where(alpha < HAZE, 0.0, alpha).clamp(max=1)
    core = (alpha > 0.5).float()
    area = pixels.sum(core)
    middle = torch.stack([pixels.sum(core * pixels.x), pixels.sum(core * pixels.y)], -1) / area.clamp(min=1)[..., None]
    middle, radius = middle.flatten(0, 1)[pixels.frame], (area.flatten() / torch.pi).sqrt()[pixels.frame]
    away = torch.hypot(pixels.x - middle[:, 0], pixels.y - middle[:, 1])
    return torch.where(away > 2.2 * radius + 3, 0.0, alpha)


def _right(colour: Tensor, count: Tensor, names: Sequence[str]) -> Tensor:
    """Probability (B,) of the prompt's colour, given the mean colour (B, T, 3) per frame of `count` (B, T) pixels."""
    weight = (count >= MIN_AREA / 2).float()
    whole = (colour * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
    index = torch.tensor([_COLOUR_INDEX[name] for name in names])
    return likelihood(whole, _PALETTE, 0.12)[torch.arange(len(names)), index] * weight.amax(1)


def _one(pixels: _Pixels, scenes: Sequence[grammar.Scene]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Measure one thing: all that differs from the ground, whose colour is its mean in each frame.

    Returns coverages [(P,)], colours (B, 1, T, 3) and the probability of the prompt's colour (B, 1)."""
    colour, count = _solid_colour(pixels, torch.ones_like(pixels.far, dtype=torch.bool))
    direction = colour.flatten(0, 1)[pixels.frame] - pixels.ground
    alpha = (pixels.offset * direction).sum(1) / direction.square().sum(1).clamp(min=0.04)
    alpha = torch.where(count.flatten()[pixels.frame] > 0, alpha, 0.0)
    right = _right(colour, count, [scene.things[0].colour for scene in scenes])
    return [_coverage(pixels, alpha)], colour[:, None], right[:, None]


def _two(pixels: _Pixels, scenes: Sequence[grammar.Scene]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Measure two things by their hues against the ground: the two hues of the prompt, or, where one is missing, the
    strongest other hue in its place. In each pixel, offset = a_1 (c_1 - ground) + a_2 (c_2 - ground) is solved for the
    coverages a by least squares.

    Returns coverages [(P,), (P,)], colours (B, 2, T, 3) and the probabilities of the prompt's colours (B, 2)."""
    rows, count = torch.arange(len(scenes)), len(_PALETTE)
    hues = torch.nn.functional.normalize(_PALETTE - pixels.ground[:, None], dim=-1)  # (P, colours, 3)
    alike = (hues * pixels.offset[:, None]).sum(-1)  # cosine times the offset's length
    strong = pixels.far > 0.2
    places = pixels.video[strong] * count + alike[strong].argmax(1)
    mass = torch.bincount(places, minlength=count * len(scenes)).view(-1, count) / pixels.shape[1]  # pixels per frame
    named = torch.tensor([[_COLOUR_INDEX[thing.colour] for thing in scene.things] for scene in scenes])
    chosen = named.clone()
    for thing in (0, 1):
        others = mass.clone()
        for taken in (named[:, 0], named[:, 1], chosen[:, 0]):
            others[rows, taken] = 0
        value, strongest = others.max(1)
        missing = mass[rows, named[:, thing]] < MIN_AREA
        chosen[:, thing] = torch.where(missing & (value > MIN_AREA), strongest, named[:, thing])
    like = alike.gather(1, chosen[pixels.video])  # (P, 2)
    masks = ((like[:, 0] >= like[:, 1]) & strong, (like[:, 0] < like[:, 1]) & strong)

    colours, rights = [], []
    for thing, mask in enumerate(masks):
        colour, pixels_of = _solid_colour(pixels, mask & (like[:, thing] > 0.9 * pixels.far))
        rights.append(_right(colour, pixels_of, [scene.things[thing].colour for scene in scenes]))
        colours.append(torch.where((pixels_of > 3)[..., None], colour, _PALETTE[chosen[:, thing]][:, None]))
    one, two = (colour.flatten(0, 1)[pixels.frame] - pixels.ground for colour in colours)  # (P, 3)
    aa, bb, ab = one.square().sum(1), two.square().sum(1), (one * two).sum(1)
    va, vb = (pixels.offset * one).sum(1), (pixels.offset * two).sum(1)
    determinant = (aa * bb - ab * ab).clamp(min=1e-4)
    first, second = (bb * va - ab * vb) / determinant, (aa * vb - ab * va) / determinant
    no_first, no_second = first < HAZE, second < HAZE
    # Without coverage by one thing, a pixel belongs to the other alone; without any, to the one that explains more.
    only_first = no_second & (~no_first | (va.clamp(min=0).square() / aa > vb.clamp(min=0).square() / bb))
    only_second = no_first & ~only_first
    first = torch.where(only_first, va / aa, torch.where(only_second, 0.0, first))
    second = torch.where(only_second, vb / bb, torch.where(only_first, 0.0, second))
    return [_coverage(pixels, alpha) for alpha in (first, second)], torch.stack(colours, 1), torch.stack(rights, 1)


def _occlusion(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Presence and occlusion per frame. Of two things whose boxes meet, the one that loses more area is the rear one;
    it is hidden in the frames in which it loses area, and in the frames next to them.
    """
    area, rows = seen["area"], torch.arange(len(seen["area"]))
    visible = area >= MIN_AREA
    usual = torch.where(visible, area, torch.nan).nanquantile(0.9, dim=2, keepdim=True).nan_to_num(0.0).clamp(min=1e-3)
    loss = (1 - area / usual).clamp(0, 1)
    hidden, centre = torch.zeros_like(visible), _interpolated(seen["centre"], visible)
    if area.shape[1] == 2:
        radius = (usual / torch.pi).sqrt()  # (B, 2, 1)
        shape = mean(seen["likeness"].movedim(-1, 2), visible[:, :, None].float()).argmax(-1)
        reach = _EXTENTS[shape] * radius + 0.5  # (B, 2, 4), half a pixel of soft edge
        apart = centre[:, 1] - centre[:, 0]  # (B, T, 2), from the first to the second
        towards = torch.stack([reach[:, 0, [1, 3]] + reach[:, 1, [0, 2]], reach[:, 0, [0, 2]] + reach[:, 1, [1, 3]]], 1)
        meet = ((apart < towards[:, :1]) & (-apart < towards[:, 1:])).all(-1)
        # So near that the rear thing may be invisible, where it is visible before and after.
        spell = (visible.cumsum(2) > 0) & (visible.flip(2).cumsum(2).flip(2) > 0)
        deep = (apart.norm(dim=-1) < 0.75 * radius.sum(1))[:, None] & spell
        covered = (visible | deep) & meet[:, None] & (usual > MIN_AREA).all(1, keepdim=True)
        rear = (loss * covered).sum(2).argmax(1)  # (B,)
        lost = covered[rows, rear] & (loss[rows, rear] > LOST)
        near = torch.nn.functional.max_pool1d(lost.float()[:, None], 3, 1, 1)[:, 0] > 0
        hidden[rows, rear] = near & covered[rows, rear]
    legible = visible & (~hidden | (loss < 0.35))
    return {"visible": visible, "hidden": hidden, "loss": loss, "legible": legible, "centre": centre}


def _interpolated(centre: Tensor, visible: Tensor) -> Tensor:
    """Centres (B, N, T, 2); while a thing is invisible, on the straight line between its last and its next centre."""
    frame = torch.arange(visible.shape[2])
    before = torch.where(visible, frame, -1).cummax(2)[0]
    after = torch.where(visible, frame, visible.shape[2]).flip(2).cummin(2)[0].flip(2)
    before, after = torch.where(before < 0, after, before), torch.where(after == visible.shape[2], before, after)
    before, after = before.clamp(0, visible.shape[2] - 1), after.clamp(0, visible.shape[2] - 1)
    share = (frame - before) / (after - before).clamp(min=1)
    one, two = (centre.gather(2, at[..., None].expand_as(centre)) for at in (before, after))
    return torch.lerp(one, two, share[..., None])
