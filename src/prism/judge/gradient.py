"""The gradient of a judge's score with respect to latents, through its heads and the blocks that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prism.backbone import Backbone, Conditioning, Ragged
from prism.backbone.wrapping import around_module
from prism.errors import PrismError, quoted, reason
from prism.judge.head import scores_of
from prism.team import ran_out

Backward = Callable[[Tensor, Tensor], Tensor]
Noising = Callable[[Tensor], Tensor]


def gradient_of(total: Tensor, latents: Tensor) -> Tensor:
    """The gradient of a sum of scores with respect to latents; no weight takes any.

    Args:
        total: scalar.
        latents: (B, ...).

    Returns:
        (B, ...).
    """
    (gradient,) = torch.autograd.grad(total, latents)
    return gradient


def score_gradient(
    judge: Any,
    latents: Tensor,
    conditioning: Conditioning | Ragged,
    t: float,
    weights: Mapping[str, float],
    noisy: Noising = lambda latents: latents,
    checkpointed: bool = False,
    backward: Backward = gradient_of,
) -> tuple[Tensor, Tensor]:
    """Scores of latents at a noise level, and the gradient of each row's weighted score with respect to that row.

    Args:
        judge: a `Judge`, which reads hidden states.
        latents: (B, ...).
        conditioning: what `Backbone.condition` gives, a row per latent.
        t: noise level in [0, 1000] of what is judged.
        weights: by dimension of the judge.
        noisy: makes of the latents those (B, ...) that the denoiser is given, at level t; by default they are.
        checkpointed: keep the blocks' inputs alone and compute each block again on the way back, which saves memory for
            one more forward pass.
        backward: takes the gradient of a sum of scores; to count and time what it costs.

    Returns:
        scores: (B, num_dimensions), in the dtype of the heads.
        gradient: (B, ...) shaped like the latents.

    Raises:
        PrismError: for a denoiser through which no gradient comes.
    """
    backbone: Backbone = judge.backbone
    with torch.inference_mode(False), torch.enable_grad():
        source = latents.detach().clone().requires_grad_()
        try:
            with blocks_checkpointed(backbone, judge.tap if checkpointed else 0):
                tokens = backbone.tokens(noisy(source), conditioning, t, judge.taps, grad=True)
                scores: Tensor = judge.combined(scores_of(judge.members, tokens))
                columns = scores.new_tensor([weights.get(name, 0.0) for name in judge.dimensions])
                gradient = backward((scores @ columns).sum(), source)
        except RuntimeError as error:
            if ran_out(error):
                raise
            raise PrismError(_not_differentiable(backbone, reason(error, 160))) from error
        except PrismError as error:
            cause = error.__cause__
            if isinstance(cause, RuntimeError) and not ran_out(cause) and "backward" in str(cause):
                raise PrismError(_not_differentiable(backbone, reason(cause, 160))) from cause
            raise
    return scores.detach(), gradient.detach()


def _not_differentiable(backbone: Backbone, cause: str) -> str:
    return (
        f"No gradient comes through the denoiser {type(backbone.denoiser).__name__} of {type(backbone.pipe).__name__} "
        f"({quoted(cause, 160)}), so that a judge cannot guide its latents; leave guidance_by_judge out."
    )


@contextmanager
def blocks_checkpointed(backbone: Backbone, count: int) -> Iterator[None]:
    """While open, the denoiser's first `count` blocks keep their inputs alone for a backward pass."""

    def wrapper(inner: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    with ExitStack() as stack:
        for block in backbone.blocks[:count]:
            stack.enter_context(around_module(block, wrapper, reads=True))
        yield
