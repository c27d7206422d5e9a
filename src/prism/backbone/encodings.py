"""Encodings of texts and images, which the stock calls of a search make by themselves, shared between them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prism.backbone.pipeline import vae_of
from prism.backbone.wrapping import around, around_module

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone


@contextmanager
def encoded_once(backbone: Backbone) -> Iterator[None]:
    """While open, each text and each conditioning image is encoded once, however many calls of a search encode it.
    Open a meter of the encoders' work before this, or it counts calls that are answered from here.
    """
    pipe, encodings = backbone.pipe, _Encodings()
    with ExitStack() as stack:
        for name, module in backbone.encoders.items():
            stack.enter_context(around_module(module, partial(encodings.once, name), reads=True))
        if hasattr(pipe, "encode_prompt"):
            stack.enter_context(around(pipe, "encode_prompt", encodings.prompt, reads=True))
        if hasattr(vae_of(pipe), "encode"):  # gives the posterior, which each call samples by itself
            stack.enter_context(around(vae_of(pipe), "encode", partial(encodings.once, "vae"), reads=True))
        yield


class _Encodings:
    """Outputs of encoders by their inputs."""

    def __init__(self) -> None:
        self.outputs: dict[Any, Any] = {}

    def once(self, name: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """An encoder's output, computed at the first call with these arguments and reused afterwards."""
        key = (name, tuple(map(_faithful, args)), tuple((k, _faithful(v)) for k, v in sorted(kwargs.items())))
        if key not in self.outputs:
            self.outputs[key] = inner(*args, **kwargs)
        return self.outputs[key]

    def prompt(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's embeddings. A text repeated for several candidates is encoded once, and its row repeated."""
        arguments = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
        rows = len(arguments["prompt"]) if isinstance(arguments.get("prompt"), list) else 0
        lists = {name: value for name, value in arguments.items() if isinstance(value, list) and len(value) == rows}
        repeated = all(_same(value) for value in lists.values())
        if not rows or not repeated or any(isinstance(value, Tensor) for value in arguments.values()):
            return inner(*args, **kwargs)
        arguments |= {name: value[:1] for name, value in lists.items()}
        if arguments.get("batch_size") == rows:
            arguments["batch_size"] = 1
        key = ("prompt", repr(sorted(arguments.items())))
        if key not in self.outputs:
            self.outputs[key] = inner(**arguments)
        one = self.outputs[key]
        rowed = isinstance(one, tuple) and all(v is None or (isinstance(v, Tensor) and len(v) == 1) for v in one)
        if not rowed:
            return inner(*args, **kwargs)  # not one row per text: leave it to the pipeline
        return tuple(None if value is None else value.expand(rows, *value.shape[1:]) for value in one)


def _same(values: list[Any]) -> bool:
    """True where all values are the same text or the same object."""
    return all(value is values[0] or (isinstance(value, str) and value == values[0]) for value in values)


def _faithful(value: Any) -> Any:
    """A hashable stand-in that is equal for equal arguments. Tensors laid out otherwise in memory differ, as encoders
    round them otherwise: a pipeline may encode one picture as two such tensors (FluxControlInpaintPipeline)."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), value.stride(), hashlib.sha256(plain.data).digest()
    return repr(value)
