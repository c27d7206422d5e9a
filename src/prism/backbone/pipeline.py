"""A pipeline as PRISM uses it: its contract, the reading of its parts, refused modifications, its failures."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from prism.backbone.patches import check_patches, modules_of
from prism.errors import PrismError, quoted, reason
from prism.team import CALLERS, ran_out

if TYPE_CHECKING:
    from prism.backbone.family import Family

CALL = ("generator", "num_inference_steps", "output_type")  # arguments that every pipeline's call must take


class Scheduler(Protocol):
    """The scheduler: it steps the latents. PRISM restores its attributes after a call, so that its state must be
    assigned to attributes and not written into the objects that they hold."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next latents (B, ...): themselves, first in a tuple, or as `.prev_sample`. Called once per step,
        after its denoiser calls, with whatever the loop passes."""


class VAE(Protocol):
    """The VAE: videos (B, 3, F, H, W) in [-1, 1] to latents (B, C, T, h, w) and back; it need not be an `nn.Module`."""

    def encode(self, x: Tensor) -> Any:
        """The latents: themselves, or a posterior `.latent_dist` with a `.mode()`."""

    def decode(self, z: Tensor) -> Any:
        """The videos: themselves, first in a tuple, or as `.sample`."""


class Pipeline(Protocol):
    """Everything that `Backbone`, and with it judges and `best_of_n`, uses of a pipeline.

    Attributes:
        family: the row of facts of this denoiser (`prism.backbone.Family`): its lists of blocks, the names of its
            arguments, its clock, its form of guidance.
        components: the parts by name. Among them the denoiser, an `nn.Module` called `transformer` (a second one
            `transformer_2`) or `unet`, which is an attribute of that name as well; parts whose names begin with
            `text_encoder` are run once per text. Modules among them are in evaluation mode while PRISM calls.
        scheduler, vae: as above. Both are also looked up here, by these names, at every use.

    The denoiser is called as a module, `self.transformer(...)`, so that hooks run, with its arguments by name or by
    position, the timestep as a tensor, () or (B,). It returns a tensor (with `returns_tensor` in the family), a tuple
    that begins with it, or an object with `.sample`. Each block of the family's lists is called as a module too, in
    order and once per denoiser call, and returns the video's tokens (B, L, D_vis) in raster order t, h, w.

    Optional, as diffusers pipelines have them: `config` (`boundary_ratio`, where there are two denoisers),
    `tokenizer` (with a call argument `max_sequence_length`: a longer prompt is warned of), `encode_prompt(prompt, ...)`
    returning a tuple of tensors (a row per prompt: candidates then share one encoding), `guider`, `_execution_device`,
    `maybe_free_model_hooks()`, `_progress_bar_config` (`{"disable": True}` while PRISM calls).
    """

    family: Family
    scheduler: Scheduler
    vae: VAE

    @property
    def components(self) -> Mapping[str, Any]: ...

    def __call__(self, prompt: Any, *, generator: Any, num_inference_steps: int, output_type: str) -> Any:
        """Sample; the first item of the result, `result[0]`, holds one video per prompt.

        Args:
            prompt: one text, or a list with one per row (where the family takes prompts).
            generator: a CPU generator, or a list with one per row: the only source of randomness. The first noise of a
                row is the same whatever the other rows and the number of steps.
            num_inference_steps: steps of the loop; has a default.
            output_type: "np" for videos (B, F, H, W, 3) in [0, 1], "latent" for what the loop ends with.

        Further arguments (height, num_frames, guidance_scale, ...) are those that users may give to `best_of_n` and
        the judge. Guidance is off at 1 or less of the argument that the family names; on, the unconditional rows come
        where the family says.
        """


def check(pipe: Any, family: Family) -> None:
    """Raise PrismError for the first member or argument that an object lacks to be used as a pipeline."""
    kind = type(pipe).__name__
    for owner, name in (("", "components"), ("", "scheduler"), ("scheduler", "step")):
        if not hasattr(getattr(pipe, owner) if owner else pipe, name):
            member = f"{owner}.{name}" if owner else name
            raise PrismError(f"The pipeline {kind} lacks the member {member!r}; see prism.backbone.Pipeline.")
    if not hasattr(pipe, "movq") and not hasattr(getattr(pipe, "vae", None), "decode"):
        member = "vae.decode" if hasattr(pipe, "vae") else "vae"
        raise PrismError(f"The pipeline {kind} lacks the member {member!r}; see prism.backbone.Pipeline.")
    if not callable(pipe):
        raise PrismError(f"The pipeline {kind} cannot be called; see prism.backbone.Pipeline.")
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in CALL + (("prompt",) if family.takes_prompts else ()):
        if name not in parameters:
            raise PrismError(
                f"The call of the pipeline {kind} lacks the argument {name!r}; see prism.backbone.Pipeline."
            )
    prompt = parameters.get("prompt")
    if not family.takes_prompts and prompt is not None and prompt.default is prompt.empty:
        raise PrismError(f"The call of the pipeline {kind} needs a prompt; say takes_prompts=True in its family.")


# -- parts of a pipeline, unwrapped


def unwrapped(part: Any) -> Any:
    """The model inside wrappers that compile it (torch), adapt it (peft), or shard, replicate or quantise it whole."""
    while (inner := _inside(part)) is not None:
        part = inner
    return part


def _inside(part: Any) -> Any:
    fields = getattr(part, "__dict__", {})
    children = fields.get("_modules", {})
    if "base_model" in children and hasattr(part, "get_base_model"):  # of peft
        return part.get_base_model()
    if list(children) == ["module"]:  # DistributedDataParallel, DataParallel, DeepSpeed
        return children["module"]
    names = ("_orig_mod", "_fsdp_wrapped_module", "_wrapped")  # torch.compile, FSDP, optimum-quanto
    return next((fields.get(name, children.get(name)) for name in names if name in fields or name in children), None)


def config_of(part: Any) -> Mapping[str, Any]:
    """The configuration of a part as a mapping: diffusers' own, an object's fields, or empty where there is none."""
    config = getattr(unwrapped(part), "config", None)
    if config is None or isinstance(config, Mapping):
        return config or {}
    fields: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return fields


def vae_of(pipe: Any) -> Any:
    """The pipeline's VAE: its `vae`, or the MoVQ that Kandinsky's early pipelines have in its place."""
    return pipe.vae if hasattr(pipe, "vae") else pipe.movq


def dtype_of(part: Any) -> torch.dtype:
    """The part's attribute `dtype`, or its first parameter's dtype."""
    dtype = getattr(part, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else _first_parameter(part).dtype


def device_of(pipe: Any, denoiser: nn.Module) -> torch.device:
    """The device that the pipeline runs on: its attribute `_execution_device`, or its denoiser's device.

    diffusers' own passes several times through all levels of all parts, and this is asked for at every read: where no
    part has a hook, and all are on one device, it is that device.
    """
    if getattr(type(pipe), "_execution_device", None) is DiffusionPipeline._execution_device:
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        devices, modules = {_first_parameter(part).device for part in parts}, chain(*map(modules_of, parts))
        if len(devices) == 1 and not any("_hf_hook" in vars(module) or hooks_of(module) for module in modules):
            return devices.pop()
    device = getattr(pipe, "_execution_device", None)
    return _first_parameter(denoiser).device if device is None else device


def tensor_of(output: Any, name: str = "sample") -> Tensor:
    """The tensor in a part's output: the output itself, the first of a tuple or list, or the attribute `name`.

    Raises PrismError where there is none."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    tensor = output if isinstance(output, Tensor | list) else getattr(output, name, None)
    if isinstance(tensor, list) and tensor and all(isinstance(row, Tensor) for row in tensor):
        tensor = torch.stack(tensor)  # a list of rows (Z-Image)
    if not isinstance(tensor, Tensor):
        raise PrismError(f"A {type(output).__name__} was given where a tensor, or an output with .{name}, is needed.")
    return tensor


