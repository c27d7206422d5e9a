"""The check of stated shapes: what it lets pass, what it refuses, and that every public tensor has a stated shape."""

from __future__ import annotations

import inspect
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from tests import shapes

import prism.judge.objective
from prism.judge import QueryHead, pooling
from prism.judge.objective import preference_loss

TOY = '''
def product(a, b, scale=None, dims=(), text=None):
    """A product.

    Args:
        a: (B, L, 3) of any dtype.
        b: (..., L) float32, or None.
        scale: scalar or (B,) of factors.
        dims: names.
        text: (B, L_t, 3), or None.

    Returns:
        first: (B, num_dims) float32, or (B,) float32 of one.
        second: (B, L + L_t).
    """
    return first, second


def same(a, b):
    """As that. Arguments as of ``product``."""


def table(rows, tensors):
    """A table.

    Args:
        rows: of a table.
        tensors: "x" (rows, S, ...) of numbers, and with it {"t": (rows, S)}.
    """


class Box:
    num_sides = 6

    def turned(self, t):
        """Turned.

        Args:
            t: (2, num_sides) int64.
        """
'''


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("toy")
    exec(TOY, vars(module))
    monkeypatch.setitem(sys.modules, "toy", module)
    module.first, module.second = torch.zeros(2, 4), torch.zeros(2, 7)
    return module


A, B = torch.zeros(2, 7, 3, dtype=torch.half), torch.zeros(5, 1, 7)
DIMS = ("w", "x", "y", "z")


def test_calls_that_agree_pass(toy: ModuleType) -> None:
    with shapes.checked("toy") as names:
        assert names == ["toy.product", "toy.same", "toy.table", "toy.Box.turned"]
        toy.product(A, B, 1.5, DIMS)
        toy.product(A.numpy(), b=None, scale=np.ones(2), dims=DIMS)
        toy.product(A[:, :4], None, dims=DIMS, text=A[:, 4:])
        toy.first = torch.zeros(2)
        toy.product(A, B)
        toy.same(A, B)
        toy.table([1, 2], {"x": torch.zeros(2, 3, 9, 9), "t": torch.zeros(2, 3)})
        toy.table([1, 2], {"x": torch.zeros(2, 3)})
        toy.Box().turned(torch.zeros(2, 6, dtype=torch.long))
    toy.same(1, 2)  # the plain function is back


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((A[..., :2], B), r"product: a is \(B, L, 3\) .* \(2, 7, 2\) torch.float16"),
        ((A, B[..., :6]), r"b is \(\.\.\., L\) float32 .* \(5, 1, 6\) .* beside a \(2, 7, 3\)"),
        ((A, B.half()), r"b is \(\.\.\., L\) float32 .* torch.float16"),
        ((A, B, np.ones(3)), r"scale is scalar or \(B,\) .* \(3,\)"),
        ((A, B, 1.0, ("w",)), r"return 0 is \(B, num_dims\) float32 or \(B,\) float32 .* \(2, 4\)"),
        ((torch.zeros(2, 8, 3), None, 1.0, DIMS), r"return 1 is \(B, L \+ L_t\) .* \(2, 7\)"),
    ],
)
def test_a_call_that_disagrees_fails(toy: ModuleType, arguments: tuple, wrong: str) -> None:
    with shapes.checked("toy"), pytest.raises(shapes.ShapeError, match=wrong):
        toy.product(*arguments)


def test_dicts_and_attributes_and_other_functions_docstrings_count(toy: ModuleType) -> None:
    with shapes.checked("toy"):
        with pytest.raises(shapes.ShapeError, match=r"tensors\[x\] is \(rows, S, \.\.\.\) .* \(3, 3\)"):
            toy.table([1, 2], {"x": torch.zeros(3, 3)})
        with pytest.raises(shapes.ShapeError, match=r"tensors\[t\] is \(rows, S\) .* \(2, 4\)"):
            toy.table([1, 2], {"x": torch.zeros(2, 3, 9), "t": torch.zeros(2, 4)})
        with pytest.raises(shapes.ShapeError, match=r"t is \(2, num_sides\) int64 .* \(2, 5\)"):
            toy.Box().turned(torch.zeros(2, 5, dtype=torch.long))
        with pytest.raises(shapes.ShapeError, match="same: b is"):
            toy.same(A, B[..., :6])


def test_a_docstring_of_an_argument_that_is_gone_fails(toy: ModuleType) -> None:
    toy.table.__doc__ = toy.table.__doc__.replace("tensors:", "parts:")
    with pytest.raises(shapes.ShapeError, match=r"table states shapes of \{'parts'\}, which it does not take"):
        with shapes.checked("toy"):
            pass


def test_prisms_own_calls_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a function was imported to, and inside of other calls."""
    margins = torch.zeros(4, 2)
    with pytest.raises(shapes.ShapeError, match=r"preference_loss: labels is \(pairs, num_dimensions\)"):
        preference_loss(margins, torch.zeros(4, 1))  # broadcasts
    with pytest.raises(shapes.ShapeError, match="counts"):
        prism.judge.objective.preference_loss(margins, margins, counts=torch.ones(4, 2))
    head, visual = QueryHead(8, 4, num_heads=2), torch.zeros(2, 5, 8)
    with pytest.raises(shapes.ShapeError, match=r"read: mask is \(B, L_t\) bool .* \(1, 3\) torch.bool"):
        head(visual, None, torch.ones(1, 3, dtype=torch.bool))  # of another batch
    monkeypatch.setattr(pooling, "weights", lambda *_: torch.zeros(2, 2, 6))
    with pytest.raises(shapes.ShapeError, match=r"attention: return 0 is \(B, num_queries \* num_heads, L \+ L_t\)"):
        head.attention(visual)


def test_every_public_tensor_of_judge_and_preference_has_a_stated_shape() -> None:
    lacking = []
    for module in shapes._modules(("prism.judge", "prism.preference")):
        for owner in (module, *(each for _, each in inspect.getmembers(module, inspect.isclass))):
            if getattr(owner, "__module__", module.__name__) != module.__name__:
                continue
            for name, thing in vars(owner).items():
                function = inspect.unwrap(getattr(thing, "__func__", thing))
                inside = inspect.isfunction(function) and function.__module__ == module.__name__
                if inside and not name.startswith("_") and not owner.__name__.startswith("_"):
                    stated = shapes.declarations(function, owner)
                    lacking += [f"{owner.__name__}.{name}: {each}" for each in _tensors(function) if each not in stated]
    assert lacking == []


def _tensors(function: object) -> list[str]:
    types = {name: str(each.annotation) for name, each in inspect.signature(function).parameters.items()}
    types["return 0"] = str(inspect.signature(function).return_annotation)
    return [name for name, kind in types.items() if re.search("Tensor|ndarray", kind) and "Mapping" not in kind]
