"""Fingerprints of backbones: compare the one that a head was trained on with another.

A fingerprint holds classes, the settings that a head depends on (`needs`: blocks, widths, channels, latent layout and
scaling), the other settings that differ from their class's defaults, and a hash of a sample of the weights. Only the
first two decide whether a head fits; the rest is warned of. Earlier versions hold just a hash of each configuration.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prism.backbone.pipeline import config_of, is_denoiser, modules_of, unwrapped, vae_of
from prism.errors import PrismError, quoted

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone

PARTS = {"denoiser": "denoiser", "vae": "VAE"}  # parts in a fingerprint, and their names in messages
ABSENT = "absent"
CHANNELS = ("latent_channels", "z_dim", "latent_dim", "decoder_input_channels")  # of VAEs; the last two of sounds
# Fields of configurations whose meaning `needs` holds.
_NEEDED = frozenset(
    [
        *("num_layers", "in_channels", "out_channels", "in_visual_dim", "out_visual_dim", "patch_size", "patch_size_t"),
        *(*CHANNELS, "latents_mean", "latents_std", "scaling_factor", "shift_factor"),
        *("temporal_compression_ratio", "spatial_compression_ratio", "scale_factor_temporal", "scale_factor_spatial"),
    ]
)
_ROUNDING = 4e-3  # relative, of a number that was stored in bfloat16
_TRIES = 5000  # earlier configurations that a hash is compared with

# Fields of a fingerprint that differ between versions of diffusers for the same weights.
VERSIONED = ("denoiser_config", "vae_config", "settings")


def fingerprint(backbone: Backbone) -> dict[str, Any]:
    """See `Backbone.fingerprint`. The "weights" of a partial denoiser are None."""
    parts = _parts(backbone)
    sample = hashlib.sha256(weights_sample(parts["denoiser"]))
    of_parts: dict[str, Any] = {}
    for name, part in parts.items():
        of_parts[name] = class_name(part)
        of_parts[f"{name}_config"] = hashlib.sha256(config_text(part)).hexdigest()  # what earlier versions compare
    return {
        "pipeline": type(backbone.pipe).__name__,
        **of_parts,
        "weights": None if backbone.partial else sample.hexdigest(),
        "needs": {"denoiser": _needs_of_denoiser(backbone), "vae": _needs_of_vae(backbone)},
        "settings": {name: _settings(part) for name, part in parts.items()},
    }


def fits(
    saved: Mapping[str, Any], backbone: Backbone, parts: Sequence[str] = ("denoiser", "vae")
) -> tuple[list[tuple[str, str]], list[str]]:
    """Compare a saved fingerprint with a backbone.

    Args:
        saved: from `fingerprint`, also of an earlier version; parts that it does not name are not compared.
        backbone: the one to be used in place of the saved one.
        parts: "denoiser" and "vae", or one of them (latents need the VAE alone).

    Returns:
        The refusals, as (saved, present) in words, and the warnings, as clauses that follow "was made with".
    """
    present, saved = backbone.fingerprint(), _table(saved)
    refusals: list[tuple[str, str]] = []
    warnings: list[str] = []
    for part in parts:
        if saved.get(part) is None:
            continue
        was, current = saved[part], present[part]
        needs = _table(saved.get("needs")).get(part)
        if was != current:
            refusals.append((f"{PARTS[part]} {quoted(was, 80)}", f"{current}"))
        elif needs is None:
            changed = _changed_since(_parts(backbone)[part], saved.get(f"{part}_config"))
            vital = [name for name in changed or () if name in _NEEDED]
            if changed is None and part == "vae":  # only its configuration says what its latents mean
                hashes = (str(saved.get(f"{part}_config"))[:8], present[f"{part}_config"][:8])
                refusals.append((f"VAE {was} (configuration {hashes[0]})", f"{current} (configuration {hashes[1]})"))
            elif changed is None:
                warnings.append(f"another configuration of the {PARTS[part]}, of which only a hash was kept")
            elif vital:
                refusals.append(_refusal(part, was, vital[0], *changed[vital[0]]))
            else:
                warnings += _clause(part, changed)
        else:
            needs = _table(needs)
            other = [name for name, value in needs.items() if not _same(value, present["needs"][part].get(name, value))]
            refusals += [_refusal(part, was, name, needs[name], present["needs"][part][name]) for name in other[:1]]
            before, now = _table(_table(saved.get("settings")).get(part)), present["settings"][part]
            names = [name for name in {**before, **now} if before.get(name, ABSENT) != now.get(name, ABSENT)]
            warnings += _clause(part, {name: (before.get(name, ABSENT), now.get(name, ABSENT)) for name in names})
    if "denoiser" in parts and saved.get("reads") != present.get("reads"):
        was, current = (each.get("reads") for each in (saved, present))
        if isinstance(was, str) and current is not None:
            refusals.append((f"denoiser {was!r} of two", f"{current!r}; make it with Backbone(pipe, reads={was!r})"))
        else:
            forms = [f"denoiser {one!r} of two" if isinstance(one, str) else "only denoiser" for one in (was, current)]
            refusals.append((f"{forms[0]} of its pipeline", f"the {forms[1]}"))
    if "denoiser" in parts and present["weights"] is not None and saved.get("weights") != present["weights"]:
        warnings.append(f"other weights of this architecture{_state(backbone)}")
    return refusals, warnings


def class_name(part: Any) -> str:
    """The name of a part's class: of its base in diffusers, where it was subclassed to shard, quantise or extend it."""
    for kind in type(part).__mro__:
        if kind.__module__.startswith("diffusers.") and not kind.__name__.endswith("Mixin"):
            return kind.__name__
    names = [base.__name__ for base in type(part).__bases__]
    return names[1] if names[0] == "FSDPModule" and len(names) > 1 else type(part).__name__  # by fully_shard


