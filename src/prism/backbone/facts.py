"""Checks of a family's facts: each of the type that its field says, and in its range."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from prism.errors import PrismError, quoted, whole

if TYPE_CHECKING:
    from prism.backbone.family import Family

_NAMES = {bool: "True or False", str: "a text", int: "a whole number", float: "a number", type(None): "None"}
_ITEMS = {str: "texts", int: "whole numbers", float: "numbers", bool | None: "True, False or None"}
_ITEMS |= {bool: "True or False"}
_SETS = ("batched_arguments",)
_SEQUENCES = ("pipelines", "blocks", "parallel_blocks", "latents_argument", "first_frame_pipelines", "patch",
              "control_arguments", "further_timesteps")  # fmt: skip
_LEAST = {"widths": 1, "text_limit": 1, "outputs": 1, "tokens_before": 0, "tokens_behind": 0, "num_extra_frames": 0}
_NEEDED = ("name", "blocks", "latents_argument", "timestep_argument", "text_argument", "batched_arguments")


def check_values(family: Family) -> None:
    """Raise PrismError for a fact of a wrong type or out of range; turn lists into the tuples or sets they mean."""
    name = quoted(repr(family.name), 60)
    row: Any = type(family)
    kinds = _kinds(row)
    for fact in fields(family):
        value, kind = getattr(family, fact.name), kinds[fact.name]
        whole_list = list if fact.name in _SEQUENCES else list | tuple | set
        if fact.name in (*_SEQUENCES, *_SETS) and isinstance(value, whole_list):
            value = (frozenset if fact.name in _SETS else tuple)(value) if _hashable(value) else value
            object.__setattr__(family, fact.name, value)
        label = f"{fact.name} of the family {name}"
        if not _is_of(value, kind):
            raise PrismError(f"{label} must be {_described(kind)}; found {quoted(repr(value), 80)}.")
        if fact.name in _NEEDED and not value:
            raise PrismError(f"{label} must not be empty.")
        if fact.name in _LEAST and isinstance(value, int):
            whole(label, value, _LEAST[fact.name])
    twice = [path for index, path in enumerate(family.blocks) if path in family.blocks[:index]]
    if twice:
        raise PrismError(f"blocks of the family {name} names {twice[0]!r} twice; each runs once per denoiser call.")
    if family.patch is not None:
        for size in family.patch:
            whole(f"patch of the family {name}", size)
    if not 0 < family.tap <= 1:
        raise PrismError(
            f"tap of the family {name} must be a share of the blocks, above 0, at most 1; found {family.tap}."
        )
    if not math.isfinite(family.guidance_off):
        raise PrismError(f"guidance_off of the family {name} must be a finite number; found {family.guidance_off}.")
    if not (math.isfinite(family.pure_noise_timestep) and family.pure_noise_timestep > 0):
        raise PrismError(
            f"pure_noise_timestep of the family {name} must be a number above 0; found {family.pure_noise_timestep}."
        )


@cache
def _kinds(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _hashable(values: Any) -> bool:
    return all(getattr(value, "__hash__", None) is not None for value in values)


def _is_of(value: Any, kind: Any) -> bool:
    """True where a value is of a type hint, with the items that it names; a bool is no number."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, each) for each in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        each = [arguments[0]] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is_of, value, each))
    if origin is frozenset:
        return isinstance(value, frozenset) and all(_is_of(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _is_of(k, arguments[0]) and _is_of(v, arguments[1]) for k, v in value.items()
        )
    if origin is Callable:
        return callable(value) and not isinstance(value, type)
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    """A type hint in words, for messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", ".join(map(_described, arguments[:-1])) + f" or {_described(arguments[-1])}"
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return "a tuple of texts, as ('one',)" if arguments[-1] is ... else f"{len(arguments)} whole numbers"
    if origin is frozenset:
        return "a set of texts"
    if origin is Mapping:
        return f"a dict of texts to {_ITEMS[arguments[1]]}"
    if origin is Callable:
        return "a function"
    return _NAMES.get(kind) or f"an {kind.__name__}"
