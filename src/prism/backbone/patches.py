"""Foreign code that replaces or wraps a denoiser's own: harmless wrappers are allowed, caches are refused.

A wrapper that always calls what it wraps may log and count. One that may answer by itself, from what it wrote in an
earlier call (TeaCache and similar), gives outputs that depend on earlier calls. So does code that runs other blocks in
place of the denoiser's (cache-dit, ParaAttention). Foreign: of packages other than `_TRUSTED`.
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

# Packages whose wrappers and layers give outputs that depend on a call's arguments alone; `pipeline.check_whole`
# refuses their caches.
_TRUSTED = {"accelerate", "bitsandbytes", "builtins", "contextlib", "deepspeed", "diffusers", "functools", "optimum"}
_TRUSTED |= {"peft", "prism", "torch", "torchao", "transformers", "unittest"}
_ATTRIBUTES = {"forward", "_old_forward", "_hf_hook", "_diffusers_hook"}  # of a module, that may hold foreign code
# Packages that cache or slice the denoiser's calls, and their names in messages.
_REFUSED = {"cache_dit": "cache-dit", "para_attn": "ParaAttention", "xfuser": "xDiT"}


def check_patches(denoiser: nn.Module) -> None:
    """Raise PrismError naming the code that replaces a denoiser's or a block's forward, or is hooked onto it, where its
    output may depend on earlier calls."""
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
            taking_arguments = [
                each for each in functions if each.__code__.co_argcount or each.__code__.co_flags & 0x04
            ]
            unclean = [each for each in taking_arguments[1:] if flow.unclean(each)]
            what = f"{kind}{_name((unclean or functions)[-1 if unclean else 0])}"
            raise PrismError(_sentence(root, what, "goes by earlier calls, a clock or chance"))


def check_scheduler(scheduler: Any) -> None:
    """Raise PrismError naming the code that replaces a scheduler's method and depends on earlier calls."""
    patched = _in_place_of_methods(scheduler)
    flow = _flow(nn.Module())
    flow.learn([(call, MISSING) for call in patched])
    for call in patched:
        if flow.unclean(call):
            raise PrismError(
                f"The scheduler {type(scheduler).__name__} is patched: {_name(_outermost(call)[0])} goes by earlier "
                "calls, a clock or chance, while a search makes other calls than a plain run; take it off first, "
                'or use the strategy "none" or "random".'
            )


def is_patched(denoisers: Sequence[nn.Module], scheduler: Any) -> bool:
    """True where foreign code answers or may change calls of a denoiser, or replaces a method of the scheduler."""
    if _in_place_of_methods(scheduler):
        return True
    for root in (getattr(each, "_orig_mod", each) for each in denoisers):
        if entries := list(_entries(root)):
            flow = _flow(root)
            if not all(kind and flow.only_looks(call, owner) for _, call, owner, kind in entries):
                return True
    return False


def _in_place_of_methods(part: Any) -> list[Any]:
    """Callables set on a part itself, in place of methods of its class, that reach foreign code."""
    return [value for value in vars(part).values() if callable(value) and _outermost(value)]


def _flow(root: nn.Module) -> Flow:
    return Flow(lambda function: _top(function) in _TRUSTED, _outermost, _names_read(root), root)


def patch_of(denoiser: nn.Module) -> str:
    """The name of the foreign code that replaces a denoiser's or a block's forward; empty where there is none."""
    return next(map(_name, _foreign(getattr(denoiser, "_orig_mod", denoiser))), "")


def _sentence(root: nn.Module, what: str, why: str) -> str:
    return (
        f"The denoiser {type(root).__name__} is patched: {what} {why}, while a search makes other calls, and in other "
        'batches, than a plain run; take it off first, or use the strategy "none" or "random".'
    )


# -- foreign code


