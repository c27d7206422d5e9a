"""The query head: one learnable query reads the tokens, an MLP turns what it read into one score per dimension.

Paper section 3.2. The tokens of the video and of the prompt, F_uni = [F_vis, F_txt], share one linear W_p to width D;
a learnable query attends over them (Eq. 2), and a 5-layer MLP gives the scores. The paper leaves norms, the number of
attention heads and the MLP's widths open: here tokens are normalised (without weights) before W_p, what the query read
is normalised before the MLP, and the MLP is D wide throughout.

With few queries the projections fold into the query. Per attention head h,

    logits = F W_p^T W_k,h^T q_h / sqrt(d)      needs only the vector a_h = W_p^T W_k,h^T q_h / sqrt(d) of size D_vis,
    read_h = W_v,h (W_p (sum_i w_i F_i) + b_p)  applies W_p and W_v to one weighted sum, as the weights sum to one,

so that the cost is that of reading the tokens (``prism.judge.pooling``), and no (B, L, D) tensor exists. A bias on
keys, or in W_p as seen by the keys, adds the same number to all logits and cancels in the softmax.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prism.errors import PrismError, choice, quoted, whole
from prism.judge import pooling

AGGREGATIONS = ("query", "mean", "linear")
LARGEST = {"width": 2**20, "dim": 2**20, "num_dimensions": 1000, "num_queries": 2**16, "num_heads": 2**16}
LARGEST |= {"mlp_layers": 256}  # limits far above any use, so that a damaged config.json is refused


class QueryHead(nn.Module):
    """Scores of noisy videos from a backbone's tokens.

    Args:
        width: D_vis, the width of the backbone's tokens.
        dim: D, the width of the projection, the attention and the MLP. The paper's is 1536.
        num_dimensions: number of scores (VQ, MQ, TA, overall: 4).
        num_queries: N_q of the paper; what several queries read is averaged.
        num_heads: attention heads; must divide ``dim``.
        mlp_layers: linear layers of the MLP, the last one included. The paper's is 5.
        aggregation: ``"query"`` (the paper's), or an ablation: ``"mean"`` (the mean token instead of the query) or
            ``"linear"`` (a linear probe on the mean token).
        chunk_size: tokens that are read at a time, which bounds the float32 memory of long videos; None: as many as
            suit the device.

    Raises:
        PrismError: on an aggregation that does not exist, or heads that do not divide ``dim``.
    """

    def __init__(
        self,
        width: int,
        dim: int = 1536,
        num_dimensions: int = 4,
        num_queries: int = 1,
        num_heads: int = 8,
        mlp_layers: int = 5,
        aggregation: str = "query",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        choice("The aggregation", aggregation, AGGREGATIONS)
        sizes = {"width": width, "dim": dim, "num_dimensions": num_dimensions, "num_queries": num_queries}
        sizes |= {"num_heads": num_heads, "mlp_layers": mlp_layers}
        sizes |= {} if chunk_size is None else {"chunk_size": chunk_size}
        for name, value in sizes.items():
            sizes[name] = whole(f"The head's {name}", value, 1, LARGEST.get(name))
        width, dim, num_dimensions, num_queries, num_heads, mlp_layers = list(sizes.values())[:6]
        chunk_size = sizes.get("chunk_size")
        if dim % num_heads:
            raise PrismError(f"The head's num_heads must divide its dim, found {num_heads} heads for dim {dim}.")
        self.width, self.dim, self.num_dimensions = width, dim, num_dimensions
        self.num_queries, self.num_heads, self.mlp_layers = num_queries, num_heads, mlp_layers
        self.aggregation, self.chunk_size = aggregation, chunk_size
        if aggregation == "linear":
            self.probe = nn.Linear(width, num_dimensions, bias=False)
            return
        self.w_p = nn.Linear(width, dim)
        if aggregation == "query":
            # Unit scale, so that the heads look at different tokens from the start.
            self.query = nn.Parameter(torch.randn(num_queries, dim))
            self.w_q = nn.Linear(dim, dim, bias=False)
            self.w_k = nn.Linear(dim, dim, bias=False)
            self.w_v = nn.Linear(dim, dim)
            self.w_o = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        layers: list[nn.Module] = []
        for _ in range(mlp_layers - 1):
            layers += [nn.Linear(dim, dim), nn.GELU()]
        # No last bias: only differences of scores are trained, so it would drift.
        self.mlp = nn.Sequential(*layers, nn.Linear(dim, num_dimensions, bias=False))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, visual: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Scores of a batch.

        Args:
            visual: (B, L, width) tokens of the video after the tapped block, any float dtype.
            text: (B, L_t, width) tokens of the prompt, or None.
            text_mask: (B, L_t) bool, True at real tokens; None when all are real.

        Returns:
            (B, num_dimensions), in the dtype of the weights.
        """
        # The head is small: reduced precision would save nothing and cost rank changes between near-equal candidates.
        with torch.autocast(visual.device.type, enabled=False):
            return self.of_read(pooling.read(self.queries(), visual, text, text_mask, self.chunk_size))

    def queries(self) -> Tensor:
        """The rows with which ``prism.judge.pooling.read`` reads the tokens: one per query and attention head.

        The ablations have a single row of zeros, which attends to all tokens equally.

        Returns:
            (R, width), in the dtype of the weights.
        """
        return self._folded() if self.aggregation == "query" else torch.zeros(1, self.width, device=self.device)

    def of_read(self, sums: Tensor) -> Tensor:
        """Scores from what the ``queries`` read.

        Args:
            sums: (B, R, width).

        Returns:
            (B, num_dimensions), in the dtype of the weights.
        """
        if self.aggregation == "linear":
            scores: Tensor = self.probe(sums[:, 0])
        else:
            scores = self.mlp(self.norm(self._pooled(sums) if self.aggregation == "query" else self.w_p(sums[:, 0])))
        return scores

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    def _pooled(self, sums: Tensor) -> Tensor:
        """F_agg of Eq. 2, (B, dim), from what the folded queries read; several queries are averaged."""
        heads, size = self.num_heads, self.dim // self.num_heads
        projected = self.w_p(sums).view(len(sums), self.num_queries, heads, self.dim)
        values = torch.einsum("bnhe,hde->bnhd", projected, self.w_v.weight.view(heads, size, self.dim))
        values = values.flatten(2) + self.w_v.bias
        pooled: Tensor = self.w_o(values)
        return pooled.mean(1)

    @torch.no_grad()
    def attention(self, visual: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Attention of each query and head over all tokens.

        Arguments as of ``forward``.

        Returns:
            (B, num_queries * num_heads, L + L_t) float32 weights that sum to one; without text L_t is 0.

        Raises:
            PrismError: for the ablations, which have no query.
        """
        if self.aggregation != "query":
            raise PrismError(f"A head with the aggregation {self.aggregation} has no query, and looks at all alike.")
        with torch.autocast(visual.device.type, enabled=False):
            return pooling.weights(self._folded(), visual, text, text_mask, self.chunk_size)

    def _folded(self) -> Tensor:
        """a_h of each query and head, (N_q * heads, D_vis)."""
        heads, size = self.num_heads, self.dim // self.num_heads
        query: Tensor = self.w_q(self.query).view(self.num_queries, heads, size)
        keys = torch.einsum("nhd,hde->nhe", query, self.w_k.weight.view(heads, size, self.dim))  # W_k,h^T q_h
        folded: Tensor = (keys @ self.w_p.weight).flatten(0, 1) / size**0.5
        return folded

    def load_tensors(self, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
        """Load exactly this head's weights, as float32; ``path`` is the file they came from, for errors."""
        self.check_shapes({name: tuple(value.shape) for name, value in tensors.items()}, path)
        # Copies, which torch aligns: sums over the unaligned memory of a mapped file are rounded differently.
        weights = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
        self.load_state_dict(weights, assign=True)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike[str]) -> None:
        """Refuse tensors that are not exactly this head's; ``path`` is the file they lie in."""
        expected = self.state_dict()
        for name in sorted(shapes.keys() ^ expected.keys()):
            side = "lacks" if name in expected else "has, beyond this head's,"
            raise PrismError(f"The file {path} {side} the tensor {quoted(name, 80)}; it belongs to another head.")
        for name, value in expected.items():
            if shapes[name] != tuple(value.shape):
                sizes = f"{quoted(shapes[name], 80)} where this head's is {tuple(value.shape)}"
                raise PrismError(f"The tensor {name} in {path} is {sizes}; it belongs to another head.")


@dataclass(frozen=True, eq=False)
class Member:
    """A head, the block whose output it reads (1-based), and its share in the judge's scores."""

    tap: int
    head: QueryHead
    share: float = 1.0


def scores_of(members: Sequence[Member], tokens: Any) -> Tensor:
    """Scores of each member's head, which is moved to where the tokens are.

    Heads after one block read its tokens together, in the pass that one head alone would take. A head that is alone
    there is called as a module, hooks and all.

    Args:
        tokens: `prism.backbone.Tokens`, tapped after the members' blocks.

    Returns:
        (members, B, num_dimensions), in the dtype of the weights.
    """
    readers: dict[Any, list[int]] = {}
    for number, member in enumerate(members):
        member.head.to(tokens.visual.device)
        readers.setdefault((member.tap, member.head.chunk_size), []).append(number)
    scores: list[Tensor] = [tokens.visual] * len(members)
    with torch.autocast(tokens.visual.device.type, enabled=False):
        for (tap, chunk_size), numbers in readers.items():
            if len(numbers) == 1:
                scores[numbers[0]] = members[numbers[0]].head(tokens.after(tap), tokens.text, tokens.text_mask)
                continue
            queries = [members[number].head.queries() for number in numbers]
            sums = pooling.read(torch.cat(queries), tokens.after(tap), tokens.text, tokens.text_mask, chunk_size)
            for number, part in zip(numbers, sums.split([len(rows) for rows in queries], 1)):
                scores[number] = members[number].head.of_read(part)
    return torch.stack(scores)


OPTIONS = tuple(inspect.signature(QueryHead).parameters)


def check_fits(head: QueryHead, backbone: Any, tap: int, dimensions: Sequence[str]) -> None:
    """Raise PrismError where a head cannot read this backbone after block `tap`, or gives other dimensions."""
    if not 1 <= tap <= backbone.num_blocks:
        raise PrismError(f"The tap must be a block from 1 to {backbone.num_blocks} of this backbone, found {tap}.")
    width = backbone.widths[tap - 1]
    if head.width != width:
        raise PrismError(
            f"The head reads tokens of width {head.width}, this backbone's are {width} wide after block {tap}."
        )
    if head.num_dimensions != len(dimensions) or len(set(dimensions)) != len(dimensions):
        raise PrismError(
            f"The head gives {head.num_dimensions} scores, which does not fit the dimensions {', '.join(dimensions)}."
        )
