"""PRISM: a frozen video diffusion model judges its own noisy latents, and Best-of-N stops paying for losers.

The public names are imported on first use, so that ``import prism`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prism.report import wording as _wording

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "prism.backbone",
    "BestOfNResult": "prism.sampling",
    "Judge": "prism.judge",
    "LatentStore": "prism.preference",
    "PrismError": "prism.errors",
    "QueryHead": "prism.judge",
    "Rejected": "prism.sampling",
    "TrainConfig": "prism.training",
    "best_of_n": "prism.sampling",
    "evaluate": "prism.evaluation",
    "listen": "prism.sampling",
    "pairwise_accuracy": "prism.evaluation",
    "train": "prism.training",
}
_MODULES = (
    "backbone", "evaluation", "judge", "media", "preference", "rewards", "sampling", "shapeworld", "training", "video"
)  # fmt: skip

__all__ = sorted({*_HOMES, "shapeworld", "video"})

if TYPE_CHECKING:
    from prism import evaluation as evaluation
    from prism import preference as preference
    from prism import rewards as rewards
    from prism import sampling as sampling
    from prism import shapeworld as shapeworld
    from prism import training as training
    from prism import video as video
    from prism.backbone import Backbone as Backbone
    from prism.errors import PrismError as PrismError
    from prism.evaluation import evaluate as evaluate
    from prism.evaluation import pairwise_accuracy as pairwise_accuracy
    from prism.judge import Judge as Judge
    from prism.judge import QueryHead as QueryHead
    from prism.preference import LatentStore as LatentStore
    from prism.sampling import BestOfNResult as BestOfNResult
    from prism.sampling import Rejected as Rejected
    from prism.sampling import listen as listen
    from prism.sampling.best_of_n import best_of_n as best_of_n
    from prism.training import TrainConfig as TrainConfig
    from prism.training import train as train

_wording.tell(lambda: import_module("prism.sampling").STRATEGIES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"prism.{name}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'prism' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
