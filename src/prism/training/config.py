"""Settings of a training run, checked when they are made; and a recipe: all that determines a trained judge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prism.errors import SEEDS, PrismError, flag, instance, number, quoted, whole

if TYPE_CHECKING:
    from prism.judge import Judge

MOST = 10**12  # of any whole setting
SOURCES = ("renoised", "trajectory", "mixed")
LEVELS = ("uniform", "clean", "noise")
SCHEDULES = ("constant", "cosine")
RESULTLESS = ("max_rows", "checkpoint_every", "log_every")  # settings that leave the trained weights as they are


@dataclass(frozen=True)
class TrainConfig:
    """Training settings. Where the paper gives a value (AdamW, 1e-4, eta = 5, t ~ U(0, 1000)) it is the default."""

    steps: int = 2000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompt groups of a step, over all processes: each with one t, all of its videos and pairs."""
    learning_rate: float = 1e-4
    """AdamW's step size after warm-up."""
    schedule: str = "constant"
    """Of the learning rate after warm-up: "constant" or "cosine" (to zero)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its full size."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; 0 clips nothing."""
    objective: str = "btt"
    """"btt": Bradley-Terry with ties (Eq. 3-4). "bt": plain Bradley-Terry, which leaves ties out."""
    eta: float = 5.0
    """Tie threshold of Eq. 3-4."""
    source: str = "renoised"
    """"renoised": finished latents, noised anew (Eq. 1). "trajectory": recorded states. "mixed": one or the other."""
    trajectory_share: float = 0.5
    """Of "mixed": how often the coin falls on the trajectory."""
    max_prompts: int = 0
    """Prompts to train on, the same ones whatever else is set; 0: all."""
    per_prompt: int = 0
    """Videos of each prompt to train on, the store's first; 0: all."""
    t_low: float = 0.0
    """Lowest noise level trained on, 0: clean."""
    t_high: float = 1000.0
    """Highest noise level trained on, 1000: noise. t ~ U(t_low, t_high); of a trajectory, the states within evenly."""
    levels: str = "uniform"
    """Density of t: "uniform", or falling linearly to zero away from the "clean" or the "noise" end."""
    draws_per_step: int = 1
    """Times each prompt of a step is noised, each time anew at its own t."""
    noise_draws: int = 0
    """Different noise and t that a prompt's videos ever get, over and over; 0: fresh ones each time."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over A, tie and B alike: labels near a tie margin are unsure."""
    shared_noise: bool = False
    """Whether the videos of a prompt get the same noise at a step. The paper does not say."""
    ema_decay: float = 0.0
    """The saved head is the moving average of the weights with this decay; 0: the last weights."""
    validate_every: int = 0
    """Steps between measurements on the store's validation pairs, kept in the history; 0: none."""
    keep_best: bool = False
    """Whether the saved head is the one of the best validation, in place of the last."""
    max_rows: int = 64
    """Videos in one forward pass of the backbone; bounds memory, changes nothing else. Halved where memory runs out."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: none, and a killed run starts anew."""
    log_every: int = 50
    """Steps between entries of the history."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        from prism.judge.objective import OBJECTIVES

        for field in dataclasses.fields(self):
            value, kind, name = getattr(self, field.name), type(field.default), f"The training setting {field.name}"
            if kind is float:
                object.__setattr__(self, field.name, number(name, value))
            elif kind is int:
                object.__setattr__(self, field.name, whole(name, value, None, MOST))
            elif kind is bool:
                object.__setattr__(self, field.name, flag(name, value))
            else:
                instance(name, value, kind, "a text")
        for name in ("steps", "prompts_per_step", "draws_per_step", "max_rows", "log_every"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        counts = ("warmup_steps", "checkpoint_every", "seed", "max_prompts", "noise_draws", "validate_every")
        for name in (*counts, "weight_decay", "max_gradient_norm"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("seed", self.seed <= SEEDS, f"at most {SEEDS:,}")
        self._require("learning_rate", 0 < self.learning_rate <= 100, "above 0, at most 100")
        self._require("eta", self.eta > 1, "above 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")
        self._require("t_low", 0 <= self.t_low < self.t_high, "from 0 to below t_high")
        self._require("t_high", self.t_high <= 1000, "at most 1000")
        self._require("per_prompt", self.per_prompt != 1 and self.per_prompt >= 0, "0, or at least 2 to make a pair")
        self._require("trajectory_share", 0 <= self.trajectory_share <= 1, "from 0 to 1")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        self._require("keep_best", not self.keep_best or self.validate_every > 0, "false without validate_every")
        self._require("levels", self.levels in LEVELS, f"one of {', '.join(LEVELS)}")
        self._require("source", self.source in SOURCES, f"one of {', '.join(SOURCES)}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise PrismError(f"The training setting {name} must be {wanted}, found {getattr(self, name)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from JSON; an unknown name is refused."""
        instance("The training settings", values, Mapping, "a dict")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise PrismError(f"There is no training setting {quoted(name, 60)}; there are {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then constant or cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Recipe:
    """A backbone, the heads that are put onto it, and how they are trained."""

    backbone: str | None
    """The pipeline's id on the Hub; None: the model that ships with the package."""
    call: Mapping[str, Any]
    """Arguments of the pipeline's call, for the videos that are labelled and for those that are judged."""
    taps: tuple[int, ...]
    """Blocks that are read, from 1 (N_b of the paper); a head for each, whose scores are averaged."""
    dim: int
    """D, the width of a head."""
    train: TrainConfig
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of `QueryHead`."""

    def judge(self, pipe: Any, dimensions: Sequence[str] | None = None) -> Judge:
        """The judge to train, with random heads. pipe: a pipeline or a `Backbone`."""
        from prism.judge import Judge
        from prism.judge.judge import DIMENSIONS
        from prism.training.trainer import untrained_heads

        options = {"dim": self.dim, "dimensions": dimensions or DIMENSIONS, **self.head}
        heads = untrained_heads(pipe, self.taps, self.train.seed, **options)
        return Judge.average(heads)