def _entries(root: nn.Module) -> Iterator[tuple[list[types.FunctionType], Any, Any, str]]:
    """Calls that foreign code answers or changes, one of each kind. Each is a tuple: the foreign functions that the
    call reaches, the function that is called, its first argument or `MISSING`, and "the hook " for a hook, else ""."""
    home, seen = _home(root), set()
    for value, owner, what in _of_all_modules(root):
        if functions := [each for each in _reachable(value, set()) if _is_foreign(each, object, "")]:
            yield functions, value, owner, what
    classes: dict[type, list[tuple[list[types.FunctionType], Any]]] = {}
    processors: set[tuple[type, type]] = set()  # (class of a module, class of its processor) seen before
    for module in modules_of(root):
        attributes, kind = vars(module), type(module)
        if kind not in classes:
            classes[kind] = list(_class_patches(kind, home, leaf=not attributes["_modules"]))
        alike = (kind, type(attributes.get("processor")))
        plain = alike in processors and attributes.keys().isdisjoint(_ATTRIBUTES)
        if plain and not (classes[kind] or attributes["_forward_pre_hooks"] or attributes["_forward_hooks"]):
            continue  # nearly all modules; the loop runs at every read, so it must be fast
        processors.add(alike)
        calls: list[tuple[list[types.FunctionType], Any, Any, str]]
        calls = [(functions, call, module, "") for functions, call in classes[kind]]
        accelerate_hook = attributes.get("_hf_hook")
        hooks = [*getattr(accelerate_hook, "hooks", ()), accelerate_hook]
        hooks += attributes["_diffusers_hook"].hooks.values() if "_diffusers_hook" in attributes else []
        names = ("new_forward", "pre_forward", "post_forward")
        values = [(attributes[name], MISSING, "") for name in ("forward", "_old_forward") if name in attributes]
        methods = [(hook, name) for hook in hooks for name in names] + [(attributes.get("processor"), "__call__")]
        values += [(getattr(type(each), name), each, "") for each, name in methods if hasattr(type(each), name)]
        hooked = (*attributes["_forward_pre_hooks"].values(), *attributes["_forward_hooks"].values())
        values += [(hook, module, "the hook ") for hook in hooked]
        for value, owner, what in values:
            functions = [each for each in _reachable(value, set()) if _is_foreign(each, kind, home)]
            calls += [(functions, value, owner, what)] if functions else []
        for functions, call, owner, what in calls:
            key = (*(each.__code__ for each in functions), type(owner), type(call), what)
            if key not in seen:
                seen.add(key)
                yield functions, call, owner, what


def modules_of(root: nn.Module) -> list[nn.Module]:
    """What `root.modules()` gives, in its order, which passes each module through all levels above it, slowly."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += [*module._modules.values()][::-1]
    return list(found)


def _of_all_modules(root: nn.Module) -> Iterator[tuple[Any, Any, str]]:
    """Code that affects calls of every module in the process, as in `_entries`: global hooks, and foreign functions
    that replace functions of torch or of the denoiser's own file."""
    every = torch.nn.modules.module
    for hook in (*every._global_forward_pre_hooks.values(), *every._global_forward_hooks.values()):
        yield hook, root if isinstance(hook, types.FunctionType) else hook, "the hook "
    names, own = vars(sys.modules.get(type(root).__module__, every)), vars(torch.nn.functional)
    for value in (*own.values(), names.get("dispatch_attention_fn")):
        if not isinstance(value, types.FunctionType) or (value.__globals__ is own and not _wraps(value)):
            continue  # nearly all, and this runs at every read
        if _top(value) not in sys.stdlib_module_names - {"__main__"}:
            yield value, MISSING, ""


def _wraps(function: types.FunctionType) -> bool:
    """True where a function holds others that its calls may reach, see `_reachable`."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return bool(function.__closure__ or vars(function)) or any(map(callable, defaults))


def _foreign(root: nn.Module) -> Iterator[types.FunctionType]:
    """Foreign functions that answer calls of the denoiser's modules (hooks are left out)."""
    for functions, _, _, what in _entries(root):
        yield from () if what else functions


def _outermost(value: Any) -> list[types.FunctionType]:
    """The outermost foreign functions that a call of `value` reaches."""
    functions: list[types.FunctionType] = []
    inside: set[int] = set()
    for each in _reachable(value, set()):
        if _top(each) not in _TRUSTED and id(each) not in inside:
            functions.append(each)
            inside |= {id(other) for other in _reachable(each, set())}
    return functions


