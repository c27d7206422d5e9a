"""Checkpoints without pickle: safetensors and JSON, in folders that appear whole; the last two are kept."""

from __future__ import annotations

import contextlib
import operator
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism import files, runs
from prism.checks import quoted
from prism.errors import PrismError
from prism.training.learner import Learner

KEEP = 2
NAME, FILES = re.compile(r"step-\d{8}"), ("state.safetensors", "state.json")


def save_checkpoint(folder: Path, step: int, learner: Learner) -> None:
    """Publish ``folder/step-<step>``, all that the learner needs to go on, and remove all but the last two."""
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
    """Load the newest whole checkpoint into the learner, or that of a `step` (0: none).

    Returns:
        The number of steps done by then; 0 where there is no checkpoint.

    Raises:
        PrismError: where there are checkpoints, and all of them are damaged.
    """
    found = _checkpoints(folder) if step is None else [folder / f"step-{step:08d}"] if step else []
    for path in reversed(found):
        try:
            tensors = files.load_safetensors(path / "state.safetensors")
            state = files.read_json(path / "state.json")
            _restore(path, tensors, state, learner)
            return state["step"]
        except PrismError as error:
            if path == found[0]:
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
        learner.history, learner.window.state, learner.best = state["history"], state["window"], state["best"]
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise PrismError(f"The checkpoint {path} does not fit this run ({quoted(error, 200)}).") from error


def _per_parameter(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    return [state.get(index, {}) for index in range(len(optimizer.param_groups[0]["params"]))]


def _checkpoints(folder: Path) -> list[Path]:
    """The folders that `save_checkpoint` published, by step; others of such a name are somebody's own."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if NAME.fullmatch(path.name) and not path.is_symlink() and any((path / name).is_file() for name in FILES)
    )


def _discard(checkpoint: Path) -> None:
    """Delete the files of a checkpoint, and its folder where nothing else lies in it."""
    with contextlib.suppress(OSError):
        for name in FILES:
            (checkpoint / name).unlink(missing_ok=True)
        checkpoint.rmdir()
