"""What a conditioning depends on besides its prompt and call, as JSON: of files that outlive the process.

`prism.backbone.fingerprint.surroundings` answers the same within a process, in a few ms; this reads every weight of the
encoders, and also holds tokenizers, versions and code of one's own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prism import files
from prism.backbone.fingerprint import class_name, weights_bits, weights_state
from prism.backbone.pipeline import config_of, is_denoiser, unwrapped

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone

LIBRARIES = ("diffusers", "transformers")
_STABLE = {*LIBRARIES, *sys.stdlib_module_names, "accelerate", "huggingface_hub", "peft", "tokenizers", "torch"}
_INNER = ("tokenizer", "image_processor", "video_processor", "feature_extractor")  # of a processor
_READING = ("model_max_length", "padding_side", "truncation_side", "chat_template")  # attributes of a tokenizer
_NO_SETTING = {"name_or_path", "transformers_version", "diffusers_version", "added_tokens_decoder"}


def dependencies(backbone: Backbone) -> dict[str, Any]:
    """Classes, configurations and code of a pipeline's parts, the weights of all but its denoisers, and versions.

    Where files were loaded from does not matter. The weights of denoisers do not either, as pipelines call none of
    their layers before.
    """
    pipe = backbone.pipe
    others = {name: part for name, part in pipe.components.items() if not is_denoiser(name) and part is not None}
    return {
        "pipeline": {**_of_part(pipe), "reads": backbone.fingerprint().get("reads")},
        "denoiser": {**_of_part(unwrapped(backbone.denoiser), False), "dtype": str(backbone.dtype)},
        "parts": {name: _of_part(part) for name, part in sorted(others.items())},
        "device": backbone.device.type,
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }


def _of_part(part: Any, weights: bool = True) -> dict[str, Any]:
    """The class of a part; digests of its configuration and code; of a module's `weights`, of a tokenizer's words."""
    config = part.to_dict() if not isinstance(part, nn.Module) and hasattr(part, "to_dict") else config_of(part)
    facts: dict[str, Any] = {
        "class": class_name(part),
        "code": _code(type(unwrapped(part))),
        "config": _digest(_plain(config)),
    }
    if hasattr(part, "get_vocab"):
        facts["tokenizer"] = _digest(_tokenizer(part))
    elif weights and isinstance(part, nn.Module):
        facts |= {"weights": weights_bits(part), "state": weights_state(part), "buffers": _buffers(part)}
    inner = {name: getattr(part, name, None) for name in _INNER} if not hasattr(part, "components") else {}
    facts |= {name: _of_part(each) for name, each in inner.items() if each is not None}
    return facts


def _tokenizer(part: Any) -> dict[str, Any]:
    """A tokenizer's settings, and its whole model, or its words where it runs in Python.

    How it cuts and pads is left out: each call sets that anew.
    """
    backend: Any = getattr(part, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if hasattr(backend, "to_str") else part.get_vocab()
    settings = {name: getattr(part, name, None) for name in _READING}
    settings["init"] = {name: value for name, value in getattr(part, "init_kwargs", {}).items() if name[-5:] != "_file"}
    return {"model": {name: model[name] for name in model if name not in ("truncation", "padding")}, **_plain(settings)}


def _buffers(module: nn.Module) -> str:
    """SHA-256 of a module's buffers, such as the mean of latents that some VAEs keep in one."""
    digest = hashlib.sha256()
    for name, value in unwrapped(module).named_buffers():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if type(value) is Tensor and not value.is_meta:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _code(kind: type) -> list[str]:
    """SHA-256 of the files of a class and of its bases that no library with a version of its own holds."""
    sums = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in _STABLE:
            try:
                sums.append(files.sha256(inspect.getsourcefile(base) or ""))
            except Exception:  # typed in an interpreter, or without a source
                sums.append(base.__qualname__)
    return sums


def _plain(value: Any) -> Any:
    """A setting as JSON, without paths, versions and what has an address in memory."""
    if isinstance(value, Mapping):
        names = sorted(str(name) for name in value if not str(name).startswith("_") and str(name) not in _NO_SETTING)
        texts = {str(name): each for name, each in value.items()}
        return {name: _plain(texts[name]) for name in names}
    if isinstance(value, list | tuple | set | frozenset):
        plain = [_plain(each) for each in value]
        return plain if isinstance(value, list | tuple) else sorted(plain, key=repr)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return _plain(value.to_dict()) if hasattr(value, "to_dict") else type(value).__name__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
