"""Whole configurations of a judge's training, as Python functions that return them.

Copy one, change what you need, and train:

    from recipes import wan21_1_3b

    recipe = wan21_1_3b.paper()
    pipe = WanPipeline.from_pretrained(recipe.backbone, torch_dtype=torch.bfloat16).to("cuda")
    prism.train("candidates", recipe.judge(pipe), recipe.train, "runs/wan")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism.judge import Judge
from prism.judge.judge import DIMENSIONS
from prism.training import TrainConfig
from prism.training.trainer import untrained_heads


@dataclass(frozen=True)
class Recipe:
    """A backbone, the heads that are put onto it, and how they are trained."""

    backbone: str | None
    """The pipeline's id on the Hub; None: the model that ships with the package."""
    call: Mapping[str, Any]
    """Arguments of the pipeline's call, for the videos that are labelled and for those that are judged."""
    taps: tuple[int, ...]
    """Blocks that are read, from 1 (N_b of the paper); a head for each, whose scores are averaged."""
    dim: int
    """D, the width of a head."""
    train: TrainConfig
    head: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `QueryHead`."""

    def judge(self, pipe: Any, dimensions: Sequence[str] = DIMENSIONS) -> Judge:
        """The judge to train, with random heads. pipe: a pipeline or a `Backbone`."""
        heads = untrained_heads(pipe, self.taps, self.train.seed, dim=self.dim, dimensions=dimensions, **self.head)
        return Judge.average(heads)
