"""Code of others in the place of a denoiser's own: harmless wrappers go on working, caches are refused.

A wrapper that calls what it wraps on every way through it may log and count as it likes. What can answer by itself, and
reads back what it wrote in an earlier call, gives outputs that depend on the calls before: TeaCache and its like. So
does what runs other blocks in the place of the denoiser's (cache-dit, ParaAttention).
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from prism.errors import PrismError

# Packages whose wrappers and layers keep a call's output a function of its arguments (their caches are told by
# `obstacles.check_whole`), and those that cache or slice.
_TRUSTED = {"accelerate", "bitsandbytes", "builtins", "contextlib", "deepspeed", "diffusers", "functools", "optimum"}
_TRUSTED |= {"peft", "prism", "torch", "torchao", "transformers", "unittest"}
_REFUSED = {"cache_dit": "cache-dit", "para_attn": "ParaAttention", "xfuser": "xDiT"}
_INERT = {"numpy", "PIL", "tqdm"}
_MUTATORS = {"append", "extend", "insert", "update", "setdefault"}
_ENDS = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"}
_JUMPS = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"}


def check_patches(denoiser: nn.Module) -> None:
    """Raise PrismError naming what stands in the place of a denoiser's or a block's own forward and may answer from an
    earlier call."""
    root = getattr(denoiser, "_orig_mod", denoiser)
    for function, module in _foreign(root):
        package = _top(function)
        if package in _REFUSED:
            raise PrismError(_sentence(root, f"{_REFUSED[package]} ({_name(function)})", "caches or slices its calls"))
        if any(_holds_blocks(value, root) for value in _values(function)):
            raise PrismError(_sentence(root, _name(function), "runs other blocks in the place of the denoiser's own"))
        if _answers_alone(function, module) and _reads_back(function, module):
            raise PrismError(_sentence(root, _name(function), "keeps what one call computed and reads it in another"))
    for function, module in _hooks(root):
        if _gives(function) and _reads_back(function, module):
            raise PrismError(_sentence(root, f"the hook {_name(function)}", "changes a call by what it kept of others"))
    if getattr(root, "_is_cached", False):
        raise PrismError(_sentence(root, "a cache such as cache-dit's", "answers calls from earlier ones"))


def patch_of(denoiser: nn.Module) -> str:
    """The name of what was put in the place of a denoiser's or a block's own forward, or "" """
    return next((_name(function) for function, _ in _foreign(getattr(denoiser, "_orig_mod", denoiser))), "")


def _sentence(root: nn.Module, what: str, why: str) -> str:
    return (
        f"The denoiser {type(root).__name__} is patched: {what} {why}, while a search makes other calls, and in other "
        'batches, than a plain run; take it off first, or use the strategy "none" or "random".'
    )


# -- what is foreign


def _foreign(root: nn.Module) -> Iterator[tuple[types.FunctionType, Any]]:
    """Functions of other packages that answer for a module of the denoiser, each with that module or processor."""
    home = _home(type(root))
    classes: dict[type, list[types.FunctionType]] = {}
    for module in root.modules():
        own = vars(module)
        for value in (own[name] for name in ("forward", "_old_forward") if name in own):
            for function in _reachable(value, set()):
                if _is_foreign(function, type(module), home):
                    yield function, module
        kind = type(module)
        if kind not in classes:
            classes[kind] = _class_patches(kind, home, leaf=not own["_modules"])
        for function in classes[kind]:
            yield function, module
        hooks = own["_diffusers_hook"].hooks.values() if "_diffusers_hook" in own else ()
        for each, name in [*((hook, "new_forward") for hook in hooks), (own.get("processor"), "__call__")]:
            answers = getattr(type(each), name, None)
            if isinstance(answers, types.FunctionType) and _is_foreign(answers, type(each), home):
                yield answers, each


def _hooks(root: nn.Module) -> Iterator[tuple[types.FunctionType, Any]]:
    """Functions of other packages that are hooked onto modules of the denoiser, each with its module or object."""
    for module in root.modules():
        for hook in (*vars(module)["_forward_pre_hooks"].values(), *vars(module)["_forward_hooks"].values()):
            owner = getattr(hook, "__self__", module if isinstance(hook, types.FunctionType) else hook)
            for function in _reachable(hook, set()):
                if _top(function) not in _TRUSTED:
                    yield function, owner


def _gives(function: types.FunctionType) -> bool:
    """True where some way through a hook ends with a value, which takes the place of what the hook was shown."""
    before, attribute = None, ""
    for each in dis.get_instructions(function.__code__):
        nothing = before is None or (before.opname == "LOAD_CONST" and before.argval is None)
        if each.opname == "RETURN_VALUE" and not nothing and attribute not in _MUTATORS - {"setdefault"}:
            return True  # not a lambda that appends to a list
        if each.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            attribute = each.argval
        elif each.opname.startswith(("BUILD", "BINARY", "STORE")):
            attribute = ""
        before = each
    return False


def giving(hook: Any) -> Any:
    """A hook that may change a call, or None for one that only looks."""
    return hook if any(_gives(function) for function in _reachable(hook, set())) else None


def values_of(function: types.FunctionType) -> dict[str, Any]:
    """What a function of another package reads beside its arguments: in its closure, its defaults, its module."""
    return {} if _top(function) in _TRUSTED else _lookup(function)


def _home(kind: type) -> str:
    """The package of a denoiser class that is a model of its own, no subclass of a known one's, else ""."""
    packages = [each.__module__.split(".")[0] for each in kind.__mro__ if "forward" in vars(each)]
    packages = [package for package in packages if package != "torch"]
    return "" if _TRUSTED & set(packages) or not packages else packages[0]


