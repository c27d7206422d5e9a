"""A strategy of one's own is one class and one entry: checks, cost, command-line value and words come from its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting

import prism
from prism import PrismError, cli, files
from prism.report import wording
from prism.sampling import STRATEGIES, Plan
from prism.sampling.plan import Candidate, Schedule, Workload, cut_rows
from prism.sampling.search import Search
from prism.sampling.strategies import Early, Full

N, TAP = 4, 2


@dataclass(frozen=True)
class Halves(Plan):
    """The best of each half of the candidates after half of the steps, and the better ones of these at the end."""

    strategy, looks_at, role = "halves", "steps", "ours"

    def checked(self, n: int, top_k: int, num_steps: int, call: Mapping[str, Any]) -> Halves:
        if n % 2 or n < 4 or top_k > 2 or num_steps < 2:
            raise PrismError(f"Two halves of two or more take an even n, and leave two; n is {n}, top_k {top_k}.")
        return self

    def cuts(self, load: Workload) -> Schedule:
        return (len(load.calls) // 2, 2), (len(load.calls), load.top_k)

    def reads(self, load: Workload) -> list[tuple[float, bool]]:
        """Rows of the step of a half's cut and of the last one, and whether the scores are read by a probe."""
        pairs = zip((load.n // 2, 2), (1, load.top_k), self.cuts(load))
        return [
            cut_rows(alive, keep, load.cfg, load.calls[step - 1], load.tap_share, load.listens)
            for alive, keep, (step, _) in pairs
        ]

    def rows(self, load: Workload) -> float:
        ((first, _), (last, _)), ((half, _), (end, _)) = self.cuts(load), self.reads(load)
        return load.n * sum(load.calls[: first - 1]) + 2 * half + 2 * sum(load.calls[first : last - 1]) + end

    def winners(self, search: Search) -> list[Candidate]:
        ((first, _), (last, keep)), everyone = self.cuts(search.load), search.candidates
        probed = {step: probe for step, (_, probe) in zip((first, last), self.reads(search.load))}
        best = []
        for half in (everyone[: len(everyone) // 2], everyone[len(everyone) // 2 :]):
            search.share(everyone)
            best += search.run_to_cut(half, first, 1, probed)
        search.share(best)
        return search.run_to_cut(best, last, keep, probed)

    @classmethod
    def settings(cls, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().settings(scores), "schedule": [[cut["step"], len(cut["kept"])] for cut in scores]}

    @staticmethod
    def how(row: wording.Row) -> str:
        return f"the best of each half at step {row['schedule'][0][0]}"

    @staticmethod
    def cut_name(step: int) -> str:
        return f"halves at step {step}"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "halves", Halves)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_picks_and_costs_what_its_plan_says(setting: Setting, batch_size: int) -> None:
    judge = setting.judge(TAP)
    for top_k in (1, 2):
        result = prism.best_of_n(
            setting.pipe, judge, tiny.PROMPT, n=N, strategy="halves", top_k=top_k, batch_size=batch_size, **setting.call
        )
        first, second, last = result.scores
        assert (first["candidates"], second["candidates"]) == ([0, 1], [2, 3])
        assert last["candidates"] == first["kept"] + second["kept"]
        load = Workload.of(judge.backbone, setting.call, N, TAP, top_k=top_k)
        assert result.ledger.denoiser_rows == pytest.approx(Halves().rows(load))
        assert result.ledger.vae_decodes == Halves().decodes(load) == len(result.top)
        assert batch_size > 1 or torch.equal(result.latents, setting.stock(result.seed)[1])


def test_its_check_and_what_it_needs_are_asked_before_any_work(wan: Setting) -> None:
    with pytest.raises(PrismError, match="take an even n, and leave two; n is 5"):
        prism.best_of_n(wan.pipe, wan.judge(TAP), tiny.PROMPT, n=5, strategy="halves", **wan.call)
    with pytest.raises(PrismError, match='The strategy "halves" needs a judge'):
        prism.best_of_n(wan.pipe, None, tiny.PROMPT, n=N, strategy="halves", **wan.call)
    with pytest.raises(PrismError, match='A schedule belongs to the strategy "early", and this run\'s is "halves"'):
        prism.best_of_n(wan.pipe, wan.judge(TAP), tiny.PROMPT, n=N, strategy="halves", schedule="2:1", **wan.call)
    with pytest.raises(PrismError, match=r'There is no strategy "thirds"; choose one of none, .*, oracle, halves'):
        prism.best_of_n(wan.pipe, wan.judge(TAP), tiny.PROMPT, n=N, strategy="thirds", **wan.call)


def test_a_plan_says_what_arguments_say(wan: Setting) -> None:
    judge = wan.judge(TAP)

    def run(**options: Any) -> prism.sampling.BestOfNResult:
        result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=N, **options, **wan.call)
        assert isinstance(result, prism.sampling.BestOfNResult)
        return result

    ahead = {"look": "ahead", "num_draws": 3}
    for plan, options in (
        (Early(schedule=[(2, 2), (4, 1)], look="ahead", num_draws=3), {"schedule": "2:2,4:1", **ahead}),
        (Full(judge_at=300), {"strategy": "full", "judge_at": 300}),
        (Halves(), {"strategy": "halves"}),
    ):
        told, said = run(plan=plan), run(**options)
        assert (told.scores, told.index) == (said.scores, said.index)
        assert told.ledger.denoiser_rows == said.ledger.denoiser_rows
    with pytest.raises(PrismError, match="The plan says schedule itself; leave the argument 'schedule' out"):
        run(plan=Full(), schedule="2:1")
    with pytest.raises(PrismError, match="plan is 5 of type int; give a strategy with its settings"):
        run(plan=5)
    with pytest.raises(PrismError, match="num_draws"):
        run(plan=Full(num_draws=0))


def test_it_is_a_value_of_the_command_line_and_has_its_words_in_the_report(wan: Setting, tmp_path: Path) -> None:
    wan.pipe.save_pretrained(tmp_path / "backbone")
    files.write_json(tmp_path / "backbone" / "call.json", tiny.CALL_WAN)
    wan.judge(TAP).save_pretrained(tmp_path / "head")
    models = ["--backbone", str(tmp_path / "backbone"), "--head", str(tmp_path / "head")]
    command = ["sample", "--prompt", tiny.PROMPT, *models, "--strategy", "halves", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--n", "5"]) == 2
    assert cli.main([*command, "--n", "4"]) == 0
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    (row,) = metrics["best_of_n"]
    assert (row["strategy"], row["schedule"]) == ("halves", [[3, 1], [3, 1], [6, 1]])
    assert [cut["name"] for cut in metrics["cuts"]] == ["halves at step 3", "halves at step 3", "halves at step 6"]
    assert wording.how(row) == "the best of each half at step 3"
    assert wording.is_ours(row)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the best of each half at step 3" in page