def weights_sample(module: nn.Module) -> bytes:
    """The name and the first 16 numbers of each weight."""
    return b"".join(
        name.encode() + part.flatten()[:16].float().cpu().numpy().tobytes()
        for name, value in sorted(weights(module).items())
        for part in _plain(value)
    )


def config_text(part: Any) -> bytes:
    """The configuration of a part of diffusers as JSON; for other parts, names and shapes of their parameters.

    Configurations of other libraries are not used, as they hold what does not matter, such as a version.
    """
    return _text(_public(part))


def config_texts(part: Any) -> Iterator[tuple[dict[str, tuple[Any, Any]], bytes]]:
    """Variants of `config_text` by other versions of diffusers or ways of loading, the likeliest first.

    A variant lacks settings that are at their default or that the class does not name; or it has one setting at its
    default, or another number of layers. With each come the settings that differ: name -> (then, now).
    """
    config = _public(part)
    yield {}, _text(config)
    if not isinstance(getattr(unwrapped(part), "config", None), Mapping):
        return
    defaults = _defaults(part)
    plain = {name: _json(value) for name, value in config.items()}
    silent = {name for name, value in plain.items() if value is None or value == defaults.get(name)}
    extra = [name for name in config if name in silent or name not in defaults]
    sizes = (combinations(extra, size) for size in range(1, len(extra) + 1))
    for dropped in islice(chain.from_iterable(sizes), _TRIES):
        changed = {name: (ABSENT, plain[name]) for name in dropped if name not in silent}
        yield changed, _text({name: value for name, value in config.items() if name not in dropped})
    for name in sorted(config.keys() & defaults.keys()):
        if plain[name] != defaults[name]:
            yield {name: (defaults[name], plain[name])}, _text({**config, name: defaults[name]})
    if isinstance(depth := config.get("num_layers"), int):
        for layers in range(1, 129):
            yield {"num_layers": (layers, depth)}, _text({**config, "num_layers": layers})


def _table(value: Any) -> Mapping[str, Any]:
    """A mapping as it is, and anything else as an empty one: a saved fingerprint may hold anything."""
    return value if isinstance(value, Mapping) else {}


def _parts(backbone: Backbone) -> dict[str, Any]:
    return {"denoiser": unwrapped(backbone.denoiser), "vae": unwrapped(vae_of(backbone.pipe))}


def _needs_of_denoiser(backbone: Backbone) -> dict[str, Any]:
    config, widths = backbone.config, list(backbone.widths)
    try:
        patch: list[int] | None = list(backbone.family.patches(config))
    except PrismError:  # a U-Net has none
        patch = None
    return {
        "blocks": backbone.num_blocks,
        "widths": widths[:1] if len(set(widths)) == 1 else widths,
        "in_channels": config.get("in_channels", config.get("in_visual_dim")),
        "out_channels": config.get("out_channels", config.get("out_visual_dim")),
        "patch": patch,
    }


