"""Softmax reading of normalised tokens in one pass, and its gradient: no float32 copy of all tokens ever exists.

A token x with the mean m and the reciprocal deviation r is normalised to r (x - m). Centring is linear, so it is done
once on the queries and once on the result; of the norm only one number per token, r, remains. For a centred query a,
and for the gradient g of its result:

    logits = r (a . x)       weights p = softmax(logits)       read = sum_i p_i r_i x_i
    dp     = r (g . x)       ds = p (dp - g . read)            da   = sum_i ds_i r_i x_i

so that the forward and the backward pass each convert a chunk of tokens to float32 once and multiply it with two thin
matrices. The float32 copy of a chunk fills a part of a core's cache on a CPU; it is larger on an accelerator, where
each kernel launch costs time. All copies use the same memory: allocating would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5  # of the norm, torch's default
CPU_BYTES = 2**22
ACCELERATOR_BYTES = 2**28


def read(
    queries: Tensor, visual: Tensor, text: Tensor | None, mask: Tensor | None, chunk_size: int | None = None
) -> Tensor:
    """Softmax-weighted sums of normalised tokens of video and prompt.

    Args:
        queries: (rows, D_vis), float32 or float64; a row of zeros reads the mean token.
        visual: (B, L, D_vis), any float dtype.
        text: (B, L_t, D_vis), or None.
        mask: (B, L_t) bool, True at real tokens; None when all are real.
        chunk_size: tokens read at a time; None: as many as memory suggests.

    Returns:
        (B, rows, D_vis) in the queries' dtype.
    """
    return _centred(_Read.apply(_centred(queries), visual, text, mask, chunk_size))  # type: ignore[no-untyped-call]


def weights(
    queries: Tensor, visual: Tensor, text: Tensor | None, mask: Tensor | None, chunk_size: int | None = None
) -> Tensor:
    """The weights by which ``read`` sums, not for gradients.

    Arguments as of ``read``.

    Returns:
        (B, rows, L + L_t), which sum to one.
    """
    extended, widen = _with_mean(_centred(queries)), _Widen(queries.dtype)
    chunks = _chunks(visual, text, mask, chunk_size)
    return torch.cat([_logits(extended, widen(tokens), real)[0] for tokens, real in chunks], -1).softmax(-1)


class _Read(torch.autograd.Function):
    """sum_i p_i r_i x_i, (B, rows, D_vis), for centred queries."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, visual: Tensor, text: Any, mask: Any, chunk_size: int | None) -> Tensor:
        extended, shape = _with_mean(queries), (len(visual), *queries.shape)
        peak, sums = queries.new_full((*shape[:2], 1), -torch.inf), _accumulator(queries, shape)
        seen, widen = [], _Widen(queries.dtype)
        for tokens, real in _chunks(visual, text, mask, chunk_size):
            tokens = widen(tokens)
            logits, scale = _logits(extended, tokens, real)
            seen.append((logits, scale))
            before, peak = peak, torch.maximum(peak, logits.amax(-1, keepdim=True))  # keeps exp in range
            sums.mul_((before - peak).exp_()).add_((logits - peak).exp_().mul_(scale) @ tokens)
        logits, scales = (torch.cat(parts, -1) for parts in zip(*seen))
        weights = (logits - peak).exp_()
        total = weights.sum(-1, keepdim=True)
        result = sums.div_(total).to(queries.dtype)
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(queries, visual, text, mask, weights.div_(total), scales, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, visual, text, mask, all_weights, scales, result = ctx.saved_tensors
        to_visual = torch.empty_like(visual) if any(ctx.needs_input_grad[1:3]) else None
        to_text = None if text is None or to_visual is None else torch.empty_like(text)
        targets: Any = repeat((None, None)) if to_visual is None else _chunks(to_visual, to_text, None, ctx.chunk_size)
        offset, start, to_queries = (grad * result).sum(-1, keepdim=True), 0, _accumulator(queries, result.shape)
        widen = _Widen(queries.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            for (tokens, _), (target, _) in zip(_chunks(visual, text, mask, ctx.chunk_size), targets):
                tokens, stop = widen(tokens), start + tokens.shape[1]
                weights, scale = all_weights[..., start:stop], scales[..., start:stop]
                slopes = (grad @ tokens.transpose(1, 2)).mul_(scale).sub_(offset).mul_(weights)  # ds
                if target is not None:
                    target.copy_(_to_tokens(tokens, scale, weights, grad, slopes, queries))
                to_queries.add_(slopes.mul_(scale) @ tokens)
                start = stop
        return to_queries.sum(0).to(queries.dtype), to_visual, to_text, None, None


def _chunks(
    visual: Tensor, text: Tensor | None, mask: Tensor | None, size: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield F_uni in chunks (B, chunk, D_vis), each with its mask: the concatenation of Eq. 2 is never built."""
    if size is None:
        scratch = CPU_BYTES if visual.device.type == "cpu" else ACCELERATOR_BYTES
        size = max(1, scratch // (4 * len(visual) * visual.shape[2]))
    for start in range(0, visual.shape[1], size):
        yield visual[:, start : start + size], None
    for start in range(0, 0 if text is None else text.shape[1], size):
        stop = start + size
        yield text[:, start:stop], None if mask is None else mask[:, start:stop].bool()  # type: ignore[index]


class _Widen:
    """Conversion of one chunk of tokens at a time to another dtype, always into the same memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.scratch = dtype, torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        if tokens.dtype == self.dtype:
            return tokens
        if self.scratch.numel() < tokens.numel():
            self.scratch = torch.empty(tokens.numel(), dtype=self.dtype, device=tokens.device)
        return self.scratch[: tokens.numel()].view(tokens.shape).copy_(tokens)


def _logits(extended: Tensor, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits (B, rows, chunk) of a chunk of tokens, and their r (B, 1, chunk)."""
    products = extended @ tokens.transpose(1, 2)
    logits, mean = products[:, :-1], products[:, -1:]
    logits.mul_(scale := (_variance(tokens, mean) + EPS).rsqrt_())
    return logits if real is None else logits.masked_fill(~real[:, None], -torch.inf), scale


def _variance(tokens: Tensor, mean: Tensor) -> Tensor:
    """Variance of each token over its channels, (B, 1, chunk). `torch.var` would take most of the time on a CPU."""
    if tokens.device.type != "cpu":
        return tokens.var(-1, correction=0)[:, None]
    square = mean.square()
    variance: Tensor = torch.linalg.vector_norm(tokens, dim=-1)[:, None].square_().div_(tokens.shape[2]).sub_(square)
    if bool((variance < 0.1 * square).any()):  # too few digits are left of a difference of large numbers
        variance = torch.linalg.vector_norm(tokens - mean.transpose(1, 2), dim=-1)[:, None]
        variance = variance.square_().div_(tokens.shape[2])
    return variance


def _to_tokens(tokens: Tensor, scale: Tensor, weights: Tensor, grad: Tensor, slopes: Tensor, queries: Tensor) -> Tensor:
    """The gradient (B, chunk, D_vis) of a chunk's tokens, through r x and through r."""
    outer = weights.transpose(1, 2) @ grad + slopes.transpose(1, 2) @ queries  # the gradient of r x
    scale = scale.transpose(1, 2)
    along = (outer * tokens).mean(-1, keepdim=True) * scale.square()
    return scale * (outer - along * _centred(tokens))


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def _with_mean(queries: Tensor) -> Tensor:
    """The queries and one more row, so that the product that gives a token's logits gives its mean as well."""
    return torch.cat([queries, torch.full_like(queries[:1], 1 / queries.shape[1])])


def _accumulator(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros to add up chunks in; float64 on a CPU, where chunks are many and it costs nothing."""
    return like.new_zeros(shape, dtype=torch.float64 if like.device.type == "cpu" else like.dtype)
