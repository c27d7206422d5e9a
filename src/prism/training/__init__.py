"""Training a head on preference pairs, or several heads on the same batches.

The trainer is imported on first use, so that settings are read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prism.training.config import Recipe as Recipe
from prism.training.config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from prism.training.trainer import train as train
    from prism.training.trainer import train_together as train_together


def __getattr__(name: str) -> Any:
    if name in ("train", "train_together"):
        from prism.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'prism.training' has no attribute {name!r}")
