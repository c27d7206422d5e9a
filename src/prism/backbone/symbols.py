"""Data of the symbolic execution in `flow`: symbols in place of values, paths, and the state that is written."""

from __future__ import annotations

import inspect
import types
from typing import Any, NamedTuple

import torch
from torch import nn

MISSING = object()
PLAIN = {"item", "tolist", "size", "dim", "numel", "shape", "dtype", "device", "ndim", "len", "float", "int", "str"}
PLAIN |= {"bool", "repr", "format", "type", "isinstance", "hasattr", "id", "BUILD_STRING"}


class Unclear(Exception):
    """Code that cannot be followed."""


class Code(NamedTuple):
    """A function's code, its globals, and its cells by name: cell objects, or symbols where it was made in a call."""

    code: types.CodeType
    scope: dict[str, Any]
    cells: dict[str, Any]


class Value:
    """A symbol: an operation and its operands. Equal symbols are one object.

    kept: it depends on state that outlives the call. inputs: it depends on the call's arguments. concrete: the Python
    object that it stands for, or `MISSING`.
    """

    __slots__ = ("concrete", "inputs", "kept", "op", "parts")

    def __init__(self, op: Any, parts: tuple[Any, ...], kept: bool, inputs: bool, concrete: Any = MISSING):
        self.op, self.parts, self.kept, self.inputs, self.concrete = op, parts, kept, inputs, concrete


class Path:
    """An execution path so far: written values, branch conditions, changes, and whether a kept value forked it."""

    __slots__ = ("conditions", "forked", "memory", "trace")

    def __init__(self) -> None:
        self.memory: dict[Any, Value] = {}
        self.conditions: tuple[list[Any], ...] = ()  # [symbol, its truth value, still counts]
        self.trace: tuple[tuple[Value, ...], ...] = ()
        self.forked = False

    def copy(self) -> Path:
        path = Path()
        path.memory, path.conditions = dict(self.memory), self.conditions
        path.trace, path.forked = self.trace, self.forked
        return path

    def fork(self, symbol: Value, taken: bool) -> Path:
        """The path that goes on where the truth value of a symbol is `taken`."""
        path = self.copy()
        if symbol.kept:
            path.forked = True
        else:
            path.conditions = (*self.conditions, [symbol, taken, True])
        return path

    def join(self, other: Path) -> None:
        """Merge `other` into this path: conditions on which the two differ do not count any more."""
        others = {(id(symbol), taken) for symbol, taken, live in other.conditions if live}
        for condition in self.conditions:
            if (id(condition[0]), condition[1]) not in others:
                condition[2] = False

    def compatible(self, other: Path) -> bool:
        """True where the same arguments may lead to both paths."""
        answers: dict[int, set[bool]] = {}
        for symbol, taken, live in (*self.conditions, *other.conditions):
            if live:
                answers.setdefault(id(symbol), set()).add(taken)
        return all(len(each) == 1 for each in answers.values())


