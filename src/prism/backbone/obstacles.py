"""What people do to a pipeline that a judge cannot read through, each said in a sentence."""

from __future__ import annotations

import copy
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prism.backbone.patches import check_patches, check_scheduler
from prism.backbone.protocol import unwrapped
from prism.checks import quoted, reason
from prism.errors import PrismError
from prism.memory import CALLERS, ran_out

# Parts of the names that diffusers gives to its hooks, which may be there without its `enable_...` methods.
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast")
_SLICES = ("cp_input", "cp_output")
_MEASURED_PROMPTS = 10_000  # whose length is remembered
_LIBRARIES = {"accelerate", "bitsandbytes", "diffusers", "optimum", "peft", "tokenizers", "torchao", "transformers"}
_BENEATH = {"numpy", "torch", *sys.stdlib_module_names} - {"__main__"}  # who broke is who called them
_MISFIT = re.compile("same dtype|should be the same|same device|scalar type|meta tensor|device meta|on device")


def check_denoisers(backbone: Any) -> None:
    """Raise PrismError where a denoiser was taken off the pipeline, or the one that is read was replaced by one with
    other blocks, since the backbone was made of it."""
    gone = [name for name, part in zip(backbone.denoiser_names, backbone.denoisers) if not isinstance(part, nn.Module)]
    if gone:
        raise PrismError(
            f"The pipeline's {gone[0]} was taken off, found {quoted(getattr(backbone.pipe, gone[0]), 40)}; put it back."
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


def check_whole(denoisers: tuple[Any, ...]) -> None:
    """Raise PrismError where a denoiser's blocks are skipped by a cache or a patch, or see a slice of the tokens."""
    for denoiser in denoisers:
        hooks = {
            name
            for module in denoiser.modules()
            if "_diffusers_hook" in vars(module)
            for name in vars(module)["_diffusers_hook"].hooks
        }
        if getattr(denoiser, "is_cache_enabled", False) or any(part in name for name in hooks for part in _CACHES):
            raise PrismError(
                "The denoiser's cache skips blocks that the head reads and goes by calls that are not made; "
                "call disable_cache() on it first."
            )
        parallel = getattr(denoiser, "_parallel_config", None)
        sliced = getattr(parallel, "context_parallel_config", None) is not None
        if sliced or any(name.startswith(_SLICES) for name in hooks):
            raise PrismError(
                "The denoiser runs with context parallelism, where each process sees a slice of the tokens and a head "
                "needs them all; load it without, and give each process candidates of its own."
            )
        check_patches(denoiser)


def check_noise(pipe: Any, counts_calls: bool) -> None:
    """Raise PrismError where the scheduler's steps draw noise that no candidate's seed decides.

    A copy of the scheduler makes a few steps on zeros. Those that take a generator are given one in a search, except
    where the pipeline steps copies of its scheduler (`counts_calls`). So does code of others in a method's place that
    goes by earlier calls.
    """
    check_scheduler(pipe.scheduler)
    try:
        scheduler = copy.deepcopy(pipe.scheduler)
        lends = "generator" in inspect.signature(scheduler.step).parameters and not counts_calls
        lent = {"generator": torch.Generator("cpu")} if lends else {}
        shifts = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(4, **shifts)
        sample = torch.zeros(1, 4, 2, 4, 4)
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            for t in scheduler.timesteps[:2]:
                scheduler.step(sample, t, sample, **lent)
            moved = not torch.equal(torch.get_rng_state(), before)
    except Exception:  # a scheduler of another form: its first step in the search tells
        return
    if moved:
        raise PrismError(global_noise(pipe))


def arguments_of_step(pipe: Any, signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a scheduler's step by name. Raises PrismError where it takes others than it is given."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        kinds = f"{type(pipe.scheduler).__name__} and {type(pipe).__name__}"
        raise PrismError(f"{kinds} do not go together ({reason(error)}); set another scheduler.") from error


def global_noise_states(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's global generators, of the host and of the latents' device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def global_noise(pipe: Any) -> str:
    """The refusal of a scheduler whose noise no seed gives."""
    return (
        f"The steps of {type(pipe.scheduler).__name__} in {type(pipe).__name__} draw noise from torch's global "
        "generator and cannot be given one, so that no seed gives a candidate again; take a scheduler whose step "
        'takes a generator, or the strategy "none" or "random".'
    )


def reproduction(prompts: bool, seed: int, noise: set[str]) -> str:
    """The line of Python that gives a seed's video again, or "" where none does.

    Args:
        prompts: whether the pipeline takes a prompt.
        noise: where the scheduler's steps drew noise, see `Interceptor`.
    """
    if "global" in noise:
        return ""
    prompt = "prompt, " if prompts else ""
    if "lent" in noise:
        return f'best_of_n(pipe, None, {prompt or "None, "}strategy="none", seeds=[{seed}], **call)'
    return f'pipe({prompt}generator=torch.Generator("cpu").manual_seed({seed}), **call)'


@contextmanager
def misfits_told(pipe: Any) -> Iterator[None]:
    """Where torch finds devices or dtypes that do not fit, and the pipeline's parts have several, they are named."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            raise
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        floats = {name: (p for p in part.parameters() if p.is_floating_point()) for name, part in parts.items()}
        firsts = {name: next(values, None) for name, values in floats.items()}
        places = {name: f"{p.device} {p.dtype}".replace("torch.", "") for name, p in firsts.items() if p is not None}
        if len(set(places.values())) < 2 or not _MISFIT.search(str(error)):
            raise
        told = ", ".join(f"{name} {place}" for name, place in places.items())
        raise PrismError(
            f"The parts of {type(pipe).__name__} do not fit together ({told}); bring them to one device and dtype. "
            f"torch says: {quoted(error, 160)}"
        ) from error


def is_foreign(error: BaseException) -> bool:
    """Whether a pipeline's own code broke: not PRISM's, nor a caller's own kind of exception, nor an allocator."""
    plain = isinstance(error, Exception) and type(error).__module__.split(".")[0] in ("builtins", "torch", "numpy")
    if not plain or ran_out(error):
        return False
    modules = list(_modules(error))
    return bool(modules) and not modules[-1].startswith("prism.")


def failure(pipe: Any, error: BaseException, step: int) -> PrismError | None:
    """What a pipeline's call that raised is told as, at a 1-based step, or 0 before it made any; None: as it is."""
    kind = type(pipe).__name__
    if not step:
        refused = isinstance(error, ValueError | TypeError) or is_foreign(error)
        return PrismError(f"{kind} refused the call: {reason(error)}.") if refused else None
    broke = is_pipelines(error, pipe) and not getattr(error, CALLERS, False)
    return PrismError(f"{kind} broke at step {step}: {reason(error)}.") if broke else None


@contextmanager
def callers_own() -> Iterator[None]:
    """What a caller's callback raises inside passes as it is, whatever of the pipeline's it called."""
    try:
        yield
    except Exception as error:
        setattr(error, CALLERS, True)
        raise


def is_pipelines(error: BaseException, pipe: Any) -> bool:
    """Whether a pipeline's code broke on the way, and no function of the caller's that it called, such as a hook."""
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
def breaks_told(part: Any, work: str) -> Iterator[None]:
    """Where a part of a pipeline breaks at its work, as one whose configuration was altered does, it is named."""
    try:
        yield
    except Exception as error:
        if not is_foreign(error):
            raise
        raise PrismError(
            f"{type(unwrapped(part)).__name__} broke while {work}: {reason(error)}; its "
            "configuration or weights may be damaged."
        ) from error


def warn_cut_off(prompts: Sequence[str], tokenizer: Any, limit: int, raisable: bool, measured: dict[str, None]) -> None:
    """Warn, once each, of prompts that have more tokens than the pipeline takes; `measured` are those seen before."""
    new = [prompt for prompt in prompts if prompt not in measured]
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
