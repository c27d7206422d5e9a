"""The referee: visual quality, motion quality and text alignment of a ShapeWorld video, each in [0, 1], from pixels and
prompt alone.

It stands where people stand for real models. It finds which of the known grounds is seen, the things on it by their
colours, compares each thing frame by frame with the four ideal shapes at the measured place and size, and follows
place, size and colour over time. docs/referee.md gives every formula.

- VQ: does each frame show clean, evenly coloured shapes on a clean ground?
- MQ: do they move smoothly, without flicker, without melting or vanishing?
- TA: are colours, shapes, motions, relation and ground those of the prompt?
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

MIN_AREA = 12.0  # pixels; less is no thing
HAZE = 0.15  # coverage below which a pixel is stained, not covered
WEIGHTS = {"colour": 1.0, "shape": 1.0, "motion": 1.0, "size": 0.5, "speed": 0.5, "ground": 0.5, "relation": 1.5}
_PALETTE = torch.tensor(list(world.COLOURS.values()))
_GROUNDS = torch.stack([world.ground_image(name) for name in world.GROUNDS])  # (4, H, W, 3)
_CHUNK = 32  # videos measured at a time


def _ramp(value: Tensor, bad: float, good: float) -> Tensor:
    """0 at `bad` or worse, 1 at `good` or better, linear between."""
    return ((value - bad) / (good - bad)).clamp(0, 1)


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the last axis; 0 where nothing has weight."""
    return (value * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)


def _likelihood(features: Tensor, classes: Tensor, spread: Tensor | float) -> Tensor:
    """Probabilities of classes (K, F) for features (..., F): Gaussian kernels of a standard deviation, normalised."""
    return torch.softmax(-((features[..., None, :] - classes) / spread).square().sum(-1) / 2, -1)


# -- what is seen


