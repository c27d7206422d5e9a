"""Small stand-ins for the parts of ComfyUI that the pack calls, by their documented signatures, for tests without it.

`install` puts them into `sys.modules`. The sampler knows guidance, wrappers and three solvers; the model lies beside.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from integrations.comfyui.tests.wan_stand_in import WanModel, add_wrapper_with_key, attention_pytorch, wrapped
from torch import Tensor

WRAPPERS = ("SAMPLER_SAMPLE", "PREDICT_NOISE", "CALC_COND_BATCH", "APPLY_MODEL", "DIFFUSION_MODEL", "OUTER_SAMPLE")
CONFIG = {
    **{"image_model": "wan2.1", "model_type": "t2v", "dim": 24, "out_dim": 16, "num_heads": 2, "ffn_dim": 32},
    **{"num_layers": 3, "patch_size": (1, 2, 2), "freq_dim": 64, "in_dim": 16, "text_dim": 32, "eps": 1e-6},
}

# -- what holds the model


class CONST:
    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        share = sigma.view(-1, *[1] * (noise.ndim - 1)) if sigma.ndim else sigma
        return share * noise + (1 - share) * latent_image


class ModelSampling(CONST):
    pass


class Wan21:
    """Latents, by the numbers of diffusers' VAE."""

    latent_channels, latent_dimensions, latent_rgb_factors = 16, 3, [[0.1, -0.1, 0.2]] * 16
    latent_rgb_factors_bias = (0.0, 0.1, -0.1)

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (mean, std))

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.mean) / self.std

    def process_out(self, latent: Tensor) -> Tensor:
        return latent * self.std + self.mean


@dataclass
class Patcher:
    """A model with what nodes put onto it."""

    objects: dict[str, Any]
    model_options: dict[str, Any] = field(default_factory=lambda: {"transformer_options": {}})
    wrappers: dict[str, Any] = field(default_factory=dict)

    def clone(self) -> Patcher:
        wrappers = {kind: {key: list(each) for key, each in keys.items()} for kind, keys in self.wrappers.items()}
        options = {"patches_replace": copy.copy(self.model_options["transformer_options"].get("patches_replace", {}))}
        options["patches_replace"] = {name: dict(each) for name, each in options["patches_replace"].items()}
        others = {**self.model_options["transformer_options"], **options}
        return Patcher(self.objects, {**self.model_options, "transformer_options": others}, wrappers)

    def get_model_object(self, name: str) -> Any:
        return self.objects[name]

    def set_model_patch_replace(self, patch: Any, name: str, block_name: str, number: int) -> None:
        options = self.model_options["transformer_options"].setdefault("patches_replace", {})
        options.setdefault(name, {})[(block_name, number)] = patch

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)


