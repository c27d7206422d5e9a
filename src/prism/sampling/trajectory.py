"""Record a stock call: its final latents, noisy states on the way, and the clean latents predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.backbone.arguments import embedded_rows
from prism.errors import PrismError, quoted
from prism.sampling.lookahead import Predictor
from prism.sampling.plan import Candidate, generator_of
from prism.sampling.recording import Recording


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
    arguments = {**call, "generator": generator_of(seed)}
    if backbone.family.takes_prompts and not embedded_rows(call):
        arguments["prompt"] = prompt
    return _recorded(backbone, [seed], arguments, steps, predicted)[0]


def sample_together(
    backbone: Backbone, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any],
    steps: Collection[int] = (), *, predicted: bool = True,
) -> list[Trajectory]:  # fmt: skip
    """Run one stock call of several candidates, each with a prompt and a seed of its own; a trajectory for each.

    The latents of each are those of `sample` up to the rounding of batches; of one candidate to the bit. Arguments and
    errors as of `sample`; give several only of families that take a batch (`prism.sampling.arguments.batch_size_of`).
    """
    if len(seeds) == 1:
        return [sample(backbone, prompts[0], seeds[0], call, steps, predicted=predicted)]
    return _recorded(backbone, seeds, {**call, **backbone.batch(prompts, seeds, call)}, steps, predicted)


def _recorded(
    backbone: Backbone, seeds: Sequence[int], arguments: Mapping[str, Any], steps: Collection[int], predicted: bool
) -> list[Trajectory]:
    """The trajectories of a stock call whose rows draw from generators of `seeds`."""
    candidates = [Candidate(number, seed) for number, seed in enumerate(seeds)]
    recorder = Predictor(
        backbone, candidates, {each: Recording() for each in candidates}, steps, record=False, ends=False,
        predicts=predicted,
    )  # fmt: skip
    recorder.run({**arguments, "output_type": "latent"})
    latents = recorder.finished().cpu()
    missing = sorted(set(steps) - set(recorder.states))
    if missing:
        raise PrismError(f"The call makes no step {missing[0]}; --states takes steps from 1 to {recorder.last}.")
    if not steps:
        return [Trajectory(row) for row in latents]
    order = sorted(steps)
    t = torch.tensor([recorder.levels[step] for step in order], dtype=torch.float32)
    states = torch.stack([recorder.states[step] for step in order], 1).cpu()
    if not predicted:
        return [Trajectory(row, each, t) for row, each in zip(latents, states)]
    lacking = sorted(set(steps) - set(recorder.predicted))
    if lacking:
        raise PrismError(
            f"{type(backbone.pipe).__name__} steps copies of its scheduler, so that the predicted clean latents are "
            "not seen; leave them out (--no-predicted)."
        )
    clean = torch.stack([recorder.predicted[step] for step in order], 1).cpu()
    if clean.shape[2:] != latents.shape[1:]:
        raise PrismError(
            f"The predicted clean latents of {type(backbone.pipe).__name__} have the shape "
            f"{quoted(tuple(clean.shape[2:]))} and the final ones {quoted(tuple(latents.shape[1:]))}, as the "
            "scheduler steps a part of them; leave them out (--no-predicted)."
        )
    return [Trajectory(row, each, t, made) for row, each, made in zip(latents, states, clean)]
