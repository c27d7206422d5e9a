"""Read a preference set from a file, a folder or the Hub, and join its votes to pairs. Its columns tell the format."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from prism.errors import PrismError, choice, number, quoted, reason
from prism.preference import formats, image_formats, public_formats
from prism.preference.pairs import named, overall
from prism.preference.sets import Collector as Collector
from prism.preference.sets import PreferenceSet as PreferenceSet
from prism.preference.sets import in_order
from prism.preference.sources import TABLES, Source, open_source

FORMATS = {**formats.FORMATS, **public_formats.FORMATS, **image_formats.FORMATS}
RULES = ("majority", "paper")
MOST_PAIRS = 20_000_000  # limit on the pairs that are made from ratings
_SPLIT = re.compile(r"(train|validation|valid|val|test|eval|unseen)(_v\d+)?(?![a-z0-9])", re.IGNORECASE)
_ALIASES = {"valid": "validation", "val": "validation", "eval": "test"}


def read(
    path_or_hub_id: str | os.PathLike[str],
    form: str | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    encoding: str | None = None,
    media: bool = True,
) -> PreferenceSet:
    """Read a preference set.

    Args:
        path_or_hub_id: a file (CSV, TSV, JSON, JSONL, Parquet), a folder of such files, or the id of a data set on the
            Hugging Face Hub.
        form: name of a format in `FORMATS`; None: recognised by the columns.
        root: folder that paths in the file are relative to; None: the file's folder, or the folder that is read.
        encoding: of text files; None: by the byte order mark, else UTF-8.
        media: download clips from the Hub too; otherwise only the tables.

    Raises:
        PrismError: for a path that does not exist, columns that fit no format or several, an unknown label, a cell of
            another kind, or a path outside the root; it names the file, row and column.
    """
    path, collector, sources = _opened(path_or_hub_id, form, root, encoding, media)
    chosen, fitting = _chosen(sources, form, path, "prompt, chosen, rejected")
    for source in fitting:
        collector.split = _split(source)
        FORMATS[chosen].read(source, collector)
    return collector.table(chosen)


def read_clips(
    path_or_hub_id: str | os.PathLike[str],
    form: str | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    encoding: str | None = None,
) -> PreferenceSet:
    """Read the clips that a table names with their prompts: of a preference set, or of a table that needs no more than
    the columns `prompt` and `video` (or `path`). Arguments and errors as of `read`."""
    path, collector, sources = _opened(path_or_hub_id, form, root, encoding, True)
    plain = [source for source in sources if formats.lists_clips(source)]
    if form is not None or not plain or any(set(detect(source)) - {"ratings"} for source in sources):
        chosen, fitting = _chosen(sources, form, path, "prompt, video")
        reader = FORMATS[chosen].read
    else:
        chosen, fitting, reader = "clips", plain, formats.clip_list
    for source in fitting:
        collector.split = _split(source)
        reader(source, collector)
    return collector.table(chosen)


def _opened(
    path_or_hub_id: str | os.PathLike[str],
    form: str | None,
    root: str | os.PathLike[str] | None,
    encoding: str | None,
    media: bool,
) -> tuple[Path, Collector, list[Source]]:
    """The file or folder, an empty collector for it, and its tables."""
    if form is not None:
        choice("--form", form, list(FORMATS))
    path = _local_path(path_or_hub_id, media)
    _check_foreign(path)
    base = path if path.is_dir() else path.parent
    top = base if root is None else Path(root)
    if not top.is_dir():
        raise PrismError(f"The --root {named(top)} is not a folder.")
    collector = Collector(top.absolute())
    return path, collector, [open_source(each, collector.root, encoding) for each in _tables(path)]


def detect(source: Source) -> list[str]:
    """The names of the formats that a file's columns fit."""
    return [name for name, each in FORMATS.items() if each.fits(source)]


