"""Pages, docstrings and workflows name modules, functions, files and make targets that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = [path.relative_to(ROOT / "src").with_suffix("").parts for path in (ROOT / "src/prism").rglob("*.py")]
MODULES = {".".join(parts).removesuffix(".__init__") for parts in FILES}


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


def exists(name: str) -> bool:
    """True for a module of the package, or an attribute, field or method in one: "prism.video.read_clip"."""
    parts = name.split(".")
    length = max(n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in MODULES)
    thing = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        if not hasattr(thing, part):
            return part in getattr(thing, "__annotations__", {})  # a field without a default
        thing = getattr(thing, part)
    return True


NAMED = {"prism.families"}  # the group of entry points, no module


@pytest.mark.filterwarnings("ignore:prism.media is called prism.video now:FutureWarning")
def test_every_dotted_name_in_pages_code_and_docstrings_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src/prism").rglob("*.py")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.name != "CHANGELOG.md")
    named = set(re.findall(r"\bprism(?:\.[A-Za-z_]\w*)+", text)) - NAMED
    assert len(named) > 150
    assert [name for name in sorted(named) if not exists(name)] == []
    wrong = ["prism.sources", "prism.video.read_clips", "prism.video.frames.nothing"]
    assert [name for name in wrong if exists(name)] == []


def test_no_module_is_longer_than_400_lines() -> None:
    long = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "src/prism").rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
