"""How often the intervals of a correlation cover the coefficient of the true values: docs/correlation.md.

    python benchmarks/correlation_coverage.py

Backbones have a true quality and a true accuracy; both are measured on prompts, of which some are harder for all
backbones, and accuracy by three heads of differing luck.
"""

from __future__ import annotations

import numpy as np

from prism.lab import coefficients
from prism.lab.correlation import PerPrompt, Point, resampled


def simulate(
    backbones: int = 12,
    trials: int = 300,
    draws: int = 500,
    noise: float = 0.2,
    slope: float = 0.3,
    scatter: float = 0.03,
    prompts: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """Share of trials in which each coefficient's interval covers it.

    noise: standard deviation of a prompt's quality. slope, scatter: of accuracy over quality, which is 0.4 to 0.9.
    """
    chance = np.random.default_rng(seed)
    names = [tuple(f"{axis}{i}" for i in range(prompts)) for axis in "qp"]
    hits: dict[str, list[bool]] = {name: [] for name in coefficients.BY_NAME}
    for trial in range(trials):
        quality = chance.uniform(0.4, 0.9, backbones)
        accuracy = 0.55 + slope * (quality - 0.4) + chance.normal(0, scatter, backbones)
        hard = chance.normal(0, 0.1, (2, prompts))
        points = []
        for number in range(backbones):
            scores = quality[number] + hard[0] + chance.normal(0, noise, (1, prompts))
            lucky = accuracy[number] + chance.normal(0, 0.01, (3, 1)) + hard[1] + chance.normal(0, 0.15, (3, prompts))
            right = chance.binomial(4, np.clip(lucky, 0, 1)).astype(float)
            points.append(
                Point(
                    str(number),
                    PerPrompt(scores, np.ones(prompts), names[0]),
                    PerPrompt(right, np.full(prompts, 4.0), names[1]),
                )
            )
        measured = [np.array([getattr(point, axis).mean for point in points]) for axis in ("quality", "power")]
        both = resampled(points, trial, draws)
        for name, covered in hits.items():
            of, true = coefficients.BY_NAME[name], float(coefficients.BY_NAME[name](quality, accuracy))
            low, high = coefficients.interval(float(of(*measured)), of(*both))
            covered.append(low - 1e-9 <= true <= high + 1e-9)
    return {name: float(np.mean(covered)) for name, covered in hits.items()}


if __name__ == "__main__":
    for settings in ({}, {"slope": 0.05, "scatter": 0.05}, {"backbones": 6, "scatter": 0.02}, {"noise": 0.8}):
        print(settings, {name: round(share, 3) for name, share in simulate(**settings).items()}, flush=True)
