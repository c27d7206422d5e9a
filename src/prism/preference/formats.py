"""Formats of preference sets, a function each: which columns tell one, and how its rows become votes and ratings.

What labels, ties and traps each has, stands in its function. Formats are told by columns alone, never by a name of a
file or folder: two benchmarks share a name, and mirrors rename what they copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from prism.errors import PrismError, quoted
from prism.preference.sets import Collector
from prism.preference.sources import Row, Source

NO_LABEL = "no label in any dimension"
NO_PROMPT = "no prompt"
NO_CLIP = "a clip is not named"
SAME_CLIP = "both sides are the same clip"
# columns of any format that no annotator judged
# fmt: off
KNOWN = frozenset({
    "prompt", "chosen", "rejected", "video", "path", "image", "frames", "annotator", "user", "user_id", "worker",
    "split", "seed", "id", "index", "idx", "fps", "num_frames", "width", "height", "duration", "model", "dimension",
    "score", "confidence", "source", "row", "video_a", "video_b", "chosen_model", "rejected_model",
})
# fmt: on


@dataclass(frozen=True)
class Format:
    """A format: what it is in words, how it is told by columns, and how it is read."""

    about: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, Collector], None]


@dataclass
class Clips:
    """The clips that the cells of a source name or hold."""

    source: Source
    found: Collector
    _embedded: dict[str, list[tuple[str, str] | None]] = field(default_factory=dict)

    def get(self, row: Row, column: str) -> dict[str, Any] | None:
        """Where a cell's clip is, as `Collector.video` takes it; None where the cell is empty.

        A cell is a path, bytes in Parquet (alone, or as `datasets` keeps them with a path), or a list of pictures.
        """
        if column in self.source.embedded:
            if column not in self._embedded:
                self._embedded[column] = self.source.references(column)
            reference = self._embedded[column][row.place.row]
            return None if reference is None else {"embedded": reference}
        cell = row.cells.get(column)
        if isinstance(cell, dict):
            cell = cell.get("path")
        if isinstance(cell, list):
            if not cell or not all(isinstance(each, str) for each in cell):
                raise row.wrong(column, "a path, or a list of paths of pictures")
            return {"frames": cell, "video": cell[0]}
        path = Row({column: cell}, row.place).text(column)
        return None if path is None else {"path": path.strip()}

    def pair(
        self, row: Row, columns: tuple[str, str], models: tuple[str, str] | None = None, **facts: Any
    ) -> tuple[str, str, str] | None:
        """The identities of a row's two clips, and its prompt; None, and the row is dropped, where one is not there."""
        prompt = row.text("prompt")
        if prompt is None:
            self.found.drop(row, NO_PROMPT)
            return None
        sides = [self.get(row, column) for column in columns]
        if None in sides:
            self.found.drop(row, NO_CLIP)
            return None
        ids = []
        for number, side in enumerate(sides):
            own = {name: values[number] for name, values in facts.items()}
            model = row.text(models[number]) if models else None
            ids.append(self.found.video(row, columns[number], prompt, **side, model=model, **own))  # type: ignore[arg-type]
        if ids[0] == ids[1]:
            self.found.drop(row, SAME_CLIP)
            return None
        return ids[0], ids[1], prompt


def chosen_rejected(source: Source, found: Collector) -> None:
    """One's own pairs: `prompt`, `chosen`, `rejected`, and where they are there `dimension`, `annotator`, `confidence`,
    `chosen_model`, `rejected_model`, `split`. There are no ties, and the better clip is always named first."""
    clips = Clips(source, found)
    for row in source:
        pair = clips.pair(row, ("chosen", "rejected"), ("chosen_model", "rejected_model"))
        if pair is None:
            continue
        first, second, prompt = pair
        found.vote(
            *(row, first, second, prompt, row.text("dimension") or "overall", 1, "chosen"),
            annotator=row.text("annotator"),
            confidence=row.number("confidence"),
            split=row.text("split"),
            by_id=True,
        )


def ratings(source: Source, found: Collector) -> None:
    """One's own ratings: `prompt`, `video` (or `path`), and either a column of numbers per dimension, or `dimension`
    and `score`; where they are there `annotator`, `model`, `fps`, `num_frames`, `image`, `split`. Higher is better."""
    column = "video" if "video" in source.columns else "path"
    clips, names = Clips(source, found), rated(source)
    for row in source:
        prompt, clip = row.text("prompt"), clips.get(row, column)
        if prompt is None or clip is None:
            found.drop(row, NO_PROMPT if prompt is None else NO_CLIP)
            continue
        if source.has("dimension", "score"):
            scores = {row.text("dimension") or "overall": row.number("score")}
        else:
            scores = {name: row.number(name) for name in names}
        scores = {name: score for name, score in scores.items() if score is not None}
        if not scores:
            found.drop(row, NO_LABEL)
            continue
        facts: dict[str, Any] = {name: row.number(name) for name in ("fps", "num_frames")}
        facts |= {name: row.text(name) for name in ("model", "image", "split")}
        video = found.video(row, column, prompt, **clip, **facts)
        for name, score in scores.items():
            found.rating(row, video, prompt, name, score, row.text("annotator"))  # type: ignore[arg-type]


