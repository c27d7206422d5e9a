"""Wrappers and caches that other code puts onto a denoiser: harmless ones stay exact, the rest is refused by name."""

from __future__ import annotations

import functools
import time
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tests import tiny
from tests.machinery import CALL, FAMILIES, RUNS, assert_exact, blocks, stock
from tests.works import works
from tests.zoo import VARIANTS
from torch import nn

import prism
from prism.backbone import Backbone
from prism.backbone.patches import modules_of
from prism.backbone.pipeline import check_whole
from prism.errors import PrismError

CLASSES = {"wan": WanTransformer3DModel, "cogvideox": CogVideoXTransformer3DModel}
PLAIN = {name: kind.forward for name, kind in CLASSES.items()}
SEEN: list[Any] = []  # by harmless wrappers


@pytest.fixture(autouse=True)
def classes_as_before() -> Any:
    yield
    for name, kind in CLASSES.items():
        kind.forward = PLAIN[name]  # type: ignore[method-assign]
        for attribute in ("cnt", "num_steps", "previous", "previous_residual", "accumulated", "__call__"):
            if attribute in vars(kind):
                delattr(kind, attribute)


# -- harmless


def logged(pipe: Any) -> None:
    forward, counts = pipe.transformer.forward, {"calls": 0}

    def log(*args: Any, **kwargs: Any) -> Any:
        counts["calls"] += 1
        if counts["calls"] % 2 == 0:
            SEEN.append(counts["calls"])
        return forward(*args, **kwargs)

    pipe.transformer.forward = log


def timed(pipe: Any) -> None:
    original = pipe.transformer.forward

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            SEEN.append(time.perf_counter() - start)

    pipe.transformer.forward = wrapper


def counted_on_the_class(pipe: Any) -> None:
    kind = type(pipe.transformer)
    plain, kind.cnt = kind.forward, 0

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.cnt += 1
        SEEN.append(self.cnt)
        return plain(self, *args, **kwargs)

    kind.forward = forward


