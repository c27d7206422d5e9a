"""Write docs/what-works.md from the lines beside the tests: python docs/what_works.py."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "what-works.md"
HEAD = """# What works with what people do to pipelines

Each line is shown by a test: `pytest -q FILE -k TEST` runs it. *exact*: the winner is that of the stock call, to the
bit with `batch_size=1`, and scores are those of the plain pipeline. *to rounding*: the same up to the arithmetic of the
change itself. *warned*: it goes on, and a sentence says what to expect. *refused*: one sentence, before any sampling.
*works*: there is nothing to compare with.
"""


def rows() -> list[tuple[str, str, str, str, str, str]]:
    """(topic, what, outcome, how, test file, test) of every line in the tests, in the order of the files."""
    lines = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "works":
                    topic, what, outcome, how = map(ast.literal_eval, mark.args)
                    what, how = what[:1].upper() + what[1:], how[:1].upper() + how[1:].rstrip(".")
                    lines.append((topic, what, outcome, how, str(path.relative_to(ROOT)), node.name))  # type: ignore[attr-defined]
    return lines


def page(topics: tuple[str, ...]) -> str:
    lines, parts = rows(), [HEAD]
    for topic in topics:
        own = [line for line in lines if line[0] == topic]
        if own:
            parts.append(f"## {topic}\n\n| what | outcome | how | test |\n|---|---|---|---|")
            parts[-1] += "".join(
                f"\n| {what} | {outcome} | {how} | [`{test}`](../{file}) |" for _, what, outcome, how, file, test in own
            )
            parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    from tests.works import Topic

    PAGE.write_text(page(get_args(Topic)), encoding="utf-8")
