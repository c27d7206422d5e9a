"""The contest at matched cost: candidates per budget, shared picks against runs by themselves, and its summary."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from prism.evaluation import measured
from prism.judge import Judge
from prism.lab import matched, matched_results, playing
from prism.lab.matched import FULL, PIXEL, PLAIN, PLANNED, REFEREE, Arm
from prism.lab.pixel import PixelJudge
from prism.report import matched_page
from prism.runs import IDENTITY, claim
from prism.sampling import plan_files
from prism.sampling.drafts import Draft
from prism.sampling.noise_search import LatentBeams, ZeroOrder
from prism.sampling.strategies import Early, First, Full, Oracle
from prism.shapeworld import grammar, referee

CALL = tiny.CALL_WAN  # six steps of two rows; the judge reads after one of three blocks
PLAN = {
    "format": "prism-plans",
    "schema": 1,
    **{"family": "wan", "head": "", "backbone": {}, "call": {}, "num_inference_steps": 6},
    "plans": [
        {"budget": 2.0, "cost": 1.5, "n": 3, "strategy": "early", "settings": {"schedule": [[2, 1]], "look": "now"}}
    ],
}


BEAMS = {"beam": Arm(LatentBeams(keep=1))}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.untrained(tiny.wan(), tap=1, dim=16)


def brightness(video: Any, prompt: str) -> dict[str, float]:
    return {"overall": float(torch.as_tensor(video).float().mean())}


@pytest.mark.parametrize(
    ("budget", "slack", "n", "rows"),
    [
        (3, 0.0, 2, 2 * (12 + 2 / 3)),
        (3, 0.05, 2, 2 * (12 + 2 / 3)),  # three cost 38 rows, 3.15 samples are 37.8
        (3, 0.06, 3, 3 * (12 + 2 / 3)),
        (1.2, 0.05, 1, 12),  # one candidate is not judged
    ],
)
def test_a_budget_pays_for_as_many_candidates_as_fit(
    judge: Judge, budget: float, slack: float, n: int, rows: float
) -> None:
    seat = matched.seat(FULL, Arm(Full()), judge, CALL, budget, slack)
    assert seat is not None
    assert (seat.n, seat.plain) == (n, n == 1)
    assert seat.rows == pytest.approx(rows)
    assert seat.judged == pytest.approx(0 if n == 1 else n * 2 / 3)


def test_every_arm_spends_its_budget_and_not_more(judge: Judge) -> None:
    arms = {**matched.FEW_STEPS, "cut": Arm(Early(schedule=[(2, 1)], look="now")), "draft": Arm(Draft(draft_steps=2))}
    taken = matched.seats(arms, judge, CALL, [1.2, 3.0, 8.0], slack=0.0)
    for (name, budget), seat in taken.items():
        assert seat.rows <= budget * 12 + 0.5 * 2, name  # more steps are rounded to whole ones
        if not (seat.plain or seat.changes):
            _, load = matched.workload(seat.plan, judge, CALL, seat.n + 1)
            assert matched.workload(seat.plan, judge, CALL, seat.n + 1)[0].rows(load) > budget * 12, name
    # The first step takes two rows, the probe a third of one; the winner goes on with 10 rows.
    assert taken["cut", 3.0].n == int((36 - 10) / (2 + 1 / 3))
    # A draft takes 4 rows and two draws of a third; the winner 12.
    assert taken["draft", 3.0].n == int((36 - 12) / (4 + 2 / 3))
    assert (REFEREE, 8.0) in taken
    assert taken[REFEREE, 8.0].n == 8
    assert ("beam, one kept", 1.2) not in taken


def best_of(values: np.ndarray, n: int) -> np.ndarray:
    """The best of n, averaged over all sets of n, by row."""
    return np.mean([values[:, list(some)].max(1) for some in combinations(range(values.shape[1]), n)], 0)


def test_two_prompts_walked(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared picks are those of runs by themselves, and rows in closed form are those that ran."""
    monkeypatch.setattr(matched, "EIGHT", 4)
    pixel = PixelJudge.untrained(judge.backbone, ("VQ", "MQ", "TA", "overall"), width=8, layers=1)
    arms = {
        PLAIN: Arm(First()),
        "longer": Arm(First(), longer=True),
        "cut": Arm(Early(schedule=[(2, 1)], look="now")),
        "draft": Arm(Draft(draft_steps=2)),
        FULL: Arm(Full()),
        "beam": Arm(LatentBeams(keep=1)),
        "zero-order": Arm(ZeroOrder(neighbors=2, iterations=1)),
        PIXEL: Arm(Oracle(), "pixel"),
        REFEREE: Arm(Oracle(), "referee"),
    }
    taken = matched.seats(arms, judge, CALL, [2.1, 3.2], PLAN)
    calls: list[int] = []
    few = {key: seat for key, seat in taken.items() if key[0] in ("cut", "beam", FULL, REFEREE)}
    lines = [
        matched.line(judge, pixel, brightness, CALL, tiny.PROMPT, [0], taken, True, lambda: calls.append(1)),
        matched.line(judge, pixel, brightness, CALL, tiny.OTHER_PROMPT, [0, 50], few, False, lambda: calls.append(1)),
    ]
    assert len(calls) == len(taken) + 2 * len(few)
    for line in lines:
        values = np.array(line["values"])
        assert values.shape == (len(line["seeds"]), 4)
        for run in line["runs"]:
            seat = taken[run["arm"], run["budget"]]
            assert run["rows"] == pytest.approx(seat.rows), run["arm"]
            assert all(run["same"]), run["arm"]
            assert (run["apart"] is None) == (len(line["seeds"]) == 1)
            if run["arm"] == REFEREE:
                assert run["values"] == pytest.approx(best_of(values, seat.n))
            if run["arm"] == PLAIN:
                assert run["values"] == pytest.approx(values.mean(1))
            if run["arm"] in ("cut", "draft", PLANNED):  # a candidate as it is
                assert np.isclose(np.array(run["values"])[:, None], values, atol=1e-6).any(1).all() or seat.n > 4
    compared = [run["arm"] for run in lines[0]["runs"] if run["same"]]
    assert {"cut", "draft", FULL, PIXEL, REFEREE} <= {*compared}
    rows = matched_results.rows(lines, 12.0)
    assert {row["arm"] for row in rows if row["prompts"] == 2} == {"cut", "beam", FULL, REFEREE}
    gains = [
        (best_of(np.array(line["values"]), taken[REFEREE, 3.2].n) - np.mean(line["values"], 1)).mean() for line in lines
    ]
    most = [(np.array(line["values"]).max(1)).mean() - np.mean(line["values"]) for line in lines]
    share = next(row["share"] for row in rows if (row["arm"], row["budget"]) == (REFEREE, 3.2))
    assert share == pytest.approx(sum(gains) / sum(most), rel=1e-4)