@torch.no_grad()
def measure(videos: Tensor, scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """What is seen of N = 1 or 2 things (the same for all scenes): videos (B, T, H, W, 3) in [0, 1].

    Returns `ground` (B, grounds) probabilities; `alpha` (B, N, T, H, W) coverage; `area` (B, N, T) pixels; `centre`
    (B, N, T, 2) as (x, y); `colour` (B, N, T, 3); `likeness` (B, N, T, shapes) soft intersection over union with each
    ideal shape; `right_colour` (B, N) in [0, 1]; `residue` (B, T): root mean square of what evenly coloured things on
    the ground leave unexplained; `present` (B, N, T); `hidden` (B, N, T): partly behind the other thing; `loss` (B, N,
    T): share of the thing's own usual area that is not seen."""
    videos = videos.float()
    edge = torch.ones(world.SIZE, world.SIZE, dtype=torch.bool)
    edge[3:-3, 3:-3] = False
    off = (videos[:, :, edge][:, None] - _GROUNDS[:, edge][None, :, None]).abs().mean(-1).clamp(max=0.2).mean((2, 3))
    ground = torch.softmax(-off / 0.015, 1)  # (B, grounds)
    empty = _GROUNDS[off.argmin(1)]  # (B, H, W, 3)
    offset = videos - empty[:, None]
    single = len(scenes[0].things) == 1
    seen = (_one if single else _two)(videos, offset, empty, scenes)
    alpha, colour = seen["alpha"], seen["colour"]
    painted = (alpha[..., None] * (colour[:, :, :, None, None] - empty[:, None, None])).sum(1)
    residue = (offset - painted).square().mean((2, 3, 4)).sqrt()

    area = alpha.sum((3, 4))
    x, y = world.pixel_grid()
    safe = area.clamp(min=1e-3)
    centre = torch.stack([(alpha * x).sum((3, 4)) / safe, (alpha * y).sum((3, 4)) / safe], -1)
    radius = (area / torch.pi).sqrt().clamp(min=0.5)[..., None, None]
    dx, dy = x - centre[..., :1, None], y - centre[..., 1:, None]
    present = area >= MIN_AREA
    likeness = torch.stack(
        [
            torch.minimum(alpha, ideal).sum((3, 4)) / torch.maximum(alpha, ideal).sum((3, 4)).clamp(min=1e-3)
            for ideal in (world.coverage(shape, dx, dy, radius) for shape in world.SHAPES)
        ],
        -1,
    )
    usual = torch.where(present, area, torch.nan).nanquantile(0.7, dim=2, keepdim=True).nan_to_num(0.0).clamp(min=1e-3)
    loss = (1 - area / usual).clamp(0, 1)
    hidden = torch.zeros_like(present)
    if not single:
        reach = (usual / torch.pi).sqrt().sum(1)  # (B, 1)
        touching = (centre[:, 0] - centre[:, 1]).norm(dim=-1) < 1.25 * reach
        touching &= (present & (usual >= MIN_AREA)).any(1)
        rear = (loss * touching[:, None]).sum(2).argmax(1)  # (B,) who loses more while they touch
        hidden[torch.arange(len(videos)), rear] = touching & (loss[torch.arange(len(videos)), rear] > 0.08)
    return {
        **seen, "ground": ground, "area": area, "centre": centre, "residue": residue, "present": present | hidden,
        "likeness": likeness * present[..., None], "hidden": hidden, "loss": loss,
    }  # fmt: skip


def _one(videos: Tensor, offset: Tensor, empty: Tensor, scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """The one thing: whatever differs from the ground, in its own mean colour in each frame."""
    strength = offset.norm(dim=-1)  # (B, T, H, W)
    peak = strength.flatten(2).kthvalue(int(0.99 * world.SIZE**2), 2)[0]
    solid = ((strength > 0.6 * peak[..., None, None]) & (strength > 0.2)).float()
    colour = (videos * solid[..., None]).sum((2, 3)) / solid.sum((2, 3)).clamp(min=1)[..., None]  # (B, T, 3)
    direction = colour[:, :, None, None] - empty[:, None]
    alpha = ((offset * direction).sum(-1) / direction.square().sum(-1).clamp(min=0.04)).clamp(0, 1)
    alpha = torch.where((alpha < HAZE) | (peak < 0.15)[..., None, None], 0.0, alpha)
    weight = (alpha.sum((2, 3)) >= MIN_AREA).float()
    mean = (colour * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
    asked = torch.tensor([list(world.COLOURS).index(scene.things[0].colour) for scene in scenes])
    of_colour = _likelihood(mean, _PALETTE, 0.12)[torch.arange(len(scenes)), asked]
    return {"alpha": alpha[:, None], "colour": colour[:, None], "right_colour": (of_colour * weight.amax(1))[:, None]}


def _two(videos: Tensor, offset: Tensor, empty: Tensor, scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """Two things by their colours: those asked for, or where one is not there the strongest colour that is left.

    In each pixel, offset = a_1 (c_1 - ground) + a_2 (c_2 - ground) is solved for the coverages by least squares."""
    names, rows = list(world.COLOURS), torch.arange(len(scenes))
    distance = torch.cdist(videos.flatten(0, 3), _PALETTE).view(*videos.shape[:4], len(names))
    near, nearest = distance.min(-1)
    near = (near < 0.3) & (offset.norm(dim=-1) > 0.25)
    counts = torch.stack([(near & (nearest == index)).sum((2, 3)) for index in range(len(names))], -1).float()
    mass = counts.mean(1)  # (B, colours), pixels a frame
    asked = torch.tensor([[names.index(thing.colour) for thing in scene.things] for scene in scenes])
    chosen = asked.clone()
    for thing in (0, 1):
        others = mass.clone()
        others[rows, asked[:, 0]] = 0
        others[rows, asked[:, 1]] = 0
        others[rows, chosen[:, 0]] = 0
        value, strongest = others.max(1)
        chosen[:, thing] = torch.where((mass[rows, asked[:, thing]] < 12) & (value > 12), strongest, asked[:, thing])
    # the asked colour is there in the frames in which most of it is seen (it may be hidden in others)
    there = _ramp(torch.stack([counts[rows, :, asked[:, thing]] for thing in (0, 1)], 1), 15.0, 60.0)
    right = there.sort(2, descending=True)[0][:, :, : (2 * world.FRAMES) // 3].mean(2)

    one, two = (_PALETTE[chosen[:, thing]][:, None, None] - empty for thing in (0, 1))  # (B, H, W, 3)
    aa, bb, ab = one.square().sum(-1)[:, None], two.square().sum(-1)[:, None], (one * two).sum(-1)[:, None]
    va, vb = (offset * one[:, None]).sum(-1), (offset * two[:, None]).sum(-1)
    determinant = (aa * bb - ab * ab).clamp(min=1e-4)
    first, second = (bb * va - ab * vb) / determinant, (aa * vb - ab * va) / determinant
    alone = (second < HAZE, first < HAZE)
    first = torch.where(alone[0], va / aa, first)
    second = torch.where(alone[1], vb / bb, second)
    first, second = torch.where(alone[1] & ~alone[0], 0.0, first), torch.where(alone[0] & ~alone[1], 0.0, second)
    both = alone[0] & alone[1]
    stronger = va / aa > vb / bb
    first, second = torch.where(both & ~stronger, 0.0, first), torch.where(both & stronger, 0.0, second)
    alpha = torch.stack([first, second], 1).clamp(0, 1)
    alpha = torch.where(alpha < HAZE, 0.0, alpha)
    solid = (alpha > 0.6).float()
    colour = (videos[:, None] * solid[..., None]).sum((3, 4)) / solid.sum((3, 4)).clamp(min=1)[..., None]
    colour = torch.where(solid.sum((3, 4))[..., None] > 0, colour, _PALETTE[chosen][:, :, None])
    return {"alpha": alpha, "colour": colour, "right_colour": right}


# -- the three scores


def _visual_quality(seen: dict[str, Tensor]) -> Tensor:
    shapely = _ramp(seen["likeness"].amax(-1), 0.55, 0.88)  # (B, N, T)
    shown = (~seen["hidden"]).float()
    clean = _ramp(seen["residue"], 0.10, 0.02)
    return (_mean(shapely.transpose(1, 2), shown.transpose(1, 2)) * clean).mean(1)


def _motion_quality(seen: dict[str, Tensor]) -> Tensor:
    """Smoothness, constancy of size, colour and shape; frames without the thing count as broken, hidden ones not at
    all. The mean over the things.
    """
    whole, shown = (seen["present"] & ~seen["hidden"]), ~seen["hidden"]  # (B, N, T)

    def runs(values: Tensor, length: int) -> Tensor:
        return values.unfold(2, length, 1).all(-1).float()

    centre, log_area = seen["centre"], seen["area"].clamp(min=MIN_AREA).log()
    jerk = centre.diff(n=3, dim=2).norm(dim=-1)  # pixels a frame^3
    pulse = log_area.diff(n=2, dim=2).abs()
    flicker = seen["colour"].diff(dim=2).norm(dim=-1)
    melt = seen["likeness"].diff(dim=2).abs().amax(-1)
    parts = (
        (_ramp(jerk, 3.5, 1.0), 4), (_ramp(pulse, 0.35, 0.07), 3), (_ramp(flicker, 0.3, 0.05), 2),
        (_ramp(melt, 0.25, 0.05), 2),
    )  # fmt: skip
    quality = torch.ones(())
    for value, length in parts:
        seen_runs = runs(shown, length)  # none: the thing was never long in full view, and nothing is held against it
        kept = _mean(value * runs(whole, length), seen_runs)
        quality = quality * torch.where(seen_runs.sum(-1) > 0, kept, 1.0)
    return quality.mean(1)


_SPEED = {name: sum(span) / 2 for name, span in world.SPEEDS.items()}


def _motion_classes() -> tuple[list[str], Tensor]:
    """Names and (K, 5) features of a single thing's motions: (x, y) moved, growth of the log radius, (x, y) of the
    turn.
    """
    names, rows = [], []
    for motion in world.SINGLE_MOTIONS:
        words, row = motion.split(), [0.0] * 5
        if words[0] == "moves":
            x, y = world.DIRECTIONS[words[-1]]
            far = _SPEED[words[1] if len(words) == 3 else ""]
            row[:2] = [x * far, y * far]
        elif words[0] in world.GROWTH:
            row[2] = 0.75 * world.GROWTH[words[0]]
        elif words[0] == "bounces":
            x, y = world.DIRECTIONS[world.WALLS[motion.removeprefix("bounces off the ")]]
            row[3:] = [x * 15.0, y * 15.0]
        names.append(motion)
        rows.append(row)
    return names, torch.tensor(rows)


_MOTIONS, _MOTION_FEATURES = _motion_classes()
_MOTION_SPREAD = torch.tensor([4.0, 4.0, 0.2, 4.0, 4.0])
_WAYS = torch.tensor([*world.DIRECTIONS.values(), (0, 0)], dtype=torch.float32)  # and still


def _trajectory(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over frames in which a thing is seen whole: `net` (B, N, 2) pixels moved from the first to the last, `turn` (B,
    N, 2) the farthest it strays from the straight line between, `growth` (B, N) of the log radius, `log_radius` (B, N) its
    mean, `progress` (B, N) share of the way done at mid-clip, `far` (B, N) pixels moved.
    """
    whole = seen["present"] & ~seen["hidden"]
    frame = torch.arange(world.FRAMES, dtype=torch.float32)
    first = torch.where(whole, frame, torch.inf).amin(-1, keepdim=True).clamp(max=world.FRAMES - 1)
    last = torch.where(whole, frame, -torch.inf).amax(-1, keepdim=True).clamp(min=0)
    head = (whole & (frame < first + 2)).float()
    tail = (whole & (frame > last - 2)).float()

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:  # (B, N, T, F) -> (B, N, F) each
        return tuple((values * w[..., None]).sum(2) / w.sum(2, keepdim=True).clamp(min=1) for w in (head, tail))  # type: ignore[return-value]

    log_radius = 0.5 * (seen["area"].clamp(min=1) / torch.pi).log()
    start, end = ends(seen["centre"])
    small, big = ends(log_radius[..., None])
    longer = (last - first + 1).clamp(min=2)
    stretch = (longer - 1) / (longer - 2).clamp(min=1)  # means of two frames lie half a frame inside the ends
    chord = (
        start[:, :, None] + (end - start)[:, :, None] * ((frame - first - 0.5) / (longer - 2).clamp(min=1))[..., None]
    )
    stray = (seen["centre"] - chord) * whole[..., None]
    at = stray.norm(dim=-1).argmax(-1)
    turn = stray.gather(2, at[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    net = (end - start) * stretch
    far = (end - start).norm(dim=-1)
    middle = seen["centre"][:, :, world.FRAMES // 2]
    along = ((middle - start) * (end - start)).sum(-1) / far.square().clamp(min=1e-3)
    return {
        "net": net, "turn": turn, "growth": (big - small)[..., 0] * stretch[..., 0], "far": far,
        "log_radius": _mean(log_radius, whole.float()), "progress": along,
    }  # fmt: skip


def _text_parts(seen: dict[str, Tensor], scenes: Sequence[world.Scene]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Probabilities of what the prompt names, (B, N) or (B,) by name, NaN where it does not apply; and the share of
    frames that show every thing, as "shown".
    """
    rows, path = torch.arange(len(scenes)), _trajectory(seen)
    whole = (seen["present"] & ~seen["hidden"]).float()
    likeness = _mean(seen["likeness"].movedim(-1, 2), whole[:, :, None])  # (B, N, shapes)
    of_shape = torch.softmax(likeness / 0.03, -1)
    shapes = torch.tensor([[world.SHAPES.index(thing.shape) for thing in scene.things] for scene in scenes])
    grounds = torch.tensor([list(world.GROUNDS).index(scene.ground) for scene in scenes])
    parts = {
        "colour": seen["right_colour"],
        "shape": of_shape.gather(2, shapes[..., None])[..., 0],
        "ground": seen["ground"][rows, grounds],
    }
    if len(scenes[0].things) == 1:
        parts |= _single_parts(path, scenes)
    else:
        parts |= _pair_parts(seen, path, scenes)
    return parts, {"shown": seen["present"].all(1).float().mean(1)}


def _single_parts(path: dict[str, Tensor], scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    rows = torch.arange(len(scenes))
    features = torch.cat([path["net"], path["growth"][..., None], path["turn"]], -1)[:, 0]
    # a bounce also ends elsewhere than it began, so what it moved is forgiven along the wall's axis
    of_motion = _likelihood(features, _MOTION_FEATURES, _MOTION_SPREAD)
    bounced = torch.tensor([name.startswith("bounces") for name in _MOTIONS])
    forgiven = features.clone()
    forgiven[:, :2] = features[:, :2] - features[:, :2].clamp(-7, 7)
    of_bounce = _likelihood(forgiven, _MOTION_FEATURES, _MOTION_SPREAD)
    turned = features[:, 3:].norm(dim=1) > 7.5
    of_motion = torch.where(turned[:, None], of_bounce, of_motion * ~bounced)
    of_motion = of_motion / of_motion.sum(1, keepdim=True).clamp(min=1e-6)
    kinds = [" ".join(name.split()[:1] + name.split()[-1:]) for name in _MOTIONS]  # without the speed
    motion, speed = torch.zeros(len(scenes)), torch.full((len(scenes),), torch.nan)
    for row, scene in enumerate(scenes):
        asked = scene.things[0].motion
        kind = kinds[_MOTIONS.index(asked)]
        motion[row] = of_motion[row, [i for i, other in enumerate(kinds) if other == kind]].sum()
        if asked.startswith("moves"):
            speed[row] = of_motion[row, _MOTIONS.index(asked)] / motion[row].clamp(min=1e-6) * (motion[row] > 0.1)
    typical = torch.tensor([[sum(span) / 2] for span in world.SIZES.values()]).log()
    of_size = _likelihood(path["log_radius"][:, 0, None], typical, 0.12)
    sizes = torch.tensor([list(world.SIZES).index(scene.things[0].size or "medium") for scene in scenes])
    return {"motion": motion[:, None], "speed": speed, "size": of_size[rows, sizes]}


def _pair_parts(seen: dict[str, Tensor], path: dict[str, Tensor], scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    # which way each thing went: the direction's unit vector is compared with what it moved, 20 pixels being plenty
    reach = path["net"] / 20.0
    reach = reach / reach.norm(dim=-1, keepdim=True).clamp(min=1.0)
    of_way = _likelihood(reach, _WAYS, 0.3)  # (B, 2, 5)
    ways = list(world.DIRECTIONS)
    motion, relation = torch.zeros(len(scenes), 2), torch.zeros(len(scenes))
    touching = (seen["centre"][:, 0] - seen["centre"][:, 1]).norm(dim=-1)  # (B, T) pixels apart
    lost = _mean(seen["loss"], seen["hidden"].any(1, keepdim=True).float())  # (B, 2)
    apart = _mean((seen["centre"][:, 0] - seen["centre"][:, 1]).movedim(-1, 1), seen["present"].all(1)[:, None].float())
    turns = path["progress"][:, 0] - path["progress"][:, 1]
    moved = _ramp(path["far"].amin(1), 4.0, 10.0)
    met = _ramp(touching.amin(1), 14.0, 8.0)
    for row, scene in enumerate(scenes):
        for number, thing in enumerate(scene.things):
            if thing.motion == world.STILL:
                motion[row, number] = of_way[row, number, -1]
            elif thing.motion == "passes":
                across = (
                    ("up", "down") if scene.things[0].motion.split()[-1] in ("left", "right") else ("left", "right")
                )
                motion[row, number] = sum(of_way[row, number, ways.index(way)] for way in across)
            else:
                motion[row, number] = of_way[row, number, ways.index(thing.motion.split()[-1])]
        rear = world.behind(scene)
        depth = met[row] * torch.sigmoid((lost[row, rear] - lost[row, 1 - rear]) / 0.06)
        in_turn = moved[row] * _ramp(turns[row], 0.3, 0.8)
        if scene.relation in world.PLACES:
            place = torch.tensor(world.PLACES[scene.relation], dtype=torch.float32)
            relation[row] = torch.sigmoid((apart[row] @ place - 5.0) / 1.5)
        elif scene.relation in world.DEPTHS:
            relation[row] = depth
        elif scene.relation == "while":
            relation[row] = moved[row] * _ramp(turns[row].abs(), 0.6, 0.2)
        elif scene.relation == "then":
            relation[row] = in_turn
        else:
            relation[row] = (in_turn + depth) / 2
    return {"motion": motion, "relation": relation}


def _text_alignment(parts: dict[str, Tensor], shown: Tensor) -> Tensor:
    total, weight = torch.zeros_like(shown), torch.zeros_like(shown)
    for name, value in parts.items():
        each = value if value.ndim == 2 else value[:, None]
        named = ~each.isnan()
        total = total + WEIGHTS[name] * each.nan_to_num(0.0).sum(1)
        weight = weight + WEIGHTS[name] * named.sum(1)
    return shown * total / weight


def _parsed(prompts: Sequence[str]) -> list[world.Scene]:
    scenes = []
    for prompt in prompts:
        scene = world.parse(prompt)
        if scene is None:
            raise ValueError(f"prompt {prompt!r} is outside ShapeWorld's grammar: the referee cannot judge it")
        scenes.append(scene)
    return scenes


@torch.no_grad()
def _judge(videos: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores (3, B), and what the prompt names, right or wrong, by name (B,)."""
    scenes, videos = _parsed(prompts), torch.as_tensor(videos)
    scores = torch.zeros(3, len(scenes))
    right = {name: torch.full((len(scenes),), torch.nan) for name in WEIGHTS}
    for things in (1, 2):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) == things]
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            asked = [scenes[row] for row in chunk]
            seen = measure(videos[chunk], asked)
            parts, extra = _text_parts(seen, asked)
            alignment = _text_alignment(parts, extra["shown"])
            scores[:, chunk] = torch.stack([_visual_quality(seen), _motion_quality(seen), alignment])
            for name, value in parts.items():
                each = value.amin(1) if value.ndim == 2 else value
                right[name][chunk] = torch.where(each.isnan(), torch.nan, (each > 0.5).float())
    return scores, right


def batch(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Scores of videos (B, T, H, W, 3) in [0, 1]: a dict of (B,) tensors for VQ, MQ, TA and overall.

    Raises ValueError for a prompt outside the grammar.
    """
    scores, _ = _judge(videos, prompts)
    return {"VQ": scores[0], "MQ": scores[1], "TA": scores[2], "overall": scores.mean(0)}


def correct(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Whether each part of the prompt is what is seen, more likely than not: (B,) of 1.0, 0.0, or NaN where the prompt
    has no such part, for colour, shape, motion, size, speed, ground and relation. Of two things both must be right."""
    return _judge(videos, prompts)[1]


def score(video: Tensor, prompt: str) -> dict[str, float]:
    """Scores of one video (T, H, W, 3) in [0, 1] for its prompt."""
    return {name: float(value[0]) for name, value in batch(torch.as_tensor(video)[None], [prompt]).items()}
