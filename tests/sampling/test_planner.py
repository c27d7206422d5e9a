"""Replayed plans pick what a naive loop picks, cost what the ledger counts, and are found in files for a budget."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.sampling.conftest import Setting

import prism
from prism import files
from prism.errors import PrismError
from prism.judge import Judge
from prism.judge.scoring import head_digest
from prism.sampling import plan_files, planner
from prism.sampling.plan import Workload
from prism.sampling.planner import Reading, Run, Table
from prism.sampling.strategies import Early, First, Full

LOAD = Workload(5, (2,) * 20, "two_calls", 5 / 6)
STEPS, LEVELS, DRAWS = (2, 4, 5), (500.0, 700.0), 2


def table(prompts: int = 6, n: int = 5, seed: int = 0) -> Table:
    """Scores in whole numbers, so that there are ties."""
    random = np.random.default_rng(seed)
    readings = [Reading("now", step, 1000 - 50 * step, 0) for step in STEPS]
    for t, draw in itertools.product(LEVELS, range(DRAWS)):
        readings += [Reading("ahead", step, t, draw) for step in STEPS] + [Reading("finished", 0, t, draw)]
    scores = {reading: random.integers(0, 4, (prompts, n)).astype(float) for reading in readings}
    return Table(random.random((prompts, n)), scores)


def naive_gain(data: Table, run: Run, prompt: int) -> float:
    """The mean gain over all subsets, candidate by candidate."""
    plan, picked = run.plan, []
    for members in itertools.combinations(range(data.n), run.n):
        alive = list(members)
        if isinstance(plan, Full):
            cuts: Any = [(0, 1)]
        else:
            assert isinstance(plan, Early)
            cuts = plan.schedule
        for number, (step, keep) in enumerate(cuts):
            look: Any = "finished" if isinstance(plan, Full) else plan.look
            look = look if isinstance(look, str) else look[number]
            levels = {r.t for r in data.scores if (r.look, r.step) == (look, step)}
            t = levels.pop() if look == "now" else plan.judge_at
            draws = 1 if look == "now" else plan.num_draws
            score = {c: sum(data.scores[Reading(look, step, t, d)][prompt, c] for d in range(draws)) for c in alive}
            alive = sorted(alive, key=lambda candidate: (-score[candidate], candidate))[:keep]
        picked.append(data.values[prompt, alive[0]])
    return float(np.mean(picked) - data.values[prompt].mean())


def test_every_plan_picks_what_a_naive_loop_picks():
    data = table()
    runs = planner.candidates(data)
    assert len(runs) == len(set(runs)) > 150
    assert {type(run.plan) for run in runs} == {First, Early, Full}
    for run in runs[1:]:
        expected = [naive_gain(data, run, prompt) for prompt in range(len(data.values))]
        assert planner.gains(data, run, LOAD) == pytest.approx(expected, abs=1e-12), run
    assert not planner.gains(data, runs[0], LOAD).any()


def test_costs_are_those_of_expected_rows():
    for n, cuts in ((5, ((4, 1),)), (3, ((2, 2), (5, 1)))):
        expected = prism.sampling.expected_rows("early", n, 20, "two_calls", True, 5 / 6, cuts)
        assert planner.cost(Run(n, Early(schedule=cuts)), LOAD) == pytest.approx(expected / 40)
    full = prism.sampling.expected_rows("full", 4, 20, "two_calls", True, 5 / 6, num_draws=3)
    assert planner.rows(Run(4, Full(num_draws=3)), LOAD) == pytest.approx(full)
    assert planner.cost(Run(1, First()), LOAD) == 1


def test_subsets_are_all_or_some_at_random():
    assert planner.subsets(4, 2).tolist() == [list(pair) for pair in itertools.combinations(range(4), 2)]
    some = planner.subsets(40, 20, seed=1, most=50)
    assert some.shape == (50, 20)
    assert len({tuple(row) for row in some.tolist()}) == 50
    assert (np.diff(some) > 0).all()
    assert (some == planner.subsets(40, 20, seed=1, most=50)).all()


def test_a_plan_without_recorded_scores_is_refused():
    with pytest.raises(PrismError, match="holds no scores ahead at step 3"):
        planner.gains(table(), Run(3, Early(schedule=((3, 1),), look="ahead", judge_at=700)), LOAD)
    with pytest.raises(PrismError, match="with 3 draws"):
        planner.gains(table(), Run(3, Full(judge_at=700, num_draws=3)), LOAD)
    with pytest.raises(PrismError, match="strategy early cannot be replayed"):
        planner.gains(table(), Run(3, Early(schedule=((2, 1),), look="ahead-conditional")), LOAD)


@pytest.mark.parametrize("budget", [1, 1.3, 2, 2.5, 8, 100])
def test_the_default_cut_has_as_many_candidates_as_a_budget_pays_for(budget: float):
    run = planner.largest(LOAD, budget)
    assert planner.cost(run, LOAD) <= budget
    assert planner.cost(Run(run.n + 1, Early()), LOAD) > budget
    assert isinstance(run.plan, First if run.n == 1 else Early)


# -- files


def content(wan: Setting, *plans: dict[str, Any]) -> dict[str, Any]:
    judge = wan.judge()
    about = {
        "family": judge.backbone.family.name,
        "backbone": judge.backbone.fingerprint(),
        "call": tiny.CALL_WAN,
        "num_inference_steps": 6,
        "head": head_digest(judge),
    }
    return plan_files.document(about, plans or [entry(1.5, 3, ((2, 1),))])


def entry(budget: float, n: int, cuts: Any, **settings: Any) -> dict[str, Any]:
    plan = Early(schedule=cuts, **settings)
    load = Workload(n, (2,) * 6, "two_calls", 1 / 3)
    settings = plan_files.settings_of(plan)
    cost = planner.cost(Run(n, plan), load)
    return {"budget": budget, "strategy": "early", "settings": settings, "n": n, "cost": cost, "share": 0.5}


def test_a_file_runs_as_its_plan_does(wan: Setting, tmp_path: Path) -> None:
    judge = wan.judge()
    plans = [entry(1.5, 2, ((2, 1),)), entry(3, 4, ((2, 2), (3, 1)), look="ahead", judge_at=500.0, num_draws=1)]
    files.write_json(tmp_path / "plan.json", content(wan, *plans))

    def run(**options: Any) -> Any:
        return prism.best_of_n(wan.pipe, judge, tiny.PROMPT, **options, **wan.call)

    told = run(plan=tmp_path, budget=3.5)
    said = run(plan=Early(schedule=((2, 2), (3, 1)), look="ahead", judge_at=500, num_draws=1), n=4)
    assert (told.index, told.scores, told.seeds) == (said.index, said.scores, said.seeds)
    assert told.ledger.denoiser_rows == pytest.approx(plans[1]["cost"] * 12)
    assert len(run(plan=str(tmp_path / "plan.json"), budget=2).seeds) == 2
    assert run(plan=content(wan), seeds=[4, 5]).seeds == (4, 5)
    assert len(run(plan=content(wan), n=5).seeds) == 5
    with pytest.raises(PrismError, match=r"The file .*plan.json holds plans for the budgets 1.5, 3; name a budget"):
        run(plan=tmp_path)
    with pytest.raises(PrismError, match=r"holds no plan within the budget 1\.01; the cheapest costs 1"):
        run(plan=tmp_path, budget=1.01)
    with pytest.raises(PrismError, match=r"budget is 0\.8 plain samples, and one video costs 1"):
        run(plan=tmp_path, budget=0.8)
    with pytest.raises(PrismError, match="A budget chooses among the plans of a file"):
        run(plan=Full(), budget=2)
    with pytest.raises(PrismError, match="The budget says schedule itself"):
        run(budget=2, schedule="2:1")


def test_a_budget_takes_the_heads_plans_and_else_the_default_cut(wan: Setting, tmp_path: Path) -> None:
    judge = wan.judge()
    result: Any = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, budget=2.5, **wan.call)
    assert result.ledger.denoiser_rows <= 2.5 * 12
    assert result.ledger.denoiser_rows == pytest.approx(planner.rows(Run(len(result.seeds), Early()), load(judge)))
    judge.plans = content(wan, entry(2, 3, ((3, 1),)))
    judge.save_pretrained(tmp_path / "head")
    carried = Judge.from_pretrained(tmp_path / "head", wan.pipe)
    assert carried.plans == judge.plans
    found = plan_files.within(2.5, carried.backbone, carried, wan.call)
    assert found.run == Run(3, Early(schedule=[[3, 1]]))  # type: ignore[arg-type]
    expected = "The plan for a budget of 2 plain samples, from the plans that the head carries: 3 candidates, early, "
    assert found.sentence() == f"{expected}schedule 3:1."
    below = plan_files.within(1, carried.backbone, carried, wan.call)
    assert (below.run, below.document) == (Run(1, First()), None)
    assert below.sentence().startswith("All plans that the head carries cost more: the default cut, with as many")
    assert len(plan_files.opened(tmp_path / "head").document["plans"]) == 1  # type: ignore[union-attr, index]
    judge.plans = None
    judge.save_pretrained(tmp_path / "head", overwrite=True)  # the file of plans goes with the old head
    assert not (tmp_path / "head" / "plans.json").exists()


def load(judge: Judge) -> Workload:
    return Workload.of(judge.backbone, tiny.CALL_WAN, 1, judge.tap)


def test_a_plan_for_another_run_is_refused_or_warned_of(wan: Setting) -> None:
    judge = wan.judge()
    own = content(wan)

    def check(changed: dict[str, Any], **call: Any) -> None:
        opened = plan_files.opened({**own, **changed})
        assert opened is not None
        plan_files.check_fits(opened, judge.backbone, judge, {**tiny.CALL_WAN, **call})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check({})
    with pytest.raises(PrismError, match="is for CogVideoX, and this pipeline is of the family"):
        check({"family": "CogVideoX"})
    with pytest.raises(PrismError, match="The plan is for 6 steps, and this call makes 7; call with num_inference"):
        check({}, num_inference_steps=7)
    with pytest.raises(PrismError, match="is for the denoiser Other, and this pipeline has WanTransformer3DModel"):
        check({"backbone": {**own["backbone"], "denoiser": "Other"}})
    with pytest.warns(UserWarning, match="was measured with guidance_scale 4.0, and this call has 1.0"):
        check({}, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="measured with another head"):
        check({"head": "0" * 16})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "holds no plans; name a plan.json"),
        ({"schema": 2}, "has schema 2; this version of prism reads schema 1"),
        ({"family": None}, "The field 'family' of the plan must be a text; found None"),
        ({"call": []}, "The field 'call' of the plan must be an object"),
        ({"num_inference_steps": "6"}, "'num_inference_steps' of the plan must be a whole number"),
        ({"plans": []}, "The field 'plans' of the plan must list plans"),
        (
            {"plans": [{"budget": 0.5, "cost": 1}]},
            "The budget of plan 1 of 1 in the plan must be a number of at least 1",
        ),
    ],
)
def test_a_foreign_document_is_refused(wan: Setting, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        plan_files.check({**content(wan), **change}, "the plan")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"strategy": "sooner"},
            "The strategy of the plan for budget 1.5 in the plan is sooner; this version of prism has none",
        ),
        ({"strategy": "oracle"}, "needs a function that no file holds"),
        ({"n": 0}, "The number n of the plan for budget 1.5 in the plan must be a whole number from 1"),
        ({"settings": {"speed": 2}}, "early of the plan for budget 1.5 .* has no setting speed; it has judge_at, num_"),
        ({"settings": {"judgeat": 2}}, "has no setting judgeat; did you mean judge_at"),
        ({"settings": [1]}, "The settings of the plan for budget 1.5 in the plan must be an object; found"),
        ({"settings": {"schedule": [[9, 1]]}}, "cannot be used: The schedule cuts at step 9"),
        ({"settings": {"schedule": 4}}, "cannot be used: The schedule is a list of cuts"),
        ({"settings": {"look": "back"}}, "cannot be used: look is one of"),
        ({"settings": {"judge_at": float("nan")}}, "cannot be used: judge_at must be"),
        ({"settings": {"num_draws": 0}}, "cannot be used: num_draws must be"),
    ],
)
def test_a_foreign_plan_is_refused(wan: Setting, change: dict[str, Any], sentence: str) -> None:
    made = content(wan)
    made["plans"][0] |= change
    with pytest.raises(PrismError, match=sentence):
        plan_files.check(made, "the plan")


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    for source, sentence in (
        (tmp_path / "none", "does not exist; name a plan.json"),
        (tmp_path, "holds no plan.json"),
        ("x" * 5000, "cannot be read|does not exist"),
    ):
        with pytest.raises(PrismError, match=sentence):
            plan_files.opened(source)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PrismError, match=r"plan\.json"):
        plan_files.opened(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps([1]))
    with pytest.raises(PrismError, match="holds no plans"):
        plan_files.opened(tmp_path)


def test_settings_survive_json():
    plan = Early(schedule=((2, 2), (4, 1)), look="ahead", judge_at=500, num_draws=1)
    settings = json.loads(json.dumps(plan_files.settings_of(plan)))
    run = plan_files.run_of({"strategy": "early", "settings": settings, "n": 4}, 20, "it")
    assert replace(run.plan, schedule=((2, 2), (4, 1))) == plan  # type: ignore[call-arg]
