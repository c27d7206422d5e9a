"""A preference set as three tables, the same for every file format, and the collector through which readers fill it."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from prism.errors import PrismError, quoted
from prism.preference.pairs import PAIR_COLUMNS, named, read_table
from prism.preference.sources import Place, Row

VIDEOS = pa.schema(
    [
        ("video", pa.string()),
        ("path", pa.string()),
        ("frames", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("model", pa.string()),
        ("fps", pa.float64()),
        ("num_frames", pa.int64()),
        ("image", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)
VOTES = pa.schema(
    [
        ("video_a", pa.string()),
        ("video_b", pa.string()),
        ("prompt", pa.string()),
        ("dimension", pa.string()),
        ("annotator", pa.string()),
        ("label", pa.int8()),
        ("p_a", pa.float64()),
        ("p_b", pa.float64()),
        ("confidence", pa.float64()),
        ("given", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("split", pa.string()),
    ]
)
RATINGS = pa.schema(
    [
        ("video", pa.string()),
        ("prompt", pa.string()),
        ("dimension", pa.string()),
        ("annotator", pa.string()),
        ("score", pa.float64()),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)
# Folders below the root in which a named file is looked for: sets often name files relative to one of them.
_FOLDERS = (
    "",
    "videos",
    "Videos",
    "images",
    "frames",
    "video",
    "media_data",
)


@dataclass(frozen=True)
class PreferenceSet:
    """Clips and the votes and ratings of annotators, as three tables in the order of the file.

    The sides A and B of a vote are those of the file. If a file always names the winner first, they are in the order of
    the clips' identities instead, so that the side does not give the label away.
    """

    form: str
    """Name of the format that was read."""
    root: Path
    """Folder that paths are relative to."""
    videos: pa.Table
    """`VIDEOS`, one row per clip: its identity, and its `path` below `root` (``FILE.parquet#COLUMN/ROW`` for bytes in a
    Parquet file) or its `frames`, pictures in order."""
    votes: pa.Table
    """`VOTES`, one row per pair, dimension and annotator: `label` 1 (A better), -1 (B), 0 (tie), or null if there are
    only the probabilities `p_a`, `p_b` that A or B is better (the rest: a tie); `given`, the label as in the file."""
    ratings: pa.Table
    """`RATINGS`, one row per clip, dimension and annotator: `score`, in the set's own unit."""
    dropped: dict[str, list[Place]]
    """Rows that were left out, by reason."""
    missing: tuple[str, ...]
    """Paths that the set names and that do not exist."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that were judged: VQ, MQ and TA, then others in order of appearance, "overall" last."""
        return in_order(self.votes["dimension"].to_pylist() + self.ratings["dimension"].to_pylist())

    def source(self, path: str | None, frames: Sequence[str] | None) -> str | list[str]:
        """The source that `prism.video.read_clip` takes, of a clip with this `path` or these `frames` in order."""
        return [str(self.root / name) for name in frames or ()] if path is None else str(self.root / path)


def in_order(dimensions: Iterable[str]) -> tuple[str, ...]:
    """Each dimension once: VQ, MQ and TA, then others in order of appearance, "overall" last."""
    positions = {"VQ": 0, "MQ": 1, "TA": 2, "overall": 4}
    return tuple(sorted(dict.fromkeys(dimensions), key=lambda name: positions.get(name, 3)))


_TEXTS = ("video", "video_a", "video_b", "prompt", "dimension")  # columns that have a text in each row


def kept_rows(path: Path, schema: pa.Schema, column: str, left_out: Set[str]) -> pa.Table:
    """The rows of a store's table of votes or ratings, without those of some dimensions or annotators.

    A table that does not exist has no rows. Raises `PrismError` for a file without the columns of the schema.
    """
    if not path.is_file():
        return schema.empty_table()
    table = read_table(path, tuple(name for name in schema.names if name in _TEXTS)).replace_schema_metadata()
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError) as error:
        raise PrismError(f"The file {named(path)} is no table of {path.stem} ({quoted(error, 120)}).") from error
    return table.filter(pa.array([each not in left_out for each in table[column].to_pylist()], pa.bool_()))


