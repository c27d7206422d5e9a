"""`prism data check`: what is in a preference set, before anything is computed from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from prism.commands.options import option
from prism.errors import quoted

SHOWN = 3  # examples of a list that are printed


@dataclass(frozen=True)
class Check:
    """Say what is in a preference set: pairs, ties, conflicts, leaks, missing files, agreement of annotators.

    Reads CSV, JSON, JSONL and Parquet in the formats of public sets and of one's own, told by their columns. Nothing is
    written.
    """

    file: Annotated[str, tyro.conf.Positional, option("FILE")]
    """File, folder, or id of a data set on the Hub, of which the tables alone are fetched."""
    form: Annotated[str | None, option("NAME", "by the columns")] = None
    """Format to read, where several fit."""
    root: Annotated[Path | None, option("FOLDER", "the file's own")] = None
    """Folder that paths in the file are relative to."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of text files, such as cp1252."""
    rule: str = "majority"
    """How annotators are joined: majority (more than half, else a tie) or paper (votes that conflict give no label)."""
    margin: float = 0.0
    """Largest difference of ratings, or of probabilities, that is a tie."""
    probe: bool = False
    """Open every clip and decode its first frame."""
    json: bool = False
    """Print everything as JSON."""

    def main(self) -> None:
        """Read the set and print what is in it."""
        from prism.preference.check import summary
        from prism.preference.readers import read

        found = read(self.file, self.form, root=self.root, encoding=self.encoding, media=False)
        facts = summary(found, self.rule, self.margin, self.probe)
        print(json.dumps(facts, indent=2, ensure_ascii=False) if self.json else "\n".join(lines(facts)))


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `prism.preference.check.summary` in words, a line each."""
    videos, generators = f"{facts['videos']:,} clips", ", ".join(f"{quoted(k, 40)} {v:,}" for k, v in _most(facts))
    shown = [
        f"Format: {facts['form']}",
        f"{facts['pairs']:,} pairs of {videos} for {facts['prompts']:,} prompts; {facts['votes']:,} votes, "
        f"{facts['ratings']:,} ratings",
        f"Generators: {generators}",
        f"Splits: {', '.join(f'{quoted(name, 40)} {count:,}' for name, count in facts['splits'].items()) or 'none'}",
    ]
    width = max([9, *(min(len(name), 40) for name in facts["dimensions"])])
    shown.append(f"{'Dimension':<{width}}  {'A':>9}  {'B':>9}  {'tie':>9}  {'missing':>9}  agreement (alpha)")
    for name, counts in facts["dimensions"].items():
        cells = "  ".join(f"{counts[each]:>9,}" for each in ("A", "B", "tie", "missing"))
        shown.append(f"{quoted(name, 40):<{width}}  {cells}  {_agreement(name, facts['agreement'])}")
    shown.append(f"Duplicates: {facts['duplicates']:,}; pairs with conflicting votes: {facts['conflicts']:,}")
    shown += _list("Missing files", facts["missing"])
    if facts["archives"]:
        shown += _list("Archives, which may hold them: unpack these and check again", facts["archives"])
    if facts["unreadable"] is not None:
        shown += _list("Unreadable files", [f"{each['path']} ({each['error']})" for each in facts["unreadable"]])
    shown += _list("Prompts that several splits share", facts["shared_prompts"])
    shown += _list("Clips that several splits share", facts["shared_videos"])
    for why, places in facts["dropped"].items():
        shown += _list(f"Dropped rows, {why}", places)
    return shown


def _most(facts: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted(facts["generators"].items(), key=lambda each: -each[1])[:30]


def _agreement(name: str, by_dimension: dict[str, Any]) -> str:
    if name not in by_dimension:
        return "follows from the others"
    found = by_dimension[name]
    if found is None:
        return "one vote each"
    if found["alpha"] is None:
        return "all votes alike"
    span = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['alpha']:.2f}{span}"


def _list(title: str, items: Sequence[str]) -> list[str]:
    more = f", and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    examples = "; ".join(quoted(item, 80) for item in items[:SHOWN])
    return [f"{title}: {len(items):,}{f' ({examples}{more})' if items else ''}"]
