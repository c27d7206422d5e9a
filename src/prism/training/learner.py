"""A head in training: its optimiser, the copies of its weights that are kept, and its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prism import files
from prism.backbone import Conditioning, Ragged, Tokens
from prism.errors import PrismError
from prism.judge import Judge
from prism.judge.objective import preference_loss
from prism.preference import LatentStore, PromptGroup, prompt_key
from prism.training.batches import Batch
from prism.training.config import TrainConfig
from prism.training.validation import Validation


class Learner:
    """One head under one configuration. ``copies`` are further sets of its weights, by name: "average", "best"."""

    def __init__(self, judge: Judge, config: TrainConfig, accelerator: Accelerator) -> None:
        self.judge, self.config, self.accelerator = judge, config, accelerator
        optimizer = torch.optim.AdamW(
            judge.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.head, self.optimizer = accelerator.prepare(judge.head, optimizer)
        wanted = {"average": bool(config.ema_decay), "best": config.keep_best}
        self.copies = {name: self._weights() for name, is_wanted in wanted.items() if is_wanted}
        self.history: list[dict[str, Any]] = []
        self.window = Window(judge.dimensions)
        self.best = -1.0
        judge.head.train()

    def scores(self, tokens: Tokens) -> Tensor:
        """(rows, num_dimensions), with gradients to the head."""
        return self.head(tokens.after(self.judge.tap), tokens.text, tokens.text_mask)

    def update(self, step: int, scores: Tensor, batch: Batch) -> None:
        """One optimiser step (from 0) on the pairs of a batch.

        Raises:
            PrismError: on a loss that is not finite.
        """
        config, margins = self.config, scores[batch.first] - scores[batch.second]
        loss = preference_loss(margins, batch.labels, config.eta, config.objective, config.label_smoothing)
        if not bool(loss.isfinite()):
            raise PrismError(
                f"The loss of step {step + 1} is not finite; lower the learning rate or check the latents."
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if config.max_gradient_norm:
            self.accelerator.clip_grad_norm_(self.head.parameters(), config.max_gradient_norm)
        rate = config.learning_rate_at(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.step()
        if "average" in self.copies:
            self._move_average(min(config.ema_decay, (1 + step) / (10 + step)))
        self.window.add(loss, margins, batch.labels)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            self.history.append({"step": step + 1, **self.window.close(), "learning_rate": rate})

    def validate(self, step: int, validation: Validation) -> None:
        """Note down the accuracy on validation pairs after a step (from 0), and keep the weights if it is the best."""
        current = self._weights()
        self._load(self.copies.get("average", current))
        accuracy = validation.accuracy(self.judge)
        self.history.append({"step": step + 1, "validation": dict(zip(self.judge.dimensions, accuracy))})
        mean = sum(accuracy) / len(accuracy)
        if "best" in self.copies and mean > self.best:
            self.best, self.copies["best"] = mean, self._weights()
        self._load(current)

    def finish(self, store: LatentStore, groups: Sequence[PromptGroup]) -> None:
        """Leave the judge with the weights that are to be saved, and with what it was trained on."""
        config, judge = self.config, self.judge
        for name in ("best", "average"):
            if name in self.copies:
                self._load(self.copies[name])
                break
        judge.head.eval()
        judge.eta = config.eta
        judge.trained_on = {
            "store": store_identity(store),
            "source": config.source,
            "seed": config.seed,
            "steps": config.steps,
            "prompts": len(groups),
            "pairs": sum(len(group.labels) for group in groups),
            "config": config.to_dict(),
            "prompt_keys": sorted({prompt_key(group.prompt) for group in groups}),
        }

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.judge.head.named_parameters()}

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.judge.head.named_parameters():
                value.copy_(weights[name])

    def _move_average(self, decay: float) -> None:
        with torch.no_grad():
            for name, value in self.judge.head.named_parameters():
                self.copies["average"][name].lerp_(value, 1 - decay)


def read(learners: Sequence[Learner], batch: Batch, conditioning: Conditioning | Ragged, max_rows: int) -> list[Tensor]:
    """Each learner's scores (rows, num_dimensions) of a batch: one truncated forward pass per row feeds them all."""
    backbone, taps = learners[0].judge.backbone, sorted({learner.judge.tap for learner in learners})
    scores: list[list[Tensor]] = [[] for _ in learners]
    for start in range(0, len(batch.t), max_rows):
        rows = slice(start, start + max_rows)
        tokens = backbone.tokens(batch.noisy_latents[rows], conditioning[batch.prompts[rows]], batch.t[rows], taps)
        for part, learner in zip(scores, learners):
            part.append(learner.scores(tokens))
    return [torch.cat(part) for part in scores]


class Window:
    """Mean loss and accuracy since the last entry of the history; ``state`` is JSON, for checkpoints."""

    def __init__(self, dimensions: tuple[str, ...]) -> None:
        self.dimensions = dimensions
        self.state = self._empty()

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


def store_identity(store: LatentStore) -> dict[str, Any]:
    """What tells one store from another, wherever it lies."""
    names = ("store.json", "videos.parquet", "pairs.parquet")
    return {"name": store.folder.name, **{name: files.sha256(store.folder / name)[:16] for name in names}}
