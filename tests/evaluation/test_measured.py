"""Plans that were played are compared with replayed ones on the same prompts, and chosen where they are better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import score_tables, tiny

import prism
from prism import cli, files
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import measured
from prism.evaluation.planning import Replayed
from prism.evaluation.recorded import Recorded
from prism.judge import Judge
from prism.judge.scoring import head_digest
from prism.lab.matched import ARMS, FEW_STEPS, WHOLE
from prism.report import plan_page
from prism.sampling import plan_files
from prism.sampling.noise_search import LatentBeams
from prism.sampling.particles import FKSteering
from prism.sampling.plan import Plan, Workload
from prism.sampling.strategies import STRATEGIES, Early

ROWS = 6.0  # of one plain sample of `score_tables`: three steps with guidance


def entry(plan: Plan, n: int, rows: float, *values: float) -> dict[str, Any]:
    settings = plan_files.settings_of(plan)
    return {
        "plan": {"strategy": plan.strategy, "settings": settings},
        "n": n,
        "rows": rows,
        "values": list(values),
    }


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(scores: Recorded, *runs: tuple[Plan, int, float, float], prompts: int = 60, seed: int = 1) -> list[Any]:
    """Per prompt, runs whose values are the mean of the prompt's rewards and a share of its oracle's gain, noisily."""
    random, rewards = np.random.default_rng(seed), scores.rewards["overall"]
    lines = []
    for prompt, values in list(zip(scores.prompts, rewards))[:prompts]:
        perfect = values.max() - values.mean()
        made = [
            entry(plan, n, rows, values.mean() + share * perfect + random.normal(0, 0.02))
            for plan, n, rows, share in runs
        ]
        lines.append({"prompt": prompt, "runs": made})
    return lines


def beside(scores: Recorded, lines: list[Any], folder: Path, **options: Any) -> Any:
    plays, others = measured.read([written(folder / "lines.jsonl", lines)], 3)
    return measured.beside(scores, plays, "overall", others, **options)


BEAM, FK = LatentBeams(keep=1, search_schedule=[1, 2]), FKSteering(keep=1, resample_frequency=1)


@pytest.fixture(scope="module")
def scores() -> Recorded:
    return score_tables.made(60, 4)


def test_a_search_that_is_better_is_chosen_and_one_that_is_worse_is_not(scores: Recorded, tmp_path: Path) -> None:
    runs = [(BEAM, 3, 12.0, 0.97), (FK, 3, 12.0, 0.1), (FK, 2, 9.0, 0.05)]
    part, played, facts = beside(scores, lines_of(scores, *runs), tmp_path)
    replayed = Replayed.of(part.table("overall"), part.load, 0, played)
    assert (facts["plans"], facts["prompts"], facts["not_played"], facts["agreement"]) == (3, 60, 0, None)
    row = replayed.chosen(2.0)
    assert (row["how"], row["strategy"], row["n"], row["cost"]) == ("played", "beam", 3, 2.0)
    # Brute force: shares on the other half, by hand.
    _, reporting = replayed.halves
    rewards = scores.rewards["overall"][reporting]
    lines = [lines_of(scores, *runs)[index]["runs"][0]["values"][0] for index in reporting]
    perfect = (rewards.max(1) - rewards.mean(1)).sum()
    assert row["share"] == pytest.approx((lines - rewards.mean(1)).sum() / perfect)
    assert replayed.chosen(1.9)["how"] == "replayed"  # it costs 2
    (rival, cheap) = replayed.rivals([2.0, 1.5])
    assert (rival["chosen"], rival["played"]) == (
        "played",
        "3 seeds, beam, keep 1, search_schedule [1, 2]",
    )
    assert rival["over"] == pytest.approx(row["share"] - rival["replayed_share"])
    assert rival["over_ci95"] is not None
    assert rival["over_ci95"][0] > 0
    assert (cheap["chosen"], cheap["played_cost"]) == ("replayed", 1.5)
    sentence = plan_page.rivals_sentence([rival, cheap])
    assert sentence.startswith("A search that was played is the plan of the budgets 2; the best one is above the best ")
    worse = Replayed.of(part.table("overall"), part.load, 0, beside(scores, lines_of(scores, *runs[1:]), tmp_path)[1])
    bare = Replayed.of(scores.table("overall"), scores.load, 0)
    for budget in (1.5, 2.0, 3.0):
        assert worse.chosen(budget) == bare.chosen(budget)
    assert worse.sizes() == bare.sizes()
    assert worse.fulls() == bare.fulls()


def test_prompts_and_plans_that_only_one_side_has_are_left_out(scores: Recorded, tmp_path: Path) -> None:
    early = Early(schedule=((2, 1),), look="now")
    lines = lines_of(scores, (BEAM, 3, 12.0, 0.9), (early, 4, 11.0, 0.5), prompts=30)
    for line in lines[:5]:  # a plan that was added to some prompts
        line["runs"].append(entry(FK, 2, 9.0, 0.5))
    lines.append({"prompt": "another", "runs": [entry(BEAM, 3, 12.0, 0.5)]})
    lines[0]["runs"].append({"arm": "the referee", "n": 3, "rows": 3.0, "values": [1.0], "plan": None})
    part, played, facts = beside(scores, lines, tmp_path)
    assert [run.plan.strategy for run in played.runs] == ["beam"]  # the cut is replayed
    assert part.prompts == scores.prompts[:30]
    assert {name: facts[name] for name in ("not_played", "not_recorded", "not_on_all", "no_plans")} == {
        "not_played": 30, "not_recorded": 1, "not_on_all": 1, "no_plans": ["the referee"],
    }  # fmt: skip
    assert facts["agreement"] is not None
    assert facts["agreement"]["plans"] == 1
    table = part.table("overall")
    replay = Replayed.of(table, part.load)
    own = next(k for k, run in enumerate(replay.runs) if run.n == 4 and run.plan == early)
    expected = [line["runs"][1]["values"][0] for line in lines[:30]] - table.values.mean(1) - replay.gains[own]
    assert facts["agreement"]["apart"] == pytest.approx(expected.sum() / table.oracle.sum())
    sentence = plan_page.measured_sentence(facts)
    assert "compared on the 30 prompts that have both. Left out: 30 recorded prompts were not played" in sentence


def test_gains_are_over_the_plays_own_plain_candidates(scores: Recorded, tmp_path: Path) -> None:
    """Of other seeds, which here are twice as far apart: half of each gain is luck."""
    lines = lines_of(scores, (BEAM, 3, 12.0, 0.9))
    before = beside(scores, lines, tmp_path)[1].gains
    for line, rewards in zip(lines, scores.rewards["overall"]):
        mean = rewards.mean()
        line["values"] = [(mean + 2 * (rewards - mean)).tolist()]
        (run,) = line["runs"]
        run["values"] = [mean + 2 * (run["values"][0] - mean)]
    _, played, facts = beside(scores, lines, tmp_path)
    assert facts["own_base"]
    assert facts["scale"] == pytest.approx(0.5)
    assert played.gains == pytest.approx(before)
    for line in lines:
        line["values"] = [(np.array(line["values"][0]) + 0.3).tolist()]
    with pytest.raises(PrismError, match=r"have a mean reward \+0\.3 from the store's on the same 60 prompts"):
        beside(scores, lines, tmp_path)


def test_noisy_means_are_believed_as_far_as_they_differ_by_more_than_noise() -> None:
    random = np.random.default_rng(0)
    costs = np.tile([1.2, 2.0, 3.0], 6)
    arms = [str(index // 3) for index in range(18)]
    raw, steady = [], []
    for _ in range(40):
        truth = np.repeat(random.normal(-0.1, 0.05, 6), 3)
        excess = truth[:, None] + random.normal(0, 1, (18, 60))
        for chosen, believed in ((raw, excess.mean(1)), (steady, measured.steadied(excess, costs, arms))):
            chosen.append(truth[believed.argmax()] if believed.max() > 0 else 0.0)  # the replayed plan
    assert np.mean(steady) > np.mean(raw) + 0.02
    same = np.full((5, 8), 0.25)
    assert measured.steadied(same, np.ones(5), list("abcde")) == pytest.approx(np.full(5, 0.25))


RUN = entry(BEAM, 3, 12.0, 0.5)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"line 2 of .*lines.jsonl is no JSON"),
        ([1], "The field 'prompt' of line 2 of .* must be a text; found None"),
        ({"prompt": "p"}, "The field 'runs' of line 2 of .* must be a list"),
        ({"prompt": "p", "runs": [3]}, "The run 1 in line 2 of .* must be an object; found 3"),
        ({"prompt": "p", "runs": [{**RUN, "plan": 4}]}, "The plan of run 1 in line 2 of .* must be an object"),
        ({"prompt": "p", "runs": [{**RUN, "rows": 0}]}, "The rows of run 1 .* must be a number above 0"),
        ({"prompt": "p", "runs": [{**RUN, "values": []}]}, "The values of run 1 .* it is empty"),
        (
            {"prompt": "p", "runs": [{**RUN, "values": ["x"]}]},
            "The values of run 1 .* must be a finite number; found x",
        ),
        ({"prompt": "p", "runs": [RUN], "values": [[1], [2]]}, "has 1 values, and the line plain candidates of 2"),
        ({"prompt": "p", "runs": [{**RUN, "n": 0}]}, "The number n of run 1 .* must be a whole number"),
        (
            {"prompt": "p", "runs": [{**RUN, "plan": {"strategy": "beam", "settings": {"keeps": 1}}}]},
            "The strategy beam of run 1 in line 2 of .* has no setting keeps; did you mean keep",
        ),
    ],
)
def test_a_line_that_is_none_is_refused(line: Any, sentence: str, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "p", "runs": [RUN]}) + f"\n{text}\n")
    with pytest.raises(PrismError, match=sentence):
        measured.read([tmp_path / "lines.jsonl"], 3)


def test_lines_of_something_else_are_refused(scores: Recorded, tmp_path: Path) -> None:
    for lines, sentence in (
        (lines_of(scores, (BEAM, 3, 12.0, 0.9), prompts=7), "Only 7 of the 60 recorded prompts were also played"),
        (lines_of(scores, (BEAM, 3, 12.0, 90.0)), "they are of another reward than --by"),
        (lines_of(scores, (BEAM, 3, 60.0, 0.9)), "took 60 denoiser rows, .* played with other steps or guidance"),
        (lines_of(scores, (Early(schedule=((2, 1),), look="now"), 4, 11.0, 0.5)), "can be replayed, and were"),
    ):
        with pytest.raises(PrismError, match=sentence):
            beside(scores, lines, tmp_path)
    with pytest.raises(PrismError, match="holds a plan that was played"):
        measured.read([written(tmp_path / "none.jsonl", [{"prompt": "p", "runs": [{**RUN, "n": 1}]}])], 3)
    with pytest.raises(PrismError, match=r"The --measured .*missing.* cannot be read"):
        measured.read([tmp_path / "missing.jsonl"], 3)
    (tmp_path / "cut.jsonl").write_text(json.dumps({"prompt": "p", "runs": [RUN]}) + '\n{"prompt": "q", "ru')
    assert list(measured.read([tmp_path / "cut.jsonl"], 3)[0]) == ["p"]  # what a kill left unfinished


def test_every_plan_goes_through_a_file() -> None:
    plans = [arm.plan for arms in (ARMS, WHOLE, FEW_STEPS) for arm in arms.values()]
    plans += [kind() for kind in STRATEGIES.values()]
    for plan in plans:
        filed = {"strategy": plan.strategy, "settings": plan_files.settings_of(plan), "n": 4}
        if plan.needs_oracle():
            with pytest.raises(PrismError, match="needs a function that no file holds"):
                plan_files.run_of(filed, 20, "it")
            continue
        once = plan_files.run_of(json.loads(json.dumps(filed)), 20, "it")
        again = plan_files.run_of({**filed, "settings": plan_files.settings_of(once.plan)}, 20, "it")
        assert plan_files.settings_of(again.plan) == plan_files.settings_of(once.plan)
        assert measured.closed_form(once, Workload(4, (2,) * 20, "two_calls", 5 / 6)) >= 40


def test_a_played_search_is_planned_filed_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From runs of a real pipeline to a run of the plan that is a search."""
    monkeypatch.chdir(tmp_path)
    backbone = Backbone(tiny.wan())
    judge = Judge.untrained(backbone, tap=1, dim=16)
    scores = score_tables.made(20, 3)
    scores.about.update({
        "name": "tiny", "family": "wan", "backbone": backbone.fingerprint(), "call": tiny.CALL_WAN,
        "head": head_digest(judge), "num_inference_steps": 6, "store": {}, "split": "all", "states": [2],
        "levels": [700], "num_draws": 1, "seed": 0,
    })  # fmt: skip
    scores.about["workload"].update(calls=[2] * 6, readable=[True] * 6, tap_share=1 / 3)
    scores.save(Path("scores.parquet"))
    result: Any = prism.best_of_n(backbone.pipe, judge, tiny.PROMPT, 2, plan=BEAM, **tiny.CALL_WAN)
    for prompt, values in zip(scores.prompts, scores.rewards["overall"]):
        measured.record("played.jsonl", prompt, BEAM, result, float(values.max()))
    with pytest.raises(PrismError, match="value must be a finite number"):
        measured.record("played.jsonl", "p", BEAM, result, float("nan"))
    (play,) = measured.read(["played.jsonl"], 6)[0][scores.prompts[3]]
    assert (play.run.n, play.run.plan.strategy, plan_files.settings_of(play.run.plan)["keep"]) == (2, "beam", 1)
    assert play.rows == result.ledger.denoiser_rows
    command = ["plan", "--from-scores", "scores.parquet", "--measured", "played.jsonl", "--budget", "4", "--out", "out"]
    assert cli.main(command) == 0
    assert "A search that was played is the plan of the budgets 4" in " ".join(capsys.readouterr().out.split())
    filed = files.read_json("out/plan.json")
    assert filed["plans"][0]["how"] == "played"
    assert "Searches that were played" in Path("out/report.html").read_text(encoding="utf-8")
    planned: Any = prism.best_of_n(backbone.pipe, judge, tiny.PROMPT, plan="out", budget=4, **tiny.CALL_WAN)
    assert (planned.index, planned.top[0].edits) == (result.index, result.top[0].edits)
    assert planned.ledger.denoiser_rows == pytest.approx(filed["plans"][0]["cost"] * 12)


def test_what_all_plans_share_draws_none_of_them_to_the_mean() -> None:
    """The luck of the replayed plan that all are compared with is no reason to believe less in one that differs."""
    random = np.random.default_rng(0)
    truth = np.repeat([0.3, 0.0, -0.1, -0.2], 3)
    excess = truth[:, None] + random.normal(0, 0.1, (12, 40))
    arms, costs = [str(index // 3) for index in range(12)], np.tile([1.2, 2.0, 3.0], 4)
    luck = random.normal(0, 3, 40)
    apart = measured.steadied(excess + luck - luck.mean(), costs, arms)
    assert apart == pytest.approx(measured.steadied(excess, costs, arms))
    assert apart[:3] == pytest.approx(excess[:3].mean(1), abs=0.05)
