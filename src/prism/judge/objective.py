"""Preference objectives: Bradley-Terry, and Bradley-Terry with ties (Rao and Kupper 1967; paper section 3.3, Eq. 3-4).

Margins are r_A - r_B. Labels are 1 (A preferred), -1 (B preferred), 0 (tie) and NaN (no label: no loss, no gradient).
The paper prints Eq. 3 with eta in the wrong place; the form here is Rao and Kupper's, whose probabilities sum to one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prism.errors import PrismError

OBJECTIVES = ("btt", "bt")


def log_probabilities(margins: Tensor, eta: float = 5.0) -> Tensor:
    """Log-probabilities (..., 3) of A preferred, tie and B preferred, of margins of any shape.

    Eq. 3: P(A > B) = e^rA / (e^rA + eta e^rB) = sigmoid(margin - ln eta), and P(B > A) likewise with -margin.
    Eq. 4: P(tie) = (eta^2 - 1) e^rA e^rB / ((e^rA + eta e^rB)(eta e^rA + e^rB)) = (eta^2 - 1) P(A > B) P(B > A).

    Raises:
        PrismError: unless eta is above 1 (at eta = 1 ties are impossible).
    """
    if not eta > 1:
        raise PrismError(f"The tie threshold eta must be above 1 (the paper's is 5), found {eta}.")
    first = logsigmoid(margins - math.log(eta))
    second = logsigmoid(-margins - math.log(eta))
    return torch.stack([first, math.log(eta**2 - 1) + first + second, second], dim=-1)


def label_counts(labels: Tensor, objective: str = "btt") -> Tensor:
    """Number of labels (pairs, num_dimensions) that count in the loss, per dimension: (num_dimensions,)."""
    return _counted(labels, objective).sum(0)


def _counted(labels: Tensor, objective: str) -> Tensor:
    """(pairs, num_dimensions) bool, True at the labels that count in the loss."""
    return ~labels.isnan() if objective == "btt" else labels.abs() == 1


def preference_loss(
    margins: Tensor,
    labels: Tensor,
    eta: float = 5.0,
    objective: str = "btt",
    smoothing: float = 0.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of the labels: first over the pairs of each dimension, then over dimensions.

    Dimensions with no label in the batch do not count. A batch without any label gives 0.

    Args:
        margins: (pairs, num_dimensions), r_A - r_B.
        labels: (pairs, num_dimensions), 1 / -1 / 0, NaN where there is no label.
        eta: threshold of Eq. 3-4. Unused by ``"bt"``.
        objective: ``"btt"`` (Eq. 3-4) or ``"bt"`` (plain Bradley-Terry, which leaves ties out).
        smoothing: share of each label, in [0, 1), that is spread over all outcomes alike.
        counts: (num_dimensions,) ``label_counts`` of the whole batch, where these pairs are a part of it: losses and
            gradients of the parts then add up to those of the whole. None: these pairs are the whole batch.
    """
    if objective not in OBJECTIVES:
        raise PrismError(f"The objective {objective!r} does not exist; choose one of {', '.join(OBJECTIVES)}.")
    labelled = _counted(labels, objective)
    targets = torch.where(labelled, labels, torch.zeros_like(labels))
    if objective == "bt":
        log_p, outcome = logsigmoid(torch.stack([margins, -margins], -1)), (targets < 0).long()
    else:
        log_p, outcome = log_probabilities(margins, eta), (1 - targets).long()  # 1, 0, -1 -> columns 0, 1, 2
    losses = -log_p.gather(-1, outcome[..., None]).squeeze(-1)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_p.mean(-1)
    # where, not a product: an infinite margin of an unlabelled pair must not become NaN.
    losses = torch.where(labelled, losses, torch.zeros_like(losses))
    counts = labelled.sum(0) if counts is None else counts
    return (losses.sum(0) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def tie_margin(eta: float = 5.0) -> float:
    """The model's own tie rule: a tie is the likeliest outcome where |r_A - r_B| <= ln((eta^2 - 2) / eta).

    1.53 at eta = 5. Below eta = 2 a tie is never the likeliest outcome and the value is negative.
    """
    return math.log((eta**2 - 2) / eta) if eta**2 > 2 else -math.inf
