"""The mean over judges of several head seeds, against means by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest

from prism.evaluation import Measurement
from prism.evaluation.measurement import accuracy

pytestmark = pytest.mark.usefixtures("intervals_of_few")


def measurement(seed, margins, share):
    """Three pairs of two prompts at one level, the last one a tie."""
    row = {"judge": "prism", "head_seed": seed, "source": "renoised", "t": 899, "set": "test", "dimension": "overall"}
    row |= {"without_ties": share, "without_ties_ci95": [0.0, 1.0], "with_ties": share, "pairs": 4, "prompts": 2}
    row |= {"with_ties_validation_threshold": None if seed else share, "with_ties_model_rule": 0.5}
    labels = [1, -1, 1, 0]
    columns = {
        "judge": ["prism"] * 4,
        "t": [899.0] * 4,
        "dimension": ["overall"] * 4,
        "prompt": ["a", "a", "b", "b"],
        "video_a": ["1", "2", "3", "4"],
        "video_b": ["5", "6", "7", "8"],
        "label": labels,
        "margin": margins,
    }
    return Measurement([row], pa.table(columns), {"split": "test", "num_draws": 1, "seed": 0})


def test_pooled_rows_come_first_and_are_means():
    one, two = measurement(0, [1.0, -1.0, -1.0, 0.1], 2 / 3), measurement(1, [1.0, 1.0, -1.0, 0.1], 1 / 3)
    pooled, *single = accuracy([one, two])
    assert [row["head_seed"] for row in single] == [0, 1]
    assert (pooled["head_seed"], pooled["head_seeds"]) == (None, [0, 1])
    assert pooled["without_ties"] == pytest.approx(0.5)
    assert pooled["with_ties_validation_threshold"] is None  # one of them has none
    # prompt a: both right about one pair, one right about the other; prompt b: neither about its one
    assert pooled["without_ties_ci95"] == pytest.approx([0.0, 0.75])


def test_a_judge_alone_needs_no_pooling():
    one = measurement(0, [1.0, -1.0, -1.0, 0.1], 2 / 3)
    assert accuracy([one]) == one.rows


def test_judges_measured_at_other_levels_are_not_pooled():
    one, two = measurement(0, [1.0, -1.0, -1.0, 0.1], 2 / 3), measurement(1, [1.0, 1.0, -1.0, 0.1], 1 / 3)
    two.rows[0]["t"] = 699
    with pytest.raises(ValueError, match="same levels"):
        accuracy([one, two])
