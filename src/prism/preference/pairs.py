"""Tables of videos and of preference pairs: read with checks, labelled by scores, grouped and split by prompt.

A table of pairs has the columns prompt, video_a, video_b, split and one int8 column per dimension:
1 (A preferred), -1 (B preferred), 0 (tie), null (no label). Columns with a colon are soft labels; see
``prism.preference.soft``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prism import files
from prism.errors import PrismError, instance, listed, number, quoted
from prism.preference.compact import ENCODED, codes, joint_codes, read_compacted, texts_of
from prism.preference.soft import is_extra, soft_labels

SPLITS = ("train", "validation", "test", "unseen")  # unseen: prompts of another domain than in the other splits
PAIR_COLUMNS = ("prompt", "video_a", "video_b", "split")


@dataclass(frozen=True)
class PromptGroup:
    """All labelled pairs of one prompt. Training steps draw whole groups, and bootstraps resample whole groups."""

    prompt: str
    videos: tuple[str, ...]
    first: np.ndarray
    """(pairs,) index of A in ``videos``."""
    second: np.ndarray
    """(pairs,) index of B in ``videos``."""
    labels: np.ndarray
    """(pairs, num_dimensions) 1, -1, 0, or NaN where there is no label."""
    soft: np.ndarray | None = None
    """(pairs, num_dimensions, 2) probabilities that A and that B is better (the rest: a tie); NaN where the hard label
    counts; None if it counts everywhere."""
    weights: np.ndarray | None = None
    """(pairs, num_dimensions) weights of the labels in the loss, from 0; NaN stands for 1; None if all are 1."""


def pairs_from_scores(videos: pa.Table, margins: Mapping[str, float]) -> pa.Table:
    """All pairs within each prompt, labelled by scores.

    A dimension is a tie if the two scores differ by at most its margin. The overall label follows the paper's rule
    (section 4.1): a tie if all dimensions are ties; else the side of the dimensions that are not ties if they agree,
    and no label if they conflict.

    Args:
        videos: columns video, prompt, split and one score column per key of ``margins``.
        margins: dimension -> largest difference that counts as a tie, in the score's unit, such as ``{"VQ": 0.05}``.

    Returns:
        A table of pairs with the dimensions of ``margins`` and "overall".

    Raises:
        PrismError: if a score column is missing or a margin is negative.
    """
    columns = _checked_columns(videos)
    instance("margins", margins, Mapping, "a dict of numbers by dimension")
    for dimension, margin in margins.items():
        if dimension == "overall":
            raise PrismError("The overall label is computed from the other dimensions; leave it out of the margins.")
        if dimension not in videos.column_names:
            raise PrismError(
                f"The videos have no score column {dimension}; they have {', '.join(videos.column_names)}."
            )
        if not number(f"The tie margin of {dimension}", margin) >= 0:
            raise PrismError(f"The tie margin of {dimension} must be 0 or more, found {margin}.")
    ids, prompts, splits = columns
    first, second = _within(prompts)
    labelled: dict[str, pa.Array] = {
        "prompt": pa.array(prompts[first], pa.string()),
        "video_a": pa.array(ids[first], pa.string()),
        "video_b": pa.array(ids[second], pa.string()),
        "split": pa.array(splits[first], pa.string()),
    }
    votes = []
    for dimension, margin in margins.items():
        score = _scores(videos, dimension)
        difference = score[first] - score[second]
        votes.append(np.where(np.abs(difference) <= margin, 0, np.sign(difference)))  # NaN stays NaN
        labelled[dimension] = _labels(votes[-1])
    labelled["overall"] = _labels(overall(np.stack(votes, 1)) if votes else np.full(len(first), np.nan))
    return pa.table(labelled)


def _checked_columns(videos: pa.Table) -> list[np.ndarray]:
    """Videos, prompts and splits, each (n,) of texts."""
    if not isinstance(videos, pa.Table):
        raise PrismError(f"The videos must be a table of pyarrow, found {type(videos).__name__}; use pa.table(...).")
    columns = []
    for name in ("video", "prompt", "split"):
        if videos.column_names.count(name) != 1:
            raise PrismError(f"The videos need one column {name}; they have {', '.join(videos.column_names)}.")
        column = videos[name].to_pylist()
        for row, text in enumerate(column):
            if not isinstance(text, str):
                raise PrismError(
                    f"The column {name} of the videos must hold texts, found {quoted(text, 80)} in row {row}."
                )
        columns.append(np.array(column, dtype=object))
    return columns


def _scores(videos: pa.Table, dimension: str) -> np.ndarray:
    """(n,) float64, NaN where null."""
    kind = videos[dimension].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise PrismError(f"The scores {dimension} of the videos must be numbers, found {quoted(str(kind), 80)}.")
    scores: np.ndarray = videos[dimension].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return scores


def overall(votes: np.ndarray) -> np.ndarray:
    """The paper's aggregation of votes in several dimensions.

    Args:
        votes: (pairs, num_dimensions) 1, -1, 0, or NaN.

    Returns:
        (pairs,) 1, -1, 0, or NaN if votes conflict or one is missing.
    """
    total = np.clip(votes.sum(1), -1, 1)
    conflict = (votes == 1).any(1) & (votes == -1).any(1)
    return np.where(conflict, np.nan, total)


def _within(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (A, B) of all pairs that share a prompt, A before B, prompts in order of appearance."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    pieces = [np.array(members)[np.stack(np.triu_indices(len(members), 1))] for members in rows.values()]
    joined = np.concatenate([np.zeros((2, 0), dtype=np.int64), *pieces], axis=1)
    return joined[0], joined[1]


def _labels(votes: np.ndarray) -> pa.Array:
    missing = np.isnan(votes)
    return pa.array(np.where(missing, 0, votes).astype(np.int8), pa.int8(), mask=missing)


def check_table(pairs: Any) -> None:
    """Raise PrismError for anything but a table of pairs."""
    instance("pairs", pairs, pa.Table, "a table of pyarrow")
    for name in PAIR_COLUMNS:
        if pairs.column_names.count(name) != 1:
            raise PrismError(f"The pairs need one column {name}; they have {quoted(', '.join(pairs.column_names))}.")


def dimensions_of(pairs: pa.Table) -> tuple[str, ...]:
    """The dimensions that a table of pairs has labels for."""
    return tuple(name for name in pairs.column_names if name not in PAIR_COLUMNS and not is_extra(name))


def label_matrix(pairs: pa.Table, dimensions: Sequence[str]) -> np.ndarray:
    """Labels as numbers.

    Returns:
        (pairs, num_dimensions) float64, NaN where null.

    Raises:
        PrismError: if a dimension has no column, or a label is not 1, -1, 0 or null.
    """
    check_table(pairs)
    columns = []
    for dimension in listed("dimensions", dimensions):
        if dimension not in pairs.column_names or is_extra(dimension):
            existing = dimensions_of(pairs)
            raise PrismError(
                f"The pairs have no labels for {quoted(dimension, 80)}; they have "
                f"{quoted(', '.join(existing), 200) if existing else 'none'}."
            )
        kind = pairs[dimension].type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise PrismError(
                f"The labels of {quoted(dimension, 80)} must be 1, -1, 0 or null, found {quoted(str(kind), 80)}."
            )
        column = pairs[dimension].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        invalid = ~np.isnan(column) & ~np.isin(column, (-1, 0, 1))
        if invalid.any():
            raise PrismError(
                f"The labels of {quoted(dimension, 80)} must be 1, -1, 0 or null, found {column[invalid][0]:g}."
            )
        columns.append(column)
    return np.stack(columns, 1) if columns else np.zeros((len(pairs), 0))


def group_by_prompt(pairs: pa.Table, dimensions: Sequence[str], split: str) -> list[PromptGroup]:
    """The pairs of a split that have a label in any of the dimensions, by prompt, in order of appearance.

    In the split "train" a pair with probabilities counts as labelled, even if it has no hard label.
    """
    return list(PromptGroups(pairs, dimensions, split))


class PromptGroups(Sequence[PromptGroup]):
    """The groups of `group_by_prompt`, each made when it is asked for: a few numbers per pair are all that is kept."""

    def __init__(self, pairs: pa.Table, dimensions: Sequence[str], split: str) -> None:
        instance("split", split, str, "a text")
        dimensions = list(listed("dimensions", dimensions))
        labels = label_matrix(pairs, dimensions)
        soft, weights = soft_labels(pairs, dimensions)
        labelled = ~np.isnan(labels)
        if split == "train" and soft is not None:
            labelled |= ~np.isnan(soft[..., 0])
        name = split.encode(errors="surrogatepass")  # as bytes: Arrow takes no half of a surrogate pair
        chosen = np.flatnonzero(pc.equal(pairs["split"].cast(pa.binary()), name).to_numpy() & labelled.any(1))
        prompts = codes(pairs["prompt"].take(pa.array(chosen)))
        self._rows = chosen[np.argsort(prompts, kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(prompts))]).astype(np.int64)
        self._labels = labels[self._rows]
        self._soft, self._weights = (None if each is None else each[self._rows] for each in (soft, weights))
        self._texts = pairs.select(PAIR_COLUMNS[:3])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> PromptGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[PromptGroup]: ...

    def __getitem__(self, index: int | slice) -> PromptGroup | list[PromptGroup]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # refuses one that is not there
        members = slice(self._starts[number], self._starts[number + 1])
        rows = self._texts.take(pa.array(self._rows[members]))
        video_a, video_b = rows["video_a"].to_pylist(), rows["video_b"].to_pylist()
        videos: dict[str, int] = {}
        for video in itertools.chain(*zip(video_a, video_b)):
            videos.setdefault(video, len(videos))
        first, second = (np.array([videos[video] for video in each]) for each in (video_a, video_b))
        extras = (None if values is None else values[members] for values in (self._soft, self._weights))
        return PromptGroup(rows["prompt"][0].as_py(), tuple(videos), first, second, self._labels[members], *extras)


def prompt_key(prompt: str) -> str:
    """A short hash of a prompt's words that ignores case and spacing."""
    if not isinstance(prompt, str):
        raise PrismError(f"A prompt must be a text, found {quoted(prompt, 80)}.")
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode(errors="surrogatepass")).hexdigest()[:16]


