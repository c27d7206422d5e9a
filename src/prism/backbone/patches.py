"""Code of others in the place of a denoiser's own: harmless wrappers go on working, caches are refused.

A wrapper that calls what it wraps on every way through it may log and count as it likes. What can answer by itself, and
reads back what it wrote in an earlier call, gives outputs that depend on the calls before: TeaCache and its like. So
does what runs other blocks in the place of the denoiser's (cache-dit, ParaAttention).
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from prism.backbone.flow import Flow, defaults_of, gives
from prism.backbone.symbols import MISSING
from prism.errors import PrismError

# Packages whose wrappers and layers keep a call's output a function of its arguments (their caches are told by
# `pipeline.check_whole`), and those that cache or slice.
_TRUSTED = {"accelerate", "bitsandbytes", "builtins", "contextlib", "deepspeed", "diffusers", "functools", "optimum"}
_TRUSTED |= {"peft", "prism", "torch", "torchao", "transformers", "unittest"}
_PLACES = {"forward", "_old_forward", "_hf_hook", "_diffusers_hook"}  # where others' code stands in a module
_REFUSED = {"cache_dit": "cache-dit", "para_attn": "ParaAttention", "xfuser": "xDiT"}


def check_patches(denoiser: nn.Module) -> None:
    """Raise PrismError naming what stands in the place of a denoiser's or a block's own forward, or is hooked onto it,
    and may give what depends on earlier calls."""
    root = getattr(denoiser, "_orig_mod", denoiser)
    entries = list(_entries(root))
    for functions, _, _, _ in entries:
        for function in functions:
            if (package := _top(function)) in _REFUSED:
                what = f"{_REFUSED[package]} ({_name(function)})"
                raise PrismError(_sentence(root, what, "caches or slices its calls"))
            if any(_holds_blocks(value, root) for value in _values(function)):
                raise PrismError(
                    _sentence(root, _name(function), "runs other blocks in the place of the denoiser's own")
                )
    if getattr(root, "_is_cached", False):
        raise PrismError(_sentence(root, "a cache such as cache-dit's", "answers calls from earlier ones"))
    if not entries:
        return
    flow = _flow(root)
    flow.learn([(call, owner) for _, call, owner, _ in entries])
    for functions, call, owner, kind in entries:
        if flow.unclean(call, owner):
            alone = [each for each in functions if each.__code__.co_argcount or each.__code__.co_flags & 0x04]
            guilty = [each for each in alone[1:] if flow.unclean(each)]
            what = f"{kind}{_name((guilty or functions)[-1 if guilty else 0])}"
            raise PrismError(_sentence(root, what, "goes by earlier calls, a clock or chance"))


def check_scheduler(scheduler: Any) -> None:
    """Raise PrismError naming what stands in the place of a scheduler's own methods and goes by earlier calls."""
    own = _in_place_of_methods(scheduler)
    flow = _flow(nn.Module())
    flow.learn([(call, MISSING) for call in own])
    for call in own:
        if flow.unclean(call):
            raise PrismError(
                f"The scheduler {type(scheduler).__name__} is patched: {_name(_outermost(call)[0])} goes by earlier "
                "calls, a clock or chance, while a search makes other calls than a plain run; take it off first, "
                'or use the strategy "none" or "random".'
            )


def is_patched(denoisers: Sequence[nn.Module], scheduler: Any) -> bool:
    """True where code of other packages answers or may change calls of a denoiser, or of the scheduler's own."""
    if _in_place_of_methods(scheduler):
        return True
    for root in (getattr(each, "_orig_mod", each) for each in denoisers):
        if entries := list(_entries(root)):
            flow = _flow(root)
            if not all(kind and flow.only_looks(call, owner) for _, call, owner, kind in entries):
                return True
    return False


def _in_place_of_methods(part: Any) -> list[Any]:
    """What was set on a part itself, in the place of a method of its class, and comes to code of other packages."""
    return [value for value in vars(part).values() if callable(value) and _outermost(value)]


def _flow(root: nn.Module) -> Flow:
    return Flow(lambda function: _top(function) in _TRUSTED, _outermost, _names_read(root), root)


def patch_of(denoiser: nn.Module) -> str:
    """The name of what was put in the place of a denoiser's or a block's own forward, or "" """
    return next(map(_name, _foreign(getattr(denoiser, "_orig_mod", denoiser))), "")


def _sentence(root: nn.Module, what: str, why: str) -> str:
    return (
        f"The denoiser {type(root).__name__} is patched: {what} {why}, while a search makes other calls, and in other "
        'batches, than a plain run; take it off first, or use the strategy "none" or "random".'
    )


# -- what is foreign


