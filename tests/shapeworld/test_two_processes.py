"""Two processes train ShapeWorld's generator as one would with both of their batches."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tests import forks
from torch import Tensor, nn

from prism.shapeworld import train
from prism.team import Team


def loss_of(layer: nn.Module, step: int, rank: int) -> Tensor:
    seed = train._step_seed(7, step, Team(rank, 2))
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    return (layer(batch) - batch.sum(1, keepdim=True)).square().mean()


def work(out: Path) -> None:
    team = Team.gathered("cpu")
    torch.manual_seed(team.rank)  # the others take the first one's weights
    layer = nn.Linear(3, 1)
    train.fit({"layer": layer}, lambda step: loss_of(layer, step, team.rank), out, 3, 1e-2, team=team)


def test_two_processes_train_as_one_on_both_batches(tmp_path: Path) -> None:
    for process in forks.run(work, tmp_path / "two"):
        assert process.code == 0, process.err[-4000:]
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    train.fit(
        {"layer": layer},
        lambda step: (loss_of(layer, step, 0) + loss_of(layer, step, 1)) / 2,
        tmp_path / "one",
        3,
        1e-2,
    )
    two, one = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(two, one)
