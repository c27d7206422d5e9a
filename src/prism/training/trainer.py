"""The training loop: accelerate for devices and processes, batches by prompt group, resumable to the bit.

A run's folder:

    config.json     what was asked for; --resume refuses another
    checkpoints/    while it runs
    history.json    logged loss and accuracy, once it is done
    head/           the judge, once it is done
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from prism import files
from prism.backbone import Conditioning
from prism.errors import PrismError
from prism.judge import Judge
from prism.judge.objective import preference_loss
from prism.preference import LatentStore, prompt_key
from prism.training.batches import Batch, Batches
from prism.training.checkpoint import load_checkpoint, save_checkpoint
from prism.training.config import TrainConfig


def train(
    store: LatentStore,
    judge: Judge,
    config: TrainConfig,
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a judge's head on the store's training pairs; the judge ends up trained, and saved as ``out/head``.

    Args:
        store: opened store; its pairs need a column per dimension of the judge.
        judge: its head is trained from the weights it has, on its device. The backbone is frozen.
        config: settings.
        out: the run's folder; refused where it holds something, unless ``resume``.
        resume: continue the run in ``out`` from its last checkpoint. On CPU the result is the same to the bit.
        progress: show a progress bar (on a terminal).

    Returns:
        {"history": [...], "steps": int, "seconds": float, "pairs": int, "prompts": int}; each entry of the history has
        the step, the mean loss since the entry before, the share of decided pairs judged right per dimension, and the
        learning rate.

    Raises:
        PrismError: on an output folder of another run, no training pairs, or a loss that is not finite.
    """
    started, out = time.perf_counter(), Path(out)
    groups = store.groups("train", judge.dimensions)
    if not groups:
        raise PrismError(f"The store {store.folder} has no training pairs labelled {', '.join(judge.dimensions)}.")
    _check_backbone(store, judge)
    # The head lies where the backbone is; accelerate need not move it.
    accelerator = Accelerator(cpu=judge.backbone.device.type == "cpu", device_placement=False)
    if accelerator.num_processes > config.prompts_per_step:
        raise PrismError(
            f"The training setting prompts_per_step must be at least the number of processes, "
            f"{accelerator.num_processes}; found {config.prompts_per_step}."
        )
    if accelerator.is_main_process:
        _claim(out, _resolved(store, judge, config), resume)
    accelerator.wait_for_everyone()
    if (out / "head").is_dir():  # resumed after its end
        judge.head.load_weights(out / "head" / "model.safetensors")
        return files.read_json(out / "history.json")

    batches = Batches(store, groups, judge.backbone, config)
    conditioning = judge.backbone.condition([group.prompt for group in groups], **store.call)
    optimizer = torch.optim.AdamW(judge.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    head, optimizer = accelerator.prepare(judge.head, optimizer)
    average = (
        {name: value.detach().clone() for name, value in judge.head.named_parameters()} if config.ema_decay else None
    )
    checkpoints = out / "checkpoints"
    state = load_checkpoint(checkpoints, judge.head, optimizer.optimizer, average) or {}
    start, history = state.get("step", 0), state.get("history", [])
    window = Window(judge.dimensions, state.get("window"))
    places = range(accelerator.process_index, config.prompts_per_step, accelerator.num_processes)

    judge.head.train()
    bar = tqdm(total=config.steps, initial=start, desc="train", disable=None if progress else True)
    for step in range(start, config.steps):
        batch = batches.draw(step, places)
        margins = score_rows(judge, head, batch, conditioning, config.max_rows)
        margins = margins[batch.first] - margins[batch.second]
        loss = preference_loss(margins, batch.labels, config.eta, config.objective)
        if not bool(loss.isfinite()):
            raise PrismError(
                f"The loss of step {step + 1} is not finite; lower the learning rate or check the latents."
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        if config.max_gradient_norm:
            accelerator.clip_grad_norm_(head.parameters(), config.max_gradient_norm)
        rate = config.learning_rate_at(step)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        if average is not None:
            _move(average, judge.head, min(config.ema_decay, (1 + step) / (10 + step)))

        window.add(loss, margins, batch.labels)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            history.append({"step": step + 1, **window.close(), "learning_rate": rate})
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}")
        bar.update()
        due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
        if due and step + 1 < config.steps and accelerator.is_main_process:
            extra = {"history": history, "window": window.state}
            save_checkpoint(checkpoints, step + 1, judge.head, optimizer.optimizer, average, extra)
    bar.close()

    if average is not None:
        judge.head.load_state_dict({**judge.head.state_dict(), **average})
    judge.head.eval()
    judge.eta = config.eta
    judge.trained_on = {
        "store": _store_identity(store),
        "source": config.source,
        "seed": config.seed,
        "steps": config.steps,
        "prompts": len(groups),
        "pairs": sum(len(group.labels) for group in groups),
        "config": config.to_dict(),
        "prompt_keys": sorted({prompt_key(group.prompt) for group in groups}),
    }
    result = {
        "history": history,
        "steps": config.steps,
        "seconds": time.perf_counter() - started,
        "prompts": len(groups),
        "pairs": judge.trained_on["pairs"],
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files.write_json(out / "history.json", result)
        judge.save_pretrained(out / "head")
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def score_rows(judge: Judge, head: nn.Module, batch: Batch, conditioning: Conditioning, max_rows: int) -> Tensor:
    """Scores (rows, num_dimensions) of a batch with gradients to the head: one truncated forward pass per row."""
    scores = []
    for start in range(0, len(batch.t), max_rows):
        rows = slice(start, start + max_rows)
        tokens = judge.backbone.tokens(
            batch.noisy_latents[rows], conditioning[batch.prompts[rows]], batch.t[rows], judge.tap
        )
        scores.append(head(tokens.visual, tokens.text, tokens.text_mask))
    return torch.cat(scores)


class Window:
    """Mean loss and accuracy since the last entry of the history; ``state`` is JSON, for checkpoints."""

    def __init__(self, dimensions: tuple[str, ...], state: dict[str, Any] | None = None) -> None:
        self.dimensions = dimensions
        self.state = state or self._empty()

    def _empty(self) -> dict[str, Any]:
        zeros = [0] * len(self.dimensions)
        return {"loss": 0.0, "steps": 0, "right": zeros, "decided": zeros}

    def add(self, loss: Tensor, margins: Tensor, labels: Tensor) -> None:
        right, decided = (margins.detach() * labels > 0).sum(0).tolist(), (labels.abs() == 1).sum(0).tolist()
        self.state["loss"] += loss.item()
        self.state["steps"] += 1
        self.state["right"] = [a + b for a, b in zip(self.state["right"], right)]
        self.state["decided"] = [a + b for a, b in zip(self.state["decided"], decided)]

    def close(self) -> dict[str, Any]:
        done, self.state = self.state, self._empty()
        shares = (right / decided if decided else None for right, decided in zip(done["right"], done["decided"]))
        return {"loss": done["loss"] / done["steps"], "accuracy": dict(zip(self.dimensions, shares))}


def _move(average: dict[str, Tensor], head: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for name, value in head.named_parameters():
            average[name].lerp_(value, 1 - decay)


def _resolved(store: LatentStore, judge: Judge, config: TrainConfig) -> dict[str, Any]:
    return {"command": "train", "train": config.to_dict(), "judge": judge.config(), "store": _store_identity(store)}


def _store_identity(store: LatentStore) -> dict[str, Any]:
    """What tells one store from another, wherever it lies."""
    names = ("store.json", "videos.parquet", "pairs.parquet")
    return {"name": store.folder.name, **{name: files.sha256(store.folder / name)[:16] for name in names}}


def _claim(out: Path, resolved: dict[str, Any], resume: bool) -> None:
    """Make the run's folder, or check that it is this run's."""
    if resume:
        if not (out / "config.json").is_file():
            raise PrismError(f"There is no run to resume in {out}; leave --resume out to start one.")
        known = files.read_json(out / "config.json")
        for part in resolved:
            if known.get(part) != resolved[part]:
                changed = _first_difference(known.get(part), resolved[part])
                raise PrismError(f"The run in {out} differs in {part}: {changed}; resume it as it was started.")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrismError(f"The output folder {out} exists already; choose another --out, or continue with --resume.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "config.json", resolved)
    except OSError as error:
        raise PrismError(f"The output folder {out} cannot be written: {error.strerror or error}.") from error


def _first_difference(known: Any, wanted: Any) -> str:
    if isinstance(known, dict) and isinstance(wanted, dict):
        name = next(name for name in {**wanted, **known} if known.get(name) != wanted.get(name))
        return f"{name} was {known.get(name)!r} and is now {wanted.get(name)!r}"
    return f"it was {known!r} and is now {wanted!r}"


def _check_backbone(store: LatentStore, judge: Judge) -> None:
    """Latents of another VAE mean nothing to this backbone."""
    made_with, found = store.meta.get("backbone") or {}, judge.backbone.fingerprint()
    for field in ("vae", "vae_config"):
        if field in made_with and made_with[field] != found[field]:
            raise PrismError(
                f"The latents in {store.folder} were made with the VAE {made_with.get('vae')}, this backbone has "
                f"{found['vae']}{' of another configuration' if field == 'vae_config' else ''}; encode them anew."
            )
