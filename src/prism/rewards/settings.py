"""Settings of `prism improve`, checked on construction; those that a recipe decides may be left open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from prism.errors import DRAWS, SEEDS, PrismError, choice, flag, instance, number, whole

RECIPES = {
    "pairs": "flow-DPO on the best and the worst candidate of each prompt",
    "winners": "plain denoising of the best candidates, with prompt dropout and averaged weights",
    "weighted": "DiffusionNFT on all candidates, weighted by their scores",
}
CONTROLS = ("random", "worst")
"""Picks of a control: of two candidates at random, or the judge's order turned round."""
# What a recipe decides where it is left open. The rates are those that a prototype on ShapeWorld measured (pairs,
# winners), and DiffusionNFT's own (weighted).
_OF_RECIPE: dict[str, dict[str, float]] = {
    "pairs": {"learning_rate": 1e-4, "beta": 500.0, "prompt_dropout": 0.0, "ema_decay": 0.0},
    "winners": {"learning_rate": 2e-5, "beta": 0.0, "prompt_dropout": 0.15, "ema_decay": 0.99},
    "weighted": {"learning_rate": 1e-4, "beta": 0.1, "prompt_dropout": 0.0, "ema_decay": 0.9},
}


@dataclass(frozen=True)
class ImproveConfig:
    """Settings of the rounds and of the tuning. None: as the recipe has it."""

    recipe: str = "pairs"
    """pairs: flow-DPO on the judge's best and worst of a prompt. winners: plain denoising of the best. weighted:
    DiffusionNFT on all candidates."""
    rounds: int = 1
    """Rounds of sampling, judging and tuning; fewer where a stop rule holds."""
    candidates: int = 4
    """Candidates per prompt that the judge chooses among."""
    test_candidates: int = 4
    """Videos per test prompt, with the same seeds for every model."""
    steps: int = 200
    """Optimiser steps per round."""
    prompts_per_step: int = 8
    """Prompts per optimiser step."""
    learning_rate: float | None = None
    """AdamW's step size: 1e-4, of winners 2e-5."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises to its full size."""
    beta: float | None = None
    """Of pairs: weight of the distance to the reference in flow-DPO, 500. Of weighted: DiffusionNFT's beta, 0.1."""
    kl: float = 1e-4
    """Of weighted: weight of the squared distance to the reference's outputs."""
    clip: float = 5.0
    """Of weighted: standard deviations at which a candidate's weight is 0 or 1."""
    prompt_dropout: float | None = None
    """Share of prompts that are left empty while tuning: of winners 0.15, else 0. Guidance needs the empty prompt."""
    ema_decay: float | None = None
    """Decay of the averaged weights that are saved: of winners 0.99, of weighted 0.9, of pairs 0 (the last ones)."""
    rank: int = 16
    """Rank of the LoRA."""
    alpha: float | None = None
    """Scale of the LoRA times its rank; None: the rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get the LoRA; (): the attention's."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    t_low: float = 0.0
    """Lowest noise level tuned at."""
    t_high: float = 1000.0
    """Highest noise level tuned at."""
    margin: float = 0.0
    """Pairs whose scores differ by no more are left out: there is nothing to choose."""
    dimension: str = ""
    """Dimension of the judge that decides; empty: overall where it has it, else the mean of all."""
    levels: tuple[float, ...] = ()
    """Noise levels at which the judge reads; (): those at which it is best."""
    num_draws: int = 2
    """Noise draws per level, the same for all candidates of a prompt."""
    max_rows: int = 16
    """Videos per denoiser call; halved where memory runs out."""
    sample_batch_size: int = 1
    """Candidates per call while sampling; above 1, videos are those of each seed up to rounding."""
    checkpoint_every: int = 50
    """Optimiser steps between checkpoints; 0: none."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which takes less memory and more time."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        choice("recipe", self.recipe, tuple(RECIPES))
        for name, value in _OF_RECIPE[self.recipe].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        lowest = {"rounds": 1, "candidates": 2, "test_candidates": 1, "steps": 1, "prompts_per_step": 1, "rank": 1}
        lowest |= {"max_rows": 1, "sample_batch_size": 1, "warmup_steps": 0, "checkpoint_every": 0}
        for name, least in lowest.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least, 10**6))
        object.__setattr__(self, "num_draws", whole("num_draws", self.num_draws, 1, DRAWS))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, SEEDS))
        object.__setattr__(self, "gradient_checkpointing", flag("gradient_checkpointing", self.gradient_checkpointing))
        ranges: dict[str, tuple[float, float, bool]] = {
            "learning_rate": (0, 100, True),
            "beta": (0, 1e9, self.recipe != "winners"),
            "kl": (0, 1e6, False),
            "clip": (0, 1e6, True),
            "prompt_dropout": (0, 1, False),
            "ema_decay": (0, 0.999999, False),
            "weight_decay": (0, 1e3, False),
            "max_gradient_norm": (0, 1e9, False),
            "t_low": (0, 1000, False),
            "t_high": (0, 1000, True),
            "margin": (0, 1e9, False),
        }
        for name, (low, high, above) in ranges.items():
            object.__setattr__(self, name, number(name, getattr(self, name), low, high, above))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", number("alpha", self.alpha, 0, 1e6, True))
        if self.t_low >= self.t_high:
            raise PrismError(f"t_low must be below t_high; found {self.t_low:g} and {self.t_high:g}.")
        instance("dimension", self.dimension, str, "a text")
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "levels", tuple(number("A level", each, 0, 1000) for each in self.levels))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