def _needs_of_vae(backbone: Backbone) -> dict[str, Any]:
    pipe, vae = backbone.pipe, unwrapped(vae_of(backbone.pipe))
    config = config_of(vae)
    statistics = {}
    for name in ("latents_mean", "latents_std"):  # buffers of LTX-Video's VAE
        value = config[name] if name in config else getattr(vae, name, None)
        statistics[name] = value.double().flatten().tolist() if isinstance(value, Tensor) else _json(value)

    def first(*names: str) -> Any:
        return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), None)

    sigma_data = config_of(pipe.scheduler).get("sigma_data") if backbone.family.vae_factor == "sigma_data" else None
    return {
        "layout": backbone.family.layout,
        "latent_channels": next((config[name] for name in CHANNELS if name in config), None),
        **statistics,
        "scaling_factor": config.get("scaling_factor") or 1.0,
        "shift_factor": config.get("shift_factor") or 0.0,
        "sigma_data": sigma_data,
        "compression_of_time": first("vae_scale_factor_temporal", "vae_temporal_compression_ratio"),
        "compression_of_space": first("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"),
    }


def _settings(part: Any) -> dict[str, Any]:
    """A configuration as JSON, without the settings that `needs` holds and those at their class's defaults."""
    if not isinstance(getattr(part, "config", None), Mapping):
        return {}
    defaults = _defaults(part)
    config = {name: _json(value) for name, value in _public(part).items() if name not in _NEEDED}
    return {name: value for name, value in sorted(config.items()) if value != defaults.get(name)}


def _defaults(part: Any) -> dict[str, Any]:
    taken = inspect.signature(type(unwrapped(part)).__init__).parameters
    return {name: _json(p.default) for name, p in taken.items() if p.default is not p.empty}


def _public(part: Any) -> dict[str, Any]:
    part = unwrapped(part)
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        return {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: list(value.shape) for name, value in part.named_parameters()} if isinstance(part, nn.Module) else {}


def _text(config: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(config, sort_keys=True, default=str).encode()
    except Exception:  # not JSON: keys of several kinds, cycles, objects whose str() fails
        return json.dumps(_json(config), sort_keys=True).encode()


def _json(value: Any) -> Any:
    """A setting after a round trip through JSON: tuples and arrays become lists, objects with `to_dict` (a quantisation
    config) dictionaries, and anything else that JSON cannot hold a text."""

    def plain(obj: Any) -> Any:
        if hasattr(obj, "to_dict"):
            return obj.to_dict()
        return obj.tolist() if isinstance(obj, np.ndarray | np.generic) else str(obj)[:200]

    try:
        return json.loads(json.dumps(value, default=plain))
    except Exception:  # keys that are no texts, cycles, depth, a method that fails
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value) and value is not None:
            return {name: _as_text(each) for name, each in value.items()}
        return _as_text(value)


