"""The three objectives of `prism improve`: flow-DPO on pairs, plain denoising on winners, DiffusionNFT on all.

Errors are means over a sample's latents of squared differences between outputs, as in the papers' published code, not
sums: a beta of one form is not that of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST = 1e-5  # of DiffusionNFT's code: the smallest mean absolute error that a sample is weighted by


def errors(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference per row.

    Args:
        output, target: (B, ...).
        mask: (B, ...) bool, True where latents are denoised; None: everywhere.

    Returns:
        (B,).
    """
    return _mean((output - target).square(), mask)


def flow_dpo(
    winner: Tensor, loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Flow-DPO (Liu et al. 2025, arXiv 2501.13918, Eq. 12, with constant beta; Wallace et al. 2023, arXiv 2311.12908,
    Eq. 14, for epsilon and v):

        L = -log sigmoid(-beta / 2 ((|v_w - v_theta|^2 - |v_w - v_ref|^2) - (|v_l - v_theta|^2 - |v_l - v_ref|^2)))

    Args:
        winner, loser: (B,) `errors` of the tuned model, under the same noise and level for both.
        reference_winner, reference_loser: (B,) those of the reference model.
        beta: weight of the distance to the reference.

    Returns:
        The loss (B,), and the implicit margin (B,), positive where the tuned model prefers the winner more than the
        reference does.
    """
    margin = -0.5 * beta * ((winner - reference_winner) - (loser - reference_loser))
    return -F.logsigmoid(margin), margin


def probabilities(scores: Tensor, spread: float, clip: float) -> Tensor:
    """DiffusionNFT's optimality probabilities r (Zheng et al. 2025, arXiv 2509.16117, Eq. 7):

        r = 1/2 + 1/2 clip((score - mean of its prompt) / (clip * spread), -1, 1)

    Args:
        scores: (N,) of one prompt's candidates.
        spread: standard deviation that scores are divided by.
        clip: number of standard deviations at which r is 0 or 1.

    Returns:
        (N,) in [0, 1].
    """
    advantages = (scores - scores.mean()) / max(spread, 1e-8)
    return 0.5 + 0.5 * (advantages / clip).clamp(-1, 1)


def diffusion_nft(
    output: Tensor, old: Tensor, clean_of: object, clean: Tensor, r: Tensor, beta: float, clip: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """DiffusionNFT's policy loss (arXiv 2509.16117, Eq. 5), on the predicted clean latents as in its code:

        v+ = (1 - beta) v_old + beta v_theta,    v- = (1 + beta) v_old - beta v_theta
        L = clip / beta (r |x(v+) - x_0|^2 / |x(v+) - x_0|_1 + (1 - r) |x(v-) - x_0|^2 / |x(v-) - x_0|_1)

    where x(v) is the clean latent that an output predicts, and the divisors are constants of the gradient.

    Args:
        output: (B, ...) of the tuned model; old: (B, ...) of the model that sampled, which takes no gradient.
        clean_of: function of an output (B, ...) that gives the clean latents (B, ...) that it predicts.
        clean: (B, ...) the sampled clean latents.
        r: (B,) of `probabilities`.
        beta: mixture of the implicit policies; clip: as of `probabilities`.
        mask: as of `errors`.

    Returns:
        (B,).
    """
    old = old.detach()
    positive = _weighted(clean_of((1 - beta) * old + beta * output), clean, mask)  # type: ignore[operator]
    negative = _weighted(clean_of((1 + beta) * old - beta * output), clean, mask)  # type: ignore[operator]
    return clip / beta * (r * positive + (1 - r) * negative)


def _weighted(predicted: Tensor, clean: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error per row over its mean absolute error, which takes no gradient: (B,)."""
    with torch.no_grad():
        size = _mean((predicted.double() - clean.double()).abs(), mask).clamp(min=FEWEST).to(predicted.dtype)
    return _mean((predicted - clean).square(), mask) / size


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean per row of (B, ...) where the mask is True: (B,)."""
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
