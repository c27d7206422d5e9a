"""Where a search says something: judges that know nothing, cuts that see nothing, results in a line."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tests import tiny
from tests.works import works

from prism import Judge
from prism.errors import PrismError
from prism.preference import LatentStore
from prism.sampling import best_of_n, ranking
from prism.sampling.particles import FKSteering
from prism.sampling.replay import check_noise
from prism.sampling.strategies import Full, plan_of
from prism.shapeworld import asset_folder


def search(setting, judge, **options):
    return best_of_n(setting.pipe, judge, tiny.PROMPT, **{"n": 2, "schedule": [(2, 1)], **options}, **setting.call)


def test_an_untrained_judge_is_told_once(wan):
    judge = wan.judge()
    with pytest.warns(UserWarning, match="This judge is untrained: its scores are noise"):
        search(wan, judge)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(wan, judge)
        search(wan, judge, n=1, schedule=[(1, 1)])  # nothing is dropped
    latents = wan.stock(0)[1]
    with pytest.warns(UserWarning, match="untrained"):
        wan.judge().score(latents, tiny.PROMPT, 500.0, height=32, width=32, num_frames=9)
    with pytest.warns(UserWarning, match="untrained"):
        search(wan, Judge.average([wan.judge(), wan.judge(seed=1)]), strategy="full", schedule=None)


def test_an_untrained_judge_may_be_made_in_inference_mode(wan):
    with torch.inference_mode():
        judge = wan.judge()
    assert judge.is_untrained


def test_a_trained_or_loaded_judge_is_not_warned_of(wan, tmp_path):
    judge = wan.judge()
    assert judge.is_untrained
    optimiser = torch.optim.SGD(judge.head.parameters(), lr=0.1)
    with torch.enable_grad():
        sum(weight.sum() for weight in judge.head.parameters()).backward()
    optimiser.step()
    assert not judge.is_untrained
    judge.save_pretrained(tmp_path / "head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(wan, judge)
        search(wan, Judge.from_pretrained(tmp_path / "head", wan.pipe))


def test_a_judge_may_be_the_folder_of_its_run(wan, tmp_path):
    judge = wan.judge()
    judge.save_pretrained(tmp_path / "run" / "head")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own
    expected = search(wan, judge)
    for folder in (tmp_path / "run" / "head", str(tmp_path / "run")):
        assert search(wan, folder).scores == expected.scores
    with pytest.raises(PrismError, match="does not exist"):
        search(wan, tmp_path / "no")


@works(
    "Schedulers and steps",
    "Few steps, so that the first cut comes at step 1",
    "warned",
    "step 1 sees pure noise, so that candidates are dropped at random: cut later, or take the strategy full or draft",
)
def test_a_first_cut_at_step_one_is_told(wan):
    judge = wan.judge()
    for schedule in ([(1, 1)], "1:1"):
        with pytest.warns(UserWarning, match="The first cut comes at step 1 of 6, which sees pure noise"):
            search(wan, judge, schedule=schedule)
    with pytest.warns(UserWarning, match="step 1"):  # the default of so few steps
        search(wan, judge, schedule=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(wan, judge)


def test_a_judge_without_overall_ranks_by_the_mean_and_says_so(wan):
    judge = Judge.untrained(wan.pipe, tap=1, dim=16, dimensions=("VQ", "TA"))
    with pytest.warns(UserWarning, match="no dimension overall; candidates are ranked by the mean of VQ, TA"):
        result = search(wan, judge, n=3)
    scores = result.scores[0]["scores"]
    means = [(one + other) / 2 for one, other in zip(scores["VQ"], scores["TA"])]
    assert result.index == means.index(max(means))
    assert ranking(judge, "TA") == {"TA": 1.0}
    with pytest.raises(PrismError, match="no dimension 'MQ'"):
        ranking(judge, "MQ")


@pytest.mark.parametrize(
    ("strategy", "setting", "belongs"),
    [
        (
            "early",
            {"draft_steps": 3},
            r'A length of drafts \(draft_steps\) belongs to the strategy "draft", and .* "early"',
        ),
        ("none", {"judge_at": 600}, 'to judge at .* "early", "race", "draft", .* or "full", and this run\'s is "none"'),
        ("race", {"num_draws": 4}, "A number of noise draws"),
        ("full", {"oracle": len}, 'An oracle belongs to the strategy "oracle"'),
    ],
)
def test_settings_of_another_strategy_are_refused(strategy, setting, belongs):
    with pytest.raises(PrismError, match=belongs):
        plan_of(strategy, **setting)
    plan_of(strategy, num_draws=2, until=0.9, **({} if strategy != "none" else setting))  # rounds are judged at it


def test_a_population_that_costs_more_than_full_says_so(wan):
    judge, rows = wan.judge(tap=2), {}
    with pytest.warns(UserWarning, match='The strategy "fk" takes .* it runs 3 candidates to the end') as told:
        rows["fk"] = search(wan, judge, n=3, schedule=None, strategy="fk").ledger.denoiser_rows
    for name, plan in (("one", FKSteering(keep=1)), ("full", Full())):  # nothing is said of these: warnings are errors
        rows[name] = search(wan, judge, n=3, schedule=None, plan=plan).ledger.denoiser_rows
    shares = [f"{rows[name] / rows['full']:.0%}" for name in ("fk", "one")]
    sentence = next(str(each.message) for each in told if "fk" in str(each.message))
    assert f"takes {shares[0]} of" in sentence
    assert sentence.endswith(f"FKSteering(keep=1) it takes {shares[1]}.")


def test_results_print_as_a_line(wan):
    judge = wan.judge()
    result = search(wan, judge, seeds=[7, 8], n=None, top_k=2, schedule=[(2, 2)])
    tokens = judge.backbone.tokens(wan.stock(0)[1], judge.backbone.condition([tiny.PROMPT], **wan.call), 500.0, (1, 2))
    lines = {
        "BestOfNResult(seed ": result,
        "Pick(seed ": result.top[0],
        "Judge(untrained, 1 heads, taps (1,)": judge,
        "Backbone(WanPipeline, ": judge.backbone,
        "Ledger(": result.ledger,
        "Tokens(1 rows of ": tokens,
        "LatentStore(": LatentStore.open(asset_folder("candidates")),
    }
    for start, thing in lines.items():
        assert repr(thing).startswith(start)
        assert len(repr(thing)) < 300
        assert "\n" not in str(thing)
    assert "and 1 more of 2 candidates, 9 x 32 x 32 x 3, " in str(result)


@pytest.mark.parametrize("strategy", ["draft", "none"])
def test_a_scheduler_that_the_pipelines_loop_cannot_use_is_told(strategy):
    pipe = tiny.wan()
    pipe.scheduler = DDIMScheduler()
    judge = Judge.untrained(pipe, tap=2, dim=16)
    with pytest.raises(
        PrismError, match=r"^DDIMScheduler and WanPipeline do not go together \(.*; set another scheduler"
    ):
        best_of_n(pipe, judge, tiny.PROMPT, n=2, strategy=strategy, **tiny.CALL_WAN)


def test_asking_a_scheduler_for_its_noise_has_diffusers_say_nothing(caplog):
    logger = logging.getLogger("diffusers.schedulers.scheduling_euler_discrete")
    logger.addHandler(caplog.handler)
    try:
        check_noise(SimpleNamespace(scheduler=EulerDiscreteScheduler()), False)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
