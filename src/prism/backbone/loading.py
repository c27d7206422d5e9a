"""Load pipelines from folders and the Hub, whole or, for a judge that does not sample, with first blocks only.

Later blocks are then neither read nor allocated, nor downloaded from the Hub where they lie in files of their own.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open

from prism.backbone.family import Family
from prism.backbone.pipeline import is_denoiser
from prism.backbone.registry import component_class, family_named, loader
from prism.errors import PrismError, quoted
from prism.files import check_regular, read_json, safetensors_told
from prism.team import ran_out

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone


# The largest whole numbers that configurations may hold (`_MOST_BLOCKS` in fields with a word of `_DEPTHS`), because
# diffusers and transformers allocate blocks, and tables of positions or timesteps, before they read a weight. Fields
# with a word of `_FREE` (rope_theta) have no limit.
_MOST, _MOST_BLOCKS, _DEPTHS, _FREE = 2**24, 1000, ("layers", "depth", "blocks"), ("theta", "base")
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # of a repository; a path may begin with "/", "." or "~"
HUB = ("cache_dir", "revision", "token", "local_files_only", "force_download", "proxies")


def check_device(device: str) -> None:
    """Raise PrismError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device).cpu()  # fails on the meta device, which holds no numbers
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = quoted(str(error).splitlines()[0], 200)
        raise PrismError(
            f"The device {quoted(device, 60)} cannot be used ({reason}); choose another (--device)."
        ) from error


@contextmanager
def explain_folder_errors(source: Any) -> Iterator[None]:
    """Turn errors of diffusers and transformers while they load `source` into a PrismError that names it."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) and not os.path.exists(source) else None
    if name is not None and not _ID.fullmatch(name):
        raise PrismError(
            f"There is no folder {quoted(name, 120)}, and an id on the Hub is of the form owner/name; "
            "name the folder or id of a diffusers pipeline, or leave it out for the embedded model."
        )
    try:
        yield
    except PrismError:
        raise
    except Exception as error:  # they raise all kinds, and a folder may hold anything
        if ran_out(error):
            raise
        sentence = f"No diffusers pipeline could be loaded from {quoted(source, 120)}"
        if name is not None:
            sentence = f"There is no folder {quoted(name, 120)}, and no diffusers pipeline of this name on the Hub"
        raise PrismError(f"{sentence}: {quoted(error)}") from error


def call_beside(name: str) -> dict[str, Any]:
    """The arguments of a pipeline's call that call.json in its folder holds; none without this file."""
    path = Path(name) / "call.json"
    if not path.is_file():
        return {}
    call = read_json(path)
    if not isinstance(call, dict):
        raise PrismError(f"The file {path} is not a JSON object; pipeline arguments by name are needed.")
    return call


def load(kind: type[Backbone], source: str, up_to: int | None, reads: str | None, kwargs: dict[str, Any]) -> Backbone:
    """See `Backbone.from_pretrained`."""
    with explain_folder_errors(source):
        if up_to is None:
            return kind(load_whole(source, kwargs), reads)
        pipe, reads, num_blocks = load_pipeline(source, up_to, reads, kwargs)
        backbone = make(kind, pipe, reads, {"num_blocks": num_blocks, "partial": True})
        backbone.default_tap = min(up_to, max(1, round(backbone.family.tap * num_blocks)))
        return backbone


def make(kind: type[Backbone], pipe: Any, reads: str | None, attributes: Mapping[str, Any]) -> Backbone:
    """A backbone with attributes that its pipeline does not show, for one that was loaded in part or unpickled."""
    backbone = kind(pipe, reads or None)
    vars(backbone).update(attributes)
    return backbone


def load_whole(source: str, kwargs: dict[str, Any]) -> DiffusionPipeline:
    """A pipeline from a folder or the Hub. One without a family is refused before its weights are loaded or fetched."""
    index: Any = check_folder(Path(source)) if Path(source).exists() else None
    kind: Any = DiffusionPipeline
    if "custom_pipeline" not in kwargs:
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        kind = loader(str((index or kind.load_config(source, **hub)).get("_class_name")))
    return kind.from_pretrained(source, **kwargs)


def check_folder(folder: Path) -> dict[str, Any]:
    """A pipeline's model_index.json, after checks that loading its folder will not hang or run out of memory.

    Raises PrismError for files that are not regular (pipes), and for configurations with absurdly large numbers.
    """
    if folder.is_dir() and not os.path.lexists(folder / "model_index.json"):
        raise PrismError(
            f"The folder {folder} holds no diffusers pipeline: its model_index.json does not exist; name "
            "the folder that the pipeline's save_pretrained wrote."
        )
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise PrismError(f"The file {folder / 'model_index.json'} does not name a pipeline's class (_class_name).")
    folders = [folder, *(folder / name for name in index if not name.startswith("_"))]
    for path in (path for each in folders if each.is_dir() for path in sorted(each.iterdir())):
        if path.is_dir() and path.suffix not in (".json", ".safetensors"):
            continue
        if path.exists() or path.is_symlink():
            check_regular(path)
        if path.name in ("config.json", "scheduler_config.json"):
            for name, value in _numbers(read_json(path)):
                most = _MOST_BLOCKS if any(word in name for word in _DEPTHS) else _MOST
                if value > most and not any(word in name for word in _FREE):
                    raise PrismError(f"The file {path} says {quoted(name, 80)} = {value:g}; no model is so large.")
    return index


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a configuration, with the name of its field."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)


