"""Rows of facts held against what they may say: each value's kind and range, and the pipeline that they are of."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from prism.backbone.parts import config_of, unwrapped
from prism.errors import PrismError, quoted, whole

if TYPE_CHECKING:
    from prism.backbone.family import Family

_NAMES = {bool: "True or False", str: "a text", int: "a whole number", float: "a number", type(None): "None"}
_SETS = ("batched",)
_SEQUENCES = ("pipelines", "blocks", "beside", "latents_argument", "first_frame", "patch")
_LEAST = {"widths": 1, "text_limit": 1, "outputs": 1, "tokens_before": 0, "tokens_behind": 0}
_NEEDED = ("name", "blocks", "latents_argument", "timestep_argument", "text_argument", "batched")


def check_values(family: Family) -> None:
    """Raise PrismError for a fact of another kind, or out of its range; lists are made the tuples or sets they mean."""
    name = quoted(repr(family.name), 60)
    row: Any = type(family)
    kinds = _kinds(row)
    for fact in dataclasses.fields(family):
        value, kind = getattr(family, fact.name), kinds[fact.name]
        whole_list = list if fact.name in _SEQUENCES else list | tuple | set
        if fact.name in (*_SEQUENCES, *_SETS) and isinstance(value, whole_list):
            value = (frozenset if fact.name in _SETS else tuple)(value) if _hashable(value) else value
            object.__setattr__(family, fact.name, value)
        label = f"{fact.name} of the family {name}"
        if not _is(value, kind):
            raise PrismError(f"{label} must be {_described(kind)}; found {quoted(repr(value), 80)}.")
        if fact.name in _NEEDED and not value:
            raise PrismError(f"{label} must not be empty.")
        if fact.name in _LEAST and isinstance(value, int):
            whole(label, value, _LEAST[fact.name])
    twice = [path for place, path in enumerate(family.blocks) if path in family.blocks[:place]]
    if twice:
        raise PrismError(f"blocks of the family {name} names {twice[0]!r} twice; each runs once a denoiser call.")
    if family.patch is not None:
        for size in family.patch:
            whole(f"patch of the family {name}", size)
    if not 0 < family.tap <= 1:
        raise PrismError(
            f"tap of the family {name} must be a share of the blocks, above 0, at most 1; found {family.tap}."
        )
    if not (math.isfinite(family.timestep_of_one) and family.timestep_of_one > 0):
        raise PrismError(
            f"timestep_of_one of the family {name} must be a number above 0; found {family.timestep_of_one}."
        )


def check_pipeline(family: Family, pipe: Any, denoiser: nn.Module) -> None:
    """Raise PrismError for a fact that names what the pipeline or its denoiser has not."""
    kind, inner, config = type(unwrapped(denoiser)).__name__, unwrapped(denoiser), config_of(denoiser)
    label = f"of the family {quoted(repr(family.name), 60)}"
    paths = {path for path, _ in inner.named_modules()} - {""}
    named = [*(("blocks", path) for path in family.blocks), *(("beside", path) for path in family.beside)]
    for fact, path in [*named, *([] if family.text_embedder is None else [("text_embedder", family.text_embedder)])]:
        if path not in paths:
            lists = [path for path, module in inner.named_modules() if isinstance(module, nn.ModuleList)]
            known = f"its lists are {', '.join(lists[:4])}" if lists else "it has no lists of modules"
            raise PrismError(f"The denoiser {kind} has no {fact} {path!r}, which the {label[7:]} names; {known}.")
    if family.without_last:
        left = config.get(family.without_last)
        total = sum(
            len(p) if isinstance(p := inner.get_submodule(path), nn.ModuleList) else 1 for path in family.blocks
        )
        if isinstance(left, bool) or not isinstance(left, int) or not 0 <= left < total:
            raise PrismError(
                f"without_last {label} names {family.without_last!r}, which the configuration of {kind} has as "
                f"{quoted(left, 40)}; a number of its {total} blocks is needed."
            )
    if family.token_form == "frames" and not config.get("block_out_channels"):
        raise PrismError(f"{kind} has no block_out_channels, as a U-Net has; look at token_form {label}.")
    if family.guidance == "guider" and not hasattr(pipe, "guider"):
        raise PrismError(f"{type(pipe).__name__} has no guider, which guidance {label} names.")
    if family.vae_factor:
        owner = "scheduler" if family.vae_factor == "sigma_data" else "vae"
        if family.vae_factor not in config_of(getattr(pipe, owner)):
            raise PrismError(
                f"The configuration of the {owner} has no {family.vae_factor}; look at vae_factor {label}."
            )


@cache
def _kinds(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _hashable(values: Any) -> bool:
    return all(getattr(value, "__hash__", None) is not None for value in values)


def _is(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        each = [arguments[0]] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is, value, each))
    if origin is frozenset:
        return isinstance(value, frozenset) and all(_is(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _is(k, arguments[0]) and _is(v, arguments[1]) for k, v in value.items()
        )
    if origin is Callable:
        return callable(value) and not isinstance(value, type)
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
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
        return f"a dict of texts to {'texts' if arguments[1] is str else 'whole numbers'}"
    if origin is Callable:
        return "a function"
    return _NAMES.get(kind) or f"an {kind.__name__}"
