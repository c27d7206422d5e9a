"""The referee: visual quality, motion quality and text alignment of a ShapeWorld video, each in [0, 1], from pixels and
prompt alone.

It takes the place of the people who judge videos of real models. It recognises the ground and, by their colours, the
things on it; compares each thing, frame by frame, with the four ideal shapes at its measured place and size; and
follows place, size and colour over time. docs/referee.md gives every formula.

- VQ: does each frame show clean, evenly coloured shapes on a clean ground?
- MQ: do they move smoothly, without flicker, without melting or vanishing?
- TA: are colours, shapes, motions, relation and ground those of the prompt?
- overall: the mean of the three.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prism.shapeworld import grammar, world
from prism.shapeworld.sight import MIN_AREA, likelihood, mean, ramp
from prism.shapeworld.sight import measure as measure

DIMENSIONS = ("VQ", "MQ", "TA", "overall")
# The largest difference of two scores that counts as a tie.
TIE_MARGINS = {"VQ": 0.03, "MQ": 0.03, "TA": 0.03}

# Weights of a prompt's parts in TA. A relation has two values, time and depth (or one value twice), which both count.
WEIGHTS = {"colour": 1.0, "shape": 1.0, "motion": 1.0, "size": 0.5, "speed": 0.5, "ground": 0.5, "relation": 0.75}
_CHUNK = 32  # videos that are measured together


# -- the three scores


def _enough(seen: dict[str, Tensor]) -> Tensor:
    """1 where things are visible half of the time or more, falling to 0: an empty video has no quality."""
    return ramp((seen["visible"] | seen["hidden"]).float().mean((1, 2)), 0.0, 0.5)


def _visual_quality(seen: dict[str, Tensor]) -> Tensor:
    shapely = ramp(seen["likeness"].amax(-1), 0.55, 0.88)  # (B, N, T)
    shown = (seen["visible"] & ~seen["hidden"]).float()
    clean = ramp(seen["residue"], 0.10, 0.02).mean(1)
    return mean(shapely.flatten(1), shown.flatten(1)) * clean * _enough(seen)


def _motion_quality(seen: dict[str, Tensor]) -> Tensor:
    """The product of smoothness and constancy of size, colour, shape and presence of each thing, over the stretches in
    which it is in full view; the mean over the things, each weighted by the share of frames that show it.
    """
    present, whole = seen["visible"] | seen["hidden"], seen["visible"] & ~seen["hidden"]  # (B, N, T)
    jerk = seen["centre"].diff(n=3, dim=2).norm(dim=-1)  # pixels per frame^3
    pulse = seen["area"].clamp(min=MIN_AREA).log().diff(n=2, dim=2).abs()
    flicker = seen["colour"].diff(dim=2).norm(dim=-1)
    melt = seen["likeness"].diff(dim=2).abs().amax(-1)
    quality = (present[:, :, 1:] == present[:, :, :-1]).float().mean(2)
    for value, bad, good in (
        (jerk, 3.5, 1.0),
        (pulse, 0.35, 0.07),
        (flicker, 0.3, 0.05),
        (melt, 0.25, 0.05),
    ):
        length = seen["area"].shape[2] - value.shape[2] + 1  # frames that one value is computed from
        runs = whole.unfold(2, length, 1).all(-1).float()
        # A thing that is never in full view for so long is not marked down.
        quality = quality * torch.where(runs.sum(-1) > 0, mean(ramp(value, bad, good), runs), 1.0)
    return mean(quality, present.float().mean(2)) * _enough(seen)


_SPEED = {name: sum(span) / 2 for name, span in grammar.SPEEDS.items()}


def _motion_classes() -> tuple[list[str], Tensor]:
    """Names and features (K, 5) of a single thing's K motions: (x, y) moved, growth of the log radius, and (x, y) of
    the farthest deviation from the straight line.
    """
    names, rows = [], []
    for motion in grammar.SINGLE_MOTIONS:
        words, row = motion.split(), [0.0] * 5
        if words[0] == "moves":
            x, y = grammar.DIRECTIONS[words[-1]]
            far = _SPEED[words[1] if len(words) == 3 else ""]
            row[:2] = [x * far, y * far]
        elif words[0] in grammar.GROWTH:
            row[2] = 0.75 * grammar.GROWTH[words[0]]
        elif words[0] == "bounces":
            x, y = grammar.DIRECTIONS[grammar.WALLS[motion.removeprefix("bounces off the ")]]
            row[3:] = [x * 15.0, y * 15.0]
        names.append(motion)
        rows.append(row)
    return names, torch.tensor(rows)


_MOTIONS, _MOTION_FEATURES = _motion_classes()
_MOTION_SPREAD = torch.tensor([4.0, 4.0, 0.2, 4.0, 4.0])
_WAYS = torch.tensor([*grammar.DIRECTIONS.values(), (0, 0)], dtype=torch.float32)  # the last: still


def _trajectory(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The path of each thing over the frames in which it is `legible`: `net` (B, N, 2) pixels moved from the first to
    the last, `turn` (B, N, 2) its farthest deviation from the straight line between them, `growth` (B, N) of the log
    radius, `log_radius` (B, N) its mean, `progress` (B, N) share of the way gone at mid-clip, `far` (B, N) pixels
    moved.
    """
    whole = seen["legible"]
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
        "log_radius": mean(log_radius, whole.float()), "progress": along,
    }  # fmt: skip


