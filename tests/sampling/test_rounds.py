"""`best_of_n(..., until=...)`: rounds go on until the winner is good enough by the judge's reference, and add up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting, made
from tests.sampling.test_not_finite import poisoned
from tests.sampling.test_stopping import COLUMN, probabilities, reference_of
from tests.sampling.test_way_out import assert_as_before, traces

import prism
from prism import Judge, PrismError, cli, files
from prism.commands.sampled import loser_of
from prism.judge.reference import Reference
from prism.preference.pairs import prompt_key
from prism.sampling.plan import Workload, generator_of
from prism.sampling.strategies import Early, Full

DRAWS = 3  # of the references here


def referred(judge: Judge, low: float = -1e3) -> Judge:
    """The judge with a reference at t = 650 and 300, of two clips with the score `low`."""
    judge.reference = reference_of(judge, np.full((2, 4), low), (650.0, 300.0), num_draws=DRAWS)
    return judge


def judged(setting: Setting, judge: Judge, seed: int, t: float) -> np.ndarray:
    """Scores (DRAWS, num_dimensions) of a seed's finished video, by the documented draws of a run of seed 0."""
    latents, rows = setting.stock(seed)[1], []
    for draw in range(DRAWS):
        generator = generator_of(random.Random(f"until {draw} 0").randrange(2**62))
        rows.append(judge.score_clean(latents, tiny.PROMPT, t, 1, generator, **setting.call)[0][0].double().numpy())
    return np.stack(rows)


PLANS = {
    "early": Early(schedule=((2, 1),)),
    "full": Full(num_draws=1, judge_at=200.0),
}


@pytest.mark.parametrize(("name", "plan"), [("cogvideox-dpm", "early"), ("wan-unipc", "full")])
def test_rounds_add_up_and_the_best_of_them_wins(name: str, plan: str) -> None:
    setting, n = made(name), 2
    judge = referred(setting.judge(2), low=1e3)  # which no video comes near, so that candidates run out
    call = {"plan": PLANS[plan], "batch_size": 1, **setting.call}
    alone = [prism.best_of_n(setting.pipe, judge, tiny.PROMPT, n=n, seed=seed, **call) for seed in (0, 2)]
    result = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, n=n, until=0.9, max_n=5, **call)
    stop = result.stop
    assert stop is not None
    t = 300 if plan == "full" else 650  # the nearest to judge_at
    assert (stop.reached, stop.rounds, stop.t, stop.num_draws, stop.clips) == (False, 2, t, DRAWS, 2)
    assert result.seeds == (0, 1, 2, 3)
    assert [cut["round"] for cut in result.scores] == [1, 2]
    if plan == "early":
        assert stop.winners[0]["candidate"] == alone[0].index
    for entry, cut in zip(stop.winners, result.scores):
        assert cut["kept"] == [entry["candidate"]]
        assert set(cut["candidates"]) == {entry["round"] * 2 - 2, entry["round"] * 2 - 1}
        rows = judged(setting, judge, entry["candidate"], t)
        assert entry["score"] == pytest.approx(rows.mean(0)[COLUMN], abs=1e-4)
        assert entry["error"] == pytest.approx(rows.std(0, ddof=1)[COLUMN] / DRAWS**0.5, abs=1e-4)
    best = max(stop.winners, key=lambda entry: entry["score"])
    assert result.index == result.seed == best["candidate"]
    assert stop.probability == best["probability"] < 1e-3
    assert torch.equal(result.latents, setting.stock(result.seed)[1])
    assert f"manual_seed({result.seed})" in result.reproduce
    load = Workload.of(judge.backbone, setting.call, n, 2)
    ready = PLANS[plan].settled(load)
    assert result.ledger.denoiser_rows == pytest.approx(2 * (ready.rows(load) + DRAWS * load.tap_share))
    assert result.ledger.vae_decodes == 1
    assert result.ledger.text_encodings == alone[0].ledger.text_encodings


def test_it_stops_at_the_first_winner_that_is_good_enough(wan: Setting) -> None:
    judge, call = referred(wan.judge(2), low=1e3), {"schedule": [(2, 1)], "batch_size": 1, **wan.call}
    stop = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=2, until=0.9, max_n=6, **call).stop
    winners = [entry["candidate"] for entry in stop.winners]
    scores = [entry["score"] for entry in stop.winners]
    rivals = np.full((2, 4), sorted(scores)[1] - 1e-3)  # which two of the three winners are above
    judge.reference = reference_of(judge, rivals, (650.0,), num_draws=DRAWS)
    result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=2, until=0.5, max_n=6, **call)
    chances = [probabilities(judge, np.full((1, 4), score), rivals)[0] for score in scores]
    first = next(number for number, chance in enumerate(chances, 1) if chance >= 0.5)
    assert (result.stop.rounds, result.stop.reached, result.index) == (first, True, winners[first - 1])
    assert result.stop.probability >= 0.5
    assert len(result.seeds) == 2 * first


def test_other_strategies_several_winners_prompts_and_kept_latents(wan: Setting) -> None:
    judge = referred(wan.judge(2), low=1e3)
    call = {"until": 0.9, "batch_size": 1, **wan.call}
    for result in prism.best_of_n(
        wan.pipe, judge, [tiny.PROMPT, tiny.OTHER_PROMPT], n=1, max_n=2, strategy="none", **call
    ):
        assert result.index == max(result.stop.winners, key=lambda entry: entry["score"])["candidate"]
        assert result.ledger.denoiser_rows == pytest.approx(2 * (12 + DRAWS * 2 / 3))
    result = prism.best_of_n(
        wan.pipe, judge, tiny.PROMPT, n=2, max_n=4, strategy="full", top_k=2, keep_latents=True, **call
    )
    order = sorted(result.stop.winners, key=lambda entry: -entry["score"])
    assert [pick.index for pick in result.top] == [entry["candidate"] for entry in order[:2]]
    assert sorted(result.candidate_latents) == [0, 1, 2, 3]
    for pick in result.top:
        assert torch.equal(pick.latents, wan.stock(pick.seed)[1])


