"""Resampling against closed forms: a mixture of Gaussians whose law, tilted by a reward, is known."""

from __future__ import annotations

import numpy as np
import pytest

from prism.sampling.resampling import Particles, effective_sample_size, normalised, resample

LMBDA, SHARES, MEANS, SPREAD, REVEALED = 0.4, np.array([0.7, 0.3]), np.array([-1.0, 1.5]), 0.6, 3


def closed_form() -> tuple[float, float, float]:
    """log Z, mean, and the second component's share of p(x) exp(lambda x) for the mixture p."""
    logs = np.log(SHARES) + LMBDA * MEANS + (LMBDA * SPREAD) ** 2 / 2
    shares = normalised(logs)
    return float(np.logaddexp(*logs)), float(shares @ (MEANS + LMBDA * SPREAD**2)), float(shares[1])


def run(k: int, rng: np.random.Generator, potential: str, method: str, adaptive: bool) -> tuple[float, float, float]:
    """One run of k particles: estimates of Z, of the mean under the tilted law, and of the second component's share.

    A sample is a component's mean and three increments, which the steps reveal one by one, the component first: what
    is expected of it by then is its predicted clean value, and its reward. So the kernels are exact.
    """
    particles, total, x = Particles.start(k, potential, LMBDA), 1.0, np.zeros(k)
    second = np.zeros(k, bool)
    for step in range(REVEALED + 1):
        if step == 0:
            second = rng.random(k) < SHARES[1]
            x = MEANS[second.astype(int)]
        else:
            x = x + SPREAD / REVEALED**0.5 * rng.standard_normal(k)
        final = step == REVEALED
        before = particles.log_weights
        particles.weigh(x, final=final)
        total *= float((normalised(before) * np.exp(particles.log_weights - before)).sum())
        weights = particles.weights()
        if not final and (not adaptive or effective_sample_size(weights) < k / 2):
            ancestors = resample(weights, method, rng)
            particles.take(ancestors)
            x, second = x[ancestors], second[ancestors]
    weights = particles.weights()
    return total, float(weights @ x), float(weights @ second)


@pytest.mark.parametrize(("method", "adaptive"), [("systematic", True), ("multinomial", False)])
@pytest.mark.parametrize("potential", ["max", "add", "diff"])
def test_particles_follow_the_tilted_law(potential: str, method: str, adaptive: bool) -> None:
    """Z is unbiased for any number of particles; ratios of sums for many."""
    rng = np.random.default_rng(3)
    runs = np.array([run(60, rng, potential, method, adaptive)[0] for _ in range(120)])
    log_z, mean, share = closed_form()
    assert abs(runs.mean() - np.exp(log_z)) < 4 * runs.std() / len(runs) ** 0.5
    few = np.array([run(3, rng, potential, method, adaptive)[0] for _ in range(700)])
    assert abs(few.mean() - np.exp(log_z)) < 4 * few.std() / len(few) ** 0.5
    many = np.array([run(3000, rng, potential, method, adaptive) for _ in range(12)])
    for column, value in ((1, mean), (2, share)):
        error = many[:, column].std() / len(many) ** 0.5
        assert abs(many[:, column].mean() - value) < 4 * error + 0.005
        assert error < 0.08
    assert mean > 0.5 + SHARES @ MEANS  # the tilt is no small one


@pytest.mark.parametrize("method", ["systematic", "multinomial"])
def test_a_particle_is_taken_as_often_as_its_weight_says(method: str) -> None:
    weights, rng = np.array([0.5, 0.0, 0.3, 0.15, 0.05]), np.random.default_rng(0)
    counts = np.array([np.bincount(resample(weights, method, rng, 7), minlength=5) for _ in range(700)])
    error = np.maximum(counts.std(0), 1e-9) / len(counts) ** 0.5
    assert (np.abs(counts.mean(0) - 7 * weights) <= 4 * error + 1e-9).all()
    if method == "systematic":
        assert (np.floor(7 * weights) <= counts).all()
        assert (counts <= np.ceil(7 * weights)).all()


def test_weights_of_any_size_and_lost_particles() -> None:
    particles = Particles.start(3, "diff", 10.0)
    particles.weigh(np.array([900.0, np.nan, 900.0 - np.log(3) / 10]))
    assert particles.weights() == pytest.approx([0.75, 0, 0.25])
    assert effective_sample_size(particles.weights()) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert set(resample(particles.weights(), "multinomial", np.random.default_rng(0), 50)) == {0, 2}
    assert effective_sample_size(np.full(8, 1 / 8)) == pytest.approx(8)
