"""metrics.json, the versioned document that every command which computes leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

from prism import files
from prism.errors import PrismError
from prism.report import wording
from prism.report.plan_rows import ChosenRow, PruneRow, ReplayedRow, RivalRow, SizeRow
from prism.report.rows import (
    AccuracyRow,
    AnswerRow,
    AttentionRow,
    BestOfNRow,
    BiasRow,
    CalibrationRow,
    ClaimRow,
    ComparisonRow,
    CutRow,
    GeneratorRow,
    MatchedRow,
    ReliabilityRow,
    SightRow,
    StudyRow,
    SwapRow,
)

SCHEMA = 1

_ROWS = {"accuracy": AccuracyRow, "best_of_n": BestOfNRow}  # every document has these lists, empty or not
_OPTIONAL_ROWS = {
    "judge_comparison": ComparisonRow,
    "confirmed": ComparisonRow,
    "attention": AttentionRow,
    "bars": ClaimRow,
    "cuts": CutRow,
    "study": StudyRow,
    "calibration": CalibrationRow,
    "generators": GeneratorRow,
    "reliability": ReliabilityRow,
    "biases": BiasRow,
    "swap": SwapRow,
    "front": ReplayedRow,
    "plans": ChosenRow,
    "rivals": RivalRow,
    "prune": PruneRow,
    "sizes": SizeRow,
    "sight": SightRow,
    "matched": MatchedRow,
    "answers": AnswerRow,
}


class _Document(TypedDict):
    command: str
    backbone: dict[str, Any]
    seed: int
    timings: dict[str, float]
    environment: dict[str, Any]


def document(
    command: str,
    backbone: Mapping[str, Any],
    seed: int,
    accuracy: Iterable[Mapping[str, Any]] = (),
    best_of_n: Iterable[Mapping[str, Any]] = (),
    timings: Mapping[str, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The whole metrics document, checked. `extra` are a command's own fields, written after the common ones.

    Raises `PrismError` naming the first field that does not fit the schema.
    """
    metrics = {
        "schema": SCHEMA,
        "command": command,
        "backbone": dict(backbone),
        "seed": seed,
        "accuracy": [dict(row) for row in accuracy],
        "best_of_n": [dict(row) for row in best_of_n],
        **extra,
        "timings": dict(timings or {}),
        "environment": environment(),
    }
    metrics = _plain(metrics)
    validate(metrics)
    return metrics


def validate(metrics: Any, name: str = "metrics.json") -> None:
    """Check a metrics document against the schema. Raises `PrismError` naming the first field that does not fit."""
    if not isinstance(metrics, dict):
        raise PrismError(f"{name} is not a JSON object; it is no metrics document.")
    if metrics.get("schema") != SCHEMA:
        raise PrismError(f"{name} has schema {metrics.get('schema')!r}; this version of prism reads schema {SCHEMA}.")
    _check_fields(metrics, _Document, name)
    for key, kind in {**_ROWS, **_OPTIONAL_ROWS}.items():
        rows = metrics.get(key, [] if key in _OPTIONAL_ROWS else None)
        if not isinstance(rows, list):
            raise PrismError(f"{name}: the field {key!r} is missing or not a list.")
        for i, row in enumerate(rows):
            _check_fields(row, kind, f"{name}: {key}[{i}]")


@cache
def _fields(kind: Any) -> tuple[tuple[str, bool, tuple[type, ...]], ...]:
    """(name, whether it must be there, accepted types) of each field of a TypedDict; a whole number is a float too."""
    fields = []
    for name, hint in get_type_hints(kind).items():
        parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
        types = [each for part in parts for each in ((int, float) if part is float else (get_origin(part) or part,))]
        fields.append((name, name in kind.__required_keys__, tuple(types)))
    return tuple(fields)


def _check_fields(row: Any, kind: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise PrismError(f"{where} is not a JSON object.")
    for field, required, types in _fields(kind):
        if field not in row:
            if not required:
                continue
            raise PrismError(f"{where}: the field {field!r} is missing.")
        value = row[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            accepted = " or ".join("null" if each is type(None) else each.__name__ for each in types)
            raise PrismError(f"{where}: the field {field!r} is {value!r}; {accepted} is needed.")
        if isinstance(value, float) and not math.isfinite(value):
            raise PrismError(f"{where}: the field {field!r} is {value!r}; a finite number is needed.")
        if field.endswith("_ci95") and value is not None:
            _check_interval(value, f"{where}: the field {field!r}")


def _check_interval(value: Any, where: str) -> None:
    numbers = [isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in value]
    if numbers != [True, True] or value[0] > value[1]:
        raise PrismError(f"{where} is {value!r}; [low, high] with low <= high is needed.")


def environment() -> dict[str, Any]:
    """The place of a run: versions of what computes, the processor, its cores and the threads used."""
    import torch

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("prism-video", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pyarrow")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {package: version(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_config(path: str | os.PathLike[str], config: Any) -> None:
    """Write a run's resolved configuration (a dataclass or a mapping) as JSON; paths become strings."""
    files.write_json(path, _plain(config))


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: mappings and dataclasses become dicts, arrays and tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return str(value)


def cut_entry(cut: Mapping[str, Any], strategy: str, weights: Mapping[str, float]) -> CutRow:
    """One cut for the report: its name, noise level, the deciding score by candidate, and who was kept."""
    columns = [(weight, cut["scores"][name]) for name, weight in weights.items()]
    deciding = [sum(weight * column[i] for weight, column in columns) for i in range(len(cut["candidates"]))]
    return {
        "name": wording.cut_name(strategy, cut["step"]),
        "step": cut["step"],
        "t": cut["t"],
        "scores": {str(candidate): score for candidate, score in zip(cut["candidates"], deciding)},
        "dimensions": cut["scores"],
        "kept": list(cut["kept"]),
        "dropped": list(cut.get("dropped", ())),
    }
