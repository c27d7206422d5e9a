"""The grammar, the splits and the renderer: what is drawn is what the prompt says, measured on the pixels."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from prism.errors import PrismError
from prism.shapeworld import candidates, grammar, referee, world


def scenes(count: int, seed: int = 0, kind: str | None = None) -> list[grammar.Scene]:
    chance = random.Random(seed)
    return [grammar.draw_scene(chance, kind or grammar.KINDS[i % 2]) for i in range(count)]


def ways(drawn: list[grammar.Scene], seed: int = 0) -> list[list[world.Path]]:
    return [world.paths(scene, random.Random(f"{seed} {i}")) for i, scene in enumerate(drawn)]


def boxes(scene: grammar.Scene, paths: list[world.Path]) -> list[torch.Tensor]:
    """Left, top, right and bottom of each thing by frame, (FRAMES, 4)."""
    found = []
    for thing, path in zip(scene.things, paths, strict=True):
        left, right, up, down = world.extent(thing.shape)
        low = path.centre - path.radius[:, None] * torch.tensor([left, up])
        found.append(torch.cat([low, path.centre + path.radius[:, None] * torch.tensor([right, down])], 1))
    return found


# -- the grammar


@pytest.mark.parametrize("motion", grammar.SINGLE_MOTIONS)
def test_every_motion_parses_back(motion):
    for size, ground in itertools.product(("", "small", "large"), grammar.GROUNDS):
        scene = grammar.Scene((grammar.Thing("orange", "cross", motion, size),), ground=ground)
        sensible = not (size == "large" and "quickly" in motion)
        assert grammar.parse(scene.prompt) == (scene if sensible else None)


@pytest.mark.parametrize("relation", grammar.RELATIONS)
def test_every_relation_parses_back(relation):
    found = set()
    for scene in scenes(1500, kind="pair"):
        if scene.relation == relation:
            assert grammar.parse(scene.prompt) == scene
            found.add(scene.things[0].motion)
    assert len(found) == (2 if relation in grammar.PLACES else 4)  # beside a shape, another moves along it


def test_prompts_are_plain_english():
    orange, blue = grammar.Thing("orange", "cross", "moves left"), grammar.Thing("blue", "circle", "passes")
    assert grammar.Scene((orange,)).prompt == "an orange cross moves left"
    pair = grammar.Scene((orange, blue), "then passes behind", "grey")
    assert pair.prompt == "an orange cross moves left, then a blue circle passes behind it on a grey ground"
    again = grammar.parse("An  orange cross moves left then a blue circle passes behind it on a grey ground.")
    assert again == pair
    small = grammar.Scene((grammar.Thing("red", "square", "bounces off the left wall", "small"),))
    assert small.prompt == "a small red square bounces off the left wall"
    assert grammar.parse("a red circle grows on a dark ground") == grammar.parse("a red circle grows")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a dog runs",
        "a red dog moves right",
        "a red circle moves",
        "a red circle moves right on a pink ground",
        "a large red circle moves quickly right",
        "a red circle moves right above a blue square and a green cross",
        "a red circle moves right above a red square",
        "a red circle moves up above a blue square",
        "a small red circle moves right above a blue square",
        "a red circle bounces off the floor while a blue square grows",
        "a red circle moves right, then a blue square passes behind",
    ],
)
def test_what_is_outside_the_grammar_has_no_scene(prompt):
    assert grammar.parse(prompt) is None


def test_every_word_of_a_prompt_is_known():
    known = set(grammar.words())
    for scene in scenes(300):
        assert set(scene.prompt.replace(",", " , ").split()) <= known


# -- the splits


def test_splits_share_no_prompt_and_only_unseen_has_the_unseen():
    splits = {name: grammar.prompts(name) for name in grammar.SPLITS}
    everything = [prompt for prompts in splits.values() for prompt in prompts]
    assert {name: len(prompts) for name, prompts in splits.items()} == grammar.SPLITS
    assert len(set(everything)) == len(everything)
    for name, prompts in splits.items():
        parsed = [grammar.parse(prompt) for prompt in prompts]
        assert [scene.kind for scene in parsed] == [grammar.KINDS[i % 2] for i in range(len(prompts))]
        strange = [any((t.colour, t.shape) in grammar.UNSEEN for t in scene.things) for scene in parsed]
        assert all(strange) if name == "unseen" else not any(strange)
        assert {grammar.split_of(scene) for scene in parsed} == {name}


def test_a_longer_list_starts_with_the_shorter():
    assert grammar.prompts("test", 30)[:10] == grammar.prompts("test", 10)
    assert all(grammar.parse(prompt).kind == "pair" for prompt in grammar.prompts("train", 6, "pair"))
    with pytest.raises(ValueError, match="practice"):
        grammar.prompts("practice")
    with pytest.raises(ValueError, match="triple"):
        grammar.prompts("train", 1, "triple")


def test_a_split_that_has_fewer_prompts_than_asked_says_so():
    everything = {scene.prompt for scene in grammar._every_scene("single") if grammar.split_of(scene) == "validation"}
    assert set(grammar.prompts("validation", len(everything), "single")) == everything
    with pytest.raises(PrismError, match=f"validation has {len(everything)} different prompts of the kind single"):
        grammar.prompts("validation", len(everything) + 1, "single")
    with pytest.raises(PrismError, match=f"validation has {2 * len(everything)} different prompts, found 1300 asked"):
        grammar.prompts("validation", 1300)
    for count in (-1, 2.5, "three", True):
        with pytest.raises(PrismError, match="number of prompts must be a whole number"):
            grammar.prompts("test", count)


@pytest.mark.parametrize("kind", grammar.KINDS)
def test_what_is_counted_is_what_is_drawn(monkeypatch, kind):
    """In a smaller world, every scene of which is drawn soon."""
    monkeypatch.setattr(grammar, "COLOURS", {name: grammar.COLOURS[name] for name in ("red", "blue")})
    monkeypatch.setattr(grammar, "SHAPES", ("circle",))
    monkeypatch.setattr(grammar, "GROUNDS", {"dark": grammar.GROUNDS["dark"]})
    chance = random.Random(0)
    drawn = {grammar.draw_scene(chance, kind).prompt for _ in range(4000)}
    assert drawn == {scene.prompt for scene in grammar._every_scene(kind)}


def test_candidates_of_more_prompts_than_there_are_are_refused_before_work(tmp_path):
    with pytest.raises(PrismError, match="validation has 1204 different prompts"):
        candidates.run(tmp_path / "out", dict([candidates.parse_share("validation:1300x2")]))
    assert not list(tmp_path.iterdir())


# -- shapes and paths


@pytest.mark.parametrize("shape", grammar.SHAPES)
def test_every_shape_has_the_circles_area_its_centroid_at_the_centre_and_its_extent(shape):
    x, y = world.pixel_grid()
    alpha = world.coverage(shape, x - 31.3, y - 30.8, torch.tensor(10.0))
    assert alpha.sum().item() == pytest.approx(math.pi * 100, rel=0.02)
    assert (alpha * x).sum().item() / alpha.sum().item() == pytest.approx(31.3, abs=0.1)
    assert (alpha * y).sum().item() / alpha.sum().item() == pytest.approx(30.8, abs=0.1)
    left, right, up, down = (10 * reach for reach in world.extent(shape))
    assert x[alpha > 0].min().item() - 31.3 == pytest.approx(-left, abs=1.1)
    assert x[alpha > 0].max().item() - 31.3 == pytest.approx(right, abs=1.1)
    assert y[alpha > 0].min().item() - 30.8 == pytest.approx(-up, abs=1.1)
    assert y[alpha > 0].max().item() - 30.8 == pytest.approx(down, abs=1.1)


def test_things_stay_in_the_frame_a_pixel_from_its_edge():
    drawn = scenes(400)
    for scene, paths in zip(drawn, ways(drawn), strict=True):
        for box in boxes(scene, paths):
            assert box.min() > 1 - 1e-3, scene.prompt
            assert box.max() < world.SIZE - 1 + 1e-3, scene.prompt


def test_things_keep_clear_of_each_other_where_they_should_and_meet_where_they_should():
    drawn = scenes(400, seed=1, kind="pair")
    for scene, paths in zip(drawn, ways(drawn), strict=True):
        one, two = boxes(scene, paths)
        gap = torch.maximum(one[:, :2] - two[:, 2:], two[:, :2] - one[:, 2:]).amax(1)  # below 0 where the boxes meet
        apart = (paths[0].centre - paths[1].centre).norm(dim=1)
        if scene.relation in grammar.PLACES:
            x, y = grammar.PLACES[scene.relation]
            assert gap.min() > 1.9, scene.prompt
            assert (((paths[0].centre - paths[1].centre) @ torch.tensor([x, y], dtype=torch.float32)) > 8).all()
        elif scene.relation in grammar.TIMES:
            assert (apart > 1.2 * (paths[0].radius + paths[1].radius)).all(), scene.prompt
        else:
            assert apart.min() < 5, scene.prompt
        if "passes" in scene.relation:  # not before the first has moved
            assert (apart[:7] > paths[0].radius[:7] + paths[1].radius[:7]).all(), scene.prompt


def test_travel_growth_and_bounces_are_as_large_as_the_words_say():
    for scene, (path,) in ((s, w) for s, w in zip(scenes(300, 2, "single"), ways(scenes(300, 2, "single")))):
        words, moved = scene.things[0].motion.split(), path.centre[-1] - path.centre[0]
        low, high = grammar.SIZES[scene.things[0].size or "medium"]
        assert low <= path.radius.log().mean().exp() <= high + 1e-4
        if words[0] == "moves":
            low, high = grammar.SPEEDS[words[1] if len(words) == 3 else ""]
            along = moved @ torch.tensor(grammar.DIRECTIONS[words[-1]], dtype=torch.float32)
            assert low - 1e-3 <= along <= high + 1e-3
            assert moved.norm() == pytest.approx(along.item(), abs=1e-4)
        elif words[0] in grammar.GROWTH:
            grown = grammar.GROWTH[words[0]] * (path.radius[-1] / path.radius[0]).log()
            assert world.GROWN[0] <= grown <= world.GROWN[1]
            assert torch.equal(path.centre[0], path.centre[-1])
        elif words[0] == "bounces":
            way = grammar.WALLS[scene.things[0].motion.removeprefix("bounces off the ")]
            side = {"left": 0, "up": 1, "right": 2, "down": 3}[way]
            edge = boxes(scene, [path])[0][:, side]
            wall = 1 if side < 2 else world.SIZE - 1
            assert (edge - wall).abs().min() < 1e-3  # it touches the wall
            assert 6 <= (edge - wall).abs().argmin() <= 10  # about mid-clip
            assert (edge - wall).abs()[[0, -1]].min() > 9  # and comes from afar
        else:
            assert words == ["stays", "still"]
            assert torch.equal(path.centre[0], path.centre[-1])


@pytest.mark.parametrize("relation", ["while", "then", "then passes behind"])
def test_things_move_when_the_relation_says(relation):
    drawn = [scene for scene in scenes(600, 3, "pair") if scene.relation == relation]
    for paths in ways(drawn):
        steps = torch.stack([path.centre.diff(dim=0).norm(dim=1) for path in paths])  # (2, FRAMES - 1)
        if relation == "while":
            assert (steps > 1).all()
        else:
            assert (steps[0, world.MOVE_FRAMES :] < 1e-4).all()
            assert (steps[1, : world.FRAMES - 1 - world.MOVE_FRAMES] < 1e-4).all()
            assert (steps.sum(1) > 14).all()


# -- the picture


def test_the_one_behind_is_drawn_first():
    for relation, rear in (
        ("in front of", 1), ("behind", 0), ("then passes behind", 1), ("then passes in front of", 0),
    ):  # fmt: skip
        motions = ("moves right", "passes" if relation.startswith("then") else grammar.STILL)
        things = tuple(grammar.Thing(c, "square", m) for c, m in zip(("red", "blue"), motions, strict=True))
        scene = grammar.Scene(things, relation)
        assert world.behind(scene) == rear
        paths = world.paths(scene, random.Random(0))
        video = world.paint([scene], [paths])[0]
        frame = (paths[0].centre - paths[1].centre).norm(dim=1).argmin()
        x, y = ((paths[0].centre[frame] + paths[1].centre[frame]) / 2).long().tolist()
        front = torch.tensor(grammar.COLOURS[things[1 - rear].colour])
        assert torch.allclose(video[frame, y, x], front, atol=1e-6), relation


def test_grounds_are_even_or_striped_upright():
    for name, (base, stripe) in grammar.GROUNDS.items():
        ground = world.ground_image(name)
        assert torch.equal(ground, ground[:1].expand_as(ground))
        assert torch.allclose(ground.amin((0, 1)), torch.minimum(torch.tensor(base), torch.tensor(stripe)), atol=0.01)
        assert torch.allclose(ground[:, : -world.STRIPE], ground[:, world.STRIPE :], atol=1e-6)


def test_rendering_is_seeded():
    drawn = scenes(6)
    videos = world.render(drawn, 3)
    assert videos.shape == (6, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert 0 <= videos.min() <= videos.max() <= 1
    assert torch.equal(videos, world.render(drawn, 3))
    assert torch.equal(videos[:2], world.render(drawn[:2], 3))
    assert not torch.equal(videos, world.render(drawn, 4))
    one, two = world.sample(6, seed=3), world.sample(6, seed=3)
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    assert all(grammar.split_of(grammar.parse(prompt)) != "unseen" for prompt in world.sample(200, 0)[1])


@pytest.mark.parametrize("kind", grammar.KINDS)
def test_the_referee_measures_where_things_truly_are(kind):
    drawn = scenes(48, 5, kind)
    truth = ways(drawn, 7)
    seen = referee.measure(world.paint(drawn, truth), drawn)
    centre = torch.stack([torch.stack([path.centre for path in paths]) for paths in truth])
    area = torch.stack([torch.stack([math.pi * path.radius**2 for path in paths]) for paths in truth])
    whole = seen["visible"] & ~seen["hidden"]
    assert whole.float().mean() > 0.8
    assert (seen["centre"] - centre).norm(dim=-1)[whole].max() < 0.5  # up to a 25th of it may be covered
    if kind == "pair":
        whole &= (centre[:, 0] - centre[:, 1]).norm(dim=-1)[:, None] > 24
    assert (seen["centre"] - centre).norm(dim=-1)[whole].max() < 0.3
    assert (seen["area"] / area - 1)[whole].abs().max() < 0.1
    assert (seen["area"] / area - 1)[whole].abs().mean() < 0.02
    assert seen["visible"].float().mean() > 0.98  # only what is wholly behind another is not there
