"""Code of others that is put onto a denoiser, by what decides its outputs: what outlives a call, or the call alone."""

# ruff: noqa: B006, B007, C417, E742, F841, RUF005
from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import inspect
import itertools
import logging
import operator
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import tqdm
from tests import tiny
from tests.machinery import CALL, FAMILIES, RUNS, assert_exact
from tests.works import works
from torch import nn

import prism
from prism.backbone import Backbone
from prism.backbone.pipeline import check_whole
from prism.errors import PrismError

logger = logging.getLogger(__name__)
KEEPS: dict[str, Callable[..., Any]] = {}
LOOKS: dict[str, Callable[..., Any]] = {}


def harm(function: Any) -> Any:
    KEEPS[function.__name__[2:]] = function
    return function


def fine(function: Any) -> Any:
    LOOKS[function.__name__[2:]] = function
    return function


# ---------- harmful
@harm
def k_next_counter(inner: Any) -> Any:
    n = itertools.count()
    return lambda *a, **k: inner(*a, **{**k, "hidden_states": k["hidden_states"] * (1.02 if next(n) > 5 else 1)})


@harm
def k_out(inner: Any) -> Any:
    mean = torch.zeros(1)

    def f(*a, **k):
        output = inner(*a, **k)[0]
        torch.lerp(mean, output.mean()[None], 0.1, out=mean)
        return (output + 0.1 * mean,)

    return f


@harm
def k_data(inner: Any) -> Any:
    n = torch.zeros(1)

    def f(*a, **k):
        n.data.add_(1)
        return (inner(*a, **k)[0] * (1 + 0.01 * n),)

    return f


@harm
def k_del(inner: Any) -> Any:
    scales = [1.1] * 3 + [1.0] * 200

    def f(*a, **k):
        scale = scales[0]
        del scales[0]
        return (inner(*a, **k)[0] * scale,)

    return f


@harm
def k_operators(inner: Any) -> Any:
    d = {"n": 0}

    def f(*a, **k):
        operator.setitem(d, "n", d["n"] + 1)
        return (inner(*a, **k)[0] * (1 + 0.01 * d["n"]),)

    return f


@harm
def k_iadd(inner: Any) -> Any:
    n = torch.zeros(1)

    def f(*a, **k):
        operator.iadd(n, 1)
        return (inner(*a, **k)[0] * (1 + 0.01 * n),)

    return f


@harm
def k_dropout_held(inner: Any) -> Any:
    drop = nn.Dropout(0.1)
    return lambda *a, **k: (drop(inner(*a, **k)[0]),)


@harm
def k_islice(inner: Any) -> Any:
    n = iter(range(1000))
    return lambda *a, **k: (inner(*a, **k)[0] * (1 + 0.01 * sum(itertools.islice(n, 1))),)


@harm
def k_foreach(inner: Any) -> Any:
    n = torch.zeros(1)

    def f(*a, **k):
        torch._foreach_add_([n], 1)
        return (inner(*a, **k)[0] * (1 + 0.01 * n),)

    return f


