"""A run as Markdown: every table whole, every number as measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.report import rows

from prism import files
from prism.report import metrics, page, tables, wording


@pytest.fixture
def document():
    seeds = {"head_seed": None, "head_seeds": [0, 1]}
    accuracy = [*rows.accuracy(**seeds), *rows.accuracy(), *rows.accuracy(head_seed=1), *rows.accuracy(judge="pixel")]
    picks = [rows.pick("early", 0.6, 0.3, schedule=[[4, 1]], name="early", **seeds)]
    picks += [rows.pick("early", 0.5, 0.3, schedule=[[4, 1]], name="early", head_seed=seed) for seed in (0, 1)]
    picks += [rows.pick("draft", 0.8, 0.3, draft_steps=3, name="draft 3", set="unseen", prompts=40)]
    comparison = {"judge": "prism", "against": "pixel", "set": "test", "t": 899, "dimension": "overall"}
    comparison |= {"difference": 0.041, "ci95": [-0.003, 0.085], "pairs": 1100, "prompts": 60}
    look = {"t": 899.0, "candidates": "best", "referee": 0.9, "attention_share": 0.4, "area_share": 0.2}
    look |= {"video_share": 0.8, "lift": 2.0, "lift_ci95": [1.8, 2.2], "prompts": 200}
    return metrics.document(
        "demo",
        {"name": "tiny"},
        0,
        accuracy,
        picks,
        {"train": 90.0, "total": 120.0, "this process": 1.0},
        judge_comparison=[comparison],
        bars=[{"bar": "x under 3 %", "reached": "2.1 %", "met": True}, {"bar": "y", "reached": "–", "met": None}],
        agreement={"prompts": 6, "runs": 90, "same_pick": 89, "largest_difference": 1.2e-6},
        attention=[look],
    )


def test_every_table_is_there_and_whole(document):
    text = page.markdown(document, {"prompts": 200}, "prism demo --full --out runs/full")
    for needle in (
        "`prism demo --full --out runs/full`",
        "Minutes: train 1.5, total 2.0.",
        "| x under 3 % | 2.1 % | yes |",
        "| y | – | – |",
        "| prism, 2 seeds | test | 989 | 52.0\u00a0% |",
        "| pixel, seed 0 | test | 989 |",
        "| test | pixel | 899 | overall | +4.1 | −0.3\u00a0…\u00a0+8.5 | 1100 | 60 |",
        "| early | step 4 keeps 1 | prism, 2 seeds | +0.60 |",
        "## Best-of-8 on 40 prompts of the split unseen",
        "89 of 90 runs",
        "1.2e-06",
        "| 899 | best | 0.90 | 40.0\u00a0% | 20.0\u00a0% | 2.00 | 1.80 … 2.20 |",
        "| prism, seed 1 | test | 989 |",
        '"prompts": 200',
    ):
        assert needle in text, needle
    pooled, by_seed = text.split("## By the seed of the head")
    assert "| prism, seed 1 |" not in pooled
    assert "| pixel, seed 0 |" not in by_seed
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_folder_holds_what_made_it(document, tmp_path):
    page.write_evidence(tmp_path / "evidence", document, {"prompts": 200}, "prism demo --full")
    assert sorted(path.name for path in (tmp_path / "evidence").iterdir()) == [
        "README.md",
        "config.json",
        "metrics.json",
    ]
    metrics.validate(files.read_json(tmp_path / "evidence" / "metrics.json"))


def test_judges_of_several_seeds_are_shown_as_one(document):
    shown = {(row["judge"], row["head_seed"]) for row in wording.pooled(document["accuracy"])}
    assert shown == {("prism", None), ("pixel", 0)}
    apart = {(row["judge"], row["head_seed"]) for row in wording.apart(document["accuracy"])}
    assert apart == {("prism", 0), ("prism", 1)}
    single = rows.accuracy()
    assert wording.pooled(single) == single
    assert wording.apart(single) == []


def test_the_tables_of_the_committed_run_are_written_as_they_stand():
    place = Path(__file__).parents[2] / "docs" / "evidence" / "rerun"
    committed = (place / "README.md").read_text(encoding="utf-8")
    text = page.markdown(files.read_json(place / "metrics.json"), {}, "prism demo --full")
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) > 5
    for table in blocks:
        assert table in committed


def test_a_table_has_the_same_cells_on_the_terminal_and_on_a_page(document):
    table = tables.claims_table(document["bars"])
    assert (
        table.markdown() == "| bar | reached | met |\n| --- | --- | --- |\n| x under 3 % | 2.1 % | yes |\n| y | – | – |"
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["x", "under", "3", "%", "2.1", "%", "yes"] in lines
    assert ["y", "–", "–"] in lines
