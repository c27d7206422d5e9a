"""Symbolic execution of foreign code: does its result depend on state that outlives a call?

Bytecode is run on symbols in place of values, along each of its paths. State that outlives a call (attributes, globals,
closures and containers that a function writes), iterators, clocks and random numbers are *kept*. Code is clean where no
kept value reaches what it returns or changes of its arguments, and where paths that fork on a kept value end alike: so
it may count, time, log and print. Code that cannot be followed is taken to be unclean.
"""

from __future__ import annotations

import builtins
import dis
import functools
import operator
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prism.backbone.bytecode import paths
from prism.backbone.symbols import MISSING, PLAIN, Code, Path, Symbols, Unclear, Value, lookup

_DEPTH = 12  # of nested calls
_PURE = {
    "builtins",
    "math",
    "cmath",
    "operator",
    "_operator",
    "functools",
    "itertools",
    "copy",
    "numpy",
    "einops",
    "re",
}
_PURE |= {"typing", "collections", "dataclasses", "inspect", "contextlib", "types", "string", "enum", "abc"}
_RANDOM = re.compile(
    r"rand|normal|uniform|bernoulli|multinomial|dropout|poisson|cauchy|exponential_|geometric_|seed|rng|gumbel|rrelu"
)
_NOT_PURE = {"id", "input", "open", "globals", "locals", "vars", "dir", "object"}
_SETS = {"setitem", "delitem"}  # of the module operator, besides its in-place operators
_IN_PLACE = {name for name in dir(operator) if name.startswith("__i") and hasattr(operator, f"__{name[3:]}")} - {
    "__index__",
    "__inv__",
    "__invert__",
}
_READERS = {"items", "keys", "values", "copy", "index", "count", "__len__", "__contains__", "__getitem__", "__iter__"}
# Methods that change their object: `_SILENT` return None, the others of `_MUTATORS` a value.
_SILENT = {"append", "extend", "insert", "update", "clear", "add", "discard", "remove", "sort", "reverse", "appendleft"}
_SILENT |= {"__setitem__", "__delitem__", "subtract"}
_MUTATORS = _SILENT | {"pop", "popitem", "setdefault", "popleft", "put"}
# Layers that draw random numbers or update statistics while they train.
_IMPURE_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)
_UNFOLLOWED = re.compile(r"_foreach_|batch_norm|instance_norm")  # change tensors in containers
_IMMUTABLE = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    tuple,
    frozenset,
    torch.dtype,
    torch.device,
    re.Pattern,
)


