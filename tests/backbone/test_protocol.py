"""What an object lacks to be a pipeline is said in one sentence; what it says in its own way is read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.zoo.bare import BarePipeline, bare
from torch import nn

import prism
from prism.backbone import Backbone
from prism.backbone.denoiser_call import by_name
from prism.backbone.pipeline import config_of, device_of, dtype_of, tensor_of
from prism.errors import PrismError
from prism.judge import Judge


@pytest.mark.parametrize("name", ["components", "scheduler", "vae"])
def test_a_missing_member_is_named(name: str) -> None:
    pipe = BarePipeline()
    delattr(pipe, name)
    with pytest.raises(PrismError, match=f"The pipeline BarePipeline lacks the member '{name}'"):
        Backbone(pipe)


def test_missing_members_of_parts_and_arguments_are_named() -> None:
    pipe = BarePipeline()
    pipe.scheduler = object()  # type: ignore[assignment]
    with pytest.raises(PrismError, match=r"lacks the member 'scheduler.step'"):
        Backbone(pipe)

    class WithoutOutput(BarePipeline):
        def __call__(self, prompt: Any, generator: Any, num_inference_steps: int = 2) -> Any: ...  # type: ignore[override]

    with pytest.raises(PrismError, match="The call of the pipeline WithoutOutput lacks the argument 'output_type'"):
        Backbone(WithoutOutput())
    pipe = BarePipeline()
    pipe.components = {"net": pipe.transformer}
    with pytest.raises(PrismError, match="The pipeline has no denoiser None to read; it has none"):
        Backbone(pipe)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": ("blocks",)}, "The denoiser Net has no blocks 'blocks'"),
        ({"widths": ""}, "configuration has no 'num_attention_heads'; say it as 'widths' in the pipeline's family"),
        ({"patch": None}, "configuration has no 'patch_size'; say it as 'patch' in the pipeline's family"),
        ({"latents_argument": ("x",)}, "called with z, when, words, none of which is the family's latents_argument, x"),
    ],
)
def test_a_missing_fact_is_named(changes: dict[str, Any], sentence: str) -> None:
    pipe, call = bare()
    pipe.family = replace(pipe.family, **changes)
    with pytest.raises(PrismError, match=sentence):
        backbone = Backbone(pipe)
        backbone.tokens(torch.zeros(1, 3, 4, 4, 6), backbone.condition([tiny.PROMPT], **call), 500.0, 1)


def test_a_configuration_may_be_any_object() -> None:
    pipe, call = bare()
    pipe.family = replace(pipe.family, patch=None, widths="hidden")
    for config in ({"patch_size": (1, 2, 2), "hidden": 16}, SimpleNamespace(patch_size=2, hidden=16)):
        pipe.transformer.config = config
        backbone = Backbone(pipe)
        tokens = backbone.tokens(torch.zeros(1, 3, 4, 4, 6), backbone.condition([tiny.PROMPT], **call), 500.0, 1)
        assert (tokens.grid, backbone.widths) == ((3, 2, 3), [16, 16, 16])


def test_every_strategy_and_the_ledger() -> None:
    pipe, call = bare()
    before = dict(vars(pipe))
    judge = Judge.untrained(pipe, dim=16)
    for strategy, share in (("none", 1), ("early", 0), ("full", 3), ("draft", 2)):  # of 12 rows, at least
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, strategy=strategy, batch_size=1, **call)
        video = pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(result.seed), **call)[0][0]
        assert (result.video == video).all()
        assert result.ledger.denoiser_rows >= 12 * share
        assert result.ledger.vae_decodes == 1
    assert vars(pipe) == before


def test_what_is_said_in_different_ways() -> None:
    net, value = nn.Linear(2, 2, dtype=torch.bfloat16), torch.ones(1)
    assert (config_of(net), dtype_of(net), dtype_of(object())) == ({}, torch.bfloat16, torch.float32)
    assert device_of(object(), net) == torch.device("cpu")
    for output in (value, (value, 2), SimpleNamespace(sample=value)):
        assert tensor_of(output) is value

    class Free(nn.Module):
        def forward(self, a: Any, **rest: Any) -> Any: ...

    assert by_name(Free(), (1,), {"b": 2}) == {"a": 1, "b": 2}


def test_the_card_of_a_head_names_the_pipeline_and_not_diffusers(tmp_path: Any) -> None:
    Judge.untrained(BarePipeline(), dim=16).save_pretrained(tmp_path / "head", {"store": "none"})
    card = (tmp_path / "head" / "README.md").read_text()
    assert "pipe = BarePipeline(...)" in card
    assert "from diffusers" not in card