def _names_read(root: nn.Module) -> set[str]:
    """Names that the code of the denoiser's modules and of their attention processors reads."""
    kinds = {type(module) for module in root.modules()} | {type(getattr(m, "processor", m)) for m in root.modules()}
    classes = {each for kind in kinds for each in kind.__mro__} - {nn.Module, object}
    methods = [f for each in classes for f in vars(each).values() if isinstance(f, types.FunctionType)]
    return {name for function in methods if _top(function) in _TRUSTED for name in function.__code__.co_names}


def unless_it_looks(hook: Any) -> Any:
    """The hook if it may change a call, or None if it only looks: returns nothing."""
    return hook if any(gives(function) for function in _reachable(hook, set())) else None


def values_of(function: types.FunctionType) -> dict[str, Any]:
    """Values that a foreign function reads besides its arguments, by name: of its closure, defaults and module."""
    return {} if _top(function) in _TRUSTED else _lookup(function)


def _home(root: nn.Module) -> str:
    """The package of a denoiser that neither subclasses nor holds a model of a trusted package, otherwise ""."""
    packages = [each.__module__.split(".")[0] for each in type(root).__mro__ if "forward" in vars(each)]
    packages = [package for package in packages if package != "torch"]
    inside = any(isinstance(each, ModelMixin) for each in root.modules())
    return "" if inside or _TRUSTED & set(packages) or not packages else packages[0]


def _class_patches(kind: type, home: str, leaf: bool) -> Iterator[tuple[list[types.FunctionType], Any]]:
    """Foreign functions that a call of a module of this class reaches, and the `__call__` or `forward` that is called:
    one that was set on the class, or the forward of a foreign class. A leaf, such as a quantised layer, may have a
    forward of its own class."""
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
    """The name of the package that a function was defined in."""
    return str(function.__globals__.get("__name__", "")).split(".")[0]


def _name(function: types.FunctionType) -> str:
    """A function's name and module in words; those of the wrapper, not of the function that it wraps."""
    code = function.__code__
    name = getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")  # from Python 3.11
    return f"{name} of {function.__globals__.get('__name__', 'a module')}"[-120:]


def _reachable(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """The functions that a call of `value` may reach, through wrappers of all kinds; outermost first."""
    if value is None or id(value) in seen:
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
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for each in (*_cells(value).values(), *defaults, getattr(value, "__wrapped__", None)):
            if callable(each) or type(each).__name__ == "HookFunctionReference":
                yield from _reachable(each, seen)
    elif type(value).__name__ == "HookFunctionReference":  # diffusers' hooks
        for each in vars(value).values():
            yield from _reachable(each, seen)
    elif callable(value) and not isinstance(value, nn.Module | type):
        yield from _reachable(vars(type(value)).get("__call__"), seen)


# -- values that a function holds


def _cells(function: types.FunctionType) -> dict[str, Any]:
    contents = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            contents[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return contents


def _values(function: types.FunctionType) -> Iterator[Any]:
    """The values in a function's closure and defaults, and in containers there."""
    for value in (*_cells(function).values(), *defaults_of(function).values()):
        yield value
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from value


def _holds_blocks(value: Any, root: nn.Module) -> bool:
    """True where a module that is not part of the denoiser holds parts of it, but not all."""
    if not isinstance(value, nn.Module):
        return False
    ids, inside = {id(module) for module in root.modules()}, list(value.modules())
    if id(value) in ids or any(module is root for module in inside):
        return False
    lists = (each for module in inside for each in vars(module).values() if isinstance(each, list | tuple))
    return any(id(each) in ids for each in (*inside, *(part for parts in lists for part in parts)))


def _lookup(function: types.FunctionType) -> dict[str, Any]:
    """The globals, closure and defaults that a function reads, by name."""
    names = function.__code__.co_names
    shared = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return {**shared, **_cells(function), **defaults_of(function)}
