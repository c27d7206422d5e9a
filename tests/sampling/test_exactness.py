"""The winner is the stock pipeline's own video, however the search ran, and the candidate the judge likes best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.sampling.conftest import BUILDERS, Setting

import prism
from prism.sampling import expected_rows
from prism.sampling.plan import cut_rows, parse, resolve

N, STEPS = 3, 6
# (arguments, tap): a late tap listens to the sampler's own pass, an early one probes.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({"strategy": "none"}, 1),
    "random": ({"strategy": "random"}, 1),
    "full": ({"strategy": "full"}, 2),
    "first step": ({"schedule": "1:1"}, 1),
    "middle step, probed": ({"schedule": "3:1"}, 1),
    "middle step, listened to": ({"schedule": "3:1"}, 3),
    "last step, probed": ({"schedule": [(6, 1)]}, 1),
    "last step, listened to": ({"schedule": [(6, 1)]}, 3),
    "several cuts, probed": ({"schedule": [(2, 2), (5, 1)]}, 1),
    "several cuts, listened to": ({"schedule": [(2, 2), (5, 1)]}, 3),
    "ends with several": ({"schedule": [(2, 2)]}, 2),
    "draft": ({"strategy": "draft", "draft_steps": 2}, 2),
    "oracle": ({"strategy": "oracle", "oracle": lambda video, prompt: float(video[:, :16].mean())}, 1),
}


def assert_stock(setting: Setting, result: prism.BestOfNResult, exact: bool) -> None:
    video, latents, _ = setting.stock(result.seed)
    if exact:
        assert torch.equal(result.latents, latents)
        assert np.array_equal(result.video, video)
    else:
        assert torch.equal(result.video, result.latents[0])  # asked for as latents
        torch.testing.assert_close(result.latents, latents, atol=5e-5, rtol=1e-4)


# Of the Euler solver, which has neither memory nor noise, what differs from the others by more than the cut's place.
MEMORYLESS = ("full", "several cuts, probed", "several cuts, listened to", "draft", "oracle")
CASES = [(name, setting) for name in RUNS for setting in BUILDERS if setting != "wan-euler" or name in MEMORYLESS]


@pytest.mark.parametrize(("name", "setting"), CASES, indirect=["setting"])
def test_the_winner_is_the_stock_video(setting: Setting, name: str) -> None:
    arguments, tap = RUNS[name]
    judge = setting.judge(tap)
    winners = []
    for batch_size in (1, 2):  # one by one, and in uneven chunks
        call = setting.call if batch_size == 1 else {**setting.call, "output_type": "latent"}
        result = prism.best_of_n(
            setting.pipe, judge, tiny.PROMPT, n=N, seed=11, batch_size=batch_size, **arguments, **call
        )
        assert_stock(setting, result, exact=batch_size == 1)
        winners.append(result.seed)
        schedule = arguments.get("schedule")
        cuts = parse(schedule) if isinstance(schedule, str) else schedule
        rows = expected_rows(
            arguments.get("strategy", "early"),
            N,
            STEPS,
            judge.backbone.family.cfg,
            True,
            tap / 3,
            resolve(cuts, N, STEPS) if cuts else None,
            arguments.get("draft_steps", 0),
        )
        assert result.ledger.denoiser_rows == pytest.approx(rows)
        assert result.ledger.vae_decodes == (N if name == "oracle" else 0) + (1 if batch_size == 1 else 0)
        assert result.ledger.text_encodings == 2
    assert len(set(winners)) == 1
    assert winners[0] in range(11, 11 + N)


@pytest.mark.parametrize(("tap", "keep"), [(1, 1), (3, 2)])  # probed, and listened to in both forms of guidance
def test_scores_are_the_judge_s_of_the_stock_latents(setting: Setting, tap: int, keep: int) -> None:
    """Brute force: score every candidate's stock latents at the step of the cut, and take the best."""
    judge, step = setting.judge(tap), 4
    expected, t = [], 0.0
    for seed in range(N):
        _, _, after = setting.stock(seed)
        noisy, timestep = after[step - 2][0], after[step - 1][1]
        t = float(timestep)
        expected.append(judge.score(noisy, [tiny.PROMPT], t, **setting.call)[0])
    call = {**setting.call, "output_type": "latent"}
    for batch_size in (1, 2, 3):
        result = prism.best_of_n(
            setting.pipe, judge, tiny.PROMPT, n=N, schedule=[(step, keep)], batch_size=batch_size, **call
        )
        cut = result.scores[0]
        found = torch.tensor([cut["scores"][name] for name in judge.dimensions]).T
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert (cut["step"], cut["candidates"]) == (step, list(range(N)))
        assert cut["t"] == pytest.approx(t)
        best = torch.stack(expected)[:, judge.dimensions.index("overall")].topk(keep).indices.tolist()
        assert cut["kept"] == sorted(best)
        assert result.scores[-1]["kept"] == [result.index]


def test_later_cuts_see_the_survivors_only(setting: Setting) -> None:
    """Each cut keeps the best of those the cut before it kept, as counted from stock latents."""
    judge, schedule = setting.judge(2), [(2, 3), (3, 2), (5, 1)]
    alive = list(range(4))
    expected = []
    for step, keep in schedule:
        scores = {}
        for seed in alive:
            _, _, after = setting.stock(seed)
            scored = judge.score(after[step - 2][0], [tiny.PROMPT], float(after[step - 1][1]), **setting.call)
            scores[seed] = float(scored[0, judge.dimensions.index("overall")])
        alive = sorted(sorted(alive, key=lambda seed: -scores[seed])[:keep])
        expected.append((step, sorted(scores), alive))
    call = {**setting.call, "output_type": "latent"}
    for batch_size in (1, 2, 4):
        result = prism.best_of_n(
            setting.pipe, judge, tiny.PROMPT, n=4, schedule=schedule, batch_size=batch_size, **call
        )
        assert [(cut["step"], cut["candidates"], cut["kept"]) for cut in result.scores] == expected


