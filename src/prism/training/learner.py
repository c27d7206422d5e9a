"""A head in training: its optimiser, averaged weights, history, and checkpoints without pickle."""

from __future__ import annotations

import contextlib
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism import files, runs
from prism.backbone import Tokens
from prism.errors import PrismError, quoted
from prism.judge import Judge
from prism.judge.objective import label_counts, preference_loss
from prism.preference import LatentStore, PromptGroup, prompt_key
from prism.preference.store import store_identity
from prism.team import Team, halved, ran_out
from prism.training.batches import Batch, Labels
from prism.training.conditionings import Conditionings
from prism.training.config import TrainConfig
from prism.training.logs import Window, extremes, tally
from prism.training.tokens import TokenCache
from prism.training.validation import Validation


class Learner:
    """One head under one configuration. ``copies`` are further sets of its weights, by name: "average", "best".

    A step is `begin`, then `backward` on the batch or on its parts one by one, then `finish_step`. `begin_again` starts
    a step over, before `finish_step`.
    """

    def __init__(self, judge: Judge, config: TrainConfig, team: Team, prompts: int = 0) -> None:
        self.judge, self.config, self.team, self.prompts = judge, config, team, prompts
        self.optimizer = torch.optim.AdamW(
            judge.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        team.share(judge.head.parameters())
        kept = {"average": bool(config.ema_decay), "best": config.keep_best}
        self.copies = {name: self._weights() for name, is_kept in kept.items() if is_kept}
        self.history: list[dict[str, Any]] = []
        self.window = Window(judge.dimensions)
        self.best = -1.0
        self._counts = self._sums = torch.zeros(0)
        self._lowest, self._highest = math.inf, -math.inf
        judge.head.train()

    def scores(self, tokens: Tokens) -> Tensor:
        """(rows, num_dimensions), with gradients to the head."""
        head: Tensor = self.judge.head(tokens.after(self.judge.tap), tokens.text, tokens.text_mask)
        return head

    def begin(self, step: Labels | Batch) -> None:
        """Start a step. `step` holds the labels of this process; others may hold further ones."""
        self.optimizer.zero_grad()
        self._counts = self.team.total(label_counts(step.labels, self.config.objective, step.soft, step.weights))
        self.begin_again()

    def begin_again(self) -> None:
        """Start the step over: drop the gradients and sums of the parts done so far."""
        self.optimizer.zero_grad()
        self._sums = torch.zeros(1, dtype=torch.float64)  # the shape of `tally` from the first part on
        self._lowest, self._highest = math.inf, -math.inf

    def backward(self, scores: Tensor, part: Batch) -> None:
        """Add the gradients of a part of the batch: its share of the loss over all pairs of all processes."""
        config, margins = self.config, scores[part.first] - scores[part.second]
        how = config.eta, config.objective, config.label_smoothing
        loss = preference_loss(margins, part.labels, *how, self._counts, part.soft, part.weights)
        loss.backward()
        self._sums = self._sums + tally(loss, margins, scores, part.labels, part.t, part.first)
        lowest, highest = scores.detach().aminmax()
        self._lowest, self._highest = min(self._lowest, float(lowest)), max(self._highest, float(highest))

    def finish_step(self, step: int) -> None:
        """Take the optimiser's step (counted from 0) on the gradients of all parts and all processes.

        Raises:
            PrismError: on a loss that is not finite.
        """
        config, of_process = self.config, extremes(self.team, self._lowest, self._highest)
        sums = self.team.total(torch.cat([self._sums, of_process])).tolist()
        if not math.isfinite(sums[0]):
            raise PrismError(
                f"The loss of step {step + 1} is not finite; lower the learning rate or check the latents."
            )
        gradients = [value.grad for value in self.judge.head.parameters() if value.grad is not None]
        self.team.add_up(gradients)
        if config.max_gradient_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.judge.head.parameters(), config.max_gradient_norm)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        rate = config.learning_rate_at(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.step()
        if "average" in self.copies:
            self._move_average(min(config.ema_decay, (1 + step) / (10 + step)))
        self.window.add(sums, float(norm))
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            entry = {"step": step + 1, **self.window.close(), "learning_rate": rate}
            epoch = {"epoch": (step + 1) * config.prompts_per_step / self.prompts} if self.prompts else {}
            self.history.append({**entry, **epoch})

    def validate(self, step: int, validation: Validation) -> None:
        """Record the accuracy on validation pairs after a step (from 0), and keep the weights if it is the best."""
        current = self._weights()
        self._load(self.copies.get("average", current))
        accuracy = validation.accuracy(self.judge)
        self.history.append({"step": step + 1, "validation": dict(zip(self.judge.dimensions, accuracy))})
        mean = sum(accuracy) / len(accuracy)
        if "best" in self.copies and mean > self.best:
            self.best, self.copies["best"] = mean, self._weights()
        self._load(current)

    def finish(self, store: LatentStore, groups: Sequence[PromptGroup]) -> None:
        """Give the judge its final weights (best, average or last) and its `trained_on`."""
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


def read(
    learners: Sequence[Learner],
    batch: Batch,
    conditionings: Conditionings,
    max_rows: int,
    cache: TokenCache | None = None,
) -> list[Tensor]:
    """Each learner's scores (rows, num_dimensions) of a batch: one truncated forward pass per row feeds them all."""
    backbone = learners[0].judge.backbone
    taps = sorted({learner.judge.tap for learner in learners}) if cache is None else cache.taps
    scores: list[list[Tensor]] = [[] for _ in learners]
    order: list[int] = []

    def tokens_of(rows: Sequence[int]) -> Tokens:
        noisy = torch.stack([batch.latents[row] for row in rows]).to(backbone.device)
        conditioning = conditionings.of([batch.prompts[row] for row in rows], batch.kinds[rows[0]])
        return backbone.tokens(noisy, conditioning, batch.t[list(rows)], taps)

    def unit_of(rows: Sequence[int]) -> Tokens:
        parts = [tokens_of(rows[start : start + max_rows]) for start in range(0, len(rows), max_rows)]
        return parts[0] if len(parts) == 1 else Tokens.cat(parts)

    def reads() -> Iterator[tuple[list[int], Tokens]]:
        if cache is None:
            yield from ((rows, tokens_of(rows)) for rows in batch.passes(max_rows))
            return
        for draw, number, rows in batch.units():
            unit = cache.tokens(batch.prompts[rows[0]], draw, number, partial(unit_of, rows), backbone.device)
            yield rows, unit

    for rows, tokens in reads():
        order += rows
        for part, learner in zip(scores, learners):
            part.append(learner.scores(tokens))
    whole = [torch.cat(part) for part in scores]
    if order != sorted(order):  # videos of several kinds
        back = torch.tensor(order).argsort().to(whole[0].device)
        whole = [each[back] for each in whole]
    return whole


class Steps:
    """Steps of several learners on the same batches, in smaller parts once memory has run out.

    Each part's loss is divided by the counts of the whole step, so that parts add up to the same step, up to rounding.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._in_parts = False

    def take(
        self,
        step: int,
        learners: Sequence[Learner],
        labels: Labels | Batch,
        batches: Callable[[], Iterable[Batch]],
        forward: Callable[[Batch, int], Sequence[Tensor]],
    ) -> None:
        """Take one step (from 0).

        Args:
            labels: all labels of the step.
            batches: give its batches, one after another; called again if memory runs out.
            forward: ``forward(part, rows)`` gives each learner's scores of a part, `rows` at a time.
        """
        for learner in learners:
            learner.begin(labels)
        while not self._fits(learners, batches, forward):  # processes add up their gradients only in finish_step
            self._in_parts = True
            for learner in learners:
                learner.begin_again()
        for learner in learners:
            learner.finish_step(step)

    def _fits(
        self,
        learners: Sequence[Learner],
        batches: Callable[[], Iterable[Batch]],
        forward: Callable[[Batch, int], Sequence[Tensor]],
    ) -> bool:
        for batch in batches():
            if not self._batch_fits(learners, batch, forward):
                self.rows = halved(min(self.rows, len(batch.t)), "training")
                return False
        return True

    def _batch_fits(
        self, learners: Sequence[Learner], batch: Batch, forward: Callable[[Batch, int], Sequence[Tensor]]
    ) -> bool:
        try:
            for part in batch.parts(self.rows) if self._in_parts else [batch]:
                for learner, scores in zip(learners, forward(part, self.rows)):
                    learner.backward(scores, part)
        except Exception as error:
            if not ran_out(error):
                raise
            return False
        return True


KEEP = 2
NAME, FILES = re.compile(r"step-\d{8}"), ("state.safetensors", "state.json")


def save_checkpoint(folder: Path, step: int, learner: Learner) -> None:
    """Publish ``folder/step-<step>``, all that the learner needs to continue, and remove all but the last two."""
    head, optimizer = learner.judge.head, learner.optimizer
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    for (name, _), values in zip(head.named_parameters(), _per_parameter(optimizer)):
        tensors |= {f"optimizer.{name}.{key}": torch.as_tensor(value) for key, value in values.items()}
    for copy, values in learner.copies.items():
        tensors |= {f"{copy}.{name}": value for name, value in values.items()}
    state = {"step": step, "history": learner.history, "window": learner.window.state, "best": learner.best}
    with files.new_folder(folder / f"step-{step:08d}", overwrite=True, discard=runs.discard) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            temporary / "state.safetensors",
        )
        files.write_json(temporary / "state.json", state)
    for old in _checkpoints(folder)[:-KEEP]:
        _discard(old)


def load_checkpoint(folder: Path, learner: Learner, step: int | None = None) -> int:
    """Load the newest undamaged checkpoint into the learner, or that of a `step` (0: none).

    Returns:
        The number of steps done by then; 0 if there is no checkpoint.

    Raises:
        PrismError: if there are checkpoints, and all of them are damaged.
    """
    candidates = _checkpoints(folder) if step is None else [folder / f"step-{step:08d}"] if step else []
    for path in reversed(candidates):
        try:
            tensors = files.load_safetensors(path / "state.safetensors")
            state = files.read_json(path / "state.json")
            _restore(path, tensors, state, learner)
            return state["step"]
        except PrismError as error:
            if path == candidates[0]:
                raise
            warnings.warn(f"{error} Falling back on the checkpoint before it.", stacklevel=2)
    return 0


def _restore(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], learner: Learner) -> None:
    head, optimizer = learner.judge.head, learner.optimizer
    try:
        operator.index(state["step"])
        head.load_state_dict({name: tensors[f"head.{name}"] for name in head.state_dict()})
        moments = {}
        for index, (name, parameter) in enumerate(head.named_parameters()):
            prefix = f"optimizer.{name}."
            values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # AdamW counts its steps on the CPU, whatever the parameter's device.
            moments[index] = {key: v if key == "step" else v.to(parameter.device) for key, v in values.items()}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for copy, weights in learner.copies.items():
            for name, value in weights.items():
                value.copy_(tensors[f"{copy}.{name}"])
        learner.history, learner.best = state["history"], state["best"]
        learner.window.restore(state["window"])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise PrismError(f"The checkpoint {path} does not fit this run ({quoted(error, 200)}).") from error


def _per_parameter(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    return [state.get(index, {}) for index in range(len(optimizer.param_groups[0]["params"]))]


def _checkpoints(folder: Path) -> list[Path]:
    """The folders that `save_checkpoint` published, by step. Other folders of such a name belong to the user."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if NAME.fullmatch(path.name) and not path.is_symlink() and any((path / name).is_file() for name in FILES)
    )


def _discard(checkpoint: Path) -> None:
    """Delete the files of a checkpoint, and its folder if nothing else lies in it."""
    with contextlib.suppress(OSError):
        for name in FILES:
            (checkpoint / name).unlink(missing_ok=True)
        checkpoint.rmdir()
