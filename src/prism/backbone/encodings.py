"""Texts and conditioning images, encoded once however often a run asks for them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prism.backbone.wrapping import around, around_module

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone


@contextmanager
def encoded_once(backbone: Backbone) -> Iterator[None]:
    """While open, each text and each conditioning image is encoded once: candidates, captures, drafts and winners ask
    for the same. What counts the encoders' work is opened before this, and sees the calls that are made.
    """
    pipe, encodings = backbone.pipe, _Encodings()
    with ExitStack() as stack:
        for name, module in backbone.encoders.items():
            stack.enter_context(around_module(module, partial(encodings.once, name), reads=True))
        if hasattr(pipe, "encode_prompt"):
            stack.enter_context(around(pipe, "encode_prompt", encodings.prompt, reads=True))
        if hasattr(getattr(pipe, "vae", None), "encode"):  # the posterior; what a call samples of it is its own
            stack.enter_context(around(pipe.vae, "encode", partial(encodings.once, "vae"), reads=True))
        yield


class _Encodings:
    """Outputs of encoders by what they were computed from."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def once(self, name: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """An encoder's output, computed where it was not asked for before."""
        key = (name, tuple(map(_faithful, args)), tuple((k, _faithful(v)) for k, v in sorted(kwargs.items())))
        if key not in self.kept:
            self.kept[key] = inner(*args, **kwargs)
        return self.kept[key]

    def prompt(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's embeddings. Candidates repeat one text: it is encoded once, as one row, and repeated."""
        given = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
        rows = len(given["prompt"]) if isinstance(given.get("prompt"), list) else 0
        lists = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == rows}
        repeated = all(_same(value) for value in lists.values())
        if not rows or not repeated or any(isinstance(value, Tensor) for value in given.values()):
            return inner(*args, **kwargs)
        given |= {name: value[:1] for name, value in lists.items()}
        if given.get("batch_size") == rows:
            given["batch_size"] = 1
        key = ("prompt", repr(sorted(given.items())))
        if key not in self.kept:
            self.kept[key] = inner(**given)
        one = self.kept[key]
        if not all(value is None or (isinstance(value, Tensor) and len(value) == 1) for value in one):
            return inner(*args, **kwargs)  # not one row a text: leave it to the pipeline
        return tuple(None if value is None else value.expand(rows, *value.shape[1:]) for value in one)


def _same(values: list[Any]) -> bool:
    """True where all are one text, or one and the same object."""
    return all(value is values[0] or (isinstance(value, str) and value == values[0]) for value in values)


def _faithful(value: Any) -> Any:
    """A hashable stand-in that is equal for equal arguments."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), hashlib.sha256(plain.data).digest()
    return repr(value)
