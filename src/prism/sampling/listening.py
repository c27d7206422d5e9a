"""A judge's scores of a plain pipeline call, read while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from prism.backbone import Backbone, Tokens
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import check as check_protocol
from prism.backbone.pipeline import check_whole, tensor_of
from prism.backbone.wrapping import around, around_module
from prism.errors import PrismError, quoted
from prism.sampling.stopping import Reject, Watch

_listening: set[int] = set()  # ids of the pipelines that a judge listens to; each is held by one thread


class StepScores(NamedTuple):
    """A judge's scores at one step of a call.

    step: the scheduler's, from 1. t: the noise level of the latents, in [0, 1000]. scores: (rows, num_dimensions)
    float32, a row per video of the call.
    """

    step: int
    t: float
    scores: Tensor


@contextmanager
def listen(judge: Any, pipe: Any, reject: float | Reject | None = None) -> Iterator[list[StepScores]]:
    """The judge's scores of a plain call, while it runs: `with listen(judge, pipe) as scores: pipe(...)`.

    The list grows by one entry per step that runs on the denoiser which the judge reads. The scores are those of the
    conditional rows, before the step. No denoiser call is added and the call's output stays the same to the bit: the
    only cost is the head. Where latents hold NaN, so do their scores.

    Inside the block no other thread can use the pipeline, and its modules are in evaluation mode; afterwards it is as
    it was. Several calls may be made, each starting at step 1 again. The denoiser calls of `best_of_n` and of a judge's
    own scoring inside the block are not scored.

    Args:
        judge: a `Judge` on this pipeline.
        pipe: the pipeline that is going to be called, with any arguments and callbacks.
        reject: give a call up, by the exception `Rejected`, at the first step at which each of its videos would be
            preferred to a random clip of the judge's reference with a lower probability than this; or a `Reject`.

    Raises:
        PrismError: if the judge reads another pipeline or no hidden states, if a cache or a patch stands between the
            denoiser and its blocks, or if the denoiser is compiled as a whole; for `reject` without a reference.
    """
    pipe = pipe.pipe if isinstance(pipe, Backbone) else pipe
    backbone = _backbone_of(judge, pipe)
    watch = None if reject is None else Watch(judge, reject)
    with backbone.held(), ExitStack() as stack:
        if id(pipe) in _listening:
            raise PrismError("This pipeline is listened to already; let one judge listen, or Judge.average of several.")
        _listening.add(id(pipe))
        stack.callback(_listening.discard, id(pipe))
        check_protocol(pipe, backbone.family)
        check_whole(backbone.denoisers)
        _check_listens(backbone)
        listener = _Listener(backbone, judge, watch)
        for denoiser in backbone.denoisers:
            stack.enter_context(around_module(denoiser, partial(listener.denoise, denoiser)))
        if not backbone.family.counts_steps_by_calls:  # such a family's pipelines step copies of the scheduler
            stack.enter_context(around(pipe.scheduler, "step", listener.scheduler_step))
            if hasattr(pipe.scheduler, "set_timesteps"):
                stack.enter_context(around(pipe.scheduler, "set_timesteps", listener.start))
        yield listener.scores
        if watch is not None:
            watch.close()


class _Listener:
    """The wrappers of a pipeline's denoisers and scheduler, which count its steps and score its conditional rows."""

    def __init__(self, backbone: Backbone, judge: Any, watch: Watch | None = None):
        self.backbone, self.judge, self.watch = backbone, judge, watch
        self.scores: list[StepScores] = []
        self.step, self.index = 1, 0  # the 1-based step, and the denoiser calls made in it so far
        self.t = math.inf  # of the last denoiser call
        # Tokens of both groups of rows (CFG in one batch) at t: the scheduler's step shows which are conditional.
        self.pending: tuple[float, Tokens] | None = None

    def start(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Start at step 1 again, as `scheduler.set_timesteps` is called."""
        self.step, self.index, self.pending = 1, 0, None
        return inner(*args, **kwargs)

    def denoise(self, denoiser: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        backbone, family = self.backbone, self.backbone.family
        call = DenoiserCall.of(denoiser, args, kwargs, family)
        t = call.t(backbone.pipe.scheduler)
        if family.counts_steps_by_calls and t != self.t:  # not the unconditional call of the same step
            self.step, self.index = (1 if self.t == math.inf or t > self.t else self.step + 1), 0
        self.t, self.index = t, self.index + 1
        if self.index > 1 or denoiser is not backbone.denoiser:
            return forward(*args, **kwargs)
        _check_listens(backbone)
        tokens, output = backbone.read(call.arguments, self.judge.taps, False, forward, denoiser)
        if family.cfg == "two_calls":  # the conditional one comes first
            self._score(t, tokens)
        else:
            self.pending = t, tokens
        return output

    def scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if self.pending is not None:
            (t, tokens), self.pending = self.pending, None
            self._score(t, tokens[self.backbone.family.conditional(len(tokens), len(tensor_of(output, "prev_sample")))])
        self.step, self.index = self.step + 1, 0
        return output

    def _score(self, t: float, tokens: Tokens) -> None:
        if hasattr(self.judge, "check_level"):
            self.judge.check_level(t)
        self.scores.append(StepScores(self.step, t, self.judge.score_tokens(tokens)))
        if self.watch is not None and (rejected := self.watch.see(self.scores[-1])) is not None:
            self.step, self.index, self.t, self.pending = 1, 0, math.inf, None  # the next denoiser call is another's
            raise rejected


def _backbone_of(judge: Any, pipe: Any) -> Backbone:
    """The judge's backbone, which must be that of `pipe`."""
    backbone = getattr(judge, "backbone", None)
    if not hasattr(judge, "score_tokens") or not isinstance(backbone, Backbone):
        raise PrismError(
            f"listen needs a judge that reads hidden states, and found {quoted(judge, 80)} of type "
            f"{type(judge).__name__}; load one with Judge.from_pretrained(head, pipe)."
        )
    if backbone.pipe is not pipe:
        raise PrismError(
            "The judge was put onto another pipeline; use Judge.from_pretrained(head, pipe) with this one."
        )
    return backbone


def _check_listens(backbone: Backbone) -> None:
    if not backbone.listens:
        raise PrismError(
            "The denoiser is compiled as a whole, and no block of it can be listened to without changing what it "
            "computes; compile its blocks alone, with compile_repeated_blocks()."
        )
