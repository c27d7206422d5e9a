"""Edits keep the law of the latents at their level, whatever the scheduler, and leave alone what they should."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tests import tiny
from tests.machinery import seeded

from prism.errors import PrismError
from prism.sampling.edits import Editor, edited, part_replaced
from prism.sampling.plan import Edit

MEAN, VARIANCE = 2.0, 0.25  # of the data, per coordinate

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    "flow euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "flow dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="epsilon"),
    "ddim": lambda: DDIMScheduler(prediction_type="epsilon", clip_sample=False, timestep_spacing="trailing"),
    "euler": lambda: EulerDiscreteScheduler(prediction_type="epsilon", timestep_spacing="trailing"),
    "stochastic ddim": lambda: DDIMScheduler(prediction_type="epsilon", clip_sample=False, timestep_spacing="trailing"),
}


def answer(z: torch.Tensor, alpha: float, sigma: float, flow: bool) -> torch.Tensor:
    """The perfect denoiser's answer for data N(MEAN, VARIANCE): the expected noise, or noise minus clean."""
    total = alpha**2 * VARIANCE + sigma**2
    clean = MEAN + alpha * VARIANCE / total * (z - alpha * MEAN)
    noise = (z - alpha * clean) / sigma
    return noise - clean if flow else noise


def sampled(name: str, edits: list[list[Edit]], steps: int = 40, numbers: int = 20_000) -> torch.Tensor:
    """(rows, numbers) samples of the schedulers' own loop, with edits at the end of its steps."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    generators = [seeded(0) for _ in edits]
    z = torch.stack([torch.randn(numbers, generator=each) for each in generators]) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    editor = Editor(edits, generators)
    for step, t in enumerate(scheduler.timesteps, 1):
        if name.startswith("flow"):
            alpha, sigma = 1 - float(t) / 1000, float(t) / 1000
        else:
            alpha = float(scheduler.alphas_cumprod[int(t)]) ** 0.5
            sigma = (1 - alpha**2) ** 0.5
        model_input = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        noise = answer(model_input, alpha, sigma, name.startswith("flow"))
        if name == "stochastic ddim":  # each row draws from its own generator
            rows = [scheduler.step(a[None], t, b[None], eta=1.0, generator=each).prev_sample
                    for a, b, each in zip(noise, z, generators)]  # fmt: skip
            z = torch.cat(rows)
        else:
            z = scheduler.step(noise, t, z, return_dict=False)[0]
        z = editor.after_step(scheduler, step, t, z)
    return z


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_sampled_keeps_its_law_and_shares_the_first_part_of_its_way(name: str) -> None:
    edits = [[], [Edit(20, 7, 0.6)], [Edit(20, 7, 0.0)], [Edit(1, 5, 0.6), Edit(13, 7, 0.6), Edit(26, 8, 0.6)]]
    plain, once, unchanged, thrice = sampled(name, edits)
    assert plain.mean() == pytest.approx(MEAN, abs=0.1)
    assert plain.std() == pytest.approx(VARIANCE**0.5, rel=0.16)
    for each in (once, thrice):
        assert each.mean() == pytest.approx(float(plain.mean()), abs=0.02)
        assert each.std() == pytest.approx(float(plain.std()), rel=0.03)
        assert torch.corrcoef(torch.stack([each, plain]))[0, 1] < 0.99
    # A row does not feel the edits of others, but for the rounding of other shapes.
    torch.testing.assert_close(plain, sampled(name, [[]])[0], atol=1e-5, rtol=1e-5)
    if name != "stochastic ddim":  # there, any edit draws anew all that follows
        assert torch.equal(unchanged, plain)
        assert torch.corrcoef(torch.stack([once, plain]))[0, 1] > 0.1


def test_the_plain_form_would_not_keep_it() -> None:
    """At a middle level it shrinks the picture: the law is that of another level."""
    z0 = MEAN + VARIANCE**0.5 * torch.randn(1, 50_000, generator=seeded(0))
    noise, fresh = torch.randn(1, 50_000, generator=seeded(1)), torch.randn(1, 50_000, generator=seeded(2))
    before, z = 0.4 * z0 + 0.6 * noise, 0.5 * z0 + 0.5 * noise
    kept = part_replaced(z, before, fresh, 0.8, (0.4, 0.6), (0.5, 0.5))
    assert kept.mean() == pytest.approx(0.5 * MEAN, abs=0.01)
    assert kept.std() == pytest.approx(float(z.std()), rel=0.01)
    assert (kept - 0.5 * z0).std() == pytest.approx(0.5, rel=0.01)  # as much noise as before, about the same picture
    plain = part_replaced(z, None, fresh, 0.8, (0.4, 0.6), (0.5, 0.5))
    assert plain.mean() == pytest.approx(0.6 * 0.5 * MEAN, abs=0.01)


def test_given_frames_stay() -> None:
    before = torch.randn(1, 2, 3, generator=seeded(0))
    z = before.clone()
    z[:, 1] += 0.1
    kept = part_replaced(z, before, torch.randn(1, 2, 3, generator=seeded(1)), 0.5, (0.4, 0.6), (0.5, 0.5))
    assert torch.equal(kept[:, 0], z[:, 0])
    assert not torch.isclose(kept[:, 1], z[:, 1]).any()


@pytest.mark.parametrize(
    ("seed", "edits", "sentence"),
    [
        (None, [], "seed must be a whole number"),
        (0, [(1, 2, float("nan"))], "weight of an edit must be a number from 0 to 1; found nan"),
        (0, [(1, 2, 2.0)], "weight of an edit must be a number from 0 to 1; found 2"),
        (0, [(0, 2, 0.5)], "step of an edit must be a whole number of at least 1; found 0"),
        (0, (1, 2, 0.5), r"An edit is \(step, seed, weight\); found 1"),
        (0, None, "edits must be a list of edits"),
    ],
)
def test_what_is_no_edit_is_a_sentence(seed: object, edits: object, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        edited(seed, edits)  # type: ignore[arg-type]


def test_an_edit_that_the_call_would_never_make_is_refused() -> None:
    pipe = tiny.wan()
    for step in (tiny.CALL_WAN["num_inference_steps"], 99):
        with pytest.raises(PrismError, match=f"after step {step}, and the call has steps 1 to"):
            pipe(tiny.PROMPT, **edited(0, [(step, 1, 0.5)]), **tiny.CALL_WAN)
