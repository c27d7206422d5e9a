"""The demo from end to end, on an untrained pipeline and a handful of candidates."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from tests import score_tables, tiny

from prism import Judge, cli, files, shapeworld, video
from prism.errors import PrismError
from prism.evaluation import intervals as bootstrap
from prism.lab import demo, front, judges, per_prompt
from prism.lab.contest import Contest
from prism.lab.pixel import PixelJudge
from prism.report.metrics import validate
from prism.shapeworld import CALL, candidates, grammar, referee
from prism.training import TrainConfig

SHARES = {"train": (2, 3), "validation": (1, 3), "test": (2, 3)}
TINY = {
    "n": 3,
    "prompts": 2,
    "alone": 1,
    "taps": (1,),
    "dim": 16,
    "train": TrainConfig(steps=3, prompts_per_step=2, checkpoint_every=0),
    "schedule": ((2, 1),),
    "schedules": (((1, 1),), ((1, 2), (2, 1))),
    "ahead": (((1, 1),),),
    "draft_steps": 1,
    "drafts": (2,),
    "front": False,
    "shipped": False,
    "pixel_levels": (899, 0),
    "pixel_steps": 2,
    "look_at": (500.0,),
    "strips": 2,
}


@pytest.fixture
def world_of_greys(monkeypatch):
    """An untrained pipeline whose grey videos the referee tells apart by their brightness."""
    pipe = tiny.shapeworld()
    monkeypatch.setattr(shapeworld, "pipeline", lambda: pipe)
    monkeypatch.setitem(CALL, "num_inference_steps", 3)
    monkeypatch.setitem(CALL, "guidance_scale", 2.5)
    monkeypatch.setattr(candidates, "SHIPPED", SHARES)
    real = candidates.run
    monkeypatch.setattr(candidates, "run", lambda out, splits=SHARES, **options: real(out, splits, **options))
    monkeypatch.setattr(referee, "batch", _brightness)
    return pipe


def test_the_demo_writes_everything_it_promises(tmp_path, world_of_greys, monkeypatch, capsys):
    out = tmp_path / "out"
    table = tmp_path / "scores.parquet"
    score_tables.made().save(table)
    monkeypatch.setattr(front, "shipped", lambda: table)
    monkeypatch.setattr(judges, "shipped", _shipped)
    settings = {**TINY, "front": True, "shipped": True, "fresh_levels": (899,)}
    metrics = demo.run(out, fresh=True, seed=1, config=demo.DemoConfig(**settings))
    table.unlink()

    validate(files.read_json(out / "metrics.json"))
    assert {row["t"] for row in metrics["accuracy"]} == {989, 949, 899, 699, 499, 299, 99, 0}
    by_judge = {row["judge"]: row["head_seed"] for row in metrics["accuracy"]}
    assert by_judge == {"prism": 0, "trained now": 1, "pixel": 1, "pixel-noisy": 1}
    assert {row["t"] for row in metrics["accuracy"] if row["judge"] == "trained now"} == {899}
    against = {(row["against"], row["t"]) for row in metrics["judge_comparison"]}
    assert against == {(name, t) for name in ("pixel", "pixel-noisy") for t in (899, 0)}
    assert PixelJudge.from_pretrained(out / "pixel-noisy", world_of_greys).name == "pixel-noisy"
    best = {row["name"]: row for row in metrics["best_of_n"]}
    assert list(best)[:6] == ["none", "random", "early", "draft", "full", "oracle"]
    assert {"early 1:1", "early 1:2,2:1", "early 1:1 ahead", "draft 2"} <= set(best)
    assert [(row["step"], row["look"]) for row in metrics["sight"]] == [(1, "now"), (1, "ahead"), (2, "now")]
    assert {row["prompts"] for row in metrics["sight"]} == {2}
    assert len(metrics["plans"]) == 7
    assert metrics["spread"]["prompts"] == 20
    assert "20 prompts × 3 candidates" in metrics["origins"][0]["package"]
    assert "prism: best of 3 on 2 test prompts" in capsys.readouterr().err
    assert best["oracle"]["oracle_share"] == pytest.approx(1.0)
    assert best["oracle"]["vae_decodes"] > best["early"]["vae_decodes"] == 2
    # one cut at step 2 of 3, tap after 1 of 2 blocks, two calls a step: 3 (2 + 1/2) + 4 for the winner
    assert best["early"]["denoiser_rows"] == pytest.approx(2 * (3 * 2.5 + 4))
    assert metrics["agreement"]["same_pick"] == metrics["agreement"]["runs"] == len(best)
    assert {row["candidates"] for row in metrics["attention"]} == {"best", "worst"}
    assert video.read_video(out / "winner.mp4").shape == (17, 64, 64, 3)
    page = (out / "report.html").read_text()
    assert page.count("<video ") >= 2
    for needle in (
        "<svg",
        "The largest gain of 2 prompts",
        "This run beside the full run",
        "Where the query looks",
        "Against judges that look at pixels",
        "What this shows",
        "What a budget buys",
        "Computed in this run, and shipped with the package",
    ):
        assert needle in page, needle
    judge = Judge.from_pretrained(out / "head", world_of_greys)
    assert judge.tap == 1
    assert judge.trained_on["seed"] == 1
    assert (out / "candidates" / "store.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_full_run_that_is_killed_goes_on_to_the_same_end(tmp_path, world_of_greys, monkeypatch, capsys):
    shipped = tmp_path / "store"
    candidates.run(shipped, seed=3)
    monkeypatch.setattr(shapeworld, "asset_folder", lambda name: shipped)
    monkeypatch.setattr(judges, "pixel_judges", _another_head)
    monkeypatch.setattr(bootstrap, "FEWEST_PROMPTS", 1)
    settings = {**TINY, "full": True, "judges": 2, "labelled": 2, "unseen": 1, "schedules": (), "drafts": ()}
    config = demo.DemoConfig(**settings)
    whole = demo.run(tmp_path / "whole", config=config)

    begun, real = [], Contest.__init__

    def dies_at(place, self, *arguments, **options):
        begun.append(arguments[2])
        if len(begun) == place:
            raise KeyboardInterrupt
        real(self, *arguments, **options)

    monkeypatch.setattr(Contest, "__init__", lambda self, *a, **o: dies_at(2, self, *a, **o))
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "killed", config=config)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(PrismError, match=r"The run in .*killed\.parts differs in config: n was 3 and is now 4"):
        demo.run(tmp_path / "killed", config=demo.DemoConfig(**{**settings, "n": 4}))
    monkeypatch.setattr(judges, "train_together", _never)
    again = demo.run(tmp_path / "killed", config=config)
    tests, unseen = grammar.prompts("test", 2), grammar.prompts("unseen", 1)
    assert begun[:4] == [*tests, tests[1], *unseen]  # the second alone is begun twice
    assert sorted(begun[4:]) == sorted(tests)  # the largest and the smallest gain, for the page
    assert not (tmp_path / "killed.parts").exists()

    assert _without_seconds(again) == _without_seconds(whole)
    seeds = [row.get("head_seeds", row["head_seed"]) for row in again["best_of_n"] if row["name"] == "early"]
    assert seeds == [[0, 1], 0, 1, [0, 1], 0, 1]  # on test prompts, then on unseen ones
    assert {row["set"] for row in again["accuracy"]} == {"test", "unseen"}
    assert {(row["pairs"], row["prompts"]) for row in again["accuracy"] if row["set"] == "test"} == {(2, 2)}
    assert [row["met"] is None for row in again["bars"]] == [False, True, True, False, False, False]
    assert "What was promised" in (tmp_path / "killed" / "report.html").read_text()
    evidence = (tmp_path / "killed" / "evidence" / "README.md").read_text()
    assert "`prism demo --full --seed 0 --out" in evidence
    assert "| early | step 2 keeps 1 | prism, 2 seeds |" in evidence
    stated = files.read_json(tmp_path / "killed" / "evidence" / "metrics.json")
    intervals = list(per_prompt.recomputed(tmp_path / "killed" / "evidence" / "per_prompt", stated))
    kinds = {place.split("[")[0] for place, _, _ in intervals}
    assert kinds == {"accuracy", "judge_comparison", "best_of_n", "attention"}
    assert sum(there is not None for _, there, _ in intervals) > 0.8 * len(intervals)
    for place, there, again in intervals:
        assert (there is None and again is None) or again == pytest.approx(there, abs=1e-9), place
    capsys.readouterr()


def test_a_full_run_into_an_existing_folder_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("1")
    assert cli.main(["demo", "--full", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_is_asked_of_a_full_run():
    asked = demo.plans(demo.FULL)
    assert demo.FULL.prompts >= 200
    assert demo.FULL.judges == 3
    for name, settings in asked.items():
        assert settings["strategy"] == name.split()[0]
    # the bars: one cut in the first fifth of the steps, within 35 % of full's rows; drafts too
    steps, n, share = CALL["num_inference_steps"], demo.FULL.n, max(demo.FULL.taps) / 6
    rows = partial(_rows, n=n, num_steps=steps, cfg="two_calls", guided=True, tap_share=share)
    ((step, keep),) = demo.FULL.schedule
    assert (step <= steps / 5, keep) == (True, 1)
    full = rows("full")
    assert rows("early", schedule=demo.FULL.schedule) / full < 0.35
    assert rows("draft", draft_steps=demo.FULL.draft_steps) / full < 0.35


def _rows(strategy, **options):
    from prism.sampling import expected_rows

    return expected_rows(strategy, **options)


def _brightness(videos, prompts):
    value = 0.5 + 0.5 * torch.sin(3000 * torch.as_tensor(videos).mean((1, 2, 3, 4)))  # grey is not all alike
    return dict.fromkeys(referee.DIMENSIONS, value)


def _shipped(backbone):
    """Stands for the head that ships, which fits the embedded model alone."""
    judge = Judge.untrained(backbone, tap=1, dim=16, seed=0)
    judge.trained_on["seed"] = 0
    return judge


def _another_head(parts, store, backbone, fresh, seed, steps):
    """Stands for a pixel judge, which takes longer to train than the rest of the test."""
    judge = Judge.untrained(backbone, tap=1, dim=16, dimensions=store.dimensions, seed=9)
    judge.name = "pixel"
    return [judge]


def _never(*arguments, **options):
    raise AssertionError("what was done before the kill is not done again")


def _without_seconds(metrics):
    """The document without what time it took; the share of the sampler's overhead is such a thing."""

    def clean(value):
        if isinstance(value, dict):
            timed = ("seconds", "timings", "parts", "peak_memory_bytes", "date", "store")
            return {name: clean(item) for name, item in value.items() if name not in timed}
        return [clean(item) for item in value] if isinstance(value, list) else value

    found = json.loads(json.dumps(clean(metrics)))
    found["bars"] = found["bars"][:-1]
    return found
