"""CONTRIBUTING.md and the workflows name files and make targets that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_that_contributing_names_exists() -> None:
    named = re.findall(r"\b(?:src|tests|docs)/[\w/.-]*\w", TEXT)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_name_that_a_recipe_gives_stands_in_the_files_of_its_recipe() -> None:
    for recipe in TEXT.split("\n### ")[1:]:
        code = "".join((ROOT / name).read_text(encoding="utf-8") for name in set(re.findall(r"src/[\w/]*\.py", recipe)))
        names = re.findall(r"`([A-Z_]{4,}|[a-z]+_[a-z_]+)`", recipe)
        assert [name for name in names if name != "NAME" and not re.search(rf"\b{name}\b", code)] == [], recipe[:30]


def test_every_make_target_that_is_named_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / ".github/workflows").iterdir()]
    named = re.findall(r"(?m)^(?:\s*- run: )?make ([a-z]+)", "\n".join([TEXT, *workflows]))
    assert {"test", "lowest", "dist", "upstream"} <= set(named)
    assert [name for name in named if name not in targets] == []
