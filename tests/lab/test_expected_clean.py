"""The clean latents that the denoiser expects at a cut, against a plain run with a hook on the denoiser."""

from __future__ import annotations

import torch
from tests import tiny

from prism.backbone import Backbone
from prism.lab import attention

CALL = {**tiny.CALL_WAN, "num_inference_steps": 4}


def test_what_is_expected_at_each_step_and_the_pipeline_afterwards():
    pipe = tiny.wan()
    backbone, seeds, calls = Backbone(pipe), [3, 8], []
    hook = pipe.transformer.register_forward_hook(
        lambda _m, _a, kwargs, output: calls.append((kwargs["hidden_states"], kwargs["timestep"], output[0])),
        with_kwargs=True,
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stock = pipe([tiny.PROMPT] * 2, generator=generators, output_type="latent", **CALL).frames
    hook.remove()
    assert len(calls) == 8  # the conditional pass of each step comes first
    for step in (1, 2, 4):
        noisy, timestep, velocity = calls[2 * (step - 1)]
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        expected = attention._expected_clean(backbone, tiny.PROMPT, seeds, step, CALL)
        torch.testing.assert_close(expected, noisy - sigma * velocity, atol=1e-4, rtol=1e-4)
        assert not getattr(pipe, "_interrupt", False)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(pipe([tiny.PROMPT] * 2, generator=generators, output_type="latent", **CALL).frames, stock)
