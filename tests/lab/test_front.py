"""The table of scores that ships, its replay, and what the judge sees at cuts against counting by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from tests import score_tables

from prism import files, shapeworld
from prism.evaluation.recorded import Recorded
from prism.lab import front
from prism.report.page import Section
from prism.report.plan_page import chosen_table
from prism.sampling import plan_files
from prism.sampling.planner import Reading


def test_the_table_that_ships_is_of_the_head_that_ships():
    scores = Recorded.load_file(front.shipped())
    assert front.shipped().stat().st_size < 0.4 * 2**20
    assert list(scores.prompts) == shapeworld.prompts("test", 200)
    assert scores.seeds.shape == (200, 8)
    assert scores.about["call"] == shapeworld.CALL
    head = files.read_json(shapeworld.asset_folder("head") / "config.json")
    assert scores.about["backbone"]["weights"] == head["backbone"]["weights"]
    assert set(scores.table("overall").levels("ahead")) == {500.0, 700.0}


def test_at_the_third_step_the_head_that_ships_is_told_from_chance():
    table = Recorded.load_file(front.shipped()).table("overall")
    level = next(reading.t for reading in table.scores if (reading.look, reading.step) == ("now", 3))
    cut = {"look": "now", "step": 3, "t": level, "num_draws": 1, "scores": [[0.0] * 8]}
    records = [{"prompt": "a", "values": {"overall": [0.1 * k for k in range(8)]}, "cuts": [cut]}]
    (row,) = front.sight(records, table, 0)
    assert 890 < row["t"] < 900
    assert row["share"] == 0.0  # equal scores order nothing
    assert row["shipped_ci95"][0] > 0.55
    assert row["shipped_prompts"] == 200


def test_a_smaller_table_plans_as_the_whole(tmp_path):
    whole = score_tables.made()
    whole.save(tmp_path / "all.parquet")
    front.shrink(tmp_path / "all.parquet", tmp_path / "small.parquet")
    small = Recorded.load_file(tmp_path / "small.parquet")
    assert small.about["dimensions"] == ["overall"]
    assert list(small.rewards) == ["overall"]
    assert np.array_equal(small.seeds, whole.seeds)
    for reading, values in small.scores.items():
        assert values[..., 0] == pytest.approx(whole.scores[reading][..., 1], abs=1e-6)
    replayed = front.replay(tmp_path / "small.parquet", 0)
    shown = front.fields(replayed)
    rows = shown["plans"]
    assert {row["prompts"] for row in rows} == {10}
    assert [row["n"] for row in replayed.fulls()] == [2, 3]
    assert len(replayed.dots()) == shown["replayed"] == len(replayed.runs)
    part = front.section(shown, replayed)
    assert isinstance(part, Section)
    assert "<svg" in part.plots[0][0]
    assert chosen_table(rows).markdown() == part.tables[0][0].markdown()


def test_what_a_cut_sees_counted_by_hand():
    random = np.random.default_rng(1)
    values, scores = random.random((12, 4)).round(1), random.random((12, 2, 4))
    records = [
        {
            "prompt": f"p{row}",
            "values": {"overall": values[row].tolist()},
            "cuts": [{"look": "ahead", "step": 2, "t": 700.0, "num_draws": 3, "scores": scores[row].tolist()}],
        }
        for row in range(12)
    ]
    right = decided = 0
    for row in range(12):
        for a, b in combinations(range(4), 2):
            decided += values[row, a] != values[row, b]
            right += (values[row, a] - values[row, b]) * (scores[row, 0, a] - scores[row, 0, b]) > 0
    table = score_tables.made(n=4).table("overall")
    (row,) = front.sight(records, table, 0)
    assert row["share"] == pytest.approx(right / decided)
    assert row["share_ci95"][0] <= row["share"] <= row["share_ci95"][1]
    assert row["shipped"] is None  # the table looks ahead at step 1
    records = [{**record, "cuts": [{**record["cuts"][0], "step": 1}]} for record in records]
    (row,) = front.sight(records, table, 0)
    expected = table.scores[Reading("ahead", 1, 700.0, 0)]
    assert row["shipped"] == pytest.approx(front._accuracy(table.values, expected, 0)[0])
    assert front.sight([], table, 0) == []


def test_the_plans_that_ship_are_of_the_head_that_ships():
    path = front.plans()
    assert path is not None
    content, _ = plan_files.read(path)
    assert content["head"] == Recorded.load_file(front.shipped()).about["head"]
    assert content["call"] == shapeworld.CALL
    assert content["measured_on"]["split"] == "validation"
    assert [plan["budget"] for plan in content["plans"]] == [1.2, 1.5, 2.0, 3.0, 5.0, 8.0]