def _class_patches(kind: type, home: str, leaf: bool) -> list[types.FunctionType]:
    """The foreign functions in the forward of a module's class: put onto the class, a subclass's own, or a foreign
    block's (leaves are layers: quantised ones and the like)."""
    calls = next((vars(each)["__call__"] for each in kind.__mro__ if "__call__" in vars(each)), None)
    called = [f for f in _reachable(calls, set()) if _is_foreign(f, kind, home)]
    if called:
        return called
    definer = next((each for each in kind.__mro__ if "forward" in vars(each)), nn.Module)
    functions = list(_reachable(vars(definer)["forward"], set()))
    if not functions or not _is_foreign(functions[0], definer, home):
        return []
    first = functions[0]
    native = (first.__module__, first.__qualname__) == (definer.__module__, f"{definer.__qualname__}.forward")
    overrides = any("forward" in vars(each) for each in definer.__mro__[1:] if each is not nn.Module)
    return [] if native and leaf and not overrides else [f for f in functions if _is_foreign(f, definer, home)]


def _is_foreign(function: types.FunctionType, kind: type, home: str) -> bool:
    package = _top(function)
    if package in _TRUSTED:
        return False
    native = (function.__module__, function.__qualname__.rpartition(".")[0]) == (kind.__module__, kind.__qualname__)
    return not (home and package == home and native)


def _top(function: types.FunctionType) -> str:
    return str(function.__globals__.get("__name__", "")).split(".")[0]


def _name(function: types.FunctionType) -> str:
    """A function's place: its own name and module, not those of what it wraps."""
    code = function.__code__
    name = getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")  # from Python 3.11
    return f"{name} of {function.__globals__.get('__name__', 'a module')}"[-120:]


