"""Looks ahead: predictions of several candidates, by both passes or one; scores, rows and winners of their cuts."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from tests import tiny
from tests.planted import at_step, guided, planted
from tests.sampling.conftest import BUILDERS
from tests.zoo import VARIANTS

import prism
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling.lookahead import Predictor
from prism.sampling.looks import defaults
from prism.sampling.plan import Candidate, Workload
from prism.sampling.recording import Recording
from prism.sampling.strategies import Early
from prism.sampling.trajectory import sample

# Guidance by two calls, in one batch, by a guider, by an embedding; flow, v, EDM; conditions; packed latents.
FORMS = (
    *("wan21_t2v_unipc", "wan22_5b_i2v", "cogvideox_ddim", "cogvideox_dpm", "svd", "ltx_i2v"),
    *("hunyuan_i2v", "mochi", "motif_video"),
)
SEEDS = (3, 8)
PROMPT = "a cat runs"


def predicted(pipe, call, step, **options):
    """What a call of both seeds predicts at a step, and the denoiser rows that it computed."""
    backbone = Backbone(pipe)
    candidates = [Candidate(index, seed) for index, seed in enumerate(SEEDS)]
    predictor = Predictor(backbone, candidates, {each: Recording() for each in candidates}, [step], **options)
    arguments = {**call, **backbone.batch([PROMPT] * len(SEEDS), list(SEEDS), call), "output_type": "latent"}
    rows = []
    watch = [
        denoiser.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
        for denoiser in backbone.denoisers
    ]
    with backbone.held():
        assert predictor.run(arguments) is None
    for each in watch:
        each.remove()
    return predictor.predicted[step], sum(rows)


@pytest.mark.parametrize("name", FORMS)
def test_several_candidates_predict_what_each_one_predicts_alone(name):
    pipe, call = VARIANTS[name]()
    call = normalised(call)
    together, _ = predicted(pipe, call, 2)
    alone = [sample(Backbone(pipe), PROMPT, seed, call, (2,)).predicted[0] for seed in SEEDS]
    assert torch.allclose(together, torch.stack(alone), atol=2e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("name", ["wan21_t2v_unipc", "cogvideox_ddim", "latte"])
def test_the_conditional_pass_alone_predicts_as_a_call_without_guidance(name):
    """At the first step, where calls with and without guidance stand at the same noise; for half the rows."""
    pipe, call = VARIANTS[name]()
    call = normalised({**call, "guidance_scale": 4.0})
    alone, few = predicted(pipe, call, 1, conditional=True)
    guided, many = predicted(pipe, call, 1)
    plain, rows = predicted(pipe, {**call, "guidance_scale": 1.0}, 1)
    assert torch.allclose(alone, plain, atol=2e-5)
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert (few, many) == (rows, 2 * rows)


VP = (
    *(DDIMScheduler, DDPMScheduler, LCMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler),
    *(EulerDiscreteScheduler, EulerAncestralDiscreteScheduler),
)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_tells_what_a_denoiser_that_knows_says(kind):
    pipe, call = VARIANTS["latte"]()
    call = normalised({**call, "num_inference_steps": 3})
    backbone = Backbone(pipe)
    conditioning = backbone.condition([PROMPT], **call)
    text = backbone.denoiser_call(conditioning.arguments).text
    for scheduler in VP:
        if kind == "sample" and scheduler in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler):
            continue  # diffusers has no such form of these
        pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "prediction_type": kind})
        with planted(backbone, text) as calls:
            found, _ = predicted(pipe, call, 2)
        _, *answers = at_step(calls, 2)
        assert torch.allclose(found.double(), guided(backbone, call, *answers), atol=2e-5), scheduler.__name__


CUTS = {"one": [(3, 1)], "two": [(2, 2), (4, 1)], "last": [(6, 1)]}


@pytest.mark.parametrize("setting", BUILDERS, indirect=True)
@pytest.mark.parametrize("schedule", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("look", ["ahead", "ahead-conditional"])
def test_scores_rows_and_winner(setting, look, schedule):
    """Scores are the judge's own of each candidate's prediction; rows those of the plan and of a count by hand."""
    judge, call = setting.judge(tap=2), setting.call
    result = prism.best_of_n(
        setting.pipe, judge, tiny.PROMPT, 3, schedule, look=look, judge_at=600, seed=4, batch_size=1, **call
    )
    video, latents, _ = setting.stock(result.seed)
    assert torch.equal(result.latents, latents)
    assert (result.video == video).all()

    steps, two_calls = call["num_inference_steps"], judge.backbone.family.cfg == "two_calls"
    load = Workload(3, (2,) * steps, judge.backbone.family.cfg, 2 / 3)
    assert result.ledger.denoiser_rows == pytest.approx(Early(schedule, look=look).settled(load).rows(load))
    rows, alive, done = 0.0, 3, 0
    for step, keep in schedule:
        rows += 2 * alive * (step - 1 - done) + alive * 2 * 2 / 3
        if look == "ahead":
            rows += 2 * alive
        else:
            rows += alive + (keep if two_calls else 2 * keep)
        alive, done = keep, step
    assert result.ledger.denoiser_rows == pytest.approx(rows + 2 * alive * (steps - done))
    assert result.ledger.vae_decodes == 1

    if look == "ahead":
        arguments = normalised({**call, "output_type": "latent"})
        step = schedule[0][0]
        clean = [sample(judge.backbone, tiny.PROMPT, seed, arguments, (step,)).predicted[0] for seed in (4, 5, 6)]
        cut = result.scores[0]
        assert (cut["step"], cut["t"], cut["candidates"]) == (step, 600, [0, 1, 2])
        draws = torch.Generator().manual_seed(random.Random("judge 4").randrange(2**62))
        expected, _ = judge.score_clean(torch.stack(clean), tiny.PROMPT, 600, num_draws=2, generator=draws, **arguments)
        assert torch.allclose(torch.tensor(list(cut["scores"].values())).T, expected, atol=1e-4)
        assert (expected - expected[:1]).abs().max() > 1e-3


def measured(t, low, high, dimension="overall"):
    """An accuracy of a head as `prism eval` measures it."""
    return {
        **{"t": t, "dimension": dimension, "set": "test", "pairs": 90, "prompts": 30},
        **{"without_ties": (low + high) / 2, "without_ties_ci95": [low, high]},
    }


BLIND_EARLY = [measured(899, 0.44, 0.58), measured(699, 0.61, 0.72), measured(899, 0.7, 0.8, "VQ")]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_by_default_cuts_look_ahead_where_the_head_is_measured_to_see_nothing(setting, batch_size, tmp_path):
    """At t = 899 as they stand it is not told from chance, and at 699 it is: each cut by the nearer of the two."""
    setting.judge(tap=2).save_pretrained(tmp_path / "head", trained_on={}, evaluation=BLIND_EARLY)
    backbone = Backbone(setting.pipe)
    steps = backbone.steps({**setting.call, **backbone.batch([tiny.PROMPT], [4], setting.call)})
    expected = ["ahead" if steps.levels[step - 1] > 799 else "now" for step in (2, 4, 5)]
    assert expected == ["ahead", "now", "now"]
    run = {"n": 4, "schedule": "2:3,4:2,5:1", "seed": 4, "batch_size": batch_size, **setting.call}
    judge = Judge.from_pretrained(tmp_path / "head", setting.pipe)
    result = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, **run)
    assert [cut["look"] for cut in result.scores] == expected
    assert result.scores[0]["t"] == 700
    same = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, look=expected, **run)
    assert same.scores == result.scores
    plain = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, look="now", **run)
    assert plain.scores == prism.best_of_n(setting.pipe, setting.judge(tap=2), tiny.PROMPT, **run).scores
    assert "look" not in plain.scores[0]

    _, latents, _ = setting.stock(result.seed)
    assert torch.allclose(result.latents, latents, atol=1e-4)
    assert batch_size > 1 or torch.equal(result.latents, latents)
    # Steps 1 and 2 for four, who are judged twice; then three to step 3, a cut of each kind, and the last step.
    now = (lambda n, keep: min(n + keep, n * 2 / 3 + 2 * keep)) if backbone.family.cfg == "two_calls" else None
    now = now or (lambda n, keep: min(2 * n, n * 2 / 3 + 2 * keep))
    rows = 2 * 2 * 4 + 4 * 2 * 2 / 3 + 2 * 3 + now(3, 2) + now(2, 1) + 2
    assert result.ledger.denoiser_rows == pytest.approx(rows)


def test_the_default_look_is_now_where_accuracies_do_not_say_otherwise(wan, tmp_path):
    backbone = Backbone(wan.pipe)
    steps = backbone.steps({**wan.call, **backbone.batch([tiny.PROMPT], [4], wan.call)})

    def looks(rows, weights=None, judge_at=700.0, pipe=backbone):
        judge = SimpleNamespace(evaluation=rows)
        return set(defaults(pipe, judge, weights or {"overall": 1.0}, steps, judge_at))

    assert looks(BLIND_EARLY) == {"now", "ahead"}
    assert looks([]) == looks(BLIND_EARLY, judge_at=900.0) == set()
    assert looks(BLIND_EARLY, {"VQ": 1.0}) == looks(BLIND_EARLY, {"VQ": 0.5, "overall": 0.5}) == set()
    # At t = 899 above chance, and less than .1 below the accuracy at 700 from t = 869 on (by the straight line).
    rows = [measured(899, 0.57, 0.63), measured(699, 0.68, 0.75), measured(499, 0.7, 0.77)]
    expected = tuple("ahead" if t > 869 else "now" for t in steps.levels)
    assert 1 < expected.count("ahead") < len(expected)
    assert defaults(backbone, SimpleNamespace(evaluation=rows), {"overall": 1.0}, steps, 700.0) == expected
    assert looks([measured(899, 0.59, 0.65), *rows[1:]]) == set()
    unmeasured = [{**row, "without_ties_ci95": None} for row in BLIND_EARLY]
    assert looks(unmeasured) == set()
    heun = tiny.wan()
    heun.scheduler = FlowMatchHeunDiscreteScheduler()
    assert looks(BLIND_EARLY, pipe=Backbone(heun)) == set()


def test_candidates_are_compared_under_the_same_draws(wan):
    """A judge that is asked twice for one seed gives one score, in whatever batch it comes."""
    judge = wan.judge(tap=2)
    with pytest.warns(UserWarning, match="given more than once"):
        result = prism.best_of_n(
            wan.pipe, judge, tiny.PROMPT, schedule="3:1", look="ahead", seeds=[4, 5, 4], batch_size=2, **wan.call
        )
    for column in result.scores[0]["scores"].values():
        assert column[0] == pytest.approx(column[2], abs=1e-5)
        assert column[0] != pytest.approx(column[1], abs=1e-4)


def test_a_cut_on_the_other_denoiser_is_judged_at_a_level_of_the_heads():
    pipe, call = VARIANTS["wan22_a14b_t2v"]()
    backbone = Backbone(pipe)
    judge = Judge.untrained(backbone, tap=2, dim=16)
    steps = backbone.steps({**call, **backbone.batch([PROMPT], [3], call)})
    other = steps.readable.index(False) + 1
    low, high = backbone.t_range
    with pytest.raises(PrismError, match="does not run on the denoiser that the head reads"):
        prism.best_of_n(pipe, judge, PROMPT, 2, [(other, 1)], **call)
    result = prism.best_of_n(pipe, judge, PROMPT, 2, [(other, 1)], look="ahead", **call)
    assert low <= result.scores[0]["t"] <= high


def test_what_cannot_look_ahead_is_refused_before_any_row(wan):
    rows = []
    with pytest.raises(PrismError, match="look is one of now, ahead, ahead-conditional; found up"):
        prism.best_of_n(wan.pipe, wan.judge(), tiny.PROMPT, 2, look="up", **wan.call)
    for several, cuts in ((["ahead"], "1:1,3:1"), (["ahead", "now"], None), ([], "3:1")):
        counted = f"a schedule of {cuts.count(':')}" if cuts else "no schedule"
        with pytest.raises(PrismError, match=f"look (names one per cut; found {len(several)} for {counted}|is one of)"):
            prism.best_of_n(wan.pipe, wan.judge(), tiny.PROMPT, 2, cuts, look=several, **wan.call)
    with pytest.raises(PrismError, match='A look belongs to the strategy "early", and this run\'s is "full"'):
        prism.best_of_n(wan.pipe, wan.judge(), tiny.PROMPT, 2, strategy="full", look="ahead", **wan.call)
    pipe = tiny.wan()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.transformer.register_forward_hook(lambda *_: rows.append(1))
    with pytest.raises(PrismError, match=r"FlowMatchHeunDiscreteScheduler do not tell the clean .*look=\"now\""):
        prism.best_of_n(pipe, Judge.untrained(pipe, tap=1, dim=16), tiny.PROMPT, 2, look="ahead", **tiny.CALL_WAN)
    pipe, call = VARIANTS["skyreels_v2_df"]()
    with pytest.raises(PrismError, match="steps copies of its scheduler"):
        prism.best_of_n(pipe, Judge.untrained(pipe, tap=1, dim=16), PROMPT, 2, look="ahead", **call)
    assert not rows
