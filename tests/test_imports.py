"""Every module imports by itself, whatever was imported before: no circle that an order of imports hides.

A circle lies within a room, as import-linter lets rooms import downwards alone: the modules of other rooms may stay.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import prism

ROOT = Path(__file__).parents[1]

CODE = """
import importlib, pathlib, sys, warnings
warnings.simplefilter("ignore")
root = pathlib.Path(sys.argv[1])
import accelerate, diffusers.loaders, transformers
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[2], False  # each module of prism is compiled once
failed = []
for path in sorted((root / "prism").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if name == "prism.__main__":
        continue
    room = name.split(".")[:2]
    for other in [other for other in sys.modules if other.split(".")[: len(room)] == room]:
        del sys.modules[other]
    if len(room) > 1 and "prism" in sys.modules:
        vars(sys.modules["prism"]).pop(room[1], None)
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
sys.exit("; ".join(failed) or 0)
"""


def test_each_module_imports_by_itself(tmp_path: Path) -> None:
    source = ROOT / "src"
    words = [sys.executable, "-c", CODE, str(source), str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_rooms_that_the_documents_name_are_attributes_of_the_package():
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md")) + (ROOT / "README.md").read_text()
    for name in set(re.findall(r"(?<![\w.])prism\.([a-z]+)\.", text)) - {"lab", "loading"}:
        assert prism.__getattr__(name) is importlib.import_module(f"prism.{name}")


def test_test_files_have_names_of_their_own():
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest collects one of them alone
