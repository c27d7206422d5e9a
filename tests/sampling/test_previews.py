"""Previews at cuts that look ahead: the videos that the denoiser predicts, counted, gathered and shown on the page."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests import tiny
from tests.zoo import VARIANTS

import prism
from prism.backbone.arguments import normalised
from prism.commands.sampled import preview_strips
from prism.errors import PrismError
from prism.judge import Judge
from prism.report.metrics import cut_entry
from prism.sampling.plan import Candidate
from prism.sampling.previews import Previews
from prism.sampling.trajectory import sample
from prism.team import Team


def test_previews_are_the_decoded_predictions_of_all_candidates_at_a_cut(wan):
    judge, call = wan.judge(tap=2), wan.call
    run = {"n": 3, "schedule": "2:2,4:1", "seed": 4, "batch_size": 2, **call}
    result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, look=["ahead", "ahead"], previews=True, **run)
    plain = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, look="ahead", **run)
    assert plain.previews is None
    assert result.scores == plain.scores
    assert torch.equal(result.latents, plain.latents)
    assert result.ledger.denoiser_rows == plain.ledger.denoiser_rows
    assert (plain.ledger.vae_decodes, result.ledger.vae_decodes) == (1, 1 + 3 + 2)
    assert {step: set(videos) for step, videos in result.previews.items()} == {
        2: {0, 1, 2},
        4: set(result.scores[0]["kept"]),
    }
    arguments = normalised({**call, "output_type": "latent"})
    for index in range(3):
        clean = sample(judge.backbone, tiny.PROMPT, 4 + index, arguments, (2,)).predicted
        expected = judge.backbone.decode(clean)[0].numpy()
        found = result.previews[2][index]
        assert found.dtype == np.uint8
        assert found.shape == expected.shape
        assert np.abs(found / 255 - expected).max() < 0.5 / 255 + 1e-4

    cuts = [cut_entry(cut, "early", {"overall": 1.0}) for cut in result.scores]
    strips = preview_strips(result, cuts, 8.0)
    assert [strip.title for strip in strips] == ["Step 2", "Step 4"]
    first = strips[0].clips
    assert [clip.label for clip in first] == [
        f"seed {4 + int(c)}" for c in sorted(cuts[0]["scores"], key=lambda c: -cuts[0]["scores"][c])
    ]
    assert [clip.picked for clip in first] == [True, True, False]
    assert preview_strips(plain, cuts, 8.0) == []


@pytest.mark.parametrize("name", ["ltx_i2v", "svd", "wan22_5b_i2v"])
def test_a_preview_at_the_last_step_is_the_finished_video(name):
    """Packed latents, a VAE that takes single frames, a given frame: the last step lands on what it predicts."""
    pipe, call = VARIANTS[name]()
    judge = Judge.untrained(pipe, dim=16)
    call = {**call, "num_inference_steps": 2, "output_type": "np"}
    prompt = tiny.PROMPT if judge.backbone.family.takes_prompts else None
    run = {"n": 2, "schedule": "2:1", "look": "ahead", "num_draws": 1, "previews": True, **call}
    result = prism.best_of_n(pipe, judge, prompt, **run)
    assert np.abs(result.previews[2][result.index] / 255 - result.video).max() < 0.5 / 255 + 1e-3
    assert set(result.previews[2]) == {0, 1}


def test_previews_without_a_look_ahead_are_refused_before_any_row(wan):
    rows = []
    hook = wan.pipe.transformer.register_forward_hook(lambda *_: rows.append(1))
    try:
        for options in ({}, {"look": "now"}, {"strategy": "full"}, {"strategy": "none"}):
            with pytest.raises(PrismError, match=r"Previews are the videos .* this run has none; take look="):
                prism.best_of_n(wan.pipe, wan.judge(), tiny.PROMPT, 2, previews=True, **options, **wan.call)
        with pytest.raises(PrismError, match='the candidates of the strategy "fk" part from theirs'):
            prism.best_of_n(wan.pipe, wan.judge(), tiny.PROMPT, 2, previews=True, strategy="fk", **wan.call)
        with pytest.raises(PrismError, match="previews"):
            prism.best_of_n(wan.pipe, wan.judge(), tiny.PROMPT, 2, previews="yes", look="ahead", **wan.call)
    finally:
        hook.remove()
    assert not rows
    assert preview_strips(SimpleNamespace(previews=None), [], 8.0) == []


def test_previews_of_rounds_are_one_runs():
    first, second = Candidate(0, 4), Candidate(3, 7)
    one, other = Previews({2: {first: np.zeros(1)}}), Previews({2: {second: np.ones(1)}, 4: {second: np.ones(1)}})
    one.take(other)
    gathered = one.gathered(Team())
    assert {step: sorted(videos) for step, videos in gathered.items()} == {2: [0, 3], 4: [3]}
    assert gathered[4][3] == 1
