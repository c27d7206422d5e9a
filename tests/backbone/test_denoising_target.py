"""A denoiser that answers with the target makes the stock pipeline end at the clean latents that it was made of."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from tests import tiny
from tests.zoo import VARIANTS

from prism.backbone import Backbone
from prism.backbone.denoising import output, target_of, unconditioned
from prism.errors import PrismError

FORMS = {
    "wan21_t2v_euler": ("flow", 1.0),
    "wan21_t2v_unipc": ("flow", 1.0),
    "ltx": ("flow", 1.0),
    "mochi": ("flow", -1.0),
    "cogvideox_ddim": ("v_prediction", 1.0),
    "latte": ("epsilon", 1.0),
    "allegro": ("epsilon", 1.0),
}
# Guidance that cannot be turned off, and a first frame that is a condition: only the form is looked at.
OTHERS = {"hunyuan15": ("flow", 1.0), "sana_video_i2v": ("flow", 1.0), "cosmos25_image": ("flow", 1.0)}
OTHERS |= {"z_image": ("flow", -1.0)}  # answers with a list of rows


@pytest.mark.parametrize("name", OTHERS)
def test_guidance_and_conditions_do_not_hide_the_target(name):
    pipe, call = VARIANTS[name]()
    target = target_of(Backbone(pipe), tiny.PROMPT, call)
    assert (target.form, target.sign) == OTHERS[name]


@pytest.mark.parametrize("name", FORMS)
def test_the_target_is_what_the_pipeline_and_its_scheduler_take_it_for(name, monkeypatch):
    pipe, call = VARIANTS[name]()
    backbone = Backbone(pipe)
    target = target_of(backbone, tiny.PROMPT, call)
    assert (target.form, target.sign) == FORMS[name]
    conditioning = backbone.condition([tiny.PROMPT], **call)
    clean = torch.randn(1, *conditioning.shape, generator=torch.Generator().manual_seed(1))
    plain = type(backbone.denoiser).forward

    def perfect(*args, **kwargs):
        answer = plain(backbone.denoiser, *args, **kwargs)
        first = answer[0] if isinstance(answer, tuple) else answer
        seen = backbone.denoiser_call(_named(plain, args, kwargs))
        t = torch.tensor([seen.t(pipe.scheduler)]).clamp(min=1e-3)  # a level of exactly 0 stands for no noise at all
        alpha, sigma, _ = backbone.family.level(pipe.scheduler, t)
        noise = (seen.noisy - alpha * clean) / sigma
        wanted = target.of(backbone, clean.expand_as(noise), noise, t.expand(len(noise)))
        assert torch.allclose(target.clean(backbone, seen.noisy, wanted, t.expand(len(noise))), clean, atol=1e-2)
        first = torch.cat([wanted, first.narrow(*_rest(first, wanted))], _rest(first, wanted)[0])
        return (first, *answer[1:]) if isinstance(answer, tuple) else first

    monkeypatch.setattr(backbone.denoiser, "forward", perfect)
    guidance = {} if backbone.family.guidance == "guider" else {backbone.family.guidance: 1.0}
    ended = pipe(tiny.PROMPT, **{**call, **guidance, "output_type": "latent"})[0]
    assert (ended - clean).square().mean().sqrt() < 0.06  # CogVideoX's schedule ends at its first level, sigma 0.05


def _named(forward, args, kwargs):
    from inspect import signature

    return {**dict(zip(list(signature(forward).parameters)[1:], args)), **kwargs}


def _rest(answer, wanted):
    """Axis, start and length of the channels of a learned variance."""
    axis = next((axis for axis in range(answer.ndim) if answer.shape[axis] != wanted.shape[axis]), 1)
    return axis, wanted.shape[axis], answer.shape[axis] - wanted.shape[axis]


def test_the_whole_output_is_the_denoisers_own_with_gradients():
    backbone = Backbone(tiny.wan())
    conditioning = backbone.condition([tiny.PROMPT, tiny.OTHER_PROMPT], **tiny.CALL_WAN)
    noisy = torch.randn(2, *conditioning.shape)
    with backbone.held():
        answer = output(backbone, noisy, conditioning, torch.tensor([300.0, 700.0]))
        plain = backbone.denoiser(
            noisy[1:], torch.tensor([700.0]), conditioning[1].arguments["encoder_hidden_states"], return_dict=False
        )[0]
    assert torch.allclose(answer[1:], plain, atol=1e-6)
    assert answer.requires_grad


def test_rows_that_a_denoiser_lists_are_one_tensor_and_its_guidance_begins_above_0():
    pipe, call = VARIANTS["z_image"]()
    backbone, rows = Backbone(pipe), []
    conditioning = backbone.condition([tiny.PROMPT], **call)
    noisy = torch.randn(1, *conditioning.shape)
    with backbone.held():
        answer = output(backbone, noisy, conditioning, torch.tensor([500.0]))
    assert answer.shape == noisy.shape
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for scale in (0.0, 0.5):
        pipe(tiny.PROMPT, **{**call, "num_inference_steps": 1, "guidance_scale": scale, "output_type": "latent"})
        assert backbone.guided({**call, "guidance_scale": scale}) == (rows.pop() == 2)
    handle.remove()


def test_an_empty_prompts_conditioning_is_that_of_guidance():
    backbone = Backbone(tiny.wan())
    empty = unconditioned(backbone, tiny.CALL_WAN)
    embeds, _ = backbone.pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=12)
    assert torch.equal(empty.arguments["encoder_hidden_states"], embeds)


def test_a_scheduler_that_does_not_say_what_is_predicted_is_refused():
    backbone = Backbone(tiny.wan())
    backbone.pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(PrismError, match=r"predicts is not known: its FlowMatchEuler.* says sample"):
        target_of(backbone, tiny.PROMPT, tiny.CALL_WAN)


def test_a_pipeline_that_changes_the_output_is_refused(monkeypatch):
    backbone = Backbone(tiny.wan())
    pipe = backbone.pipe
    plain = type(pipe).__call__

    @wraps(plain)
    def doubled(self, *args, **kwargs):
        inner = self.scheduler.step
        self.scheduler.step = wraps(inner)(lambda model_output, *a, **k: inner(2 * model_output, *a, **k))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", doubled)
    with pytest.raises(PrismError, match="changes its denoiser's output"):
        target_of(Backbone(pipe), tiny.PROMPT, tiny.CALL_WAN)
