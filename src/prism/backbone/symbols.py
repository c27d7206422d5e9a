"""Symbols in the place of values, and what is written on the way: the alphabet in which `flow` follows code."""

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
    """A symbol: what it was made of. Equal symbols are one object."""

    __slots__ = ("concrete", "inputs", "kept", "op", "parts")

    def __init__(self, op: Any, parts: tuple[Any, ...], kept: bool, inputs: bool, concrete: Any = MISSING):
        self.op, self.parts, self.kept, self.inputs, self.concrete = op, parts, kept, inputs, concrete


class Way:
    """One way through the code so far: what was written on it, on which conditions it went, what it changed."""

    __slots__ = ("conditions", "memory", "parted", "trace")

    def __init__(self) -> None:
        self.memory: dict[Any, Value] = {}
        self.conditions: tuple[list[Any], ...] = ()  # [symbol, which way, still counts]
        self.trace: tuple[tuple[Value, ...], ...] = ()
        self.parted = False

    def copy(self) -> Way:
        way = Way()
        way.memory, way.conditions = dict(self.memory), self.conditions
        way.trace, way.parted = self.trace, self.parted
        return way

    def part(self, symbol: Value, taken: bool) -> Way:
        """The way on, where a symbol is true or not."""
        way = self.copy()
        if symbol.kept:
            way.parted = True
        else:
            way.conditions = (*self.conditions, [symbol, taken, True])
        return way

    def join(self, other: Way) -> None:
        """Go on for both: conditions on which the two differ do not count any more."""
        others = {(id(symbol), taken) for symbol, taken, live in other.conditions if live}
        for condition in self.conditions:
            if (id(condition[0]), condition[1]) not in others:
                condition[2] = False

    def compatible(self, other: Way) -> bool:
        """True where the same arguments may lead to both."""
        answers: dict[int, set[bool]] = {}
        for symbol, taken, live in (*self.conditions, *other.conditions):
            if live:
                answers.setdefault(id(symbol), set()).add(taken)
        return all(len(each) == 1 for each in answers.values())