def _reachable(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """The functions that a call of `value` may come to, through wrappers of all kinds; outermost first."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        for each in (value.func, *value.args, *value.keywords.values()):
            yield from _reachable(each, seen)
    elif isinstance(value, types.MethodType):
        yield from _reachable(value.__func__, seen)
    elif hasattr(value, "_torchdynamo_orig_callable"):
        yield from _reachable(value._torchdynamo_orig_callable, seen)
    elif isinstance(value, types.FunctionType):
        yield value
        for each in (*_cells(value).values(), *_defaults(value).values(), getattr(value, "__wrapped__", None)):
            if callable(each) or type(each).__name__ == "HookFunctionReference":
                yield from _reachable(each, seen)
    elif type(value).__name__ == "HookFunctionReference":  # diffusers' hooks
        for each in vars(value).values():
            yield from _reachable(each, seen)
    elif callable(value) and not isinstance(value, nn.Module | type):
        yield from _reachable(vars(type(value)).get("__call__"), seen)


# -- what a function does


def _cells(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    return {**dict(zip(names[len(names) - len(values) :], values)), **(function.__kwdefaults__ or {})}


def _values(function: types.FunctionType) -> Iterator[Any]:
    """The values a function holds: in its closure, its defaults, and containers there."""
    for value in (*_cells(function).values(), *_defaults(function).values()):
        yield value
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from value


def _holds_blocks(value: Any, root: nn.Module) -> bool:
    """True where a module beside the denoiser holds parts of it."""
    if not isinstance(value, nn.Module):
        return False
    own, inside = {id(module) for module in root.modules()}, list(value.modules())
    if id(value) in own or any(module is root for module in inside):
        return False
    lists = (each for module in inside for each in vars(module).values() if isinstance(each, list | tuple))
    return any(id(each) in own for each in (*inside, *(part for parts in lists for part in parts)))


def _lookup(function: types.FunctionType) -> dict[str, Any]:
    names = function.__code__.co_names
    shared = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return {**shared, **_cells(function), **_defaults(function)}


def _answers_alone(function: types.FunctionType, module: Any) -> bool:
    """True where some way through a function ends without a call of another forward or module."""
    known = _lookup(function)
    children = set(vars(module).get("_modules", ()))
    code = list(dis.get_instructions(function.__code__))
    places = {instruction.offset: place for place, instruction in enumerate(code)}

    def goes_on(instruction: dis.Instruction) -> bool:
        name = instruction.argval
        if not instruction.opname.startswith("LOAD_") or not isinstance(name, str):
            return False
        if "ATTR" in instruction.opname or "METHOD" in instruction.opname:
            return "forward" in name or name == "__call__" or name in children
        value = known.get(name)
        called = (f"{name} {each.__name__}" for each in _reachable(value, set()))
        return isinstance(value, nn.Module) or any("forward" in each or "call_impl" in each for each in called)

    ahead, seen = [0], set()
    while ahead:
        place = ahead.pop()
        if place in seen or place >= len(code) or goes_on(code[place]):
            continue
        seen.add(place)
        instruction = code[place]
        if instruction.opname.startswith("RETURN_") and instruction.opname in _ENDS:
            return True
        jumps = instruction.opcode in (*dis.hasjrel, *dis.hasjabs) and not instruction.opname.startswith("SETUP_")
        if jumps and instruction.argval in places:
            ahead.append(places[instruction.argval])
        if instruction.opname not in _ENDS | _JUMPS:
            ahead.append(place + 1)
    return False


def _reads_back(function: types.FunctionType, owner: Any, depth: int = 3) -> bool:
    """True where a function, or one that it calls, reads what it wrote where it outlives the call."""
    known, read, written = _lookup(function), Counter[str](), set()
    fills, before = False, ""
    for instruction in _instructions(function.__code__):
        name, kind = instruction.argval, instruction.opname
        if kind in ("STORE_ATTR", "STORE_GLOBAL") or (kind == "STORE_DEREF" and name in function.__code__.co_freevars):
            written.add(name)
        elif kind.startswith("LOAD_") and isinstance(name, str):
            counts = kind.startswith("LOAD_ATTR") and before in ("COPY", "DUP_TOP")  # self.count += 1
            read[name] += 0 if counts else 1
            fills |= name in _MUTATORS
        fills |= kind == "STORE_SUBSCR"
        before = kind
    if "setattr" in read:
        written |= {value for value in function.__code__.co_consts if isinstance(value, str)}
        read.update(value for value in function.__code__.co_consts if isinstance(value, str) and "getattr" in read)
    if any(read[name] for name in written):
        return True
    own = {**vars(type(owner)), **vars(owner)}
    reached = {name: known.get(name, own.get(name)) for name in read}
    if fills and any(read[name] > 1 and type(value) in (dict, list) for name, value in reached.items()):
        return True
    helpers = [value for value in reached.values() if depth and _is_helper(value)]
    functions = [each for each in helpers if isinstance(each, types.FunctionType)]
    others = {type(each) for each in helpers if not isinstance(each, types.FunctionType)}
    return any(_reads_back(each, owner, depth - 1) for each in functions) or any(map(_class_reads_back, others))


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Instructions of a function and of the functions and comprehensions written inside it."""
    yield from dis.get_instructions(code)
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _instructions(each)


def _is_helper(value: Any) -> bool:
    """True where a value is a function or an object of another package."""
    if isinstance(value, types.FunctionType):
        return _top(value) not in _TRUSTED and value.__name__ != "forward"
    kind = type(value)
    package = kind.__module__.split(".")[0]
    stateful = hasattr(value, "__dict__") and not isinstance(value, nn.Module | type | types.ModuleType)
    return stateful and package not in _TRUSTED | _INERT | sys.stdlib_module_names


def _class_reads_back(kind: type) -> bool:
    """True where one method of a class reads what another wrote."""
    read, written = set(), set()
    for function in (each for each in vars(kind).values() if isinstance(each, types.FunctionType)):
        if function.__name__ == "__init__":
            continue
        before = ""
        for instruction in _instructions(function.__code__):
            if instruction.opname == "STORE_ATTR":
                written.add(instruction.argval)
            elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and before not in ("COPY", "DUP_TOP"):
                read.add(instruction.argval)
            before = instruction.opname
    return bool(read & written)
