"""The one-pass reading of tokens against softmax attention over torch's own layer norm, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prism.judge import pooling

ROWS, WIDTH = 5, 24


def given(dtype: torch.dtype, length: int = 7, offset: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, tokens of the video and of the prompt, and a mask that leaves the second prompt nothing."""
    generator = torch.Generator().manual_seed(0)
    queries, visual, text = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((ROWS, WIDTH), (2, length, WIDTH), (2, 4, WIDTH))
    )
    return queries, visual + offset, text + offset, torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()


def oracle(queries: Tensor, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    tokens = F.layer_norm(torch.cat([visual, text], 1).double(), (WIDTH,))
    real = torch.cat([mask.new_ones(visual.shape[:2]), mask], 1)
    logits = queries.double() @ tokens.transpose(1, 2)
    return logits.masked_fill(~real[:, None], -torch.inf).softmax(-1) @ tokens


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradients_of_queries_and_tokens_are_those_of_the_oracle(chunk_size):
    queries, visual, text, mask = given(torch.float64)
    inputs = [value.requires_grad_() for value in (queries, visual, text)]
    ours, expected = pooling.read(*inputs, mask, chunk_size), oracle(*inputs, mask)
    torch.testing.assert_close(ours, expected)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, pull, retain_graph=True), torch.autograd.grad(expected, inputs, pull)
    )
    alone = torch.autograd.grad(ours, inputs[1:2], pull)[0]  # the tokens' gradient does not need the queries'
    assert alone.shape == visual.shape


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 3e-6), (30.0, 3e-5)])
def test_a_mean_far_from_zero_and_many_chunks_cost_float_rounding_alone(offset, tolerance):
    queries, visual, text, mask = given(torch.float32, length=5000, offset=offset)
    expected = oracle(queries, visual, text, mask)
    for chunk_size in (None, 16, 5000):
        found = pooling.read(queries, visual, text, mask, chunk_size)
        assert (found - expected).abs().max() < tolerance


def test_tokens_without_any_spread_read_as_nothing():
    visual = torch.full((1, 3, WIDTH), 8.0)
    assert pooling.read(torch.ones(1, WIDTH), visual, None, None).abs().max() < 1e-3


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_what_is_kept_for_the_gradient_is_no_float32_copy_of_the_tokens(chunk_size):
    queries, visual, *_ = given(torch.float32, length=5000)
    visual, kept = visual.bfloat16(), []
    queries.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        pooling.read(queries, visual, None, None, chunk_size)
    beside = [value for value in kept if value.data_ptr() != visual.data_ptr()]
    assert len(beside) < len(kept)
    assert sum(value.nbytes for value in beside) < visual.nbytes  # a weight a row and one number, in place of 24


def test_chunks_are_bounded_by_memory_and_cover_every_token():
    visual = torch.zeros(2, 1000, 1536)
    pieces = [piece for piece, _ in pooling._chunks(visual, visual[:, :7], None, None)]
    assert len(pieces) > 2
    assert max(piece.nbytes for piece in pieces) <= pooling.CPU_BYTES
    assert sum(piece.shape[1] for piece in pieces) == 1007


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_the_same_with_the_same_gradients():
    queries, visual, text, mask = (value.cuda() for value in given(torch.float32, length=5000))
    inputs = [value.requires_grad_() for value in (queries, visual, text)]
    ours, expected = pooling.read(*inputs, mask), oracle(*inputs, mask)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    found, wanted = (torch.autograd.grad(value.square().sum(), inputs) for value in (ours, expected))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
