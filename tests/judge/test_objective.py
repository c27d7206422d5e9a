"""The objectives against the closed forms of Eq. 3-4, written with exponentials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prism.errors import PrismError
from prism.judge.objective import label_counts, log_probabilities, preference_loss, tie_margin

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


def soft_of(labels: torch.Tensor) -> torch.Tensor:
    """The probabilities (..., 2) that say what hard labels say; NaN where there is none."""
    sides = torch.stack([(labels == 1), (labels == -1)], -1).to(labels.dtype)
    return torch.where(labels.isnan()[..., None], NAN, sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("objective", ["btt", "bt"])
def test_soft_labels_of_zero_and_one_are_the_hard_ones_to_the_bit(objective, smoothing, dtype):
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.choice([1.0, 0.0, -1.0, NAN], size=(40, 3)), dtype=dtype)
    margins = torch.tensor(rng.normal(0, 4, (40, 3)), dtype=dtype, requires_grad=True)
    margins.data[0], labels[0] = 2e4, 1.0
    hard = preference_loss(margins, labels, 5.0, objective, smoothing)
    (expected,) = torch.autograd.grad(hard, margins)
    no_labels = torch.full_like(labels, NAN)
    some = torch.tensor(rng.choice([True, False], (40, 3, 1)))
    for own, soft, weights in (
        (no_labels, soft_of(labels), None),
        (no_labels, soft_of(labels), torch.ones_like(labels)),
        (-labels, soft_of(labels).where(~labels.isnan()[..., None], NAN), None),  # the probabilities are what counts
        (labels, torch.where(some, soft_of(labels), NAN), torch.full_like(labels, NAN)),
    ):
        loss = preference_loss(margins, own, 5.0, objective, smoothing, soft=soft, weights=weights)
        assert torch.equal(loss, hard)
        assert torch.equal(torch.autograd.grad(loss, margins)[0], expected)
        assert torch.equal(label_counts(own, objective, soft, weights), label_counts(labels, objective))


def by_hand(margin, p_a, p_b, weight, eta, objective, smoothing):
    """A label's loss and its derivative by the margin, with exponentials alone."""
    p_tie = 1 - p_a - p_b
    if objective == "bt":
        first = 1 / (1 + math.exp(-margin))
        outcomes = [(p_a, first, 1 - first), (p_b, 1 - first, -first)]
    else:
        first, tie, second = closed_form(margin, 0, eta)
        outcomes = [(p_a, first, 1 - first), (p_tie, tie, second - first), (p_b, second, second - 1)]
    mass = sum(p for p, _, _ in outcomes)
    shares = [(1 - smoothing) * p + smoothing * mass / len(outcomes) for p, _, _ in outcomes]
    loss = -sum(share * math.log(q) for share, (_, q, _) in zip(shares, outcomes))
    slope = -sum(share * d for share, (_, _, d) in zip(shares, outcomes))
    return weight * loss, weight * slope


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("objective", ["btt", "bt"])
def test_soft_labels_and_weights_are_a_weighted_cross_entropy(objective, smoothing):
    """Oracle: the closed form of loss and gradient; hard, soft, missing and weightless labels side by side."""
    rng = np.random.default_rng(1)
    margins = torch.tensor(rng.normal(0, 3, (30, 2)), requires_grad=True)
    p_a, _, p_b = np.moveaxis(rng.dirichlet([1, 1, 1], (30, 2)), -1, 0)
    labels, weights = rng.choice([1.0, 0.0, -1.0, NAN], (30, 2)), rng.uniform(0.1, 3, (30, 2))
    hard = rng.uniform(size=(30, 2)) < 0.4
    p_a[hard] = p_b[hard] = NAN
    weights[:4], weights[4:8] = NAN, 0.0
    losses, slopes, counts = np.zeros((30, 2)), np.zeros((30, 2)), np.zeros(2)
    for at in np.ndindex(30, 2):
        sides = (labels[at] == 1, labels[at] == -1) if hard[at] else (p_a[at], p_b[at])
        none = hard[at] and (np.isnan(labels[at]) or (objective == "bt" and labels[at] == 0))
        weight = 1 if np.isnan(weights[at]) else weights[at]
        if none or weight == 0:
            continue
        losses[at], slopes[at] = by_hand(margins[at].item(), *map(float, sides), weight, 3.0, objective, smoothing)
        counts[at[1]] += 1
    soft = torch.tensor(np.stack([p_a, p_b], -1))
    extras = {"soft": soft, "weights": torch.tensor(weights)}
    loss = preference_loss(margins, torch.tensor(labels), 3.0, objective, smoothing, **extras)
    loss.backward()
    assert label_counts(torch.tensor(labels), objective, **extras).tolist() == counts.tolist()
    assert loss.item() == pytest.approx((losses.sum(0) / counts).mean(), rel=1e-12)
    np.testing.assert_allclose(margins.grad.numpy(), slopes / counts / 2, rtol=1e-10, atol=1e-15)

    swapped = preference_loss(
        -margins, torch.tensor(-labels), 3.0, objective, smoothing, soft=soft.flip(-1), weights=extras["weights"]
    )
    assert swapped.item() == pytest.approx(loss.item(), rel=1e-12)
    total = label_counts(torch.tensor(labels), objective, **extras)
    parts = [
        preference_loss(
            margins[rows], torch.tensor(labels)[rows], 3.0, objective, smoothing, total, soft[rows],
            extras["weights"][rows],
        )
        for rows in (slice(0, 11), slice(11, 30))
    ]  # fmt: skip
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-12)


def test_weightless_and_missing_labels_give_nothing_at_an_infinite_margin():
    margins = torch.tensor([[math.inf], [-math.inf], [0.5]], requires_grad=True)
    labels, soft = torch.tensor([[NAN], [NAN], [NAN]]), torch.tensor([[[NAN, NAN]], [[0.4, 0.3]], [[0.4, 0.3]]])
    loss = preference_loss(margins, labels, soft=soft, weights=torch.tensor([[NAN], [0.0], [2.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(0.5, 0.4, 0.3, 2.0, 5.0, "btt", 0.0)[0])
    assert margins.grad[:2].eq(0).all()
    assert margins.grad[2] != 0


def test_a_margin_that_has_the_label_without_a_doubt_costs_nothing():
    """The log-probabilities of the other outcomes are infinite."""
    margins = torch.tensor([[math.inf], [-math.inf]], requires_grad=True)
    sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    for labels, soft in ((torch.tensor([[1.0], [-1.0]]), None), (torch.full((2, 1), NAN), sure)):
        (gradient,) = torch.autograd.grad(loss := preference_loss(margins, labels, soft=soft), margins)
        assert loss.item() == 0
        assert gradient.eq(0).all()


def test_rounded_probabilities_give_the_tie_next_to_nothing():
    """0.6 and 0.4 as float32 sum to more than 1, and 0.7 and 0.3 to less."""
    soft, nothing = torch.tensor([[[0.6, 0.4]], [[0.7, 0.3]]]), torch.full((2, 1), NAN)
    for smoothing in (0.0, 0.1):
        loss = preference_loss(torch.full((2, 1), 300.0), nothing, smoothing=smoothing, soft=soft)
        exact = [by_hand(300.0, p_a, p_b, 1.0, 5.0, "btt", smoothing)[0] for p_a, p_b in ((0.6, 0.4), (0.7, 0.3))]
        assert loss.item() == pytest.approx(sum(exact) / 2, rel=1e-5)
