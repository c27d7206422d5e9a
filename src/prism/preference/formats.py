"""Formats of preference sets: the columns that identify each, and a function per format that reads its rows.

The docstring of a function lists the format's labels, ties and pitfalls. A format is recognised by its columns alone,
never by the name of a file or folder: two benchmarks share a name, and mirrors rename what they copy.
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
# columns of any format that are not ratings
# fmt: off
KNOWN = frozenset({
    "prompt", "chosen", "rejected", "video", "path", "image", "frames", "annotator", "user", "user_id", "worker",
    "split", "seed", "id", "index", "idx", "fps", "num_frames", "width", "height", "duration", "model", "dimension",
    "score", "confidence", "source", "row", "video_a", "video_b", "chosen_model", "rejected_model",
})
# fmt: on


@dataclass(frozen=True)
class Format:
    """A format: its description for error messages, its test on a file's columns, and its reader."""

    about: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, Collector], None]


@dataclass
class Clips:
    """The clips that the cells of a source name or hold."""

    source: Source
    collector: Collector
    _embedded: dict[str, list[tuple[str, str] | None]] = field(default_factory=dict)

    def get(self, row: Row, column: str) -> dict[str, Any] | None:
        """The clip of a cell, as arguments of `Collector.video`; None if the cell is empty.

        A cell is a path, bytes in Parquet (alone, or with a path as `datasets` keeps them), or a list of pictures.
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
        """The identities of a row's two clips, and its prompt; None, and the row is dropped, if one is missing."""
        prompt = row.text("prompt")
        if prompt is None:
            self.collector.drop(row, NO_PROMPT)
            return None
        sides = [self.get(row, column) for column in columns]
        if None in sides:
            self.collector.drop(row, NO_CLIP)
            return None
        ids = []
        for number, side in enumerate(sides):
            of_side = {name: values[number] for name, values in facts.items()}
            of_side["image"] = next(
                (
                    cell
                    for cell in (row.cells.get(f"image_{'AB'[number]}"), row.cells.get("image"))
                    if isinstance(cell, str) and cell.strip()
                ),
                None,
            )
            if models:
                of_side["model"] = row.text(models[number])
            ids.append(self.collector.video(row, columns[number], prompt, **side, **of_side))  # type: ignore[arg-type]
        if ids[0] == ids[1]:
            self.collector.drop(row, SAME_CLIP)
            return None
        return ids[0], ids[1], prompt


def chosen_rejected(source: Source, collector: Collector) -> None:
    """Your own pairs: `prompt`, `chosen`, `rejected`; optionally `dimension`, `annotator`, `confidence`, `image`,
    `chosen_model`, `rejected_model`, `split`. There are no ties, and the better clip is always named first."""
    clips = Clips(source, collector)
    for row in source:
        pair = clips.pair(row, ("chosen", "rejected"), ("chosen_model", "rejected_model"))
        if pair is None:
            continue
        first, second, prompt = pair
        collector.vote(
            *(row, first, second, prompt, row.text("dimension") or "overall", 1, "chosen"),
            annotator=row.text("annotator"),
            confidence=row.number("confidence"),
            split=row.text("split"),
            by_id=True,
        )


def ratings(source: Source, collector: Collector) -> None:
    """Your own ratings: `prompt`, `video` (or `path`), and either a column of numbers per dimension, or `dimension`
    and `score`; optionally `annotator`, `model`, `fps`, `num_frames`, `image`, `split`. Higher is better."""
    column = "video" if "video" in source.columns else "path"
    clips, names = Clips(source, collector), rated(source)
    for row in source:
        prompt, clip = row.text("prompt"), clips.get(row, column)
        if prompt is None or clip is None:
            collector.drop(row, NO_PROMPT if prompt is None else NO_CLIP)
            continue
        if source.has("dimension", "score"):
            scores = {row.text("dimension") or "overall": row.number("score")}
        else:
            scores = {name: row.number(name) for name in names}
        scores = {name: score for name, score in scores.items() if score is not None}
        if not scores:
            collector.drop(row, NO_LABEL)
            continue
        facts: dict[str, Any] = {name: row.number(name) for name in ("fps", "num_frames")}
        facts |= {name: row.text(name) for name in ("model", "image", "split")}
        video = collector.video(row, column, prompt, **clip, **facts)
        for name, score in scores.items():
            collector.rating(row, video, prompt, name, score, row.text("annotator"))  # type: ignore[arg-type]


def lists_clips(source: Source) -> bool:
    """True if a table has the columns that `clip_list` needs."""
    return source.has("prompt") and (source.has("video") or source.has("path"))


def clip_list(source: Source, collector: Collector) -> None:
    """Clips of which nothing is said: `prompt`, `video` (or `path`), and where they are there `model`, `fps`, `image`.
    A clip that stands with several prompts is several clips: CLIP, CLIP#2, ..."""
    column = "video" if "video" in source.columns else "path"
    clips = Clips(source, collector)
    prompts: dict[str, list[str]] = {}
    for row in source:
        prompt, clip = row.text("prompt"), clips.get(row, column)
        if prompt is None or clip is None:
            collector.drop(row, NO_PROMPT if prompt is None else NO_CLIP)
            continue
        name = str(clip.get("path") or clip.get("video") or clip["embedded"][0])
        prompts_of_clip = prompts.setdefault(name, [])
        if prompt not in prompts_of_clip:
            prompts_of_clip.append(prompt)
            if len(prompts_of_clip) > 1:
                clip["video"] = f"{name}#{len(prompts_of_clip)}"
            facts: dict[str, Any] = {each: row.text(each) for each in ("model", "image", "split")}
            collector.video(row, column, prompt, **clip, fps=row.number("fps"), **facts)