class Symbols:
    """All symbols of an execution, and the state written by all executions.

    Args:
        names_read: attributes that the denoiser's own code reads; setting one changes what it computes.
        weights: ids of the denoiser's weights.
    """

    missing = MISSING

    def __init__(self, names_read: set[str], weights: set[int]):
        self.names_read, self.weights = names_read, weights
        self.written: set[Any] = set()  # ids of containers, (id of an object or None, attribute), ("cell", id)
        self._alive: list[Any] = []
        self.begin()

    def begin(self) -> None:
        """Start an execution: forget all symbols, but not `written`."""
        self._symbols: dict[Any, Value] = {}
        self.kept, self.kept_input = self.new("kept", kept=True), self.new("kept input", kept=True, inputs=True)
        self.none, self.null = self.constant(None), self.new("null")
        self.steps, self.capped, self.any_kept = 0, False, False

    def new(self, op: Any, *parts: Any, kept: bool = False, inputs: bool = False, concrete: Any = MISSING) -> Value:
        key = (op, *(id(part) if isinstance(part, Value) else part for part in parts))
        if key not in self._symbols:
            self._symbols[key] = Value(op, parts, kept, inputs, concrete)
        return self._symbols[key]

    def constant(self, value: Any) -> Value:
        return self.new("constant", type(value), repr(value), concrete=value)

    def object(self, value: Any) -> Value:
        """The symbol of an object that exists before the call."""
        if isinstance(value, Value):
            return value
        if isinstance(value, str | bytes | int | float | bool | type(None)):
            return self.constant(value)
        self._alive.append(value)
        return self.new("object", id(value), kept=id(value) in self.written, concrete=value)

    def made(self, op: Any, *parts: Value) -> Value:
        """The symbol of a value computed from others."""
        inputs = any(part.inputs for part in parts) and not (isinstance(op, str) and op in PLAIN)
        if any(part.kept for part in parts):
            return self.kept_now(inputs)
        return self.new(op, *parts, inputs=inputs)

    def kept_now(self, inputs: bool = False) -> Value:
        """The symbol of a kept value; with `inputs`, one in the call's arguments, which a change of it changes."""
        self.any_kept = True
        return self.kept_input if inputs else self.kept

    def function(self, code: Code, defaults: Value | None) -> Value:
        """The symbol of a function that is defined in the call."""
        names = code.code.co_varnames[: code.code.co_argcount]
        values = defaults.parts if defaults is not None and defaults.op == "build" else ()
        bound_defaults = dict(zip(names[len(names) - len(values) :], values))
        value = self.new("function", *(part for pair in code.cells.items() for part in pair), id(code.code), *values)
        value.parts = (code, bound_defaults)
        return value

    def super(self, owner: Value, instance: Value) -> Value:
        return self.new("super", owner, instance)

    def changes(self, result: Value, path: Path) -> tuple[tuple[Value, ...], ...]:
        """Changes on a path that are visible after the call: to private containers only if the result holds them."""
        reached: set[int] = set()
        ahead: list[Any] = [result, *(p for each in path.trace if not _is_private(each[0]) for p in each)]
        while ahead:
            value = ahead.pop()
            if isinstance(value, Value) and id(value) not in reached:
                reached.add(id(value))
                ahead.extend(value.parts if value.op != "function" else value.parts[0].cells.values())
        shown = result.kept  # a kept result hides its operands, and is unclean anyway
        return tuple(each for each in path.trace if shown or not _is_private(each[0]) or id(each[0]) in reached)

    def change(self, path: Path, target: Value, *parts: Value) -> None:
        """Note that a path changes `target` in place."""
        if target.concrete is not MISSING:
            if id(target.concrete) in self.weights:
                path.trace = (*path.trace, (target, self.kept))
            self.written.add(id(target.concrete))
        elif target.inputs or not target.kept:
            path.trace = (*path.trace, (target, *parts))

    def attribute(self, target: Value, name: str, path: Path, depth: int) -> Value:
        """The symbol of `target.name`."""
        if (target, name) in path.memory:
            return path.memory[target, name]
        concrete = target.concrete
        if (target.kept and concrete is MISSING) or {(id(concrete), name), (None, name)} & self.written:
            return self.kept_now(target.inputs)
        if target.op == "super":
            attribute = lookup(target.parts[1].concrete, name, target.parts[0].concrete)
        elif concrete is MISSING:
            return self.made(name if name in PLAIN else ("attribute", name), target)
        elif isinstance(concrete, torch.Tensor) and name == "data":  # changing it changes the tensor
            return target
        elif isinstance(concrete, torch.Tensor) and not isinstance(concrete, nn.Module):
            return self.new("method", target, name)
        else:
            attribute = lookup(concrete, name)
        if isinstance(attribute, property):
            return self.property_of(attribute, target, name, path, depth)
        return self.new("method", target, name) if attribute is MISSING else self.object(attribute)

    def property_of(self, descriptor: property, target: Value, name: str, path: Path, depth: int) -> Value:
        raise NotImplementedError

    def set_attribute(self, target: Value, name: str, value: Value, path: Path) -> None:
        concrete = target.concrete
        path.memory[target, name] = value
        self.written.add((None if concrete is MISSING else id(concrete), name))
        may_be_denoiser = (
            concrete is MISSING or isinstance(concrete, nn.Module) or type(concrete).__module__.startswith("diffusers")
        )
        if may_be_denoiser and (
            name in self.names_read or (concrete is MISSING and not _is_private(target) and target.parts)
        ):
            path.trace = (*path.trace, (target, self.constant(name), value))

    def item(self, target: Value, key: Value, path: Path) -> Value:
        """The symbol of `target[key]`."""
        if (target, "[]", key) in path.memory:
            return path.memory[target, "[]", key]
        concrete = target.concrete
        if not target.kept and key.op == "constant" and type(concrete) in (dict, list, tuple):
            try:
                return self.object(concrete[key.concrete])
            except (LookupError, TypeError):
                pass
        return self.made("[]", target, key)


def _is_private(value: Value) -> bool:
    """True for a container that the code itself made, which nothing outside sees until it is passed on."""
    op = value.op
    return op in ("**kwargs", "*args", "build") or op in [("new", name) for name in ("dict", "list", "set")] + [
        ("call", "copy"), ("call", "clone")]  # fmt: skip


def lookup(owner: Any, name: str, after: Any = MISSING) -> Any:
    """An attribute looked up without running any code, bound to its owner; or `MISSING`."""
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, MISSING)
    if isinstance(owner, type):
        attribute = inspect.getattr_static(owner, name, MISSING)
        return attribute.__get__(None, owner) if isinstance(attribute, staticmethod | classmethod) else attribute
    if after is MISSING:
        attributes = getattr(owner, "__dict__", {})
        mappings = [attributes, *(attributes.get(each) or {} for each in ("_parameters", "_buffers", "_modules"))]
        for mapping in mappings if isinstance(owner, nn.Module) else mappings[:1]:
            if name in mapping:
                return mapping[name]
    mro = type(owner).__mro__
    for kind in mro if after is MISSING else mro[mro.index(after) + 1 :] if after in mro else ():
        if name in vars(kind):
            attribute = vars(kind)[name]
            if isinstance(attribute, types.FunctionType | staticmethod | classmethod):
                return attribute.__get__(owner, type(owner))
            return MISSING if hasattr(type(attribute), "__get__") and not isinstance(attribute, property) else attribute
    return MISSING
