"""ShapeWorld, the embedded model: trained on the candidates that ship, and as the full run of the demo trains it."""

from __future__ import annotations

from prism import shapeworld
from prism.training import Recipe, TrainConfig

TAPS, DIM = (4, 5), 144  # chosen by the study, docs/study.md


def default() -> Recipe:
    """The defaults of `prism train`: some ten minutes on two cores."""
    train = TrainConfig(steps=1500, learning_rate=5e-4, schedule="cosine", warmup_steps=20, checkpoint_every=100)
    return Recipe(None, shapeworld.CALL, TAPS, DIM, train)


def full() -> Recipe:
    """The training of each of the three judges of `prism demo --full`, on 1,600 prompts of 4 videos each."""
    train = TrainConfig(steps=2000, learning_rate=5e-4, schedule="cosine", warmup_steps=20, checkpoint_every=0)
    return Recipe(None, shapeworld.CALL, TAPS, DIM, train)
