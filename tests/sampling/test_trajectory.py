"""Recorded calls: the stock call's latents, its states, and predictions that the last step lands on."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from tests import tiny
from tests.zoo import VARIANTS

from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.errors import PrismError
from prism.sampling.trajectory import sample

# Flow by Euler and UniPC, sigmas from noise, velocities by token, EDM; frames of a condition; packed latents.
LANDING = (
    *("wan21_t2v_euler", "wan21_t2v_unipc", "mochi", "sana_video", "latte", "svd", "allegro", "ltx", "ltx_condition"),
    *("wan22_5b_i2v", "hunyuan_i2v", "ltx_i2v", "flux"),
)


@pytest.mark.parametrize("name", LANDING)
def test_the_last_step_lands_on_what_was_predicted_there(name):
    """Its noise level is 0, and a step to it gives the predicted clean latents themselves."""
    pipe, call = VARIANTS[name]()
    backbone, prompt = Backbone(pipe), "a cat runs"
    call = normalised(call)
    count = len(backbone.steps({**call, **backbone.batch([prompt], [3], call)}))
    plain = sample(backbone, prompt, 3, call)
    kept = sample(backbone, prompt, 3, call, (1, count))
    assert plain.states is None
    assert torch.equal(kept.latents, plain.latents)
    assert kept.states.shape == kept.predicted.shape == (2, *plain.latents.shape)
    assert kept.t[0] > kept.t[1]
    assert torch.allclose(kept.predicted[1], plain.latents, atol=1e-5)
    assert not torch.allclose(kept.predicted[0], plain.latents, atol=1e-2)


def test_ddim_predicts_by_v():
    """The state is alpha x0 + sigma eps, and the next one is made of the same two, by DDIM's formula."""
    backbone = Backbone(tiny.cogvideox("ddim"))
    kept = sample(backbone, tiny.PROMPT, 1, tiny.CALL_COGVIDEOX, (3, 4))
    t = round(kept.t[0].item())
    alphas = backbone.pipe.scheduler.alphas_cumprod[[t, t - 1000 // 6]]  # the step that the scheduler makes
    noise = (kept.states[0] - alphas[0].sqrt() * kept.predicted[0]) / (1 - alphas[0]).sqrt()
    following = alphas[1].sqrt() * kept.predicted[0] + (1 - alphas[1]).sqrt() * noise
    assert torch.allclose(following, kept.states[1], atol=1e-4)


def test_schedulers_that_do_not_tell_are_refused_unless_predictions_are_left_out():
    pipe = tiny.wan()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(PrismError, match=r"FlowMatchHeunDiscreteScheduler do not tell the clean .*--no-predicted"):
        sample(Backbone(pipe), tiny.PROMPT, 1, tiny.CALL_WAN, (2,))
    pipe, call = VARIANTS["skyreels_v2_df"]()
    with pytest.raises(PrismError, match="steps copies of its scheduler"):
        sample(Backbone(pipe), tiny.PROMPT, 1, normalised(call), (1,))
    kept = sample(Backbone(pipe), tiny.PROMPT, 1, normalised(call), (1,), predicted=False)
    assert kept.predicted is None
    assert kept.states.shape[1:] == kept.latents.shape