def of_its_own_class(pipe: Any) -> None:
    class Own(type(pipe.transformer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            SEEN.append(self.calls)
            return super().forward(*args, **kwargs)

    pipe.transformer.__class__ = Own


class LoggedBlock(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls % 3 == 0:
            SEEN.append(self.calls)
        return self.inner(*args, **kwargs)


def wrapped_blocks(pipe: Any) -> None:
    own = blocks(pipe)
    name = "blocks" if hasattr(pipe.transformer, "blocks") else "transformer_blocks"
    setattr(pipe.transformer, name, nn.ModuleList([LoggedBlock(block) for block in own]))


def patched_blocks(pipe: Any) -> None:
    """Stateless, and it answers for the block by itself where it likes."""
    for block in blocks(pipe):

        def forward(*args: Any, inner: Any = block.forward, **kwargs: Any) -> Any:
            if args and args[0].isnan().any():
                return args[0]
            SEEN.append(1)
            return inner(*args, **kwargs)

        block.forward = forward


def hooked_by_accelerate(pipe: Any) -> None:
    class Look(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            SEEN.append(1)
            return args, kwargs

    add_hook_to_module(pipe.transformer, Look())


def hooked_by_diffusers(pipe: Any) -> None:
    class Look(DiffusersHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            SEEN.append(1)
            return self.fn_ref.original_forward(*args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Look(), "look")


def logged_under_offload(pipe: Any) -> None:
    logged(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))


def called_on_the_class(pipe: Any) -> None:
    kind = type(pipe.transformer)
    plain, kind.cnt = kind.__call__, 0

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.cnt += 1
        if self.cnt % 3 == 0:
            SEEN.append(self.cnt)
        return plain(self, *args, **kwargs)

    kind.__call__ = call


def hooked_to_count(pipe: Any) -> None:
    counts = {"calls": 0}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        counts["calls"] += 1
        if counts["calls"] % 2 == 0:
            SEEN.append(counts["calls"])

    def louder(module: nn.Module, args: Any, output: Any) -> Any:  # keeps nothing
        return (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01

    for block in blocks(pipe):
        block.register_forward_hook(count)
        block.register_forward_hook(lambda *_: counts.__setitem__("seen", counts.get("seen", 0) + 1))  # gives None
        block.register_forward_hook(louder)


HARMLESS: dict[str, Callable[[Any], None]] = {
    "logged": logged,
    "timed": timed,
    "counted on the class": counted_on_the_class,
    "of its own class": of_its_own_class,
    "wrapped blocks": wrapped_blocks,
    "patched blocks": patched_blocks,
    "hooked by accelerate": hooked_by_accelerate,
    "hooked by diffusers": hooked_by_diffusers,
    "logged under offload": logged_under_offload,
    "called on the class": called_on_the_class,
    "hooked to count": hooked_to_count,
}


@works(
    "Caches and patches",
    "A denoiser or its blocks wrapped to log, time or count calls (replaced `forward`, hooks, subclasses)",
    "exact",
    "A wrapper that calls what it wraps on every way through it is looked through.",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_wrappers_stay_exact(name: str, family: str) -> None:
    if family == "cogvideox" and name in ("hooked by diffusers", "timed", "logged under offload"):
        pytest.skip("as with the other family")
    pipe = FAMILIES[family]()
    HARMLESS[name](pipe)
    SEEN.clear()
    assert_exact(pipe, runs=["early", "full"] if family == "wan" else ["early"])
    assert SEEN


def test_no_denoiser_of_the_zoo_is_taken_for_a_patched_one() -> None:
    for name in ("ltx", "hunyuan", "kandinsky5_t2v", "latte", "opensora", "bare_module", "svd", "mochi"):
        pipe, _ = VARIANTS[name]()
        check_whole(Backbone(pipe).denoisers)


# -- caches


def teacache(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """A whole forward in the place of the plain one, which skips every other call once it is warm."""
    if self.cnt > 2 and self.cnt % 2:
        output = hidden_states + self.previous_residual
    else:
        output = next(f for name, f in PLAIN.items() if isinstance(self, CLASSES[name]))(
            self, hidden_states, *args, **{**kwargs, "return_dict": False}
        )[0]
        self.previous_residual = output - hidden_states
    self.cnt += 1
    if self.cnt == self.num_steps:
        self.cnt = 0
    return (output,)


def teacache_on_the_class(pipe: Any) -> None:
    kind = type(pipe.transformer)
    kind.cnt, kind.num_steps, kind.previous_residual, kind.forward = 0, 10, None, teacache


def teacache_on_the_instance(pipe: Any) -> None:
    pipe.transformer.cnt, pipe.transformer.num_steps = 0, 10
    pipe.transformer.forward = types.MethodType(teacache, pipe.transformer)


def in_a_closure(pipe: Any) -> None:
    forward, state = pipe.transformer.forward, {"calls": 0, "last": None}

    def cached(*args: Any, **kwargs: Any) -> Any:
        state["calls"] += 1
        if state["calls"] % 3 == 0 and state["last"] is not None:
            return state["last"]
        state["last"] = forward(*args, **kwargs)
        return state["last"]

    pipe.transformer.forward = cached


def with_nonlocals(pipe: Any) -> None:
    forward, calls, last = pipe.transformer.forward, 0, None

    @functools.wraps(forward)
    def cached(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, last
        calls += 1
        if calls % 3:
            last = forward(*args, **kwargs)
        return last

    pipe.transformer.forward = cached


class Helper:
    def __init__(self) -> None:
        self.count, self.output = 0, None

    def skips(self) -> bool:
        self.count += 1
        return self.count % 3 == 0

    def keep(self, output: Any) -> None:
        self.output = output


def with_a_helper(pipe: Any) -> None:
    forward, cache = pipe.transformer.forward, Helper()

    def cached(*args: Any, **kwargs: Any) -> Any:
        if not cache.skips():
            cache.keep(forward(*args, **kwargs))
        return cache.output

    pipe.transformer.forward = cached


class CachedBlock(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.last = inner, 0, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.last is None or self.calls % 3:
            self.last = self.inner(*args, **kwargs)
        return self.last


def cached_blocks(pipe: Any) -> None:
    name = "blocks" if hasattr(pipe.transformer, "blocks") else "transformer_blocks"
    setattr(pipe.transformer, name, nn.ModuleList([CachedBlock(block) for block in blocks(pipe)]))


class Blocks(nn.Module):
    """All blocks as one, the way of cache-dit and ParaAttention; what it keeps is kept elsewhere."""

    def __init__(self, inner: nn.ModuleList) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert ACTIVE, "no cache context is set"
        hidden = args[0]
        for block in self.inner:
            hidden = block(hidden, *args[1:], **kwargs)
        return hidden


ACTIVE: list[int] = []


def other_blocks(pipe: Any) -> None:
    name = "blocks" if hasattr(pipe.transformer, "blocks") else "transformer_blocks"
    original, unified = pipe.transformer.forward, {"one": nn.ModuleList([Blocks(getattr(pipe.transformer, name))])}

    def new_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with unittest.mock.patch.object(self, name, unified["one"]):
            return original(*args, **kwargs)

    pipe.transformer.forward = functools.update_wrapper(functools.partial(new_forward, pipe.transformer), new_forward)


def of_a_subclass(pipe: Any) -> None:
    class Cached(type(pipe.transformer)):  # type: ignore[misc]
        calls, last = 0, None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls % 3:
                self.last = super().forward(*args, **kwargs)
            return self.last

    pipe.transformer.__class__ = Cached


class CachedAttention(WanAttnProcessor):
    last = None
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.last is None or self.calls % 2:
            self.last = super().__call__(*args, **kwargs)
        return self.last


def cached_attention(pipe: Any) -> None:
    for block in blocks(pipe):
        block.attn1.set_processor(CachedAttention())


def by_a_hook(pipe: Any) -> None:
    class Cache(DiffusersHook):
        last, calls = None, 0

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.last is None or self.calls % 2:
                self.last = self.fn_ref.original_forward(*args, **kwargs)
            return self.last

    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Cache(), "mine")


def under_offload(pipe: Any) -> None:
    teacache_on_the_instance(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))


def under_a_logger(pipe: Any) -> None:
    in_a_closure(pipe)
    logged(pipe)


def called_from_a_cache(pipe: Any) -> None:
    kind = type(pipe.transformer)
    plain, state = kind.__call__, {"calls": 0, "last": None}

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        state["calls"] += 1
        if state["calls"] % 3 == 0 and state["last"] is not None:
            return state["last"]
        state["last"] = plain(self, *args, **kwargs)
        return state["last"]

    kind.__call__ = cached


def hooked_to_mix(pipe: Any) -> None:
    class Mix:
        previous: Any = None

        def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
            previous, self.previous = self.previous, output
            fits = isinstance(output, torch.Tensor) and previous is not None and previous.shape == output.shape
            return 0.5 * (output + previous) if fits else output

    for block in blocks(pipe):
        block.register_forward_hook(Mix())


def hooked_to_count_inputs(pipe: Any) -> None:
    state = {"calls": 0}

    def later(module: nn.Module, args: Any, kwargs: Any) -> Any:
        state["calls"] += 1
        more = 1.05 if state["calls"] > 4 else 1.0
        return args, {**kwargs, "hidden_states": more * kwargs["hidden_states"]}

    pipe.transformer.register_forward_pre_hook(later, with_kwargs=True)


CACHES: dict[str, tuple[Callable[[Any], None], str]] = {
    "TeaCache on the class": (teacache_on_the_class, "teacache"),
    "TeaCache on the instance": (teacache_on_the_instance, "teacache"),
    "in a closure": (in_a_closure, "cached of test_patches"),
    "with nonlocals": (with_nonlocals, "cached of test_patches"),
    "with a helper": (with_a_helper, "cached of test_patches"),
    "cached blocks": (cached_blocks, "forward of test_patches"),
    "other blocks": (other_blocks, "new_forward of test_patches runs other blocks"),
    "of a subclass": (of_a_subclass, "forward of test_patches"),
    "cached attention": (cached_attention, "__call__ of test_patches"),
    "by a hook": (by_a_hook, "new_forward of test_patches"),
    "under offload": (under_offload, "teacache"),
    "under a logger": (under_a_logger, "cached of test_patches"),
    "called on the class": (called_from_a_cache, "cached of test_patches"),
    "outputs mixed by a hook": (hooked_to_mix, "the hook .*__call__ of test_patches"),
    "inputs changed by a hook": (hooked_to_count_inputs, "the hook .*later of test_patches"),
}


@works(
    "Caches and patches",
    "Caches that are not diffusers' own: TeaCache-like `forward`s with counters, cached blocks, cache-dit's way",
    "refused",
    "Before any work, in a sentence that names the patch; `none` and `random` run it as it is.",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CACHES)
def test_caches_of_others_are_refused_before_any_work(name: str, family: str) -> None:
    if family == "cogvideox" and name == "cached attention":
        pytest.skip("the processor is Wan's")
    pipe = FAMILIES[family]()
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    latents = stock(pipe, 0, num_inference_steps=2)
    make, sentence = CACHES[name]
    make(pipe)
    ran: list[int] = []
    handles = [part.register_forward_pre_hook(lambda *_: ran.append(1)) for part in (pipe.text_encoder, *blocks(pipe))]
    oracle = {"strategy": "oracle", "oracle": lambda video, prompt: 0.0}
    for arguments in (*RUNS.values(), oracle):
        with pytest.raises(PrismError, match=f"is patched: .*{sentence}") as error:
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, **arguments, **CALL)
        assert len(str(error.value)) < 500
    assert not ran
    with pytest.raises(PrismError, match=f"is patched: .*{sentence}"):
        judge.score(torch.zeros(latents.shape), [tiny.PROMPT], 500.0, **CALL)
    for handle in handles:
        handle.remove()


def test_a_cache_runs_where_nothing_is_searched() -> None:
    pipe = FAMILIES["wan"]()
    teacache_on_the_instance(pipe)
    result = prism.best_of_n(pipe, None, tiny.PROMPT, n=3, strategy="random", **CALL)
    pipe.transformer.cnt = 0
    assert torch.equal(result.latents, stock(pipe, result.seed))


def test_modules_are_those_of_torch_in_its_order() -> None:
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(nn.ReLU(), nn.ModuleList([shared, nn.Dropout()]), shared)
    inner.register_module("none", None)
    for module in (inner, nn.Sequential(shared, inner)):
        assert list(map(id, modules_of(module))) == list(map(id, module.modules()))
