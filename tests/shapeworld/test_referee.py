"""The referee: near 1 on clean renders; each corruption lowers its own score, monotonically, and hardly the others."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prism.shapeworld import referee, world


@pytest.fixture(scope="module")
def clean() -> tuple[Tensor, list[str]]:
    return world.sample(48, seed=11)


def blur(videos: Tensor, strength: int) -> Tensor:
    pictures = videos.flatten(0, 1).permute(0, 3, 1, 2)
    pictures = F.avg_pool2d(F.pad(pictures, [strength] * 4, mode="replicate"), 2 * strength + 1, 1)
    return pictures.permute(0, 2, 3, 1).view_as(videos)


def noise(videos: Tensor, strength: float) -> Tensor:
    return (videos + strength * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def flicker(videos: Tensor, strength: float) -> Tensor:
    gain = torch.randn((*videos.shape[:2], 1, 1, 1), generator=torch.Generator().manual_seed(0))
    return (videos * (1 + strength * gain)).clamp(0, 1)


def teleport(videos: Tensor, strength: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames = [
        torch.roll(videos[:, t], int(strength * torch.randn((), generator=generator)), 2)
        for t in range(videos.shape[1])
    ]
    return torch.stack(frames, 1)


def means(videos: Tensor, prompts: list[str]) -> dict[str, float]:
    return {name: value.mean().item() for name, value in referee.batch(videos, prompts).items()}


def test_clean_renders_score_near_one(clean):
    for name, value in referee.batch(*clean).items():
        assert value.min() > 0.97, name


@pytest.mark.parametrize(
    ("corrupt", "strengths", "hurt", "spared"),
    [
        (blur, (2, 4, 6), "VQ", "MQ"),
        (noise, (0.03, 0.06, 0.12), "VQ", "TA"),
        (flicker, (0.1, 0.3, 0.6), "MQ", "TA"),
        (teleport, (1, 3, 8), "MQ", "VQ"),
    ],
)
def test_a_corruption_lowers_its_own_score(clean, corrupt, strengths, hurt, spared):
    videos, prompts = clean
    rows = [means(videos, prompts), *(means(corrupt(videos, strength), prompts) for strength in strengths)]
    own = [row[hurt] for row in rows]
    assert all(after < before - 0.02 for before, after in itertools.pairwise(own)), own
    assert rows[0][spared] - rows[-1][spared] < 0.4 * (own[0] - own[-1])


@pytest.mark.parametrize("part", range(3))
def test_one_wrong_word_costs_a_third_of_text_alignment(clean, part):
    videos, prompts = clean
    wrong = []
    for prompt in prompts:
        scene = world.parse(prompt)
        assert scene is not None
        words = [scene.colour, scene.shape, scene.motion]
        choices = (list(world.COLOURS), list(world.SHAPES), list(world.MOTIONS))[part]
        words[part] = choices[(choices.index(words[part]) + 1) % len(choices)]
        wrong.append(world.Scene(*words).prompt)
    right, off = referee.batch(videos, prompts), referee.batch(videos, wrong)
    assert ((right["TA"] - off["TA"]) - 1 / 3).abs().max() < 0.05
    assert torch.equal(right["VQ"], off["VQ"])
    assert torch.equal(right["MQ"], off["MQ"])


def test_a_video_played_backwards_is_as_good_but_not_as_asked(clean):
    videos, prompts = clean
    forward, backward = referee.batch(videos, prompts), referee.batch(videos.flip(1), prompts)
    moves = torch.tensor(["still" not in prompt for prompt in prompts])
    assert (backward["VQ"] - forward["VQ"]).abs().max() < 1e-3
    assert ((forward["TA"] - backward["TA"])[moves] > 0.3).all()
    assert ((forward["TA"] - backward["TA"])[~moves].abs() < 0.01).all()


def test_an_empty_video_scores_nothing():
    empty = torch.tensor(world.BACKGROUND).expand(1, 17, 64, 64, 3)
    assert referee.score(empty[0], "a red circle grows") == {"VQ": 0, "MQ": 0, "TA": 0, "overall": 0}


def test_a_prompt_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="a dog runs"):
        referee.score(torch.zeros(17, 64, 64, 3), "a dog runs")