def _first_parameter(part: Any) -> Tensor:
    parameters = part.parameters() if isinstance(part, nn.Module) else ()
    return next(iter(parameters), torch.empty(0))


def is_denoiser(name: str) -> bool:
    """Tell whether a pipeline's component of this name is a denoiser: transformer, transformer_2, unet."""
    return name.split("_")[0] in ("transformer", "unet")


# -- refused changes to a pipeline, and explained failures

# Parts of the names of diffusers' hooks, which may be set without its `enable_...` methods.
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast")
_SLICES = ("cp_input", "cp_output")
_MEASURED_PROMPTS = 10_000  # prompts whose length is remembered
_LIBRARIES = {"accelerate", "bitsandbytes", "diffusers", "optimum", "peft", "tokenizers", "torchao", "transformers"}
# An error raised in these is attributed to their caller.
_BENEATH = {"numpy", "torch", *sys.stdlib_module_names} - {"__main__"}
# The width that was given and the one that is taken, of matrix products, products with a norm's weights, layer norms.
_WIDTHS = re.compile(
    r"shapes cannot be multiplied \(\d+x(?P<a>\d+) and (?P<A>\d+)x|"
    r"size of tensor a \((?P<b>\d+)\) must match the size of tensor b \((?P<B>\d+)\)|"
    r"with shape \[\*, (?P<C>\d+)\], but got input of size\[[\d, ]*?(?P<c>\d+)\]"
)
_MISFIT = re.compile("same dtype|should be the same|same device|scalar type|meta tensor|device meta|on device")


