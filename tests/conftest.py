"""No network and one thread per test process: several may share a small machine, and results do not depend on it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def intervals_of_few(monkeypatch):
    """Intervals of any number of prompts, for figures that are worked out by hand."""
    monkeypatch.setattr("prism.evaluation.accuracy.FEWEST_PROMPTS", 1)
