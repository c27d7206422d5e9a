"""The strategy race: its bounds err no more often than they say, and a run costs and picks what they say."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting, made
from tests.sampling.test_not_finite import poisoned

import prism
from prism import PrismError
from prism.report import wording
from prism.sampling.plan import Workload, generator_of
from prism.sampling.racing import Race, is_above, race
from prism.sampling.trajectory import sample

LAWS = {  # draws of differences whose expectation, limited to [-1, 1], is 0: the hardest that are not above it
    "coin": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "normal": lambda rng, shape: rng.normal(0, 0.7, shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "mostly a little ahead": lambda rng, shape: np.where(rng.random(shape) < 0.05, -0.95, 0.05),
    "seldom far ahead": lambda rng, shape: np.where(rng.random(shape) < 0.05, 0.95, -0.05),
    "far beyond the width": lambda rng, shape: 50 * rng.standard_t(1.5, shape),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("bound", ["betting", "bernstein"])
def test_a_bound_is_wrong_no_more_often_than_it_says(law: str, bound: Any) -> None:
    delta, runs, asked = 0.1, 2000, (4, 8, 16, 32, 64)
    differences = LAWS[law](np.random.default_rng(0), (64, runs))
    wrong = np.zeros(runs, bool)
    for draws in asked:  # an error at any of these counts
        wrong |= is_above(differences[:draws], 1.0, delta, bound, len(asked))
    assert wrong.mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    if law == "coin" and bound == "betting":
        assert wrong.mean() >= delta / 8, "it gives less than it could"


def test_the_numbers_of_the_bounds() -> None:
    # Ten draws ahead by the width: wealth is the mean of (1 + stake)^10.
    wealth = np.mean([(1 + stake / 20) ** 10 for stake in range(1, 20)])
    for delta, above in ((1.01 / wealth, True), (0.99 / wealth, False)):
        assert is_above(np.full(10, 3.0), 2.0, delta) == above
    # Maurer and Pontil, Theorem 4, on [-2, 2]: mean - sqrt(2 V ln(2/d) / n) - 4 * 7 ln(2/d) / (3 (n - 1)) > 0.
    values = np.random.default_rng(1).uniform(0.3, 1, 40)
    log = math.log(2 / 0.2)
    lower = values.mean() - math.sqrt(2 * values.var(ddof=1) * log / 40) - 28 * log / (3 * 39)
    for shift in (-1e-6, 1e-6):
        assert is_above(values - lower + shift, 2.0, 0.2, "bernstein") == (shift > 0)
    assert not is_above(np.ones(1), 1.0, 0.1, "bernstein")
    table = np.random.default_rng(2).normal(0.2, 1, (30, 3, 2))
    columns = [[is_above(table[:, a, b], 1.0, 0.3) for b in range(2)] for a in range(3)]
    assert np.array_equal(is_above(table, 1.0, 0.3), columns)


def drawn(values: np.ndarray) -> Any:
    """Readings (draws, candidates) as a race asks for them."""
    return lambda positions, draws: values[np.ix_(list(draws), list(positions))]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_race_drops_one_of_the_best_no_more_often_than_it_says(keep: int) -> None:
    rng, delta, runs = np.random.default_rng(3), 0.2, 250
    wrong = 0
    for _ in range(runs):
        values = rng.choice([-0.5, 0.5], (32, 5)) + rng.normal(0, 1, (32, 1))  # all alike, with noise that all share
        left, _ = race(drawn(values), 5, keep, delta, 32, 4, 1.0)
        wrong += not {*range(keep)} <= {*left}
    assert wrong / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


def test_a_race_reads_no_more_of_those_that_are_lost() -> None:
    rng = np.random.default_rng(4)
    values = np.array([0.0, 2.0, 1.8, -1.0, -1.0]) + rng.normal(0, 0.1, (40, 5)) + rng.normal(0, 5, (40, 1))
    left, seen = race(drawn(values), 5, 1, 0.1, 40, 5, 0.5)
    counts = np.isfinite(seen).sum(0).tolist()
    assert left == [1]
    assert counts[1] == counts[2] == len(seen) > max(counts[0], *counts[3:])
    assert race(drawn(values), 5, 2, 0.1, 40, 5, 0.5)[0] == [1, 2]
    assert race(drawn(values), 1, 1, 0.1, 40, 5, 0.5)[1].shape == (5, 1)
    left, seen = race(drawn(np.zeros((8, 3))), 3, 1, 0.1, 8, 3, 1.0)  # nothing is ever sure
    assert (left, len(seen)) == ([0, 1, 2], 8)
    # Rock, paper, scissors: each is sure to be better than another, and one is left all the same.
    circle = np.tile([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [1.0, 2.0, 0.0]], (60, 1))
    assert len(race(drawn(circle), 3, 1, 0.5, 180, 60, 0.1)[0]) >= 1


ONE = Race(first=3, width=0.01, delta=0.9, most_draws=9, each_draws=1, judge_at=100.0)
TWO = Race(first=2, last=4, every=2, width=0.01, delta=0.9, most_draws=8, conditional=True, judge_at=100.0)


@pytest.mark.parametrize(("name", "plan"), [("wan-euler", ONE), ("cogvideox-dpm", TWO)])
def test_it_picks_and_costs_what_its_readings_say(name: str, plan: Race) -> None:
    setting, n, keep = made(name), 4, 2 if plan is ONE else 1
    judge = setting.judge(2)
    result = prism.best_of_n(
        setting.pipe, judge, tiny.PROMPT, n=n, plan=plan, top_k=keep, batch_size=1, seed=3, **setting.call
    )
    load = Workload.of(judge.backbone, setting.call, n, 2, top_k=keep)
    assert torch.equal(result.latents, setting.stock(result.seed)[1])
    assert result.reproduce
    steps = [step for step, _ in plan.cuts(load)]
    assert [cut["step"] for cut in result.scores] == steps[: len(result.scores)]
    rows, done, alive = 0.0, 0, [*range(n)]
    for cut in result.scores:
        step, t = cut["step"], cut["t"]
        assert (cut["candidates"], t) == (alive, 100)
        if not plan.conditional:
            clean = {
                each: sample(judge.backbone, tiny.PROMPT, 3 + each, setting.call, [step]).predicted for each in alive
            }
            left, values = race(
                readings(judge, setting, clean, alive, step, t),
                *(len(alive), keep, plan.delta / len(steps), plan.most_draws, plan.each_draws, plan.width),
            )
            assert cut["draws"] == np.isfinite(values).sum(0).tolist()
            assert set(cut["kept"]) == {alive[each] for each in left[:keep]}
            means = np.nanmean(values, 0)
            np.testing.assert_allclose(cut["scores"]["overall"], means, atol=1e-4)
        again = setting.name.startswith("cogvideox")  # in one batch: conditional rows are computed twice
        rows += len(alive) * 2 * (step - 1 - done) + sum(cut["draws"]) * 2 / 3
        survivors = len(cut["kept"])
        rows += len(alive) + (1 + again) * survivors if plan.conditional else 2 * len(alive)
        done, alive = step, cut["kept"]
    rows += 2 * keep * (6 - done)
    assert result.ledger.denoiser_rows == pytest.approx(rows)
    assert rows < plan.rows(load)
    assert result.ledger.vae_decodes == keep
    assert plan is TWO or max(result.scores[0]["draws"]) < plan.most_draws, "it was sure before draws ran out"


def readings(judge: Any, setting: Setting, clean: Any, alive: Sequence[int], step: int, t: float) -> Any:
    def read(positions: Sequence[int], draws: Sequence[int]) -> np.ndarray:
        rows = []
        for draw in draws:
            generator = generator_of(random.Random(f"race {step} {draw} 3").randrange(2**62))
            latents = torch.cat([clean[alive[position]] for position in positions])
            scores, _ = judge.score_clean(latents, tiny.PROMPT, t, 1, generator, **setting.call)
            rows.append(scores[:, 3].double().numpy())
        return np.stack(rows)

    return read


def test_candidates_that_break_leave_the_race(wan: Setting) -> None:
    with poisoned(wan, {20, 22}, after=2), pytest.warns(UserWarning, match="is dropped: its latents hold NaN"):
        result = prism.best_of_n(
            wan.pipe, wan.judge(2), tiny.PROMPT, n=4, seed=20, plan=Race(first=4, most_draws=4), **wan.call
        )
    (cut,) = result.scores
    assert (cut["candidates"], cut["dropped"]) == ([1, 3], [0, 2])
    with poisoned(wan, {20, 21}, after=2), pytest.warns(UserWarning, match="is dropped"), pytest.raises(PrismError):
        prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=2, seed=20, strategy="race", **wan.call)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (Race(first=7), "The race looks at step 7, and the run has steps 1 to 6"),
        (Race(first=0), "first of a race must be a whole number of at least 1; found 0"),
        (Race(first=3, last=2), "last look, at step 2, comes before its first, at 3"),
        (Race(every=0), "every of a race must be"),
        (Race(delta=1), "delta must be a probability above 0 and below 1; found 1"),
        (Race(delta=0), "delta must be a number above 0"),
        (Race(width=0), "width must be a number above 0"),
        (Race(most_draws=0), "most_draws must be a whole number from 1 to 1,000"),
        (Race(each_draws=40), "each_draws must be a whole number from 1 to 32; found 40"),
        (Race(bound="hope"), "bound must be one of betting, bernstein; found hope"),  # type: ignore[arg-type]
        (Race(conditional="yes"), "conditional must be True or False"),  # type: ignore[arg-type]
        (Race(judge_at=1001), "judge_at must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(wan: Setting, plan: Race, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=4, plan=plan, **wan.call)


def test_its_words() -> None:
    cuts = [{"step": 4, "kept": [1, 2], "t": 700.0, "look": "ahead"}, {"step": 6, "kept": [1], "t": 700.0}]
    settings = Race.settings(cuts)
    assert settings["schedule"] == [[4, 2], [6, 1]]
    row: Any = {"strategy": "race", **settings}
    assert wording.how(row) == "draws until sure, step 4 keeps 2, step 6 keeps 1, judged at t\u00a0=\u00a0700"
