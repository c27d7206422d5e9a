"""Tokens read in ComfyUI's own model calls, by what it documents alone: replaced blocks and wrappers with a key."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prism.backbone import Tokens
from prism.backbone.family import Family
from prism.errors import PrismError

from .families import Match

KEY = "prism"
Patch = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class Tapped(Exception):
    """The end of a model call at the last block that is read; `tokens` are those of its conditional rows."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self.tokens = tokens


class Reader:
    """Reads tokens after some blocks of a ComfyUI model, while `reading`; at other times its hooks let calls through.

    taps: the blocks' numbers, from 1.
    """

    def __init__(self, match: Match, family: Family, module: nn.Module, taps: Sequence[int]) -> None:
        self.match, self.family, self.taps = match, family, sorted(taps)
        self.depth = sum(len(getattr(module, attribute)) for _, attribute in match.blocks)
        self.blocks = {number: match.block(module, number) for number in self.taps}
        self._block_rows = 0  # whole numbers: a sum of fractions k/L would drift
        self.active = False
        self._grid = (0, 0, 0)
        self._text: Tensor | None = None
        self._mask: Tensor | None = None
        self._batch, self._chosen = 0, slice(None)
        self._visual: dict[int, Tensor] = {}

    @property
    def rows(self) -> float:
        """The rows that the model computed so far; one that was stopped after k of L blocks counts k/L."""
        return self._block_rows / self.depth

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While open, a model call ends at the last tap with `Tapped`."""
        self.active, self._visual = True, {}
        try:
            yield
        finally:
            self.active, self._visual, self._text, self._mask = False, {}, None, None

    def install(self, patcher: Any) -> None:
        """Put the hooks onto a clone of ComfyUI's model; patches that other nodes put onto the same blocks stay."""
        from comfy.patcher_extension import WrappersMP

        options = patcher.model_options.get("transformer_options", {})
        others = options.get("patches_replace", {}).get("dit", {})
        for number, (name, index) in self.blocks.items():
            patcher.set_model_patch_replace(self.patch(number, others.get((name, index))), "dit", name, index)
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.call)

    def patch(self, number: int, other: Patch | None = None) -> Patch:
        """The replacement of a block: the block itself, or another node's replacement of it, and a look at its output.

        number: the block's, from 1.
        """

        def replaced(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            output = extra["original_block"](args) if other is None else other(args, extra)
            if self.active and self._text is not None:
                self._visual[number] = self._tokens(number, output["img"])[self._chosen]
                if number == self.taps[-1]:
                    raise Tapped(self._gathered())
            return output

        return replaced

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapper of the model's call, which sees the latents, the text and which rows are conditional."""
        if not self.active:
            self._block_rows += self.depth * len(args[0] if args else kwargs["x"])
            return executor(*args, **kwargs)
        bound = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        named: dict[str, Any] = {**bound.pop("kwargs", {}), **bound}
        latents, context, module = named["x"], named["context"], executor.class_obj
        size = (1, *latents.shape[2:])[-3:]
        self._grid = tuple(math.ceil(extent / patch) for extent, patch in zip(size, self.match.patch))
        self._batch = len(latents)
        self._chosen = conditional(named.get("transformer_options") or {}, self._batch)
        self._text = self.match.embedded(module, context)
        self._mask = text_mask(self.family, context, named.get("attention_mask"))
        try:
            return executor(*args, **kwargs)
        except Tapped:
            self._block_rows += self._batch * self.taps[-1]
            raise

    def _tokens(self, number: int, states: Tensor) -> Tensor:
        """The video's tokens (B, L, D_vis) in a block's output."""
        assert self._text is not None
        cells, beside = math.prod(self._grid), 0
        if self.blocks[number][0] == "single_block":  # text and video in one stream
            beside = self._text.shape[1]
        if states.shape[1] != cells + beside or len(states) != self._batch:
            raise PrismError(
                f"Block {number} of ComfyUI's {self.match.kind} gives {states.shape[1]} tokens, where the video has "
                f"{' x '.join(map(str, self._grid))} and its text {beside} beside them; a reference picture, a control "
                "model or a context window is in the way, so take it off this model."
            )
        start = beside if self.match.text_first else 0
        return states[:, start : start + cells]

    def _gathered(self) -> Tokens:
        visual, last = dict(self._visual), self.taps[-1]
        missing = [number for number in self.taps if number not in visual]
        if missing or self._text is None:
            raise PrismError(
                f"The model's call passed block {missing[0]} by, which the judge reads after; take the node off that "
                "skips blocks."
            )
        text = None if self.family.text_embedder is None else self._text[self._chosen]
        mask = None if text is None or self._mask is None else self._mask[self._chosen]
        return Tokens(visual.pop(last), self._grid, text, mask, visual, last)


def conditional(options: Mapping[str, Any], batch: int) -> slice:
    """The rows of the first positive conditioning in a call of `batch` rows, by ComfyUI's `cond_or_uncond`."""
    groups = list(options.get("cond_or_uncond") or [0])
    size = batch // len(groups)
    start = groups.index(0) * size if 0 in groups else 0
    return slice(start, start + size)


def text_mask(family: Family, context: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B, Lt), True for a real token of the text, as PRISM's family tells padding; None where all rows count.

    mask: ComfyUI's attention_mask, of whole numbers (1 for a real token) or added to attention's logits.
    """
    if family.text_padding == "zeros":
        return context.ne(0).any(-1)
    if family.text_padding == "unknown" or mask is None:
        return None
    rows = mask.reshape(len(mask), -1)[:, -context.shape[1] :]
    return rows > -1 if rows.is_floating_point() else rows > 0