def check_dimension(name: str, where: object) -> None:
    """Refuse the name of a dimension that cannot be a column of a table of pairs; `where` it was met."""
    if ":" in name or name in PAIR_COLUMNS:
        raise PrismError(
            f"The dimension {quoted(name, 80)} in {where} cannot have this name: a name with a colon, or one of "
            f"{', '.join(PAIR_COLUMNS)}, is another column of a table of pairs; rename it."
        )


@dataclass
class Collector:
    """The clips, votes and ratings that a reader adds row by row, and their checks."""

    root: Path
    split: str | None = None
    """Split of the file being read, if the file's name says it."""
    dropped: dict[str, list[Place]] = field(default_factory=dict)
    _videos: dict[str, dict[str, Any]] = field(default_factory=dict)
    _missing: dict[str, None] = field(default_factory=dict)
    _files: dict[str, tuple[str, bool]] = field(default_factory=dict)
    _votes: list[tuple[Any, ...]] = field(default_factory=list)
    _ratings: list[tuple[Any, ...]] = field(default_factory=list)
    _rated: set[str] = field(default_factory=set)

    def drop(self, row: Row, reason: str) -> None:
        """Leave a row out, and list it under a reason."""
        self.dropped.setdefault(reason, []).append(row.place)

    def file(self, row: Row, column: str, path: str) -> str:
        """A path relative to the root. Refuses a path outside the root; lists one without a file as missing."""
        if path not in self._files:
            self._files[path] = self._find(row, column, path)
        name, exists = self._files[path]
        if not exists:
            self._missing[name] = None
        return name

    def _find(self, row: Row, column: str, path: str) -> tuple[str, bool]:
        """The path relative to the root, and True if a file exists there."""
        if "://" in path[:12]:
            return path, False
        plain = path.replace("\\", "/")
        if "\0" in plain or plain.startswith("/") or plain[1:2] == ":":
            try:
                plain = Path(plain).relative_to(self.root).as_posix()
            except ValueError:
                raise self._outside(row, column, path) from None
        plain = posixpath.normpath(plain)
        if plain == ".." or plain.startswith("../") or "\0" in plain:
            raise self._outside(row, column, path)
        for folder in _FOLDERS:
            name = posixpath.join(folder, plain)
            try:
                if (self.root / name).is_file():
                    return name, True
            except (OSError, ValueError):  # a name that is too long
                break
        return plain, False

    def _outside(self, row: Row, column: str, path: str) -> PrismError:
        return PrismError(
            f"The path {quoted(path, 120)} in column {quoted(column, 60)}, {row.place}, leads out of the data's folder "
            f"{quoted(str(self.root), 120)}; give the folder that holds it with --root."
        )

    def video(
        self,
        row: Row,
        column: str,
        prompt: str,
        *,
        path: str | None = None,
        embedded: tuple[str, str] | None = None,
        frames: Iterable[str] | None = None,
        video: str | None = None,
        model: str | None = None,
        fps: float | None = None,
        num_frames: float | None = None,
        image: str | None = None,
        split: str | None = None,
    ) -> str:
        """Add a clip and return its identity: `video` if given, else its path or the digest of its bytes.

        image: path of the picture that the clip starts from, kept relative to the root.
        """
        image = None if image is None else self.file(row, "image", image.strip())
        listed = None if frames is None else [self.file(row, column, frame) for frame in frames]
        if embedded is not None:
            video, path = video or embedded[0], embedded[1]
        elif path is not None:
            path = self.file(row, column, path)
            video = video or path
        assert video is not None, "a clip without path and bytes needs an identity"
        if num_frames is not None and not (0 < num_frames < 2**31 and num_frames == int(num_frames)):
            raise PrismError(f"The number of frames of {quoted(video, 120)} in {row.place} is {num_frames:g}.")
        facts = self._videos.setdefault(
            video,
            {
                **{"video": video, "path": path, "frames": listed, "prompt": prompt, "split": split or self.split},
                **{"source": row.place.source, "row": row.place.row},
            },
        )
        if image is not None and facts.get("image") not in (None, image):
            raise PrismError(
                f"The clip {quoted(video, 100)} has the image {quoted(image, 100)} in {row.place} and "
                f"{quoted(facts['image'], 100)} before; a clip starts from one."
            )
        for name, value in {"model": model, "fps": fps, "num_frames": num_frames, "image": image}.items():
            if value is not None:
                facts.setdefault(name, int(value) if name == "num_frames" else value)
        return video

    def vote(
        self,
        row: Row,
        video_a: str,
        video_b: str,
        prompt: str,
        dimension: str,
        label: int | None,
        given: Any,
        *,
        annotator: str | None = None,
        p: tuple[float, float] | None = None,
        confidence: float | None = None,
        split: str | None = None,
        by_id: bool = False,
    ) -> None:
        """Add a vote on a pair in one dimension. `given` is the label as in the file.

        by_id: the file names the winner first; the sides are put in the order of the clips' identities.
        """
        check_dimension(dimension, row.place)
        if confidence is not None and confidence < 0:
            raise PrismError(f"The confidence in {row.place} must be 0 or more; found {confidence:g}.")
        p_a, p_b = p or (None, None)
        if by_id and video_b < video_a:
            video_a, video_b, p_a, p_b = video_b, video_a, p_b, p_a
            label = None if label is None else -label
        given = given if isinstance(given, str) else quoted(given, 200)
        answer = (annotator, label, p_a, p_b, confidence, given)
        position = (row.place.source, row.place.row, split or self.split)
        self._votes.append((video_a, video_b, prompt, dimension, *answer, *position))

    def rating(
        self, row: Row, video: str, prompt: str, dimension: str, score: float, annotator: str | None = None
    ) -> None:
        """Add an annotator's score of a clip."""
        check_dimension(dimension, row.place)
        self._rated.add(video)
        self._ratings.append((video, prompt, dimension, annotator, score, row.place.source, row.place.row))

    def rated(self, video: str) -> bool:
        """True if the clip has a score."""
        return video in self._rated

    def table(self, form: str) -> PreferenceSet:
        """The preference set of all that was added."""
        videos = pa.Table.from_pylist(list(self._videos.values()), schema=VIDEOS)
        votes, ratings = _table(self._votes, VOTES), _table(self._ratings, RATINGS)
        return PreferenceSet(form, self.root, videos, votes, ratings, self.dropped, tuple(self._missing))


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows) if rows else [()] * len(schema)
    return pa.table([pa.array(values, each.type) for values, each in zip(columns, schema)], schema=schema)