def load_pipeline(
    source: str, up_to: int, reads: str | None, kwargs: dict[str, Any]
) -> tuple[DiffusionPipeline, str, int]:
    """A pipeline with the first `up_to` blocks of the denoiser that is read, that denoiser's name, and the number of
    blocks that it has when whole. A second denoiser gets one block.

    Args:
        source: a folder, or an id on the Hub, from which only the shards that are needed are fetched.
        kwargs: for diffusers' `from_pretrained`; `variant` names the weights' files.
    """
    folder, fetch = Path(source), None
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    if not folder.exists():
        fetch = partial(hf_hub_download, source, **_accepted(hf_hub_download, hub))
        folder = Path(fetch("model_index.json")).parent
    index = check_folder(folder)
    kind = loader(index["_class_name"])  # unlike its base class it knows that denoisers are components
    family = family_named(index["_class_name"])
    names = [name for name in index if is_denoiser(name) and index[name][0] is not None]
    read = reads or next(iter(names), "")
    if read not in names:
        raise PrismError(f"The pipeline in {source} has no denoiser {read!r}; it has {', '.join(names) or 'none'}.")
    if fetch is not None:
        options = {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
        kind.download(source, **options, **hub, **dict.fromkeys(names))  # all but the denoisers
        taken = _accepted(snapshot_download, hub)
        folder = Path(snapshot_download(source, allow_patterns=[f"{name}/*.json" for name in names], **taken))
    loaded = {name: load_denoiser(folder, name, family, up_to if name == read else 1, kwargs, fetch) for name in names}
    models = {name: model for name, (model, _) in loaded.items()}
    return kind.from_pretrained(str(folder), **kwargs, **models), read, loaded[read][1]


def _accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `function` takes; those of the Hub's client differ between versions."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in taken}


def load_denoiser(
    folder: Path,
    name: str,
    family: Family,
    up_to: int,
    kwargs: Mapping[str, Any],
    fetch: Callable[[str], Any] | None = None,
) -> tuple[Any, int]:
    """The denoiser in `folder/name` with its first `up_to` blocks, and the number that it has when whole.

    Only the shards that hold these blocks are opened, so that others may be absent. `fetch` downloads a file of the
    folder, by its path in it. Weights get the dtype that diffusers would give them.

    Raises:
        PrismError: for a tap beyond the model, or where a file or a tensor is missing.
    """
    subfolder = folder / name
    index = read_json(folder / "model_index.json")
    kind = component_class(index[name][0], index[name][1], index["_class_name"])
    with init_empty_weights():
        model = kind.from_config(kind.load_config(str(subfolder)))
    total = len(family.block_list(model))
    if not 1 <= up_to <= total:
        raise PrismError(
            f"Blocks up to {up_to} are asked for, and this denoiser, {type(model).__name__}, has {total}; a head that "
            "reads after more is one of another model."
        )
    for part, count in family.first_blocks(model, up_to):
        del part[count:]
    tensors = _tensors(subfolder, list(model.state_dict()), kwargs.get("variant"), fetch)
    model.load_state_dict(_cast(model, tensors, kwargs.get("torch_dtype", kwargs.get("dtype")), name), assign=True)
    return model.eval(), total


def _tensors(
    subfolder: Path, names: list[str], variant: str | None, fetch: Callable[[str], Any] | None
) -> dict[str, torch.Tensor]:
    """The tensors of these names, from one file or from the shards that hold them."""
    single, several = (_of_variant(name, variant) for name in (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    index = subfolder / several
    shard_of = _weight_map(index) if index.exists() else dict.fromkeys(names, single)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted({shard_of[name] for name in names if name in shard_of}):
        path = subfolder / shard
        try:
            if fetch is not None:
                fetch(f"{subfolder.name}/{shard}")
        except OSError as error:
            raise PrismError(
                f"The file {subfolder.name}/{shard}, which the head reads, could not be fetched: {error}"
            ) from error
        if not path.is_file():
            raise PrismError(f"The file {path} is missing; it holds blocks that the head reads.")
        check_regular(path)
        with safetensors_told(path), safe_open(str(path), framework="pt") as opened:
            names_in_shard = set(opened.keys())
            for name in names:
                if shard_of.get(name) == shard and name in names_in_shard:
                    tensors[name] = opened.get_tensor(name)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise PrismError(f"The weights in {subfolder} lack {missing[0]!r}; the download may not be complete.")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index file: name of a tensor -> name of the file beside `index` that holds it."""
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    names = list(shard_of.values()) if isinstance(shard_of, dict) else [None]
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise PrismError(f"The 'weight_map' of {index} does not name files beside it.")
    return shard_of


def _of_variant(name: str, variant: str | None) -> str:
    """A weights file's name with the variant before its ending, as in model.fp16.safetensors."""
    start, _, kind = name.rpartition(".")
    return name if variant is None else f"{start}.{variant}.{kind}"


def _cast(model: Any, tensors: dict[str, torch.Tensor], dtype: Any, component: str) -> dict[str, torch.Tensor]:
    """Weights in the dtype that diffusers would load them in: some parts of some models stay in float32."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get(component, dtype.get("default", torch.float32))
    dtype = torch.float32 if dtype is None else dtype
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: value.to(torch.float32 if wide & set(name.split(".")) else dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }
