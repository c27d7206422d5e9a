"""Judges as a service's settings name them, loaded: a backbone that several judges name is loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prism.errors import PrismError
from prism.loading import load_backbone, load_judge
from prism.rewards.scorer import Scorer

FIELDS = ("head", "backbone", "device", "dtype", "call", "dimension", "draws", "levels", "seed")
"""Settings of a judge; all may be left out."""


ALONE = "prism"
"""The name of a judge that options describe and no file names."""


def load(entries: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Scorer], dict[str, str]]:
    """The scorer of each judge, and its backbone's name.

    Args:
        entries: settings by the judge's name, see `FIELDS`.

    Raises:
        PrismError: where something cannot be loaded, or does not fit.
    """
    backbones: dict[Any, Any] = {}
    scorers, names = {}, {}
    for name, entry in entries.items():
        try:
            scorers[name], names[name] = _loaded(entry, backbones)
        except PrismError as error:
            if name == ALONE:
                raise
            raise PrismError(f"The judge {name}: {error}") from error
    return scorers, names


def _loaded(entry: Mapping[str, Any], backbones: dict[Any, Any]) -> tuple[Scorer, str]:
    """A judge's scorer, and its backbone's name; `backbones` holds those that are loaded."""
    key = entry.get("backbone"), entry.get("device"), entry.get("dtype")
    if key not in backbones:
        backbones[key] = load_backbone(*key)
    backbone, call, name = backbones[key]
    judge = load_judge(entry.get("head"), backbone, embedded=entry.get("backbone") is None)
    settings = {field: entry.get(field) for field in ("dimension", "draws", "levels")}
    call = {**call, **(entry.get("call") or {})}
    return Scorer(judge, call, seed=entry.get("seed") or 0, **settings), name