def made(prompt: str, plan: float, full: float, rival: float) -> dict[str, Any]:
    """A prompt whose eight have the mean 1 and the best 2; each number is a gain."""
    values = [[2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    common = {"n": 2, "judged": 1.0, "decodes": 1, "same": [True], "budget": 2.0}
    runs = [
        {"arm": arm, "rows": 20.0, "values": [1 + gain], "seconds": [seconds], "apart": 0.5, **common}
        for arm, gain, seconds in ((PLANNED, plan, 1.0), (FULL, full, None), ("rival", rival, 3.0))
    ]
    return {"prompt": prompt, "seeds": [0], "values": values, "apart": 2.0, "runs": runs}


def test_the_summary_against_figures_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [made(f"{index}", 0.5, 0.3 + 0.01 * (index % 2), 0.75) for index in range(12)]
    late = {  # with another seed, whose candidates are all better by 5
        **lines[0],
        "seeds": [7],
        "values": [[value + 5 for value in lines[0]["values"][0]]],
        "runs": [
            {**lines[0]["runs"][0], "arm": "late", "values": [6.5]},
            {**lines[0]["runs"][0], "rows": 99.0},
        ],
    }
    rows = {row["arm"]: row for row in matched_results.rows([*lines, late], 10.0)}
    assert rows["late"]["prompts"] == 1
    assert rows["late"]["share"] == pytest.approx(0.5)
    assert rows[PLANNED]["denoiser_rows"] == 20  # a run that is there already stays
    rival = rows["rival"]
    assert (rival["prompts"], rival["n"], rival["cost"]) == (12, 2, 2.0)
    assert rival["share"] == pytest.approx(0.75)
    assert rival["share_ci95"] == pytest.approx([0.75, 0.75])
    assert rival["over_plan"] == pytest.approx(0.25)
    assert rival["over_plan_ci95"] == pytest.approx([0.25, 0.25])
    assert rival["over_full"] == pytest.approx(0.445)
    assert rows[PLANNED]["over_plan"] is None
    assert rows[FULL]["share"] == pytest.approx(0.305)
    assert (rival["seconds"], rival["seconds_p95"], rival["runs_timed"]) == (3.0, 3.0, 12)
    assert rows[FULL]["seconds"] is None
    assert rival["diversity"] == pytest.approx(0.25)
    assert (rival["same_pick"], rival["compared"]) == (12, 12)
    table = list(rows.values())
    (sentence,) = matched_results.verdicts(table)
    assert "above the planner's plan: rival; below it: full;" in sentence
    assert "without an interval: 1" in sentence
    assert sentence.endswith("Of those above, rival: no plan of best_of_n.")
    for row in table:
        row["dictionary"] = "measured"
    assert matched_results.verdicts(table)[0].endswith("rival: in the planner's dictionary with --measured.")
    markdown = matched_page.by_arm(table).markdown()
    assert "75\u00a0% (75\u00a0…\u00a075) ▲" in markdown
    assert "30\u00a0% (30\u00a0…\u00a031) ▼" in markdown or "▼" in markdown.split("| full |")[1].split("\n")[0]
    assert len(matched_page.details(table).markdown().splitlines()) == 2 + len(table)


def test_without_a_plan_full_is_what_arms_are_compared_with() -> None:
    lines = [made(f"{index}", 0.5, 0.3, 0.25 + 0.1 * (index % 2)) for index in range(12)]
    for line in lines:
        line["runs"] = line["runs"][1:]
    (sentence,) = matched_results.verdicts(matched_results.rows(lines, 10.0))
    assert sentence == "Budget 2: above full Best-of-N: none; below it: none; not told from it: rival."


def test_a_game_is_played_in_parts_that_survive_a_kill(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes' turns are all turns; a killed one loses a prompt; a line says its plans as plan.json does."""
    monkeypatch.setattr(matched, "EIGHT", 3)
    monkeypatch.setattr(referee, "score", brightness)
    monkeypatch.setattr(
        grammar,
        "prompts",
        lambda split, count: [
            tiny.PROMPT,
            tiny.OTHER_PROMPT,
        ][:count],
    )
    monkeypatch.setitem(playing.SCHEDULES, "plain", {"cut": Arm(Early(schedule=[(2, 1)], look="now")), **BEAMS})
    rules = playing.Rules(prompts=2, again=0, alone=0, budgets=(2.2,))
    game = playing.Game(rules, judge, None, CALL)
    assert {arm for arm, _ in game.seats} == {"cut", "beam"}
    every = game.turns()
    assert [turn.seeds for turn in every] == [(0,)] * 2
    halves = [turn.number for part in (1, 2) for turn in game.turns(part=(part, 2))]
    assert halves == [0, 1]
    parts = claim(tmp_path / "parts", {}, name=IDENTITY)
    with pytest.MonkeyPatch.context() as patch:
        real, begun = game.play, list[str]()

        def dies(turn: Any) -> Any:
            begun.append(turn.prompt)
            if len(begun) == 2:
                raise KeyboardInterrupt
            return real(turn)

        patch.setattr(game, "play", dies)
        with pytest.raises(KeyboardInterrupt):
            playing.as_parts(game, parts)
        lines = playing.as_parts(game, parts)
        assert begun == [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.OTHER_PROMPT]
    assert game.turns(lines) == []
    beam = next(run for run in lines[1]["runs"] if run["arm"] == "beam")
    assert beam["plan"] == {"strategy": "beam", "settings": plan_files.settings_of(BEAMS["beam"].plan)}
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"prompt": "cut o')
    assert playing.whole_lines(path) == lines
    assert path.read_bytes().endswith(b"}\n")
    (first, *_), others = measured.read([path], 6)[0][tiny.PROMPT], measured.read([path], 6)[1]
    assert (first.run.n, others) == (7, [])
    rows = game.rows(lines)
    assert {row["arm"]: row["dictionary"] for row in rows} == {
        "cut": "replayed",
        "beam": "measured",
    }
    metrics = {**playing.fields(rows), "accuracy": []}
    assert playing.sections(metrics)[0].title == "All strategies at matched cost"
    assert playing.fields([]) == {}
