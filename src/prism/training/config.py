"""Settings of a training run, checked on construction; and a recipe: all that determines a trained judge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prism.errors import SEEDS, PrismError, flag, instance, number, quoted, whole

if TYPE_CHECKING:
    from prism.judge import Judge

MOST = 10**12  # the largest value of an integer setting
SOURCES = ("recorded", "predicted", "renoised")
OLDER_SOURCES = ("trajectory", "mixed")  # recorded alone, or recorded with the probability trajectory_share
LEVELS = ("uniform", "clean", "noise")
SCHEDULES = ("constant", "cosine")
# Settings that do not change the trained weights, but for rounding.
RESULTLESS = (
    *("max_rows", "gradient_accumulation_steps", "token_cache", "keep_conditionings"),
    *("checkpoint_every", "log_every", "report_to"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Training settings. Where the paper gives a value (AdamW, 1e-4, eta = 5, t ~ U(0, 1000)) it is the default."""

    steps: int = 2000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompt groups per step, over all processes: each with one t, all of its videos and pairs."""
    learning_rate: float = 1e-4
    """AdamW's step size after warm-up."""
    schedule: str = "constant"
    """The learning rate after warm-up: "constant" or "cosine" (to zero)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its full size."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    objective: str = "btt"
    """"btt": Bradley-Terry with ties (Eq. 3-4). "bt": plain Bradley-Terry, which ignores ties."""
    eta: float = 5.0
    """Tie threshold of Eq. 3-4."""
    source: str = "renoised"
    """renoised: finished latents with new noise (Eq. 1). recorded: states recorded while sampling.
    predicted: the clean latents that the denoiser predicted there, with new noise.
    A mixture by prompt: renoised=0.5,predicted=0.5."""
    trajectory_share: float = 0.5
    """Probability of a recorded state with the source "mixed", an older name of recorded=0.5,renoised=0.5."""
    max_prompts: int = 0
    """Number of prompts to train on, always the same ones for the same number; 0: all."""
    per_prompt: int = 0
    """Number of videos per prompt to train on, the first ones in the store; 0: all."""
    t_low: float = 0.0
    """Lowest noise level trained on, 0: clean."""
    t_high: float = 1000.0
    """Highest noise level trained on, 1000: noise. t ~ U(t_low, t_high); recorded states in that range: uniformly."""
    levels: str = "uniform"
    """Density of t: "uniform", or falling linearly to zero away from the "clean" or the "noise" end."""
    draws_per_step: int = 1
    """Number of times each prompt of a step is noised, each time with new noise and a new t."""
    noise_draws: int = 0
    """Number of fixed draws of (noise, t) per prompt that training cycles through; 0: new ones each time."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over A, tie and B, as labels near the tie margin are uncertain."""
    shared_noise: bool = False
    """Give all videos of a prompt the same noise at a step. The paper does not say."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is saved in place of the last weights; 0: no average."""
    validate_every: int = 0
    """Steps between measurements on the store's validation pairs, kept in the history; 0: none."""
    keep_best: bool = False
    """Save the head of the best validation in place of the last one."""
    max_rows: int = 64
    """Videos per forward pass of the backbone; bounds memory, changes nothing else. Halved if memory runs out."""
    gradient_accumulation_steps: int = 1
    """Number of parts in which a process reads its prompts of a step; gradients add up, memory is that of one part.
    prompts_per_step counts all parts of all processes."""
    token_cache: str = ""
    """Folder in which the tokens of tapped blocks are kept; needs noise_draws. Empty: none.
    Another head on the same draws then trains without the backbone. cache.json says what it holds."""
    keep_conditionings: bool = False
    """Keep the texts' encodings in the store's folder: later trainings on it read them and encode no text again."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: none, so that a killed run starts from the beginning."""
    log_every: int = 50
    """Steps between entries of the history."""
    report_to: str = ""
    """Trackers of accelerate that get each entry, apart by commas: tensorboard, wandb, trackio, ... Empty: none."""
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
        for name in (
            "steps",
            "prompts_per_step",
            "draws_per_step",
            "max_rows",
            "log_every",
            "gradient_accumulation_steps",
        ):
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
        self._require("token_cache", not self.token_cache or self.noise_draws > 0, "empty without noise_draws")
        if self.source not in OLDER_SOURCES:
            requirement = f"one of {', '.join(SOURCES)}, or a mixture such as renoised=0.5,predicted=0.5"
            self._require("source", _shares(self.source) is not None, requirement)
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")

    @property
    def sources(self) -> dict[str, float]:
        """Probability of each source of a training sample; a single one has 1."""
        if self.source == "mixed":
            return {"recorded": self.trajectory_share, "renoised": 1 - self.trajectory_share}
        shares = _shares("recorded" if self.source == "trajectory" else self.source)
        assert shares is not None  # checked on construction
        return shares

    def _require(self, name: str, holds: bool, requirement: str) -> None:
        if not holds:
            raise PrismError(f"The training setting {name} must be {requirement}, found {getattr(self, name)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from JSON; an unknown name is refused."""
        instance("The training settings", values, Mapping, "a dict")
        settings = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in settings:
                raise PrismError(f"There is no training setting {quoted(name, 60)}; there are {', '.join(settings)}.")
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


def _shares(text: str) -> dict[str, float] | None:
    """Probabilities of a text such as "renoised=1,predicted=3", in the order of `SOURCES`; None for another text."""
    if text in SOURCES:
        return {text: 1.0}
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            return None
        if name not in SOURCES or name in weights or not 0 < weight < math.inf:
            return None
        weights[name] = weight
    return {name: weights[name] / sum(weights.values()) for name in SOURCES if name in weights}


@dataclass(frozen=True)
class Recipe:
    """A backbone, the heads that are put onto it, and how they are trained."""

    backbone: str | None
    """The pipeline's id on the Hub; None: the model that ships with the package."""
    call: Mapping[str, Any]
    """Arguments of the pipeline's call, the same for labelled and for judged videos."""
    taps: tuple[int, ...]
    """Blocks whose output is read, counted from 1 (N_b of the paper); one head per block, and their mean score."""
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
