"""A judge's scores of labelled pairs, at each noise level and in each dimension, as a table that is saved and read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism.errors import SEEDS, PrismError, quoted, whole
from prism.evaluation.facts import PROBES
from prism.evaluation.intervals import prompt_interval
from prism.preference import LatentStore
from prism.preference.pairs import label_matrix, read_table
from prism.preference.soft import soft_labels
from prism.report.rows import AccuracyRow

COLUMNS = ("judge", "t", "dimension", "prompt", "video_a", "video_b", "label", "margin")
TEXTS = ("judge", "dimension", "prompt", "video_a", "video_b")
NUMBERS = ("score_a", "score_b", "p_a", "p_b", *(f"{probe}_{side}" for probe in PROBES for side in "ab"))
"""Further columns, float64; null where the store has no such label or fact."""
FORMAT, SCHEMA = "prism-scores", 1


@dataclass(frozen=True, eq=False)
class Block:
    """The labelled pairs of one noise level and one dimension, one row per pair, in the store's order."""

    t: float
    dimension: str
    labels: np.ndarray
    """(n,) 1 (A preferred), -1 (B preferred) or 0 (tie)."""
    margins: np.ndarray
    """(n,) score of A minus score of B."""
    prompts: np.ndarray
    """(n,) number of each pair's prompt, in the store's order."""
    videos: tuple[np.ndarray, np.ndarray]
    """(n,) names of A and of B."""
    models: tuple[np.ndarray, np.ndarray]
    """(n,) generators of A and of B, None where none is named."""
    numbers: Mapping[str, np.ndarray]
    """(n,) float64 by column of `NUMBERS`, NaN where null."""

    @property
    def decided(self) -> np.ndarray:
        """(n,) bool, True where the label is no tie."""
        mask: np.ndarray = self.labels != 0
        return mask

    @property
    def right(self) -> np.ndarray:
        """(n,) bool, True where the margin has the label's sign."""
        mask: np.ndarray = self.labels * self.margins > 0
        return mask


@dataclass(frozen=True, eq=False)
class Measurement:
    """A judge measured on a split.

    rows: the "accuracy" rows of metrics.json.
    pairs: one row per t, dimension and labelled pair: judge, t, dimension, prompt, video_a, video_b, label (1 A
        preferred, -1 B, 0 tie) and margin (score of A minus score of B). Except in files of earlier versions also row
        (of the store's pairs), model_a, model_b and the columns `NUMBERS`.
    settings: split, num_draws and seed of the noise; two judges can be compared where these are equal.
    tuning: such a table of the validation pairs, on which the threshold of ties is chosen.
    about: facts of the judge (head_seed, source, eta, dimensions, calibration), the levels as the caller wrote them,
        their log_snr, units of the pairs' facts, and additions of a command. Empty in files of earlier versions.
    """

    rows: list[AccuracyRow]
    pairs: pa.Table
    settings: dict[str, Any]
    tuning: pa.Table | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write everything as one Parquet file."""
        extra = {"format": FORMAT, "schema": SCHEMA, "rows": self.rows, "settings": self.settings, "about": self.about}
        table = _in_split(self.pairs, self.settings["split"])
        if self.tuning is not None and self.settings["split"] != "validation":
            table = pa.concat_tables([table, _in_split(self.tuning, "validation")], promote_options="default")
        pq.write_table(table.replace_schema_metadata({"prism": json.dumps(extra)}), path, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a file that `save` wrote. Raises PrismError for one that is missing or is not such a file."""
        try:
            extra = json.loads((pq.read_schema(path).metadata or {})[b"prism"])
            table = read_table(Path(path), TEXTS, (), ("t", "label", "margin"))
            _check(table, extra)
        except Exception as error:  # pyarrow and json raise many kinds on foreign files
            raise PrismError(
                f"The file {quoted(str(path), 150)} is no whole measurement of a judge ({quoted(error, 200)}); "
                "measure anew."
            ) from error
        settings, tuning = extra["settings"], None
        if "split" in table.column_names:
            splits = np.array(table["split"].to_pylist(), dtype=object)
            table = table.drop_columns(["split"])
            every = table.replace_schema_metadata(None)
            table = every.filter(pa.array(splits == settings["split"]))
            tuning = every.filter(pa.array(splits == "validation"))
        return cls(extra["rows"], table.replace_schema_metadata(None), settings, tuning, extra.get("about", {}))

    @property
    def judge(self) -> str:
        """The judge's name."""
        name: str = self.pairs["judge"][0].as_py()
        return name

    def level(self, t: float) -> float:
        """A noise level as the caller wrote it, as an int or a float."""
        return next((level for level in self.about.get("levels", ()) if level == t), int(t) if t.is_integer() else t)

    @cached_property
    def blocks(self) -> list[Block]:
        """The pairs by noise level and dimension, in the table's order."""
        return list(_blocks(self.pairs))

    @cached_property
    def tuning_blocks(self) -> dict[tuple[float, str], Block]:
        """The validation pairs by (t, dimension)."""
        table = self.pairs if self.settings["split"] == "validation" else self.tuning
        return {} if table is None else {(block.t, block.dimension): block for block in _blocks(table)}

    def decided(self) -> dict[tuple[float, str], tuple[list[tuple[str, str]], np.ndarray, np.ndarray]]:
        """Decided pairs by (t, dimension): their videos (A, B), prompts (n,), and a mask (n,) of those judged right."""
        columns = {name: self.pairs[name].to_numpy(zero_copy_only=False) for name in COLUMNS}
        is_decided = columns["label"] != 0
        levels, dimensions = columns["t"][is_decided], columns["dimension"][is_decided]
        keys = list(dict.fromkeys(zip(levels.tolist(), dimensions.tolist())))
        decided = {}
        for t, dimension in keys:
            rows = np.flatnonzero(is_decided)[(levels == t) & (dimensions == dimension)]
            pairs = list(zip(columns["video_a"][rows].tolist(), columns["video_b"][rows].tolist()))
            right = columns["label"][rows] * columns["margin"][rows] > 0
            decided[t, dimension] = pairs, columns["prompt"][rows], right
        return decided