def _text_parts(
    seen: dict[str, Tensor], scenes: Sequence[grammar.Scene]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Probabilities that each part of the prompt is right, by name, (B, N) or (B,), NaN where the prompt has no such
    part; and, as "shown", the share of frames (B,) that show every thing.
    """
    rows, path = torch.arange(len(scenes)), _trajectory(seen)
    whole = (seen["visible"] & ~seen["hidden"]).float()
    likeness = mean(seen["likeness"].movedim(-1, 2), whole[:, :, None])  # (B, N, shapes)
    of_shape = torch.softmax(likeness / 0.03, -1)
    shapes = torch.tensor([[grammar.SHAPES.index(thing.shape) for thing in scene.things] for scene in scenes])
    grounds = torch.tensor([list(grammar.GROUNDS).index(scene.ground) for scene in scenes])
    parts = {
        "colour": seen["right_colour"],
        "shape": of_shape.gather(2, shapes[..., None])[..., 0],
        "ground": seen["ground"][rows, grounds],
    }
    if len(scenes[0].things) == 1:
        parts |= _single_parts(path, scenes)
    else:
        parts |= _pair_parts(seen, path, scenes)
    return parts, {"shown": (seen["visible"] | seen["hidden"]).all(1).float().mean(1)}


def _single_parts(path: dict[str, Tensor], scenes: Sequence[grammar.Scene]) -> dict[str, Tensor]:
    rows = torch.arange(len(scenes))
    features = torch.cat([path["net"], path["growth"][..., None], path["turn"]], -1)[:, 0]
    # A bounce need not end where it began: up to 7 pixels of net movement do not count against it.
    of_motion = likelihood(features, _MOTION_FEATURES, _MOTION_SPREAD)
    bounced = torch.tensor([name.startswith("bounces") for name in _MOTIONS])
    forgiven = features.clone()
    forgiven[:, :2] = features[:, :2] - features[:, :2].clamp(-7, 7)
    of_bounce = likelihood(forgiven, _MOTION_FEATURES, _MOTION_SPREAD)
    turned = features[:, 3:].norm(dim=1) > 7.5
    of_motion = torch.where(turned[:, None], of_bounce, of_motion * ~bounced)
    of_motion = of_motion / of_motion.sum(1, keepdim=True).clamp(min=1e-6)
    kinds = [" ".join(word for word in name.split() if word not in grammar.SPEEDS) for name in _MOTIONS]
    motion, speed = torch.zeros(len(scenes)), torch.full((len(scenes),), torch.nan)
    for row, scene in enumerate(scenes):
        named = scene.things[0].motion
        kind = kinds[_MOTIONS.index(named)]
        motion[row] = of_motion[row, [i for i, other in enumerate(kinds) if other == kind]].sum()
        if named.startswith("moves"):
            speed[row] = of_motion[row, _MOTIONS.index(named)] / motion[row].clamp(min=1e-6) * (motion[row] > 0.1)
    typical = torch.tensor([[sum(span) / 2] for span in grammar.SIZES.values()]).log()
    of_size = likelihood(path["log_radius"][:, 0, None], typical, 0.12)
    sizes = torch.tensor([list(grammar.SIZES).index(scene.things[0].size or "medium") for scene in scenes])
    return {"motion": motion[:, None], "speed": speed, "size": of_size[rows, sizes]}


def _pair_parts(seen: dict[str, Tensor], path: dict[str, Tensor], scenes: Sequence[grammar.Scene]) -> dict[str, Tensor]:
    # Direction of each thing: its net movement, in units of 20 pixels and at most 1 long, compared with unit vectors.
    reach = path["net"] / 20.0
    reach = reach / reach.norm(dim=-1, keepdim=True).clamp(min=1.0)
    of_way = likelihood(reach, _WAYS, 0.3)  # (B, 2, 5)
    ways = list(grammar.DIRECTIONS)
    motion, relation = torch.zeros(2, len(scenes), 2)
    touching = (seen["centre"][:, 0] - seen["centre"][:, 1]).norm(dim=-1)  # (B, T) pixels apart
    lost = mean(seen["loss"], seen["hidden"].any(1, keepdim=True).float())  # (B, 2)
    both = (seen["visible"] | seen["hidden"]).all(1)[:, None].float()
    apart = mean((seen["centre"][:, 0] - seen["centre"][:, 1]).movedim(-1, 1), both)  # (B, 2)
    turns = path["progress"][:, 0] - path["progress"][:, 1]
    moved = ramp(path["far"].amin(1), 4.0, 10.0)
    contact = ramp(touching.amin(1), 14.0, 8.0)
    for row, scene in enumerate(scenes):
        for number, thing in enumerate(scene.things):
            if thing.motion == grammar.STILL:
                motion[row, number] = of_way[row, number, -1]
            elif thing.motion == "passes":
                across = (
                    ("up", "down") if scene.things[0].motion.split()[-1] in ("left", "right") else ("left", "right")
                )
                motion[row, number] = sum(of_way[row, number, ways.index(way)] for way in across)
            else:
                motion[row, number] = of_way[row, number, ways.index(thing.motion.split()[-1])]
        rear = world.behind(scene)
        depth = contact[row] * torch.sigmoid((lost[row, rear] - lost[row, 1 - rear]) / 0.06)
        in_turn = moved[row] * ramp(turns[row], 0.3, 0.8)
        if scene.relation in grammar.PLACES:
            side = torch.tensor(grammar.PLACES[scene.relation], dtype=torch.float32)
            relation[row] = torch.sigmoid((apart[row] @ side - 5.0) / 1.5)
        elif scene.relation in grammar.DEPTHS:
            relation[row] = depth
        elif scene.relation == "while":
            relation[row] = moved[row] * ramp(turns[row].abs(), 0.6, 0.2)
        elif scene.relation == "then":
            relation[row] = in_turn
        else:
            relation[row, 0], relation[row, 1] = in_turn, depth
    return {"motion": motion, "relation": relation}


def _text_alignment(parts: dict[str, Tensor], shown: Tensor) -> Tensor:
    total, weight = torch.zeros_like(shown), torch.zeros_like(shown)
    for name, value in parts.items():
        each = value if value.ndim == 2 else value[:, None]
        named = ~each.isnan()
        total = total + WEIGHTS[name] * each.nan_to_num(0.0).sum(1)
        weight = weight + WEIGHTS[name] * named.sum(1)
    return shown * total / weight


def parsed(prompts: Sequence[str]) -> list[grammar.Scene]:
    """The scenes that prompts describe. Raises ValueError for a prompt outside the grammar."""
    scenes = []
    for prompt in prompts:
        scene = grammar.parse(prompt)
        if scene is None:
            raise ValueError(f"prompt {prompt!r} is outside ShapeWorld's grammar: the referee cannot judge it")
        scenes.append(scene)
    return scenes


@torch.no_grad()
def _judge(videos: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores VQ, MQ and TA, (3, B), and what `correct` returns."""
    scenes, videos = parsed(prompts), torch.as_tensor(videos)
    scores = torch.zeros(3, len(scenes))
    right = {name: torch.full((len(scenes),), torch.nan) for name in WEIGHTS}
    for things in (1, 2):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) == things]
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            chunk_scenes = [scenes[row] for row in chunk]
            seen = measure(videos[chunk], chunk_scenes)
            parts, extra = _text_parts(seen, chunk_scenes)
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


def reward(videos: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, Tensor]:
    """VQ, MQ and TA (B,) of videos (T, H, W, 3) uint8: a reward function for `prism collect`.

    Raises ValueError for a prompt outside the grammar, or videos of another size than ShapeWorld's.
    """
    for video in videos:
        if video.shape != (world.FRAMES, world.SIZE, world.SIZE, 3):
            raise ValueError(
                f"the referee measures {world.FRAMES} frames of {world.SIZE} by {world.SIZE}, found {video.shape[:3]}"
            )
    scores = batch(torch.from_numpy(np.stack(videos)).float() / 255, prompts)
    return {name: scores[name] for name in TIE_MARGINS}


def correct(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Tell which parts of the prompts are right: by name (colour, shape, motion, size, speed, ground, relation) a
    tensor (B,), 1.0 where the probability is above one half, else 0.0, and NaN where the prompt has no such part. Where
    there are two things, both must be right."""
    return _judge(videos, prompts)[1]


def score(video: Tensor, prompt: str) -> dict[str, float]:
    """Scores of one video (T, H, W, 3) in [0, 1] for its prompt."""
    return {name: float(value[0]) for name, value in batch(torch.as_tensor(video)[None], [prompt]).items()}
