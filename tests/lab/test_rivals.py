"""Related heads on a tiny backbone: losses in closed form, what they read, and training on the bench's batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import measure, measure_together
from prism.lab import bench
from prism.lab.heads import FLOOR, RIVALS, RegisterHead
from prism.lab.rivals import JointRivalJudge, OwnDisagreement, OwnError, taps_of, train_rivals, utilities

CONFIG = replace(bench.RECIPE, steps=12, prompts_per_step=4, learning_rate=5e-3, warmup_steps=0)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(tiny.wan())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("rivals") / "store", prompts=(8, 3, 4))


def head(name, backbone, dimensions=2):
    torch.manual_seed(1)
    return RIVALS[name](backbone.widths[0], 16, dimensions, (1, 2))


def read(one, backbone, latents, t=700.0):
    conditioning = backbone.condition([tiny.PROMPT] * len(latents), **tiny.CALL_WAN)
    return utilities([one], backbone, latents, conditioning, torch.full((len(latents),), t))[0]


def test_losses_are_their_closed_forms(backbone):
    first, second = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    labels = torch.tensor([[1.0, float("nan")], [0.0, -1.0]])
    sigma = torch.tensor([0.5, 0.9])

    def normal(z):
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    one = head("pavrm", backbone)
    logistic = [math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(3.0))]
    loss = one.loss(first, second, one.variance(sigma, None, None), labels)
    assert float(loss) == pytest.approx(sum(logistic) / 2, rel=1e-5)
    one = head("dina", backbone)
    spread = [2 * (2 * s**2 + FLOOR) for s in (0.5, 0.9)]
    fidelity = [1 - math.sqrt(normal(1 / math.sqrt(spread[0]))), 1 - math.sqrt(normal(-3 / math.sqrt(spread[1])))]
    loss = one.loss(first, second, one.variance(sigma, None, None), labels)
    assert float(loss) == pytest.approx(sum(fidelity) / 2, rel=1e-3)
    one, spreads = head("sure", backbone), torch.tensor([[0.2, 0.1], [-0.3, 0.4]])
    variance = one.variance(sigma, spreads, spreads + 1)
    assert torch.allclose(variance, spreads.exp() + (spreads + 1).exp())
    gauss = [-math.log(normal(1 / float(variance[0, 0].sqrt()))), -math.log(normal(-3 / float(variance[1, 1].sqrt())))]
    assert float(one.loss(first, second, variance, labels)) == pytest.approx(sum(gauss) / 2, rel=1e-4)
    one = head("lrm", backbone)
    ties = 0.5 * (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5)))
    loss = one.loss(first, second, variance, labels)
    assert float(loss) == pytest.approx((logistic[0] + logistic[1] + ties) / 3, rel=1e-5)


@pytest.mark.parametrize("name", RIVALS)
def test_a_head_scores_rows_apart_and_learns(name, backbone):
    latents = torch.randn(3, *stores.SHAPE, generator=torch.Generator().manual_seed(2))
    one = head(name, backbone)
    scores, _ = read(one, backbone, latents)
    assert scores.shape == (3, 2)
    alone, _ = read(one, backbone, latents[1:2])
    torch.testing.assert_close(scores[1:2], alone, atol=1e-5, rtol=1e-4)
    scores.sum().backward()
    trained = [weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in one.parameters()]
    assert any(trained)
    assert all(weight.grad is None for weight in backbone.denoiser.parameters() if weight.requires_grad is False)
    backbone.denoiser.zero_grad(set_to_none=True)


def test_the_noise_level_reaches_dina_alone_through_its_film(backbone):
    one = head("dina", backbone)
    tokens = backbone.tokens(
        torch.randn(1, *stores.SHAPE), backbone.condition([tiny.PROMPT], **tiny.CALL_WAN), 700.0, [1, 2]
    )
    low, high = (one(tokens, torch.tensor([sigma]))[0] for sigma in (0.1, 0.9))
    assert torch.equal(low, high)  # zero at first
    torch.nn.init.normal_(one.films[0][2].weight, std=0.1)
    low, high = (one(tokens, torch.tensor([sigma]))[0] for sigma in (0.1, 0.9))
    assert not torch.allclose(low, high)


def test_registers_go_through_the_blocks_and_leave_no_trace(backbone):
    one = head("registers", backbone)
    latents = torch.randn(2, *stores.SHAPE, generator=torch.Generator().manual_seed(3))
    conditioning = backbone.condition([tiny.PROMPT] * 2, **tiny.CALL_WAN)
    plain = backbone.tokens(latents, conditioning, 700.0, 2)
    scores, _ = read(one, backbone, latents)
    assert one.seen[2].shape == (2, RegisterHead.COUNT, backbone.widths[0])
    other, _ = read(one, backbone, latents + 0.5)
    assert not torch.allclose(scores, other)  # they saw the video
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in backbone.blocks)
    assert torch.equal(backbone.tokens(latents, conditioning, 700.0, 2).visual, plain.visual)
    with pytest.raises(PrismError, match="Registers go through Wan's blocks alone, found the family cogvideox"):
        with one.inside(Backbone(tiny.cogvideox())):
            pass


def test_rivals_learn_the_pattern_that_labels_follow(backbone, store):
    names = ["pavrm", "lrm", "sure"]
    judges = train_rivals(names, backbone, store, CONFIG, 2, 16)
    assert taps_of(backbone, 2) == (1, 2)
    together = measure_together(list(judges.values()), store, "train", [100], progress=False, joint=JointRivalJudge)
    for (name, judge), joint in zip(judges.items(), together):
        alone = measure(judge, store, "train", [100], progress=False)
        rows, margins = alone.rows, [np.array(each.pairs["margin"]) for each in (alone, joint)]
        np.testing.assert_allclose(*margins, rtol=1e-4, atol=1e-5)
        accuracy = next(row["without_ties"] for row in rows if row["dimension"] == "VQ")
        assert accuracy > 0.6, name
        assert set(judge.trained_on["prompt_keys"])


def test_judges_without_training_ask_the_generator(backbone, store):
    for kind in (OwnError, OwnDisagreement):
        judge = kind(backbone)
        latents = store.latents(store.videos["video"].to_pylist()[:2])
        scores = judge.score(latents, [tiny.PROMPT] * 2, 500.0, **tiny.CALL_WAN)
        assert scores.shape == (2, 1)
        assert bool((scores < 0).all())
        again = judge.score(latents[:1], [tiny.PROMPT], 500.0, **tiny.CALL_WAN)
        torch.testing.assert_close(scores[:1], again, rtol=1e-4, atol=1e-6)