class Flow(Symbols):
    """Follows the calls of functions that are put onto one denoiser.

    Args:
        trusted: tells whether a function belongs to a package whose code keeps nothing.
        inside: gives the foreign functions that a call of a value reaches.
        names_read: attributes that the denoiser's own code reads; setting one changes what it computes.
        root: the denoiser; its modules' calls are checked one by one, so that a call of one is not followed.
    """

    def __init__(
        self,
        trusted: Callable[[types.FunctionType], bool],
        inside: Callable[[Any], Iterable[types.FunctionType]],
        names_read: set[str],
        root: nn.Module,
    ):
        weights = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        super().__init__(names_read, weights)
        self.trusted, self.inside = trusted, inside
        self.modules = {id(module) for module in root.modules()}

    def learn(self, calls: Sequence[tuple[Any, Any]]) -> None:
        """Collect in `written` the state that calls of all these (function, owner) write."""
        count = -1
        while len(self.written) > count:
            count = len(self.written)
            for function, owner in calls:
                self.unclean(function, owner)

    def only_looks(self, function: Any, owner: Any = MISSING) -> bool:
        """True where a call returns None and changes none of its arguments."""
        self.written.clear()
        ends = self._ends(function, owner)
        return ends is not None and all(result is self.none and not self.changes(result, path) for result, path in ends)

    def _ends(self, function: Any, owner: Any) -> list[tuple[Value, Path]] | None:
        """The result and path of each end of a call with unknown arguments; None where the code cannot be followed."""
        self.begin()
        star, named = self.new("*args", inputs=True), self.new("**kwargs", inputs=True)
        first = [] if owner is MISSING else [self.object(owner)]
        try:
            return self.call(self.object(function), first, {}, [star], [named], Path(), 0)
        except Exception:  # code that cannot be followed
            return None

    def unclean(self, function: Any, owner: Any = MISSING) -> bool:
        """True where a call's result, or a change it makes, may depend on the calls before it."""
        if (ends := self._ends(function, owner)) is None:
            return True
        outcomes = [(result, self.changes(result, path), path) for result, path in ends]
        if any(result.kept or any(part.kept for each in changes for part in each) for result, changes, _ in outcomes):
            return True
        if self.capped and self.any_kept:
            return True
        kinds: dict[Any, list[Path]] = {}
        for result, changes, path in outcomes:
            kinds.setdefault((result, changes), []).append(path)
        groups = list(kinds.values())
        pairs = ((a, b) for i, one in enumerate(groups) for other in groups[:i] for a in one for b in other)
        return any((a.forked or b.forked) and a.compatible(b) for a, b in pairs)

    # -- calls

    def call(
        self, callee: Value, args: list[Value], kwargs: dict[str, Value], star: list[Value], named: list[Value],
        path: Path, depth: int,
    ) -> list[tuple[Value, Path]]:  # fmt: skip
        """The result and path of each end of a call."""
        parts = [*args, *kwargs.values(), *star, *named]
        function: Any = callee.concrete
        if depth > _DEPTH:
            raise Unclear
        if callee.op == "function":
            inner: Code = callee.parts[0]
            local = _bound(self, inner.code, dict(callee.parts[1]), args, kwargs, star, named)
            return paths(self, inner, local, path, depth + 1)
        if "out" in kwargs and kwargs["out"] is not self.none:
            self.change(path, kwargs["out"], *parts)
        if callee.op == "method" or (callee.op[:1] == ("attribute",) if isinstance(callee.op, tuple) else False):
            name = callee.parts[1] if callee.op == "method" else callee.op[1]
            return [(self._method(callee.parts[0], name, args, kwargs, parts, path), path)]
        if function is MISSING:
            return [(self.made("call", callee, *parts), path)]
        while True:
            if isinstance(function, functools.partial):
                args = [*map(self.object, function.args), *args]
                kwargs = {**{name: self.object(value) for name, value in function.keywords.items()}, **kwargs}
                function = function.func
            elif isinstance(function, types.MethodType):
                args, function = [self.object(function.__self__), *args], function.__func__
            elif hasattr(function, "_torchdynamo_orig_callable"):
                function = function._torchdynamo_orig_callable
            else:
                break
        if isinstance(function, types.FunctionType) and not self.trusted(function):
            package = str(function.__globals__.get("__name__", "")).split(".")[0]
            if package in sys.stdlib_module_names - {"__main__"} or package in ("tqdm", "numpy"):
                silent = not gives(function)
                for each in parts:  # functions that the library may call back
                    self._called_back(each, path, depth)
                pure = package in _PURE and not _RANDOM.search(function.__name__)
                if not pure:
                    self.any_kept = True
                return [(self.none if silent else self.made("call", callee, *parts) if pure else self.kept, path)]
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
            local = _bound(self, function.__code__, defaults_of(function), args, kwargs, star, named)
            return paths(self, Code(function.__code__, function.__globals__, cells), local, path, depth + 1)
        if isinstance(function, nn.Module) and id(function) not in self.modules:
            if any(isinstance(each, _IMPURE_LAYERS) and each.training for each in function.modules()):
                return [(self.kept_now(), path)]
            forward: Any = vars(function).get("forward", type(function).forward)
            bound = forward if "forward" in vars(function) else types.MethodType(forward, function)
            return self.call(self.object(bound), args, kwargs, star, named, path, depth + 1)
        if isinstance(function, nn.Module):
            return [(self.made("call", callee, *parts), path)]
        if isinstance(function, types.FunctionType):  # of a trusted package; it may wrap foreign functions
            inside = [self.object(each) for each in self.inside(function)]
            inner_ends = [self.call(each, args, kwargs, star, named, path.copy(), depth + 1) for each in inside]
            results = [result for ends in inner_ends for result, _ in ends]
            path.trace = (*path.trace, *(each for ends in inner_ends for _, w in ends for each in w.trace))
            results += [returned for each in parts for returned in self._called_back(each, path, depth)]
            return [(self._library(function, callee, parts, results, path), path)]
        used = [each for each in parts if each.concrete is not MISSING and hasattr(type(each.concrete), "__next__")]
        if used and function is not print and isinstance(function, type | types.BuiltinFunctionType):
            self.change(path, used[0])  # an iterator from before the call
            return [(self.kept_now(), path)]
        if isinstance(function, type):
            results = [returned for each in parts for returned in self._called_back(each, path, depth)]
            pure = function.__module__.split(".")[0] in _PURE | {"torch", "diffusers"} or not _standard(function)
            if function is super:
                return [(self.super(*args), path)] if len(args) == 2 else [(self.kept_now(), path)]
            if any(each.kept for each in parts) and _changes_computation(function):
                path.trace = (*path.trace, (self.none, self.kept))
            if pure and function.__name__ != "count":
                op = function.__name__ if function.__name__ in PLAIN else ("new", function.__name__)
                return [(self.made(op, *parts, *results), path)]
            return [(self.kept_now(), path)]
        if isinstance(function, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            return [(self._builtin(function, callee, args, parts, path, depth), path)]
        special = lookup(function, "__call__")
        if isinstance(special, types.MethodType):
            if self.trusted(getattr(special, "__func__")):  # noqa: B009
                for inner_function in self.inside(function):
                    ends = self.call(self.object(inner_function), args, kwargs, star, named, path.copy(), depth + 1)
                    parts += [result for result, _ in ends]
                return [(self.made("call", callee, *parts), path)]
            return self.call(self.object(special), args, kwargs, star, named, path, depth + 1)
        if type(function).__module__.split(".")[0] == "torch":  # an operator
            return [(self._library(function, callee, parts, [], path), path)]
        return [(self.kept_now(), path)]

    def property_of(self, descriptor: property, target: Value, name: str, path: Path, depth: int) -> Value:
        if not isinstance(descriptor.fget, types.FunctionType) or self.trusted(descriptor.fget):
            return self.made(("attribute", name), target)
        ends = self.call(self.object(descriptor.fget), [target], {}, [], [], path.copy(), depth + 1)
        return self.made("property", *(result for result, _ in ends))

    def _library(self, function: Any, callee: Value, parts: list[Value], more: list[Value], path: Path) -> Value:
        """The result of a function of torch or another trusted package, from those of the functions inside it."""
        name = getattr(function, "__name__", "")
        if _UNFOLLOWED.match(name):
            raise Unclear
        if _RANDOM.search(name) and "manual_seed" not in name:
            return self.kept_now()
        if name.endswith("_") and not name.endswith("__") and parts:
            self.change(path, *parts)
        return self.made("call", callee, *parts, *more)

    def _called_back(self, value: Value, path: Path, depth: int) -> list[Value]:
        """The results of calling a foreign function that was passed as an argument; none for other values."""
        concrete, star = value.concrete, [self.new("item of a call", inputs=True)]
        foreign = isinstance(concrete, types.FunctionType | types.MethodType) and any(self.inside(concrete))
        if value.op != "function" and not foreign:
            return []
        ends = self.call(value, [], {}, star, star, path.copy(), depth + 1)
        path.trace = (*path.trace, *(each for _, other in ends for each in other.trace))
        return [result for result, _ in ends]

    def _builtin(
        self, function: Any, callee: Value, args: list[Value], parts: list[Value], path: Path, depth: int
    ) -> Value:
        name, owner = function.__name__, getattr(function, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType | type):
            return self._method(self.object(owner), name, args, {}, parts, path)
        if function in (builtins.exec, builtins.eval, builtins.compile):
            raise Unclear
        if function is print:
            return self.none
        if function is next and args and (args[0].concrete is not MISSING or args[0].kept):
            self.change(path, args[0])
            return self.kept_now()
        named = len(args) > 1 and args[1].op == "constant"
        if function in (getattr, hasattr) and named:
            attribute = self.attribute(args[0], args[1].concrete, path, depth)
            return self.made(name, attribute, *args[2:]) if function is hasattr or attribute.kept else attribute
        if function is setattr and len(args) > 2:
            self.set_attribute(args[0], args[1].concrete if named else "*", args[2], path)
            return self.none
        if args and getattr(operator, name, None) is function and (name in _SETS or f"__{name}__" in _IN_PLACE):
            self.change(path, *args)
        results = [result for each in parts for result in self._called_back(each, path, depth)]
        module = str(function.__module__ or getattr(owner, "__module__", None) or getattr(owner, "__name__", ""))
        if module.split(".")[0] in {"torch", "_VariableFunctionsClass"} or module.startswith("torch"):
            return self._library(function, callee, parts, results, path)
        kind = getattr(function, "__objclass__", None)
        if kind is not None and args:  # list.append(log, 1)
            return self._method(args[0], name, args[1:], {}, parts[1:], path)
        if (module.split(".")[0] not in _PURE and owner is not torch._C) or name in _NOT_PURE or _RANDOM.search(name):
            return self.kept_now()
        return self.made(name if name in PLAIN else "call", callee, *parts, *results)

    def _method(
        self, target: Value, name: str, args: list[Value], kwargs: dict[str, Value], parts: list[Value], path: Path
    ) -> Value:
        """The result of a method of a built-in type or an unknown object, by its name; notes what it changes."""
        concrete = target.concrete
        inplace = name.endswith("_") and not name.endswith("__")
        if concrete is MISSING or isinstance(concrete, torch.Tensor):
            if _RANDOM.search(name) and "manual_seed" not in name:
                self.change(path, target, self.kept)
                return self.kept_now(target.inputs)
            if inplace or name in _MUTATORS:
                self.change(path, target, *parts)
            if name in _SILENT:
                return self.none
            if name in ("get", "__getitem__", "pop") and len(args) == 1:
                return self.item(target, args[0], path)
            return self.made(name if name in PLAIN else ("call", name), target, *parts)
        if isinstance(concrete, _IMMUTABLE):
            return self.made(name if name in PLAIN else ("call", name), target, *parts)
        if isinstance(concrete, dict) and name in ("get", "__getitem__") and args and args[0].op == "constant":
            item = self.item(target, args[0], path)
            return self.made("get", item, *args) if item.op == "[]" else item
        if isinstance(concrete, dict | list | set) and name in _READERS:
            return self.made(("call", name), target, *parts)
        if isinstance(concrete, type) and concrete.__module__.split(".")[0] in _PURE | {"torch"}:
            return self.made(("call", name), target, *parts)
        self.written.add(id(concrete))
        if name in _SILENT or type(concrete).__module__ == "logging":
            return self.none
        return self.kept_now()


def gives(function: types.FunctionType) -> bool:
    """True where a function may return something other than None, judged by its instructions one by one."""
    previous, attribute = None, ""
    for each in dis.get_instructions(function.__code__):
        nothing = previous is None or (previous.opname == "LOAD_CONST" and previous.argval is None)
        silent = nothing or attribute in _SILENT  # such as a lambda that appends to a list
        if (each.opname == "RETURN_VALUE" and not silent) or each.opname in ("RETURN_GENERATOR", "YIELD_VALUE"):
            return True
        if each.opname == "RETURN_CONST" and each.argval is not None:
            return True
        if each.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            attribute = each.argval
        elif each.opname.startswith(("BUILD", "BINARY", "STORE")):
            attribute = ""
        previous = each
    return False


def _changes_computation(kind: type) -> bool:
    """True for a context manager of torch that changes what is computed inside it."""
    module = kind.__module__
    return module.startswith("torch") and hasattr(kind, "__enter__") and "profiler" not in module


def _standard(kind: type) -> bool:
    """True for a class of the standard library or with methods of its own (not generated), which may keep state."""
    functions = [each for each in vars(kind).values() if isinstance(each, types.FunctionType)]
    return kind.__module__.split(".")[0] in sys.stdlib_module_names - {"__main__"} or any(
        each.__code__.co_filename != "<string>" for each in functions
    )


def defaults_of(function: types.FunctionType) -> dict[str, Any]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    return {**dict(zip(names[len(names) - len(values) :], values)), **(function.__kwdefaults__ or {})}


def _flat(values: Iterable[Value]) -> Iterator[tuple[Value, bool]]:
    """Starred arguments of a call, one by one as far as they are known, each with True if it stands for several."""
    for value in values:
        if value.op == "build" and not value.kept:
            yield from ((part, False) for part in value.parts)
        elif value.op in ("extended", "as tuple"):
            yield from _flat(value.parts)
        else:
            yield value, True


def _bound(
    flow: Flow, code: types.CodeType, defaults: dict[str, Any], args: list[Value], kwargs: dict[str, Value],
    star: list[Value], named: list[Value],
) -> dict[str, Value]:  # fmt: skip
    """The symbols of a function's parameters in a call, by name."""
    made, every = flow.made, [*((each, False) for each in args), *_flat(star)]
    rest = [value for value, several in every if several]
    names = code.co_varnames[: code.co_argcount]
    local = {name: flow.object(value) for name, value in defaults.items()}
    for index, name in enumerate(names):
        if index < len(every) and not any(several for _, several in every[: index + 1]):
            local[name] = every[index][0]
        elif name in kwargs:
            local[name] = kwargs[name]
        elif (rest or named) and not (name in local and not any(v.inputs for v in rest + named)):
            before = [local[name]] if name in local and not code.co_flags & 0x1000 else []
            local[name] = made(("parameter", name), *rest, *named, *before)
    for name in code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]:
        if name in kwargs:
            local[name] = kwargs[name]
        elif named and name not in local:
            local[name] = made(("parameter", name), *named)
    index = code.co_argcount + code.co_kwonlyargcount
    if code.co_flags & 0x04:
        left = [value for value, _ in every[len(names) :]] or rest
        local[code.co_varnames[index]] = left[0] if len(left) == 1 and rest == left else made("build", *left)
        index += 1
    if code.co_flags & 0x08:
        left = [value for name, value in kwargs.items() if name not in names]
        rest_of_kwargs = named[0] if len(named) == 1 and not left else made("build", *left, *named)
        local[code.co_varnames[index]] = rest_of_kwargs
    return local