def check_denoisers(backbone: Any) -> None:
    """Raise PrismError where a denoiser was removed from the pipeline after the backbone was made, or the one that is
    read was replaced by one with other blocks."""
    missing = [
        name for name, part in zip(backbone.denoiser_names, backbone.denoisers) if not isinstance(part, nn.Module)
    ]
    if missing:
        raise PrismError(
            f"The pipeline's {missing[0]} was taken off, found {quoted(getattr(backbone.pipe, missing[0]), 40)}; "
            "put it back."
        )
    try:
        widths = backbone.family.block_widths(backbone.denoiser)
    except Exception:  # a model of another family
        widths = []
    if widths != backbone.widths:
        has = f"{len(widths)} blocks of width {widths[0]}" if widths else "none of them"
        raise PrismError(
            f"The pipeline's {backbone.reads} was replaced: the judge was put onto one with {len(backbone.widths)} "
            f"blocks of width {backbone.widths[0]}, and this {type(unwrapped(backbone.denoiser)).__name__} has {has}; "
            "put a judge onto the pipeline as it is now."
        )


def cache_hooks(module: nn.Module) -> list[str]:
    """The names of the hooks of diffusers' caches on a module."""
    return [name for name in hooks_of(module) if any(part in name for part in _CACHES)]


def hooks_of(module: nn.Module) -> list[str]:
    """The names of diffusers' hooks on a module."""
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks)


def check_whole(denoisers: tuple[Any, ...]) -> None:
    """Raise PrismError where a denoiser's blocks are skipped by a cache or a patch, or see a slice of the tokens."""
    for denoiser in denoisers:
        modules = [module for module in modules_of(denoiser) if "_diffusers_hook" in vars(module)]
        if getattr(denoiser, "is_cache_enabled", False) or any(map(cache_hooks, modules)):
            raise PrismError(
                "The denoiser's cache skips blocks that the head reads and goes by calls that are not made; "
                "call disable_cache() on it first."
            )
        parallel = getattr(denoiser, "_parallel_config", None)
        sliced = getattr(parallel, "context_parallel_config", None) is not None
        if sliced or any(name.startswith(_SLICES) for module in modules for name in hooks_of(module)):
            raise PrismError(
                "The denoiser runs with context parallelism, where each process sees a slice of the tokens and a head "
                "needs them all; load it without, and give each process candidates of its own."
            )
        check_patches(denoiser)


@contextmanager
def explain_misfits(pipe: Any) -> Iterator[None]:
    """Raise PrismError naming the devices and dtypes of the parts, where torch fails because they differ."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            raise
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        floats = {name: (p for p in part.parameters() if p.is_floating_point()) for name, part in parts.items()}
        firsts = {name: next(values, None) for name, values in floats.items()}
        kinds = {name: f"{p.device} {p.dtype}".replace("torch.", "") for name, p in firsts.items() if p is not None}
        if len(set(kinds.values())) < 2 or not _MISFIT.search(str(error)):
            raise
        described = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise PrismError(
            f"The parts of {type(pipe).__name__} do not fit together ({described}); bring them to one device and "
            f"dtype. torch says: {quoted(error, 160)}"
        ) from error


def is_foreign(error: BaseException) -> bool:
    """Tell whether code outside PRISM failed, by an error of Python's, torch's or numpy's other than lack of memory."""
    plain = isinstance(error, Exception) and type(error).__module__.split(".")[0] in ("builtins", "torch", "numpy")
    if not plain or ran_out(error):
        return False
    modules = list(_modules(error))
    return bool(modules) and not modules[-1].startswith("prism.")