def _in_split(table: pa.Table, split: str) -> pa.Table:
    return table.append_column("split", pa.array([split] * len(table), pa.string()))


def _check(table: pa.Table, extra: Any) -> None:
    """Raise PrismError or another error for a table that `Measurement.save` did not write."""
    if not isinstance(extra["rows"], list) or not isinstance(extra["settings"], dict):
        raise PrismError("its rows are no list, or its settings no object")
    if "format" in extra and (extra["format"], extra["schema"]) != (FORMAT, SCHEMA):
        raise PrismError(f"it is {extra['format']!r} of schema {extra['schema']!r}")
    if not isinstance(extra["settings"]["split"], str) or not isinstance(extra.get("about", {}), dict):
        raise PrismError("its split is no text, or what it says about the judge no object")
    numeric = [name for name in ("t", "label", "margin", "row", *NUMBERS) if name in table.column_names]
    for name in numeric:
        kind = table[name].type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise PrismError(f"its column {name} holds {kind}")
        values = _float(table, name)
        if name in ("t", "label", "margin", "row", "score_a", "score_b") and not np.isfinite(values).all():
            raise PrismError(f"its column {name} holds no finite number in each row")
        if np.isinf(values).any():
            raise PrismError(f"its column {name} holds infinity")
    if not np.isin(_float(table, "label"), (-1, 0, 1)).all():
        raise PrismError("its labels are not all 1, -1 or 0")
    t = _float(table, "t")
    if ((t < 0) | (t > 1000)).any():
        raise PrismError("its levels are not all from 0 to 1000")
    if extra.get("about"):
        whole("its seed", extra["settings"]["seed"], 0, SEEDS)
        _check_about(extra["about"], np.unique(t).tolist())
        if not len(table):
            raise PrismError("it holds no pair")
    if "score_a" in numeric and (_float(table, "score_a") - _float(table, "score_b") != _float(table, "margin")).any():
        raise PrismError("its margins are not the differences of its scores")


def _check_about(about: Mapping[str, Any], levels: Sequence[float]) -> None:
    """Raise PrismError for facts of a judge from which no rows can be computed."""
    fitted = about["calibration"]
    numbers = [about["eta"], *(each["eta"] for each in fitted.values())]
    temperatures = [each["temperature"] for each in fitted.values()]
    if not all(isinstance(value, int | float) and 1 < value < np.inf for value in numbers):
        raise PrismError("an eta is no number above 1")
    if not all(isinstance(value, int | float) and 0 < value < np.inf for value in temperatures):
        raise PrismError("a temperature is no number above 0")
    named = about["levels"]
    if not all(isinstance(value, int | float) for value in named) or not set(levels) <= set(named):
        raise PrismError("its levels are not those that it names")
    if len(about["log_snr"]) != len(named) or not isinstance(about["source"], str) or "head_seed" not in about:
        raise PrismError("log_snr, source or head_seed of the judge is not there")
    if not all(isinstance(unit, str) for unit in about["units"].values()):
        raise PrismError("its units are no texts")


def _float(table: pa.Table, name: str) -> np.ndarray:
    """(rows,) float64, NaN where null."""
    values: np.ndarray = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _blocks(table: pa.Table) -> Iterator[Block]:
    """A table's blocks, by noise level and dimension."""
    count = len(table)
    nothing, none = np.full(count, np.nan), np.full(count, None, dtype=object)
    present = set(table.column_names)
    t, labels, margins = _float(table, "t"), _float(table, "label"), _float(table, "margin")
    texts = {name: table[name].to_numpy(zero_copy_only=False) for name in ("dimension", "prompt", "video_a", "video_b")}
    models = [
        table[name].to_numpy(zero_copy_only=False) if name in present else none for name in ("model_a", "model_b")
    ]
    further = {name: _float(table, name) if name in present else nothing for name in NUMBERS}
    prompts = _numbered(texts["prompt"], _float(table, "row") if "row" in present else np.arange(count))
    for level, dimension in dict.fromkeys(zip(t.tolist(), texts["dimension"].tolist())):
        rows = np.flatnonzero((t == level) & (texts["dimension"] == dimension))
        yield Block(
            level,
            dimension,
            labels[rows],
            margins[rows],
            prompts[rows],
            (texts["video_a"][rows], texts["video_b"][rows]),
            (models[0][rows], models[1][rows]),
            {name: values[rows] for name, values in further.items()},
        )


