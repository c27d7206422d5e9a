"""The registry of families: register rows, find a pipeline's by its class, check its facts against the pipeline."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import diffusers
from torch import nn

from prism.backbone.families import FAMILIES
from prism.backbone.family import Family
from prism.backbone.pipeline import config_of, is_denoiser, unwrapped
from prism.backbone.sounds import rate_of
from prism.backbone.unsupported import UNSUPPORTED
from prism.errors import PrismError, quoted

ENTRY_POINTS = "prism.families"  # the group of entry points through which installed packages register rows
PAGE = "docs/backbones.md"
Names = str | type | Iterable[str | type]

_rows = {pipeline: family for family in FAMILIES.values() for pipeline in family.pipelines}
_classes: dict[str, type] = {}  # of registered pipelines, for those that diffusers cannot load from a folder


def register(family: Family, pipeline: Names | None = None, *, replace: bool = False) -> Family:
    """Register a row of facts, for `Backbone`, folders whose `model_index.json` names its pipelines, and commands.

    An installed package does so for every process, commands too, by an entry point of the group "prism.families" that
    names a `Family`, a dict of pipelines to families, a list of families, or a function that returns one of these.

    Args:
        family: the row; it is `FAMILIES[family.name]` afterwards.
        pipeline: its pipelines, as classes or their names; None takes `family.pipelines`. A pipeline outside diffusers
            has to be given as its class, or it cannot be loaded from a folder.
        replace: replace an existing row of that name, or of those pipelines.

    Returns:
        The row, with the names of its pipelines.

    Raises:
        PrismError: where `family` is no `Family`, or its name or a pipeline has a row already and `replace` is False.
    """
    if not isinstance(family, Family):
        raise PrismError(f"register takes a prism.backbone.Family; found {type(family).__name__}.")
    pipelines = family.pipelines if pipeline is None else pipeline
    several = isinstance(pipelines, Iterable) and not isinstance(pipelines, str | type)
    kinds: list[Any] = list(pipelines) if several else [pipelines]  # type: ignore[arg-type]
    if not kinds or not all(isinstance(kind, str | type) and kind for kind in kinds):
        raise PrismError(
            f"The family {family.name!r} is of no pipeline; give `pipeline`, a class or its name, or a list of these; "
            f"found {quoted(pipelines, 80)}."
        )
    names = tuple(kind if isinstance(kind, str) else kind.__name__ for kind in kinds)
    family = dataclasses.replace(family, pipelines=names)
    registered = FAMILIES.get(family.name)
    # The same facts again, for further pipelines.
    if registered is not None and dataclasses.replace(registered, pipelines=names) == family:
        family = dataclasses.replace(family, pipelines=tuple(dict.fromkeys((*registered.pipelines, *names))))
        names = family.pipelines if all(_rows.get(name) is registered for name in registered.pipelines) else names
    if not replace:
        if registered is not None and dataclasses.replace(registered, pipelines=family.pipelines) != family:
            raise PrismError(f"There is a family {family.name!r} already; give yours another name, or replace=True.")
        for name in names:
            if _rows.get(name, registered) is not registered:
                raise PrismError(f"{name} is of the family {_rows[name].name!r} already; give replace=True.")
    FAMILIES[family.name] = family
    _rows.update(dict.fromkeys(names, family))
    _classes.update({kind.__name__: kind for kind in kinds if isinstance(kind, type)})
    return family


def family_of(pipe: Any) -> Family:
    """The row of a pipeline: its attribute `family`, or the row of its class or nearest base class."""
    row = getattr(pipe, "family", None)
    return row if isinstance(row, Family) else _of_class(type(pipe)) or _refuse(type(pipe).__name__, pipe)


def family_named(name: str) -> Family:
    """The row of a pipeline by the name of its class, as a folder gives it."""
    kind = pipeline_class(name)
    if kind is None:
        return _rows.get(name) or _refuse(name)
    row = getattr(kind, "family", None)
    return row if isinstance(row, Family) else _of_class(kind) or _refuse(name)


def pipeline_class(name: str) -> type | None:
    """The class of that name: the registered one, or diffusers'; None where there is neither."""
    if name not in _rows:
        _register_entry_points()
    kind = _classes.get(name) or getattr(diffusers, name, None)
    return kind if isinstance(kind, type) else None


def loader(name: str) -> Any:
    """The class that loads the folder of a supported pipeline.

    Raises PrismError for a pipeline without a row, and for one outside diffusers that was registered by its name alone.
    """
    family_named(name)
    kind = pipeline_class(name)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise PrismError(
            f"The pipeline {name[:60]} is none of diffusers', which cannot load it from a folder; register its family "
            "with the class itself, one that has from_pretrained."
        )
    return kind


def component_class(library: str, name: str, pipeline: str) -> Any:
    """The class of a component by the names in a folder: of diffusers, or of the named library, which is imported only
    for a pipeline whose class was registered."""
    return getattr(importlib.import_module(library) if pipeline in _classes else diffusers, name)


def _of_class(kind: type) -> Family | None:
    names = [base.__name__ for base in kind.__mro__]
    if names[0] not in _rows:
        _register_entry_points()
    return next((_rows[name] for name in names if name in _rows), None)


