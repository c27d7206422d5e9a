"""The referee: near 1 on clean renders; each score falls with its own corruption, and hardly with the others."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from torch import Tensor

from prism.shapeworld import corruptions, grammar, referee, world

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BARELY = 0.08  # what another score may lose at most, where a corruption's own loses 0.25 to 0.99
BLURRED = 0.17  # of TA: a shape that is blurred by 3 pixels is no longer seen to be the one asked for
WORDS = 3 + 0.5 + 0.5  # weight of the words on one thing without speed: colour, shape, motion, size, ground
COUNT = 16


def draw(
    count: int, seed: int, kind: str | None = None, relations: tuple[str, ...] | None = None
) -> list[grammar.Scene]:
    chance, drawn = random.Random(seed), []
    while len(drawn) < count:
        scene = grammar.draw_scene(chance, kind or grammar.KINDS[len(drawn) % 2])
        if relations is None or scene.relation in relations:
            drawn.append(scene)
    return drawn


def prompts(scenes: list[grammar.Scene]) -> list[str]:
    return [scene.prompt for scene in scenes]


@pytest.fixture(scope="module")
def clean() -> tuple[Tensor, list[grammar.Scene]]:
    scenes = draw(48, seed=11)
    return world.render(scenes, 11), scenes


def test_clean_renders_score_near_one_and_nothing_is_wrong(clean):
    videos, scenes = clean
    for name, value in referee.batch(videos, prompts(scenes)).items():
        assert value.mean() > 0.98, name
        assert value.quantile(0.05) > 0.94, name
    for name, right in referee.correct(videos, prompts(scenes)).items():
        assert right.nanmean() == 1, name


def test_a_video_scores_the_same_whatever_it_is_batched_with(clean):
    videos, scenes = clean
    whole = referee.batch(videos[:8], prompts(scenes)[:8])
    for row in (0, 1):
        alone = referee.score(videos[row], scenes[row].prompt)
        assert alone == pytest.approx({name: float(value[row]) for name, value in whole.items()}, abs=1e-5)


@pytest.mark.parametrize("kind", corruptions.CORRUPTIONS)
def test_a_score_falls_with_its_own_corruption_and_hardly_with_others(kind):
    own = corruptions.CORRUPTIONS[kind]
    turns = ("while", "then", "then passes behind", "then passes in front of")
    # an empty picture has no quality: where one thing of two is missing, the other still has
    scenes = {
        "wrong order": draw(COUNT, 3, "pair", turns), "missing object": draw(COUNT, 3, "pair"),
    }.get(kind, draw(COUNT, 3))  # fmt: skip
    scenes = [scene for scene in scenes if corruptions.applies(kind, scene)]
    rows = []
    for strength in STRENGTHS:
        scores = referee.batch(corruptions.corrupt(scenes, kind, strength, seed=5), prompts(scenes))
        rows.append({name: value.mean().item() for name, value in scores.items()})
    falls = [before[own] - after[own] for before, after in itertools.pairwise(rows)]
    assert min(falls) > -0.01, [row[own] for row in rows]
    assert rows[0][own] - rows[-1][own] > (0.15 if kind == "wrong order" else 0.25)
    for name in set(referee.TIE_MARGINS) - {own}:
        worst = rows[0][name] - min(row[name] for row in rows)
        assert worst < (BLURRED if (kind, name) == ("blur", "TA") else BARELY), (name, [row[name] for row in rows])


def test_strength_nothing_is_the_clean_render():
    for kind in corruptions.CORRUPTIONS:
        scenes = [scene for scene in draw(6, 8) if corruptions.applies(kind, scene)]
        if scenes:
            assert torch.allclose(corruptions.corrupt(scenes, kind, 0.0, 2), world.render(scenes, 2), atol=1e-6), kind


def test_corruptions_are_seeded_and_refuse_what_makes_no_sense():
    scenes = draw(2, 8)
    one, two, other = (corruptions.corrupt(scenes, "noise", 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="fog"):
        corruptions.corrupt(scenes, "fog", 0.5, 0)
    with pytest.raises(ValueError, match=r"1\.5"):
        corruptions.corrupt(scenes, "blur", 1.5, 0)
    with pytest.raises(ValueError, match="no two moves"):
        corruptions.corrupt(draw(1, 8, "single"), "wrong order", 0.5, 0)


def other(word: str, words: tuple[str, ...], but: str = "") -> str:
    left = [w for w in words if w not in (word, but)]
    return left[len(word) % len(left)]


@pytest.mark.parametrize("part", ["colour", "shape", "motion", "ground"])
def test_one_wrong_word_costs_its_part_and_nothing_else(part):
    scenes = draw(24, 21, "single")
    videos, wrong, weight = world.render(scenes, 4), [], []
    for scene in scenes:
        thing, ground = scene.things[0], scene.ground
        if part == "colour":
            thing = dataclasses.replace(thing, colour=other(thing.colour, tuple(grammar.COLOURS)))
        elif part == "shape":
            thing = dataclasses.replace(thing, shape=other(thing.shape, grammar.SHAPES))
        elif part == "motion":
            thing = dataclasses.replace(thing, motion="shrinks" if thing.motion != "shrinks" else "grows")
        else:
            ground = other(ground, tuple(grammar.GROUNDS))
        wrong.append(grammar.Scene((thing,), ground=ground).prompt)
        weight.append((0.5 if part == "ground" else 1.0) / (WORDS + 0.5 * thing.motion.startswith("moves")))
    right, off = referee.batch(videos, prompts(scenes)), referee.batch(videos, wrong)
    moves = torch.tensor([scene.things[0].motion.startswith("moves") for scene in scenes])
    lost = right["TA"] - off["TA"]
    if part == "motion":  # a speed that is no longer asked for cannot be right either
        lost, weight = lost[~moves], [w for w, m in zip(weight, moves.tolist()) if not m]
    assert (lost - torch.tensor(weight)).abs().max() < 0.06
    assert torch.equal(right["VQ"], off["VQ"])
    assert torch.equal(right["MQ"], off["MQ"])
    found = referee.correct(videos, wrong)
    assert found[part].max() == 0
    assert all(value.nanmean() == 1 for name, value in found.items() if name not in (part, "relation", "speed"))


def test_every_motion_and_speed_is_told_from_every_other():
    names = grammar.SINGLE_MOTIONS
    videos = world.render([grammar.Scene((grammar.Thing("red", "square", name),)) for name in names], 9)
    asked = [[f"a red square {name}"] * len(names) for name in names]
    found = [referee.correct(videos, prompts) for prompts in asked]
    for row, wanted in enumerate(names):
        for column, shown in enumerate(names):
            alike = [" ".join(w for w in name.split() if w not in grammar.SPEEDS) for name in (wanted, shown)]
            assert found[row]["motion"][column] == (alike[0] == alike[1]), (wanted, shown)
            if wanted.startswith("moves"):
                assert found[row]["speed"][column] == (wanted == shown), (wanted, shown)


@pytest.mark.parametrize("relation", grammar.RELATIONS)
def test_the_opposite_relation_is_wrong(relation):
    opposite = {
        "above": "below", "on the left of": "on the right of", "in front of": "behind", "while": "then",
        "then passes behind": "then passes in front of",
    }  # fmt: skip
    opposite |= {there: here for here, there in opposite.items()}
    scenes = draw(12, 31, "pair", (relation,))
    videos = world.render(scenes, 6)
    wrong = [dataclasses.replace(scene, relation=opposite[relation]) for scene in scenes]
    right, off = referee.batch(videos, prompts(scenes)), referee.batch(videos, prompts(wrong))
    share = 1.5 / 8 * (0.5 if "passes" in relation else 1)  # of a pass, the order is still right
    assert (right["TA"] - off["TA"] - share).abs().max() < 0.03
    assert referee.correct(videos, prompts(wrong))["relation"].max() == 0
    assert torch.allclose(right["MQ"], off["MQ"])


def test_things_that_have_changed_places_are_the_wrong_way_round():
    scenes = draw(12, 41, "pair", ("then",))
    swapped = [grammar.Scene(scene.things[::-1], "then", scene.ground) for scene in scenes]
    found = referee.correct(world.render(scenes, 6), prompts(swapped))
    assert found["relation"].max() == 0
    assert all(found[name].min() == 1 for name in ("colour", "shape", "motion"))


def test_a_video_played_backwards_is_as_good_but_not_as_asked():
    scenes = draw(24, 51, "single")
    scenes = [s for s in scenes if s.things[0].motion.split()[0] in ("moves", *grammar.GROWTH)]
    videos = world.render(scenes, 6)
    forward, backward = (referee.batch(video, prompts(scenes)) for video in (videos, videos.flip(1)))
    assert (backward["VQ"] - forward["VQ"]).abs().max() < 1e-3
    assert (backward["MQ"] - forward["MQ"]).abs().max() < 1e-3
    assert (forward["TA"] - backward["TA"] > 0.2).all()


def test_a_second_thing_nobody_asked_for_costs():
    scene = grammar.parse("a red circle stays still")
    videos = world.render([scene] * 4, 1)
    videos[:, :, 4:20, 4:20] = torch.tensor(grammar.COLOURS["green"])
    assert (referee.batch(videos, [scene.prompt] * 4)["VQ"] < 0.5).all()
    pair = grammar.parse("a red circle moves right above a blue square")
    videos = world.render([pair] * 4, 1)
    clean = referee.batch(videos, [pair.prompt] * 4)["VQ"]
    videos[:, :, 2:14, 2:14] = torch.tensor(grammar.COLOURS["green"])
    assert (referee.batch(videos, [pair.prompt] * 4)["VQ"] < clean - 0.2).all()


def test_an_empty_video_scores_nothing():
    for prompt in ("a red circle grows", "a red circle moves right above a blue square"):
        empty = world.ground_image("dark").expand(world.FRAMES, -1, -1, -1)
        assert referee.score(empty, prompt) == {"VQ": 0, "MQ": 0, "TA": 0, "overall": 0}


def test_scores_stay_in_their_range_whatever_is_shown():
    chance = torch.Generator().manual_seed(0)
    videos = torch.stack([torch.rand(17, 64, 64, 3, generator=chance), torch.ones(17, 64, 64, 3)]).repeat(2, 1, 1, 1, 1)
    asked = ["a red circle grows"] * 2 + ["a red circle moves right while a blue square moves up"] * 2
    for value in referee.batch(videos, asked).values():
        assert value.isfinite().all()
        assert 0 <= value.min() <= value.max() <= 1


def test_a_prompt_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="a dog runs"):
        referee.score(torch.zeros(17, 64, 64, 3), "a dog runs")
