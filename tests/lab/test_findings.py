"""Verdicts from intervals, shares of pairs against a loop over them, and figures in colours of their own."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from prism.evaluation import Measurement, prompt_interval
from prism.evaluation.measurement import COLUMNS
from prism.lab.findings import judged, row_of, shares
from prism.report import claim_plots
from prism.report.claim_page import flat_table
from prism.report.claim_plots import Bar, Line
from prism.report.figures import ACCENT, GRID, INK, MUTED, PAPER, SERIES, as_svg


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.1, 0.2), (0.01, 0.3)], "holds"),
        ([(0.1, 0.2), (-0.01, 0.3)], "holds in part"),
        ([(0.1, 0.2), None], "holds in part"),
        ([(0.1, 0.2), (-0.3, -0.1)], "does not hold"),
        ([(-0.1, 0.2), (-0.3, -0.1)], "does not hold"),
        ([(-0.1, 0.2), (-0.3, 0.1)], "cannot be told"),
        ([None], "cannot be told"),
        ([], "cannot be told"),
    ],
)
def test_a_verdict_follows_from_the_intervals(intervals, verdict):
    assert judged(intervals) == verdict


def made(seed: int, accuracy: float, prompts: int = 30) -> Measurement:
    """A judge that is right about a share of the pairs of three levels; a third of the pairs are ties."""
    rng = np.random.default_rng(seed)
    rows = []
    for t in (899.0, 699.0, 499.0, 0.0):
        for prompt in range(prompts):
            for pair in range(4):
                label = int((-1, 0, 1, 1)[pair])
                margin = (label or 1) * (1.0 if rng.random() < (accuracy if t else 1.0) else -1.0)
                rows.append(("prism", t, "overall", f"p{prompt}", f"a{prompt}-{pair}", f"b{pair}", label, margin))
    settings = {"split": "test", "num_draws": 1, "seed": 0}
    return Measurement([], pa.table(dict(zip(COLUMNS, zip(*rows)))), settings)


def test_shares_are_those_of_a_loop_over_decided_pairs():
    heads = [made(seed, 0.7) for seed in range(3)]
    right = []
    for each in heads:
        for row in each.pairs.to_pylist():
            if row["label"] and row["t"] in (899, 699, 499):
                right.append(row["label"] * row["margin"] > 0)
    together = shares(heads)
    assert together.mean == pytest.approx(np.mean(right))
    assert len(together.right) == 30 * 3  # a pair counts once, with its share of levels and heads
    assert together.interval(4) == prompt_interval(together.right, together.prompts, seed=4)
    assert shares(heads, [0.0]).mean == 1


def test_a_row_holds_the_paired_difference():
    ours, base = [made(1, 0.9), made(2, 0.9)], [made(3, 0.6), made(4, 0.6)]
    row = row_of("mean", "the mean token", ours, base, seed=0)
    assert row["difference"] == pytest.approx(shares(ours).mean - shares(base).mean)
    assert row["difference_ci95"][0] > 0.1
    assert row["spread"] == pytest.approx(np.std([shares([each]).mean for each in ours], ddof=1))
    assert row["at 899"] == pytest.approx(shares(ours, [899]).mean)
    assert row_of("query", "", base, base, 0)["difference_ci95"] is None


def test_figures_are_saved_in_colours_of_their_own(tmp_path):
    lines = [Line("ours", [900, 500], [0.6, 0.7], [[0.5, 0.7], [0.6, 0.8]], True), Line("b", [900], [0.5], [None])]
    figures = {
        "lines": claim_plots.over_levels(lines, "t"),
        "forest": claim_plots.forest([Bar("a", 0.1, [0.0, 0.2]), Bar("b", -0.1, None, "other")], "points"),
        "heat": claim_plots.heat(np.array([[0.5, 0.6]]), ["1"], ["899", "699"], "t", "block", 0.5, 0.8),
    }
    placeholders = [INK, MUTED, GRID, ACCENT, PAPER, *SERIES]
    for name, figure in figures.items():
        on_page = as_svg(figure, name)
        assert "var(--" in on_page
        claim_plots.save(figure, tmp_path / "figures" / name)
        text = (tmp_path / "figures" / f"{name}.svg").read_text()
        assert not [colour for colour in placeholders if colour in text], name
        assert claim_plots.LIGHT[ACCENT] in text
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_is_written_alike_each_time(tmp_path):
    for name in ("a", "b"):
        figure = claim_plots.forest([Bar("a", 0.1, [0.0, 0.2]), Bar("b", -0.1, None, "other")], "points")
        claim_plots.save(figure, tmp_path / name / "forest")
    assert (tmp_path / "a" / "forest.svg").read_text() == (tmp_path / "b" / "forest.svg").read_text()


def test_a_flat_table_writes_intervals_beside_their_values():
    rows = [{"kind": "mean", "difference": -0.0123, "difference_ci95": [-0.05, 0.02], "pairs": 7}, {"kind": "x"}]
    text = flat_table(rows).markdown()
    assert re.search(r"\| mean \| −0\.012 \(−0\.050 … 0\.020\) \| 7 \|", text)
    assert text.splitlines()[-1] == "| x | – | – |"
