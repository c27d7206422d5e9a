"""A judge's scores of a plain pipeline call, read while it runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prism.backbone import Backbone, Tokens, control, prediction
from prism.backbone.conditioning import Conditioning
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import check as check_protocol
from prism.backbone.pipeline import tensor_of
from prism.backbone.prediction import Prediction
from prism.backbone.wrapping import around, around_module
from prism.errors import DRAWS, PrismError, quoted
from prism.errors import whole as whole_number
from prism.judge.checks import noise_levels
from prism.sampling.arguments import judge_at_of
from prism.sampling.lookahead import noisy_latents, whole
from prism.sampling.looks import DEFAULT_JUDGE_AT
from prism.sampling.replay import arguments_of_step
from prism.sampling.stopping import Reject, Watch

_listening: set[int] = set()  # ids of the pipelines that a judge listens to; each is held by one thread


class _Scores(NamedTuple):
    step: int
    t: float
    scores: Tensor


class StepScores(_Scores):
    """A judge's scores at one step of a call, a tuple (step, t, scores).

    step: the scheduler's, from 1. t: the noise level of the latents, in [0, 1000]. scores: (rows, num_dimensions)
    float32, a row per video of the call. ahead: the same of the clean latents that the denoiser predicts at this step;
    None without a look ahead, and before the step is made.
    """

    ahead: Tensor | None = None


@contextmanager
def listen(
    judge: Any,
    pipe: Any,
    reject: float | Reject | None = None,
    look: Literal["now", "ahead"] = "now",
    judge_at: float | None = None,
    num_draws: int = 2,
) -> Iterator[list[StepScores]]:
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
        look: "ahead" gives each entry the scores of the clean latents that the denoiser, with guidance, predicts at
            that step, as `ahead`. The judge reads them at `judge_at`, which costs `num_draws` truncated denoiser passes
            per step; the call's output stays the same.
        judge_at: the noise level in (0, 1000] to which predicted latents are re-noised; None: 700.
        num_draws: noise draws that are averaged over, the same at each step and for all rows.

    Raises:
        PrismError: if the judge reads another pipeline or no hidden states, if a cache or a patch stands between the
            denoiser and its blocks, or if the denoiser is compiled as a whole; for `reject` without a reference; for a
            look ahead where the scheduler does not tell what the denoiser predicts.
    """
    pipe = pipe.pipe if isinstance(pipe, Backbone) else pipe
    backbone = _backbone_of(judge, pipe)
    ahead = _ahead(backbone, look, judge_at, num_draws)
    watch = None if reject is None else Watch(judge, reject)
    with backbone.held(), ExitStack() as stack:
        if id(pipe) in _listening:
            raise PrismError("This pipeline is listened to already; let one judge listen, or Judge.average of several.")
        _listening.add(id(pipe))
        stack.callback(_listening.discard, id(pipe))
        check_protocol(pipe, backbone.family)
        control.check_networks(backbone)
        _check_listens(backbone)
        if ahead is not None:
            stack.enter_context(backbone.freed())  # offloaded models are freed at the end, not at each step
        beside = stack.enter_context(control.heard(backbone))
        listener = _Listener(backbone, judge, beside, watch, ahead)
        for denoiser in backbone.denoisers:
            stack.enter_context(around_module(denoiser, partial(listener.denoise, denoiser)))
        if not backbone.family.counts_steps_by_calls:  # such a family's pipelines step copies of the scheduler
            stack.enter_context(around(pipe.scheduler, "step", listener.scheduler_step))
            if hasattr(pipe.scheduler, "set_timesteps"):
                stack.enter_context(around(pipe.scheduler, "set_timesteps", listener.start))
        elif ahead is not None:
            stack.enter_context(around(pipe.scheduler, "step", listener.handed))
        yield listener.scores
        if watch is not None:
            watch.close()


