"""Which backbone a head was trained on, told by class names, configurations and a sample of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prism.backbone.families import is_denoiser
from prism.backbone.protocol import config_of


def fingerprint(pipe: Any, denoiser: Any, whole: bool) -> dict[str, Any]:
    """See `Backbone.fingerprint`. Of a denoiser that is not `whole` the weights are not told: None."""
    denoiser = uncompiled(denoiser)
    sample = hashlib.sha256()
    for name, value in sorted(weights(denoiser).items()):
        for part in _plain(value):
            sample.update(name.encode() + part.flatten()[:16].float().cpu().numpy().tobytes())
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": type(denoiser).__name__,
        "denoiser_config": hashlib.sha256(config_text(denoiser)).hexdigest(),
        "vae": type(pipe.vae).__name__,
        "vae_config": hashlib.sha256(config_text(pipe.vae)).hexdigest(),
        "weights": sample.hexdigest() if whole else None,
    }


def config_text(part: Any) -> bytes:
    """A configuration as diffusers keeps it; of parts without one, of the names and shapes of their parameters.

    Configurations of another kind hold what does not matter, such as the version they were written with.
    """
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        public: dict[str, Any] = {name: value for name, value in config.items() if not name.startswith("_")}
    else:
        named = part.named_parameters() if isinstance(part, nn.Module) else ()
        public = {name: list(value.shape) for name, value in named}
    return json.dumps(public, sort_keys=True, default=str).encode()


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile(module)` gives, or the module itself."""
    return getattr(module, "_orig_mod", module)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights by name, wherever they lie: those that accelerate moved away and those packed in a layer."""
    module = uncompiled(module)
    found: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        hook = vars(part).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            elsewhere = getattr(each, "weights_map", None) or {}
            for name, value in part.named_parameters(recurse=False):
                if value.is_meta and name in elsewhere and prefix + name in found:
                    found[prefix + name] = elsewhere[name]
        if hasattr(part, "_packed_params") and callable(getattr(part, "weight", None)):
            packed = {f"{prefix}weight": part.weight(), f"{prefix}bias": part.bias()}  # torch's dynamic int8 layers
            found |= {name: value for name, value in packed.items() if value is not None}
    return found


def surroundings(pipe: Any) -> str:
    """A short text that changes with what a conditioning depends on beside a call: a pipeline's parts but for its
    denoisers, their weights and their adapters. A few ms for the largest encoders.
    """
    found = []
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and not is_denoiser(name):
            found.append(_state(part))
        elif hasattr(part, "config"):  # the scheduler, which gives timesteps their form
            found.append(f"{type(part).__name__}{dict(config_of(part))}")
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def _state(module: nn.Module) -> str:
    digest = hashlib.sha256()
    ends: dict[torch.device, list[Tensor]] = {}
    for name, value in weights(module).items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        for part in _plain(value):
            flat = part.flatten()
            ends.setdefault(part.device, []).extend((flat[:4].float(), flat[-4:].float()))
    for tensors in ends.values():
        digest.update(torch.cat(tensors).cpu().numpy().tobytes())  # one transfer a device
    names = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
    for layer in module.modules():
        if hasattr(layer, "merged_adapters"):  # of peft
            digest.update(repr([getattr(layer, name, None) for name in names]).encode())
    return digest.hexdigest()


def _plain(value: Tensor) -> list[Tensor]:
    """What holds a weight's numbers: itself, a quantised one's integers, a tensor subclass's parts. Meta holds none."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return [plain for name in names for plain in _plain(getattr(value, name))]
    if value.is_meta:
        return []
    return [value.detach().int_repr() if value.is_quantized else value.detach()]
