"""The output of `prism score`: a table on the terminal, a CSV or JSON file, and a journal of clips while it runs."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prism import files
from prism.errors import PrismError, first_difference, quoted

SHOWN = 20  # clips that are printed if a file holds all of them
COLUMNS = ("video", "prompt", "t", "dimension", "score", "standard_error", "draws")
REFERENCE_COLUMNS = ("percentile", "win_probability", "reference_clips", "reference_of")


def cells(scored: Any) -> list[dict[str, Any]]:
    """One entry per level and dimension of a `VideoScores` of one video."""
    cells = []
    compared = {"percentile": scored.percentiles, "win_probability": scored.win_probabilities}
    for index, t in enumerate(scored.levels):
        for column, dimension in enumerate(scored.dimensions):
            values = {"score": scored.scores, "standard_error": scored.errors}
            values |= {name: value for name, value in compared.items() if value is not None}
            numbers = {name: _number(value[0, index, column].item()) for name, value in values.items()}
            cells.append({"t": t, "dimension": dimension, **numbers})
    return cells


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


def write(out: Path, document: dict[str, Any]) -> None:
    """Write the .csv, with a row per clip, level and dimension, or the .json."""
    if out.suffix.lower() == ".json":
        files.write_json(out, document)
        return
    compared = REFERENCE_COLUMNS if document["reference"] else ()
    images = ("image",) if any(clip["image"] for clip in document["clips"]) else ()
    with files.new_file(out) as work, work.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, *compared, *images], lineterminator="\n")
        writer.writeheader()
        for clip in document["clips"]:
            same = {name: clip[name] for name in ("video", "prompt", *images, *compared[2:])}
            for cell in clip["scores"]:
                writer.writerow({**same, "draws": document["draws"] if cell["t"] else 1, **cell})


class Journal:
    """The scored clips, line by line in a file beside `out`, from which a run that was stopped can continue.

    Each of several processes has a file of its own. The first process joins them when a run continues, with any number
    of processes.

    Args:
        out: the file that the run writes; None: there is no journal.
        facts: what the rows depend on.
        rank: of this process.
    """

    def __init__(self, out: Path | None, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.out, self.facts = out, json.loads(json.dumps(facts))
        self.file = None if out is None else self.path(out, rank)

    @staticmethod
    def path(out: Path, rank: int = 0) -> Path:
        return out.with_name(f"{out.name}.partial{f'-{rank}' if rank else ''}")

    @staticmethod
    def key(clip: Mapping[str, Any]) -> str:
        return json.dumps([clip["video"], clip["prompt"], clip["image"]])

    @classmethod
    def every(cls, out: Path) -> list[Path]:
        """The files of all processes of an earlier run, ordered by rank."""
        first = cls.path(out)
        others = first.parent.glob(f"{glob.escape(first.name)}-*")
        ranks = sorted(int(rank) for path in others if (rank := path.name[len(first.name) + 1 :]).isdecimal())
        return [path for path in (first, *(cls.path(out, rank) for rank in ranks)) if os.path.lexists(path)]

    def begin(self, resume: bool) -> dict[str, dict[str, Any]]:
        """Begin the journal; return the rows, by key, of the run that is resumed, whose files are joined into one.

        Only the first process may call this, before any other process adds a row.
        """
        if self.out is None or self.file is None:
            return {}
        earlier = self.every(self.out)
        if earlier and not resume:
            raise PrismError(
                f"The file {files.shown(earlier[0])} is of a run that stopped; go on with --resume, or delete it."
            )
        rows: dict[str, dict[str, Any]] = {}
        for path in earlier:
            rows |= self._read(path)
        with files.new_file(self.file) as work, work.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{json.dumps(line)}\n" for line in ({"journal": self.facts}, *rows.values()))
        for path in earlier:
            if path != self.file:
                path.unlink()
        return rows

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        """The rows in whole lines of an earlier run with the same facts."""
        files.check_regular(path)
        data = path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        if not lines and path != self.file:  # killed before its first line was whole
            return {}
        try:
            before, *rows = (json.loads(line) for line in lines)
            before = before["journal"]
            by_key = {self.key(row): row for row in rows}
            if before == self.facts and not all(_is_row(row, self.facts) for row in rows):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise PrismError(
                f"The file {files.shown(path)} is no list of scored clips, or was altered; delete it."
            ) from None
        if before != self.facts:
            raise PrismError(
                f"The run in {files.shown(path)} was another: {first_difference(before, self.facts)}; delete it, or "
                "choose another --out."
            )
        return by_key

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a clip's row."""
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as stream:
            if not stream.tell():  # the file of another process than the first, which `begin` does not make
                stream.write(f"{json.dumps({'journal': self.facts})}\n")
            stream.write(f"{json.dumps(row)}\n")

    def end(self) -> None:
        """Remove the files of all processes, once `out` is written."""
        for path in [] if self.out is None else self.every(self.out)[::-1]:
            path.unlink(missing_ok=True)


