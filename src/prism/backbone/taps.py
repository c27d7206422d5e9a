"""Taps: read tokens after a block, from a whole denoiser call or from one that stops there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone import layout
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.patches import patch_of
from prism.backbone.pipeline import unwrapped
from prism.backbone.wrapping import StopForward, around_module, is_compiled
from prism.errors import PrismError


def read(
    denoiser: Any,
    call: DenoiserCall,
    blocks: Mapping[int, nn.Module],
    stop: bool,
    forward: Callable[..., Any] | None,
    listens: bool,
) -> tuple[Tokens, Any]:
    """Tokens after `blocks` (by 1-based number, rising) of a denoiser call and, unless stopped, its output.

    Args:
        forward: called in place of the denoiser, where the denoiser's own calls are intercepted.
        listens: False where the denoiser was compiled as a whole: its blocks cannot be tapped, and it runs uncompiled.

    Where the family's `read_arguments` are others than the call's, the tokens are those of a stopped pass of its own.
    """
    visual: dict[int, Tensor] = {}
    grids: dict[int, Any] = {}
    text: list[Tensor] = []
    family, last = call.family, max(blocks)
    alone = any(call.arguments.get(name) != value for name, value in family.read_arguments.items())
    widths = family.block_widths(denoiser)

    def tap(number: int, inner: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        visual[number], grids[number] = call.tokens(output)
        if visual[number].shape[-1] != widths[number - 1]:
            raise PrismError(
                f"Block {number} gives tokens {visual[number].shape[-1]} wide, and widths of the family "
                f"{family.name!r} says {widths[number - 1]}; mend it, or token_form and video_output."
            )
        if (stop or alone) and number == last:
            raise StopForward(last)
        return output

    def text_tap(inner: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if not isinstance(output, Tensor) or output.ndim < 3:
            if isinstance(given := call.arguments.get(family.text_argument), Tensor):
                layout.text_rows(given)  # refuses embeddings without an axis for tokens
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
        for number, block in blocks.items():  # a forward hook on a compiled block recompiles per tap
            stack.enter_context(around_module(block, partial(tap, number)))
        if family.text_embedder is not None:
            stack.enter_context(around_module(unwrapped(denoiser).get_submodule(family.text_embedder), text_tap))
        with suppress(StopForward):
            output = (forward or denoiser)(**{**call.arguments, **family.read_arguments})
    if alone and not stop:
        output = (forward or denoiser)(**call.arguments)
    if stop and hasattr(denoiser, "_hf_hook"):  # a stopped call skips the hook that offloads weights
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
    mask = call.text_mask if text else None
    return Tokens(visual.pop(last), grids[last], text[-1] if text else None, mask, visual, last), output


@dataclass(frozen=True)
class Tokens:
    """Hidden states after a block, in raster order t, h, w, with the backbone's own text tokens beside them.

    visual: (B, L, D_vis), L = T * H * W. grid: (T, H, W). text: (B, Lt, D_vis), or None where the family has none.
    text_mask: (B, Lt) bool, True for a real token, or None where all of them count.
    lower: where several blocks were tapped, tokens of those below the last by number, (B, L, D_vis) each.
    block: the last tapped block's number (1-based), or None where it is unknown: `visual` then stands for any block.
    """

    visual: Tensor
    grid: tuple[int, int, int]
    text: Tensor | None = None
    text_mask: Tensor | None = None
    lower: Mapping[int, Tensor] = field(default_factory=dict)
    block: int | None = None

    def __len__(self) -> int:
        return len(self.visual)

    def __repr__(self) -> str:
        rows, _, width = self.visual.shape
        text = "no text" if self.text is None else f"{self.text.shape[1]} of text"
        taps = f", {len(self.lower)} lower taps" if self.lower else ""
        return f"Tokens({rows} rows of {' x '.join(map(str, self.grid))} tokens {width} wide, {text}{taps})"

    def after(self, block: int) -> Tensor:
        """(B, L, D_vis) after one of the blocks that were tapped. Raises PrismError for any other block."""
        if block in self.lower:
            return self.lower[block]
        if self.block in (block, None):
            return self.visual
        tapped = ", ".join(map(str, [*sorted(self.lower), self.block]))
        raise PrismError(f"The tokens are those after block {tapped}, and not after {block}; tap that one as well.")

    def __getitem__(self, rows: Any) -> Tokens:
        text = None if self.text is None else self.text[rows]
        text_mask = None if self.text_mask is None else self.text_mask[rows]
        lower = {block: value[rows] for block, value in self.lower.items()}
        return Tokens(self.visual[rows], self.grid, text, text_mask, lower, self.block)

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Concatenate rows of tokens on one grid; shorter texts are padded and masked."""
        first = parts[0]
        lower = {block: torch.cat([part.lower[block] for part in parts]) for block in first.lower}
        texts = [part.text for part in parts if part.text is not None]
        masks = [
            text.new_ones(text.shape[:2], dtype=torch.bool) if part.text_mask is None else part.text_mask
            for part, text in zip(parts, texts)
        ]
        ragged = len({text.shape[1] for text in texts}) > 1
        keep_mask = ragged or first.text_mask is not None
        if ragged:
            longest = max(text.shape[1] for text in texts)
            masks = [torch.nn.functional.pad(mask, (0, longest - mask.shape[1])) for mask in masks]
            texts = [torch.nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
        return Tokens(
            torch.cat([part.visual for part in parts]),
            first.grid,
            torch.cat(texts) if texts else None,
            torch.cat(masks) if texts and keep_mask else None,
            lower,
            first.block,
        )