@pytest.mark.parametrize("strategy", ["full", "draft"])
def test_full_and_draft_judge_the_final_latents(setting: Setting, strategy: str) -> None:
    """Scores equal `score_clean` of a plain call's latents with one generator for all, and the best one wins."""
    judge = setting.judge(2)
    steps = {"draft": {"num_inference_steps": 3}}.get(strategy, {})
    call = {**setting.call, **steps, "output_type": "latent"}
    latents = torch.cat(
        [setting.pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(seed), **call).frames for seed in (5, 3, 8)]
    )
    arguments: dict[str, Any] = {"strategy": strategy, "seeds": (5, 3, 8), "judge_at": 600, "num_draws": 3, "seed": 2}
    arguments |= {"draft_steps": 3} if strategy == "draft" else {}
    call = {**setting.call, "output_type": "latent"}
    one = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, batch_size=1, **arguments, **call)
    all_ = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, batch_size=3, **arguments, **call)
    scores = [torch.tensor([r.scores[0]["scores"][name] for name in judge.dimensions]).T for r in (one, all_)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)
    assert one.scores[0]["t"] == 600
    assert one.index == all_.index == int(scores[0][:, judge.dimensions.index("overall")].argmax())
    spread = torch.stack(
        [
            judge.score_clean(latents, tiny.PROMPT, 600.0, 1, torch.Generator().manual_seed(i), **setting.call)[0]
            for i in range(24)
        ]
    )
    error = (spread.std(0) * (1 / 3 + 1 / 24) ** 0.5).clamp_min(1e-6)
    assert bool(((scores[0] - spread.mean(0)).abs() < 5 * error).all())


def test_the_oracle_sees_decoded_videos(setting: Setting) -> None:
    seen = []

    def oracle(video: Any, prompt: str) -> float:
        seen.append(video)
        assert prompt == tiny.PROMPT
        return -float(abs(video - setting.stock(2)[0]).max())

    result = prism.best_of_n(
        setting.pipe, None, tiny.PROMPT, n=3, strategy="oracle", oracle=oracle, keep_latents=True, **setting.call
    )
    assert result.seed == 2
    assert [video.shape for video in seen] == [(9, 32, 32, 3)] * 3
    assert result.candidate_latents is not None
    for seed, latents in result.candidate_latents.items():
        torch.testing.assert_close(latents[None], setting.stock(seed)[1], atol=5e-5, rtol=1e-4)


def test_guidance_off(setting: Setting) -> None:
    call = {**setting.call, "guidance_scale": 1.0, "output_type": "latent"}
    judge = setting.judge(2)
    for batch_size in (1, 3):
        arguments: dict[str, Any] = {"n": 3, "schedule": [(2, 2), (4, 1)], "batch_size": batch_size}
        result = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, **arguments, **call)
        generator = torch.Generator().manual_seed(result.seed)
        plain = setting.pipe(tiny.PROMPT, generator=generator, **call).frames
        torch.testing.assert_close(result.latents, plain, atol=0 if batch_size == 1 else 5e-5, rtol=1e-4)
        rows = expected_rows("early", 3, STEPS, judge.backbone.family.cfg, False, 2 / 3, ((2, 2), (4, 1)))
        assert result.ledger.denoiser_rows == pytest.approx(rows)


def test_negative_prompts_go_along(setting: Setting) -> None:
    for negative in ("a cat", ["a cat"]):
        call = {**setting.call, "negative_prompt": negative, "output_type": "latent"}
        result = prism.best_of_n(setting.pipe, setting.judge(2), tiny.PROMPT, n=3, schedule=[(3, 1)], **call)
        generator = torch.Generator().manual_seed(result.seed)
        plain = setting.pipe([tiny.PROMPT], generator=generator, **call).frames
        torch.testing.assert_close(result.latents, plain, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("taps", [(1, 2), (1, 3)])  # probed, and listened to where guidance takes two calls
def test_an_average_in_the_gate_is_brute_force_over_stock_calls(setting: Setting, taps: tuple[int, int]) -> None:
    """Two heads at two taps: the mean of each head's own scores of stock latents ranks; the ledger counts the pass
    to the higher tap once, and both heads."""
    members = [setting.judge(tap, seed) for seed, tap in enumerate(taps)]
    judge, n, step, overall = prism.Judge.average(members), 4, 4, members[0].dimensions.index("overall")
    cfg = judge.backbone.family.cfg
    expected = []
    for seed in range(n):
        _, _, after = setting.stock(seed)
        noisy, t = after[step - 2][0], float(after[step - 1][1])
        scores = [member.score(noisy, [tiny.PROMPT], t, **setting.call)[0, overall] for member in members]
        expected.append(float(sum(scores)) / 2)
    assert cut_rows(n, 1, cfg, True, judge.tap / 3)[1] is (taps == (1, 2) or cfg == "one_batch")
    for batch_size in (1, 3, 4):
        result = prism.best_of_n(
            setting.pipe, judge, tiny.PROMPT, n=n, schedule=[(step, 1)], batch_size=batch_size, **setting.call
        )
        assert result.scores[0]["scores"]["overall"] == pytest.approx(expected, abs=1e-4)
        assert result.index == max(range(n), key=lambda i: expected[i])
        if batch_size == 1:
            assert_stock(setting, result, exact=True)
        rows = expected_rows("early", n, STEPS, cfg, True, max(taps) / 3, ((step, 1),))
        assert result.ledger.denoiser_rows == pytest.approx(rows)
        assert result.ledger.head_calls == 2 * n
