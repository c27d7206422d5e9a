"""metrics.json, the versioned document that every command which computes leaves behind, and the types of its rows."""

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

SCHEMA = 1


class HeadSeeds(TypedDict, total=False):
    """The judges behind a row that is the mean over several of them; other rows lack the field."""

    head_seeds: list[int | None]


class _NewerAccuracy(HeadSeeds, total=False):
    """Fields that older files of the schema lack."""

    log_snr: float | None
    decided_pairs: int
    decided_prompts: int


class AccuracyRow(_NewerAccuracy):
    """One row of "accuracy": one judge at one noise level on one dimension."""

    judge: str
    head_seed: int | None
    source: str
    t: float
    set: str
    dimension: str
    without_ties: float | None
    without_ties_ci95: list[float] | None
    with_ties: float | None
    with_ties_validation_threshold: float | None
    with_ties_model_rule: float | None
    pairs: int
    prompts: int


class PlanFields(TypedDict):
    """The fields of a Best-of-N row that say how the pipeline was called and how the strategy was run."""

    strategy: str
    num_inference_steps: int
    guidance_scale: float | None
    schedule: list[list[int]] | None
    draft_steps: int | None
    judge_at: float | None


class _MeasuredBestOfN(HeadSeeds, total=False):
    """Fields that only a contest of strategies writes."""

    name: str
    num_draws: int | None
    referee_score: float
    runs_timed: int


class BestOfNRow(_MeasuredBestOfN, PlanFields):
    """One row of "best_of_n": one strategy on one set of prompts.

    The judge is null where nothing judged; gain and share are where no referee measured the candidates.
    """

    judge: str | None
    head_seed: int | None
    n: int
    set: str
    prompts: int
    referee_gain: float | None
    referee_gain_ci95: list[float] | None
    oracle_share: float | None
    oracle_share_ci95: list[float] | None
    denoiser_rows: float
    denoiser_share_of_full: float | None
    vae_decodes: int
    head_calls: int
    seconds: float


class ComparisonRow(TypedDict):
    """One row of "judge_comparison" or "confirmed": the accuracy of one judge minus another's, paired."""

    judge: str
    against: str
    set: str
    t: float
    dimension: str
    difference: float
    ci95: list[float] | None
    pairs: int
    prompts: int


class AttentionRow(TypedDict):
    """One row of "attention": the share of attention that falls on objects, at one level, in some candidates.

    lift: `attention_share` over `area_share`; null where there are no cells of objects.
    """

    t: float
    candidates: str
    referee: float
    attention_share: float
    area_share: float
    video_share: float
    lift: float | None
    lift_ci95: list[float] | None
    prompts: int


class ClaimRow(TypedDict):
    """One row of "bars": a limit that a full run is held to; `met` is null where it was not measured."""

    bar: str
    reached: str
    met: bool | None


class _NewerCut(TypedDict, total=False):
    """Fields that older files of the schema lack."""

    dropped: list[int]


class CutRow(_NewerCut):
    """One row of "cuts": one cut of the run that is shown. `scores` decide; candidates are their keys, as text."""

    name: str
    step: int
    t: float | None
    scores: dict[str, float]
    dimensions: dict[str, list[float]]
    kept: list[int]


class Agreement(TypedDict):
    """The field "agreement": strategies run separately, compared with the run that all share."""

    prompts: int
    runs: int
    same_pick: int
    largest_difference: float


class StudyRow(TypedDict):
    """One row of "study": the accuracy of one variant of a recipe, and its difference from the recipe's."""

    variant: str
    question: str
    what: str
    train: dict[str, Any]
    head: dict[str, Any]
    set: str
    dimension: str
    accuracy: float
    accuracy_ci95: list[float] | None
    difference: float
    difference_ci95: list[float] | None
    spread: float | None
    judges: int
    by_level: dict[str, float]
    by_dimension: dict[str, float]
    pairs: int
    prompts: int


class CalibrationRow(TypedDict):
    """One row of a study's "calibration": one variant on one dimension."""

    variant: str
    dimension: str
    temperature: float
    eta: float
    nll_before: float
    nll_after: float
    calibration_error_before: float
    calibration_error_after: float


class SummaryRow(TypedDict):
    """One main number of a run, and its interval."""

    what: str
    value: float | None
    ci95: list[float] | None


class BesideRow(SummaryRow):
    """The same, with the full run's number and interval."""

    full: float | None
    full_ci95: list[float] | None


class Summary(TypedDict):
    """The main numbers of a run on `prompts` prompts, by `judges` judges."""

    prompts: int
    judges: int
    rows: list[SummaryRow]


class Beside(TypedDict):
    """The field "beside": a run's main numbers beside the full run's."""

    prompts: int
    judges: int
    rows: list[BesideRow]
    full_prompts: int
    full_judges: int


_ROWS = {"accuracy": AccuracyRow, "best_of_n": BestOfNRow}  # every document has these lists, empty or not
_OPTIONAL_ROWS = {
    "judge_comparison": ComparisonRow,
    "confirmed": ComparisonRow,
    "attention": AttentionRow,
    "bars": ClaimRow,
    "cuts": CutRow,
    "study": StudyRow,
    "calibration": CalibrationRow,
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