def patcher(mean: list[float], std: list[float], **config: Any) -> Patcher:
    """A model of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanModel(**{**CONFIG, **config})
    objects = {"diffusion_model": model, "model_sampling": ModelSampling(), "latent_format": Wan21(mean, std)}
    return Patcher({**objects, "model_config": types.SimpleNamespace(unet_config={**CONFIG, **config})})


# -- the sampler


class Guider:
    """Guidance: both passes in one batch, the unconditional rows first."""

    def __init__(self, patcher: Patcher, conds: list[Any], cfg: float, options: dict[str, Any]) -> None:
        self.model_patcher, self.conds, self.cfg, self.options = patcher, conds, cfg, options
        self.inner_model = types.SimpleNamespace(**patcher.objects)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any], seed: int) -> Any:
        return wrapped("PREDICT_NOISE", self.predict_noise, self, self.options, x, sigma, model_options, seed)

    def predict_noise(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any], seed: int) -> Tensor:
        conds = [self.conds[0], None if self.cfg == 1.0 else self.conds[1]]
        args = (self.inner_model, conds, x, sigma, model_options)
        cond, uncond = wrapped("CALC_COND_BATCH", calc_cond_batch, None, self.options, *args)
        guided = uncond + (cond - uncond) * self.cfg
        for function in model_options.get("sampler_post_cfg_function", []):
            guided = function({"denoised": guided, "uncond_denoised": uncond})
        return guided


def calc_cond_batch(model: Any, conds: list[Any], x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Any:
    kept = [index for index, cond in enumerate(conds) if cond is not None][::-1]
    options = {**model_options["transformer_options"], "cond_or_uncond": kept, "sigmas": sigma}
    text = torch.cat([conds[index][0][0] for index in kept])
    times = torch.cat([sigma * 1000] * len(kept))
    out = model.diffusion_model(torch.cat([x] * len(kept)), times, context=text, transformer_options=options)
    clean = dict(zip(kept, (x - part * sigma.view(-1, 1, 1, 1, 1) for part in out.chunk(len(kept)))))
    return [clean.get(index, torch.zeros_like(x)) for index in range(len(conds))]


def euler(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    for low, high in pairwise(sigmas):
        x = x + (x - model(x, low)) / low * (high - low)
    return x


def euler_ancestral(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for low, high in pairwise(sigmas):
        clean = model(x, low)
        x = (1 - high) * clean + high * torch.randn(x.shape, generator=generator)
    return x


def heun_with_memory(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """Two calls a step, and a direction that the step before left."""
    before = torch.zeros_like(x)
    for low, high in pairwise(sigmas):
        middle = (low + high) / 2
        slope = (x - model(x, low)) / low
        again = x + slope * (middle - low)
        slope = 0.9 * (again - model(again, middle)) / middle + 0.1 * before
        x, before = x + slope * (high - low), slope
    return x


SAMPLERS = {"euler": euler, "euler_ancestral": euler_ancestral, "heun_with_memory": heun_with_memory}


class KSampler:
    SAMPLERS, SCHEDULERS = list(SAMPLERS), ["simple"]


class Sampler:
    def __init__(self, name: str) -> None:
        self.function = SAMPLERS[name]

    def sample(
        self,
        guider: Guider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        options, seed = extra_args["model_options"], extra_args["seed"]
        return self.function(lambda x, sigma: guider(x, sigma.expand(len(x)), options, seed), x, sigmas, seed)


def sample_custom(
    model: Patcher,
    noise: Tensor,
    cfg: float,
    sampler: Sampler,
    sigmas: Tensor,
    positive: Any,
    negative: Any,
    latent_image: Tensor,
    noise_mask: Any = None,
    callback: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
) -> Tensor:
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "sample_sigmas": sigmas}
    model_options = {**model.model_options, "transformer_options": options}
    guider, scale = Guider(model, [positive, negative], cfg, options), model.objects["latent_format"]
    latent_image = scale.process_in(latent_image) if latent_image.count_nonzero() else latent_image
    extra = {"model_options": model_options, "seed": seed}
    args = (guider, sigmas, extra, callback, noise, latent_image, noise_mask, disable_pbar)
    with torch.no_grad():
        samples = wrapped("SAMPLER_SAMPLE", sampler.sample, sampler, options, *args)
    out: Tensor = scale.process_out(samples.float())
    return out


def sample(
    model: Patcher,
    noise: Tensor,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: Tensor,
    denoise: float = 1.0,
    disable_noise: bool = False,
    start_step: int | None = None,
    last_step: int | None = None,
    force_full_denoise: bool = False,
    noise_mask: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
) -> Tensor:
    sigmas = torch.linspace(denoise, 0.0, steps + 1)
    if last_step is not None and last_step < steps:
        sigmas = sigmas[: last_step + 1]
        sigmas = torch.cat([sigmas[:-1], torch.zeros(1)]) if force_full_denoise else sigmas
    args = (model, noise, cfg, Sampler(sampler_name), sigmas, positive, negative, latent_image, noise_mask)
    return sample_custom(*args, seed=seed)


def prepare_noise(latent_image: Tensor, seed: int, noise_inds: Any = None) -> Tensor:
    return torch.randn(latent_image.shape, generator=torch.Generator().manual_seed(seed))


def fix_empty_latent_channels(model: Patcher, latent_image: Tensor, downscale_ratio_spacial: Any = None) -> Tensor:
    return latent_image if downscale_ratio_spacial in (None, 8) else latent_image[..., ::2, ::2]


class ProgressBar:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def update(self, value: int) -> None:
        self.done += value
        assert self.done <= self.total


# -- nodes

_BASE = {"display_name", "optional", "tooltip", "lazy", "extra_dict"}
_WIDGET = _BASE | {"default", "socketless", "force_input"}
_NUMBER = _WIDGET | {"min", "max", "step", "display_mode"}
TYPES = {
    "Boolean": ("BOOLEAN", _WIDGET | {"label_on", "label_off"}),
    "Int": ("INT", _NUMBER | {"control_after_generate"}),
    "Float": ("FLOAT", _NUMBER | {"round"}),
    "String": ("STRING", _WIDGET | {"multiline", "placeholder", "dynamic_prompts"}),
    "Combo": ("COMBO", _WIDGET | {"options", "control_after_generate", "upload", "remote"}),
    **{name: (name.upper(), _BASE) for name in ("Model", "Conditioning", "Latent", "Vae", "Image")},
}


def io_type(io_name: str, allowed: set[str]) -> type:
    """A type of inputs and outputs; an input refuses what ComfyUI's does not take."""

    @dataclass(init=False)
    class Input:
        id: str
        io_type: str

        def __init__(self, id: str, **settings: Any) -> None:
            unknown = set(settings) - allowed
            if unknown:
                raise TypeError(f"{io_name} takes no {unknown}")
            self.id, self.io_type, self.settings = id, io_name, settings
            self.optional = settings.get("optional", False)

    @dataclass
    class Output:
        id: str | None = None
        display_name: str | None = None
        tooltip: str | None = None
        is_output_list: bool = False
        io_type: str = io_name

    return type(io_name, (), {"Input": Input, "Output": Output, "io_type": io_name})


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False
    is_experimental: bool = False


