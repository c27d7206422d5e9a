"""Who watches a run is told of its rows and cuts as they come, changes nothing, and can end it."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

import prism
from prism.errors import PrismError


class Watcher:
    def __init__(self, ends_at: float = float("inf")) -> None:
        self.told, self.cuts, self.ends_at = [], [], ends_at

    def rows(self, done, expected):
        self.told.append((done, expected))
        if done > self.ends_at:
            raise KeyError("enough")

    def cut(self, cut, previews):
        self.cuts.append(
            (cut["step"], [c.index for c in cut["kept"]], sorted(c.index for c in previews), len(self.told))
        )


@pytest.mark.parametrize("look", ["ahead", "now"])
def test_a_watch_sees_rows_and_cuts_in_order_and_changes_nothing(wan, look):
    run = {"n": 3, "schedule": "2:2,4:1", "look": look, "batch_size": 3, **wan.call}
    watch = Watcher()
    result = prism.best_of_n(wan.pipe, wan.judge(tap=2), tiny.PROMPT, watch=watch, previews=None, **run)
    plain = prism.best_of_n(wan.pipe, wan.judge(tap=2), tiny.PROMPT, **run)
    assert torch.equal(result.latents, plain.latents)
    assert result.scores == plain.scores
    assert result.ledger.denoiser_rows == plain.ledger.denoiser_rows
    assert watch.told[-1][0] == pytest.approx(result.ledger.denoiser_rows)
    assert [expected for _, expected in watch.told] == pytest.approx([result.ledger.denoiser_rows] * len(watch.told))
    shown = [[0, 1, 2], result.scores[0]["kept"]] if look == "ahead" else [[], []]
    steps = [(step, sorted(kept), seen) for step, kept, seen, _ in watch.cuts]
    assert steps == [(cut["step"], cut["kept"], seen) for cut, seen in zip(result.scores, shown)]
    assert 0 < watch.cuts[0][3] < watch.cuts[1][3] < len(watch.told)  # each is told of where it comes


def test_what_a_watch_raises_ends_the_run_and_leaves_the_pipeline_as_it_was(wan):
    before = {name: vars(part).copy() for name, part in (("transformer", wan.pipe.transformer), ("vae", wan.pipe.vae))}
    watch = Watcher(ends_at=4)
    with pytest.raises(KeyError, match="enough"):
        prism.best_of_n(wan.pipe, wan.judge(tap=2), tiny.PROMPT, n=3, watch=watch, **wan.call)
    assert watch.told[-1][0] < watch.told[-1][1]
    assert {name: vars(getattr(wan.pipe, name)).keys() for name in before} == {n: v.keys() for n, v in before.items()}


def test_previews_of_none_are_no_mistake_where_a_run_has_none(wan):
    run = {"n": 2, "strategy": "fk", **wan.call}
    result = prism.best_of_n(wan.pipe, wan.judge(tap=2), tiny.PROMPT, previews=None, **run)
    assert not result.previews
    with pytest.raises(PrismError, match="Previews are"):
        prism.best_of_n(wan.pipe, wan.judge(tap=2), tiny.PROMPT, previews=True, **run)
