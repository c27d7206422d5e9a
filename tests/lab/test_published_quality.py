"""VBench's total against its own script's arithmetic, and tables that mean nothing."""

from __future__ import annotations

import json

import pytest

from prism.errors import PrismError
from prism.lab import published_quality
from prism.lab.published_quality import QUALITY, RANGES, SEMANTIC, read

SCORES = {name: round(low + (high - low) * (0.3 + 0.04 * i), 4) for i, (name, (low, high)) in enumerate(RANGES.items())}


def by_script(scores):
    """The arithmetic of cal_final_score.py: normalise, weigh, average both groups, four to one."""
    weighed = {
        name: (scores[name] - low) / (high - low) * (0.5 if name == "dynamic_degree" else 1)
        for name, (low, high) in RANGES.items()
    }
    quality = sum(weighed[name] for name in QUALITY) / 6.5
    semantic = sum(weighed[name] for name in SEMANTIC) / 9
    return (quality * 4 + semantic) / 5


def write(folder, rows, name="scores.csv"):
    path = folder / name
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(str(cell) for cell in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_the_total_is_vbenchs(tmp_path):
    total = by_script(SCORES)
    shown = {name.replace("_", " ").title(): f"{100 * score:.2f}%" for name, score in SCORES.items()}
    rows = [{"model": "Wan-AI/Wan2.1", **shown, "Total Score": f"{100 * total:.2f}%", "error": 0.002}]
    quality = read(write(tmp_path, rows), ["Wan-AI/Wan2.1"])
    assert quality.what == "VBench's total"
    published = quality.of["Wan-AI/Wan2.1"]
    assert published.mean == pytest.approx(total, abs=1e-4)
    assert published.error == 0.002
    best = {name: high for name, (_, high) in RANGES.items()}
    assert published_quality.total_of(best) == pytest.approx(1)


def test_some_dimensions_make_a_mean_and_no_total(tmp_path):
    some = {"dynamic_degree": 0.4, "imaging_quality": 0.7, "scene": 0.4111}
    quality = read(write(tmp_path, [{"name": "a", **some}], "scores.jsonl"))
    assert quality.of["a"].mean == pytest.approx((0.2 + 0.7 + 0.5) / 2.5)
    assert quality.what == "mean of 3 normalised VBench dimensions (no total: 16 make one)"
    message = "has a total over 3 of VBench's 16 dimensions, which counts subject_consistency as 0; take that"
    with pytest.raises(PrismError, match=message):
        read(write(tmp_path, [{"name": "a", **some, "total": 0.6}]))


@pytest.mark.parametrize(
    ("rows", "named", "message"),
    [
        ([{"id": "a", "scene": 0.3}], (), "has the columns id, scene; it needs a column backbone, model or name"),
        ([{"name": "a", "fid": 0.3}], (), "it needs a column for each of VBench's dimensions"),
        ([{"name": "a", "scene": ""}], (), "column scene in row 0 of scores.csv .* must hold a score from 0 to 1"),
        ([{"name": "a", "scene": 73.2}], (), "or one in percent such as 97.3%; found 73.2"),
        ([{"name": "a", "scene": "good"}], (), "must hold a finite number; found good"),
        ([{"name": "a", "scene": 0.3}] * 2, (), "backbone a is in row 1 of scores.csv .* again; keep one row"),
        ([{"name": "a", "scene": 0.3}], ("b",), "has no scores of the backbone b; it has those of a"),
        ([{"name": "a", "scene": 0.3, "error": -1}], (), "must hold a standard error of 0 or more"),
        ([{"name": "a", **SCORES, "total": 0.9}], (), "The total in row 0 .* is 0.9000, and its dimensions give 0"),
    ],
)
def test_tables_that_mean_nothing_are_refused(tmp_path, rows, named, message):
    with pytest.raises(PrismError, match=message):
        read(write(tmp_path, rows), named)
