"""A small table of recorded scores, as `prism plan` leaves it, for tests."""

from __future__ import annotations

import numpy as np

from prism.evaluation.recorded import Recorded
from prism.sampling.planner import Reading

READINGS = [Reading("now", 2, 842.2, 0), Reading("ahead", 1, 700.0, 0), Reading("finished", 0, 700.0, 0)]


def made(prompts: int = 20, n: int = 3, seed: int = 0) -> Recorded:
    """Rewards of two dimensions, and scores that are the rewards under noise."""
    random = np.random.default_rng(seed)
    rewards = {name: random.random((prompts, n)) for name in ("VQ", "overall")}
    truth = np.stack(list(rewards.values()), -1)
    scores = {reading: truth + random.normal(0, 0.3, truth.shape) for reading in READINGS}
    workload = {"calls": [2, 2, 2], "cfg": "two_calls", "tap_share": 0.5, "listens": True, "readable": [True] * 3}
    seeds = np.arange(prompts * n).reshape(prompts, n)
    about = {"dimensions": list(rewards), "workload": workload}
    return Recorded(tuple(f"prompt {row}" for row in range(prompts)), seeds, rewards, scores, about)
