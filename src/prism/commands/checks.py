"""Checks of a pipeline and its row of facts: the tests' matrix runs them on a tiny pipeline of every family, and
`prism doctor --family` on the user's pipeline with the user's row.

Each check takes a `Subject`, raises `Mismatch` with the facts to look at, and returns numbers worth printing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import ImageOps
from torch import Tensor

from prism.backbone import layout
from prism.backbone.videos import denormalise, normalise
from prism.commands.subject import SEED, Subject, difference, require
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling import best_of_n


def grid(subject: Subject) -> dict[str, Any]:
    """Changing a latent cell changes the token at its position on the grid more than any other token.

    Where the call holds a condition as its first frame, the latent's values there are not read.
    """
    backbone, family = subject.backbone, subject.backbone.family
    conditioning = backbone.condition(subject.prompts(1), **subject.call)
    shape = subject.latents().shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    t = sum(backbone.t_range) / 2
    plain = backbone.tokens(latents, conditioning, t, 1)
    expected = (1, math.prod(plain.grid), backbone.widths[0])
    require(
        tuple(plain.visual.shape) == expected,
        f"tokens after block 1 have the shape {tuple(plain.visual.shape)} instead of {expected}: say widths",
    )
    cells = layout.unpack(latents, family.layout, plain.grid)
    sizes = [-(-extent // tokens) for extent, tokens in zip(cells.shape[2:], plain.grid)]  # the last may be padded
    condition_frames = 0 if conditioning.given is None else 1  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    positions = [(min(condition_frames, plain.grid[0] - 1), 0, 0), tuple(extent - 1 for extent in plain.grid)]
    for _ in range(4):
        positions.append(
            tuple(int(rng.integers(min(condition_frames, n - 1) if i == 0 else 0, n)) for i, n in enumerate(plain.grid))
        )
    changes = cells.repeat(len(positions), *[1] * (cells.ndim - 1))  # a row for each position
    for row, position in zip(changes, positions):
        cell = [slice(p * size, (p + 1) * size) for p, size in zip(position, sizes)]
        row[:, cell[0], cell[1], cell[2]] += 5
    repeated = conditioning[[0] * len(positions)]
    moved = backbone.tokens(layout.pack(changes, family.layout), repeated, t, 1).visual - plain.visual
    for norms, position in zip(moved.norm(dim=-1), positions):
        moved_most = tuple(int(i) for i in np.unravel_index(int(norms.argmax()), plain.grid))
        require(
            moved_most == position,
            f"on the grid {plain.grid} a change at {position} moves most the token at {moved_most}: look at layout, "
            "patch, token_form, video_output, tokens_before",
        )
    if condition_frames:
        changed = cells.clone()
        changed[:, :, 0] += 5
        moved_tokens = backbone.tokens(layout.pack(changed, family.layout), conditioning, t, 1)
        require(
            torch.equal(moved_tokens.visual, plain.visual),
            "a latent's given frame is read: look at first_frame_pipelines",
        )
    return {"grid": "x".join(map(str, plain.grid)), "tap": f"{backbone.default_tap}/{backbone.num_blocks}"}


def early_exit(subject: Subject) -> dict[str, Any]:
    """Stopping after a block gives the same states to the bit, and later blocks are not called."""
    backbone = subject.backbone
    conditioning = backbone.condition(subject.prompts(1), **subject.call)
    latents, t, tap = subject.latents(), sum(backbone.t_range) / 2, backbone.default_tap
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i + 1)) for i, b in enumerate(backbone.blocks)]
    try:
        stopped = backbone.tokens(latents, conditioning, t, tap)
        first, expected = list(ran), list(range(1, tap + 1))
        whole = backbone.tokens(latents, conditioning, t, tap, stop=False)
    finally:
        for handle in handles:
            handle.remove()
    require(
        first == expected and ran[tap:] == list(range(1, backbone.num_blocks + 1)),
        f"up to block {tap} the blocks {first} ran: say blocks in the order in which they run, each once a call",
    )
    require(torch.equal(stopped.visual, whole.visual), "the tokens of a stopped pass are others: look at blocks")
    return {}


def clock(subject: Subject) -> dict[str, Any]:
    """The noise level of every timestep of a stock run maps back to the timestep, and noising to it equals the
    scheduler's noising."""
    backbone, family = subject.backbone, subject.backbone.family
    scheduler = backbone.pipe.scheduler
    try:
        family.check_scheduler(scheduler)
    except PrismError as error:
        raise PrismError(f"Look at clock, or at the scheduler: {error}") from error
    seen = subject.recorded().seen
    steps = [float(call.timestep.max()) for call, _ in seen]
    levels = [family.t_of(scheduler, step) for step in steps]
    strength = subject.call.get("strength", 1.0) if subject.leaves_steps else 1.0
    summary = f"timesteps {steps[0]:g} to {steps[-1]:g} are taken for t = {levels[0]:g} to {levels[-1]:g}"
    require(
        levels == sorted(levels, reverse=True) and levels[0] > 0.8 * backbone.t_range[1] * strength,
        f"{summary}, which does not fall from noise: look at clock and pure_noise_timestep",
    )
    z, noise = torch.randn(2, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for step, t in zip(steps, levels):
        alpha, sigma, timestep = family.level(scheduler, torch.tensor([t]))
        require(
            math.isclose(float(timestep), step, rel_tol=1e-4, abs_tol=1e-3),
            f"the timestep {step:g} is t = {t:g}, which is the timestep {float(timestep):g}: look at clock "
            "and pure_noise_timestep",
        )
        if t == 0:  # exactly clean here, and only nearly so in some schedulers
            continue
        expected = _scheduler_noise(family, scheduler, z, noise, step)
        table = getattr(scheduler, "timesteps", steps)
        whole = isinstance(table, Tensor) and not table.is_floating_point()  # rounds a level by up to 1/1000
        atol = 1.1e-3 * float((noise - z).abs().max()) if whole else 3e-3
        noised = alpha * z + sigma * noise
        require(
            torch.allclose(noised, expected, atol=atol, rtol=1e-3),
            f"at the timestep {step:g} a latent is noised otherwise than by {type(scheduler).__name__}, by up to "
            f"{float((noised - expected).abs().max()):.1g}: look at clock",
        )
    return {}


def _scheduler_noise(family: Any, scheduler: Any, z: Tensor, noise: Tensor, step: float) -> Tensor:
    """`z` noised to the timestep `step`, by the formula of the scheduler's class."""
    if family.clock == "ddpm" or (family.clock == "euler" and not hasattr(scheduler, "sigmas")):
        return scheduler.add_noise(z, noise, torch.tensor([int(step)]))
    if family.clock == "euler":
        sigma = scheduler.sigmas[int((scheduler.timesteps - step).abs().argmin())]
        return (z + sigma * noise) / (sigma**2 + 1) ** 0.5
    if family.clock == "edm":
        sigma = float(scheduler.sigmas[int((scheduler.timesteps - step).abs().argmin())])
        data = float(scheduler.config.get("sigma_data", 1.0))
        return (z + sigma * noise) / (sigma**2 + data**2) ** 0.5
    share = step / family.pure_noise_timestep
    if family.clock == "rising_flow" and not scheduler.config.get("invert_sigmas"):
        share = 1 - share  # the pipeline turns the scheduler's timesteps around, and not the scheduler
    unstepped, index = _at(scheduler, 1000 * share)
    if index is not None and not scheduler.config.get("invert_sigmas"):  # diffusers noises the wrong way then
        if hasattr(unstepped, "scale_noise"):
            return unstepped.scale_noise(z, unstepped.timesteps[index : index + 1], noise)
        if hasattr(unstepped, "add_noise"):
            return unstepped.add_noise(z, noise, unstepped.timesteps[index : index + 1])
    if not isinstance(family.clock, str):  # the user's own clock, which no formula here can check
        alpha, sigma, _ = family.level(scheduler, torch.tensor([family.t_of(scheduler, step)]))
        return alpha * z + sigma * noise
    share = step / family.pure_noise_timestep
    share = 1 - share if family.clock == "rising_flow" else share
    return (1 - share) * z + share * noise


def _at(scheduler: Any, step: float) -> tuple[Any, int | None]:
    """A copy of the scheduler before its first step, and the index of a timestep in its table.

    A scheduler can noise only to timesteps of its table. The index is None where the timestep is not in it (Cosmos
    passes sigmas), and for schedulers that are not of diffusers.
    """
    if not isinstance(scheduler, SchedulerMixin):
        return scheduler, None
    unstepped = copy.deepcopy(scheduler)
    unstepped._step_index = unstepped._begin_index = None
    index = int((unstepped.timesteps - step).abs().argmin())
    return unstepped, index if abs(float(unstepped.timesteps[index]) - step) < 1e-2 else None


def vae(subject: Subject) -> dict[str, Any]:
    """`Backbone.decode` equals decoding in the stock call, by the VAE's input and the frames; normalising inverts
    denormalising.
    """
    backbone, family = subject.backbone, subject.backbone.family
    latents = subject.latents()
    if family.sampling_rate:
        return {
            "latents": "x".join(map(str, latents.shape[1:])),
            "samples": subject.shown()[0][0].shape[-1],
        }
    video, vae_inputs = subject.shown()
    tokens = backbone.tokens(latents, backbone.condition(subject.prompts(1), **subject.call), backbone.t_range[1], 1)
    cells = layout.unpack(latents, family.layout, tokens.grid)
    require(torch.equal(layout.pack(cells, family.layout), latents), "latents do not come back from their layout")
    ours, theirs = denormalise(family, backbone.pipe, cells), torch.cat(vae_inputs).to(cells)
    ours = ours.transpose(1, 2).flatten(0, 1) if family.vae_frame_by_frame else ours
    frames = theirs.shape[2] if theirs.ndim == 5 else None
    if frames and ours.ndim == 5:  # the loop may carry further frames
        ours = ours[:, :, -frames:] if family.extra_frames == "before" else ours[:, :, :frames]
    error = difference(ours, theirs)
    require(
        error < subject.tolerance(1e-5),
        f"the VAE is given other latents than ours, by {error:.1g} of the largest: look at vae_mean_std, "
        "vae_factor, vae_shift, vae_frame_by_frame, restores_condition, after_loop",
    )
    back = normalise(family, backbone.pipe, denormalise(family, backbone.pipe, cells))
    require(difference(back, cells) < subject.tolerance(1e-4), "normalising does not invert denormalising")
    frame_count, close = _frame_count(subject), _close(subject, video)
    _require_decoded(decoded := backbone.decode(latents, tokens.grid, **frame_count), video, close)
    require(
        backbone.encode(decoded).shape == latents.shape,
        "encode gives latents of another shape than the loop's: look at dropped_frames_by_condition, layout, patch",
    )
    return {"latents": "x".join(map(str, latents.shape[1:]))}


def _frame_count(subject: Subject) -> dict[str, int]:
    return {"num_frames": subject.call["num_frames"]} if "num_frames" in subject.call else {}


def _close(subject: Subject, video: Any) -> float:
    """The relative tolerance for decoded videos; a safety checker rounds them down to bytes."""
    rounded = getattr(subject.pipe, "safety_checker", None) is not None
    return subject.tolerance(1e-4) + (1 / 254 / float(np.max(video)) if rounded else 0)


def _require_decoded(decoded: Tensor, video: Any, close: float) -> None:
    """Raise `Mismatch` where decoded videos (B, F, H, W, 3) are others than the pipeline's, which may be images."""
    expected = np.asarray(video)
    expected = expected[:, None] if expected.ndim == 4 else expected
    require(
        tuple(decoded.shape) == expected.shape and difference(decoded, expected) < close,
        f"decode gives {tuple(decoded.shape)}, and the pipeline {expected.shape}, or other values: look at "
        "decoded_layout, dropped_frames_by_condition, decode_num_frames, extra_frames, num_extra_frames, "
        "restores_condition, after_loop",
    )


def conditional_rows(subject: Subject) -> dict[str, Any]:
    """Another prompt, or another image where the pipeline takes no prompt, changes the conditional rows alone."""
    backbone, family = subject.backbone, subject.backbone.family
    guided = backbone.guided(subject.call)
    changes: dict[str, Any] = {}
    if not family.takes_prompts:
        embedded = "image_embeds" in subject.call
        changes = (
            {"image_embeds": -subject.call["image_embeds"]}
            if embedded
            else {"image": ImageOps.invert(subject.call["image"])}
        )
    calls, count = subject.calls_per_step, 2 if family.cfg == "two_calls" and guided else 1
    seen, seen_other = subject.recorded().seen, subject.first_calls(count, subject.texts[1], **changes)
    for index in range(count):
        (one, states), (_, others) = seen[index], seen_other[index]
        expected = 2 if guided and family.cfg == "one_batch" else 1
        require(
            one.batch == expected, f"a denoiser call has {one.batch} rows instead of {expected}: look at cfg, guidance"
        )
        if states.shape != others.shape:
            continue
        moved = ((states - others).abs().amax((1, 2)) > 1e-6).tolist()
        conditional = one.conditional(1).start
        require(
            moved == [index == 0 and group == conditional for group in range(one.batch)],
            f"of call {index + 1} in a step another prompt moves the rows {[i for i, m in enumerate(moved) if m]}: "
            "look at cfg, conditional_first, guidance",
        )
    steps = subject.call.get("num_inference_steps")
    if len(backbone.denoisers) == 1 and steps is not None and not subject.leaves_steps:
        require(
            # a scheduler of second order; one that takes a step twice (PNDM)
            len(seen) in (calls * steps, calls * (2 * steps - 1), calls * (steps + 1)),
            f"{len(seen)} denoiser calls in {steps} steps, instead of {calls} a step: look at cfg, guidance",
        )
    return {"guidance": family.cfg if guided else "embedded"}


def tap_inside_and_outside(subject: Subject) -> dict[str, Any]:
    """Tokens read outside the call equal the tokens that a plain hook sees inside the stock call.

    Both use the same seed, as some pipelines sample an image's latents with it.
    """
    backbone = subject.backbone
    seen = subject.recorded().seen
    if backbone.takes("sample_audio"):  # a judge reads without
        with subject.calls() as seen:
            subject.plain(output_type="latent", sample_audio=False)
    low, high = backbone.t_range
    conditioning = backbone.condition(subject.prompts(1), seeds=[SEED], **subject.call)
    worst, reads = 0.0, subject.reads(seen)
    require(bool(reads), "a stock call makes no pass as a judge reads it: look at read_arguments")
    for denoising, states in reads:
        t = denoising.t(backbone.pipe.scheduler)
        if not low <= t <= high:
            continue
        row = denoising.conditional(1)
        tokens = backbone.tokens(denoising.parted()[0][row], conditioning, t, backbone.default_tap)
        worst = max(worst, difference(tokens.visual, states[row]))
    require(
        worst < subject.tolerance(2e-5),
        f"tokens read outside the call differ from those inside by {worst:.1g} of the largest: look at clock, "
        "batched_arguments, text_argument, first_frame_pipelines, or whether the pipeline draws a "
        "condition anew at each step",
    )
    return {"tap_error": worst}


def winner(subject: Subject) -> dict[str, Any]:
    """The winner equals the plain call's video for its seed, to the bit if sampled one by one, to rounding in a batch.

    A run decodes as many videos as a plain call, and its latents are those of its video.
    """
    backbone = subject.backbone
    judge = Judge.untrained(backbone, dim=16)
    run: dict[str, Any] = {"n": 3, "seed": SEED, "schedule": _cuts(subject)}
    prompt = subject.prompts(1)[0]
    with subject.decoding() as vae_inputs, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that the judge is untrained
        one = best_of_n(subject.pipe, judge, prompt, batch_size=1, **run, **{**subject.call, "output_type": "np"})
        ours = sum(map(len, vae_inputs))
        many = best_of_n(subject.pipe, judge, prompt, batch_size=3, **run, **{**subject.call, "output_type": "latent"})
    video, vae_inputs = subject.shown(one.seed)
    theirs = sum(map(len, vae_inputs))
    require(ours == theirs, f"{ours} videos were decoded for one winner, and a plain call decodes {theirs}")
    require(
        np.array_equal(one.video, video[0]),
        "the winner is not the plain call's video: look at returns_tensor, batched_arguments, cfg, "
        "counts_steps_by_calls, and whether the pipeline draws from the global generator",
    )
    grid = backbone.tokens(one.latents, backbone.condition([prompt], **subject.call), backbone.t_range[1], 1).grid
    if not backbone.family.sampling_rate:
        again = backbone.decode(one.latents, grid, **_frame_count(subject))
        _require_decoded(again, one.video[None], _close(subject, one.video))
    error = difference(many.video, subject.recorded(many.seed).output[0])
    require(
        error < subject.tolerance(1e-4),
        f"in a batch the winner differs by {error:.1g} of the largest: say batch_size_one",
    )
    same = many.seed == one.seed
    for cut, other in zip(one.scores, many.scores):
        for name in judge.dimensions:
            left, right = torch.tensor([cut["scores"][name], other["scores"][name]])
            same = same and torch.allclose(left, right, rtol=subject.tolerance(1e-3), atol=subject.tolerance(1e-4))
    require(
        same,
        "in a batch the candidates' scores are others than one by one: say batch_size_one, or look at "
        "batched_arguments",
    )
    return {"one_by_one": "to the bit", "in_a_batch": error}


def _cuts(subject: Subject) -> list[tuple[int, int]]:
    """Two cuts at steps after the first, at which the judge's denoiser runs."""
    backbone, family = subject.backbone, subject.backbone.family
    times = subject.recorded().times
    low, high = backbone.t_range
    levels = [family.t_of(backbone.pipe.scheduler, time) for time in times[:: subject.calls_per_step]]
    count = subject.call.get("num_inference_steps", len(levels))
    steps = [step for step, t in enumerate(levels, 1) if low <= t <= high and 1 < step <= count]
    return list(zip(steps, (2, 1))) or [(1, 1)]


CHECKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "token grid": grid,
    "early exit": early_exit,
    "noise levels": clock,
    "conditional rows": conditional_rows,
    "inside and outside": tap_inside_and_outside,
    "latents and videos": vae,
    "exact winner": winner,
}


def run_all(subject: Subject) -> list[tuple[str, bool, str]]:
    """Run every check; for each its name, True where it holds, and its numbers, or else the facts to look at."""
    lines = []
    for name, check in CHECKS.items():
        try:
            numbers = check(subject)
            text = ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in numbers.items())
            lines.append((name, True, text))
        except PrismError as error:
            lines.append((name, False, str(error)))
        except Exception as error:
            lines.append((name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    return lines


def _text(value: Any) -> str:
    return f"{value:.0e}" if isinstance(value, float) else str(value)
