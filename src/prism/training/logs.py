"""Logged values of a training step, by the names of TRL's reward trainer, per dimension and band of noise levels.

accuracy: share of decided pairs judged right; margin: score of the preferred video minus the other's; mean_reward,
min_reward, max_reward: scores, the extremes averaged over steps; loss, grad_norm, learning_rate, epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism.errors import PrismError, quoted
from prism.team import Team

BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
"""Noise levels t that are counted together; the last band includes its end."""
COUNTED = ("right", "decided", "margin", "reward", "rows")


def tally(loss: Tensor, margins: Tensor, scores: Tensor, labels: Tensor, t: Tensor, first: Tensor) -> Tensor:
    """Sums that add up over parts and processes.

    Args:
        loss: scalar.
        margins: (pairs, num_dimensions).
        scores: (rows, num_dimensions).
        labels: (pairs, num_dimensions) 1, -1, 0 or NaN.
        t: (rows,) in [0, 1000].
        first: (pairs,) row of A.

    Returns:
        (1 + bands * num_dimensions * 5,) float64: the loss, and `COUNTED` by band and dimension.
    """
    loss, margins, scores, labels = (value.detach().double().cpu() for value in (loss, margins, scores, labels))
    bands = (t.cpu() / (1000 / len(BANDS))).long().clamp(max=len(BANDS) - 1)
    signed = margins * labels
    of_pairs = torch.stack([signed > 0, labels.abs() == 1, signed.nan_to_num(0)], -1).double()
    sums = torch.zeros(len(BANDS), scores.shape[1], len(COUNTED), dtype=torch.float64)
    sums[..., :3].index_add_(0, bands[first.cpu()], of_pairs)
    sums[..., 3:].index_add_(0, bands, torch.stack([scores, torch.ones_like(scores)], -1))
    return torch.cat([loss[None], sums.flatten()])


def extremes(team: Team, lowest: float, highest: float) -> Tensor:
    """(2 * processes,) of which this process fills two: lowest and highest score; `Team.total` makes it whole."""
    both = torch.zeros(team.size, 2, dtype=torch.float64)
    both[team.rank] = torch.tensor([lowest, highest], dtype=torch.float64)
    return both.flatten()


class Window:
    """Sums since the last entry of the history; ``state`` is JSON, for checkpoints."""

    def __init__(self, dimensions: tuple[str, ...]) -> None:
        self.dimensions = dimensions
        self.state = self._empty()

    def _empty(self) -> dict[str, Any]:
        sums = [0.0] * (len(BANDS) * len(self.dimensions) * len(COUNTED))
        return {"loss": 0.0, "steps": 0, "sums": sums, "lowest": 0.0, "highest": 0.0, "grad_norm": 0.0}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint; what an earlier version did not sum begins at zero."""
        self.state = {**self._empty(), **state}

    def add(self, sums: Sequence[float], grad_norm: float) -> None:
        """Add a step's `tally` and `extremes`, summed over the processes."""
        count, state = len(self.state["sums"]), self.state
        state["loss"] += sums[0]
        state["steps"] += 1
        state["sums"] = [a + b for a, b in zip(state["sums"], sums[1 : 1 + count])]
        state["lowest"] += min(sums[1 + count :: 2])
        state["highest"] += max(sums[2 + count :: 2])
        state["grad_norm"] += grad_norm

    def close(self) -> dict[str, Any]:
        """The entry of the history, and a new beginning."""
        done, self.state = self.state, self._empty()
        sums = torch.tensor(done["sums"], dtype=torch.float64).view(len(BANDS), len(self.dimensions), len(COUNTED))
        by_dimension = {name: _shares(column) for name, column in zip(self.dimensions, sums.sum(0))}
        entry: dict[str, Any] = {"loss": done["loss"] / done["steps"]}
        entry |= {name: {each: row[name] for each, row in by_dimension.items()} for name in _NAMES}
        entry |= {"min_reward": done["lowest"] / done["steps"], "max_reward": done["highest"] / done["steps"]}
        bands = {f"{low}-{high}": _shares(row) for (low, high), row in zip(BANDS, sums.sum(1)) if float(row[4])}
        return {**entry, "grad_norm": done["grad_norm"] / done["steps"], "bands": bands}


