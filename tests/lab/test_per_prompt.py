"""The committed evidence: every interval that it states follows from the values per prompt beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism import files
from prism.errors import PrismError
from prism.lab import per_prompt

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "rerun"  # of the first run no values per prompt were kept


def test_every_interval_of_the_evidence_is_recomputed():
    stated = files.read_json(EVIDENCE / "metrics.json")
    intervals = list(per_prompt.recomputed(EVIDENCE / "per_prompt", stated))
    kinds = {place.split("[")[0] for place, _, _ in intervals}
    assert kinds == {"accuracy", "judge_comparison", "best_of_n", "attention"}
    for place, there, again in intervals:
        assert (there is None and again is None) or again == pytest.approx(there, abs=1e-9), place


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PrismError, match=r"accuracy\.parquet cannot be read"):
        list(per_prompt.recomputed(tmp_path, {"seed": 0, "accuracy": [], "best_of_n": []}))
