"""ShapeWorld's prompts: plain English from a small grammar, the meaning of each word, and the splits.

A scene is one or two coloured shapes on a ground. One shape moves (slowly, quickly), grows, shrinks, stays still or
bounces off a wall; two stand in a relation of place, of depth (one occludes the other) or of time (one moves, then the
other)."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from prism.errors import PrismError, whole

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
GROUNDS = {  # (colour, colour of the stripes)
    "dark": ((0.10, 0.10, 0.13), (0.10, 0.10, 0.13)),
    "grey": ((0.36, 0.36, 0.38), (0.36, 0.36, 0.38)),
    "brown": ((0.32, 0.20, 0.10), (0.32, 0.20, 0.10)),
    "striped": ((0.08, 0.10, 0.16), (0.24, 0.26, 0.34)),
}

DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down
SIZES = {
    "small": (5.5, 7.0),
    "medium": (8.0, 11.0),
    "large": (12.5, 14.0),
}  # radius of the circle of equal area, pixels
SPEEDS = {"slowly": (9.0, 12.0), "": (18.0, 24.0), "quickly": (30.0, 34.0)}  # pixels a shape travels in the clip
GROWTH = {"grows": 1, "shrinks": -1}
WALLS = {"floor": "down", "ceiling": "up", "left wall": "left", "right wall": "right"}
STILL = "stays still"
SINGLE_MOTIONS = (
    *(f"moves {speed} {way}".replace("  ", " ") for way in DIRECTIONS for speed in SPEEDS),
    *GROWTH,
    STILL,
    *(f"bounces off the {wall}" for wall in WALLS),
)
# relation -> direction (x, y) from the second shape, which stays still, to the first
PLACES = {"above": (0, -1), "below": (0, 1), "on the left of": (-1, 0), "on the right of": (1, 0)}
DEPTHS = ("in front of", "behind")
TIMES = ("while", "then")
RELATIONS = (*PLACES, *DEPTHS, *TIMES, "then passes behind", "then passes in front of")

# Pairs of colour and shape that no generator and no head is trained on: prompts with them are outside the domain.
UNSEEN = (("purple", "cross"), ("orange", "triangle"), ("cyan", "square"))
SPLITS = {"train": 750, "validation": 40, "test": 200, "unseen": 40}
_BUCKETS = {"train": range(7), "validation": range(7, 8), "test": range(8, 10)}
KINDS = ("single", "pair")


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: its words, and how it moves (`STILL`, one of `SINGLE_MOTIONS`, or `passes`)."""

    colour: str
    shape: str
    motion: str
    size: str = ""  # "small", "large", or "" where the prompt names no size

    @property
    def noun(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """The content of a prompt: one thing, or two with a relation (one of `RELATIONS`), on a ground."""

    things: tuple[Thing, ...]
    relation: str = ""
    ground: str = "dark"

    @property
    def kind(self) -> str:
        return KINDS[len(self.things) - 1]

    @property
    def prompt(self) -> str:
        first, text = self.things[0], f"{self.things[0].noun} {self.things[0].motion}"
        if self.relation in (*PLACES, *DEPTHS):
            text = f"{first.noun} {first.motion} {self.relation} {self.things[1].noun}"
        elif self.relation in TIMES:
            comma = "," if self.relation == "then" else ""
            text += f"{comma} {self.relation} {self.things[1].noun} {self.things[1].motion}"
        elif self.relation:
            text += f", then {self.things[1].noun} {self.relation.removeprefix('then ')} it"
        return text if self.ground == "dark" else f"{text} on a {self.ground} ground"


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_NOUN = rf"an? (?:(small|large) )?({_alternatives(tuple(COLOURS))}) ({_alternatives(SHAPES)})"
_MOVES = rf"moves (?:{_alternatives(tuple(DIRECTIONS))})"
_PATTERNS = (
    rf"{_NOUN} ({_alternatives(SINGLE_MOTIONS)})",
    rf"{_NOUN} ({_MOVES}) ({_alternatives((*PLACES, *DEPTHS))}) {_NOUN}",
    rf"{_NOUN} ({_MOVES}),? ({_alternatives(TIMES)}) {_NOUN} ({_MOVES})",
    rf"{_NOUN} ({_MOVES}),? (then) {_NOUN} (passes (?:{_alternatives(DEPTHS)})) it",
)


def parse(prompt: str) -> Scene | None:
    """The scene of a prompt, or None outside the grammar: the referee cannot score such a prompt."""
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    ground = "dark"
    match = re.fullmatch(rf"(.*) on a ({_alternatives(tuple(GROUNDS))}) ground", text)
    if match:
        text, ground = match.groups()
    for number, pattern in enumerate(_PATTERNS):
        match = re.fullmatch(pattern, text)
        if not match:
            continue
        size, colour, shape, motion, *rest = (word or "" for word in match.groups())
        first = Thing(colour, shape, motion, size)
        if number == 0:
            scene = Scene((first,), ground=ground)
        elif number == 1:
            scene = Scene((first, Thing(rest[2], rest[3], STILL, rest[1])), rest[0], ground)
        elif number == 2:
            scene = Scene((first, Thing(rest[2], rest[3], rest[4], rest[1])), rest[0], ground)
        else:
            scene = Scene((first, Thing(rest[2], rest[3], "passes", rest[1])), f"then {rest[4]}", ground)
        return scene if _sensible(scene) else None
    return None


def _sensible(scene: Scene) -> bool:
    """Tell if the grammar allows a scene. A large shape has no room to move quickly. Two shapes differ in colour and
    have no size word, and a shape that moves beside another moves along that side of it.
    """
    if scene.kind == "single":
        return not (scene.things[0].size == "large" and "quickly" in scene.things[0].motion)
    first, second = scene.things
    if first.colour == second.colour or first.size or second.size:
        return False
    if scene.relation in PLACES:
        along = DIRECTIONS[first.motion.split()[-1]]
        side = PLACES[scene.relation]
        return along[0] * side[0] + along[1] * side[1] == 0
    return True


def draw_scene(chance: random.Random, kind: str) -> Scene:
    """A random scene of a kind (`single` or `pair`), of any split."""
    while True:
        ground = chance.choice(("dark", "dark", *GROUNDS))
        things = [Thing(chance.choice(tuple(COLOURS)), chance.choice(SHAPES), "") for _ in range(2)]
        if kind == "single":
            motion = chance.choice((*SINGLE_MOTIONS, *(f"moves {way}" for way in DIRECTIONS)))
            size = chance.choice(("", "", "small", "large"))
            scene = Scene((Thing(things[0].colour, things[0].shape, motion, size),), ground=ground)
        else:
            relation = chance.choice(RELATIONS)
            ways = [f"moves {chance.choice(tuple(DIRECTIONS))}" for _ in range(2)]
            if relation in (*PLACES, *DEPTHS):
                ways[1] = STILL
            elif relation not in TIMES:
                ways[1] = "passes"
            pair = tuple(Thing(t.colour, t.shape, way) for t, way in zip(things, ways, strict=True))
            scene = Scene(pair, relation, ground)
        if _sensible(scene):
            return scene


def split_of(scene: Scene) -> str:
    """The split of a scene: `unseen` where a thing is one of `UNSEEN`, else by a hash of the prompt."""
    if any((thing.colour, thing.shape) in UNSEEN for thing in scene.things):
        return "unseen"
    bucket = int(hashlib.sha256(scene.prompt.encode()).hexdigest(), 16) % 10
    return next(name for name, buckets in _BUCKETS.items() if bucket in buckets)


def prompts(split: str, count: int | None = None, kind: str | None = None) -> list[str]:
    """Distinct prompts of one split: `train`, `validation`, `test`, or `unseen` (combinations of colour and shape that
    neither the generator nor a head was trained on). No two splits share a prompt.

    `count` defaults to that of `SPLITS`; a longer list starts with the shorter. Prompts with one shape and with two
    alternate; `kind` (`single` or `pair`) gives one sort only. Raises PrismError where the split has fewer."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is {kind!r}: use one of {', '.join(KINDS)}")
    number = whole("The number of prompts", SPLITS[split] if count is None else count, 0)
    _check_supply(split, number, kind)
    chance, drawn = random.Random(f"{split} {kind or ''}"), dict[str, None]()
    while len(drawn) < number:
        scene = draw_scene(chance, kind or KINDS[len(drawn) % 2])
        if split_of(scene) == split:
            drawn[scene.prompt] = None
    return list(drawn)


def _check_supply(split: str, number: int, kind: str | None) -> None:
    """Refuse more prompts than a split has, of one kind or, where the kinds alternate, of the scarcer kind."""
    shares = {kind: number} if kind else {KINDS[0]: (number + 1) // 2, KINDS[1]: number // 2}
    for name, share in shares.items():
        if share > _AT_LEAST[name]:  # only then count them, which takes a moment
            supply = _supply(name)[split]
            if share > supply:
                most = supply if kind else 2 * supply + (name == KINDS[1])
                raise PrismError(
                    f"The split {split} has {most} different prompts{f' of the kind {kind}' if kind else ''}, found "
                    f"{number} asked for; ask for fewer."
                )


_AT_LEAST = {"single": 600, "pair": 10_000}  # every split has at least as many prompts of the kind


@cache
def _supply(kind: str) -> dict[str, int]:
    """The number of different prompts of a kind, per split."""
    numbers = dict.fromkeys(SPLITS, 0)
    for scene in {scene.prompt: scene for scene in _every_scene(kind)}.values():
        numbers[split_of(scene)] += 1
    return numbers


def _every_scene(kind: str) -> Iterator[Scene]:
    """Every scene that `draw_scene` can return."""
    nouns = list(product(COLOURS, SHAPES))
    ways = [f"moves {way}" for way in DIRECTIONS]
    if kind == "single":
        for ground, noun, motion, size in product(GROUNDS, nouns, SINGLE_MOTIONS, ("", "small", "large")):
            scene = Scene((Thing(*noun, motion, size),), ground=ground)
            if _sensible(scene):
                yield scene
        return
    for ground, first, second, relation, way in product(GROUNDS, nouns, nouns, RELATIONS, ways):
        others = [STILL] if relation in (*PLACES, *DEPTHS) else ways if relation in TIMES else ["passes"]
        for other in others:
            scene = Scene((Thing(*first, way), Thing(*second, other)), relation, ground)
            if _sensible(scene):
                yield scene


def words() -> list[str]:
    """Every word of the grammar, and the comma, in alphabetical order."""
    text = [*COLOURS, *SHAPES, *SINGLE_MOTIONS, *RELATIONS, *GROUNDS, "small large a an on ground it"]
    return sorted({",", *" ".join(text).split()})
