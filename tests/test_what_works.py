"""docs/what-works.md says what the tests say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

from tests.works import Outcome, Topic

DOCS = Path(__file__).parents[1] / "docs"


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("what_works", DOCS / "what_works.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_line_names_a_topic_and_an_outcome() -> None:
    for topic, what, outcome, how, file, test in _module().rows():
        assert topic in get_args(Topic), (file, test)
        assert outcome in get_args(Outcome), (file, test)
        assert "|" not in what + how, (file, test)


def test_the_page_is_that_of_the_tests() -> None:
    found = (DOCS / "what-works.md").read_text(encoding="utf-8")
    assert found == _module().page(get_args(Topic)), "run python docs/what_works.py"
