"""Calibration against labels drawn from known probabilities, a grid search, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.errors import PrismError
from prism.evaluation import calibrate, measure
from prism.evaluation.calibration import calibration_error, fit, margins_of, nll
from prism.judge import Judge


def drawn(temperature: float, eta: float, n: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Margins, and labels drawn with the probabilities of Eq. 3-4 at margin / temperature."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 3, n)
    x = np.exp(margins / temperature)
    first, second = x / (x + eta), 1 / (1 + eta * x)
    u = rng.random(n)
    return np.where(u < first, 1, np.where(u < first + second, -1, 0)), margins


@pytest.mark.parametrize(("temperature", "eta"), [(2.5, 1.4), (0.5, 5.0), (1.0, 2.0)])
def test_the_numbers_labels_were_drawn_with_are_found_again(temperature, eta):
    labels, margins = drawn(temperature, eta)
    found = fit(labels, margins)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.eta == pytest.approx(eta, rel=0.05)
    assert calibration_error(labels, margins, found.eta, found.temperature) < 0.01
    wrong = calibration_error(labels, margins, found.eta, found.temperature / 4)
    assert wrong > 0.03


def test_the_fit_is_the_best_of_a_grid():
    labels, margins = drawn(2.0, 1.6, n=300)
    found = fit(labels, margins)
    best = nll(labels, margins, found.eta, found.temperature)
    grid = [nll(labels, margins, eta, t) for t in np.geomspace(0.3, 10, 60) for eta in 1 + np.geomspace(0.05, 8, 60)]
    assert best <= min(grid)
    assert best == pytest.approx(min(grid), abs=1e-3)
    assert found.tie_threshold in np.abs(margins) or found.tie_threshold == -1


def test_likelihood_and_error_by_hand():
    labels, margins = [1, 0, -1], [0.4, -1.0, 2.0]
    x = [math.exp(m / 2) for m in margins]
    p = [x[0] / (x[0] + 3), 8 * x[1] / ((x[1] + 3) * (1 + 3 * x[1])), 1 / (1 + 3 * x[2])]
    assert nll(labels, margins, 3.0, 2.0) == pytest.approx(-sum(map(math.log, p)) / 3)
    # Two pairs, four ways round, each a bin of its own: |p - outcome|.
    first = [1 / (1 + 3 * math.exp(-m)) for m in (0.5, -0.5, 2.0, -2.0)]
    expected = (abs(first[0] - 1) + first[1] + first[2] + abs(first[3] - 1)) / 4
    assert calibration_error([1, -1], [0.5, 2.0], 3.0) == pytest.approx(expected)


def test_a_judge_that_is_worse_than_chance_is_not_turned_over():
    labels, margins = drawn(1.0, 2.0)
    assert fit(-labels, margins).temperature > 1e5
    for bad in (([0, 0], [1.0, 2.0]), ([1, -1], [0.0, 0.0]), ([], [])):
        with pytest.raises(PrismError, match="decided pairs"):
            fit(*bad)


def test_a_calibrated_judge_gives_probabilities_and_keeps_them(tmp_path):
    store = stores.make(tmp_path / "store")
    pipe = tiny.wan()
    judge = Judge.untrained(pipe, tap=1, dim=16, dimensions=("VQ", "overall"))
    margins = torch.tensor([[0.4, -1.0], [2.0, 0.0]])
    x = margins.exp()
    plain = torch.stack([x / (x + 5), 24 * x / ((x + 5) * (1 + 5 * x)), 1 / (1 + 5 * x)], -1)
    torch.testing.assert_close(judge.probabilities(margins), plain)
    measured = measure(judge, store, "validation", timesteps=(699, 499), progress=False)
    rows = calibrate(judge, measured)
    assert [row["dimension"] for row in rows] == ["VQ", "overall"]
    for row in rows:
        labels, values = margins_of(measured)[row["dimension"]]
        assert (
            row["pairs"]
            == len(labels)
            == sum(entry["pairs"] for entry in measured.rows if entry["dimension"] == row["dimension"])
        )
        assert row["nll_before"] == pytest.approx(nll(labels, values, 5.0))
        assert row["nll_after"] <= row["nll_before"]
        assert row["nll_after"] == pytest.approx(nll(labels, values, row["eta"], row["temperature"]))
    known = judge.calibration["overall"]
    x = (margins[:, 1] / known["temperature"]).exp()
    torch.testing.assert_close(judge.probabilities(margins)[:, 1, 0], x / (x + known["eta"]))
    judge.save_pretrained(tmp_path / "head")
    assert Judge.from_pretrained(tmp_path / "head", pipe).calibration == judge.calibration