class _Listener:
    """The wrappers of a pipeline's denoisers and scheduler, which count its steps and score its conditional rows."""

    def __init__(
        self,
        backbone: Backbone,
        judge: Any,
        beside: control.Heard,
        watch: Watch | None = None,
        ahead: tuple[float, int] | None = None,
    ):
        self.backbone, self.judge, self.beside, self.watch, self.ahead = backbone, judge, beside, watch, ahead
        self.scores: list[StepScores] = []
        self.step, self.index = 1, 0  # the 1-based step, and the denoiser calls made in it so far
        self.t = math.inf  # of the last denoiser call
        self.call: DenoiserCall | None = None  # the conditional one of this step, if it was read
        # Tokens of both groups of rows (CFG in one batch) at t: the scheduler's step shows which are conditional.
        self.pending: tuple[float, Tokens] | None = None

    def start(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Start at step 1 again, as `scheduler.set_timesteps` is called."""
        self.step, self.index, self.pending, self.call = 1, 0, None, None
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
        self.call = call
        tokens, output = backbone.read(call.arguments, self.judge.taps, False, forward, denoiser)
        if family.cfg == "two_calls":  # the conditional one comes first
            self._score(t, tokens)
        else:
            self.pending = t, tokens
        return output

    def scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        prediction = self._prediction(inner, args, kwargs)
        output = inner(*args, **kwargs)
        samples = len(tensor_of(output, "prev_sample"))
        if self.pending is not None:
            (t, tokens), self.pending = self.pending, None
            self._score(t, tokens[self.backbone.family.conditional(len(tokens), samples)])
        if prediction is not None:
            self._look_ahead(prediction.read(output), samples)
        self.step, self.index, self.call = self.step + 1, 0, None
        return output

    def handed(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of a scheduler that is first asked for the clean latents, and then given them back to step with."""
        arguments = arguments_of_step(self.backbone.pipe, inspect.signature(inner), args, kwargs)
        prediction = None if arguments.get("pred_original_sample") is None else self._prediction(inner, args, kwargs)
        output = inner(*args, **kwargs)
        if prediction is not None:
            self._look_ahead(prediction.read(output), len(arguments["sample"]))
        return output

    def _prediction(self, inner: Any, args: Any, kwargs: Any) -> Prediction | None:
        """What is predicted at a step that is about to be made; None where nobody asks."""
        if self.ahead is None or self.call is None:
            return None
        pipe = self.backbone.pipe
        return Prediction(pipe.scheduler, arguments_of_step(pipe, inspect.signature(inner), args, kwargs))

    def _look_ahead(self, clean: Tensor, samples: int) -> None:
        """Score predicted latents, under the conditions of the step's own call."""
        assert self.ahead is not None
        assert self.call is not None
        (judge_at, num_draws), (call, self.call), backbone = self.ahead, (self.call, None), self.backbone
        clean = whole(backbone, clean, noisy_latents(call, samples), call.arguments)
        beside = self.beside.conditioning(call, samples)
        condition = Conditioning.of(call, call.conditional(samples), type(backbone.pipe), beside)
        generator, draws = torch.Generator().manual_seed(0), []
        for _ in range(num_draws):
            noise = torch.randn((1, *clean.shape[1:]), generator=generator).to(clean).expand_as(clean)
            tokens = backbone.tokens(backbone.add_noise(clean, judge_at, noise), condition, judge_at, self.judge.taps)
            draws.append(self.judge.score_tokens(tokens))
        self.scores[-1].ahead = torch.stack(draws).mean(0)

    def _score(self, t: float, tokens: Tokens) -> None:
        if hasattr(self.judge, "check_level"):
            self.judge.check_level(t)
        self.scores.append(StepScores(self.step, t, self.judge.score_tokens(tokens)))
        if self.watch is not None and (rejected := self.watch.see(self.scores[-1])) is not None:
            self.step, self.index, self.t, self.pending, self.call = (
                1,
                0,
                math.inf,
                None,
                None,
            )  # the next denoiser call is another's
            raise rejected


def _ahead(backbone: Backbone, look: Any, judge_at: Any, num_draws: Any) -> tuple[float, int] | None:
    """The level and the number of draws of a look ahead, checked; None for a look at the latents as they are."""
    if not isinstance(look, str) or look not in ("now", "ahead"):
        raise PrismError(f"look is one of now, ahead, as both passes of a call run; found {quoted(look, 60)}.")
    draws = whole_number("num_draws", num_draws, 1, DRAWS)
    if look == "now":
        if judge_at is not None:
            raise PrismError('judge_at is the level of looks ahead; give look="ahead" with it, or leave it out.')
        return None
    backbone.family.check_scheduler(backbone.pipe.scheduler)
    prediction.check(backbone.pipe, backbone.family.counts_steps_by_calls)
    level = judge_at_of(judge_at, DEFAULT_JUDGE_AT, backbone.t_range)
    noise_levels(backbone, [level])
    return level, draws


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
