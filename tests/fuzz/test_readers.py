"""Readers under damage: whatever a folder holds, it loads and can be used, or a sentence says what is wrong with it.

`benchmarks/fuzz.py` runs the same cases by the thousand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import readers

SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: Any) -> readers.Case:
    return readers.heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: Any) -> readers.Case:
    return readers.backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: Any) -> readers.Case:
    return readers.pixels(tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: Any) -> readers.Case:
    return readers.stores(tmp_path_factory.mktemp("stores"))


@settings(max_examples=150, **SETTINGS)
@given(seed=st.integers(0, 2**31))
def test_a_damaged_head_is_a_sentence(heads: readers.Case, seed: int) -> None:
    told, kind, words = heads(Random(seed))
    assert kind in ("fine", "sentence"), f"{kind} after {told}: {words}"


@settings(max_examples=60, **SETTINGS)
@given(seed=st.integers(0, 2**31))
def test_a_damaged_pipeline_is_a_sentence(backbones: readers.Case, seed: int) -> None:
    told, kind, words = backbones(Random(seed))
    assert kind in ("fine", "sentence"), f"{kind} after {told}: {words}"


@settings(max_examples=40, **SETTINGS)
@given(seed=st.integers(0, 2**31))
def test_a_damaged_pixel_judge_is_a_sentence(pixels: readers.Case, seed: int) -> None:
    told, kind, words = pixels(Random(seed))
    assert kind in ("fine", "sentence"), f"{kind} after {told}: {words}"


@settings(max_examples=100, **SETTINGS)
@given(seed=st.integers(0, 2**31))
def test_a_damaged_store_is_a_sentence(stores: readers.Case, seed: int) -> None:
    told, kind, words = stores(Random(seed))
    assert kind in ("fine", "sentence"), f"{kind} after {told}: {words}"
