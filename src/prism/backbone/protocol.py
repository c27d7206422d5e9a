"""What PRISM uses of a pipeline, and so what a backbone outside diffusers has to offer: any `nn.Module` as denoiser.

A diffusers pipeline offers all of it. Any other object does once it has the members of `Pipeline`; nothing has to be
inherited. Where diffusers and others say the same thing in different ways, the functions here read either.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from prism.errors import PrismError

if TYPE_CHECKING:
    from prism.backbone.family import Family

CALL = ("generator", "num_inference_steps", "output_type")  # what every call of a pipeline must take


class Scheduler(Protocol):
    """Steps the latents. Its attributes are put back after a call: state is assigned to them, not written into them."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Called once a step, after its denoiser calls, with whatever the loop gives it. Gives the next latents
        (B, ...): themselves, first in a tuple, or as `.prev_sample`."""


class VAE(Protocol):
    """Turns videos (B, 3, F, H, W) in [-1, 1] into latents (B, C, T, h, w) and back; an `nn.Module`, or not."""

    def encode(self, x: Tensor) -> Any:
        """The latents: themselves, or a posterior `.latent_dist` with a `.mode()`."""

    def decode(self, z: Tensor) -> Any:
        """The videos: themselves, first in a tuple, or as `.sample`."""


class Pipeline(Protocol):
    """What `Backbone`, and with it judges and `best_of_n`, use of a pipeline.

    Attributes:
        family: the row of facts of this denoiser (`prism.backbone.Family`): its lists of blocks, the names of its
            arguments, its clock, its form of guidance.
        components: the parts by name. Among them the denoiser, an `nn.Module` called `transformer` (a second one
            `transformer_2`) or `unet`, which is an attribute of that name as well; parts whose names begin with
            `text_encoder` are run once a text. Modules among them are in evaluation mode while PRISM calls.
        scheduler, vae: as above. Both are also looked up here, by these names, at every use.

    The denoiser is called as a module, `self.transformer(...)`, so that hooks run, with its arguments by name or by
    position, the timestep as a tensor, () or (B,). It gives a tensor (with `gives_tensor` in the family), a tuple that
    begins with it, or an object with `.sample`. Each block of the family's lists is called as a module too, in order
    and once a denoiser call, and gives the video's tokens (B, L, D_vis) in raster order t, h, w.

    Used where they are there, as diffusers pipelines have them: `config` (`boundary_ratio`, of two denoisers),
    `tokenizer` (with a call argument `max_sequence_length`: a longer prompt is warned of), `encode_prompt(prompt, ...)`
    giving a tuple of tensors (one row a prompt: candidates then share one encoding), `guider`, `_execution_device`,
    `maybe_free_model_hooks()`, `_progress_bar_config` (`{"disable": True}` while PRISM calls).
    """

    family: Family
    scheduler: Scheduler
    vae: VAE

    @property
    def components(self) -> Mapping[str, Any]: ...

    def __call__(self, prompt: Any, *, generator: Any, num_inference_steps: int, output_type: str) -> Any:
        """Sample; the first item of the result, `result[0]`, holds one video a prompt.

        Args:
            prompt: one text, or a list with one a row (where the family takes prompts).
            generator: a CPU generator, or a list with one a row: the only source of randomness. The first noise of a
                row is the same whatever the other rows and the number of steps.
            num_inference_steps: steps of the loop; has a default.
            output_type: "np" for videos (B, F, H, W, 3) in [0, 1], "latent" for what the loop ends with.

        Further arguments (height, num_frames, guidance_scale, ...) are those that users may give to `best_of_n` and
        the judge. Guidance is off at 1 or less of the argument that the family names; on, the unconditional rows come
        where the family says.
        """


def check(pipe: Any, family: Family) -> None:
    """Raise PrismError naming what an object lacks to be used as a pipeline."""
    kind = type(pipe).__name__
    for owner, name in (("", "components"), ("", "scheduler"), ("scheduler", "step"), ("", "vae"), ("vae", "decode")):
        if not hasattr(getattr(pipe, owner) if owner else pipe, name):
            member = f"{owner}.{name}" if owner else name
            raise PrismError(f"The pipeline {kind} lacks the member {member!r}; see prism.backbone.Pipeline.")
    if not callable(pipe):
        raise PrismError(f"The pipeline {kind} cannot be called; see prism.backbone.Pipeline.")
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in CALL + (("prompt",) if family.prompts else ()):
        if name not in taken:
            raise PrismError(
                f"The call of the pipeline {kind} lacks the argument {name!r}; see prism.backbone.Pipeline."
            )
    prompt = taken.get("prompt")
    if not family.prompts and prompt is not None and prompt.default is prompt.empty:
        raise PrismError(f"The call of the pipeline {kind} needs a prompt; say prompts=True in its family.")


def unwrapped(part: Any) -> Any:
    """The model inside whatever compiles (torch), adapts (peft), shards, replicates or quantises it as a whole."""
    while (inner := _inside(part)) is not None:
        part = inner
    return part


def _inside(part: Any) -> Any:
    held = getattr(part, "__dict__", {})
    children = held.get("_modules", {})
    if "base_model" in children and hasattr(part, "get_base_model"):  # of peft
        return part.get_base_model()
    if list(children) == ["module"]:  # DistributedDataParallel, DataParallel, DeepSpeed
        return children["module"]
    names = ("_orig_mod", "_fsdp_wrapped_module", "_wrapped")  # torch.compile, FSDP, optimum-quanto
    return next((held.get(name, children.get(name)) for name in names if name in held or name in children), None)


def config_of(part: Any) -> Mapping[str, Any]:
    """What a part says of its configuration: a mapping as in diffusers, an object with fields, or nothing."""
    config = getattr(unwrapped(part), "config", None)
    if config is None or isinstance(config, Mapping):
        return config or {}
    return config.to_dict() if hasattr(config, "to_dict") else vars(config)


def dtype_of(part: Any) -> torch.dtype:
    """Of a module: as it says itself, else its first parameter's."""
    found = getattr(part, "dtype", None)
    return found if isinstance(found, torch.dtype) else _first_parameter(part).dtype


def device_of(pipe: Any, denoiser: nn.Module) -> torch.device:
    """Where the pipeline runs: as it says itself, else where its denoiser lies."""
    found = getattr(pipe, "_execution_device", None)
    return _first_parameter(denoiser).device if found is None else found


def tensor_of(output: Any, name: str = "sample") -> Tensor:
    """The tensor that a part gives: itself, first in a tuple or list, or under `name`. Else a PrismError."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    tensor = output if isinstance(output, Tensor) else getattr(output, name, None)
    if not isinstance(tensor, Tensor):
        raise PrismError(f"A {type(output).__name__} was given where a tensor, or an output with .{name}, is needed.")
    return tensor


def _first_parameter(part: Any) -> Tensor:
    parameters = part.parameters() if isinstance(part, nn.Module) else ()
    return next(iter(parameters), torch.empty(0))
