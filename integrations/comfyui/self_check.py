"""A numeric self-check: ComfyUI's model class and diffusers' give the same hidden states with the same weights.

Both classes are built with two heads and two blocks of a kind, otherwise in the loaded model's own configuration.
ComfyUI's, random, gives its weights to diffusers' by name, a fixed input goes through both, and the tokens that a judge
would read are compared. So the check needs neither the model's memory nor its weights as numbers, which may be
quantised or offloaded, and it finds whatever another version of either library computes otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from prism.backbone import Tokens, taps
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.family import Family
from prism.errors import PrismError, quoted, reason

from .families import Example, Match
from .reading import KEY, Reader, Tapped

TOLERANCE = 2e-5  # relative; float32 rounding stays ten times below
_BEHIND = ("norm_out", "proj_out", "scale_shift_table")  # the last layer, which no judge reads
_NOT_CONFIG = ("dtype", "device", "operations", "disable_unet_model_creation")
_passed: dict[tuple[Any, ...], float] = {}


def check(match: Match, family: Family, kind: type[nn.Module], config: Mapping[str, Any]) -> float:
    """The relative difference of hidden states between two small models; once a class and configuration.

    kind: ComfyUI's class. config: the loaded model's `unet_config`.

    Raises:
        PrismError: where the difference is above `TOLERANCE`, or one of the two cannot be built or run so.
    """
    config = {name: value for name, value in config.items() if name not in _NOT_CONFIG}
    key = (kind, family.name, repr(sorted(config.items())))
    if key not in _passed:
        error = difference(match, family, kind, config)
        if not error <= TOLERANCE:  # NaN too
            raise PrismError(
                f"ComfyUI's {match.kind} and diffusers' {match.diffusers} give hidden states that differ by "
                f"{error:.2g} (at most {TOLERANCE:g} is rounding) with the same weights, so that the judge would read "
                "what it was not trained on; take versions of ComfyUI and diffusers that agree, or another model."
            )
        logging.info("PRISM: %s and diffusers' %s agree to %.1g.", match.kind, match.diffusers, error)
        _passed[key] = error
    return _passed[key]


def difference(match: Match, family: Family, kind: type[nn.Module], config: Mapping[str, Any]) -> float:
    """The largest relative difference of tokens after the last block of each list, and of the text's."""
    try:
        small = match.small(config)
        theirs = comfy_model(kind, small)
        ours = diffusers_model(match, small, theirs)
        example = match.example(small, family.name)
        numbers, count = [], 0
        for _, attribute in match.blocks:
            count += len(getattr(theirs, attribute))
            numbers.append(count)
        with torch.no_grad():
            one = read_comfy(match, family, theirs, example, numbers)
            other = read_diffusers(family, ours, example, numbers)
    except PrismError:
        raise
    except Exception as error:  # whatever another version of either library raises
        raise PrismError(
            f"ComfyUI's {match.kind} cannot be compared with diffusers' {match.diffusers} ({reason(error)}); take a "
            "plain model of this family, or versions of the two that fit together."
        ) from error
    return distance(one, other)


def distance(one: Tokens, other: Tokens) -> float:
    """The largest relative difference of what two reads found; infinity where they differ in form."""
    pairs = [(one.visual, other.visual), *((one.lower[n], other.lower.get(n)) for n in one.lower)]
    if other.text is not None or one.text is not None:
        pairs.append((one.text, other.text))
    masks = [
        None if each.text_mask is None or each.text_mask.all() else each.text_mask.tolist() for each in (one, other)
    ]
    if one.grid != other.grid or masks[0] != masks[1] or set(one.lower) != set(other.lower):
        return float("inf")
    errors = []
    for a, b in pairs:
        if a is None or b is None or a.shape != b.shape:
            return float("inf")
        errors.append(float((a.double() - b.double()).norm() / b.double().norm()))
    return float(torch.tensor(errors).max())


def comfy_model(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A model of ComfyUI's class in float32 on the CPU, with random weights of usual size."""
    from comfy import ops

    model = kind(**config, device="cpu", dtype=torch.float32, operations=ops.disable_weight_init)
    fill(model, torch.Generator().manual_seed(0))
    return model.eval()


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Give a model random weights that keep the size of what goes through it."""
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            numbers = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(numbers * value[0].numel() ** -0.5)
            else:
                value.copy_(0.1 * numbers + (1.0 if "norm" in name and not name.endswith("bias") else 0.0))


def diffusers_model(match: Match, config: Mapping[str, Any], comfy: nn.Module) -> nn.Module:
    """A model of diffusers' class that holds the weights of ComfyUI's `comfy`, which `config` describes.

    Raises PrismError where a weight in front of or in a block has no counterpart.
    """
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = getattr(diffusers, match.diffusers)(**match.config(config))
    wanted, mapped = model.state_dict(), match.state(comfy.state_dict())
    for name, value in wanted.items():
        if name.startswith(_BEHIND):
            mapped[name] = value
        elif name not in mapped or mapped[name].shape != value.shape:
            shape = tuple(mapped[name].shape) if name in mapped else "nothing"
            raise PrismError(
                f"ComfyUI's {match.kind} has {quoted(shape)} where diffusers' {match.diffusers} has {name} "
                f"{tuple(value.shape)}; this model is a variant that a judge cannot be put onto."
            )
    model.load_state_dict({name: mapped[name] for name in wanted})
    return model.eval()


def read_comfy(match: Match, family: Family, module: nn.Module, example: Example, numbers: list[int]) -> Tokens:
    """Tokens after some blocks of a bare ComfyUI model, read by the hooks that read a loaded one."""
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    def attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = attention_pytorch(*args, **kwargs)  # the user's may take no float32, or be a rougher one
        return answer

    reader = Reader(match, family, module, numbers)
    patches = {block: reader.patch(number) for number, block in reader.blocks.items()}
    options: dict[str, Any] = {"patches_replace": {"dit": patches}, "optimized_attention_override": attention}
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, reader.call, options)
    try:
        with reader.reading():
            module(example.latents.clone(), **example.comfy, transformer_options=options)
    except Tapped as tapped:
        return tapped.tokens
    raise PrismError(f"ComfyUI's {match.kind} calls no replaced blocks, so that a judge cannot read it.")


def read_diffusers(family: Family, model: nn.Module, example: Example, numbers: list[int]) -> Tokens:
    """Tokens after some blocks of a diffusers model, read as PRISM reads a pipeline's."""
    arguments = {**example.diffusers, "return_dict": False}
    call = DenoiserCall.of(model, (), arguments, family)
    blocks = family.block_list(model)
    return taps.read(model, call, {number: blocks[number - 1] for number in numbers}, True, None, True)[0]