def failure(pipe: Any, error: BaseException, step: int, call: Mapping[str, Any]) -> PrismError | None:
    """The PrismError for an error of `pipe(**call)` at a 1-based step (0: before the first), or None for an error that
    is to be raised as it is."""
    kind, scheduler = type(pipe).__name__, type(pipe.scheduler)
    if (explained := _of_texts(kind, error, call)) is not None:
        return explained
    if isinstance(error, AttributeError) and isinstance(error.obj, scheduler) and is_foreign(error):
        return PrismError(
            f"{scheduler.__name__} and {kind} do not go together ({reason(error)}); set another scheduler."
        )
    if not step:
        refused = isinstance(error, ValueError | TypeError) or is_foreign(error)
        return PrismError(f"{kind} refused the call: {reason(error)}.") if refused else None
    broke = is_pipelines(error, pipe) and not getattr(error, CALLERS, False)
    return PrismError(f"{kind} broke at step {step}: {reason(error)}.") if broke else None


def _of_texts(kind: str, error: BaseException, given: Mapping[str, Any]) -> PrismError | None:
    """The PrismError where `kind` failed at the width of a text's embeddings among the arguments `given`, else None."""
    found = None if getattr(error, CALLERS, False) or not is_foreign(error) else _WIDTHS.search(str(error))
    if found is None:
        return None
    has, takes = (next(value for key in keys if (value := found[key])) for keys in ("abc", "ABC"))
    for name, value in given.items():
        of_text = re.search("prompt|text|encoder|pooled", name) and "image" not in name
        if of_text and isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == int(has):
            return PrismError(
                f"{kind} takes a text's embeddings of width {takes}, and {name} has {has}; give prompt_embeds as this "
                "pipeline's own encode_prompt makes them, or the text encoder that belongs to it."
            )
    return None


@contextmanager
def callers_own() -> Iterator[None]:
    """Mark errors of a caller's callback, so that they pass unchanged, even where it called the pipeline's code."""
    try:
        yield
    except Exception as error:
        setattr(error, CALLERS, True)
        raise


def is_pipelines(error: BaseException, pipe: Any) -> bool:
    """Tell whether the pipeline's code failed, and not a function of the caller's that it ran, such as a hook."""
    called = [module for module in _modules(error) if module.split(".")[0] not in _BENEATH]
    home = type(pipe).__module__
    return is_foreign(error) and bool(called) and (called[-1] == home or called[-1].split(".")[0] in _LIBRARIES)


def _modules(error: BaseException) -> Iterator[str]:
    """The names of the modules that an exception went through, innermost last."""
    trace = error.__traceback__
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next


@contextmanager
def explain_failures(part: Any, work: str, given: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Raise PrismError naming the part of a pipeline that fails, such as one whose configuration was altered.

    work: what it does, in a word that follows "while". given: its arguments, among which may be embeddings.
    """
    try:
        yield
    except Exception as error:
        if not is_foreign(error):
            raise
        if (explained := _of_texts(type(unwrapped(part)).__name__, error, given)) is not None:
            raise explained from error
        raise PrismError(
            f"{type(unwrapped(part)).__name__} broke while {work}: {reason(error)}; its "
            "configuration or weights may be damaged."
        ) from error


def warn_cut_off(prompts: Sequence[str], tokenizer: Any, limit: int, raisable: bool, measured: dict[str, None]) -> None:
    """Warn, once each, of prompts with more tokens than the pipeline takes; `measured` holds those seen before."""
    new = [prompt for prompt in prompts if prompt not in measured]
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, whose call begins with images
    for prompt, ids in zip(new, tokenizer(new).input_ids if new else ()):
        if len(ids) > limit:
            warnings.warn(
                f"The prompt {prompt[:60]!r} has {len(ids)} tokens and the pipeline takes {limit}; it is cut off "
                "there. Shorten it" + (", or raise max_sequence_length." if raisable else "."),
                stacklevel=4,
            )
    measured.update(dict.fromkeys(new))
    for old in list(measured)[:-_MEASURED_PROMPTS]:
        del measured[old]
