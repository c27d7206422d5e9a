"""Training settings: the paper's values by default, a sentence for a wrong one."""

from __future__ import annotations

import dataclasses
import math

import pytest

from prism.errors import PrismError
from prism.training import TrainConfig


def test_the_papers_values_are_the_defaults():
    config = TrainConfig()
    assert (config.learning_rate, config.eta, config.t_low, config.t_high) == (1e-4, 5.0, 0.0, 1000.0)
    assert (config.objective, config.source) == ("btt", "renoised")
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_learning_rate():
    config = TrainConfig(steps=110, learning_rate=1.0, schedule="cosine", warmup_steps=10)
    assert [config.learning_rate_at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert config.learning_rate_at(60) == pytest.approx(0.5)
    assert config.learning_rate_at(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert dataclasses.replace(config, schedule="constant").learning_rate_at(109) == 1.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps must be 1 or more, found 0"),
        ({"steps": 1.5}, "steps must be a whole number .*; found 1.5"),
        ({"steps": True}, "steps must be a whole number"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"eta": 1}, "eta must be above 1"),
        (
            {"source": "pixels"},
            "source must be one of recorded, predicted, renoised, or a mixture such as renoised=0.5,predicted=0.5",
        ),
        ({"objective": "hinge"}, "objective must be one of"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"t_low": 500, "t_high": 400}, "t_low"),
        ({"t_high": 1001}, "t_high"),
        ({"ema_decay": 1}, "ema_decay"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"per_prompt": 1}, "per_prompt must be 0, or at least 2"),
        ({"trajectory_share": 1.5}, "trajectory_share must be from 0 to 1"),
        ({"levels": "middle"}, "levels must be one of uniform, clean, noise"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"keep_best": True}, "keep_best must be false without validate_every"),
        ({"shared_noise": 1}, "shared_noise must be True or False"),
    ],
)
def test_refuses(settings, sentence):
    with pytest.raises(PrismError, match=sentence):
        TrainConfig(**settings)


def test_unknown_settings_are_named():
    with pytest.raises(PrismError, match="no training setting lr;"):
        TrainConfig.from_dict({"lr": 1e-4})