def _end(name: str) -> str:
    """A clip's name, or the end of a long one, as names of clips mostly begin alike."""
    line = quoted(name, 2000)
    return line if len(line) <= 40 else f"...{line[-37:]}"


def _is_row(row: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """True for a row with every level, dimension and value that `write` needs."""
    has_reference = bool(facts["reference"])
    named = [(cell["t"], cell["dimension"]) for cell in row["scores"]]
    numbers = [
        cell[name]
        for cell in row["scores"]
        for name in ("score", "standard_error", *REFERENCE_COLUMNS[: 2 * has_reference])
    ]
    expected = [(t, name) for t in facts["levels"] for name in facts["dimensions"]]
    plain = all(isinstance(each, int | float | None) for each in numbers)
    return named == expected and plain and all(name in row for name in REFERENCE_COLUMNS[2:] if has_reference)


def show(document: Mapping[str, Any], out: Path | None) -> None:
    """Print the table, the meaning of its percentiles, and the path of the file."""
    from rich.console import Console
    from rich.markup import escape

    from prism.report.tables import Column, Table

    clips = document["clips"]
    shown = clips if out is None else clips[:SHOWN]
    rows = [
        {**clip, "t": t, "cells": {cell["dimension"]: cell for cell in clip["scores"] if cell["t"] == t}}
        for clip in shown
        for t in document["levels"]
    ]
    columns: list[Any] = [
        Column("clip", lambda row: escape(_end(str(row["video"]))), left=True),
        Column("t", lambda row: f"{row['t']:g}"),
        *(Column(escape(name), partial(_cell, name)) for name in document["dimensions"]),
    ]
    console = Console(highlight=False)
    console.print(Table(columns, rows))
    for line in _read_as(document):
        console.print(line, soft_wrap=True, markup=False)
    if out is not None:
        more = f" ({len(clips) - len(shown):,} more clips than shown)" if len(clips) > len(shown) else ""
        console.print(f"Scores: {out}{more}", soft_wrap=True, markup=False)


def _read_as(document: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the reference that percentiles and win probabilities are taken from."""
    reference = document["reference"]
    if not reference:
        yield "This head has no reference to read scores beside: prism reference --head HEAD --data STORE adds one."
        return
    outside = [t for t in document["levels"] if t not in reference["levels"]]
    if outside:
        yield (
            f"The head's reference has no level t = {', '.join(f'{t:g}' for t in outside)}, so that scores there have "
            f"no percentile: it has {', '.join(f'{t:g}' for t in reference['levels'])} (--t of prism reference)."
        )
    if len(outside) == len(document["levels"]):
        return
    store = reference["store"] if isinstance(reference.get("store"), dict) else {}
    name, split = (quoted(str(each), 60) for each in (store.get("name"), reference.get("split")))
    yield (
        f"Percentile, and probability of being preferred (half of a tie counts), among clips of {name} ({split}) at "
        f"t = {', '.join(f'{t:g}' for t in document['levels'] if t not in outside)}."
    )
    for t, by_name in reference["intervals"].items():
        spans = (f"{low:+.2f} to {high:+.2f} in {quoted(each, 60)}" for each, (low, _, high) in by_name.items())
        yield f"At t = {t}, 95 % of them score {', '.join(spans)}."
    yield from _unlike(reference, document)
    apart = sum(clip["reference_of"] == "all" for clip in document["clips"])
    if apart:
        shares = reference.get("between_prompts") or {}
        numbers = [share for by_name in shares.values() for share in by_name.values() if share is not None]
        most = f", and up to {max(numbers):.0%} of their variance is between prompts" if numbers else ""
        yield (
            f"The reference lacks the prompts of {apart} of {len(document['clips'])} clips: these stand among clips of "
            f"other prompts{most}, so that their place says more of the prompt than of the clip."
        )


def _unlike(reference: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for clips that differ from the reference's in number, size or choice of frames."""
    pairs = [(reference.get("call"), document["call"]), (reference.get("frames"), document["frames"])]
    for theirs, ours in pairs:
        for name in ("num_frames", "height", "width", "fps", "start", "fit"):
            if isinstance(theirs, dict) and name in theirs and name in ours and theirs[name] != ours[name]:
                yield (
                    f"The reference's clips are of {name} {quoted(theirs[name], 40)}, and these of {ours[name]}: clips "
                    "that are unlike are compared."
                )
                return


def _cell(dimension: str, row: Mapping[str, Any]) -> str:
    cell = row["cells"][dimension]
    error = cell["standard_error"]
    text = f"{cell['score']:+.2f}" + ("" if error is None else f" ± {error:.2f}")
    if cell.get("percentile") is not None:
        text += f"\n{cell['percentile']:.0f} %, {cell['win_probability']:.2f}"
    return text
