"""Checkpoints without pickle: safetensors and JSON, in folders that appear whole; the last two are kept."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prism import files
from prism.errors import PrismError

KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    state: dict[str, Any],
) -> None:
    """Publish ``folder/step-<step>`` and remove all but the last two.

    Args:
        average: moving average of the weights, by parameter name.
        state: anything else, as JSON.
    """
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    for (name, _), values in zip(head.named_parameters(), _per_parameter(optimizer)):
        tensors |= {f"optimizer.{name}.{key}": torch.as_tensor(value) for key, value in values.items()}
    tensors |= {f"average.{name}": value for name, value in (average or {}).items()}
    with files.new_folder(folder / f"step-{step:08d}", overwrite=True) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            temporary / "state.safetensors",
        )
        files.write_json(temporary / "state.json", {"step": step, **state})
    for old in _checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, head: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into head, optimiser and average.

    Returns:
        Its JSON state, None where there is no checkpoint.

    Raises:
        PrismError: where there are checkpoints, and all of them are damaged.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            tensors = files.load_safetensors(path / "state.safetensors")
            state = files.read_json(path / "state.json")
            _restore(path, tensors, head, optimizer, average)
            return state
        except PrismError as error:
            if path == found[0]:
                raise
            warnings.warn(f"{error} Falling back on the checkpoint before it.", stacklevel=2)
    return None


def _restore(
    path: Path,
    tensors: dict[str, Tensor],
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
) -> None:
    try:
        head.load_state_dict({name: tensors[f"head.{name}"] for name in head.state_dict()})
        states = {}
        for index, (name, parameter) in enumerate(head.named_parameters()):
            prefix = f"optimizer.{name}."
            values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # AdamW counts its steps on the CPU, whatever the parameter's device.
            states[index] = {key: v if key == "step" else v.to(parameter.device) for key, v in values.items()}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, value in (average or {}).items():
            value.copy_(tensors[f"average.{name}"])
    except (KeyError, RuntimeError) as error:
        raise PrismError(f"The checkpoint {path} does not fit this run ({error}).") from error


def _per_parameter(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    return [state.get(index, {}) for index in range(len(optimizer.param_groups[0]["params"]))]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
