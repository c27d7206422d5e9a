"""metrics.json: the versioned document that every command which computes leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from prism import files
from prism.errors import PrismError
from prism.report import wording

SCHEMA = 1

_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))

#: Field -> accepted types, of one row of "accuracy": one judge at one noise level on one dimension.
ACCURACY_FIELDS: dict[str, tuple[type, ...]] = {
    "judge": (str,),
    "head_seed": (int, type(None)),
    "source": (str,),
    "t": _NUMBER,
    "set": (str,),
    "dimension": (str,),
    "without_ties": _OPTIONAL_NUMBER,
    "without_ties_ci95": (list, type(None)),
    "with_ties": _OPTIONAL_NUMBER,
    "with_ties_validation_threshold": _OPTIONAL_NUMBER,
    "with_ties_model_rule": _OPTIONAL_NUMBER,
    "pairs": (int,),
    "prompts": (int,),
}

#: Field -> accepted types, of one row of "best_of_n": one strategy on one set of prompts.
#: The judge is null where nothing judged; gain and share are where no referee measured the candidates.
BEST_OF_N_FIELDS: dict[str, tuple[type, ...]] = {
    "judge": (str, type(None)),
    "head_seed": (int, type(None)),
    "strategy": (str,),
    "n": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": _OPTIONAL_NUMBER,
    "schedule": (list, type(None)),
    "draft_steps": (int, type(None)),
    "judge_at": _OPTIONAL_NUMBER,
    "set": (str,),
    "prompts": (int,),
    "referee_gain": _OPTIONAL_NUMBER,
    "referee_gain_ci95": (list, type(None)),
    "oracle_share": _OPTIONAL_NUMBER,
    "oracle_share_ci95": (list, type(None)),
    "denoiser_rows": _NUMBER,
    "denoiser_share_of_full": _OPTIONAL_NUMBER,
    "vae_decodes": (int,),
    "head_calls": (int,),
    "seconds": _NUMBER,
}


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
    top: dict[str, tuple[type, ...]] = {
        "command": (str,),
        "backbone": (dict,),
        "seed": (int,),
        "timings": (dict,),
        "environment": (dict,),
    }
    _check_fields(metrics, top, name)
    for key, fields in (("accuracy", ACCURACY_FIELDS), ("best_of_n", BEST_OF_N_FIELDS)):
        rows = metrics.get(key)
        if not isinstance(rows, list):
            raise PrismError(f"{name}: the field {key!r} is missing or not a list.")
        for i, row in enumerate(rows):
            _check_fields(row, fields, f"{name}: {key}[{i}]")


def _check_fields(row: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(row, dict):
        raise PrismError(f"{where} is not a JSON object.")
    for field, types in fields.items():
        if field not in row:
            raise PrismError(f"{where}: the field {field!r} is missing.")
        value = row[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise PrismError(f"{where}: the field {field!r} is {value!r}; {wanted} is needed.")
        if isinstance(value, float) and not math.isfinite(value):
            raise PrismError(f"{where}: the field {field!r} is {value!r}; a finite number is needed.")
        if field.endswith("_ci95") and value is not None:
            _check_interval(value, f"{where}: the field {field!r}")


def _check_interval(value: Any, where: str) -> None:
    numbers = [isinstance(end, _NUMBER) and not isinstance(end, bool) and math.isfinite(end) for end in value]
    if numbers != [True, True] or value[0] > value[1]:
        raise PrismError(f"{where} is {value!r}; [low, high] with low <= high is needed.")


def environment() -> dict[str, Any]:
    """Where a run took place: versions of what computes, the processor, its cores and the threads used."""
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


def cut_entry(cut: Mapping[str, Any], strategy: str, weights: Mapping[str, float]) -> dict[str, Any]:
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
