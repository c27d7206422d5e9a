"""Several judges behind one denoiser pass, each with scores of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism.judge import checks
from prism.judge.judge import Judge


class JointJudge(Judge):
    """A judge whose dimensions are those of several: "1/overall" is the overall of judges[1].

    Args:
        judges: on one backbone, of the same dimensions, of any eta; their heads read the tokens of one pass.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges: tuple[Judge, ...] = tuple(checks.listed(judges, Judge))
        checks.check_together(self.judges, of_one_eta=False)
        first = self.judges[0]
        super().__init__(
            first.backbone, [member for judge in judges for member in judge.members], first.dimensions, first.eta
        )
        self.dimensions = tuple(f"{k}/{name}" for k in range(len(judges)) for name in first.dimensions)

    def combined(self, scores: Tensor) -> Tensor:
        """The judges' scores, from those of their members.

        Args:
            scores: (members, B, D).

        Returns:
            (B, num_dimensions), the dimensions of one judge after another's.
        """
        parts = scores.split([len(judge.members) for judge in self.judges])
        return torch.cat([judge.combined(part) for judge, part in zip(self.judges, parts)], 1)