def _numbered(prompts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(n,) number of each row's prompt, counted from 0 as prompts first appear in rows sorted by `order`."""
    first: dict[str, int] = {}
    for row in np.argsort(order, kind="stable").tolist():
        first.setdefault(prompts[row], len(first))
    return np.array([first[prompt] for prompt in prompts], dtype=np.int64)


def pair_table(
    store: LatentStore,
    split: str,
    judge: str,
    dimensions: Mapping[str, int],
    levels: Sequence[float],
    scores: Sequence[Mapping[str, np.ndarray]],
    facts: Mapping[str, Mapping[str, float]],
) -> pa.Table:
    """The labelled pairs of a split, in the store's order, with a judge's scores: `Measurement.pairs`.

    Args:
        dimensions: the dimensions to take, each with its column among the scores.
        scores: per level, the scores (num_dimensions,) by video.
        facts: by probe (`prism.evaluation.facts.PROBES`) and video, as far as they are known.
    """
    labels = label_matrix(store.pairs, list(dimensions))
    soft, _ = soft_labels(store.pairs, list(dimensions))
    is_split = np.array(store.pairs["split"].to_pylist(), dtype=object) == split
    videos = [np.array(store.pairs[name].to_pylist(), dtype=object) for name in ("video_a", "video_b")]
    prompts = np.array(store.pairs["prompt"].to_pylist(), dtype=object)
    ids = store.videos["video"].to_pylist()
    named = store.videos["model"].to_pylist() if "model" in store.videos.column_names else [None] * len(ids)
    models = {video: str(model) for video, model in zip(ids, named) if model is not None}
    tables = []
    for t, scored in zip(levels, scores):
        for number, (dimension, column) in enumerate(dimensions.items()):
            rows = np.flatnonzero(is_split & ~np.isnan(labels[:, number]))
            sides = [names[rows].tolist() for names in videos]
            values = [np.array([scored[video][column] for video in names], dtype=np.float64) for names in sides]
            columns: dict[str, Any] = {
                "judge": pa.array([judge] * len(rows), pa.string()),
                "t": pa.array([float(t)] * len(rows), pa.float64()),
                "dimension": pa.array([dimension] * len(rows), pa.string()),
                "prompt": pa.array(prompts[rows], pa.string()),
                "video_a": pa.array(sides[0], pa.string()),
                "video_b": pa.array(sides[1], pa.string()),
                "label": pa.array(labels[rows, number].astype(np.int8)),
                "margin": pa.array(values[0] - values[1]),
                "row": pa.array(rows),
                "score_a": pa.array(values[0]),
                "score_b": pa.array(values[1]),
            }
            for i, (side, names) in enumerate(zip("ab", sides)):
                p = np.full(len(rows), np.nan) if soft is None else soft[rows, number, i]
                columns[f"model_{side}"] = pa.array([models.get(video) for video in names], pa.string())
                columns[f"p_{side}"] = pa.array(p, from_pandas=True)
                for probe in PROBES:
                    of_videos = facts.get(probe, {})
                    columns[f"{probe}_{side}"] = pa.array([of_videos.get(video) for video in names], pa.float64())
            tables.append(pa.table(columns))
    return pa.concat_tables(tables).combine_chunks()


Share = Literal["without_ties", "with_ties", "with_ties_validation_threshold", "with_ties_model_rule"]
MEANS: tuple[Share, ...] = ("without_ties", "with_ties", "with_ties_validation_threshold", "with_ties_model_rule")


def accuracy(measured: Sequence[Measurement], seed: int = 0) -> list[AccuracyRow]:
    """The "accuracy" rows of judges with several head seeds: the rows of their mean, then each judge's.

    A row of the mean has "head_seed" None and the seeds in "head_seeds"; its accuracies are means over the judges. Its
    interval resamples prompts, and each pair counts with the share of judges that are right about it. For a single
    judge these are its rows.
    """
    single = [row for each in measured for row in each.rows]
    if len(measured) < 2:
        return single
    decided = [each.decided() for each in measured]
    means: list[AccuracyRow] = []
    for group in zip(*(each.rows for each in measured), strict=True):
        key = (float(group[0]["t"]), group[0]["dimension"])
        if any((float(each["t"]), each["dimension"]) != key for each in group):
            raise ValueError("judges that are pooled must be measured at the same levels, in the same order")
        row: AccuracyRow = group[0].copy()
        row["head_seed"], row["head_seeds"] = None, [each["head_seed"] for each in group]
        for name in MEANS:
            shares = [share for each in group if (share := each[name]) is not None]
            row[name] = float(np.mean(shares)) if len(shares) == len(group) else None
        if row["without_ties"] is not None:
            right = np.mean([each[key][2] for each in decided], 0)
            row["without_ties_ci95"] = prompt_interval(right, decided[0][key][1], seed=seed)
        means.append(row)
    return means + single
