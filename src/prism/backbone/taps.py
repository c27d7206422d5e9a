"""Taps: the outputs of blocks, read while a denoiser call runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone.conditioning import Tokens, noisy_name
from prism.backbone.family import Family
from prism.backbone.interceptor import StopForward, around_module, is_compiled
from prism.backbone.patches import patch_of
from prism.backbone.protocol import unwrapped
from prism.errors import PrismError


def read(
    denoiser: Any,
    family: Family,
    config: Mapping[str, Any],
    arguments: dict[str, Any],
    blocks: Mapping[int, nn.Module],
    stop: bool,
    forward: Callable[..., Any] | None,
    listens: bool,
) -> tuple[Tokens, Any]:
    """Tokens after `blocks` (by 1-based number, rising) of a denoiser call and, unless stopped, its output.

    Args:
        forward: the call to make where the denoiser itself is intercepted.
        listens: whether blocks are called as they stand; otherwise the denoiser was compiled as a whole, and runs
            uncompiled here.
    """
    visual: dict[int, Tensor] = {}
    grids: dict[int, Any] = {}
    noisy, last = arguments[noisy_name(arguments, family)], max(blocks)
    text: list[Tensor] = []
    widths = family.block_widths(denoiser)

    def tap(number: int, inner: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        grids[number] = family.grid(config, arguments, noisy, family.video(output))
        visual[number] = family.states(output, arguments, grids[number])
        if visual[number].shape[-1] != widths[number - 1]:
            raise PrismError(
                f"Block {number} gives tokens {visual[number].shape[-1]} wide, and widths of the family "
                f"{family.name!r} says {widths[number - 1]}; mend it, or token_form and video_output."
            )
        if stop and number == last:
            raise StopForward(last)
        return output

    def text_tap(inner: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if not isinstance(output, Tensor) or output.ndim < 3:
            shape = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise PrismError(
                f"The module {family.text_embedder!r}, text_embedder of the family {family.name!r}, gives {shape}; one "
                "that gives the text's tokens (B, Lt, D) is needed, or None."
            )
        text.append(output.flatten(1, -2))
        return output

    output = None
    with ExitStack() as stack:
        if not listens and hasattr(torch.compiler, "set_stance"):  # from torch 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for number, block in blocks.items():  # not by hooks: torch compiles those of a compiled block, a tap anew
            stack.enter_context(around_module(block, partial(tap, number)))
        if family.text_embedder is not None:
            stack.enter_context(around_module(unwrapped(denoiser).get_submodule(family.text_embedder), text_tap))
        with suppress(StopForward):
            output = (forward or denoiser)(**arguments)
    if stop and hasattr(denoiser, "_hf_hook"):  # a stopped call does not come to where offloaded weights are let go
        denoiser._hf_hook.post_forward(denoiser, None)
    if last not in visual and not is_compiled(denoiser) and listens:
        raise PrismError(
            f"The denoiser's call did not come to block {last}, which the head reads after: "
            f"{patch_of(denoiser) or 'something that was put onto it'} answered in its place; take that off first."
        )
    if last not in visual:
        raise PrismError(
            "The denoiser is compiled, and compiled code passes the judge's hooks by; compile its blocks alone, "
            "with compile_repeated_blocks(), or take torch 2.6 or later."
        )
    if family.text_embedder is not None and not text:
        raise PrismError(
            f"The module {family.text_embedder!r}, text_embedder of the family {family.name!r}, was not called before "
            f"block {last}; name the one that embeds the text, or None."
        )
    mask = family.text_mask(arguments) if text else None
    return Tokens(visual.pop(last), grids[last], text[-1] if text else None, mask, visual, last), output
