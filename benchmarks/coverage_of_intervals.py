"""How often a 95 % interval holds the truth, on simulated pairs that share prompts and videos; minutes on one core.

    python benchmarks/coverage_of_intervals.py [--repetitions 2000] [--out FILE.json]

A judge is right about a pair with a chance that depends on its prompt, or on its two videos: normal effects on the
log-odds. The truth is the share over endlessly many prompts or videos. Bars of the project: 93 to 97 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prism.evaluation.intervals import prompt_interval, video_interval

PROMPTS, VIDEOS = (10, 15, 20, 30, 60, 200), (60, 100, 300)


def over_prompts(count: int, repetitions: int = 2000, seed: int = 0, logit: float = 0.8, spread: float = 0.8) -> float:
    """Share of sets of `count` prompts, 1 to 10 decided pairs each, whose interval over prompts holds the truth."""
    rng = np.random.default_rng([seed, count])
    effects, sizes = rng.normal(size=1_000_000), rng.integers(1, 11, 1_000_000)
    truth = float((_chance(logit + spread * effects) * sizes).sum() / sizes.sum())

    def interval(number: int) -> list[float] | None:
        pairs = rng.integers(1, 11, count)
        prompts = np.repeat(np.arange(count), pairs)
        chances = _chance(logit + spread * rng.normal(size=count))
        return prompt_interval(rng.random(len(prompts)) < chances[prompts], prompts, seed=number)

    return _covered(interval, truth, repetitions)


def over_videos(count: int, repetitions: int = 2000, seed: int = 0, logit: float = 0.8, spread: float = 0.8) -> float:
    """Share of sets of `count` videos of one prompt, in 6 pairs each, whose interval over videos holds the truth."""
    rng = np.random.default_rng([seed, count, 1])
    truth = float(_chance(logit + spread * rng.normal(size=(2, 1_000_000)).sum(0)).mean())

    def interval(number: int) -> list[float] | None:
        first = np.repeat(np.arange(count), 3)
        second = (first + rng.integers(1, count, len(first))) % count
        effects = spread * rng.normal(size=count)
        return video_interval(rng.random(len(first)) < _chance(logit + effects[first] + effects[second]), first, second)

    return _covered(interval, truth, repetitions)


def _chance(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def _covered(interval: Callable[[int], list[float] | None], truth: float, repetitions: int) -> float:
    held = 0
    for number in range(repetitions):
        ends = interval(number)
        assert ends is not None
        held += ends[0] <= truth <= ends[1]
    return held / repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"repetitions": arguments.repetitions, "seed": arguments.seed, "coverage": []}
    for kind, function, counts in (("prompts", over_prompts, PROMPTS), ("videos", over_videos, VIDEOS)):
        for count in counts:
            for logit in (0.0, 0.8, 2.0):
                covered = function(count, arguments.repetitions, arguments.seed, logit)
                results["coverage"].append({"over": kind, "count": count, "logit": logit, "covered": covered})
                print(f"{count:4d} {kind}, mean log-odds {logit:g}: {100 * covered:.1f} %", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
