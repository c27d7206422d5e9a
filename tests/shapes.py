"""The shapes that docstrings state, checked at each call: a docstring that says one thing and code that does another.

A declaration begins a line under Args or Returns, or the text below a dataclass's field:

    visual: (B, L, D_vis) tokens           (B, L + L_t) float32           scalar or (B,) in [0, 1000]

An axis has one size in a call, wherever it stands there; `...` stands for any axes. An axis that is named as an
argument of the call or an attribute of its object (`pairs`, `num_dimensions` of `dimensions`) has that one's length,
or its value. The axes of an argument that is None have the size 0 in a sum. Of a tuple each part has its line,
`mean: (B,) ...`; of a dict the text says `"states" (rows, S, ...)`. "Arguments as of ``f``" takes over those of another
function of the same class or module. A call that raises is not checked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import docstring_parser
import jaxtyping
import numpy as np

SHAPE = r"\(((?:(?:[\w+*]|\.{3})(?:[\w+* ])*(?:, ?|(?=\))))+)\)"
ONE = rf"(?:scalar|{SHAPE})(?: (?:float32|float64|int8|int64|bool)\b)?"
DECLARED = re.compile(rf"({ONE})((?:,? or {ONE})*)")
KEYED = re.compile(rf'"(\w+)":? ({ONE})')


class ShapeError(AssertionError):
    """A shape that is not what the docstring says."""


def declarations(thing: Any, owner: Any) -> dict[str, list[str]]:
    """The shapes, one or several to choose from, that a docstring states by argument; "return 0" ... for results.

    Those of a dict's values stand under "argument[key]". The owner is the class or module in which it stands.
    """
    stated: dict[str, list[str]] = {}
    if reference := re.search(r"Arguments as of ``(\w+)``", thing.__doc__ or ""):
        others = declarations(vars(owner)[reference[1]], owner)
        stated |= {name: others[name] for name in inspect.signature(thing).parameters if name in others}
    for part in docstring_parser.parse_from_object(thing, docstring_parser.DocstringStyle.GOOGLE).meta:
        text = part.description or ""
        if part.args[0] == "returns":
            lines = [": ".join([*part.args[1:], text])] if not part.args[1:] else f"{part.args[1]}: {text}".split("\n")
            lines = [re.sub(r"^\w+: (?=\(|scalar)", "", line) for line in lines if _begins(line)]
            stated |= {f"return {i}": _shapes(line) for i, line in enumerate(lines)}
        elif part.args[0] in ("param", "attribute"):
            name = part.args[1].lstrip("*")
            if shapes := _shapes(text):
                stated[name] = shapes
            stated |= {f"{name}[{key}]": [found[0]] for key, *found in KEYED.findall(text)}
    return {name: shapes for name, shapes in stated.items() if shapes}


def _begins(line: str) -> bool:
    return bool(DECLARED.match(re.sub(r"^\w+: ", "", line)))


def _shapes(text: str) -> list[str]:
    declared = DECLARED.match(text)
    return [match[0] for match in re.finditer(ONE, declared[0])] if declared else []


def check(function: Callable[..., Any], stated: Mapping[str, list[str]]) -> Callable[..., Any]:
    """The function, which checks its arguments and results by what its docstring states."""
    signature, axes = inspect.signature(function), {name: _axes(shapes) for name, shapes in stated.items()}
    unknown = {re.sub(r"\[.*", "", name) for name in stated if "return" not in name} - set(signature.parameters)
    if unknown:
        raise ShapeError(
            f"The docstring of {function.__qualname__} states shapes of {unknown}, which it does not take."
        )

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        call = signature.bind(*args, **kwargs).arguments
        values = {**call, **_results(result, stated)}
        values |= {f"{k}[{key}]": v for k, of in call.items() if isinstance(of, Mapping) for key, v in of.items()}
        with jaxtyping.jaxtyped("context"):
            _compare(function.__qualname__, stated, axes, values, call)
        return result

    return checked


def _results(result: Any, stated: Mapping[str, Any]) -> dict[str, Any]:
    parts = result if isinstance(result, tuple) and "return 1" in stated else (result,)
    return {f"return {i}": part for i, part in enumerate(parts)}


def _axes(shapes: list[str]) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(shapes)))


def _compare(
    where: str,
    stated: Mapping[str, list[str]],
    axes: Mapping[str, set[str]],
    values: Mapping[str, Any],
    call: Mapping[str, Any],
) -> None:
    present = [name for name in stated if values.get(name) is not None]
    arguments = [name for name in stated if "return" not in name]
    absent = set().union(*(axes[name] for name in arguments if name not in present))
    if absent:
        absent -= set().union(*(axes[name] for name in arguments if name in present))
    for name in present:
        value = values[name] if hasattr(values[name], "shape") else np.asarray(values[name])
        if not any(isinstance(value, _annotation(shape, call, absent)) for shape in stated[name]):
            others = ", ".join(f"{other} {_met(values[other])}" for other in present if other != name)
            raise ShapeError(
                f"{where}: {name} is {' or '.join(stated[name])} by the docstring, and {_met(value)} in this call"
                f"{f', beside {others}' if others else ''}."
            )


def _met(value: Any) -> str:
    shape = getattr(value, "shape", ())
    return f"{tuple(shape)} {getattr(value, 'dtype', type(value).__name__)}"


def _annotation(shape: str, call: Mapping[str, Any], absent: set[str]) -> Any:
    """The declared shape as a type of jaxtyping, with numbers for the axes whose size is known from elsewhere."""
    kind, parts = _parsed(shape)
    return _type(kind, "".join(_size(part, call, absent) if part.isidentifier() else part for part in parts))


@functools.cache
def _parsed(shape: str) -> tuple[str, list[str]]:
    """The kind of numbers of a declared shape, and its axes as jaxtyping writes them, in words and what is between."""
    inner, _, dtype = shape.strip("(").partition(")") if shape[0] == "(" else ("", "", shape.removeprefix("scalar"))
    axes = " ".join(axis.replace(" ", "") for axis in inner.split(","))
    return dtype.strip().capitalize() or "Shaped", re.split(r"(\b[A-Za-z_]\w*)", axes)


@functools.cache
def _type(kind: str, axes: str) -> Any:
    return getattr(jaxtyping, kind)[Any, axes]


def _size(axis: str, call: Mapping[str, Any], absent: set[str]) -> str:
    if axis in absent:
        return "0"
    for name in (axis, axis.removeprefix("num_")):
        value = call.get(name, getattr(call.get("self"), name, None))
        if isinstance(value, int) and name == axis:
            return str(value)
        if hasattr(value, "__len__"):
            return str(len(value))
    return axis


@contextmanager
def checked(*packages: str) -> Iterator[list[str]]:
    """Check all calls of the functions and methods of some packages meanwhile; the names of those that state shapes."""
    names: list[str] = []
    functions: dict[int, Any] = {}
    undo: list[Callable[[], None]] = []

    def replace(owner: Any, name: str, new: Any) -> None:
        undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        setattr(owner, name, new)

    for module in _modules(packages):
        for name, thing in list(vars(module).items()):
            if getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing) and (stated := declarations(thing, module)):
                functions[id(thing)] = check(thing, stated)
                names.append(f"{module.__name__}.{name}")
            elif inspect.isclass(thing):
                for method, new in _methods(thing):
                    replace(thing, method, new)
                    names.append(f"{module.__name__}.{name}.{method}")
    for module in list(sys.modules.values()):  # wherever a function was imported to, test modules too
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in functions:
                replace(module, name, functions[id(value)])
    try:
        yield names
    finally:
        for put_back in reversed(undo):
            put_back()


def _modules(packages: tuple[str, ...]) -> Iterator[Any]:
    for package in packages:
        module = importlib.import_module(package)
        yield module
        for each in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{package}."):
            yield importlib.import_module(each.name)


def _methods(thing: type) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(thing).items()):
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        stated = declarations(thing if name == "__init__" else function, thing) if inspect.isfunction(function) else {}
        if stated:
            new = check(function, stated)
            yield name, new if function is value else type(value)(new)