def _as_text(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else quoted(value, 200)


def _state(backbone: Backbone) -> str:
    """A clause with visible reasons for other weights (adapters, dtype), or ""."""
    modules = list(unwrapped(backbone.denoiser).modules())
    changes = ["with adapters"] if any(hasattr(module, "merged_adapters") for module in modules) else []
    if backbone.dtype != torch.float32:
        changes.append(f"in {backbone.dtype}".replace("torch.", ""))
    return f" (here it is {' and '.join(changes)})" if changes else ""


def _changed_since(part: Any, digest: Any) -> dict[str, tuple[Any, Any]] | None:
    """The settings that changed since a configuration was hashed, or None where no variant has this hash."""
    for changed, text in config_texts(part):
        if hashlib.sha256(text).hexdigest() == digest:
            return changed
    return None


def _same(one: Any, other: Any) -> bool:
    """True for equal values, and for numbers that differ by no more than rounding to bfloat16."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    numbers = all(isinstance(value, int | float) and abs(value) < 1e300 for value in (one, other))
    return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=1e-6) if numbers else one == other


def _refusal(part: str, kind: str, name: str, was: Any, now: Any) -> tuple[str, str]:
    """A setting that refuses a backbone, as (saved, present) in words."""
    name = name.replace("_", " ")
    return f"{PARTS[part]} {kind} ({name} {_brief(was)})", f"{kind} ({name} {_brief(now)})"


def _clause(part: str, changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A warning that names the first settings that differ, in a list; empty where none do."""
    clauses = [
        f"{quoted(name, 40)} was {_brief(was)} and is {_brief(now)}" for name, (was, now) in islice(changed.items(), 3)
    ]
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    return [f"another configuration of the {PARTS[part]} ({', '.join(clauses)}{more})"] if clauses else []


def _brief(value: Any) -> str:
    return quoted(value if isinstance(value, str) else str(value), 44)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights by name, also those that accelerate has offloaded and those packed in int8 layers."""
    module = unwrapped(module)
    by_name: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        hook = vars(part).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            elsewhere = getattr(each, "weights_map", None) or {}
            for name, value in part.named_parameters(recurse=False) if elsewhere else ():
                if value.is_meta and name in elsewhere and prefix + name in by_name:
                    by_name[prefix + name] = elsewhere[name]
        if "_packed_params" in (*vars(part), *part._modules) and callable(getattr(part, "weight", None)):
            packed = {f"{prefix}weight": part.weight(), f"{prefix}bias": part.bias()}  # torch's dynamic int8 layers
            by_name |= {name: value for name, value in packed.items() if value is not None}
    return by_name


def surroundings(pipe: Any) -> str:
    """A digest of what a conditioning depends on besides the call: the pipeline's parts except its denoisers, with
    their weights and adapters. It takes a few ms for the largest encoders."""
    states = []
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and not is_denoiser(name):
            states.append(weights_state(part))
        elif hasattr(part, "config"):  # the scheduler, which decides the form of timesteps
            states.append(f"{type(part).__name__}{dict(config_of(part))}")
    return hashlib.sha256(" ".join(states).encode()).hexdigest()


def weights_state(module: nn.Module) -> str:
    """Digest of a module's weights (their names, shapes and first and last numbers) and of its adapters' settings."""

    def ends(part: Tensor) -> list[Tensor]:
        flat = part.flatten()
        return [flat[:4].float(), flat[-4:].float()]

    names = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
    adapted = (layer for layer in modules_of(module) if hasattr(type(layer), "merged_adapters"))  # of peft
    return _digest(module, ends, "".join(repr([getattr(layer, name, None) for name in names]) for layer in adapted))


def weights_bits(module: nn.Module) -> str:
    """Digest of all numbers of a module's weights, summed on their device; a change of any one changes it."""

    def sums(part: Tensor) -> list[Tensor]:
        flat = part.contiguous().view(-1).view(torch.uint8)
        whole = len(flat) - len(flat) % 8 if part.storage_offset() * part.element_size() % 8 == 0 else 0
        words, rest = flat[:whole].view(torch.int64), flat[whole:]
        return [each.sum(0, keepdim=True) for each in (words, rest) if len(each)]  # wraps around, and is exact

    return _digest(module, sums)


def _digest(module: nn.Module, numbers: Callable[[Tensor], list[Tensor]], settings: str = "") -> str:
    """SHA-256 of the names, shapes and dtypes of a module's weights, of `numbers` (n,) of each, and of settings."""
    digest = hashlib.sha256()
    by_device: dict[torch.device, list[Tensor]] = {}
    for name, value in weights(module).items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        for part in _plain(value):
            by_device.setdefault(part.device, []).extend(numbers(part))
    for tensors in by_device.values():
        digest.update(torch.cat(tensors).cpu().numpy().tobytes())  # one transfer per device
    digest.update(settings.encode())
    return digest.hexdigest()


def _plain(value: Tensor) -> list[Tensor]:
    """The plain tensors of a weight: itself, its quantised integers, or a tensor subclass's parts; none on meta."""
    if is_traceable_wrapper_subclass(value):
        return [plain for name in value.__tensor_flatten__()[0] for plain in _plain(getattr(value, name))]
    if value.is_meta:
        return []
    return [value.detach().int_repr() if value.is_quantized else value.detach()]


def vae_hash(backbone: Backbone) -> str:
    """SHA-256 of the VAE's configuration and the first 16 numbers of each of its weights."""
    return next(vae_hashes(backbone))


def vae_hashes(backbone: Backbone) -> Iterator[str]:
    """The VAE's hash, then those that it had before diffusers added settings to its class."""
    vae = unwrapped(vae_of(backbone.pipe))
    sample = weights_sample(vae) if isinstance(vae, nn.Module) else b""
    for changed, text in islice(config_texts(vae), 500):
        if not changed:
            yield hashlib.sha256(text + sample).hexdigest()
