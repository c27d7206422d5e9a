"""The benchmark at real shapes runs to its end at toy sizes, and what it prints is what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import real_shapes
from published import MODELS, Model, reduced
from real_shapes import Bench, Goal

TINY = Model(
    "WanPipeline",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 32,
        "num_layers": 5,
        "rope_max_seq_len": 32,
    },
    (64, 96, 17),
    30,
    {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    text_width=32,
)


def table(text: str, number: int) -> list[dict[str, str]]:
    """The rows of one of the tables in a Markdown text, by column."""
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number]]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def test_runs_at_toy_sizes(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "wan2.1-1.3b", TINY)
    out = tmp_path / "rows.md"
    options = ["--device", "cpu", "--tokens", "24", "--head-tokens", "40", "--repeats", "2", "--out", str(out)]
    assert real_shapes.main(["--model", "wan2.1-1.3b", *options]) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert f"torch {torch.__version__}" in text.splitlines()[0]
    rows = {(row["model"], row["measured"]): row for row in table(text, 0)}
    assert [what for model, what in rows if model == "head"] == [
        *("read once", "folded", "folded with gradient", "plain", "plain with gradient"),
    ]
    assert [what for model, what in rows if model == "wan2.1-1.3b"] == [
        *("step", "step with the judge listening", "stand alone score", "head on these tokens", "decode"),
    ]
    for row in rows.values():
        low, high = map(float, row["least to most"].split(" to "))
        assert 0 < low <= float(row["seconds"]) <= high
        assert float(row["peak GiB"]) > 0
        assert row["repeats"] == "2"
    assert "32x32, 17 frames, 20 tokens, 5 of 30 blocks, tap 2" in rows["wan2.1-1.3b", "step"][""]

    goals = {(goal["model"], goal["ratio"]): goal for goal in table(text, 1)}
    seconds = {key: float(row["seconds"]) for key, row in rows.items()}
    step = seconds["wan2.1-1.3b", "step"]
    expected = {
        ("head", "folded over reading the tokens once"): seconds["head", "folded"] / seconds["head", "read once"],
        ("head", "plain over folded"): seconds["head", "plain"] / seconds["head", "folded"],
        ("wan2.1-1.3b", "8 decodes over 8 scores by listening"): seconds["wan2.1-1.3b", "decode"]
        / seconds["wan2.1-1.3b", "head on these tokens"],
    }
    off = next(
        float(goal["value"]) for (_, ratio), goal in goals.items() if ratio.startswith("stand-alone score, off 2/5")
    )
    assert off == pytest.approx(abs(seconds["wan2.1-1.3b", "stand alone score"] / step / 0.4 - 1), abs=0.01)
    for key, value in expected.items():
        assert float(goals[key]["value"]) == pytest.approx(value, rel=5e-3)  # of four printed digits
    assert goals["head", "largest difference of a score, folded and plain"][""] == "met"


def test_the_published_shapes_are_those_of_the_models():
    sizes = {name: model.video for name, model in MODELS.items()}
    assert sizes["wan2.1-1.3b"] == (480, 832, 81)
    assert real_shapes.HEAD_TOKENS == 21 * 60 * 104 // 4
    assert reduced((480, 832, 81), None) == (480, 832, 81)
    for tokens in (200, 1000, 5000, 32_760):
        height, width, frames = reduced((480, 832, 81), tokens)
        assert height % 16 == width % 16 == frames % 4 - 1 == 0
        assert tokens / 2 <= height * width // 256 * ((frames - 1) // 4 + 1) <= tokens


@pytest.mark.parametrize(("at_least", "value", "met"), [(False, 0.9, True), (False, 1.1, False), (True, 1.1, True)])
def test_a_goal_is_met_on_its_side_of_the_limit(at_least, value, met):
    assert Goal("", "", value, 1.0, at_least).met is met
    assert Goal("", "", value, None).met is None


def test_running_out_of_memory_is_a_row_that_says_so():
    def too_large() -> None:
        raise torch.cuda.OutOfMemoryError("no")

    bench = Bench(torch.device("cpu"), repeats=1)
    assert list(bench.measure("a", "", fits=lambda: None, too_large=too_large)) == ["fits"]
    notes = {row.what: row.note for row in bench.rows}
    assert notes == {"too large": "no memory", "fits": ""}
