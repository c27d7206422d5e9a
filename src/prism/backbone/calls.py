"""Stock calls of several rows: what a pipeline does not repeat by itself, and what it does to latents in the end."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prism.backbone.arguments import embedded_rows
from prism.backbone.conditioning import Conditioning, is_single, noisy_name
from prism.backbone.family import Family
from prism.backbone.protocol import tensor_of
from prism.checks import quoted
from prism.errors import PrismError

# Arguments with a row per prompt: prompt_2, prompt_embeds, prompt_embeds_mask, negative_pooled_prompt_embeds, ...
_OF_A_PROMPT = re.compile(r"(negative_|pooled_)*prompt(_\d|_embeds\w*|_attention_mask\w*|_mask\w*|_cu_seqlens)?$")

# Pictures of adapters beside the prompt, whose rows and lists mean something else in each pipeline, and which none
# repeats for a batch: a call that holds one is made a row at a time.
_OF_AN_ADAPTER = re.compile(r"(negative_)?ip_adapter_image(_embeds)?$")

# Call arguments that do not change what the denoiser is told of a prompt.
_IRRELEVANT = frozenset(
    [
        *("guidance_scale", "true_cfg_scale", "min_guidance_scale", "max_guidance_scale", "guidance_scale_2"),
        *("num_inference_steps", "timesteps", "sigmas", "output_type", "return_dict"),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator"),
    ]
)


def is_relevant(family: Family, name: str) -> bool:
    """Whether a call argument may change what the denoiser is told. An embedded guidance scale does."""
    if name == "guidance_scale" and family.guidance == "true_cfg_scale":
        return True
    return name not in _IRRELEVANT and not name.startswith("negative_")


def relevant(family: Family, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call arguments that may change what the denoiser is told; all of them beside an adapter's pictures, which
    hold rows for the guidance too."""
    shown = shows_adapters(call)
    return {name: value for name, value in call.items() if name != "generator" and (shown or is_relevant(family, name))}


def unguided(family: Family, call: Mapping[str, Any], taken: Container[str]) -> dict[str, float]:
    """The arguments, of those that are `taken`, that spare a call its unconditional rows."""
    names = () if shows_adapters(call) else (family.guidance, "min_guidance_scale")
    return {name: 1.0 for name in names if name in taken}


def shows_adapters(call: Mapping[str, Any]) -> bool:
    """Whether a call holds pictures of an adapter (IP-Adapter), which stand for one row."""
    return any(_OF_AN_ADAPTER.match(name) and value is not None for name, value in call.items())


def draws_conditions(family: Family, call: Mapping[str, Any]) -> bool:
    """See `Backbone.draws_conditions`."""
    plain = (str, int, float, bool, type(None))
    told = {name: value for name, value in call.items() if is_relevant(family, name) and "prompt" not in name}
    return any(not isinstance(value, plain) for value in told.values())


def batch_of(family: Family, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make one stock call of several rows: prompts, CPU generators, and once a row whatever `call`
    holds for one: the image, negative prompts, and prompts' embeddings with their masks and pooled vectors.

    Raises PrismError for an argument with some other number of rows than one.
    """
    n = len(prompts)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    found: dict[str, Any] = {"generator": generators if n > 1 else generators[0]}
    if family.prompts and not embedded_rows(call):
        found["prompt"] = prompts[0] if family.one_text else list(prompts)
    if family.images == "list":
        found |= {name: [call[name]] * n for name in ("image", "video") if is_single(name, call.get(name))}
    for name, value in call.items():
        if name.startswith("negative_prompt") and isinstance(value, str):
            found |= {name: [value] * n} if family.negatives == "list" else {}
        elif n > 1 and _OF_A_PROMPT.match(name) and isinstance(value, str | Tensor | list | tuple):
            found[name] = _repeated(name, [value] if isinstance(value, str) else value, n)
    return found


def _repeated(name: str, value: Any, n: int) -> Any:
    """One row, n times."""
    if name.endswith("cu_seqlens"):  # of Kandinsky 5: where texts that lie one after another begin, and the last ends
        if len(value) == 2:
            return value[-1] * torch.arange(n + 1, device=value.device, dtype=value.dtype)
    elif len(value) == 1:
        return value.repeat_interleave(n, 0) if isinstance(value, Tensor) else [value[0]] * n
    raise PrismError(f"{name} holds {len(value)} rows for a prompt's candidates; give one, which all of them share.")


def finished(pipe: Any, family: Family, config: Any, latents: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """See `Backbone.finished`; `config` is the denoiser's."""
    if family.given_back:
        rows = family.conditional(len(arguments[noisy_name(arguments, family)]), len(latents))
        shown = Conditioning.of(arguments, rows, family, config, type(pipe))
        if shown.given is not None and shown.kept is not None:
            latents = torch.where(shown.given, shown.kept.to(latents.dtype), latents)
    if family.after_loop and hasattr(pipe, family.after_loop):
        change = getattr(pipe, family.after_loop)
        try:
            latents = torch.cat([tensor_of(change(row[None])) for row in latents])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise PrismError(
                f"{type(pipe).__name__}.{family.after_loop}, after_loop of the family {family.name!r}, does not take "
                f"latents (1, ...) and give others: {type(error).__name__}: {quoted(error, 160)}."
            ) from error
    return latents
