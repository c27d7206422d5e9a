"""Temporary wrappers around a pipeline's parts, which one thread at a time holds, and captures of stock calls."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from prism.backbone.denoiser_call import by_name
from prism.backbone.patches import modules_of
from prism.backbone.pipeline import explain_misfits, failure
from prism.errors import PrismError

_CIRCLE = (
    "This thread works with one pipeline and asks for another whose own search waits for the first; let one thread "
    "at a time use both."
)


class _Holds(threading.local):
    """The pipelines that this thread holds, once per nested `held`."""

    def __init__(self) -> None:
        self.pipes: list[Any] = []

    @property
    def level(self) -> tuple[int, int]:
        """The thread, and the number of holds that are open in it."""
        return threading.get_ident(), len(self.pipes)


_holds = _Holds()
_changed = threading.Condition()
_holders: dict[int, int] = {}  # thread that holds a part, by the part's id
_awaited: dict[int, set[int]] = {}  # ids of the parts that a thread waits for, by thread


@contextmanager
def held(pipe: Any) -> Iterator[None]:
    """While open no other thread searches, reads or encodes with this pipeline, or with one that shares a part.

    Other threads wait; the thread that holds it may open `held` again. All modules are in evaluation mode meanwhile;
    afterwards their `training` flags are restored.

    Raises:
        PrismError: where two threads would wait for each other for ever.
    """
    if any(each is pipe for each in _holds.pipes):
        _holds.pipes.append(pipe)
        try:
            yield
        finally:
            _holds.pipes.pop()
        return
    parts = [part for part in (*pipe.components.values(), pipe.scheduler, pipe) if hasattr(part, "__dict__")]
    modules = [each for part in parts if isinstance(part, nn.Module) for each in modules_of(part)]
    keys = {id(part) for part in (*parts, *modules)}
    taken: set[int] = set()
    training: list[nn.Module] = []
    try:
        _take(keys, taken)
        _holds.pipes.append(pipe)
        for module in modules:
            if module.training:
                training.append(module)
                module.training = False  # not by `eval()`, which some models answer by changing their weights
        yield
    finally:
        for module in training:
            module.training = True
        if _holds.pipes and _holds.pipes[-1] is pipe:
            _holds.pipes.pop()
        with _changed:
            for key in taken:
                del _holders[key]
            _changed.notify_all()


def _take(keys: set[int], taken: set[int]) -> None:
    """Wait until no other thread holds any of `keys`, take them, and add to `taken` those that were free."""
    me = threading.get_ident()
    with _changed:
        try:
            while _others(keys, me):
                _awaited[me] = keys
                if _waits_for(me, me, set()):
                    raise PrismError(_CIRCLE)
                _changed.wait()
        finally:
            _awaited.pop(me, None)
        for key in keys - _holders.keys():
            _holders[key] = me
            taken.add(key)


def _others(keys: set[int], me: int) -> set[int]:
    """The other threads that hold some of `keys`."""
    return {_holders[key] for key in keys & _holders.keys()} - {me}


def _waits_for(thread: int, target: int, passed: set[int]) -> bool:
    """Tell whether `thread` waits, directly or through other threads not in `passed`, for `target`."""
    passed.add(thread)
    for other in _others(_awaited.get(thread, set()), thread):
        if other == target or (other not in passed and _waits_for(other, target, passed)):
            return True
    return False


def _after_fork() -> None:
    """In a child process no other thread lives, and none of the parent's searches goes on."""
    global _changed
    _changed = threading.Condition()
    _awaited.clear()
    me = threading.get_ident()
    for key in [key for key, holder in _holders.items() if holder != me]:
        del _holders[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_ABSENT = object()
# Attributes in which diffusers and accelerate keep the state of offloading; they are not restored.
_OFFLOADING = {"_all_hooks", "_offload_gpu_id", "_offload_device", "_internal_dict"}


class StopForward(Exception):
    """Ends a denoiser's forward pass after a block."""

    def __init__(self, block: int):
        super().__init__(block)
        self.block = block


class StopCall(Exception):
    """Ends a pipeline call at one of its denoiser calls."""


@contextmanager
def around(target: Any, name: str, wrapper: Callable[..., Any], reads: bool = False) -> Iterator[None]:
    """While open, `target.name(...)` is `wrapper(inner, ...)`, where `inner` is the method as it was.

    Calls from other threads go straight to `inner`. So do, unless `reads`, calls inside a further `held` of this
    thread: those of a judge that the user's callback calls.
    """
    target = getattr(target, "_orig_mod", target)  # an OptimizedModule forwards to this
    before, inner = vars(target).get(name, _ABSENT), getattr(target, name)
    call = _AroundMethod(wrapper, inner, reads)
    update_wrapper(call, inner, updated=())  # pipelines read the signature of `scheduler.step`
    try:
        setattr(target, name, call)
        yield
    finally:
        if before is not _ABSENT:
            setattr(target, name, before)
        elif name in vars(target):
            delattr(target, name)


class _Around:
    """A wrapped function or module, see `around`: calls from other threads or deeper holds pass to `inner`."""

    def __init__(self, wrapper: Callable[..., Any], inner: Callable[..., Any], reads: bool):
        self.wrapper, self.inner, self.reads, self.level = wrapper, inner, reads, _holds.level

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (thread, depth), (caller, deeper) = self.level, _holds.level
        if caller != thread or not (self.reads or deeper == depth):
            return self.inner(*args, **kwargs)
        return self.wrapper(self.inner, *args, **kwargs)


class _AroundMethod(_Around):
    """A wrapped method. A copy of its object, such as a scheduler for the sound, has the method as it was."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.inner, memo)


@contextmanager
def around_module(module: nn.Module, wrapper: Callable[..., Any], reads: bool = False) -> Iterator[None]:
    """While open, `module(...)` is `wrapper(inner, ...)`; see `around`.

    The wrapper is set in `_compiled_call_impl`, as by `Module.compile`, outside `forward` and all hooks: a call that it
    answers moves no offloaded weights, accelerate may re-add its hooks, and compiled modules stay compiled.
    """
    before = vars(module).get("_compiled_call_impl", _ABSENT)
    inner = module._compiled_call_impl or module._call_impl
    try:
        module._compiled_call_impl = _Around(wrapper, inner, reads)
        yield
    finally:
        if before is not _ABSENT:
            module._compiled_call_impl = before
        else:
            vars(module).pop("_compiled_call_impl", None)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is compiled as a whole, by `torch.compile` of it or its `forward`, or its `compile()`."""
    call = vars(module).get("_compiled_call_impl")
    while isinstance(call, _Around):
        call = call.inner
    compiled = (call, vars(module).get("forward"))
    return any(hasattr(each, "_torchdynamo_orig_callable") for each in compiled)


@contextmanager
def state_restored(pipe: Any) -> Iterator[None]:
    """Restore afterwards what a call changes on the pipeline and on its parts that are no modules (scheduler, guider),
    so that the next call starts as this one did; progress bars are off meanwhile.
    """
    parts = {id(part): part for part in (*pipe.components.values(), pipe.scheduler) if _has_state(part)}
    before = {key: (dict(vars(part)), _contents(vars(part))) for key, part in parts.items()}
    attributes_before = dict(vars(pipe))
    try:
        pipe._progress_bar_config = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        if hasattr(getattr(pipe, "guider", None), "set_state"):  # holds the last step of an earlier call
            pipe.guider.set_state(step=None, num_inference_steps=None, timestep=None)
        yield
    finally:
        for key, part in parts.items():
            attributes, contents = before[key]
            vars(part).clear()
            vars(part).update(attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)
        for name in [name for name in vars(pipe) if name.startswith("_") and name not in _OFFLOADING]:
            if name not in attributes_before:
                delattr(pipe, name)
            elif vars(pipe)[name] is not attributes_before[name]:
                setattr(pipe, name, attributes_before[name])


def _has_state(part: Any) -> bool:
    """Tell whether a call may change a part. It does not change modules, or tokenizers, which are costly to copy."""
    return hasattr(part, "__dict__") and not isinstance(part, nn.Module | PreTrainedTokenizerBase | type)


def _contents(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the attributes that are lists, dictionaries or sets, which a call may change in place."""
    return {name: value.copy() for name, value in attributes.items() if type(value) in (list, dict, set)}


def _refill(container: Any, content: Any) -> None:
    """Set the contents of a list, dictionary or set in place, as others may hold the same object."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def run_until_stopped(pipe: Any, call: Mapping[str, Any], step: Callable[[], int] = lambda: 0) -> Any:
    """The stock call's result, or None where `StopCall` ended it. The pipeline's state is restored.

    Arguments that the pipeline refuses and failures of its code become a PrismError; errors of a caller's callback pass
    unchanged.

    step: gives the number of the current step (from 1; 0 before the first), for messages.
    """
    try:
        with explain_misfits(pipe), state_restored(pipe):
            return pipe(**call)
    except StopCall:
        free_hooks(pipe)  # the stopped call did not come to its end, where it does this
        return None
    except BaseException as error:
        free_hooks(pipe)
        if (explained := failure(pipe, error, step(), call)) is not None:
            raise explained from error
        raise


def free_hooks(pipe: Any) -> None:
    """Move offloaded models off the accelerator, as a pipeline does at the end of a call."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()


def capture(
    pipe: Any, denoisers: Sequence[nn.Module], call: Mapping[str, Any], look: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The arguments, by name, of the first denoiser call of `pipe(**call)`, which ends there, after a call of `look`;
    empty where it makes none.
    """
    captured: dict[str, Any] = {}

    def record(denoiser: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> None:
        captured.update(by_name(denoiser, args, kwargs))
        look()
        raise StopCall

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(around_module(denoiser, partial(record, denoiser)))
        run_until_stopped(pipe, call)
    return captured
