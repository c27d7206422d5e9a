"""Prompts and renderer: what is drawn is what the prompt says, measured on the pixels."""

from __future__ import annotations

import math

import pytest
import torch

from prism.shapeworld import world


def test_splits_are_disjoint_and_cover_the_grammar():
    splits = [world.prompts(name) for name in world.SPLITS]
    assert [len(split) for split in splits] == [140, 28, 56]
    everything = [prompt for split in splits for prompt in split]
    assert len(set(everything)) == len(everything) == len(world.SCENES) == 224


def test_prompts_are_plain_english_and_parse_back():
    assert world.Scene("orange", "cross", "stays still").prompt == "an orange cross stays still"
    assert world.parse("A  red circle moves right.") == world.Scene("red", "circle", "moves right")
    assert world.parse("a red dog moves right") is None
    for scene in world.SCENES:
        assert world.parse(scene.prompt) == scene


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_has_the_circles_area_and_its_centroid_at_the_centre(shape):
    x, y = world.pixel_grid()
    alpha = world.coverage(shape, x - 31.3, y - 30.8, torch.tensor(10.0))
    assert alpha.sum().item() == pytest.approx(math.pi * 100, rel=0.02)
    assert (alpha * x).sum().item() / alpha.sum().item() == pytest.approx(31.3, abs=0.1)
    assert (alpha * y).sum().item() / alpha.sum().item() == pytest.approx(30.8, abs=0.1)


def test_rendering_is_seeded_and_stays_in_the_picture():
    videos, prompts = world.sample(64, seed=3)
    again, _ = world.sample(64, seed=3)
    other, _ = world.sample(64, seed=4)
    assert videos.shape == (64, 17, 64, 64, 3)
    assert len(prompts) == 64
    assert torch.equal(videos, again)
    assert not torch.equal(videos, other)
    ground = torch.tensor(world.BACKGROUND)
    touched = [
        (side - ground).norm(dim=-1) > 0.1 for side in (videos[:, :, -1], videos[:, :, :, 0], videos[:, :, :, -1])
    ]
    assert not torch.stack(touched).any(), "an object touches the frame"
    top = ((videos[:, :, 0] - ground).norm(dim=-1) > 0.1).sum(-1)
    assert top.max() <= 2, "more than a triangle's tip touches the frame"


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_motion_is_what_the_prompt_says(motion):
    scenes = [world.Scene("white", "square", motion)] * 8
    videos = world.render(scenes, torch.Generator().manual_seed(0))
    mass = videos[..., 0] - world.BACKGROUND[0]
    x, y = world.pixel_grid()
    centre = torch.stack([(mass * x).sum((2, 3)), (mass * y).sum((2, 3))], -1) / mass.sum((2, 3))[..., None]
    moved = centre[:, -1] - centre[:, 0]
    grown = 0.5 * (mass[:, -1].sum((1, 2)) / mass[:, 0].sum((1, 2))).log()
    right, down, bigger = world.MOTIONS[motion]
    for wanted, found, (low, high) in (
        (right, moved[:, 0], world.TRAVEL),
        (down, moved[:, 1], world.TRAVEL),
        (bigger, grown, world.GROWTH),
    ):
        if wanted:
            assert ((found * wanted > 0.97 * low) & (found * wanted < 1.03 * high)).all()
        else:
            assert found.abs().max() < 0.05
