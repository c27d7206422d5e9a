"""The objectives against the closed forms of Eq. 3-4, written with exponentials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prism.errors import PrismError
from prism.judge.objective import log_probabilities, preference_loss, tie_margin

NAN = float("nan")


def closed_form(a: float, b: float, eta: float) -> tuple[float, float, float]:
    ea, eb = math.exp(a), math.exp(b)
    first, second = ea / (ea + eta * eb), eb / (eb + eta * ea)
    return first, (eta**2 - 1) * ea * eb / ((ea + eta * eb) * (eta * ea + eb)), second


@pytest.mark.parametrize("eta", [1.1, 3.0, 5.0, 8.0])
def test_probabilities_equal_the_closed_form_and_sum_to_one(eta):
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 3, 50), rng.normal(0, 3, 50)
    ours = log_probabilities(torch.tensor(a - b), eta).exp()
    expected = torch.tensor([closed_form(x, y, eta) for x, y in zip(a, b)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours.sum(-1), torch.ones(50, dtype=torch.float64))


def test_extreme_margins_stay_finite():
    margins = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = preference_loss(margins[:, None], torch.tensor([[1.0], [0.0]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(margins.grad).all()


def test_loss_averages_labelled_pairs_then_dimensions():
    margins = torch.tensor(
        [[0.4, 2.0, 1.0], [-1.0, 0.3, 1.0], [0.2, 5.0, 1.0]], dtype=torch.float64, requires_grad=True
    )
    labels = torch.tensor([[1.0, NAN, NAN], [0.0, -1.0, NAN], [-1.0, NAN, NAN]], dtype=torch.float64)
    first = -(
        math.log(closed_form(0.4, 0, 5)[0]) + math.log(closed_form(-1.0, 0, 5)[1]) + math.log(closed_form(0.2, 0, 5)[2])
    )
    second = -math.log(closed_form(0.3, 0, 5)[2])
    loss = preference_loss(margins, labels)
    assert loss.item() == pytest.approx((first / 3 + second) / 2)
    loss.backward()
    assert ((margins.grad != 0) == ~labels.isnan()).all()


def test_plain_bradley_terry_leaves_ties_out():
    margins = torch.tensor([[0.7], [-0.2], [9.0]], requires_grad=True)
    loss = preference_loss(margins, torch.tensor([[1.0], [-1.0], [0.0]]), objective="bt")
    assert loss.item() == pytest.approx(-(math.log(1 / (1 + math.exp(-0.7))) + math.log(1 / (1 + math.exp(-0.2)))) / 2)
    loss.backward()
    assert margins.grad[2] == 0


def test_no_label_at_all_is_zero_with_zero_gradient():
    margins = torch.tensor([[0.7], [float("inf")]], requires_grad=True)
    loss = preference_loss(margins, torch.tensor([[NAN], [NAN]]))
    loss.backward()
    assert loss.item() == 0
    assert (margins.grad == 0).all()


def test_gradient_equals_finite_differences():
    margins = torch.randn(6, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0], [0, -1], [-1, 1], [1, NAN], [NAN, 0], [0, 0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: preference_loss(m, labels), margins)


def test_tie_rule_is_where_a_tie_is_likeliest():
    assert tie_margin(5) == pytest.approx(math.log(23 / 5))
    for eta in (1.2, 1.9, 2.5, 5.0):
        margins = torch.linspace(-4, 4, 801, dtype=torch.float64)
        likeliest = log_probabilities(margins, eta).argmax(-1)
        ruled = (margins.abs() <= tie_margin(eta)) & ((margins.abs() - tie_margin(eta)).abs() > 1e-9)
        assert torch.equal(likeliest == 1, ruled)


def test_refuses():
    with pytest.raises(PrismError, match="eta must be above 1"):
        log_probabilities(torch.zeros(1), 1.0)
    with pytest.raises(PrismError, match="'hinge' does not exist"):
        preference_loss(torch.zeros(1, 1), torch.zeros(1, 1), objective="hinge")


@pytest.mark.parametrize("objective", ["btt", "bt"])
def test_smoothing_is_the_loss_of_labels_mixed_with_all_outcomes(objective):
    margins = torch.tensor([[0.7], [-1.2], [0.3]], dtype=torch.float64)
    labels = torch.tensor([[1.0], [-1.0], [NAN]], dtype=torch.float64)
    outcomes = (1.0, 0.0, -1.0) if objective == "btt" else (1.0, -1.0)
    plain = float(preference_loss(margins, labels, 3.0, objective))
    spread = [
        float(preference_loss(margins[row : row + 1], torch.tensor([[label]], dtype=torch.float64), 3.0, objective))
        for row in (0, 1)
        for label in outcomes
    ]
    expected = 0.8 * plain + 0.2 * sum(spread) / len(spread)
    assert float(preference_loss(margins, labels, 3.0, objective, smoothing=0.2)) == pytest.approx(expected)
