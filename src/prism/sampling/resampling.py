"""Weights of particles: potentials of their rewards, effective sample size, resampling; arithmetic on numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Potential = Literal["max", "add", "diff"]
Resampling = Literal["systematic", "multinomial"]


@dataclass
class Particles:
    """The weights of particles, in logarithms, along their lineages.

    potential_type, lmbda: of the potentials. state: (k,) the running maximum, sum or last reward. spent: (k,) log of
    the product of potentials so far. log_weights: (k,) since the last resampling.
    """

    potential_type: Potential
    lmbda: float
    state: np.ndarray
    spent: np.ndarray
    log_weights: np.ndarray

    @classmethod
    def start(cls, k: int, potential_type: Potential, lmbda: float) -> Particles:
        first = -np.inf if potential_type == "max" else 0.0
        return cls(potential_type, lmbda, np.full(k, first), np.zeros(k), np.zeros(k))

    def weigh(self, rewards: np.ndarray, final: bool = False) -> None:
        """Multiply the weights by the potentials of new rewards (k,); NaN stands for a particle that is lost.

        max: exp(lambda max of the rewards so far). add: exp(lambda their sum). diff: exp(lambda (reward - last one)).
        final: the rewards are those of the samples: the last potential makes each lineage's product
        exp(lambda reward), so that the particles follow the tilted law (Singhal et al. 2025, Eq. 5 and section 3.2).
        """
        before = self.state
        if self.potential_type == "max":
            self.state = np.maximum(before, rewards)
        elif self.potential_type == "add":
            self.state = before + rewards
        else:
            self.state = np.asarray(rewards, float)
        change = self.state - before if self.potential_type == "diff" else self.state
        log_potential = self.lmbda * rewards - self.spent if final else self.lmbda * change
        log_potential = np.where(np.isnan(log_potential), -np.inf, log_potential)
        self.spent = self.spent + log_potential
        self.log_weights = self.log_weights + log_potential

    def weights(self) -> np.ndarray:
        """(k,) weights that sum to 1."""
        return normalised(self.log_weights)

    def take(self, ancestors: np.ndarray) -> None:
        """Go on with these particles, with equal weights."""
        self.state, self.spent = self.state[ancestors], self.spent[ancestors]
        self.log_weights = np.zeros(len(ancestors))


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 of their logarithms; they may be of any size."""
    shifted = np.exp(log_weights - log_weights.max())
    return np.asarray(shifted / shifted.sum())


def effective_sample_size(weights: np.ndarray) -> float:
    """1 / sum of squares of weights that sum to 1: k for equal ones, 1 where one particle holds all."""
    return float(1 / np.square(weights).sum())


def resample(weights: np.ndarray, method: Resampling, rng: np.random.Generator, k: int | None = None) -> np.ndarray:
    """(k,) rising indices of the particles to go on with; particle i is taken k weights[i] times on average.

    multinomial: k independent draws. systematic: one draw for all, k equally spaced points of the cumulative weights;
    particle i is taken k weights[i] times, rounded down or up (Kitagawa 1996), so that no good lineage dies by luck.
    """
    k = len(weights) if k is None else k
    points = (np.arange(k) + rng.random()) / k if method == "systematic" else np.sort(rng.random(k))
    taken = np.searchsorted(np.cumsum(weights), points, side="right")
    return np.asarray(np.minimum(taken, np.flatnonzero(weights)[-1]))
