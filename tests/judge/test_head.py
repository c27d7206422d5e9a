"""The query head against Eq. 2 written out, unfolded, with torch's own multi-head attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism.errors import PrismError
from prism.judge.head import QueryHead

WIDTH, DIM, HEADS = 24, 32, 4


def head(**options) -> QueryHead:
    torch.manual_seed(0)
    return QueryHead(WIDTH, DIM, num_heads=HEADS, **options)


def tokens(batch: int = 3, visual: int = 17, text: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(text) < torch.tensor([6, 2, 0, 4, 1])[:batch, None]
    offset = torch.linspace(-3, 3, WIDTH)  # as real tokens have: a mean and a few large channels
    return (
        2 * torch.randn(batch, visual, WIDTH, generator=generator) + offset,
        torch.randn(batch, text, WIDTH, generator=generator),
        mask,
    )


def unfolded(model: QueryHead, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Eq. 2 as printed, then norm and MLP."""
    return model.mlp(model.norm(attend(model, visual, text, mask)[0].mean(1)))


def attend(model: QueryHead, visual: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2: F_uni = [F_vis, F_txt], one linear to D, CrossAttn; its output and weights (B, heads, N_q, L + L_t)."""
    unified = F.layer_norm(torch.cat([visual, text], 1), (WIDTH,))
    projected = unified @ model.w_p.weight.T + model.w_p.bias
    attention = nn.MultiheadAttention(model.dim, model.num_heads, batch_first=True)
    in_weights = torch.cat([model.w_q.weight, model.w_k.weight, model.w_v.weight])
    in_biases = torch.cat([torch.zeros(2 * model.dim), model.w_v.bias])
    real = torch.cat([torch.ones(visual.shape[:2], dtype=torch.bool), mask], 1)
    return torch.func.functional_call(
        attention,
        {
            "in_proj_weight": in_weights,
            "in_proj_bias": in_biases,
            "out_proj.weight": model.w_o.weight,
            "out_proj.bias": model.w_o.bias,
        },
        (model.query.expand(len(visual), -1, -1), projected, projected),
        {"key_padding_mask": ~real, "need_weights": True, "average_attn_weights": False},
    )


def gradients(model: QueryHead, scores: Tensor) -> dict[str, Tensor]:
    weights = torch.arange(1, scores.numel() + 1).view_as(scores)
    names, values = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((scores * weights).sum(), values)))


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("chunk_size", [4096, 17, 5])
def test_folded_equals_unfolded_with_gradients(num_queries, chunk_size):
    model = head(num_queries=num_queries, chunk_size=chunk_size)
    visual, text, mask = tokens()
    folded, expected = model(visual, text, mask), unfolded(model, visual, text, mask)
    assert folded.shape == (3, 4)
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=1e-5)
    ours, oracle = gradients(model, folded), gradients(model, expected)
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name in ours:
        scale = oracle[name].abs().max().clamp(min=1)
        torch.testing.assert_close(ours[name] / scale, oracle[name] / scale, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("chunk_size", [4096, 5])
def test_attention_is_the_weights_of_eq_2(chunk_size):
    model = head(num_queries=2, chunk_size=chunk_size)
    visual, text, mask = tokens()
    weights = model.attention(visual, text, mask)
    expected = attend(model, visual, text, mask)[1].transpose(1, 2).flatten(1, 2)  # query by query, its heads
    assert weights.shape == (3, 2 * HEADS, 17 + 6)
    torch.testing.assert_close(weights, expected.detach(), atol=1e-6, rtol=1e-5)
    assert bool((weights[..., 17:][~mask[:, None].expand(-1, 2 * HEADS, -1)] == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2 * HEADS))
    assert model.attention(visual).shape == (3, 2 * HEADS, 17)
    with pytest.raises(PrismError, match="has no query"):
        head(aggregation="mean").attention(visual)


@pytest.mark.parametrize("aggregation", ["query", "mean", "linear"])
def test_masked_text_is_not_read_and_no_text_means_none(aggregation):
    model = head(aggregation=aggregation)
    visual, text, mask = tokens()
    scores = model(visual, text, mask)
    torch.testing.assert_close(model(visual, torch.where(mask[..., None], text, 1e4), mask), scores)
    torch.testing.assert_close(model(visual[2:]), scores[2:])  # the third prompt has no real token
    assert not torch.allclose(model(visual[:1]), scores[:1])


def test_mean_pools_all_tokens_and_linear_is_a_probe():
    visual, text, mask = tokens()
    rows = [
        F.layer_norm(torch.cat([v, t[m]]), (WIDTH,)).mean(0) for v, t, m in zip(visual, text, mask)
    ]  # the mean over real tokens, one row at a time
    mean = torch.stack(rows)
    probe, pooled = head(aggregation="linear", chunk_size=5), head(aggregation="mean", chunk_size=5)
    torch.testing.assert_close(probe(visual, text, mask), probe.probe(mean))
    torch.testing.assert_close(pooled(visual, text, mask), pooled.mlp(pooled.norm(pooled.w_p(mean))))
    assert sum(p.numel() for p in probe.parameters()) == WIDTH * 4


def test_order_of_tokens_does_not_matter_and_rows_are_independent():
    model = head()
    visual, text, mask = tokens()
    scores = model(visual, text, mask)
    torch.testing.assert_close(model(visual.flip(1), text, mask), scores)
    torch.testing.assert_close(model(visual[1:2], text[1:2], mask[1:2]), scores[1:2])


def test_half_precision_tokens_are_read_in_float32_even_under_autocast():
    model = head(chunk_size=5)
    visual, text, mask = tokens()
    visual, text = visual.bfloat16(), text.bfloat16()
    expected = model(visual.float(), text.float(), mask)
    assert torch.equal(model(visual, text, mask), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(visual, text, mask), expected)
    assert expected.dtype == torch.float32


def test_online_softmax_survives_logits_beyond_the_range_of_exp():
    model = head(chunk_size=2)
    with torch.no_grad():
        model.query *= 1e3
    visual, text, mask = tokens()
    torch.testing.assert_close(model(visual, text, mask), unfolded(model, visual, text, mask), atol=1e-4, rtol=1e-4)


def test_the_papers_size():
    parameters = sum(p.numel() for p in QueryHead(1536).parameters())
    assert 21.0e6 < parameters < 22.0e6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"aggregation": "max"}, "The aggregation must be one of .*; found max"),
        ({"num_heads": 5}, "5 heads for dim 32"),
        ({"num_queries": 0}, "num_queries"),
        ({"num_dimensions": 0}, "num_dimensions"),
    ],
)
def test_refuses(options, sentence):
    with pytest.raises(PrismError, match=sentence):
        QueryHead(WIDTH, DIM, **{"num_heads": HEADS, **options})