_NAMES = ("accuracy", "margin", "mean_reward")


def _shares(sums: Tensor) -> dict[str, float | None]:
    right, decided, margin, reward, rows = sums.tolist()
    values = (right / decided, margin / decided) if decided else (None, None)
    return dict(zip(_NAMES, (*values, reward / rows if rows else None)))


def mean_entry(entries: Sequence[Any]) -> Any:
    """The mean of several heads' entries of one step of the history."""
    first = entries[0]
    if isinstance(first, dict):
        return {name: mean_entry([entry[name] for entry in entries]) for name in first}
    return sum(entries) / len(entries) if isinstance(first, float) else first


def flat(entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the history as trackers take it: "accuracy" is the mean of "accuracy/VQ" and the others."""
    flattened: dict[str, float] = {}
    for name, value in entry.items():
        if name == "bands":
            for band, values in value.items():
                flattened |= {f"{each}/t_{band}": number for each, number in values.items() if number is not None}
        elif isinstance(value, dict):
            name = "eval_accuracy" if name == "validation" else name
            numbers = {f"{name}/{each}": number for each, number in value.items() if number is not None}
            flattened |= {name: sum(numbers.values()) / len(numbers), **numbers} if numbers else {}
        elif name != "step":
            flattened[name] = value
    return flattened


class Trackers:
    """Experiment trackers of accelerate, by name; of no names it does nothing.

    Args:
        names: apart by commas: tensorboard, wandb, trackio, mlflow, ..., or what was registered with
            `accelerate.tracking.register_tracker_class`.

    Raises:
        PrismError: for a name that there is none of, or whose package is not installed.
    """

    def __init__(self, names: str) -> None:
        self._classes: list[Any] = []
        self._running: list[Any] = []
        if not names:
            return
        from accelerate import tracking

        classes = {str(name): each for name, each in tracking.LOGGER_TYPE_TO_CLASS.items()}
        installed = {str(name) for name in tracking.get_available_trackers()}
        built_in = {each.value for each in tracking.LoggerType}
        for name in (name.strip() for name in names.split(",")):
            if name not in classes:
                raise PrismError(
                    f"The training setting report_to names no tracker of accelerate, found {quoted(name, 60)}; there "
                    f"are {', '.join(sorted(classes))}."
                )
            if name in built_in and name not in installed:
                raise PrismError(
                    f"The tracker {name} of report_to is not installed; pip install {name}, or leave it out."
                )
            self._classes.append(classes[name])

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin the run; trackers that write files do so below `folder`."""
        for each in self._classes:
            arguments = ("prism", str(folder)) if each.requires_logging_directory else ("prism",)

            def begin(each: Any = each, arguments: Sequence[str] = arguments) -> None:
                tracker = each(*arguments)
                if hasattr(tracker, "start"):  # earlier versions start when they are made
                    tracker.start()
                tracker.store_init_configuration(dict(settings))
                self._running.append(tracker)

            self._attempt(each, begin)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Give an entry of the history to all trackers. One that fails is left out from then on, with a warning."""
        for tracker in list(self._running):
            if not self._attempt(tracker, lambda tracker=tracker: tracker.log(flat(entry), step=entry["step"])):
                self._running.remove(tracker)

    def finish(self) -> None:
        for tracker in self._running:
            self._attempt(tracker, tracker.finish)
        self._running = []

    @staticmethod
    def _attempt(tracker: Any, work: Any) -> bool:
        try:
            work()
        except Exception as error:  # a tracker must not end a training
            warnings.warn(
                f"The tracker {tracker.name} failed ({quoted(error, 200)}); the training goes on without it.",
                stacklevel=3,
            )
            return False
        return True
