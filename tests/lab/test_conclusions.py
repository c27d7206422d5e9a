"""What is said of a demo's numbers, and the full run's beside them."""

from __future__ import annotations

from pathlib import Path

from tests.report import rows

from prism import files
from prism.lab import claims
from prism.report.tables import beside_table

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "metrics.json"


def of(accuracy, gain_ci95, differences=()):
    """Metrics of one judge whose accuracy at each level of the bars has the interval given."""
    found = rows.accuracy()
    for row in found:
        row["without_ties_ci95"] = accuracy.get(row["t"])
    picks = [row | {"name": row["strategy"]} for row in rows.picks()]
    for row in picks:
        row["referee_gain_ci95"] = gain_ci95 if row["strategy"] == "early" else row["referee_gain_ci95"]
    comparison = [
        {"set": "test", "dimension": "overall", "against": "pixel", "t": t, "difference": sum(ci95) / 2, "ci95": ci95}
        for t, ci95 in differences
    ]
    return {"accuracy": found, "best_of_n": picks, "judge_comparison": comparison}


def test_what_the_numbers_show_is_said():
    metrics = of({899: [0.55, 0.7], 699: [0.6, 0.8]}, [0.3, 0.9], [(899, [0.02, 0.1]), (0, [-0.03, 0.04])])
    first, *_ = claims.notes(metrics)
    assert "better than chance at t = 899, 699." in first
    assert "early (step 5 keeps 1) picks better than chance: 48" in first
    assert "more accurate at t = 899, not told apart at t = 0" in first


def test_what_the_numbers_leave_open_is_said_to_be_open():
    metrics = of({899: [0.44, 0.57], 699: [0.6, 0.8]}, [-0.1, 0.9], [(899, [-0.2, -0.1])])
    first, *_ = claims.notes(metrics)
    assert "better than chance at t = 699." in first
    assert "At t = 899 the interval includes 50 %" in first
    assert "this run does not show" in first
    assert "picks better than chance" not in first.replace("that it picks better than chance, this run does not", "")
    assert "less accurate at t = 899" in first
    few, *_ = claims.notes(of({}, None))
    assert few.count("this run does not show") == 2


def test_the_full_run_beside_is_the_one_of_the_documentation():
    """After a new full run: python docs/picture.py."""
    stated = files.read_json(claims.FULL_RUN)
    assert stated == claims.summary(files.read_json(EVIDENCE))
    beside = claims.beside(of({}, None))
    assert {row["what"] for row in beside["rows"]} >= {"accuracy at t = 899", "early: share of the oracle’s gain"}
    from tests.report.test_page import printed

    text = printed(beside_table(beside))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "60.0" in text
