"""Heads of related judges, which read the same frozen backbone: those of PAVRM, DiNa-LRM, LRM and latent reward
registers, and one that learns its own variance.

Each follows its work as far as a frozen backbone and the pairs at hand allow; what differs is said in each docstring.
Sizes follow `dim`, so that all are compared at about the size of `prism.judge.QueryHead`. `Rival.forward` gives
utilities and, where the work has one, their log-variances; `Rival.loss` is the work's own objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism.backbone import Tokens
from prism.errors import PrismError
from prism.judge import QueryHead

FLOOR = 0.05
"""Variance that noise leaves in a Thurstone comparison at sigma 0: DiNa-LRM's."""


class Rival(nn.Module):
    """A head that reads tokens after some blocks of a backbone at a noise level.

    Args:
        width: D_vis of the tokens. dim: D. dimensions: number of scores. taps: the blocks that it reads.
    """

    title = ""

    def __init__(self, width: int, dim: int, dimensions: int, taps: Sequence[int]) -> None:
        super().__init__()
        self.width, self.dim, self.dimensions, self.taps = width, dim, dimensions, tuple(taps)

    def forward(self, tokens: Tokens, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """Utilities (B, dimensions) and their log-variances, (B, dimensions) or None. sigma: (B,) in [0, 1]."""
        raise NotImplementedError

    def loss(self, first: Tensor, second: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over decided labels: Bradley-Terry. Ties are left out, as these works know none.

        first, second: (pairs, dimensions) utilities of A and B. variance: (pairs, dimensions) of their difference.
        labels: (pairs, dimensions) 1, -1, 0 or NaN.
        """
        decided = labels.abs() == 1
        losses = -F.logsigmoid(torch.where(decided, labels, 0) * (first - second))
        return losses[decided].mean() if bool(decided.any()) else (first * 0).sum()

    def variance(self, sigma: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        """(pairs, dimensions) variance of a difference. sigma: (pairs,). first, second: log-variances of A and B."""
        return torch.ones(len(sigma), self.dimensions, device=sigma.device)


class _Query(nn.Module):
    """Queries that attend over tokens by stock multi-head attention; what several read stays apart."""

    def __init__(self, width: int, count: int, heads: int = 8) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, count, width))
        nn.init.normal_(self.queries, std=0.02) if count > 1 else nn.init.xavier_normal_(self.queries)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, count, width). mask: (B, L) bool, True at real tokens."""
        queries = self.queries.expand(len(tokens), -1, -1)
        hidden = None if mask is None else ~mask
        read: Tensor = self.attention(queries, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0]
        return queries + read


class PAVRMHead(Rival):
    """PRFL's PAVRM (arXiv 2511.21541): one query over the video's tokens alone, added to what it read, and an MLP of
    three layers with ReLU. There the blocks are tuned with it; here they are frozen."""

    title = "PAVRM’s head"

    def __init__(self, width: int, dim: int, dimensions: int, taps: Sequence[int]) -> None:
        super().__init__(width, dim, dimensions, taps[-1:])
        self.read = _Query(width, 1)
        self.mlp = nn.Sequential(
            nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dimensions)
        )

    def forward(self, tokens: Tokens, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.mlp(self.read(tokens.after(self.taps[0]).float())[:, 0]), None


class DiNaHead(Rival):
    """DiNa-LRM (arXiv 2602.11146): three taps, each scaled and shifted by the noise level (FiLM), reduced and joined
    on the channel axis; four queries read video and text by keys of their own, then the video again; Thurstone's
    fidelity loss with a variance that grows with the noise. There the backbone has a LoRA; here it is frozen."""

    title = "DiNa-LRM’s head"

    def __init__(self, width: int, dim: int, dimensions: int, taps: Sequence[int]) -> None:
        super().__init__(width, dim, dimensions, taps)
        self.films = nn.ModuleList()
        for _ in self.taps:
            last = nn.Linear(width, 2 * width)  # at first the noise level changes nothing
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.films.append(nn.Sequential(nn.Linear(64, width), nn.SiLU(), last))
        self.layers = nn.Parameter(torch.zeros(len(self.taps), width))
        self.reduce = nn.ModuleList(nn.Linear(width, width // 4) for _ in self.taps)
        self.join = nn.Linear(len(self.taps) * (width // 4), width)
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.first, self.of_text, self.second = _Query(width, 4), _Query(width, 4), _Query(width, 4)
        self.norm = nn.RMSNorm(width)
        wide = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.feed = nn.Sequential(nn.RMSNorm(width), *wide)
        self.score = nn.Linear(width, dimensions)

    def forward(self, tokens: Tokens, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        clock = _sinusoid(sigma, 64)
        parts = []
        for tap, film, layer, reduce in zip(self.taps, self.films, self.layers, self.reduce):
            scale, shift = film(clock)[:, None].chunk(2, -1)
            parts.append(reduce(F.layer_norm(tokens.after(tap).float(), (self.width,)) * (1 + scale) + shift + layer))
        visual = self.norm(self.join(torch.cat(parts, -1)))
        read = self.first(visual * self.gate(visual).sigmoid())
        if tokens.text is not None:
            read = read + self.of_text(self.norm(tokens.text.float()), tokens.text_mask)
        read = read + self.second(visual)
        read = read + self.feed(read)
        return self.score(read).mean(1), None

    def variance(self, sigma: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        return 2 * (2 * sigma**2 + FLOOR)[:, None].expand(-1, self.dimensions)

    def loss(self, first: Tensor, second: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        return _fidelity(first, second, variance, labels)


class LRMHead(Rival):
    """LRM (arXiv 2502.01051): the mean tokens of several blocks, joined, against the mean text token, by a scaled
    cosine; cross-entropy over the two with half a label each for ties. There a U-Net and text encoders are tuned, and
    guidance is applied to the features; here all is frozen, and without guidance."""

    title = "LRM’s head"

    def __init__(self, width: int, dim: int, dimensions: int, taps: Sequence[int]) -> None:
        super().__init__(width, dim, dimensions, taps)
        self.visual = nn.Linear(len(self.taps) * width, dimensions * dim, bias=False)
        self.text = nn.Linear(width, dimensions * dim, bias=False)
        self.scale = nn.Parameter(torch.full((dimensions,), 2.6592))

    def forward(self, tokens: Tokens, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        pooled = torch.cat([F.layer_norm(tokens.after(t).float(), (self.width,)).mean(1) for t in self.taps], -1)
        if tokens.text is None:
            raise PrismError("LRM's head compares videos with text tokens, and this backbone has none.")
        real = torch.ones(tokens.text.shape[:2], device=pooled.device) if tokens.text_mask is None else tokens.text_mask
        weights = real.float()[..., None]
        text = (F.layer_norm(tokens.text.float(), (self.width,)) * weights).sum(1) / weights.sum(1).clamp(min=1)
        shape = (len(pooled), self.dimensions, self.dim)
        cosine = F.cosine_similarity(self.visual(pooled).view(shape), self.text(text).view(shape), dim=-1)
        return self.scale.exp() * cosine, None

    def loss(self, first: Tensor, second: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        labelled = ~labels.isnan()
        share = torch.where(labelled, (labels + 1) / 2, 0.5)
        margin = first - second
        losses = -(share * F.logsigmoid(margin) + (1 - share) * F.logsigmoid(-margin))
        return losses[labelled].mean() if bool(labelled.any()) else (margin * 0).sum()


class SUREHead(Rival):
    """SURE (arXiv 2608.06125): a mean and a variance per video, which say how likely one beats the other (a Gaussian
    utility). Read by PRISM's own query; the variance decides nothing but the loss."""

    title = "learned variance (SURE)"

    def __init__(self, width: int, dim: int, dimensions: int, taps: Sequence[int]) -> None:
        super().__init__(width, dim, dimensions, taps[-1:])
        self.head = QueryHead(width, dim, 2 * dimensions)

    def forward(self, tokens: Tokens, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, spread = self.head(tokens.after(self.taps[0]), tokens.text, tokens.text_mask).chunk(2, -1)
        return mean, spread.clamp(-6, 6)

    def variance(self, sigma: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        assert first is not None
        assert second is not None
        return first.exp() + second.exp()

    def loss(self, first: Tensor, second: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        decided = labels.abs() == 1
        z = torch.where(decided, labels, 0) * (first - second) / variance.sqrt()
        losses = -torch.special.log_ndtr(z)
        return losses[decided].mean() if bool(decided.any()) else (first * 0).sum()


class RegisterHead(Rival):
    """Latent reward registers (arXiv 2608.03929): learned tokens that go through the frozen blocks beside the video's,
    without a place, and are read after a sixth, a third and half of the blocks; Thurstone's comparison with a variance
    that grows with the noise. There teachers' scores are distilled; here it learns from the pairs."""

    title = "latent reward registers"
    COUNT = 8

    def __init__(self, width: int, dim: int, dimensions: int, taps: Sequence[int]) -> None:
        super().__init__(width, dim, dimensions, taps)
        self.registers = nn.Parameter(0.02 * torch.randn(self.COUNT, width))
        joined, middle = nn.Linear(len(self.taps) * width, dim), nn.Linear(dim, dim)
        self.read = nn.Sequential(joined, nn.GELU(), middle, nn.GELU(), nn.Linear(dim, dimensions))
        self.seen: dict[int, Tensor] = {}

    def forward(self, tokens: Tokens, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        after = [F.layer_norm(self.seen[tap].float(), (self.width,)).mean(1) for tap in self.taps]
        return self.read(torch.cat(after, -1)), None

    def variance(self, sigma: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        return 2 * (2 * sigma**2 + FLOOR)[:, None].expand(-1, self.dimensions)

    def loss(self, first: Tensor, second: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        return _fidelity(first, second, variance, labels)

    @contextmanager
    def inside(self, backbone: Any) -> Iterator[None]:
        """Let the registers go through Wan's blocks in the block; what they have become lies in `seen` by tap.

        Raises PrismError for another family, whose blocks take other arguments.
        """
        if backbone.family.name != "wan":
            raise PrismError(f"Registers go through Wan's blocks alone, found the family {backbone.family.name}.")
        last, handles = max(self.taps), []

        def enter(number: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                hidden, *rest = args
                if number == 1:
                    hidden = torch.cat([hidden, self.registers.to(hidden).expand(len(hidden), -1, -1)], 1)
                rest[-1] = _unturned(rest[-1], self.COUNT)
                return (hidden, *rest), kwargs

            return hook

        def leave(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
                if number in self.taps:
                    self.seen[number] = output[:, -self.COUNT :]
                return output[:, : -self.COUNT] if number == last else None

            return hook

        try:
            for number, block in enumerate(backbone.blocks[:last], 1):
                handles.append(block.register_forward_pre_hook(enter(number), with_kwargs=True))
                handles.append(block.register_forward_hook(leave(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _unturned(rotary: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Wan's rotation of each token (1, L, 1, d), with none for `count` further tokens."""
    cosine, sine = rotary
    more = (*cosine.shape[:1], count, *cosine.shape[2:])
    return torch.cat([cosine, cosine.new_ones(more)], 1), torch.cat([sine, sine.new_zeros(more)], 1)


def _fidelity(first: Tensor, second: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
    """1 - sqrt(p), p = Phi((r_chosen - r_rejected) / sqrt(variance)), over decided labels (DiNa-LRM's loss)."""
    decided = labels.abs() == 1
    z = torch.where(decided, labels, 0) * (first - second) / (variance + 1e-6).sqrt()
    losses = 1 - (torch.special.ndtr(z) + 1e-6).sqrt()
    return losses[decided].mean() if bool(decided.any()) else (first * 0).sum()


def _sinusoid(sigma: Tensor, width: int) -> Tensor:
    """(B, width) sines and cosines of a noise level."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=sigma.device) / (width // 2))
    angles = 1000 * sigma.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


RIVALS: dict[str, type[Rival]] = {
    "pavrm": PAVRMHead,
    "dina": DiNaHead,
    "lrm": LRMHead,
    "sure": SUREHead,
    "registers": RegisterHead,
}
