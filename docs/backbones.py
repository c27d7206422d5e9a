"""Write the tables of docs/backbones.md: `python docs/backbones.py`, which runs the matrix of tests for the second one.

The first comes from the same facts that the code uses; the second from what the matrix measured on tiny pipelines; the
third from what stands under the fields of `Family`; the last from the reasons why other pipelines have no row.
"""

from __future__ import annotations

import ast
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from prism.backbone import FAMILIES, OPEN_SORA, Family
from prism.backbone.unsupported import UNSUPPORTED
from prism.report.tables import markdown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backbones.md"
SOURCE = ROOT / "src" / "prism" / "backbone" / "family.py"
CLOCKS = {
    "flow": "flow: (1 - s) z + s e",
    "rising_flow": "flow, timesteps rise from noise",
    "ddpm": "DDPM, index floored",
    "euler": "DDPM, between indices",
    "edm": "EDM, ln sigma even",
}
GUIDANCE = {"two_calls": "two calls, conditional first", "one_batch": "one batch, conditional "}


def facts() -> str:
    """The table of families."""
    head = ("backbone", "pipelines", "default tap", "noise levels", "latents in the loop", "guidance", "text tokens")
    return markdown(head, [_row(family) for family in (*FAMILIES.values(), OPEN_SORA)])


def _row(family: Family) -> tuple[str, ...]:
    blocks = ", then ".join(f"`{name}`" for name in family.blocks)
    guidance = {"guider": "the pipeline's guider", "": "an input of the denoiser"}.get(
        family.guidance, f"`{family.guidance}`"
    )
    place = ("first" if family.conditional_first else "last") if family.cfg == "one_batch" else ""
    text = "none" if family.text_embedder is None else f"`{family.text_embedder}`"
    text = f"{text}: {family.text_reason}"
    return (
        family.models,
        ", ".join(f"`{name}`" for name in family.pipelines),
        f"{family.tap:g} of {blocks}: {family.tap_reason}",
        CLOCKS[family.clock] if isinstance(family.clock, str) else "its own",
        family.layout,
        f"{guidance}: {GUIDANCE[family.cfg]}{place}",
        text,
    )


def unsupported() -> str:
    """The table of diffusers' pipelines without a row, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    return markdown(("pipelines", "not supported, as"), [(", ".join(names), each) for each, names in reasons.items()])


def fields() -> str:
    """The table of a row's facts: what stands under each field of `Family` in its source."""
    (row,) = (node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    told = {
        field.target.id: (ast.unparse(field.value) if field.value else "", ast.literal_eval(text.value))
        for field, text in pairwise(row.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    rows = []
    for name, (default, text) in told.items():
        default = {"BATCHED": "the names that diffusers uses", "field(default_factory=dict)": "none"}.get(
            default, default
        )
        rows.append(
            (f"`{name}`", f"`{default}`" if default and " " not in default else default, " ".join(text.split()))
        )
    return markdown(("fact", "default", ""), rows)


def measured(found: dict[str, dict[str, Any]]) -> str:
    """The table of variants, of what `tests.zoo.MEASURED` holds after the matrix, and what they were let off."""
    names = ("grid", "tap", "latents", "guidance", "tap_error", "one_by_one", "in_a_batch")
    head = ("variant", "token grid", "tap", "latents", "guidance", "tokens, inside against outside")
    head += ("winner, one by one", "winner, in a batch")
    rows = []
    for variant, values in found.items():
        cells = (values.get(name, "") for name in names)
        rows.append((f"`{variant}`", *(f"{cell:.0e}" if isinstance(cell, float) else str(cell) for cell in cells)))
    exempt = [
        f"- `{variant}` is not tested for {check.removeprefix('let off').strip().replace('_', ' ')}, because {reason}."
        for variant, values in found.items()
        for check, reason in values.items()
        if check.startswith("let off")
    ]
    return "\n".join([markdown(head, rows), "", *exempt])


def put(text: str, mark: str, table: str) -> str:
    """The page with what stands between the comments `mark` replaced."""
    start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{PAGE} lacks the comments around the table of {mark}.")
    return before + start + table + "\n" + end + after


def main() -> None:
    import pytest

    sys.path.insert(0, str(ROOT))
    from tests.zoo import MEASURED

    if pytest.main(["-q", str(ROOT / "tests" / "backbone" / "test_matrix.py"), "-p", "no:xdist"]):
        sys.exit("The matrix does not hold; nothing is written.")
    page = PAGE.read_text(encoding="utf-8")
    page = put(put(put(page, "facts", facts()), "fields", fields()), "measured", measured(MEASURED))
    page = put(page, "unsupported", unsupported())
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
