"""Tune a LoRA on a round's picks: the loop over optimiser steps, resumable to the bit, and what it logs.

A step's random numbers depend only on (seed, round, step, slot), so that resuming needs no state of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prism import files, runs
from prism.backbone import Backbone, Conditioning
from prism.backbone.denoising import Target, output, sampled_mask, unconditioned
from prism.errors import PrismError
from prism.preference import LatentStore, PromptGroup
from prism.rewards import losses
from prism.rewards.lora import Lora
from prism.rewards.picks import Pick
from prism.rewards.run_folder import made_anew
from prism.rewards.settings import ImproveConfig
from prism.team import halved, ran_out
from prism.training.conditionings import Conditionings

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Rows:
    """The rows of some prompts of a step, on the CPU.

    clean, noise: (B, ...). t: (B,). prompts: (B,) index of each row's pick. dropped: (B,) bool, the prompt is left
    empty. r: (B,) DiffusionNFT's probabilities; of other recipes 1. kinds: (B,) of `LatentStore.kinds`.
    """

    clean: Tensor
    noise: Tensor
    t: Tensor
    prompts: list[int]
    dropped: list[bool]
    r: Tensor
    kinds: list[int]


def levels_tuned(backbone: Backbone, config: ImproveConfig) -> tuple[float, float]:
    """The lowest and highest noise level that is tuned at; PrismError where the denoiser is used at none of them."""
    low, high = backbone.t_range
    levels = max(config.t_low, low), min(config.t_high, high)
    if levels[0] >= levels[1]:
        raise PrismError(
            f"The denoiser {backbone.reads!r} is used for t from {low:g} to {high:g}, found t_low "
            f"{config.t_low:g} and t_high {config.t_high:g}; choose values in that range."
        )
    return levels


class Draws:
    """The rows of each step. Prompts are drawn in shuffled epochs: each comes once before any comes again."""

    def __init__(
        self, backbone: Backbone, store: LatentStore, picks: Sequence[Pick], config: ImproveConfig, number: int
    ) -> None:
        self.store, self.picks, self.config, self.number = store, picks, config, number
        self.levels = levels_tuned(backbone, config)
        spreads = [float(np.std(pick.scores)) for pick in picks]
        self.spread = float(np.sqrt(np.mean(np.square(spreads))))  # pooled over prompts
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def videos(self, pick: Pick) -> tuple[str, ...]:
        """The candidates of a pick that the recipe tunes on."""
        recipe = self.config.recipe
        return {"pairs": (pick.winner, pick.loser), "winners": (pick.winner,)}.get(recipe, pick.group.videos)

    def rows(self, step: int, slot: int) -> Rows:
        """The rows of a slot of a step (from 0): those of one prompt, at one noise level."""
        config = self.config
        epoch, index = divmod(step * config.prompts_per_step + slot, len(self.picks))
        if self._order[0] != epoch:
            rng = np.random.default_rng([config.seed, self.number, epoch, 1])
            self._order = epoch, rng.permutation(len(self.picks))
        chosen = int(self._order[1][index])
        pick = self.picks[chosen]
        videos = self.videos(pick)
        rng = np.random.default_rng([config.seed, self.number, step, slot])
        level = self.levels[0] + rng.uniform() * (self.levels[1] - self.levels[0])
        dropped = bool(rng.uniform() < config.prompt_dropout)  # type: ignore[operator]  # a number by then
        clean = self.store.latents(videos)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        count = len(videos) if config.recipe == "weighted" else 1  # winner and loser share their noise
        noise = torch.randn((count, *clean.shape[1:]), generator=generator).expand_as(clean)
        r = torch.ones(len(videos))
        if config.recipe == "weighted":
            r = losses.probabilities(torch.tensor(pick.scores), self.spread, config.clip)
        t = torch.full((len(videos),), level, dtype=torch.float32)
        kinds = self.store.kinds(videos).tolist()
        return Rows(clean, noise, t, [chosen] * len(videos), [dropped] * len(videos), r, kinds)


def tune(
    backbone: Backbone,
    store: LatentStore,
    picks: Sequence[Pick],
    config: ImproveConfig,
    lora: Lora,
    target: Target,
    folder: Path,
    number: int = 1,
    progress: bool = True,
    log: Callable[[Mapping[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Tune the LoRA that is on the backbone, in place, for a round.

    Args:
        store: holds the latents of the picks' videos.
        target: of `prism.backbone.denoising.target_of`.
        folder: for checkpoints, which are deleted at the end.
        number: of the round, from 1.
        log: takes each entry of the history.

    Returns:
        The history: entries of LOG_EVERY steps with step, loss, learning_rate, grad_norm, kl_div (mean squared
        difference of outputs to the reference's), and by recipe: winner_loss, loser_loss and the reference's
        (ref_winner_loss, ref_loser_loss), implicit_acc; policy_loss, kl_div_loss and old_deviate of DiffusionNFT.

    Raises:
        PrismError: for a loss that is not finite.
    """
    draws = Draws(backbone, store, picks, config, number)
    groups = [_group(pick) for pick in picks]
    conditionings = Conditionings(backbone, store, groups)
    conditionings.capture()
    empty: dict[int, Conditioning] = {}
    parameters = list(lora.weights.values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate or 0.0, weight_decay=config.weight_decay)
    average = lora.state() if config.ema_decay else {}
    window: list[dict[str, float]] = []
    history: list[dict[str, Any]] = []
    start = _restore(folder, lora, optimizer, average, history, window)
    rows = config.max_rows
    if config.gradient_checkpointing and hasattr(lora.denoiser, "enable_gradient_checkpointing"):
        lora.denoiser.enable_gradient_checkpointing()
    clock = runs.Clock("tuning", config.steps, every=30)
    bar = tqdm(total=config.steps, initial=start, desc=f"tune {number}", disable=None if progress else True)
    try:
        with backbone.held(), backbone.freed():
            for step in range(start, config.steps):
                while True:
                    optimizer.zero_grad()
                    logged: list[dict[str, float]] = []
                    try:
                        for part in _parts(draws, step, rows):
                            logged.append(_backward(backbone, part, conditionings, empty, store, config, lora, target))
                        break
                    except Exception as error:
                        if not ran_out(error):
                            raise
                    rows = halved(min(rows, 2 * config.prompts_per_step), "tuning")
                rate = (config.learning_rate or 0.0) * min(1.0, (step + 1) / max(1, config.warmup_steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm or math.inf)
                sums = {name: sum(each[name] for each in logged) for name in logged[0]}
                if not math.isfinite(sums["loss"]) or not bool(norm.isfinite()):
                    raise PrismError(
                        f"The loss of step {step + 1} of round {number} is not finite; lower the learning rate."
                    )
                optimizer.step()
                if average:
                    decay = min(config.ema_decay or 0.0, (1 + step) / (10 + step))
                    with torch.no_grad():
                        for name, value in lora.weights.items():
                            average[name].lerp_(value, 1 - decay)
                window.append({**sums, "grad_norm": float(norm)})
                if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
                    means = {name: sum(each[name] for each in window) / len(window) for name in window[0]}
                    history.append({"step": step + 1, "learning_rate": rate, **means})
                    window.clear()
                    log(history[-1])
                    bar.set_postfix(loss=f"{history[-1]['loss']:.4f}")
                bar.update()
                if bar.disable and progress:
                    clock.tick(step + 1, True)
                due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
                if due and step + 1 < config.steps:
                    _keep(folder, step + 1, lora, optimizer, average, history, window)
    finally:
        bar.close()
        if config.gradient_checkpointing and hasattr(lora.denoiser, "disable_gradient_checkpointing"):
            lora.denoiser.disable_gradient_checkpointing()
    if average:
        lora.load(average)
    return history


def _group(pick: Pick) -> PromptGroup:
    """A pick's candidates as a group of `Conditionings`."""
    none = np.zeros(0, dtype=np.int64)
    return PromptGroup(pick.group.prompt, pick.group.videos, none, none, np.zeros((0, 1)))


def _parts(draws: Draws, step: int, rows: int) -> Iterator[Rows]:
    """The rows of a step in parts of at most `rows`; a prompt is never split, and rows of a part have one kind."""
    slots = [draws.rows(step, slot) for slot in range(draws.config.prompts_per_step)]
    waiting: list[Rows] = []
    for each in slots:
        full = sum(len(other.t) for other in waiting) + len(each.t) > rows
        if waiting and (full or waiting[0].kinds[0] != each.kinds[0]):
            yield _joined(waiting)
            waiting = []
        waiting.append(each)
    yield _joined(waiting)


def _joined(parts: Sequence[Rows]) -> Rows:
    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if isinstance(values[0], Tensor) else [each for value in values for each in value]

    return Rows(*(cat(name) for name in ("clean", "noise", "t", "prompts", "dropped", "r", "kinds")))


def _backward(
    backbone: Backbone, rows: Rows, conditionings: Conditionings, empty: dict[int, Conditioning], store: LatentStore,
    config: ImproveConfig, lora: Lora, target: Target,
) -> dict[str, float]:  # fmt: skip
    """Add the gradients of a part of a step; its shares of the step's logged means."""
    device = backbone.device
    clean, noise, t = rows.clean.to(device), rows.noise.to(device), rows.t.to(device)
    noisy = backbone.add_noise(clean, t, noise)
    wanted = target.of(backbone, clean, noise, t)
    conditioning = _conditioned(backbone, rows, conditionings, empty, store)
    mask = sampled_mask(conditioning, clean)
    with torch.no_grad(), lora.off():
        reference = output(backbone, noisy, conditioning, t)
    old = reference
    if config.recipe == "weighted":
        with torch.no_grad(), lora.old():
            old = output(backbone, noisy, conditioning, t)
    answer = output(backbone, noisy, conditioning, t)
    error, known = losses.errors(answer, wanted, mask), losses.errors(reference, wanted, mask)
    distance = losses.errors(answer, reference, mask)
    share = 1 / config.prompts_per_step
    values: dict[str, Tensor] = {}
    if config.recipe == "pairs":
        loss, margin = losses.flow_dpo(error[::2], error[1::2], known[::2], known[1::2], config.beta or 0.0)
        values |= {"winner_loss": error[::2], "loser_loss": error[1::2]}
        values |= {"ref_winner_loss": known[::2], "ref_loser_loss": known[1::2]}
        values |= {"implicit_acc": (margin > 0).float(), "kl_div": (distance[::2] + distance[1::2]) / 2}
    elif config.recipe == "winners":
        loss = error
        values |= {"winner_loss": error, "ref_winner_loss": known, "kl_div": distance}
    else:
        per_prompt = torch.tensor([1 / rows.prompts.count(each) for each in rows.prompts], device=device)

        def clean_of(value: Tensor) -> Tensor:
            return target.clean(backbone, noisy, value, t)

        policy = losses.diffusion_nft(
            answer, old, clean_of, clean, rows.r.to(device), config.beta or 1.0, config.clip, mask
        )
        loss = (policy + config.kl * distance) * per_prompt
        values |= {"policy_loss": policy * per_prompt, "kl_div_loss": config.kl * distance * per_prompt}
        values |= {"old_deviate": losses.errors(answer, old, mask) * per_prompt, "kl_div": distance * per_prompt}
    (loss.sum() * share).backward()  # type: ignore[no-untyped-call]
    values["loss"] = loss
    return {name: float(value.detach().double().sum()) * share for name, value in values.items()}


def _conditioned(
    backbone: Backbone, rows: Rows, conditionings: Conditionings, empty: dict[int, Conditioning], store: LatentStore
) -> Any:
    """The conditioning of each row; of a dropped prompt that of an empty text under the same call."""
    kind = rows.kinds[0]
    if not any(rows.dropped):
        return conditionings.of(rows.prompts, kind)
    parts = []
    for row, dropped in enumerate(rows.dropped):
        if dropped and kind not in empty:
            video = conditionings.groups[rows.prompts[row]].videos[0]
            empty[kind] = unconditioned(backbone, store.call_of(video))
        part: Any = empty[kind] if dropped else conditionings.of([rows.prompts[row]], kind)
        parts.append(part)
    return Conditioning.cat(parts)


# -- checkpoints, without pickle


def _keep(
    folder: Path, step: int, lora: Lora, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor],
    history: Sequence[Any], window: Sequence[Any],
) -> None:  # fmt: skip
    """Publish `folder/step-<step>` and remove the checkpoints before it."""
    before = sorted(folder.glob("step-*"))
    tensors = {f"lora.{name}": value for name, value in lora.weights.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, value in lora.weights.items():
        for key, moment in optimizer.state[value].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(moment)
    with files.new_folder(folder / f"step-{step:08d}", overwrite=True, discard=runs.discard) as temporary:
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, temporary / "state.safetensors")
        files.write_json(temporary / "state.json", {"step": step, "history": list(history), "window": list(window)})
    for old in before:
        runs.discard(old)


def _restore(
    folder: Path, lora: Lora, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], history: list[Any],
    window: list[Any],
) -> int:  # fmt: skip
    """Load the newest checkpoint; the number of steps done by then."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    with made_anew(found[-1]):
        tensors = files.load_safetensors(found[-1] / "state.safetensors")
        state = files.read_json(found[-1] / "state.json")
    try:
        lora.load({name: tensors[f"lora.{name}"] for name in lora.weights})
        for name, value in lora.weights.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                moment = tensors[f"optimizer.{key}.{name}"]
                optimizer.state[value][key] = moment if key == "step" else moment.to(value.device)
            if average:
                average[name].copy_(tensors[f"average.{name}"])
        history += state["history"]
        window += state["window"]
        return int(state["step"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise PrismError(f"The checkpoint {found[-1]} does not fit this run; delete it, and resume.") from error
