"""Record one stock call of one seed: its final latents, noisy states on the way, and the clean latents predicted."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prism.backbone import Backbone, layout
from prism.backbone.arguments import embedded_rows
from prism.backbone.conditioning import Conditioning
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.prediction import Prediction
from prism.errors import PrismError, quoted
from prism.sampling.plan import Candidate, generator_of
from prism.sampling.recording import Recording
from prism.sampling.replay import Interceptor, arguments_of_step


def candidate_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's candidate: a function of the run's seed, the prompt and the candidate's index alone."""
    text = f"{seed} {prompt} {index}".encode(errors="surrogatepass")
    return int(hashlib.sha256(text).hexdigest()[:15], 16)


class Trajectory(NamedTuple):
    """The latents of one call, on the CPU, in the dtypes that the pipeline computed in.

    latents: (...) final latents, normalised, in the layout of the sampling loop.
    states: (S, ...) noisy latents that the denoiser took at the S recorded steps; None where nothing was recorded.
    t: (S,) float32, noise levels of the states in [0, 1000], or None.
    predicted: (S, ...) clean latents that the guided denoiser predicted at these steps, or None.
    """

    latents: Tensor
    states: Tensor | None = None
    t: Tensor | None = None
    predicted: Tensor | None = None


def sample(
    backbone: Backbone, prompt: str, seed: int, call: Mapping[str, Any], steps: Collection[int] = (), *,
    predicted: bool = True,
) -> Trajectory:  # fmt: skip
    """Run the stock call `pipe(prompt, generator=..., **call)` alone, so that nothing but the seed decides its latents.

    Args:
        backbone: whose pipeline samples.
        prompt: what the video should show; not used where the pipeline takes none, or `call` gives embeddings.
        seed: of the call's CPU generator.
        call: arguments of the pipeline, normalised (`prism.backbone.arguments.normalised`).
        steps: steps whose states are kept, from 1 (pure noise), counted as cuts are.
        predicted: keep the predicted clean latents at these steps too.

    Raises:
        PrismError: for steps that the call does not make, or from which no prediction can be read; for a scheduler
            whose noise no seed decides.
    """
    recorder = _Recorder(backbone, Candidate(0, seed), steps, predicted and bool(steps))
    arguments = {**call, "generator": generator_of(seed), "output_type": "latent"}
    if backbone.family.takes_prompts and not embedded_rows(call):
        arguments["prompt"] = prompt
    recorder.run(arguments)
    latents = recorder.finished()[0].cpu()
    missing = sorted(set(steps) - set(recorder.states))
    if missing:
        raise PrismError(f"The call makes no step {missing[0]}; --states takes steps from 1 to {recorder.last}.")
    if not steps:
        return Trajectory(latents)
    order = sorted(steps)
    t = torch.tensor([recorder.levels[step] for step in order], dtype=torch.float32)
    states = torch.stack([recorder.states[step] for step in order])
    if not recorder.predicts:
        return Trajectory(latents, states, t)
    lacking = sorted(set(steps) - set(recorder.predicted))
    if lacking:
        raise PrismError(
            f"{type(backbone.pipe).__name__} steps copies of its scheduler, so that the predicted clean latents are "
            "not seen; leave them out (--no-predicted)."
        )
    clean = torch.stack([recorder.predicted[step] for step in order])
    if clean.shape[1:] != latents.shape:
        raise PrismError(
            f"The predicted clean latents of {type(backbone.pipe).__name__} have the shape "
            f"{quoted(tuple(clean.shape[1:]))} and the final ones {quoted(tuple(latents.shape))}, as the "
            "scheduler steps a part of them; leave them out (--no-predicted)."
        )
    return Trajectory(latents, states, t, clean)


class _Recorder(Interceptor):
    """A stock call of one candidate whose states and predictions are kept at some steps."""

    def __init__(self, backbone: Backbone, candidate: Candidate, steps: Collection[int], predicts: bool):
        super().__init__(backbone, [candidate], {candidate: Recording()}, record=False)
        self.steps, self.predicts, self.last = frozenset(steps), predicts, 0
        self.states: dict[int, Tensor] = {}
        self.levels: dict[int, float] = {}
        self.condition: Conditioning | None = None
        self.predicted: dict[int, Tensor] = {}

    def _denoise(self, number: int, denoiser: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = super()._denoise(number, denoiser, forward, *args, **kwargs)
        self.last = self.step
        if self.index == 1 and self.step in self.steps:  # the conditional pass
            call = DenoiserCall.of(denoiser, args, kwargs, self.backbone.family)
            noisy = call.noisy[call.conditional(1)]
            axis = layout.channel_axis(self.backbone.family.layout)
            noisy = noisy.narrow(axis, 0, self.backbone.family.channels(call.config, noisy))
            self.states[self.step] = noisy[0].detach().to("cpu", copy=True)
            self.condition = Conditioning.of(call, call.conditional(1), type(self.backbone.pipe))
            self.levels[self.step] = call.t(self.backbone.pipe.scheduler)
        return output

    def _scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        step, scheduler, prediction = self.step, self.backbone.pipe.scheduler, None
        if self.predicts and step in self.steps:
            arguments = arguments_of_step(self.backbone.pipe, inspect.signature(inner), args, kwargs)
            prediction = Prediction(scheduler, arguments)
        output = super()._scheduler_step(inner, *args, **kwargs)
        if prediction is not None:
            clean = self._with_condition(prediction.read(output), self.states[step][None])
            self.predicted[step] = clean[0].detach().to("cpu", copy=True)
        return output

    def _with_condition(self, clean: Tensor, state: Tensor) -> Tensor:
        """Predicted latents in the denoiser's layout, completed by a condition's frames, which it is given clean."""
        form = self.backbone.family.layout
        if layout.is_packed(form) and clean.ndim == 5:
            clean = layout.pack(clean, form)
        clean = self.backbone.main(clean)
        axis = 1 if layout.is_packed(form) else form.find("T")
        missing = state.shape[axis] - clean.shape[axis]
        if missing > 0:  # the scheduler is given all frames but the first
            clean = torch.cat([state.narrow(axis, 0, missing).to(clean), clean], axis)
        if self.condition is not None and self.condition.given is not None and self.condition.kept is not None:
            clean = torch.where(self.condition.given, self.condition.kept.to(clean.dtype), clean)
        return clean
