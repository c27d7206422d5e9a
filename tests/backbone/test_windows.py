"""Facts of pipelines that take a video or an image: windows, frames that are not decoded, tokens of an image behind."""

from __future__ import annotations

import pytest
import torch
from tests import tiny
from tests.zoo import editing, images

import prism
from prism.backbone import Backbone
from prism.backbone.pipeline import tensor_of
from prism.errors import PrismError
from prism.judge import Judge


def test_a_call_of_several_windows_is_refused_before_any_sampling() -> None:
    pipe, call = editing.helios()
    judge = Judge.untrained(Backbone(pipe), dim=16)
    with pytest.raises(PrismError, match=r"HeliosPipeline would sample this video in 2 windows"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **{**call, "num_frames": 17})


def test_an_images_tokens_stay_behind_other_latents() -> None:
    """The oracle is the stock call's own input: latents (6, 16), then the image's tokens (6, 16)."""
    pipe, call = images.BUILDERS["flux_kontext"]()
    backbone = Backbone(pipe)
    conditioning = backbone.condition([tiny.PROMPT], **call)
    seen: list[torch.Tensor] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    pipe(prompt=tiny.PROMPT, generator=torch.Generator().manual_seed(0), **{**call, "num_inference_steps": 2})
    handle.remove()
    assert tuple(seen[0].shape) == (1, 12, 16)
    latents = torch.randn(1, 6, 16)
    arguments = conditioning.call(latents, torch.tensor([0.5]))  # type: ignore[union-attr]
    assert torch.equal(arguments["hidden_states"], torch.cat([latents, seen[1][:, 6:]], 1))


def test_frames_that_are_not_decoded_are_put_back_by_encoding() -> None:
    """Wan Animate: 9 frames are 3 of latents, and one in front for the image."""
    pipe, _ = editing.wan_animate()
    backbone = Backbone(pipe)
    latents = backbone.encode(torch.rand(1, 9, 32, 48, 3))
    assert tuple(latents.shape) == (1, 16, 4, 4, 6)
    assert tuple(backbone.decode(latents).shape) == (1, 9, 32, 48, 3)


def test_a_list_of_rows_is_a_batch() -> None:
    rows = [torch.ones(2), torch.zeros(2)]
    assert torch.equal(tensor_of((rows,)), torch.stack(rows))
