"""The best k instead of the best one, and several prompts in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageOps
from tests import tiny
from tests.sampling.conftest import Setting
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.judge import Judge
from prism.sampling import expected_rows
from prism.sampling.plan import resolve

N, STEPS = 4, 6
RUNS: dict[str, dict[str, Any]] = {
    "none": {"strategy": "none"},
    "random": {"strategy": "random"},
    "full": {"strategy": "full"},
    "draft": {"strategy": "draft", "draft_steps": 2},
    "early": {"schedule": [(2, 3), (4, 2)]},
    "early to the end": {"schedule": [(2, 3)]},
    "oracle": {"strategy": "oracle", "oracle": lambda video, prompt: float(video[:, :16].mean())},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_best_two_are_stock_videos_best_first(setting: Setting, name: str, batch_size: int) -> None:
    arguments, judge = RUNS[name], setting.judge(2)
    call = setting.call if batch_size == 1 else {**setting.call, "output_type": "latent"}
    result = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, n=N, top_k=2, batch_size=batch_size, **arguments, **call)
    assert len({pick.index for pick in result.top}) == 2
    assert (result.seed, result.index) == (result.top[0].seed, result.top[0].index)
    for pick in result.top:
        video, latents, _ = setting.stock(pick.seed)
        if batch_size == 1:
            assert torch.equal(pick.latents, latents)
            assert np.array_equal(pick.video, video)
        else:
            torch.testing.assert_close(pick.latents, latents, atol=5e-5, rtol=1e-4)
    if result.scores:
        cut = result.scores[-1]
        values = next(iter(cut["scores"].values())) if name == "oracle" else cut["scores"]["overall"]
        order = sorted(zip(cut["candidates"], values), key=lambda entry: -entry[1])
        assert [pick.index for pick in result.top] == [candidate for candidate, _ in order[:2]]
        assert cut["kept"] == sorted(pick.index for pick in result.top)
    schedule = arguments.get("schedule")
    rows = expected_rows(
        arguments.get("strategy", "early"),
        N,
        STEPS,
        judge.backbone.family.cfg,
        True,
        2 / 3,
        resolve(schedule, N, STEPS, 2) if schedule else None,
        arguments.get("draft_steps", 0),
        top_k=2,
    )
    assert result.ledger.denoiser_rows == pytest.approx(rows)
    assert result.ledger.vae_decodes == (N if name == "oracle" else 0) + (2 if batch_size == 1 else 0)


def test_the_top_of_all_is_a_ranking_of_all(wan: Setting) -> None:
    call = {**wan.call, "output_type": "latent"}
    result = prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=3, top_k=3, **call)
    scores = result.scores[0]["scores"]["overall"]
    assert [pick.index for pick in result.top] == sorted(range(3), key=lambda i: -scores[i])
    first = prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=3, **call)
    assert first.index == result.index


def test_a_random_pick_is_the_first_of_the_random_top(wan: Setting) -> None:
    call = {**wan.call, "output_type": "latent", "num_inference_steps": 1}
    for seed in range(4):
        one, two = (
            prism.best_of_n(wan.pipe, None, tiny.PROMPT, strategy="random", seed=seed, top_k=k, **call) for k in (1, 2)
        )
        assert one.index == two.index


def test_several_prompts_are_as_many_runs(wan: Setting) -> None:
    judge, prompts = wan.judge(2), [tiny.PROMPT, tiny.OTHER_PROMPT]
    arguments: dict[str, Any] = {"n": 3, "schedule": "3:1", "seed": 4, "batch_size": 1}
    together = prism.best_of_n(
        wan.pipe, judge, prompts, negative_prompt=["a cat", "a cat runs"], **arguments, **wan.call
    )
    assert isinstance(together, list)
    for prompt, negative, found in zip(prompts, ["a cat", "a cat runs"], together):
        alone = prism.best_of_n(wan.pipe, judge, prompt, negative_prompt=negative, **arguments, **wan.call)
        assert found.scores == alone.scores
        assert np.array_equal(found.video, alone.video)
        assert found.ledger.denoiser_rows == alone.ledger.denoiser_rows
    assert not np.array_equal(together[0].video, together[1].video)


def test_memory_that_runs_out_in_the_end_is_said(wan: Setting) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = wan.pipe.vae.decoder.register_forward_pre_hook(full)
    try:
        with pytest.raises(prism.PrismError, match="while the winner was finished; let the VAE decode in tiles"):
            prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=2, **wan.call)
    finally:
        handle.remove()


@works(
    "Inputs and outputs",
    "Several prompts, each with an image or a video of its own",
    "exact",
    "A list with one per prompt.",
)
@pytest.mark.parametrize(("variant", "name"), [("svd", "image"), ("cosmos2", "video")])
def test_each_prompt_has_its_own_image_or_video(variant: str, name: str) -> None:
    pipe, call = VARIANTS[variant]()
    judge, call = Judge.untrained(pipe, dim=16), {**call, "output_type": "latent", "n": 2, "batch_size": 2}
    image = call.pop("image")
    given = [image, ImageOps.invert(image)]
    given = [[each] * 5 for each in given] if name == "video" else given
    prompt = tiny.PROMPT if judge.backbone.family.takes_prompts else None
    together = prism.best_of_n(pipe, judge, [prompt, prompt], **{name: given}, **call)
    for own, found in zip(given, together):
        assert torch.equal(found.video, prism.best_of_n(pipe, judge, prompt, **{name: own}, **call).video)
    assert not torch.equal(together[0].video, together[1].video)
    shared = prism.best_of_n(pipe, judge, [prompt, prompt], **{name: given[1]}, **call)
    assert torch.equal(shared[0].video, together[1].video)