def cut(name: str, limit: int = 60) -> str:
    """A name or prompt in quotes, on one line, cut to `limit` characters."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def check_disjoint(pairs: pa.Table) -> None:
    """Refuse pairs whose splits share a prompt (up to case and spacing) or a video.

    Raises:
        PrismError: naming one prompt or video that is in two splits.
    """
    check_table(pairs)
    for kind, columns in (("prompt", ("prompt",)), ("video", ("video_a", "video_b"))):
        tables = [pa.table({"name": pairs[column], "split": pairs["split"]}) for column in columns]
        # Each name once per split: a prompt recurs in many pairs.
        unique = pa.concat_tables(tables).group_by(["name", "split"], use_threads=False).aggregate([])
        if kind == "video" and len(unique) == pc.count_distinct(unique["name"]).as_py():
            continue
        split_of: dict[str, str] = {}
        for row in range(len(unique)):
            name, split = unique["name"][row].as_py(), unique["split"][row].as_py()
            other = split_of.setdefault(prompt_key(name) if kind == "prompt" else name, split)
            if other != split:
                raise PrismError(
                    f"The {kind} {cut(name, 200)} is in the splits {quoted(other, 40)} and {quoted(split, 40)}; "
                    "splits must not share a prompt or a video, as accuracy would be measured on training data."
                )


def are_disjoint(videos: pa.Table) -> bool:
    """True if no two splits of a table with the columns prompt and split share a prompt, up to case and spacing."""
    pairs = joint_codes([videos["prompt"], videos["split"]])
    _, rows = np.unique(pairs, return_index=True)  # each prompt once per split
    prompts = texts_of(videos["prompt"].take(pa.array(rows)))
    keys = np.fromiter((int(prompt_key(prompt), 16) for prompt in prompts), np.uint64, len(rows))
    different = joint_codes([pa.chunked_array([keys]), videos["split"].take(pa.array(rows))])
    return len(np.unique(different)) == len(np.unique(keys))


# -- Parquet files


def named(path: Path) -> str:
    """A path on one line, cut if it is long."""
    return quoted(str(path), 150)


def check_file(path: Path, needed_for: str = "") -> None:
    """Refuse a path that is missing or not a regular file (reading a pipe would never end)."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise PrismError(f"The file {named(path)} {what}{needed_for}.")
    files.check_regular(path)


