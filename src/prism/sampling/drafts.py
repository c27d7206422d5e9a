"""The strategy draft: every candidate sampled to the end for less, in fewer steps or with a step cache."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from prism.errors import PrismError, whole
from prism.report import wording
from prism.report.wording import Row
from prism.sampling.plan import Candidate, JudgedClean, Schedule, Workload
from prism.sampling.step_cache import Drafter, StepCache, parse

if TYPE_CHECKING:
    from torch import Tensor

    from prism.backbone import Backbone
    from prism.sampling.search import Search


@dataclass(frozen=True)
class Draft(JudgedClean):
    """Every candidate sampled to the end in a few coarse steps and judged; then the winners in full.

    draft_steps: the number of coarse steps; None: 15 % of the steps, at least 2, or with a cache all of them.
    draft_cache: what drafts leave out of their steps, see `prism.sampling.step_cache`.
    """

    strategy, looks_at, role = "draft", "drafts", "ours"

    draft_steps: int | None = None
    draft_cache: str | Mapping[str, float | None] | None = None

    @property
    def cache(self) -> StepCache:
        """What drafts leave out. Raises PrismError for a `draft_cache` that says nothing of the kind."""
        return StepCache() if self.draft_cache is None else parse(self.draft_cache)

    @property
    def all_steps(self) -> bool:
        """True if drafts take the run's own steps."""
        return self.draft_cache is not None and self.draft_steps is None

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Draft:
        """The plan with its number of steps. Raises PrismError for a call with its own timesteps or sigmas."""
        cached = self if self.draft_cache is None else replace(self, draft_cache=str(self.cache))
        if cached.all_steps:
            return cached
        for name in ("timesteps", "sigmas"):
            if call.get(name) is not None:
                raise PrismError(f"A draft chooses its own steps and cannot follow {name!r}; leave it out.")
        steps = self.draft_steps
        steps = default_draft_steps(num_steps) if steps is None else whole("draft_steps", steps)
        if steps > num_steps:
            raise PrismError(f"A draft of {steps} steps is longer than the run of {num_steps}; give it fewer steps.")
        if steps == num_steps and cached.draft_cache is None:
            warnings.warn(
                f'A draft of {steps} steps is as long as the run and saves nothing; take the strategy "full" or '
                '"early".',
                stacklevel=3,
            )
        return replace(cached, draft_steps=steps)

    def fitted(self, backbone: Backbone) -> Draft:
        return self if self.draft_cache is None else replace(self, draft_cache=str(self.cache.fitted(backbone)))

    def drafts(self) -> int:
        return self.draft_steps or 0

    def calls(self, load: Workload) -> Sequence[int]:
        """The denoiser passes per step of a draft."""
        return load.calls if self.all_steps else load.draft_calls

    def cuts(self, load: Workload) -> Schedule:
        return ((len(self.calls(load)), load.top_k),)

    def adapts(self) -> bool:
        return self.cache.adaptive

    def rows(self, load: Workload) -> float:
        """The rows of drafts, judging and winners, which begin with their drafts' steps where nothing was left out."""
        calls = self.calls(load)
        again = self.cache.whole_steps(calls, load.cfg) if self.all_steps else 0
        drafts = load.n * sum(self.cache.rows(calls, load.cfg))
        return drafts + self.judging(load.n, load) + sum(load.calls[again:]) * load.top_k

    def winners(self, search: Search) -> list[Candidate]:
        changes: dict[str, Any] = {} if self.draft_steps is None else {"num_inference_steps": self.draft_steps}
        if self.draft_cache is not None:
            guided = self.cache.guided_steps(len(self.calls(search.load)))
            changes["kind"] = partial(Drafter, self.cache, guided_steps=guided)

        def sample() -> dict[Candidate, Tensor]:
            for _ in search.sample_all(record=self.all_steps, output_type="latent", **changes):
                pass
            drafts, search.latents = search.latents, {}
            return drafts

        best = self.best(search, sample)
        if self.draft_cache is not None:
            search.scores[-1]["draft_cache"] = str(self.cache)
        return best

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        cached = {"draft_cache": scores[0]["draft_cache"]} if "draft_cache" in scores[0] else {}
        return {**super().settings(scores), "draft_steps": scores[0]["step"], **cached}

    @staticmethod
    def how(row: Row) -> str:
        cached = f"cached by {row['draft_cache']}" if "draft_cache" in row else ""
        parts = (f"{row['draft_steps']}-step drafts", cached, wording.judged_at(row))
        return ", ".join(part for part in parts if part)

    @staticmethod
    def cut_name(step: int) -> str:
        return f"drafts of {step} steps"


def default_draft_steps(num_steps: int) -> int:
    """The default number of draft steps: 15 % of the run's, at least 2 unless the run has only 1."""
    return min(num_steps, max(2, round(0.15 * num_steps)))