def rated(source: Source) -> list[str]:
    """The columns with a number in at least one row, except those of `KNOWN`, which are not ratings."""
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


def videoalign(source: Source, collector: Collector) -> None:
    """Training CSV of VideoAlign and VideoGen-RewardBench: `path_A`, `path_B`, `prompt`, and a column of A, B, same or
    invalid per dimension (VQ, MQ, TA, Overall, or others); optionally fps_A, num_frames_A, A_model, MOS_A_VQ, annotator
    and the like. An empty or invalid label counts as missing; the same clip is in many pairs."""
    not_labels = {f"{name}_{side}" for name in ("path", "fps", "num_frames", "model", "image") for side in "AB"}
    not_labels |= {"A_model", "B_model", "metainfo_idx", "image"}
    left = [name for name in source.columns if name not in not_labels and name.casefold() not in KNOWN]
    names = [name for name in left if name in ("VQ", "MQ", "TA", "Overall")]
    names += _labelled(source, [name for name in left if name not in names and not name.startswith("MOS_")])
    if not names:
        raise PrismError(
            f"The file {quoted(source.name, 150)} has pairs without a column of labels; give a column VQ, MQ, TA or "
            "Overall with A, B or same."
        )
    models = ("A_model", "B_model") if source.has("A_model") else ("model_A", "model_B")
    scored: set[tuple[str, str, str | None]] = set()
    clips = Clips(source, collector)
    for row in source:
        facts: dict[str, Any] = {
            name: (row.number(f"{name}_A"), row.number(f"{name}_B")) for name in ("fps", "num_frames")
        }
        pair = clips.pair(row, ("path_A", "path_B"), models, **facts, split=(row.text("split"),) * 2)
        if pair is None:
            continue
        labels = {name: row.label(name, LABELS) for name in names}
        if all(label is None for label in labels.values()):
            collector.drop(row, NO_LABEL)
            continue
        annotator = row.text("annotator")
        for name, label in labels.items():
            if label is not None:
                dimension = "overall" if name == "Overall" else name
                details = {"given": row.cells[name], "annotator": annotator, "split": row.text("split")}
                collector.vote(row, *pair, dimension, label, **details)
        for side, video in zip("AB", pair):
            for name in names:
                score = row.number(f"MOS_{side}_{name}")
                if score is not None and (video, name, annotator) not in scored:
                    scored.add((video, name, annotator))
                    collector.rating(row, video, pair[2], "overall" if name == "Overall" else name, score, annotator)


def label_studio(source: Source, collector: Collector) -> None:
    """Label Studio's JSON export: tasks with `data` (path_A, path_B, prompt) and `annotations`; their results are
    choices A, B or same per dimension (`from_name`), or one pairwise selection, left or right, which has no tie.
    Cancelled annotations and predictions do not count. Its CSV and JSON-MIN exports have VideoAlign's columns."""
    clips = Clips(source, collector)
    for row in source:
        data = row.cells.get("data")
        if not isinstance(data, dict):
            raise row.wrong("data", "an object with path_A, path_B and prompt")
        task = Row(data, row.place)
        annotations = [each for each in row.items("annotations") if not _cancelled(row, each)]
        answers = [(each, *answer) for each in annotations for answer in _answers(row, each)]
        if not answers:
            collector.drop(row, NO_LABEL)
            continue
        facts: dict[str, Any] = {"split": (task.text("split"),) * 2}
        pair = clips.pair(task, ("path_A", "path_B"), **facts)
        if pair is None:
            continue
        for annotation, dimension, label, answer in answers:
            who = annotation.get("completed_by")
            who = who.get("email") or who.get("id") if isinstance(who, dict) else who
            who = None if who is None else str(who)
            collector.vote(row, *pair, dimension, label, answer, annotator=who, split=task.text("split"))


def _cancelled(row: Row, annotation: Any) -> bool:
    if not isinstance(annotation, dict):
        raise row.wrong("annotations", "a list of objects")
    return bool(annotation.get("was_cancelled"))


def _answers(row: Row, annotation: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Dimension, label and the label as given, for each result of an annotation that is one."""
    codes = {**LABELS, "left": 1, "right": -1}
    for result in Row(annotation, row.place).items("result"):
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict) or not ("choices" in value or "selected" in value):
            continue  # a comment, a rating of one clip, a region
        chosen = value.get("choices", value.get("selected"))
        chosen = chosen[0] if isinstance(chosen, list) and len(chosen) == 1 else chosen
        pairwise = "selected" in value
        dimension = "overall" if pairwise else str(result.get("from_name"))
        label = Row({dimension: chosen}, row.place).label(dimension, codes)
        if label is not None:
            yield "overall" if dimension == "Overall" else dimension, label, str(chosen)


def _labelled(source: Source, columns: Collection[str]) -> Iterator[str]:
    """The columns with A, B or same in at least one row."""
    names: set[str] = set()
    for row in source if columns else ():
        names |= {name for name in columns if str(row.cells.get(name)).strip().casefold() in ("a", "b", "same", "tie")}
    return (name for name in source.columns if name in names)


FORMATS = {
    "chosen-rejected": Format(
        "your own pairs: prompt, chosen, rejected",
        lambda source: source.has("prompt", "chosen", "rejected"),
        chosen_rejected,
    ),
    "ratings": Format(
        "your own ratings: prompt, video or path, and numbers",
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
    "label-studio": Format(
        "Label Studio’s JSON export: data and annotations per task",
        lambda source: source.has("data", "annotations"),
        label_studio,
    ),
}
