"""The cost of a run, counted where the work is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone import Backbone, control
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import vae_of
from prism.backbone.wrapping import StopForward, around, around_module

_ran: dict[int, int] = {}  # blocks that ran, by the id of the denoiser, where they are counted one by one
PARTS = ("denoiser", "head", "vae", "text", "scheduler")


@dataclass
class Ledger:
    """The cost of a run. A row is one sample of a denoiser's batch; one stopped after k of L blocks counts k/L.

    backward_rows: the part of denoiser_rows that went back through blocks, for a judge's guidance. One row back through
    k of L blocks counts k/L too, as weights take no gradient; blocks that are computed again on the way count as well.
    control_rows: rows of a ControlNet, which runs beside the denoiser and is no part of denoiser_rows.
    seconds: wall time of the whole run. parts: the seconds spent in the denoiser (with a ControlNet's), the head, the
    VAE, the text encoders and the scheduler's steps; the rest goes to the pipeline's loop and set-up, and to PRISM.
    peak_memory_bytes: peak memory allocated on the accelerator during the run; on a CPU the process's peak so far.
    """

    denoiser_rows: float = 0.0
    denoiser_calls: int = 0
    vae_encodes: int = 0
    vae_decodes: int = 0
    text_encodings: int = 0
    head_calls: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    peak_memory_bytes: int = 0
    backward_rows: float = 0.0
    control_rows: int = 0

    def __repr__(self) -> str:
        counts = f"{self.denoiser_rows:.4g} denoiser rows, {self.vae_decodes} VAE decodes, {self.head_calls} head calls"
        return f"Ledger({counts}, {self.seconds:.3g} s)"

    @property
    def overhead_seconds(self) -> float:
        """Seconds spent on everything but the denoiser, the head and the VAE."""
        return self.seconds - sum(self.parts[part] for part in ("denoiser", "head", "vae"))

    def with_counts_of(self, others: Iterable[Ledger]) -> Ledger:
        """This ledger with the counts of all processes that shared a run; seconds and memory stay this process's."""
        counted = ("denoiser_rows", "denoiser_calls", "vae_encodes", "vae_decodes", "text_encodings", "head_calls",
                   "backward_rows", "control_rows")  # fmt: skip
        ledgers = list(others)
        return replace(self, **{name: sum(getattr(ledger, name) for ledger in ledgers) for name in counted})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """A counter that writes a run's cost into its ledger while it is open."""

    def __init__(self, backbone: Backbone, judge: Any = None, on_rows: Callable[[float], Any] | None = None):
        self.backbone, self.judge, self.on_rows, self.ledger = backbone, judge, on_rows, Ledger()
        self._block_rows = self._backward_rows = 0
        self._cuda: torch.device | None = None

    @contextmanager
    def open(self) -> Iterator[Ledger]:
        """Count the work done inside the block. All that is wrapped is restored at its end, also after an exception."""
        pipe = self.backbone.pipe
        start = time.perf_counter()
        with ExitStack() as stack:
            for denoiser in self.backbone.denoisers:
                stack.enter_context(around_module(denoiser, partial(self._denoise, denoiser), reads=True))
            if (net := control.controlnet(self.backbone)) is not None:
                stack.enter_context(around_module(net, partial(self._control, net), reads=True))
            for name, module in self.backbone.encoders.items():
                stack.enter_context(around_module(module, partial(self._encode, name), reads=True))
            for name, counted in (("decode", self._vae_decode), ("encode", self._vae_encode)):
                if hasattr(vae_of(pipe), name):
                    stack.enter_context(around(vae_of(pipe), name, counted, reads=True))
            if not self.backbone.family.counts_steps_by_calls:
                stack.enter_context(around(pipe.scheduler, "step", self._scheduler_step, reads=True))
            if hasattr(self.judge, "score_tokens"):
                stack.enter_context(around(self.judge, "score_tokens", self._score, reads=True))
            try:
                yield self.ledger
            finally:
                self.ledger.seconds = time.perf_counter() - start
                self.ledger.peak_memory_bytes = (
                    _peak_resident_bytes() if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
                )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda is not None:
                torch.cuda.synchronize(self._cuda)
            self.ledger.parts[part] += time.perf_counter() - start

    def _denoise(self, denoiser: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
        noisy = DenoiserCall.of(denoiser, args, kwargs, self.backbone.family).noisy
        if self._cuda is None and noisy.is_cuda:  # read from the latents: `pipe.device` walks every module
            self._cuda = noisy.device
            torch.cuda.reset_peak_memory_stats(noisy.device)
        blocks, before = self.backbone.num_blocks, blocks_ran(denoiser)
        try:
            with self._timed("denoiser"):
                return inner(*args, **kwargs)
        except StopForward as stop:
            blocks = stop.block
            raise
        finally:
            blocks = blocks_ran(denoiser) - before if id(denoiser) in _ran else blocks
            self.ledger.denoiser_calls += 1
            self._add(blocks * len(noisy))

    def _control(self, net: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self.ledger.control_rows += control.call_of(self.backbone, net, args, kwargs).batch
        with self._timed("denoiser"):
            return inner(*args, **kwargs)

    def _add(self, block_rows: int) -> None:
        done = self.ledger.denoiser_rows
        self._block_rows += block_rows  # integers: a sum of fractions k/L would drift
        self.ledger.denoiser_rows = self._block_rows / self.backbone.num_blocks
        if self.on_rows is not None:
            self.on_rows(self.ledger.denoiser_rows - done)

    @contextmanager
    def backward(self, rows: int, blocks: int) -> Iterator[None]:
        """Count rows that go back through the denoiser's first blocks, on their way from a judge's scores."""
        with self._timed("denoiser"):
            yield
        self.ledger.head_calls += len(self.judge.members) * rows
        self._backward_rows += rows * blocks
        self.ledger.backward_rows = self._backward_rows / self.backbone.num_blocks
        self._add(rows * blocks)

    def _vae_decode(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self.ledger.vae_decodes += _rows(args, kwargs)
        with self._timed("vae"):
            return inner(*args, **kwargs)

    def _vae_encode(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timed("vae"):
            output = inner(*args, **kwargs)
        self.ledger.vae_encodes += _rows(args, kwargs)
        return output

    def _scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timed("scheduler"):
            return inner(*args, **kwargs)

    def _score(self, inner: Any, tokens: Any) -> Tensor:
        self.ledger.head_calls += len(tokens.visual) * len(self.judge.members)
        with self._timed("head"):
            scores: Tensor = inner(tokens)
        return scores

    def _encode(self, name: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timed("text"):
            output = inner(*args, **kwargs)
        if name.startswith("text"):
            self.ledger.text_encodings += _rows(args, kwargs)
        return output


@contextmanager
def blocks_counted(denoiser: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, ledgers count the blocks that a denoiser computes one by one, for step caches that skip some.

    The counter is set in each block's `forward`, beneath all hooks that are put on later and may skip it.
    """

    def count(inner: Any, *args: Any, **kwargs: Any) -> Any:
        _ran[id(denoiser)] += 1
        return inner(*args, **kwargs)

    with ExitStack() as stack:
        _ran[id(denoiser)] = 0
        stack.callback(_ran.pop, id(denoiser))
        for block in blocks:
            stack.enter_context(around(block, "forward", count))
        yield


def blocks_ran(denoiser: nn.Module) -> int:
    """The blocks that a denoiser has computed since they are counted one by one; 0 where they are not."""
    return _ran.get(id(denoiser), 0)


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The batch size of a call: the length of its first tensor."""
    return len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
