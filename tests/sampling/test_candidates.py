"""A candidate that branches lives in a search as any other: recorded apart, scored, finished to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting

import prism
from prism.report.wording import Row
from prism.sampling import STRATEGIES, Plan
from prism.sampling.plan import Candidate, Edit, Workload
from prism.sampling.search import Search

EDITS = [Edit(step=3, seed=70 + branch, weight=0.6) for branch in range(3)]
FIRST_CUT = 2


@dataclass(frozen=True)
class Branches(Plan):
    """The best candidate at an early cut parts into three by an edit each, and the best of these wins at the end."""

    strategy, looks_at = "branches", "steps"

    def winners(self, search: Search) -> list[Candidate]:
        last = len(search.load.calls)
        (parent,) = search.run_to_cut(search.candidates, FIRST_CUT, 1, {FIRST_CUT: False})
        recorded = len(search.recordings.get(parent, ()))
        branches = [search.branch(parent, edit) for edit in EDITS]
        search.share(branches)
        best = search.run_to_cut(branches, last, search.top_k, {last: False})
        assert len(search.recordings.get(parent, ())) == recorded  # branches record for themselves alone
        return best

    def rows(self, load: Workload) -> float:
        """Of a guidance in two calls: branches go on from the conditional pass of the cut, which was recorded."""
        before, after = sum(load.calls[: FIRST_CUT - 1]) + 1, sum(load.calls[FIRST_CUT - 1 : -1])
        return load.n * before + len(EDITS) * after + load.top_k

    @staticmethod
    def how(row: Row) -> str:
        return "the best of three branches"


def stock(setting: Setting, seed: int, edits: tuple[Edit, ...], user: Any = None) -> torch.Tensor:
    """Final latents of a plain call with a callback that applies the edits."""
    edited = prism.sampling.edited(seed, edits)
    if user is not None:
        apply = edited["callback_on_step_end"]

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return apply(pipe, step, timestep, {**tensors, **user(pipe, step, timestep, tensors)})

        edited["callback_on_step_end"] = callback
    return setting.pipe(tiny.PROMPT, **edited, **{**setting.call, "output_type": "latent"}).frames


def dimmed(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"latents": 0.99 * tensors["latents"]} if step == 3 else {}


@pytest.mark.parametrize("callback", [None, dimmed])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_branch_is_finished_as_a_stock_call_with_its_edits(
    wan: Setting, batch_size: int, callback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, "branches", Branches)
    judge, own = wan.judge(tap=2), {"callback_on_step_end": callback} if callback else {}
    options: dict[str, Any] = {"n": 3, "seed": 4, "strategy": "branches", "top_k": 1, "batch_size": batch_size}
    result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, keep_latents=True, **options, **wan.call, **own)
    (pick,) = result.top
    assert (pick.seed, set(pick.edits) < set(EDITS), len(pick.edits)) == (4 + pick.index, True, 1)
    same = stock(wan, pick.seed, pick.edits, callback)
    if batch_size == 1:
        assert torch.equal(pick.latents, same)
    torch.testing.assert_close(pick.latents, same, atol=5e-5, rtol=1e-4)
    assert not torch.allclose(same, stock(wan, pick.seed, (), callback), atol=0.1)
    assert result.scores[-1]["candidates"] == [pick.index] * 3
    assert len(set(result.scores[-1]["scores"]["overall"])) == 3
    assert result.candidate_latents == {}
    assert bool(result.reproduce) == (callback is None)
    if callback is None:
        names = {"pipe": wan.pipe, "prompt": tiny.PROMPT, "call": wan.call, "prism": prism}
        again = eval(result.reproduce, names).frames[0]
        assert batch_size > 1 or (again == result.video).all()
        load = Workload.of(judge.backbone, wan.call, 3, 2)
        assert result.ledger.denoiser_rows == pytest.approx(Branches().rows(load))


def test_candidates_have_an_order_and_are_told_apart() -> None:
    one, other = Candidate(0, 5), Candidate(1, 5)  # a seed that was given twice
    branches = [one.branch(edit) for edit in EDITS]
    assert len({one, other, *branches, *(one.branch(edit) for edit in EDITS)}) == 5
    assert sorted([other, *reversed(branches), one]) == [one, *branches, other]
    assert Candidate(0, 9) < Candidate(1, 5)  # by place, not by seed
    assert branches[0].branch(EDITS[1]).edits == tuple(EDITS[:2])
