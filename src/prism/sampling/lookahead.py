"""Stock calls that keep the clean latents which the denoiser predicts at some steps."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prism.backbone import Backbone, layout
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import tensor_of
from prism.backbone.prediction import Prediction, is_handed
from prism.backbone.wrapping import StopCall
from prism.errors import PrismError
from prism.sampling.plan import Candidate
from prism.sampling.recording import Recording
from prism.sampling.replay import Interceptor, arguments_of_step

if TYPE_CHECKING:
    from prism.sampling.guiding import Guide


class Predictor(Interceptor):
    """A stock call of several candidates, and the clean latents that their denoiser predicts at some steps.

    predicted: by step, (len(candidates), ...), as final latents are. states: by step, the same of the latents that the
    denoiser took there. levels: by step, their noise level in [0, 1000]. grid: (T, H, W) in tokens, if latents are
    packed.

    Args:
        steps: the scheduler's steps, from 1.
        ends: end the call after the last of these steps.
        conditional: at the last of these steps, predict by the conditional pass alone. The unconditional one is not
            computed: what stands for it is the conditional pass's output, from which guidance of every form gives
            that output again.
    """

    def __init__(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        recordings: Mapping[Candidate, Recording],
        steps: Collection[int],
        *,
        record: bool = True,
        ends: bool = True,
        conditional: bool = False,
        predicts: bool = True,
        guide: Guide | None = None,
    ):
        super().__init__(backbone, candidates, recordings, record=record, guide=guide)
        self.steps, self.ends, self.predicts = frozenset(steps), ends, predicts
        self.alone = max(steps) if conditional else 0  # the step whose unconditional pass is left out
        self.last = 0  # the last step that the call made
        self.states: dict[int, Tensor] = {}
        self.levels: dict[int, float] = {}
        self.predicted: dict[int, Tensor] = {}
        self.grid: layout.Grid | None = None
        self._arguments: Mapping[str, Any] = {}  # of the conditional pass at that step
        self._conditional: Any = None  # the conditional pass's output at a step that `is_alone`

    def is_alone(self) -> bool:
        """True at a step whose unconditional pass is not computed."""
        return self.step == self.alone

    def at(self, step: int) -> Tensor:
        """The clean latents predicted at a step. Raises PrismError if the pipeline's scheduler made no such step."""
        if step not in self.predicted:
            raise PrismError(
                f"{type(self.backbone.pipe).__name__} made {self.last} steps, none of which told what its denoiser "
                f'predicts at step {step}; take look="now".'
            )
        return self.predicted[step]

    def _denoise(self, number: int, denoiser: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        alone = self.is_alone()
        candidates, call = len(self.candidates), DenoiserCall.of(denoiser, args, kwargs, self.backbone.family)
        if alone and self.index > 0:
            self.index += 1
            return self._repeated(call, self._conditional)
        if alone and call.batch > candidates:
            self.index += 1
            output = self._of_conditional_rows(call, forward)
        else:
            output = super()._denoise(number, denoiser, forward, *args, **kwargs)
        self.last = self.step
        if alone:
            self._conditional = tensor_of(output)[:candidates]
        if self.index == 1 and self.step in self.steps:
            self.states[self.step] = noisy_latents(call, candidates).detach().clone()
            self._arguments = dict(call.arguments)
            self.grid = call.grid() if layout.is_packed(call.family.layout) else None
            self.levels[self.step] = call.t(self.backbone.pipe.scheduler)
        return output

    def _of_conditional_rows(self, call: DenoiserCall, forward: Any) -> Any:
        """The denoiser's output with the conditional rows in the place of each group's."""
        rows = call.rows(call.conditional(len(self.candidates)))
        return self._repeated(call, tensor_of(forward(**rows.arguments)))

    def _repeated(self, call: DenoiserCall, sample: Tensor) -> Any:
        """A sample of the candidates' rows as the output of a call, whose groups of rows all are given it."""
        return self._output(call, sample.repeat(call.batch // len(self.candidates), *[1] * (sample.ndim - 1)))

    def _sees_steps(self) -> bool:
        return super()._sees_steps() or (self.predicts and is_handed(self.backbone.pipe))

    def _scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        step, scheduler = self.step, self.backbone.pipe.scheduler
        counted = super()._sees_steps()
        make = partial(super()._scheduler_step, inner) if counted else inner
        arguments = arguments_of_step(self.backbone.pipe, inspect.signature(inner), args, kwargs)
        asks = not counted and arguments.get("pred_original_sample") is None  # the scheduler is asked, before the step
        if not self.predicts or step not in self.steps or asks:
            return make(*args, **kwargs)
        prediction = Prediction(scheduler, arguments)
        output = make(*args, **kwargs)
        self.predicted[step] = whole(
            self.backbone, prediction.read(output), self.states[step], self._arguments
        ).detach()
        if self.ends and step == max(self.steps):
            raise StopCall
        return output


def noisy_latents(call: DenoiserCall, samples: int) -> Tensor:
    """The latents (samples, ...) of a denoiser call's conditional rows, without a condition's channels or tokens."""
    return call.parted()[0][call.conditional(samples)]


def whole(backbone: Backbone, clean: Tensor, state: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Predicted latents in the denoiser's layout, with all frames, as a call that ends with them would give.

    state: the noisy latents of the step; arguments: those of a denoiser call with the same rows, by name.
    """
    form = backbone.family.layout
    if layout.is_packed(form) and clean.ndim == 5:
        clean = layout.pack(clean, form)
    clean = backbone.main(clean)
    axis = 1 if layout.is_packed(form) else form.find("T")
    missing = state.shape[axis] - clean.shape[axis]
    if missing > 0:  # the scheduler is given all frames but the first
        clean = torch.cat([state.narrow(axis, 0, missing).to(clean), clean], axis)
    return backbone.finished(clean, arguments)
