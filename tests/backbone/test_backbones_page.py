"""docs/backbones.md says what the code's own facts say, and its example of a family of one's own runs."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.zoo import VARIANTS
from tests.zoo.own import OwnPipeline, own

from prism.backbone import FAMILIES, Family

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "backbones.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def module() -> Any:
    spec = importlib.util.spec_from_file_location("backbones", DOCS / "backbones.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_page_holds_the_table_of_facts_and_every_variant(module: Any) -> None:
    assert module.facts() in PAGE, "run python docs/backbones.py"
    assert [name for name in VARIANTS if f"| `{name}` |" not in PAGE] == []


def test_the_page_explains_every_field(module: Any) -> None:
    table = module.fields()
    assert table in PAGE, "run python docs/backbones.py"
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", table, flags=re.M)
    assert [name for name, _ in rows] == [field.name for field in fields(Family)]


def test_the_example_of_a_family_of_ones_own_runs(tmp_path: Path, families_put_back: None) -> None:
    (code,) = re.findall(r"```python\n(from dataclasses import replace\n.*?)```", PAGE, flags=re.S)
    assert len(code.splitlines()) == 5
    own()[0].save_pretrained(tmp_path / "pipe")
    names: dict[str, Any] = {"MyPipeline": OwnPipeline}
    exec(code.replace("path/to/a/pipeline", str(tmp_path / "pipe")), names)
    assert names["judge"].backbone.family is FAMILIES["mine"]
