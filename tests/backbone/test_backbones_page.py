"""docs/backbones.md says what the code's own facts say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.zoo import VARIANTS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_holds_the_table_of_facts_and_every_variant() -> None:
    spec = importlib.util.spec_from_file_location("backbones", DOCS / "backbones.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "backbones.md").read_text(encoding="utf-8")
    assert module.facts() in page, "run python docs/backbones.py"
    assert [name for name in VARIANTS if f"| `{name}` |" not in page] == []