class ComfyNode:
    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        schema: Schema = cls.define_schema()  # type: ignore[attr-defined]
        names = [each.id for each in schema.inputs]
        assert len(set(names)) == len(names)
        assert names == list(inspect.signature(cls.execute).parameters)  # type: ignore[attr-defined]
        return schema


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyExtension:
    pass


@dataclass
class PreviewText:
    value: str


def install(models_dir: str) -> dict[str, types.ModuleType]:
    """Put the stand-ins into `sys.modules`; returns them by name."""
    types_of = {name: io_type(*each) for name, each in TYPES.items()}
    io = {**types_of, "Custom": lambda name: io_type(name, _BASE), "Schema": Schema, "ComfyNode": ComfyNode}
    patches = {name: name.lower() for name in WRAPPERS}
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.ops": {"disable_weight_init": object()},
        "comfy.utils": {"PROGRESS_BAR_ENABLED": False, "ProgressBar": ProgressBar},
        "comfy.samplers": {"KSampler": KSampler, "sampler_object": Sampler},
        "comfy.sample": {
            **{"sample": sample, "sample_custom": sample_custom, "prepare_noise": prepare_noise},
            "fix_empty_latent_channels": fix_empty_latent_channels,
        },
        "comfy.patcher_extension": {
            "WrappersMP": types.SimpleNamespace(**patches),
            "add_wrapper_with_key": add_wrapper_with_key,
        },
        **{name: {} for name in ("comfy.ldm", "comfy.ldm.modules", "comfy_api")},
        "comfy.ldm.modules.attention": {"attention_pytorch": attention_pytorch},
        "comfy_api.latest": {
            "io": types.SimpleNamespace(**io, NodeOutput=NodeOutput),
            "ui": types.SimpleNamespace(PreviewText=PreviewText),
            "ComfyExtension": ComfyExtension,
        },
        "folder_paths": {"models_dir": models_dir},
    }
    made = {}
    for name, values in contents.items():
        module = made[name] = types.ModuleType(name)
        vars(module).update(values)
        above, _, leaf = name.rpartition(".")
        if above:
            setattr(made[above], leaf, module)
    sys.modules.update(made)
    return made