def rated(source: Source) -> list[str]:
    """The columns that hold a number somewhere, but for those that are known to be no ratings."""
    left = [name for name in source.columns if name.casefold() not in KNOWN and name not in source.embedded]
    names: list[str] = []
    for row in source if left else ():
        names += [name for name in left if name not in names and _is_number(row.cells.get(name))]
    return [name for name in source.columns if name in names]


def _is_number(cell: Any) -> bool:
    try:
        return not isinstance(cell, bool) and isinstance(cell, str | int | float) and float(cell) == float(cell)
    except (ValueError, OverflowError):
        return False


LABELS = {"a": 1, "b": -1, "same": 0, "tie": 0, "invalid": None}


def videoalign(source: Source, found: Collector) -> None:
    """Training CSV of VideoAlign and VideoGen-RewardBench: `path_A`, `path_B`, `prompt`, and a column of A, B, same or
    invalid per dimension (VQ, MQ, TA, Overall, or one's own); fps_A, num_frames_A, A_model, MOS_A_VQ, annotator and the
    like where they are there. An empty or invalid label is a missing one; a clip recurs in many pairs."""
    known = {f"{name}_{side}" for name in ("path", "fps", "num_frames", "model", "image") for side in "AB"}
    known |= {"A_model", "B_model", "metainfo_idx", "image"}
    left = [name for name in source.columns if name not in known and name.casefold() not in KNOWN]
    names = [name for name in left if name in ("VQ", "MQ", "TA", "Overall")]
    names += _labelled(source, [name for name in left if name not in names and not name.startswith("MOS_")])
    if not names:
        raise PrismError(
            f"The file {quoted(source.name, 150)} has pairs without a column of labels; VQ, MQ, TA or Overall with A, "
            "B or same is needed."
        )
    models = ("A_model", "B_model") if source.has("A_model") else ("model_A", "model_B")
    marked: set[tuple[str, str, str | None]] = set()
    clips = Clips(source, found)
    for row in source:
        facts: dict[str, Any] = {
            name: (row.number(f"{name}_A"), row.number(f"{name}_B")) for name in ("fps", "num_frames")
        }
        pair = clips.pair(row, ("path_A", "path_B"), models, **facts, split=(row.text("split"),) * 2)
        if pair is None:
            continue
        labels = {name: row.label(name, LABELS) for name in names}
        if all(label is None for label in labels.values()):
            found.drop(row, NO_LABEL)
            continue
        annotator = row.text("annotator")
        for name, label in labels.items():
            if label is not None:
                dimension = "overall" if name == "Overall" else name
                given = {"given": row.cells[name], "annotator": annotator, "split": row.text("split")}
                found.vote(row, *pair, dimension, label, **given)
        for side, video in zip("AB", pair):
            for name in names:
                score = row.number(f"MOS_{side}_{name}")
                if score is not None and (video, name, annotator) not in marked:
                    marked.add((video, name, annotator))
                    found.rating(row, video, pair[2], "overall" if name == "Overall" else name, score, annotator)


def _labelled(source: Source, columns: Collection[str]) -> Iterator[str]:
    """The columns that hold A, B or same somewhere."""
    held: set[str] = set()
    for row in source if columns else ():
        held |= {name for name in columns if str(row.cells.get(name)).strip().casefold() in ("a", "b", "same", "tie")}
    return (name for name in source.columns if name in held)


FORMATS = {
    "chosen-rejected": Format(
        "one’s own pairs: prompt, chosen, rejected",
        lambda source: source.has("prompt", "chosen", "rejected"),
        chosen_rejected,
    ),
    "ratings": Format(
        "one’s own ratings: prompt, video or path, and numbers",
        lambda source: (
            (source.has("prompt", "video") or source.has("prompt", "path"))
            and (source.has("dimension", "score") or bool(rated(source)))
        ),
        ratings,
    ),
    "videoalign": Format(
        "VideoAlign’s training CSV, VideoGen-RewardBench: path_A, path_B, prompt, and A, B or same",
        lambda source: source.has("path_A", "path_B", "prompt"),
        videoalign,
    ),
}
