"""The strategy early: candidates judged while they are sampled, and dropped by a schedule."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from prism.backbone import Tokens
from prism.backbone.steps import Steps
from prism.errors import PrismError
from prism.report import wording
from prism.report.wording import Row
from prism.sampling.plan import Candidate, Plan, Schedule, Workload, cut_rows, default, resolve
from prism.sampling.replay import Interceptor, OnCut
from prism.sampling.search import Search
from prism.team import merged


@dataclass(frozen=True)
class Early(Plan):
    """Candidates are judged on the way and dropped by the schedule; those left are recorded up to the last cut.

    schedule: cuts (step, keep); None: the default cut, moved to a step that the head's denoiser runs.
    """

    strategy, looks_at, role = "early", "steps", "ours"

    schedule: Sequence[Sequence[int]] | None = None

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Early:
        if self.schedule is not None:
            resolve(self.schedule, n, sys.maxsize, top_k)  # what is wrong whatever the steps are
        return self

    def settled(self, load: Workload, steps: Steps | None = None) -> Early:
        """Raises PrismError for cuts behind the last step."""
        cuts = self.schedule
        if cuts is None:
            ((step, keep),) = default(len(load.calls), load.top_k)
            cuts = ((step if steps is None else steps.nearest_readable(step), keep),)
        last = None if steps is None else steps.last_readable
        return replace(self, schedule=resolve(cuts, load.n, len(load.calls), load.top_k, last))

    def cuts(self, load: Workload) -> Schedule:
        return tuple((step, keep) for step, keep in self.schedule or ())

    def rows(self, load: Workload) -> float:
        """The winners are finished from their recordings."""
        rows, alive, done = 0.0, load.n, 0
        for (step, keep), (cost, _) in zip(self.cuts(load), self.reads(load)):
            rows += alive * sum(load.calls[done : step - 1]) + cost
            alive, done = keep, step
        return rows + alive * sum(load.calls[done:])

    def reads(self, load: Workload) -> list[tuple[float, bool]]:
        """Rows that the step of each cut costs, and whether its scores are read by a probe."""
        alive, found = load.n, []
        for step, keep in self.cuts(load):
            found.append(cut_rows(alive, keep, load.cfg, load.calls[step - 1], load.tap_share, load.listens))
            alive = keep
        return found

    def winners(self, search: Search) -> list[Candidate]:
        """While the living candidates do not fit one batch, they go chunk by chunk to the next cut, and later rounds
        replay what was recorded. Once they do, one call carries all the cuts that are left, dead rows gated out.
        Processes that share a run meet after each cut, so they go round by round.
        """
        alive, cuts = list(search.candidates), list(self.cuts(search.load))
        probed = {step: probe for (step, _), (_, probe) in zip(cuts, self.reads(search.load))}
        while cuts:
            if search.team.alone and len(alive) <= search.batch_size:
                return _gate(search, sorted(alive), cuts, probed)
            alive = run_to_cut(search, alive, *cuts.pop(0), probed)
        return alive

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().settings(scores), "schedule": [[cut["step"], len(cut["kept"])] for cut in scores]}

    @staticmethod
    def how(row: Row) -> str:
        return ", ".join(f"step {step} keeps {keep}" for step, keep in row["schedule"] or ()) or wording.MISSING


def _gate(
    search: Search, candidates: list[Candidate], cuts: Sequence[tuple[int, int]], probed: Mapping[int, bool]
) -> list[Candidate]:
    """All the cuts in one call of all the candidates, which ends at the last of them."""
    keeps, last, kept = dict(cuts), cuts[-1][0], candidates

    def on_cut(step: int, t: float, living: list[Candidate], tokens: Tokens, finite: Tensor) -> list[Candidate] | None:
        nonlocal kept
        kept = search.rank(step, t, search.score(t, living, tokens, finite), keeps[step], living)
        return None if step == last else kept

    _until_cut(search, candidates, {step: probed[step] for step in keeps}, on_cut)
    return kept


def run_to_cut(
    search: Search, candidates: Sequence[Candidate], step: int, keep: int, probed: Mapping[int, bool]
) -> list[Candidate]:
    """Each chunk in a call of its own that ends at the cut; the survivors over all chunks."""
    scores: dict[Candidate, Sequence[float]] = {}
    levels: list[float] = []

    def on_cut(_step: int, t: float, living: list[Candidate], tokens: Tokens, finite: Tensor) -> None:
        scores.update(search.score(t, living, tokens, finite))
        levels.append(t)

    def sample() -> tuple[dict[Candidate, Sequence[float]], list[float]]:
        for chunk in search.chunks(candidates):
            _until_cut(search, chunk, {step: probed[step]}, on_cut)
        return scores, levels

    parts = search.team.agree(sample)
    level = next(t for _, told in parts for t in told)
    return search.rank(step, level, merged(part for part, _ in parts), keep, candidates)


def _until_cut(search: Search, candidates: list[Candidate], cuts: Mapping[int, bool], on_cut: OnCut) -> None:
    interceptor = Interceptor(
        search.backbone, candidates, search.recordings, cuts=cuts, tap=search.judge.taps, on_cut=on_cut
    )
    if interceptor.run(search.batch_call(candidates, output_type="latent")) is not None:
        raise PrismError(
            f"The pipeline made {interceptor.step - 1} scheduler steps, and the schedule cuts at step {max(cuts)}."
        )
