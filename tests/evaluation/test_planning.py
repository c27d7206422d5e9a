"""A store's candidates, scored once, say what each plan would have picked; plans are chosen and reported apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny

import prism
from prism import cli, files, runs
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import planning, recorded
from prism.evaluation.planning import Replayed
from prism.evaluation.recorded import Recorded
from prism.judge import Judge
from prism.lab.bench import SCALES, Bench
from prism.lab.experiments import cuts
from prism.preference import LatentStore
from prism.preference.pairs import prompt_key
from prism.preference.prompts import Prompt
from prism.preference.sources import Place
from prism.report.metrics import validate
from prism.sampling import plan_files, planner
from prism.sampling.plan import Workload
from prism.sampling.planner import Reading, Run, Table
from prism.sampling.strategies import Early, Full
from prism.training.collect import collect
from prism.training.reward import Reward

TEXTS = ("a red circle moves right", "a blue square moves up", "a cat runs")
CALL = tiny.CALL_WAN
SEED = 3


def brightness(video, prompt):
    return {"VQ": float(video.mean()), "MQ": float(video.std())}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[LatentStore, Judge]:
    backbone = Backbone(tiny.wan())
    prompts = [Prompt(text, Place("prompts.txt", row), "test") for row, text in enumerate(TEXTS)]
    folder = tmp_path_factory.mktemp("planning") / "store"
    options: Any = {"candidates": 4, "states": (1, 2, 3), "progress": False}
    store = collect(prompts, backbone, CALL, folder, [Reward(brightness, "plain")], **options)
    return store, Judge.untrained(backbone, tap=2, dim=16)


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(recorded, "FEWEST", 3)


def scored(store: LatentStore, judge: Judge, folder: Path, **options: Any) -> Recorded:
    by_prompt, _ = recorded.candidates_of(store, "test", ())
    about = recorded.facts(judge, store, (500.0, 700.0), 2, SEED, "test")
    parts = runs.claim(folder, {"seed": SEED}, resume=True, name=runs.IDENTITY)
    return recorded.score(judge, store, by_prompt, about, parts, progress=False, **options)


@pytest.fixture(scope="module")
def scores(made, tmp_path_factory) -> Recorded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "FEWEST", 3)
        return scored(*made, tmp_path_factory.mktemp("parts") / "parts")


def test_a_run_of_the_plan_picks_what_the_table_says_and_costs_what_it_says(made, scores) -> None:
    _store, judge = made
    assert (scores.mean_of("overall"), scores.mean_of("VQ")) == (["VQ", "MQ"], [])
    data = scores.table("overall")
    assert data.steps("now") == [2, 3]  # step 1 is pure noise
    assert data.steps("ahead") == [1, 2, 3]
    chosen = [
        Run(3, Early(schedule=((2, 2), (3, 1)), look=("now", "ahead"), judge_at=700.0, num_draws=1)),
        Run(4, Early(schedule=((1, 3), (3, 1)), look="ahead", judge_at=500.0, num_draws=1)),
        Run(4, Full(judge_at=500.0, num_draws=2)),
    ]
    every = planner.candidates(data)
    about = scores.about
    for run in chosen:
        assert run in every
        members = np.arange(run.n)[None]
        picks = planner.picks(data, run.plan, members, scores.load)[:, 0]
        entry = {"budget": 9, "strategy": run.plan.strategy, "settings": plan_files.settings_of(run.plan), "n": run.n}
        plan = plan_files.document(about, [{**entry, "cost": planner.cost(run, scores.load)}])
        for row, prompt in enumerate(scores.prompts[:1]):
            seeds = scores.seeds[row, : run.n].tolist()
            result: Any = prism.best_of_n(
                judge.backbone.pipe, judge, prompt, seeds=seeds, plan=plan, seed=SEED, batch_size=1, **CALL
            )
            assert result.index == picks[row]
            assert result.ledger.denoiser_rows == pytest.approx(planner.rows(run, scores.load), rel=1e-12)
            for cut in result.scores:
                step = 0 if isinstance(run.plan, Full) else cut["step"]
                table = planner.deciding(data, run.plan, step)[row]
                assert cut["scores"]["overall"] == pytest.approx(table[cut["candidates"]].tolist(), abs=1e-4)


def test_heads_that_score_together_say_what_each_says_alone(made, tmp_path, monkeypatch) -> None:
    store, judge = made
    judges = [Judge.untrained(judge.backbone, tap=2, dim=16, seed=seed) for seed in (1, 2)]
    monkeypatch.setattr(Bench, "judges", lambda bench, name: judges)
    parts = runs.claim(tmp_path / "run", {"command": "test"})
    bench = Bench(parts, SCALES["full"], judge.backbone, CALL, store, SEED)
    tables, load = cuts._tables(bench)
    for number, (each, table) in enumerate(zip(judges, tables)):
        alone = scored(store, each, tmp_path / f"alone-{number}")
        assert load == alone.load
        expected = alone.table("overall")
        assert (table.values == expected.values).all()
        assert set(table.scores) == {reading for reading in expected.scores if reading.t != 500.0}
        for reading, column in table.scores.items():
            assert column == pytest.approx(expected.scores[reading], abs=1e-5)


def test_scores_survive_their_file_and_a_kill(made, scores, tmp_path, monkeypatch) -> None:
    store, judge = made
    scores.save(tmp_path / "scores.parquet")
    again = Recorded.load_file(tmp_path / "scores.parquet")
    assert again.prompts == scores.prompts
    assert (again.seeds == scores.seeds).all()
    assert again.about == scores.about
    assert again.load == scores.load
    for reading, values in scores.scores.items():
        assert (again.scores[reading] == values).all()
    for name, values in scores.rewards.items():
        assert (again.rewards[name] == values).all()
    calls: list[str] = []
    inner = recorded._score_prompt

    def dies(judge: Any, store: Any, prompt: str, *rest: Any) -> None:
        calls.append(prompt)
        if len(calls) == 2:
            raise KeyboardInterrupt
        inner(judge, store, prompt, *rest)

    monkeypatch.setattr(recorded, "_score_prompt", dies)
    with pytest.raises(KeyboardInterrupt):
        scored(store, judge, tmp_path / "parts")
    resumed = scored(store, judge, tmp_path / "parts")
    assert calls == [TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2]]  # the first one is not scored again
    for reading, values in scores.scores.items():
        assert (resumed.scores[reading] == values).all()


def test_stores_that_cannot_be_planned_on(made, tmp_path, monkeypatch) -> None:
    store, _judge = made
    known = [prompt_key(TEXTS[0])]
    with pytest.raises(PrismError, match=r"has 2 prompts with 4 labelled .* trained on .1 that it was trained on are"):
        recorded.candidates_of(store, "test", known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "FEWEST", 2)
        kept, left_out = recorded.candidates_of(store, "test", known)
    assert (len(kept), left_out) == (2, "1 prompt that the head was trained on; 2 remain")
    with pytest.raises(PrismError, match="in the split nowhere"):
        recorded.candidates_of(store, "nowhere", ())
    with pytest.raises(PrismError, match="The store has no reward TA for --by; it has VQ, MQ"):
        Recorded(TEXTS, np.zeros((3, 4)), {"VQ": np.zeros((3, 4)), "MQ": np.zeros((3, 4))}, {}, {}).reward("TA")
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(PrismError, match=r"scores.parquet.* holds no scores that prism plan left"):
        Recorded.load_file(tmp_path / "scores.parquet")
    backbone = Backbone(tiny.wan())
    prompts = [Prompt(text, Place("prompts.txt", row), "test") for row, text in enumerate(TEXTS[:1])]
    options: Any = {"candidates": 2, "progress": False}
    bare = collect(prompts, backbone, CALL, tmp_path / "bare", [Reward(brightness, "plain")], **options)
    with pytest.raises(PrismError, match="holds no trajectories; collect candidates with prism collect --states"):
        recorded.candidates_of(bare, "all", ())
    unlabelled = collect(prompts, backbone, CALL, tmp_path / "unlabelled", states=(2,), **options)
    with pytest.raises(PrismError, match="has no labels; have a reward label it"):
        recorded.candidates_of(unlabelled, "all", ())
    (bare.folder / "index.parquet").unlink()  # as a kill leaves it: written last
    (bare.folder / "seals.json").unlink(missing_ok=True)
    with pytest.raises(PrismError, match=r"bare is unfinished: its prism collect was stopped after 2 videos; run that"):
        recorded.candidates_of(LatentStore.open(bare.folder), "all", ())
    other = Judge.untrained(Backbone(tiny.cogvideox()), tap=1, dim=16)
    with pytest.raises(PrismError, match="is of the denoiser WanTransformer3DModel, and the backbone has CogVideoX"):
        recorded.facts(other, store, (700.0,), 1, 0, "test")


def test_the_command_writes_plans_that_sampling_takes(made, tmp_path, capsys, monkeypatch) -> None:
    store, judge = made
    monkeypatch.chdir(tmp_path)
    pipe = judge.backbone.pipe
    pipe.save_pretrained("backbone")
    files.write_json(Path("backbone/call.json"), CALL)
    judge.save_pretrained("head")
    models = ["--backbone", "backbone", "--head", "head"]
    plan = ["plan", "--data", str(store.folder), *models, "--budget", "1.5", "--budget", "36rows", "--num-draws", "1"]
    assert cli.main([*plan, "--save-to", "head", "--by", "VQ", "--out", "planned"]) == 0
    out = capsys.readouterr().out
    assert "A plan per budget" in out
    assert "Plans: planned/plan.json" in out
    names = {"config.json", "metrics.json", "plan.json", "plans.csv", "report.html", "scores.parquet"}
    assert {path.name for path in Path("planned").iterdir()} == names
    assert not Path("planned.parts").exists()
    metrics = files.read_json("planned/metrics.json")
    validate(metrics)
    assert [row["budget"] for row in metrics["plans"]] == [1.5, 3]
    page = Path("planned/report.html").read_text(encoding="utf-8")
    for words in (
        "Quality over cost",
        "A plan per budget",
        "Is there anything to choose?",
        "share of the oracle’s gain",
    ):
        assert words in page
    filed = files.read_json("planned/plan.json")
    assert filed == files.read_json("head/plans.json")
    assert [plan["cost"] <= plan["budget"] for plan in filed["plans"]] == [True, True]
    lines = Path("planned/plans.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == metrics["replayed"] + 1

    again = ["plan", "--from-scores", "planned/scores.parquet", "--budget", "1.5", "--by", "VQ"]
    assert cli.main([*again, "--out", "again"]) == 0
    assert files.read_json("again/metrics.json")["plans"] == metrics["plans"][:1]
    assert cli.main([*again, "--levels", "700", "--out", "other"]) == 2
    assert "leave --levels out" in capsys.readouterr().err
    assert cli.main([*again, "--budget", "3s", "--out", "other"]) == 2
    assert "A --budget in seconds needs the model" in capsys.readouterr().err

    sample = ["sample", "--prompt", TEXTS[0], *models]
    run = Run(3, Early(schedule=((2, 2), (3, 1)), look="ahead", judge_at=500.0, num_draws=1))
    load = Workload.of(judge.backbone, CALL, 1, judge.tap)
    cost, rows = planner.cost(run, load), planner.rows(run, load)
    entry = {"strategy": "early", "settings": plan_files.settings_of(run.plan), "n": 3, "cost": cost}
    filed["plans"][1] |= entry  # what an untrained head gains most by may be a plain sample
    for path in ("planned/plan.json", "head/plans.json"):
        files.write_json(Path(path), filed)
    for words, source in (
        (["--plan", "planned"], "the file planned/plan.json"),
        ([], "the plans that the head carries"),
    ):
        assert cli.main([*sample, *words, "--budget", "3", "--overwrite", "--out", "sampled"]) == 0
        (row,) = files.read_json("sampled/metrics.json")["best_of_n"]
        told = "3 candidates, early, judge_at 500, num_draws 1, schedule 2:2,3:1, look ahead."
        said = f"The plan for a budget of 3 plain samples, from {source}: {told}"
        assert said in capsys.readouterr().out
        assert (row["n"], row["schedule"], row["look"], row["judge_at"]) == (3, [[2, 2], [3, 1]], "ahead", 500)
        assert row["denoiser_rows"] == pytest.approx(rows)
    Path("head/plans.json").unlink()
    assert cli.main([*sample, "--budget", "18rows", "--out", "rows"]) == 0
    assert "with as many candidates as 1.5 plain samples pay for" in capsys.readouterr().out
    for words, sentence in (
        (["--plan", "planned"], "holds plans for the budgets 1.5, 3; name a budget"),
        (["--plan", "nowhere"], "The plan nowhere does not exist"),
        (["--plan", "planned", "--look", "ahead"], "The --plan decides what --look says; leave --look out"),
        (["--budget", "2", "--n", "3"], "The --budget decides how many candidates there are; leave --n out"),
        (["--budget", "0.5"], "The --budget is 0.5 plain samples, and one video costs 1"),
        (["--budget", "11rows"], "The --budget is 11 rows, and a plain sample takes 12"),
        (["--budget", "much"], "must be a number of plain samples, or one with its unit"),
        (["--plan", "planned", "--budget", "3", "--steps", "7"], "is for 6 steps, and this call makes 7"),
    ):
        assert cli.main([*sample, *words, "--out", "refused"]) == 2
        assert sentence in capsys.readouterr().err
        assert not Path("refused").exists()
    for words, sentence in (
        (["--by", "TA"], "The store has no reward TA for --by; it has VQ, MQ"),
        (["--select-by", "sound"], "The judge has no dimension 'sound' to select by"),
        (["--budget", "11rows"], "The --budget is 11 rows, and a plain sample takes 12"),
    ):
        assert cli.main([*plan, *words, "--out", "refused"]) == 2
        assert sentence in capsys.readouterr().err
        assert not list(Path().glob("refused*"))  # before anything was scored
    assert cli.main([*plan[:3], "--save-to", "backbone", "--out", "refused"]) == 2
    assert "is no head's folder" in capsys.readouterr().err
    assert cli.main(["plan", "--out", "refused"]) == 2
    assert "The plans need recorded candidates; give --data STORE" in capsys.readouterr().err


# -- choosing and reporting

LOAD = Workload(6, (2,) * 20, "two_calls", 0.5)


def world(prompts: int, noise: dict[str, float], seed: int = 0) -> Table:
    """Candidates whose judge sees their value under Gaussian noise of a known strength, by look."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((prompts, 6)) + random.standard_normal((prompts, 1))
    readings = [Reading("now", 4, 840.0, 0), Reading("ahead", 4, 700.0, 0), Reading("finished", 0, 700.0, 0)]
    scores = {r: values + noise[r.look] * random.standard_normal(values.shape) for r in readings}
    return Table(values, scores)


