"""A candidate whose latents, video or score hold NaN is dropped, its seed is named, and the rest goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting
from tests.works import works

import prism
from prism.errors import PrismError

RUNS: dict[str, dict[str, Any]] = {
    "early": {"schedule": [(2, 3), (4, 1)]},
    "full": {"strategy": "full"},
    "draft": {"strategy": "draft", "draft_steps": 3},
    "oracle": {"strategy": "oracle", "oracle": lambda video, prompt: float(video[:, :16].mean())},
}


@contextmanager
def poisoned(setting: Setting, seeds: set[int], after: int = 0) -> Iterator[None]:
    """The denoiser's output is NaN for candidates of these seeds from scheduler step `after` on: known by their noise,
    wherever they stand in a batch."""
    shape = setting.stock(0)[1].shape
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in sorted(seeds)]
    pipe, prepare, marked = setting.pipe, setting.pipe.prepare_latents, []

    def prepared(*args: Any, **kwargs: Any) -> torch.Tensor:
        latents = prepare(*args, **kwargs)
        marked[:] = [any(torch.allclose(row, noise[0], atol=1e-3) for noise in noises) for row in latents]
        return latents

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        sample = output[0]
        if len(sample) == len(marked) and (pipe.scheduler.step_index or 0) >= after:
            sample = sample.masked_fill(torch.tensor(marked).view(-1, *[1] * (sample.ndim - 1)), torch.nan)
        return (sample, *output[1:])

    pipe.prepare_latents = prepared
    handle = pipe.transformer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        del pipe.prepare_latents


def search(setting: Setting, judge: Any, **arguments: Any) -> Any:
    return prism.best_of_n(setting.pipe, judge, tiny.PROMPT, **{"n": 4, "seed": 20, **arguments}, **setting.call)


@works(
    "Precision and quantisation", "Latents of a candidate that become NaN", "warned", "It is dropped, its seed named"
)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", RUNS)
def test_a_candidate_with_nan_is_dropped_and_named(wan: Setting, name: str, batch_size: int) -> None:
    run = {**RUNS[name], "batch_size": batch_size, "top_k": 2 if name != "early" else 1}
    judge = wan.judge(2)
    with poisoned(wan, {21}), pytest.warns(UserWarning, match="The candidate with seed 21 is dropped: its latents"):
        result = search(wan, judge, **run)
    others = search(wan, judge, **{**run, "n": None, "seeds": [20, 22, 23]})
    assert [pick.seed for pick in result.top] == [pick.seed for pick in others.top]
    np.testing.assert_allclose(result.video, others.video, atol=1e-4)
    cut = result.scores[0]
    assert (cut["candidates"], cut["dropped"]) == ([0, 2, 3], [1])
    assert all(not each["dropped"] for each in result.scores[1:])
    assert 1 not in cut["kept"]
    assert all(len(column) == 3 for column in cut["scores"].values())
    json.dumps(result.scores, allow_nan=False)


@pytest.mark.parametrize("name", [*RUNS, "none", "random"])
def test_where_a_winner_fails_in_the_end_the_next_takes_its_place(wan: Setting, name: str) -> None:
    run = RUNS.get(name, {"strategy": name})
    judge = wan.judge(2)
    first = search(wan, judge, **run, batch_size=1)
    ranked = search(wan, judge, **{**run, "schedule": [(2, 3)]} if name == "early" else run, top_k=3, batch_size=1).top
    step = {"draft": 3, "early": 4}.get(name, 0)
    with poisoned(wan, {first.seed}, after=step), pytest.warns(UserWarning, match=f"seed {first.seed} is dropped"):
        result = search(wan, judge, **run, batch_size=1)
    assert result.seed != first.seed
    assert np.array_equal(result.video, wan.stock(result.seed)[0])
    if result.scores:
        assert result.scores[-1]["dropped"] == [first.index]
        assert first.index not in result.scores[-1]["kept"]
    if name in ("full", "draft", "oracle"):
        assert result.seed == ranked[1].seed


def test_fewer_finite_ones_than_top_k_is_an_error(wan: Setting) -> None:
    with poisoned(wan, {20, 22, 23}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert search(wan, wan.judge(2), schedule=[(2, 1)]).seed == 21
        assert search(wan, None, strategy="none").seed == 21
        for run in ({"strategy": "full"}, {"strategy": "none"}, {"schedule": [(3, 2)]}):
            with pytest.raises(PrismError, match="Fewer than the 2 candidates of top_k have finite"):
                search(wan, wan.judge(2), top_k=2, **run)
    with poisoned(wan, {20, 21, 22, 23}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in (*RUNS.values(), {"strategy": "none"}, {"strategy": "random"}):
            with pytest.raises(PrismError, match=r"No candidate has finite .* seeds 20, 21, 22, 23;"):
                search(wan, wan.judge(2), **run)


@pytest.mark.parametrize("name", ["early", "full", "draft"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_score_of_nan_drops_its_candidate(wan: Setting, name: str, batch_size: int) -> None:
    judge = wan.judge(2)
    plain, least = judge.score_tokens, []

    def with_nan(tokens: Any) -> torch.Tensor:
        scores = plain(tokens)
        least[:] = least or [float(tokens.visual[-1].mean())]
        hit = [abs(float(row.mean()) - least[0]) < 1e-6 for row in tokens.visual]
        scores[torch.tensor(hit), 0] = torch.nan
        return scores

    judge.score_tokens = with_nan  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="is dropped: "):
        result = search(wan, judge, n=3, batch_size=batch_size, **RUNS[name])
    (dropped,) = result.scores[0]["dropped"]
    assert len(result.scores[0]["candidates"]) == 2
    assert result.index != dropped
    judge.score_tokens = lambda tokens: plain(tokens) * torch.nan  # type: ignore[method-assign]
    with warnings.catch_warnings(), pytest.raises(PrismError, match=r"no finite score|No candidate has finite"):
        warnings.simplefilter("ignore")
        search(wan, judge, n=3, batch_size=batch_size, **RUNS[name])


def test_a_video_or_an_oracle_s_answer_of_nan_drops_its_candidate(wan: Setting) -> None:
    answers = iter([0.1, float("nan"), 0.3, float("inf")])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = search(wan, None, strategy="oracle", oracle=lambda video, prompt: next(answers))
    sentences = [str(each.message) for each in told]
    assert sentences == [
        f"The candidate with seed {seed} is dropped: the oracle's score of it is NaN or infinite." for seed in (21, 23)
    ]
    assert (result.seed, result.scores[0]["dropped"]) == (22, [1, 3])
    decode, calls = wan.pipe.vae.decode, []

    def overflow(latents: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        (video,) = decode(latents, *args, **kwargs)
        return (video * torch.nan if len(calls) == 2 else video,)

    wan.pipe.vae.decode = overflow
    try:
        with pytest.warns(UserWarning, match="seed 21 is dropped: its video holds NaN"):
            result = search(wan, None, strategy="oracle", oracle=lambda video, _: 1.0 + video.mean(), batch_size=1)
    finally:
        del wan.pipe.vae.decode
    assert result.scores[0]["dropped"] == [1]


def test_equal_scores_are_said(wan: Setting) -> None:
    with pytest.warns(UserWarning, match="All 4 candidates have the same score at step 6, so that the first are kept"):
        assert search(wan, None, strategy="oracle", oracle=lambda video, prompt: 0.5).index == 0
    judge = wan.judge(2)
    judge.score_tokens = lambda tokens: torch.zeros(len(tokens.visual), 4)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="same score at step 3"):
        assert search(wan, judge, schedule=[(3, 1)]).index == 0