def _entries(root: nn.Module) -> Iterator[tuple[list[types.FunctionType], Any, Any, str]]:
    """Calls that code of other packages answers or changes, alike ones once: the functions of others that each comes
    to, the function that is called, what it is called with first, or `MISSING`, and "the hook " for hooks."""
    home, seen = _home(root), set()
    for value, owner, what in _of_all_modules(root):
        if functions := [each for each in _reachable(value, set()) if _is_foreign(each, object, "")]:
            yield functions, value, owner, what
    classes: dict[type, list[tuple[list[types.FunctionType], Any]]] = {}
    processors: set[tuple[type, type]] = set()  # of modules that were looked at, with the modules' classes
    for module in root.modules():
        own, kind = vars(module), type(module)
        if kind not in classes:
            classes[kind] = list(_class_patches(kind, home, leaf=not own["_modules"]))
        alike = (kind, type(own.get("processor")))
        plain = alike in processors and own.keys().isdisjoint(_PLACES)
        if plain and not (classes[kind] or own["_forward_pre_hooks"] or own["_forward_hooks"]):
            continue  # nearly all modules of nearly all denoisers: this is asked at every read
        processors.add(alike)
        calls: list[tuple[list[types.FunctionType], Any, Any, str]]
        calls = [(functions, call, module, "") for functions, call in classes[kind]]
        accelerates = own.get("_hf_hook")
        hooks = [*getattr(accelerates, "hooks", ()), accelerates]
        hooks += own["_diffusers_hook"].hooks.values() if "_diffusers_hook" in own else []
        names = ("new_forward", "pre_forward", "post_forward")
        values = [(own[name], MISSING, "") for name in ("forward", "_old_forward") if name in own]
        methods = [(hook, name) for hook in hooks for name in names] + [(own.get("processor"), "__call__")]
        values += [(getattr(type(each), name), each, "") for each, name in methods if hasattr(type(each), name)]
        hooked = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
        values += [(hook, module, "the hook ") for hook in hooked]
        for value, owner, what in values:
            functions = [each for each in _reachable(value, set()) if _is_foreign(each, kind, home)]
            calls += [(functions, value, owner, what)] if functions else []
        for functions, call, owner, what in calls:
            key = (*(each.__code__ for each in functions), type(owner), type(call), what)
            if key not in seen:
                seen.add(key)
                yield functions, call, owner, what


def _of_all_modules(root: nn.Module) -> Iterator[tuple[Any, Any, str]]:
    """What answers or changes calls of every module in the process: global hooks, and functions of torch and of the
    denoiser's own file in whose place others' stand."""
    every = torch.nn.modules.module
    for hook in (*every._global_forward_pre_hooks.values(), *every._global_forward_hooks.values()):
        yield hook, root if isinstance(hook, types.FunctionType) else hook, "the hook "
    own = vars(sys.modules.get(type(root).__module__, every))
    for value in (*vars(torch.nn.functional).values(), own.get("dispatch_attention_fn")):
        if isinstance(value, types.FunctionType) and _top(value) not in sys.stdlib_module_names - {"__main__"}:
            yield value, MISSING, ""


def _foreign(root: nn.Module) -> Iterator[types.FunctionType]:
    """Functions of other packages that answer for a module of the denoiser."""
    for functions, _, _, what in _entries(root):
        yield from () if what else functions


def _outermost(value: Any) -> list[types.FunctionType]:
    """The functions of other packages that a call of `value` comes to first."""
    functions: list[types.FunctionType] = []
    inside: set[int] = set()
    for each in _reachable(value, set()):
        if _top(each) not in _TRUSTED and id(each) not in inside:
            functions.append(each)
            inside |= {id(other) for other in _reachable(each, set())}
    return functions


def _names_read(root: nn.Module) -> set[str]:
    """Names that the code of the denoiser's modules and of what computes their attention reads."""
    kinds = {type(module) for module in root.modules()} | {type(getattr(m, "processor", m)) for m in root.modules()}
    classes = {each for kind in kinds for each in kind.__mro__} - {nn.Module, object}
    methods = [f for each in classes for f in vars(each).values() if isinstance(f, types.FunctionType)]
    return {name for function in methods if _top(function) in _TRUSTED for name in function.__code__.co_names}


def giving(hook: Any) -> Any:
    """A hook that may change a call, or None for one that only looks."""
    return hook if any(gives(function) for function in _reachable(hook, set())) else None


def values_of(function: types.FunctionType) -> dict[str, Any]:
    """What a function of another package reads beside its arguments: in its closure, its defaults, its module."""
    return {} if _top(function) in _TRUSTED else _lookup(function)


def _home(root: nn.Module) -> str:
    """The package of a denoiser that is a model of its own, no subclass of a known one's and none around one, or ""."""
    packages = [each.__module__.split(".")[0] for each in type(root).__mro__ if "forward" in vars(each)]
    packages = [package for package in packages if package != "torch"]
    inside = any(isinstance(each, ModelMixin) for each in root.modules())
    return "" if inside or _TRUSTED & set(packages) or not packages else packages[0]


def _class_patches(kind: type, home: str, leaf: bool) -> Iterator[tuple[list[types.FunctionType], Any]]:
    """The foreign functions in the forward of a module's class, and it: put onto the class, a subclass's own, or a
    foreign block's (leaves are layers: quantised ones and the like)."""
    call = next((vars(each)["__call__"] for each in kind.__mro__ if "__call__" in vars(each)), None)
    if called := [f for f in _reachable(call, set()) if _is_foreign(f, kind, home)]:
        yield called, call
    definer = next((each for each in kind.__mro__ if "forward" in vars(each)), nn.Module)
    forward = vars(definer)["forward"]
    functions = list(_reachable(forward, set()))
    if not functions or not _is_foreign(functions[0], definer, home):
        return
    first = functions[0]
    native = (first.__module__, first.__qualname__) == (definer.__module__, f"{definer.__qualname__}.forward")
    overrides = any("forward" in vars(each) for each in definer.__mro__[1:] if each is not nn.Module)
    if not (native and leaf and not overrides):
        yield [f for f in functions if _is_foreign(f, definer, home)], forward


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
        for each in (*_cells(value).values(), *defaults_of(value).values(), getattr(value, "__wrapped__", None)):
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


def _values(function: types.FunctionType) -> Iterator[Any]:
    """The values a function holds: in its closure, its defaults, and containers there."""
    for value in (*_cells(function).values(), *defaults_of(function).values()):
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
    return {**shared, **_cells(function), **defaults_of(function)}