def test_the_front_and_the_chosen_plans(intervals_of_few) -> None:
    data = world(160, {"now": 3.0, "ahead": 0.5, "finished": 0.2})
    replayed = Replayed.of(data, LOAD)
    front = [replayed.row(index) for index in replayed.front()]
    assert front[0]["strategy"] == "none"
    assert (front[0]["cost"], front[0]["share"], front[0]["gain"]) == (1, 0, 0)
    assert all(a["cost"] < b["cost"] and a["share"] < b["share"] for a, b in itertools.pairwise(front))
    shares = replayed.gains.mean(1) / data.oracle.mean()
    for index, share in enumerate(shares):  # nothing is above the front
        assert any(row["cost"] <= replayed.costs[index] + 1e-9 and row["share"] >= share - 1e-9 for row in front)
    choosing, reporting = replayed.halves
    assert sorted([*choosing, *reporting]) == list(range(160))
    row = replayed.chosen(2.5)
    assert (row["strategy"], row["settings"]["look"]) == ("early", "ahead")
    assert row["cost"] <= 2.5
    assert row["prompts"] == row["chosen_on"] == 80
    assert row["full_n"] == 2
    assert row["over_full"] > 0.2
    assert row["over_full_ci95"][0] > 0
    index = replayed.best(2.5, choosing)
    assert row["share"] == pytest.approx(replayed.gains[index][reporting].mean() / data.oracle[reporting].mean())
    assert row["share_ci95"][0] < row["share"] < row["share_ci95"][1]
    assert replayed.chosen(1)["name"] == "none"