def _local_path(path_or_hub_id: str | os.PathLike[str], media: bool) -> Path:
    """The file or folder, or the local snapshot of a data set on the Hub."""
    try:
        path = Path(path_or_hub_id)
        if path.exists():
            return path.absolute()
    except (TypeError, ValueError, OSError):
        raise PrismError(f"The data {quoted(path_or_hub_id, 120)} is not a path; name a file or folder.") from None
    text = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.lower().endswith(TABLES):
        raise PrismError(f"There is no file or folder {named(path)}.")
    from huggingface_hub import errors, snapshot_download

    patterns = None if media else [f"*{ending}" for ending in TABLES]
    try:
        return Path(snapshot_download(text, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises many kinds
        why = reason(error)
        if any(isinstance(each, errors.OfflineModeIsEnabled) for each in (error, error.__cause__)):
            why = "HF_HUB_OFFLINE forbids network access"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = "it does not exist there, or it is private or gated and the token gives no access to it"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            why = "the Hub cannot be reached; check the network"
        raise PrismError(
            f"There is no file or folder {quoted(text, 120)}, and the Hub gave no data set of this name: {why}."
        ) from error


_FOREIGN = {  # by a file in a folder: what the folder is, and what to do
    "store.json": "is a latent store and no table of clips: prism train and prism eval take it with --data",
    "export.json": "is what prism data export wrote; name its filled pairs.csv, or what Label Studio exported",
    "model_index.json": "is a diffusers pipeline, which --backbone takes; name a table of clips",
}


def _check_foreign(path: Path) -> None:
    """Refuse the folders of PRISM and diffusers that hold no set, though they hold tables and JSON."""
    for name, what in _FOREIGN.items():
        if (path / name).is_file():
            raise PrismError(f"The folder {named(path)} {what}.")


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PrismError(f"{named(path)} is neither a file nor a folder.")
    tables = [each for each in sorted(path.rglob("*")) if each.suffix.lower() in TABLES and each.is_file()]
    if not tables:
        raise PrismError(f"The folder {named(path)} holds no table of labels ({', '.join(TABLES)}).")
    return tables


def _chosen(sources: Sequence[Source], form: str | None, path: Path, simplest: str) -> tuple[str, list[Source]]:
    """The format, and the files that have it; `simplest`: the columns that would do."""
    fits = [(source, detect(source)) for source in sources]
    names = {name: None for _, each in fits for name in each}
    if form is None and len(names) > 1:
        raise PrismError(
            f"{named(path)} fits several formats: {', '.join(names)}; say which one to read with --form, such as "
            f"--form {next(iter(names))}."
        )
    if not any(fitting for _, fitting in fits) and all(next(iter(source), None) is None for source in sources):
        columns = quoted(", ".join(sources[0].columns), 160)
        raise PrismError(f"{named(path)} holds no rows{f', only the columns {columns}' if columns else ''}.")
    if all(source.columns == ("data",) for source in sources):
        raise PrismError(
            f"{named(path)} holds tasks without answers, as Label Studio imports them; name its export when people "
            "have answered."
        )
    if form is None and not names:
        raise PrismError(
            f"{named(path)} has the columns of no known format: {quoted(', '.join(sources[0].columns), 160)}. The "
            f"simplest format has the columns {simplest}. Known formats: {', '.join(FORMATS)}."
        )
    chosen = form or next(iter(names))
    fitting = [source for source, each in fits if chosen in each]
    if not fitting:
        raise PrismError(
            f"{named(path)} does not fit --form {chosen} ({FORMATS[chosen].about}); it has the columns "
            f"{quoted(', '.join(sources[0].columns), 160)}."
        )
    return chosen, fitting


def _split(source: Source) -> str | None:
    """The split in a file's name, as the Hub names files: train.csv, test_v1-00000-of-00002.parquet; else None."""
    match = _SPLIT.match(source.path.stem)
    name = match.group().lower() if match else None  # test and test_v1 are two splits
    return _ALIASES.get(name, name) if name else None


# -- votes and ratings as pairs


def pairs(preference_set: PreferenceSet, rule: str = "majority", margin: float = 0.0, soft: bool = False) -> pa.Table:
    """One row per pair, with a label per dimension: the votes of all annotators joined, ratings compared.

    Args:
        preference_set: the set. If it has votes, its ratings are not used.
        rule: how the votes of several annotators are joined. "majority": the side with more than half of the votes,
            else a tie. "paper": a tie if all votes are ties; else the side of the votes that are not ties if they
            agree, and no label if they conflict. A set of several dimensions without "overall" gets that one from the
            others by the paper's rule (section 4.1).
        margin: largest difference that is a tie: of the mean ratings of two clips, in their unit; of the mean
            probabilities p_a and p_b.
        soft: also give the shares of several annotators' votes as probabilities.

    Returns:
        prompt, video_a, video_b, split, an int8 column per dimension (1: A better, -1: B, 0: tie, null: no label); for
        sets with probabilities or confidences also ``DIM:p_a``, ``DIM:p_b``, ``DIM:weight``, float32 or null.
    """
    choice("rule", rule, RULES)
    number("margin", margin, 0)
    votes = preference_set.votes if len(preference_set.votes) else compared(preference_set, margin)
    rows: dict[tuple[str, str, str, str | None], int] = {}
    heads: list[tuple[str, str, str, str | None]] = []
    cells: dict[str, dict[int, list[tuple[Any, ...]]]] = {name: {} for name in in_order(votes["dimension"].to_pylist())}
    names = ("prompt", "video_a", "video_b", "split", "dimension", "label", "p_a", "p_b", "confidence")
    for prompt, a, b, split, dimension, label, p_a, p_b, confidence in zip(
        *(votes[name].to_pylist() for name in names)
    ):
        key = (
            prompt,
            min(a, b),
            max(a, b),
            split,
        )  # a pair in two splits gives two rows; `check_disjoint` refuses them
        row = rows.setdefault(key, len(rows))
        if row == len(heads):
            heads.append((prompt, a, b, split))
        elif heads[row][1] != a:  # an earlier vote has the sides the other way round
            label, p_a, p_b = None if label is None else -label, p_b, p_a
        cells[dimension].setdefault(row, []).append((label, p_a, p_b, confidence))
    joined = {
        name: np.array([_joined(by_row.get(row, []), rule, margin) for row in range(len(rows))])
        for name, by_row in cells.items()
    }
    if len(joined) > 1 and "overall" not in joined:
        joined["overall"] = overall(np.stack(list(joined.values()), 1))
    columns = dict(zip(("prompt", "video_a", "video_b", "split"), zip(*heads))) if heads else {}
    table = {name: pa.array(columns.get(name, ()), pa.string()) for name in ("prompt", "video_a", "video_b", "split")}
    for name, labels in joined.items():
        missing = np.isnan(labels)
        table[name] = pa.array(np.where(missing, 0, labels).astype(np.int8), pa.int8(), mask=missing)
    for name, by_row in cells.items():
        for each, value in _softened(by_row, len(rows), soft).items():
            table[f"{name}:{each}"] = value
    return pa.table(table)


def _joined(votes: Sequence[tuple[Any, ...]], rule: str, margin: float) -> float:
    """The label of one pair in one dimension; NaN if there is none."""
    labels = [label for label, *_ in votes if label is not None]
    if not labels:
        soft = [p_a - p_b for _, p_a, p_b, _ in votes if p_a is not None]
        difference = float(np.mean(soft)) if soft else np.nan
        return 0.0 if abs(difference) <= margin + 1e-9 else float(np.sign(difference))
    sides = set(labels) - {0}
    if rule == "paper":
        return float("nan") if len(sides) > 1 else float(next(iter(sides), 0))
    return float(next((side for side in sides if 2 * labels.count(side) > len(labels)), 0))


def _softened(by_row: dict[int, list[tuple[Any, ...]]], count: int, soft: bool) -> dict[str, pa.Array]:
    """The columns p_a, p_b and weight, those without any value left out."""
    columns: dict[str, list[float | None]] = {name: [None] * count for name in ("p_a", "p_b", "weight")}
    for row, votes in by_row.items():
        probabilities = [(p_a, p_b) for _, p_a, p_b, _ in votes if p_a is not None]
        if not probabilities and soft and len(votes) > 1:
            probabilities = [(float(label == 1), float(label == -1)) for label, *_ in votes]
        if probabilities:
            columns["p_a"][row], columns["p_b"][row] = np.mean(probabilities, 0).tolist()
        confidences = [confidence for *_, confidence in votes if confidence is not None]
        if confidences:
            columns["weight"][row] = float(np.mean(confidences))
    return {name: pa.array(each, pa.float32()) for name, each in columns.items() if any(v is not None for v in each)}


def compared(preference_set: PreferenceSet, margin: float, scale: float = 0.0) -> pa.Table:
    """Votes of all pairs within each prompt, by the mean rating of each clip over its annotators.

    scale: above 0, the votes have the probabilities that ratings with logistic noise give, p_a = sigmoid((r_a - r_b) /
    scale) and p_b = 1 - p_a (Bradley-Terry, paper Eq. 3 without ties).
    """
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    names = ("prompt", "dimension", "video", "score")
    for prompt, dimension, video, score in zip(*(preference_set.ratings[name].to_pylist() for name in names)):
        scores.setdefault((prompt, dimension), {}).setdefault(video, []).append(score)
    total = sum(len(each) * (len(each) - 1) // 2 for each in scores.values())
    if total > MOST_PAIRS:
        raise PrismError(
            f"The ratings give {total:,} pairs, as prompts have up to {max(map(len, scores.values())):,} clips; the "
            f"limit is {MOST_PAIRS:,} pairs. Give fewer clips per prompt."
        )
    splits = dict(zip(preference_set.videos["video"].to_pylist(), preference_set.videos["split"].to_pylist()))
    rows: list[tuple[Any, ...]] = []
    for (prompt, dimension), by_video in scores.items():
        ids = list(by_video)
        means = np.array([np.mean(by_video[each]) for each in ids])
        for i, j in zip(*np.triu_indices(len(ids), 1)):
            difference = means[i] - means[j]
            label = 0 if abs(difference) <= margin + 1e-9 else int(np.sign(difference))
            p_a = float(expit(difference / scale)) if scale else None
            p_b = None if p_a is None else 1 - p_a
            rows.append((prompt, ids[i], ids[j], splits.get(ids[i]), dimension, label, p_a, p_b, None))
    kinds = [pa.string()] * 5 + [pa.int8()] + [pa.float64()] * 3
    columns = ("prompt", "video_a", "video_b", "split", "dimension", "label", "p_a", "p_b", "confidence")
    return pa.table({n: pa.array(v, k) for n, v, k in zip(columns, zip(*rows) if rows else [()] * 9, kinds)})