class Symbols:
    """All symbols of one run, and what outlives it.

    Args:
        known: names that the denoiser's own code reads; setting one changes what it computes.
        weights: ids of the denoiser's weights.
    """

    missing = MISSING

    def __init__(self, known: set[str], weights: set[int]):
        self.known, self.weights = known, weights
        self.written: set[Any] = set()  # ids of containers, (id of an object or None, attribute), ("cell", id)
        self._alive: list[Any] = []
        self.begin()

    def begin(self) -> None:
        """Forget all but what was written."""
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
        """A symbol of something that is there before the call."""
        if isinstance(value, Value):
            return value
        if isinstance(value, str | bytes | int | float | bool | type(None)):
            return self.constant(value)
        self._alive.append(value)
        return self.new("object", id(value), kept=id(value) in self.written, concrete=value)

    def made(self, op: Any, *parts: Value) -> Value:
        """A symbol of what is computed from others."""
        inputs = any(part.inputs for part in parts) and not (isinstance(op, str) and op in PLAIN)
        if any(part.kept for part in parts):
            return self.kept_now(inputs)
        return self.new(op, *parts, inputs=inputs)

    def kept_now(self, inputs: bool = False) -> Value:
        """The symbol of what is kept; where it is of `inputs`, a change of it is one of the call's arguments."""
        self.any_kept = True
        return self.kept_input if inputs else self.kept

    def function(self, code: Code, defaults: Value | None) -> Value:
        """A function that is made in the call; its symbol is what it gives."""
        names = code.code.co_varnames[: code.code.co_argcount]
        values = defaults.parts if defaults is not None and defaults.op == "build" else ()
        known = dict(zip(names[len(names) - len(values) :], values))
        value = self.new("function", *(part for pair in code.cells.items() for part in pair), id(code.code), *values)
        value.parts = (code, known)
        return value

    def super(self, owner: Value, own: Value) -> Value:
        return self.new("super", owner, own)

    def changes(self, result: Value, way: Way) -> tuple[tuple[Value, ...], ...]:
        """What a way changed that is seen after the call: not its own containers, unless they are in the result."""
        reached: set[int] = set()
        ahead: list[Any] = [result, *(p for each in way.trace if not _own(each[0]) for p in each)]
        while ahead:
            value = ahead.pop()
            if isinstance(value, Value) and id(value) not in reached:
                reached.add(id(value))
                ahead.extend(value.parts if value.op != "function" else value.parts[0].cells.values())
        shown = result.kept  # what it was made of is not known any more, and it is unclean anyway
        return tuple(each for each in way.trace if shown or not _own(each[0]) or id(each[0]) in reached)

    def change(self, way: Way, target: Value, *parts: Value) -> None:
        """Note that a way changes `target` in place."""
        if target.concrete is not MISSING:
            if id(target.concrete) in self.weights:
                way.trace = (*way.trace, (target, self.kept))
            self.written.add(id(target.concrete))
        elif target.inputs or not target.kept:
            way.trace = (*way.trace, (target, *parts))

    def attribute(self, target: Value, name: str, way: Way, depth: int) -> Value:
        """What `target.name` is."""
        if (target, name) in way.memory:
            return way.memory[target, name]
        concrete = target.concrete
        if (target.kept and concrete is MISSING) or {(id(concrete), name), (None, name)} & self.written:
            return self.kept_now(target.inputs)
        if target.op == "super":
            found = lookup(target.parts[1].concrete, name, target.parts[0].concrete)
        elif concrete is MISSING:
            return self.made(name if name in PLAIN else ("attribute", name), target)
        elif isinstance(concrete, torch.Tensor) and name == "data":  # changes of it are the tensor's
            return target
        elif isinstance(concrete, torch.Tensor) and not isinstance(concrete, nn.Module):
            return self.new("method", target, name)
        else:
            found = lookup(concrete, name)
        if isinstance(found, property):
            return self.property_of(found, target, name, way, depth)
        return self.new("method", target, name) if found is MISSING else self.object(found)

    def property_of(self, found: property, target: Value, name: str, way: Way, depth: int) -> Value:
        raise NotImplementedError

    def set_attribute(self, target: Value, name: str, value: Value, way: Way) -> None:
        concrete = target.concrete
        way.memory[target, name] = value
        self.written.add((None if concrete is MISSING else id(concrete), name))
        own = (
            concrete is MISSING or isinstance(concrete, nn.Module) or type(concrete).__module__.startswith("diffusers")
        )
        if own and (name in self.known or (concrete is MISSING and not _own(target) and target.parts)):
            way.trace = (*way.trace, (target, self.constant(name), value))

    def item(self, target: Value, key: Value, way: Way) -> Value:
        """What `target[key]` is."""
        if (target, "[]", key) in way.memory:
            return way.memory[target, "[]", key]
        concrete = target.concrete
        if not target.kept and key.op == "constant" and type(concrete) in (dict, list, tuple):
            try:
                return self.object(concrete[key.concrete])
            except (LookupError, TypeError):
                pass
        return self.made("[]", target, key)


def _own(value: Value) -> bool:
    """True for a container that the code itself made, which nobody else sees before it is handed on."""
    op = value.op
    return op in ("**kwargs", "*args", "build") or op in [("new", name) for name in ("dict", "list", "set")] + [
        ("call", "copy"), ("call", "clone")]  # fmt: skip


def lookup(owner: Any, name: str, after: Any = MISSING) -> Any:
    """An attribute as it is found without any code being run, bound; or `MISSING`."""
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, MISSING)
    if isinstance(owner, type):
        found = inspect.getattr_static(owner, name, MISSING)
        return found.__get__(None, owner) if isinstance(found, staticmethod | classmethod) else found
    if after is MISSING:
        own = getattr(owner, "__dict__", {})
        places = [own, *(own.get(each) or {} for each in ("_parameters", "_buffers", "_modules"))]
        for place in places if isinstance(owner, nn.Module) else places[:1]:
            if name in place:
                return place[name]
    mro = type(owner).__mro__
    for kind in mro if after is MISSING else mro[mro.index(after) + 1 :] if after in mro else ():
        if name in vars(kind):
            found = vars(kind)[name]
            if isinstance(found, types.FunctionType | staticmethod | classmethod):
                return found.__get__(owner, type(owner))
            return MISSING if hasattr(type(found), "__get__") and not isinstance(found, property) else found
    return MISSING