def read_table(
    path: Path, texts: Sequence[str], wholes: Sequence[str] = (), others: Sequence[str] = (), compact: bool = False
) -> pa.Table:
    """A Parquet file that has at least these columns.

    Args:
        path: the file.
        texts: columns of texts; returned as Arrow's `string`.
        wholes: columns of whole numbers from 0; returned as `int64`.
        others: columns of any type.
        compact: as from `read_compacted`.

    Raises:
        PrismError: naming the file, the column and the problem.
    """
    check_file(path)
    try:
        # read_table would add columns from folders named a=b
        table = read_compacted(path) if compact else pq.ParquetFile(path).read()
        table.validate(full=True)
    except Exception as error:
        raise PrismError(f"The file {named(path)} is not a whole Parquet file ({quoted(error, 150)}).") from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise PrismError(f"The file {named(path)} has the column {quoted(twice[0], 80)} twice.")
    for name in (*texts, *wholes, *others):
        if name not in table.column_names:
            raise PrismError(f"The file {named(path)} lacks the column {name}.")
    for name in texts:
        kept = compact and table[name].type == ENCODED
        table = _cast(table, path, name, _is_text, ENCODED if kept else pa.string(), "texts")
    for name in wholes:
        table = _cast(table, path, name, pa.types.is_integer, pa.int64(), "whole numbers from 0")
        if len(table) and pc.min(table[name]).as_py() < 0:
            raise PrismError(
                f"The column {name} of {named(path)} must hold whole numbers from 0, found a negative one."
            )
    return table


def _cast(
    table: pa.Table, path: Path, name: str, is_kind: Callable[[pa.DataType], bool], kind: pa.DataType, requirement: str
) -> pa.Table:
    column = table[name]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise PrismError(f"The column {name} of {named(path)} must hold {requirement}, found none in row {row}.")
    if len(column) and not is_kind(column.type):
        raise PrismError(
            f"The column {name} of {named(path)} must hold {requirement}, found {quoted(str(column.type), 80)}."
        )
    if column.type == kind:
        return table
    try:
        return table.set_column(table.column_names.index(name), name, column.cast(kind))
    except pa.ArrowException as error:
        raise PrismError(
            f"The column {name} of {named(path)} must hold {requirement} ({quoted(error, 150)})."
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