@harm
def k_next_plain(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        i = next(n)
        out = inner(*a, **k)
        if i > 4:
            return (out[0] * 1.05,)
        return out

    return f


class Own:
    def __init__(self, inner):
        self.inner, self.cnt = inner, 0

    def forward(self, *a, **k):
        self.cnt += 1
        out = self.inner(*a, **k)
        return (out[0] * 1.05,) if self.cnt > 4 else out


@harm
def k_method(inner: Any) -> Any:
    return Own(inner).forward


@harm
def k_gen(inner: Any) -> Any:
    def g():
        while True:
            yield 1.0
            yield 1.1

    it = g()

    def f(*a, **k):
        return (inner(*a, **k)[0] * next(it),)

    return f


@harm
def k_gen_for(inner: Any) -> Any:
    it = iter([1.0, 1.1, 1.2])

    def f(*a, **k):
        out = inner(*a, **k)
        for s in it:
            out = (out[0] * s,)
            break
        return out

    return f


@harm
def k_random(inner: Any) -> Any:
    def f(*a, **k):
        return (inner(*a, **k)[0] * (1 + random.random()),)

    return f


@harm
def k_randn(inner: Any) -> Any:
    def f(*a, **k):
        out = inner(*a, **k)[0]
        return (out + 0.01 * torch.randn_like(out),)

    return f


@harm
def k_time(inner: Any) -> Any:
    t0 = time.time()

    def f(*a, **k):
        if time.time() - t0 > 3:
            k["hidden_states"] = k["hidden_states"] * 1.1
        return inner(*a, **k)

    return f


@harm
def k_listcount(inner: Any) -> Any:
    n = [0]

    def f(*a, **k):
        n[0] += 1
        out = inner(*a, **k)
        return (out[0] * (1.0 if n[0] < 4 else 1.1),)

    return f


@harm
def k_lenlog(inner: Any) -> Any:
    log = []

    def f(*a, **k):
        log.append(1)
        out = inner(*a, **k)
        return (out[0] * (1 + 0.01 * len(log)),)

    return f


@harm
def k_lenlog_branch(inner: Any) -> Any:
    log = []

    def f(*a, **k):
        log.append(1)
        out = inner(*a, **k)
        if len(log) > 3:
            out = (out[0] * 1.1,)
        return out

    return f


class Ctr:
    def __init__(self):
        self.n = 0

    def tick(self):
        self.n += 1
        return self.n


@harm
def k_objcounter(inner: Any) -> Any:
    c = Ctr()

    def f(*a, **k):
        i = c.tick()
        out = inner(*a, **k)
        return (out[0] + i * 0.001,)

    return f


@harm
def k_hook_mul(inner: Any) -> Any:
    n = itertools.count()

    def hook(m, args):
        args[0].mul_(1 + next(n) * 0.01)

    return hook


@harm
def k_hook_mul_branch(inner: Any) -> Any:
    n = itertools.count()

    def hook(m, args, out):
        if next(n) > 4:
            out[0].mul_(1.05)

    return hook


@harm
def k_hook_setitem(inner: Any) -> Any:
    n = itertools.count()

    def hook(m, args, out):
        out[0][:, :2] = next(n)

    return hook


@harm
def k_hook_imul(inner: Any) -> Any:
    c = Ctr()

    def hook(m, args, out):
        x = out[0]
        x *= 1 + c.tick()

    return hook


@harm
def k_hook_kwargs(inner: Any) -> Any:
    c = Ctr()

    def hook(m, args, kwargs):
        kwargs["hidden_states"] = kwargs["hidden_states"] * (1 + c.tick())
        return args, kwargs

    return hook


@harm
def k_hook_kwargs_inplace(inner: Any) -> Any:
    c = Ctr()

    def hook(m, args, kwargs):
        if c.tick() > 3:
            kwargs["guidance"] = None

    return hook


@harm
def k_ema(inner: Any) -> Any:
    s = {}

    def hook(m, args, out):
        prev = s.get("p")
        s["p"] = out
        return out if prev is None else 0.5 * (out + prev)

    return hook


@harm
def k_ema_tensor(inner: Any) -> Any:
    avg = torch.zeros(1)

    def hook(m, args, out):
        avg.mul_(0.9).add_(out.mean() * 0.1)
        return out - avg

    return hook


@harm
def k_deque(inner: Any) -> Any:
    q = collections.deque([1.0, 1.1, 1.2])

    def f(*a, **k):
        s = q.popleft()
        q.append(s)
        return (inner(*a, **k)[0] * s,)

    return f


@harm
def k_cycle_attr(inner: Any) -> Any:
    class W:
        scales = itertools.cycle([1, 2])

        def __call__(self, *a, **k):
            return (inner(*a, **k)[0] * next(self.scales),)

    return W()


@harm
def k_default(inner: Any) -> Any:
    def f(*a, n=[0], **k):
        n[0] += 1
        return (inner(*a, **k)[0] * n[0],)

    return f


@harm
def k_funcattr(inner: Any) -> Any:
    def f(*a, **k):
        f.calls += 1
        out = inner(*a, **k)
        return out if f.calls < 4 else (out[0] * 1.1,)

    f.calls = 0
    return f


@harm
def k_nested(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        def scale(x):
            return x * next(n)

        return tuple(scale(x) for x in inner(*a, **k))

    return f


@harm
def k_map(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        return tuple(map(lambda t: t * next(n), inner(*a, **k)))

    return f


@harm
def k_partial(inner: Any) -> Any:
    def f(n, *a, **k):
        n.append(1)
        return (inner(*a, **k)[0] * len(n),)

    return functools.partial(f, [])


@harm
def k_setattr(inner: Any) -> Any:
    class O:
        pass

    o = O()

    def f(*a, **k):
        o.n = getattr(o, "n", 0) + 1
        return (inner(*a, **k)[0] * o.n,)

    return f


@harm
def k_ctx(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        with torch.autocast("cpu", enabled=next(n) > 3):
            return inner(*a, **k)

    return f


@harm
def k_skip_twice(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        out = inner(*a, **k)
        if next(n) % 2:
            out = inner(out[0], *a[1:], **k)
        return out

    return f


@harm
def k_try_cache(inner: Any) -> Any:
    cache = {}

    def f(*a, **k):
        key = k["timestep"]
        try:
            return cache[key]
        except KeyError:
            cache[key] = inner(*a, **k)
            return cache[key]

    return f


@harm
def k_global(inner: Any) -> Any:
    global CALLS
    CALLS = 0

    def f(*a, **k):
        global CALLS
        CALLS += 1
        return (inner(*a, **k)[0] * (1 if CALLS < 4 else 2),)

    return f


@harm
def k_while(inner: Any) -> Any:
    n = [0]

    def f(*a, **k):
        n[0] += 1
        out, i = inner(*a, **k)[0], 0
        while i < n[0]:
            out = out * 1.01
            i += 1
        return (out,)

    return f


@harm
def k_event(inner: Any) -> Any:
    e = threading.Event()

    def f(*a, **k):
        if e.is_set():
            return (inner(*a, **k)[0] * 1.1,)
        e.set()
        return inner(*a, **k)

    return f


@harm
def k_counter_cls(inner: Any) -> Any:
    c = collections.Counter()

    def f(*a, **k):
        c["n"] += 1
        return (inner(*a, **k)[0] * c["n"],)

    return f


@harm
def k_ternary_args(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        return inner(*[x * 2 if next(n) else x for x in a], **k)

    return f


@harm
def k_tensor_counter(inner: Any) -> Any:
    n = torch.zeros(())

    def f(*a, **k):
        n.add_(1)
        return (inner(*a, **k)[0] * n,)

    return f


@harm
def k_tensor_iadd(inner: Any) -> Any:
    s = Ctr()
    s.t = torch.zeros(())

    def f(*a, **k):
        s.t += 1
        return (inner(*a, **k)[0] * s.t,)

    return f


@harm
def k_global_rng(inner: Any) -> Any:
    g = torch.Generator().manual_seed(0)

    def f(*a, **k):
        out = inner(*a, **k)[0]
        return (out + torch.randn(out.shape, generator=g),)

    return f


@harm
def k_lru(inner: Any) -> Any:
    @functools.lru_cache
    def cached(t):
        return random.random()

    def f(*a, **k):
        return (inner(*a, **k)[0] * cached(1),)

    return f


@harm
def k_weights(inner: Any) -> Any:
    def hook(m, args):
        with torch.no_grad():
            m.proj_out.weight.mul_(1.01)

    return hook


@harm
def k_module_attr(inner: Any) -> Any:
    n = itertools.count()

    def hook(m, args):
        m.gradient_checkpointing = next(n)

    return hook


@harm
def k_closurefn(inner: Any) -> Any:
    n = 0

    def tick():
        nonlocal n
        n += 1
        return n

    def f(*a, **k):
        i = tick()
        return (inner(*a, **k)[0] * i,)

    return f


@harm
def k_cm(inner: Any) -> Any:
    n = itertools.count()

    @contextlib.contextmanager
    def scaled(m):
        m.mul_(next(n))
        yield

    def f(*a, **k):
        with scaled(k["hidden_states"]):
            return inner(*a, **k)

    return f


@harm
def k_last_output(inner: Any) -> Any:
    class W:
        last = None

        def __call__(self, *a, **k):
            out = inner(*a, **k)
            res = out if self.last is None else (0.9 * out[0] + 0.1 * self.last[0],)
            self.last = out
            return res

    return W()


@harm
def k_reads_log(inner: Any) -> Any:
    log = []

    def f(*a, **k):
        out = inner(*a, **k)
        log.append(out[0].norm())
        return (out[0] / max(log),)

    return f


@harm
def k_torch_where(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        out = inner(*a, **k)[0]
        return (torch.where(torch.tensor(next(n) > 3), out, out * 1.1),)

    return f


# ---------- fine
@fine
def l_print(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        print(f"call {next(n)}")
        return inner(*a, **k)

    return f


@fine
def l_logger(inner: Any) -> Any:
    c = {"n": 0}

    def f(*a, **k):
        c["n"] += 1
        t0 = time.perf_counter()
        out = inner(*a, **k)
        logger.info("call %d took %.3f", c["n"], time.perf_counter() - t0)
        return out

    return f


@fine
def l_norms(inner: Any) -> Any:
    log = []

    def f(*a, **k):
        out = inner(*a, **k)
        log.append(out[0].norm().item())
        return out

    return f


class Timed:
    def __init__(self, inner):
        self.inner, self.times, self.n = inner, [], 0

    def forward(self, *a, **k):
        t0 = time.time()
        out = self.inner(*a, **k)
        self.times.append(time.time() - t0)
        self.n += 1
        if self.n % 10 == 0:
            print("mean", sum(self.times) / len(self.times))
        return out


@fine
def l_timed(inner: Any) -> Any:
    return Timed(inner).forward


@fine
def l_hook_nan(inner: Any) -> Any:
    mask = torch.zeros(3, dtype=torch.bool)

    def hook(m, args, out):
        sample = out[0].clone()
        sample[mask] = float("nan")
        return (sample,)

    return hook


@fine
def l_hook_nan2(inner: Any) -> Any:
    mask = torch.zeros(3, dtype=torch.bool)

    def hook(m, args, out):
        out[0][mask] = 0
        return out

    return hook


@fine
def l_prehook_count(inner: Any) -> Any:
    c = {"n": 0}

    def hook(m, args, kwargs):
        c["n"] += 1
        return args, kwargs

    return hook


@fine
def l_prehook_count2(inner: Any) -> Any:
    n = [0]

    def hook(m, args):
        n[0] += 1
        if n[0] % 5 == 0:
            print(n[0], [x.shape for x in args])
        return args

    return hook


@fine
def l_lambda_append(inner: Any) -> Any:
    log = []
    return lambda m, a, o: log.append(o[0].norm())


@fine
def l_lambda_print(inner: Any) -> Any:
    n = itertools.count()
    return lambda *a: print(next(n))


@fine
def l_default_inner(inner: Any) -> Any:
    def f(*a, inner=inner, log=[], **k):
        log.append(len(log))
        return inner(*a, **k)

    return f


@fine
def l_objcounter(inner: Any) -> Any:
    c = Ctr()

    def f(*a, **k):
        i = c.tick()
        if i % 3 == 0:
            logger.warning("call %d", i)
        return inner(*a, **k)

    return f


@fine
def l_try_finally(inner: Any) -> Any:
    times = []

    def f(*a, **k):
        t = time.time()
        try:
            return inner(*a, **k)
        finally:
            times.append(time.time() - t)

    return f


@fine
def l_try_log(inner: Any) -> Any:
    def f(*a, **k):
        try:
            out = inner(*a, **k)
        except Exception as e:
            logger.error("failed %s", e)
            raise
        return out

    return f


@fine
def l_nograd(inner: Any) -> Any:
    def f(*a, **k):
        with torch.no_grad(), torch.profiler.record_function("x"):
            return inner(*a, **k)

    return f


@fine
def l_lock(inner: Any) -> Any:
    lock = threading.Lock()

    def f(*a, **k):
        with lock:
            return inner(*a, **k)

    return f


@fine
def l_cast(inner: Any) -> Any:
    def f(*a, **k):
        k = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in k.items()}
        return inner(*a, **k)

    return f


@fine
def l_scale(inner: Any) -> Any:
    s = 1.05

    def f(*a, **k):
        out = inner(*a, **k)
        return (out[0] * s,) + tuple(out[1:])

    return f


@fine
def l_funcattr(inner: Any) -> Any:
    def f(*a, **k):
        f.calls += 1
        return inner(*a, **k)

    f.calls = 0
    return f


@fine
def l_nonlocal(inner: Any) -> Any:
    n = 0

    def f(*a, **k):
        nonlocal n
        n += 1
        if n == 1:
            print("first call", a, k)
        out = inner(*a, **k)
        return out

    return f


@fine
def l_stats(inner: Any) -> Any:
    stats = {"min": 0.0, "max": 0.0}

    def hook(m, args, out):
        x = out[0]
        stats["min"] = min(stats["min"], x.min().item())
        stats["max"] = max(stats["max"], x.max().item())

    return hook


@fine
def l_defaultdict(inner: Any) -> Any:
    stats = collections.defaultdict(list)

    def hook(m, args, out):
        stats[type(m).__name__].append(float(out[0].float().norm()))

    return hook


@fine
def l_save(inner: Any) -> Any:
    n = itertools.count()

    def hook(m, args, out):
        if next(n) == 7:
            torch.save(out, "never.pt")

    return hook


@fine
def l_record(inner: Any) -> Any:
    n = itertools.count()
    log = []

    def hook(m, args, out):
        rec = {"norm": out[0].norm().item()}
        rec["n"] = next(n)
        log.append(rec)

    return hook


@fine
def l_nan_check(inner: Any) -> Any:
    def f(*a, **k):
        out = inner(*a, **k)
        if torch.isnan(out[0]).any():
            raise RuntimeError("nan")
        return out

    return f


@fine
def l_nan_to_num(inner: Any) -> Any:
    def hook(m, args, out):
        return torch.nan_to_num(out)

    return hook


@fine
def l_memory(inner: Any) -> Any:
    peak = []

    def f(*a, **k):
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        out = inner(*a, **k)
        peak.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        return out

    return f


@fine
def l_hook_module_calls(inner: Any) -> Any:
    def hook(m, args, out):
        m.n_calls_seen = getattr(m, "n_calls_seen", 0) + 1

    return hook


@fine
def l_self_out(inner: Any) -> Any:
    class W:
        def __call__(self, *a, **k):
            self.out = inner(*a, **k)
            return self.out

    return W()


@fine
def l_tqdm(inner: Any) -> Any:
    bar = tqdm.tqdm(disable=True)

    def f(*a, **k):
        out = inner(*a, **k)
        bar.update(1)
        bar.set_postfix(n=1)
        return out

    return f


@fine
def l_ctimer(inner: Any) -> Any:
    @contextlib.contextmanager
    def timer(log):
        t = time.time()
        yield
        log.append(time.time() - t)

    log = []

    def f(*a, **k):
        with timer(log):
            return inner(*a, **k)

    return f


@fine
def l_class_timer(inner: Any) -> Any:
    class Timer:
        total = 0

        def __enter__(self):
            self.t = time.time()
            return self

        def __exit__(self, *e):
            Timer.total += time.time() - self.t

    def f(*a, **k):
        with Timer() as t:
            out = inner(*a, **k)
        return out

    return f


@fine
def l_counter(inner: Any) -> Any:
    c = collections.Counter()

    def f(*a, **k):
        c["calls"] += 1
        c.update(shape=1)
        return inner(*a, **k)

    return f


@fine
def l_set_shapes(inner: Any) -> Any:
    seen = set()

    def f(*a, **k):
        shape = tuple(k["hidden_states"].shape)
        if shape not in seen:
            seen.add(shape)
            print("new shape", shape)
        return inner(*a, **k)

    return f


@fine
def l_datetime(inner: Any) -> Any:
    def f(*a, **k):
        print(datetime.datetime.now(), "start")
        return inner(*a, **k)

    return f


@fine
def l_tensor_log(inner: Any) -> Any:
    total = torch.zeros(())

    def hook(m, args, out):
        total.add_(out[0].float().norm())
        total.mul_(0.9)

    return hook


@fine
def l_retry(inner: Any) -> Any:
    def f(*a, **k):
        for attempt in range(3):
            try:
                return inner(*a, **k)
            except RuntimeError:
                torch.cuda.empty_cache()
        raise RuntimeError("x")

    return f


@fine
def l_closurefn(inner: Any) -> Any:
    n = 0

    def tick():
        nonlocal n
        n += 1
        return n

    def f(*a, **k):
        print(tick())
        return inner(*a, **k)

    return f


@fine
def l_csv(inner: Any) -> Any:
    n = itertools.count()

    def f(*a, **k):
        with open(os.devnull, "a") as h:
            h.write(f"{next(n)},{time.time()}\n")
        return inner(*a, **k)

    return f


# -- a caching module in the denoiser's place


class Around(nn.Module):
    """A module in the denoiser's place, which hands its attributes on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Counted(Around):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


class Cached(Around):
    calls, last = 0, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls % 2 or self.last is None:
            self.last = self.inner(*args, **kwargs)
        return self.last


def put(pipe: Any, make: Callable[..., Any]) -> None:
    """Put what `make` gives onto the denoiser: as a hook where it is one, else in its forward's place."""
    function = make(pipe.transformer.forward)
    names = list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
    if names[:1] == ["m"] and names[-1] in ("out", "o"):
        pipe.transformer.register_forward_hook(function)
    elif names[:1] == ["m"] or ("<lambda>" in getattr(function, "__qualname__", "") and "print" in make.__name__):
        pipe.transformer.register_forward_pre_hook(function, with_kwargs=names[-1:] == ["kwargs"])
    else:
        pipe.transformer.forward = function


@works(
    "Caches and patches",
    "Wrappers and hooks whose outputs go by a counter, an iterator, a clock or random numbers",
    "refused",
    "Before any work, in a sentence that names the patch.",
)
@pytest.mark.parametrize("name", KEEPS)
def test_what_goes_by_other_calls_is_refused(name: str) -> None:
    pipe = FAMILIES["wan"]()
    denoisers = Backbone(pipe).denoisers
    put(pipe, KEEPS[name])
    with pytest.raises(PrismError, match=r"is patched: .* of test_flow goes by earlier calls") as error:
        check_whole(denoisers)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", LOOKS)
def test_what_only_looks_is_let_through(name: str) -> None:
    pipe = FAMILIES["wan"]()
    denoisers = Backbone(pipe).denoisers
    put(pipe, LOOKS[name])
    check_whole(denoisers)


@works(
    "Caches and patches",
    "Wrappers and hooks that write logs: `print`, `logging`, lists of norms, times, `tqdm`, statistics",
    "exact",
    "They are followed through: what they keep decides no output.",
)
@pytest.mark.parametrize("name", ["print", "logger", "timed", "prehook_count", "stats", "ctimer", "scale", "tqdm"])
def test_what_only_looks_stays_exact(name: str) -> None:
    pipe = FAMILIES["wan"]()
    put(pipe, LOOKS[name])
    assert_exact(pipe, runs=["early"])


@works(
    "Caches and patches",
    "A module of one's own around `pipe.transformer`, which hands attributes on",
    "exact",
    "Where it only looks; one that keeps outputs is refused before any work.",
)
def test_a_module_around_the_denoiser() -> None:
    pipe = FAMILIES["wan"]()
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    plain = pipe.transformer
    pipe.transformer = Counted(plain)
    assert_exact(pipe, judge, runs=["early", "draft"])
    assert pipe.transformer.calls
    pipe.transformer = Cached(plain)
    ran: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    for run in RUNS.values():
        with pytest.raises(PrismError, match=r"is patched: Cached.forward of test_flow"):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, **run, **CALL)
    assert not ran


@works(
    "Caches and patches",
    "Wrappers and hooks that change the denoiser's arguments in place, or give a list",
    "exact",
    "Where code of others stands in a denoiser, the winner is called in whole, not answered from its recording.",
)
def test_arguments_changed_in_place() -> None:
    def scaled(pipe: Any) -> None:
        inner = pipe.transformer.forward
        pipe.transformer.forward = lambda *a, **k: (k["hidden_states"].mul_(1.01), list(inner(*a, **k)))[1]

    def hooked(pipe: Any) -> None:
        hook = lambda module, args, kwargs: (kwargs["hidden_states"].mul_(1.01), None)[1]  # noqa: E731
        pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)

    for change in (scaled, hooked):
        pipe = FAMILIES["wan"]()
        change(pipe)
        assert_exact(pipe, runs=["early", "full"])


@works(
    "Caches and patches",
    "A scheduler's method in whose place code stands that goes by a counter",
    "refused",
    "Before any work, by name; one that only looks is exact.",
)
def test_a_patched_scheduler() -> None:
    pipe, count, seen = FAMILIES["wan"](), itertools.count(), []
    judge, step = prism.Judge.untrained(pipe, tap=2, dim=16), pipe.scheduler.step
    pipe.scheduler.step = lambda output, *a, **k: (seen.append(1), step(output, *a, **k))[1]
    assert_exact(pipe, judge, runs=["early"])
    pipe.scheduler.step = lambda output, *a, **k: step(output * (1.05 if next(count) % 6 > 2 else 1), *a, **k)
    with pytest.raises(PrismError, match=r"scheduler .* is patched: .* of test_flow goes by earlier calls"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, **CALL)


@works(
    "Caches and patches",
    "Global hooks of torch, and functions of torch or diffusers in whose place others' stand",
    "refused",
    "Where they go by earlier calls; those that only look are exact.",
)
@pytest.mark.parametrize("where", ["hook", "linear", "attention"])
def test_patches_of_the_whole_process(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, count, seen = FAMILIES["wan"](), itertools.count(), []
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    every, home = torch.nn.modules.module, sys.modules[type(pipe.transformer).__module__]
    linear, attention = torch.nn.functional.linear, home.dispatch_attention_fn
    with monkeypatch.context() as patch:
        if where == "hook":
            handle = every.register_module_forward_hook(lambda module, args, output: seen.append(1))
            assert_exact(pipe, judge, runs=["early"])
            handle.remove()
            handle = every.register_module_forward_hook(
                lambda module, args, output: (
                    output * 1.05 if isinstance(output, torch.Tensor) and next(count) > 99 else None
                )
            )
            patch.setattr(every, "_global_forward_hooks", dict(every._global_forward_hooks))
            handle.remove()
        elif where == "linear":
            patch.setattr(
                torch.nn.functional, "linear", lambda *a, **k: linear(*a, **k) * (1.05 if next(count) > 99 else 1)
            )
        else:
            patch.setattr(
                home, "dispatch_attention_fn", lambda *a, **k: attention(*a, **k) * (1.05 if next(count) > 99 else 1)
            )
        with pytest.raises(PrismError, match=r"is patched: .* of test_flow goes by earlier calls"):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, **CALL)