@cache
def _register_entry_points() -> None:
    """Register the rows of installed packages, once; warn of those that cannot be, and leave them out."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            rows = point.load()
            if callable(rows) and not isinstance(rows, Family):
                rows = rows()
            if isinstance(rows, Mapping):
                for pipeline, family in rows.items():
                    register(family, pipeline)
            elif rows is not None:  # a function may have registered its rows by itself
                for family in [rows] if isinstance(rows, Family) else rows:
                    register(family)
        except (Exception, SystemExit) as error:  # the code of a package, which may do anything, sys.exit too
            package = point.dist.name if point.dist else "an installed package"
            reason = quoted(error, 200)
            warnings.warn(
                f"The entry point {point.name!r} of {package} in the group {ENTRY_POINTS!r} gives no family "
                f"({type(error).__name__}: {reason}); it is left out.",
                stacklevel=2,
            )


def check_pipeline(family: Family, pipe: Any, denoiser: nn.Module) -> None:
    """Raise PrismError for a fact that names a part or field that the pipeline or its denoiser does not have."""
    kind, inner, config = type(unwrapped(denoiser)).__name__, unwrapped(denoiser), config_of(denoiser)
    label = f"of the family {quoted(repr(family.name), 60)}"
    paths = {path for path, _ in inner.named_modules()} - {""}
    named = [
        *(("blocks", path) for path in family.blocks),
        *(("parallel_blocks", path) for path in family.parallel_blocks),
    ]
    for fact, path in [*named, *([] if family.text_embedder is None else [("text_embedder", family.text_embedder)])]:
        if path not in paths:
            lists = [path for path, module in inner.named_modules() if isinstance(module, nn.ModuleList)]
            has = f"its lists are {', '.join(lists[:4])}" if lists else "it has no lists of modules"
            raise PrismError(f"The denoiser {kind} has no {fact} {path!r}, which the {label[7:]} names; {has}.")
    if family.control_arguments and not isinstance(getattr(pipe, "controlnet", None), nn.Module):
        raise PrismError(
            f"{type(pipe).__name__} has no module `controlnet`, whose outputs control_arguments {label} names."
        )
    if family.trailing_blocks_field:
        trailing = config.get(family.trailing_blocks_field)
        total = sum(
            len(p) if isinstance(p := inner.get_submodule(path), nn.ModuleList) else 1 for path in family.blocks
        )
        if isinstance(trailing, bool) or not isinstance(trailing, int) or not 0 <= trailing < total:
            raise PrismError(
                f"trailing_blocks_field {label} names {family.trailing_blocks_field!r}, which the configuration of "
                f"{kind} has as {quoted(trailing, 40)}; a number of its {total} blocks is needed."
            )
    if family.token_form == "frames" and not config.get("block_out_channels"):
        raise PrismError(f"{kind} has no block_out_channels, as a U-Net has; look at token_form {label}.")
    for fact in ("sampling_rate", "soundtrack_rate"):
        if not (path := getattr(family, fact)) or getattr(pipe, path.partition(".")[0], 0) is None:
            continue  # an optional part that is not there
        if not rate_of(pipe, path):
            raise PrismError(f"{type(pipe).__name__} has no {path}, which {fact} {label} names.")
    if family.guidance == "guider" and not hasattr(pipe, "guider"):
        raise PrismError(f"{type(pipe).__name__} has no guider, which guidance {label} names.")
    if family.vae_factor:
        owner = "scheduler" if family.vae_factor == "sigma_data" else "vae"
        if family.vae_factor not in config_of(getattr(pipe, owner)):
            raise PrismError(
                f"The configuration of the {owner} has no {family.vae_factor}; look at vae_factor {label}."
            )


def _refuse(name: str, pipe: Any = None) -> Any:
    """Raise PrismError with the nearest family's name."""
    if name in UNSUPPORTED:
        raise PrismError(f"The pipeline {name} is not supported: {UNSUPPORTED[name]}. See {PAGE}.")
    near = _nearest(name, pipe)
    hint = f" Nearest is {near.name!r} ({near.models[:40]})." if near else ""
    raise PrismError(
        f"The pipeline {name[:60]} is not supported yet.{hint} Give PRISM a row of facts with "
        f"prism.backbone.register, and check it with `prism doctor --family`: {PAGE}."
    )


def _nearest(name: str, pipe: Any) -> Family | None:
    """The nearest family by the denoiser's blocks and text embedding and by names of classes, or None."""
    parts = getattr(pipe, "components", None)
    parts = parts if isinstance(parts, Mapping) else {}
    denoiser = next((p for n, p in parts.items() if is_denoiser(n) and isinstance(p, nn.Module)), None)
    paths = set() if denoiser is None else {path for path, _ in denoiser.named_modules()}
    names = [name, *(base.__name__ for base in type(denoiser).__mro__[:3] if denoiser is not None)]

    def nearness(family: Family) -> tuple[bool, int, float]:
        blocks = all(path in paths for path in family.blocks)
        common = max(len(_common(one, other)) for one in names for other in family.pipelines)
        alike = max(difflib.SequenceMatcher(None, name, other).ratio() for other in family.pipelines)
        return blocks and family.text_embedder in paths, common if common > 2 else 0, alike

    best = max(FAMILIES.values(), key=nearness)
    same_parts, common, alike = nearness(best)
    return best if same_parts or common or alike > 0.7 else None


def _common(one: str, other: str) -> str:
    """The longest common prefix of two names."""
    size = next((index for index, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:size]