# -- labels of several origins in one table


def joined(before: pa.Table, labelled: pa.Table, dimensions: Sequence[str]) -> pa.Table:
    """The pairs of both tables, with the new labels in `dimensions` and the earlier ones in all others.

    Pairs without a label are left out. A pair has the sides of the new table, and earlier labels are mirrored to them.
    """
    new = {(row["video_a"], row["video_b"]): row for row in labelled.to_pylist()}
    kept = [name for name in before.column_names if name not in PAIR_COLUMNS and name.split(":")[0] not in dimensions]
    rows: list[Mapping[str, Any]] = []
    for row in before.to_pylist():
        sides = (row["video_a"], row["video_b"])
        if sides[::-1] in new:  # the other way round
            row["video_a"], row["video_b"] = sides[::-1]
            row |= {name: None if row[name] is None else _mirrored(row, name) for name in kept}
        answer = new.pop((row["video_a"], row["video_b"]), {})
        rows.append(
            {name: row[name] for name in (*PAIR_COLUMNS, *kept)} | {name: answer.get(name) for name in dimensions}
        )
    rows += [{**dict.fromkeys(kept), **row} for row in new.values()]
    rows = [row for row in rows if any(row[name] is not None for name in (*kept, *dimensions))]
    fields = [before.schema.field(name) for name in (*PAIR_COLUMNS, *kept)]
    schema = pa.schema([*fields, *(labelled.schema.field(name) for name in dimensions)])
    return pa.Table.from_pylist(rows, schema)


def _mirrored(row: Mapping[str, Any], name: str) -> Any:
    """The label, probability or weight of a pair in a column once its sides are exchanged."""
    dimension, _, kind = name.partition(":")
    if not kind:
        return -row[name]
    other = {"p_a": "p_b", "p_b": "p_a"}.get(kind, kind)
    return row[f"{dimension}:{other}"]
