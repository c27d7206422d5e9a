"""Preference objectives: Bradley-Terry, and Bradley-Terry with ties (Rao and Kupper 1967; paper section 3.3, Eq. 3-4).

Margins are r_A - r_B. Labels are 1 (A preferred), -1 (B preferred), 0 (tie) and NaN (no label: no loss, no gradient).
Where people or a teacher give probabilities instead of a label, the loss is the cross-entropy with these.
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
    """Log-probabilities of A preferred, tie and B preferred.

    Eq. 3: P(A > B) = e^rA / (e^rA + eta e^rB) = sigmoid(margin - ln eta), and P(B > A) likewise with -margin.
    Eq. 4: P(tie) = (eta^2 - 1) e^rA e^rB / ((e^rA + eta e^rB)(eta e^rA + e^rB)) = (eta^2 - 1) P(A > B) P(B > A).

    Args:
        margins: (...), r_A - r_B, of any shape.
        eta: threshold above 1.

    Returns:
        (..., 3) A preferred, tie, B preferred.

    Raises:
        PrismError: unless eta is above 1 (at eta = 1 ties are impossible).
    """
    if not eta > 1:
        raise PrismError(f"The tie threshold eta must be above 1 (the paper's is 5), found {eta}.")
    first = logsigmoid(margins - math.log(eta))
    second = logsigmoid(-margins - math.log(eta))
    return torch.stack([first, math.log(eta**2 - 1) + first + second, second], dim=-1)


def label_counts(
    labels: Tensor, objective: str = "btt", soft: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Number of labels that count in the loss, per dimension.

    Arguments as of ``preference_loss``.

    Returns:
        (num_dimensions,) int64.
    """
    return _counted(_targets(labels, objective, soft), weights).sum(0)


def _targets(labels: Tensor, objective: str, soft: Tensor | None) -> Tensor:
    """(pairs, num_dimensions, outcomes) probabilities of A preferred, tie ("btt" alone) and B preferred.

    All are 0 where there is no label. "bt" leaves out the tie, and with it that share of a soft label.
    """
    targets = torch.stack([labels == 1, labels == 0, labels == -1], -1).to(labels.dtype)  # NaN equals none of them
    if soft is not None:
        p_a, p_b = soft.to(labels.dtype).unbind(-1)
        soft_targets = torch.stack([p_a, 1 - p_a - p_b, p_b], -1)
        targets = torch.where(soft_targets.isnan().any(-1, keepdim=True), targets, soft_targets)
    return targets if objective == "btt" else targets[..., ::2]


def _counted(targets: Tensor, weights: Tensor | None) -> Tensor:
    """(pairs, num_dimensions) bool, True at the labels that count in the loss."""
    labelled = (targets > 0).any(-1)
    return labelled if weights is None else labelled & ~(weights == 0)


def preference_loss(
    margins: Tensor,
    labels: Tensor,
    eta: float = 5.0,
    objective: str = "btt",
    smoothing: float = 0.0,
    counts: Tensor | None = None,
    soft: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of the labels: first over the pairs of each dimension, then over dimensions.

    For a soft label it is the cross-entropy, -(p_a log P(A > B) + p_tie log P(tie) + p_b log P(B > A)) with p_tie =
    1 - p_a - p_b; with probabilities of 0 and 1 it equals the hard label's loss to the bit. A weight multiplies a
    label's loss. The mean still divides by the number of labels, of those whose weight is not 0, so that a batch of
    unsure labels gives smaller gradients than one of sure labels. A weight of 1 changes nothing.

    Dimensions with no label in the batch do not count. A batch without any label gives 0.

    Args:
        margins: (pairs, num_dimensions), r_A - r_B.
        labels: (pairs, num_dimensions), 1 / -1 / 0, NaN where there is no label.
        eta: threshold of Eq. 3-4. Unused by ``"bt"``.
        objective: ``"btt"`` (Eq. 3-4) or ``"bt"`` (plain Bradley-Terry, which leaves ties out).
        smoothing: share of each label, in [0, 1), that is spread over all outcomes alike.
        counts: (num_dimensions,) ``label_counts`` of the whole batch, where these pairs are a part of it: losses and
            gradients of the parts then add up to those of the whole. None: these pairs are the whole batch.
        soft: (pairs, num_dimensions, 2) p_a and p_b, in [0, 1] with p_a + p_b <= 1, in place of the label; NaN: as
            ``labels`` says.
        weights: (pairs, num_dimensions) from 0, NaN for 1.

    Returns:
        scalar, in the margins' dtype.
    """
    if objective not in OBJECTIVES:
        raise PrismError(f"The objective {objective!r} does not exist; choose one of {', '.join(OBJECTIVES)}.")
    targets = _targets(labels, objective, soft)
    labelled, targets = _counted(targets, weights), targets.to(margins.dtype)
    log_p = logsigmoid(torch.stack([margins, -margins], -1)) if objective == "bt" else log_probabilities(margins, eta)
    # `where`, not a product alone: an outcome of probability 0 must not give 0 * -inf = NaN, and p_a + p_b may be
    # rounded to more than 1, which makes the tie's probability negative.
    losses = -torch.where(targets > 0, targets * log_p, torch.zeros_like(log_p)).sum(-1)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * targets.sum(-1) * log_p.mean(-1)
    if weights is not None:
        losses = losses * torch.where(weights.isnan(), 1, weights).to(losses.dtype)
    # `where` again: a pair without a label may have an infinite margin, whose loss must not become NaN.
    losses = torch.where(labelled, losses, torch.zeros_like(losses))
    counts = labelled.sum(0) if counts is None else counts
    return (losses.sum(0) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def tie_margin(eta: float = 5.0) -> float:
    """The model's own tie rule: a tie is the likeliest outcome where |r_A - r_B| <= ln((eta^2 - 2) / eta).

    1.53 at eta = 5. Below eta = 2 a tie is never the likeliest outcome and the value is negative.
    """
    return math.log((eta**2 - 2) / eta) if eta**2 > 2 else -math.inf
