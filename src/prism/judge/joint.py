"""Several judges behind one denoiser pass, each with scores of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism.backbone import Tokens
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

    @torch.no_grad()
    def score_tokens(self, tokens: Tokens) -> Tensor:
        """Scores of tokens that were tapped at ``self.taps``.

        Returns:
            (B, scores) float32, the dimensions of one judge after those of another.
        """
        rest, scores = self.score_members(tokens), []
        for judge in self.judges:
            by_member, rest = rest[: len(judge.members)], rest[len(judge.members) :]
            shares = torch.tensor([member.share for member in judge.members], device=by_member.device)
            scores.append(torch.einsum("m,mbd->bd", shares, by_member))
        return torch.cat(scores, 1)
