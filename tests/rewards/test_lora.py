"""A LoRA on a denoiser leaves nothing behind, is nothing while it is off, and is loaded by stock diffusers."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import DDIMScheduler
from tests import tiny
from tests.zoo.bare import bare

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.rewards.lora import FILE, applied, check

CALL = {**tiny.CALL_WAN, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}


def sampled(pipe):
    return pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(3), **CALL).frames


def state(pipe):
    """Everything of the denoiser that a LoRA could change."""
    denoiser = pipe.transformer
    modules = {name: (type(each), each.training) for name, each in denoiser.named_modules()}
    weights = {name: (value.clone(), value.requires_grad) for name, value in denoiser.named_parameters()}
    return modules, weights, {name for name in vars(denoiser) if "peft" in name}


def same(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][k][0], other[1][k][0]) and one[1][k][1] == other[1][k][1] for k in one[1])
        and one[2] == other[2]
    )


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(tiny.wan(num_layers=2))


def moved(lora):
    """Give the LoRA an update, as its first weights have none."""
    with torch.no_grad():
        for number, value in enumerate(lora.weights.values()):
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)), alpha=0.3)


def test_it_is_nothing_while_off_and_leaves_nothing_behind(backbone):
    pipe = backbone.pipe
    pipe.transformer.patch_embedding.weight.requires_grad_(False)  # a user's own flags stay
    pipe.transformer.blocks[0].train()
    before, stock, fingerprint = state(pipe), sampled(pipe), backbone.fingerprint()
    with applied(backbone, rank=4) as lora:
        assert torch.equal(sampled(pipe), stock)  # an update of zero
        moved(lora)
        assert not torch.allclose(sampled(pipe), stock, atol=1e-2)
        with lora.off():
            assert torch.equal(sampled(pipe), stock)
        with lora.old():  # without a second LoRA that is the original
            assert torch.equal(sampled(pipe), stock)
        trained = {name for name, value in pipe.transformer.named_parameters() if value.requires_grad}
        assert trained == set(lora.weights)
    assert same(state(pipe), before)
    assert torch.equal(sampled(pipe), stock)
    assert backbone.fingerprint() == fingerprint


def test_it_leaves_nothing_behind_where_work_fails(backbone):
    before = state(backbone.pipe)
    with pytest.raises(KeyboardInterrupt), applied(backbone) as lora:
        moved(lora)
        raise KeyboardInterrupt
    assert same(state(backbone.pipe), before)
    with (
        pytest.raises(PrismError, match=r"takes no LoRA at nowhere .*name linear layers"),
        applied(backbone, targets=["nowhere"]),
    ):
        pass
    assert same(state(backbone.pipe), before)


def test_what_is_saved_is_loaded_by_stock_diffusers(backbone, tmp_path):
    with applied(backbone, rank=4, alpha=2.0) as lora:
        moved(lora)
        tuned = sampled(backbone.pipe)
        lora.save(tmp_path / "lora")
    by_pipe = tiny.wan(num_layers=2)
    by_pipe.load_lora_weights(tmp_path / "lora", weight_name=FILE)
    assert torch.allclose(sampled(by_pipe), tuned, atol=1e-6)
    by_denoiser = tiny.wan(num_layers=2)
    by_denoiser.transformer.load_lora_adapter(tmp_path / "lora", weight_name=FILE)
    assert torch.allclose(sampled(by_denoiser), tuned, atol=1e-6)
    with applied(backbone, rank=4, alpha=2.0, start=tmp_path / "lora") as again:
        assert torch.equal(sampled(backbone.pipe), tuned)
        again.save(tmp_path / "again")
    assert (tmp_path / "lora" / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()
    with pytest.raises(PrismError, match="does not fit this run"), applied(backbone, start=tmp_path / "lora"):
        pass  # of another rank


def test_the_model_that_sampled_is_on_beside_it_and_frozen(backbone, tmp_path):
    with applied(backbone, rank=4) as lora:
        moved(lora)
        tuned = sampled(backbone.pipe)
        lora.save(tmp_path)
    with applied(backbone, rank=4, start=tmp_path, old=tmp_path) as lora:
        moved(lora)
        with lora.old():
            assert torch.equal(sampled(backbone.pipe), tuned)
        assert not torch.allclose(sampled(backbone.pipe), tuned, atol=1e-2)
        trained = {name for name, value in backbone.denoiser.named_parameters() if value.requires_grad}
        assert trained == set(lora.weights)


def test_what_is_trained_is_in_float32_and_what_samples_in_the_denoisers_dtype(tmp_path):
    pipe = tiny.wan(num_layers=2)
    pipe.transformer.to(torch.bfloat16)
    backbone, small = Backbone(pipe), 2.0**-20
    with applied(backbone, rank=2, trains=True) as lora:
        moved(lora)
        before = lora.state()
        with torch.no_grad():
            for value in lora.weights.values():
                value.add_(small)
        assert all(not torch.equal(value, before[name]) for name, value in lora.weights.items())
        lora.save(tmp_path)
    with applied(backbone, rank=2, start=tmp_path) as lora:
        assert {value.dtype for value in lora.weights.values()} == {torch.bfloat16}
        tuned = sampled(pipe)
    stock = tiny.wan(num_layers=2)
    stock.transformer.to(torch.bfloat16)
    stock.load_lora_weights(tmp_path, weight_name=FILE)
    assert torch.equal(sampled(stock), tuned)


def test_denoisers_that_take_none_are_refused(backbone, monkeypatch):
    pipe, _ = bare()
    with pytest.raises(PrismError, match="cannot take a LoRA"):
        check(Backbone(pipe))
    with applied(backbone), pytest.raises(PrismError, match=r"has adapters already \(prism\)"):
        check(backbone)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PrismError, match=r'pip install "prism-video\[improve\]"'):
        check(backbone)


def test_a_scheduler_of_another_form_is_refused_before_anything_is_sampled(backbone):
    from prism.backbone.denoising import target_of

    backbone.pipe.scheduler = DDIMScheduler()
    with pytest.raises(PrismError, match="noise levels of this DDIMScheduler cannot be told"):
        target_of(backbone, tiny.PROMPT, tiny.CALL_WAN)