def test_choosing_does_not_flatter() -> None:
    blind = [Replayed.of(world(40, dict.fromkeys(("now", "ahead", "finished"), 1e6), seed), LOAD) for seed in range(20)]
    rows = [replayed.chosen(8) for replayed in blind]  # nothing is worth choosing: shares are zero on average
    assert np.mean([row["chosen_share"] for row in rows]) > 0.01
    assert abs(np.mean([row["share"] for row in rows])) < 3 * np.std([row["share"] for row in rows]) / 20**0.5


def test_spread_regret_and_sizes_are_those_worked_out_by_hand() -> None:
    values = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 4.0, 4.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    scores = np.array([[0.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    data = Table(values, {Reading("now", 2, 900.0, 0): scores, Reading("finished", 0, 700.0, 0): scores})
    replayed = Replayed.of(data, LOAD)
    spread = replayed.spread
    assert spread["within"] ** 2 == pytest.approx(np.mean([5 / 3, 0, 1 / 4]))
    assert spread["alike"] == 1
    assert spread["best"] * spread["within"] == pytest.approx(np.mean([1.5, 0, 0.75]))
    regret = {(row["step"], row["keep"]): row for row in replayed.prune() if row["look"] == "now"}
    assert regret[2, 1]["regret"] == pytest.approx((2 + 0 + 1) / 2.25)
    assert regret[2, 2]["regret"] == pytest.approx((1 + 0 + 1) / 2.25)
    assert regret[2, 1]["by_chance"] == pytest.approx(1)
    # Of two of 0, 1, 2, 3 the better is 1, 2, 3 in one, two, three of six cases; of 1, 0, 0, 0 it is 1 in half of them.
    assert regret[2, 2]["by_chance"] == pytest.approx((3 - 14 / 6 + 1 - 0.5) / 2.25)
    sizes = {row["n"]: row for row in replayed.sizes()}
    assert sizes[4]["oracle"] == pytest.approx(1)
    assert sizes[2]["oracle"] == pytest.approx((14 / 6 - 1.5 + 0.5 - 0.25) / 2.25)
    # In full, all four: candidates 1, 0 and 3 are picked, worth 1, 4 and 0.
    assert sizes[4]["share"] == pytest.approx((1 - 1.5 + 0 - 0.25) / 2.25)
    assert sizes[4]["judge_gain"] == pytest.approx(np.mean([1.5, 0, 1.5]) / np.sqrt(np.mean([5 / 3, 0, 5 / 3])))
    assert sizes[2]["more"] is None
    assert sizes[4]["more"] == pytest.approx(sizes[4]["share"] - sizes[3]["share"])


def test_rewards_that_are_all_equal_leave_nothing_to_choose() -> None:
    data = Table(np.ones((3, 2)), {Reading("now", 2, 900.0, 0): np.ones((3, 2))})
    with pytest.raises(PrismError, match="there is nothing to choose"):
        Replayed.of(data, LOAD)


def test_names_say_the_plan() -> None:
    ahead = Early(schedule=((3, 4), (6, 1)), look="ahead", judge_at=700, num_draws=1)
    assert planning.name(Run(8, ahead)) == "8 seeds, 3:4,6:1, ahead at 700, 1 draw"
    assert planning.name(Run(3, Full(judge_at=500))) == "3 seeds, full, at 500, 2 draws"
    assert planning.name(Run(4, Early(schedule=((4, 1),)))) == "4 seeds, 4:1"
    mixed = Early(schedule=((3, 4), (6, 1)), look=("now", "ahead"), judge_at=700, num_draws=1)
    assert planning.name(Run(8, mixed)) == "8 seeds, 3:4,6:1, now then ahead at 700, 1 draw"