def test_the_clips_of_the_prompt_are_what_it_is_compared_with(wan: Setting) -> None:
    judge = wan.judge(2)
    scores = np.array([[-1e3] * 4] * 4 + [[1e3] * 4])
    keys = (prompt_key(tiny.PROMPT),) * 4 + ("key",)
    facts = {"num_draws": 1, "between_prompts": {"650": {"overall": 0.8}}}  # not warned of: the prompt has its own
    judge.reference = Reference((650.0,), judge.dimensions, scores[None], scores[None] * 0, keys, facts)
    stop = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=1, until=0.9, strategy="none", **wan.call).stop
    assert (stop.reached, stop.rounds, stop.clips, stop.same_prompt) == (True, 1, 4, True)
    assert stop.probability == pytest.approx(1)


def test_a_round_s_winner_that_breaks_is_left_out_and_the_pipeline_stays_as_it_was(wan: Setting) -> None:
    judge = referred(wan.judge(2), low=1e3)
    call = {"n": 1, "strategy": "none", "until": 0.9, **wan.call}
    with poisoned(wan, {21}, after=2), pytest.warns(UserWarning, match="seed 21 is dropped"):
        result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, seed=20, max_n=2, **call)
    assert (result.seed, result.stop.rounds, len(result.stop.winners)) == (20, 2, 1)
    with poisoned(wan, {21}, after=2), pytest.warns(UserWarning, match="seed 21"), pytest.raises(PrismError):
        prism.best_of_n(wan.pipe, judge, tiny.PROMPT, seed=21, max_n=1, **call)
    wan.stock(0)
    before, calls = traces(wan.pipe), [0]

    def interrupt(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 29:  # in the second round's judging: 12 calls and one per draw a round
            raise KeyboardInterrupt

    handle = wan.pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prism.best_of_n(wan.pipe, judge, tiny.PROMPT, max_n=2, **call)
    handle.remove()
    assert calls[0] == 29
    assert_as_before(wan, before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"until": 0}, "until must be a number above 0, at most 1; found 0"),
        ({"until": 1}, "until must be a probability above 0 and below 1; found 1"),
        ({"until": "0.9"}, "until must be a number"),
        ({"until": True}, "until must be a number"),
        ({"until": 0.9, "max_n": 3}, "max_n must be a whole number from 4 to 10,000; found 3"),
        ({"max_n": 8}, "max_n bounds the candidates of a run with until; give until, or leave max_n out"),
        ({"until": 0.9, "n": None, "seeds": [1, 2]}, "until goes on from seed .*; leave seeds out"),
        ({"until": 0.9, "select_by": {"VQ": 1, "TA": 2}}, "and this run ranks by VQ:1, TA:2; name one with select_by"),
        ({"until": 0.9, "seed": 2**63 - 9}, "A seed must be a whole number"),
    ],
)
def test_what_cannot_be_followed_is_refused(wan: Setting, arguments: dict[str, Any], sentence: str) -> None:
    judge = referred(wan.judge(2))
    with pytest.raises(PrismError, match=sentence):
        prism.best_of_n(wan.pipe, judge, tiny.PROMPT, **{"n": 4, **arguments}, **wan.call)
    judge.reference = None
    if "max_n" not in arguments and arguments["until"] == 0:
        with pytest.raises(PrismError, match=r"until compares .* this judge has none; make one with prism reference"):
            prism.best_of_n(wan.pipe, judge, tiny.PROMPT, n=4, until=0.9, **wan.call)
        with pytest.raises(PrismError, match="until needs a judge that has a reference"):
            prism.best_of_n(wan.pipe, None, tiny.PROMPT, n=4, until=0.9, strategy="none", **wan.call)


def test_the_command_says_how_it_ended(wan: Setting, tmp_path: Path, capsys: Any) -> None:
    wan.pipe.save_pretrained(tmp_path / "backbone")
    files.write_json(tmp_path / "backbone" / "call.json", tiny.CALL_WAN)
    referred(wan.judge(2), low=1e3).save_pretrained(tmp_path / "head")
    models = ["--backbone", str(tmp_path / "backbone"), "--head", str(tmp_path / "head")]
    command = ["sample", "--prompt", tiny.PROMPT, *models, "--n", "2", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--until", "1.5"]) == 2
    assert cli.main([*command, "--until", "0.9", "--max-n", "1"]) == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert cli.main([*command, "--until", "0.9", "--max-n", "4"]) == 0
    printed = capsys.readouterr().out
    assert "preferred to the reference's 2 clips of all prompts with probability 0.00 (overall at t = 650)." in printed
    assert "The candidates ran out before it was enough, after 2 rounds of 2." in printed
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["until"]["rounds"], metrics["until"]["reached"], metrics["seeds"]) == (2, False, [0, 1, 2, 3])
    assert [cut["name"] for cut in metrics["cuts"]] == ["round 1, step 1", "round 2, step 1"]
    (row,) = metrics["best_of_n"]
    assert (row["n"], row["schedule"]) == (4, [[1, 1]])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "round 2, step 1" in page
    assert "these were judged once more, and the best of them is the winner" in page
    assert "rates highest at the last cut" not in page
    assert loser_of(None, tiny.PROMPT, {}, metrics) == loser_of(None, tiny.PROMPT, {}, {"cuts": []}) == []
