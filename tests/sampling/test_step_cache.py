"""Drafts with a step cache: they are diffusers' own cached runs, cost what is computed, and leave nothing behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from tests import tiny
from tests.machinery import seeded
from tests.sampling.conftest import Setting
from tests.zoo import VARIANTS

import prism
from prism import PrismError, cli
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.sampling.drafts import Draft
from prism.sampling.ledger import Meter
from prism.sampling.plan import Candidate, Workload
from prism.sampling.recording import Recording
from prism.sampling.step_cache import Drafter, StepCache, parse

N, STEPS, TAP, SEED = 3, 6, 2, 4
ALL_SKIPPED = 1e9  # a threshold that no residual exceeds


def _blocks(denoiser: Any) -> list[Any]:
    return list(denoiser.blocks if hasattr(denoiser, "blocks") else denoiser.transformer_blocks)


class Computed:
    """Rows times blocks that are computed: seen by a layer inside each block, which a skipped block does not call."""

    def __init__(self, denoiser: Any):
        self.rows, self.layers = 0, [block.norm1 for block in _blocks(denoiser)]

    def __enter__(self) -> Computed:
        self.handles = [layer.register_forward_pre_hook(self.count) for layer in self.layers]
        return self

    def count(self, _module: Any, args: Any) -> None:
        self.rows += len(args[0])

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _traces(denoiser: Any) -> dict[str, Any]:
    """The names of all that is set on a denoiser's modules, and of the hooks on them."""
    return {
        name: (sorted(vars(module)), list(getattr(module, "_diffusers_hook", HookRegistry(module)).hooks))
        for name, module in denoiser.named_modules()
    }


CONFIGS = {
    f"first-block:{ALL_SKIPPED}": lambda: FirstBlockCacheConfig(threshold=ALL_SKIPPED),
    "taylorseer:2": lambda: TaylorSeerCacheConfig(2, 3, taylor_factors_dtype=torch.float32, use_lite_mode=True),
}


@pytest.mark.parametrize("way", CONFIGS)
def test_drafts_are_cached_runs_of_diffusers_and_the_winner_is_a_stock_call(setting: Setting, way: str) -> None:
    pipe, judge, call = setting.pipe, setting.judge(TAP), setting.call
    setting.stock(SEED)
    before = _traces(pipe.transformer)
    with Computed(pipe.transformer) as computed:
        result = prism.best_of_n(
            pipe, judge, tiny.PROMPT, N, strategy="draft", draft_cache=way, seed=SEED, batch_size=1, **call
        )
    assert _traces(pipe.transformer) == before
    assert not pipe.transformer.is_cache_enabled
    video, latents, _ = setting.stock(result.seed)
    assert torch.equal(result.latents, latents)
    assert (result.video == video).all()

    cfg = judge.backbone.family.cfg
    plan, load = Draft(draft_cache=way), Workload(N, (2,) * STEPS, cfg, TAP / 3)
    assert result.ledger.denoiser_rows == pytest.approx(computed.rows / 3)
    if plan.adapts():
        assert result.ledger.denoiser_rows < plan.rows(load)
    else:
        assert result.ledger.denoiser_rows == pytest.approx(plan.rows(load))
    if str(ALL_SKIPPED) in way:  # the first step, one block of each later one, judging, the winner from step 2
        assert computed.rows == N * 2 * (3 + STEPS - 1) + N * 2 * TAP + 2 * 3 * (STEPS - 1)

    drafts = []
    for seed in range(SEED, SEED + N):
        pipe.transformer.enable_cache(CONFIGS[way]())
        drafts.append(pipe(tiny.PROMPT, generator=seeded(seed), **{**call, "output_type": "latent"}).frames)
        pipe.transformer.disable_cache()
    draws = seeded(_draws(SEED))
    expected, _ = judge.score_clean(torch.cat(drafts), tiny.PROMPT, 700, num_draws=2, generator=draws, **call)
    scores = torch.tensor(list(result.scores[0]["scores"].values())).T
    assert torch.allclose(scores, expected, atol=1e-5)
    assert result.scores[0]["draft_cache"] == way.replace("1000000000.0", "1000000000")
    assert not torch.equal(drafts[0], setting.stock(SEED)[1])


def _draws(seed: int) -> int:
    return random.Random(f"judge {seed}").randrange(2**62)


def test_a_threshold_of_zero_leaves_nothing_out(setting: Setting) -> None:
    """So that the drafts are those of "full", to the bit, and the winner needs no row beyond them."""
    options = {"seed": SEED, "batch_size": 1, **setting.call}
    judge = setting.judge(TAP)
    full = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, N, strategy="full", **options)
    for way in ("first-block:0", "taylorseer:1") if setting.name == "wan-unipc" else ("first-block:0",):
        draft = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, N, strategy="draft", draft_cache=way, **options)
        assert draft.scores[0]["scores"] == full.scores[0]["scores"]
        assert draft.ledger.denoiser_rows == full.ledger.denoiser_rows
        assert torch.equal(draft.latents, full.latents)


@pytest.mark.parametrize(
    "way", ["guidance:0.5", {"taylorseer": 2, "guidance": 0.34}, {"first-block": 0.1, "guidance": 0}]
)
def test_guidance_is_off_on_the_last_steps(setting: Setting, way: Any) -> None:
    judge, options = setting.judge(TAP), {"seed": SEED, "batch_size": 2, **setting.call}
    with Computed(setting.pipe.transformer) as computed:
        result = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, N, strategy="draft", draft_cache=way, **options)
    assert result.ledger.denoiser_rows == pytest.approx(computed.rows / 3)
    plan, load = Draft(draft_cache=way), Workload(N, (2,) * STEPS, judge.backbone.family.cfg, TAP / 3)
    most = plan.rows(load)
    assert result.ledger.denoiser_rows <= most if plan.adapts() else result.ledger.denoiser_rows == pytest.approx(most)
    assert torch.allclose(result.latents, setting.stock(result.seed)[1], atol=1e-4)


def test_no_guidance_at_all_is_a_call_without_guidance(wan: Setting) -> None:
    pipe, judge, call = wan.pipe, wan.judge(TAP), wan.call
    options = {"strategy": "draft", "draft_cache": "guidance:0", "seed": SEED, "batch_size": 1}
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, N, **options, **call)
    plain = {**call, "guidance_scale": 1.0, "output_type": "latent"}
    drafts = torch.cat([pipe(tiny.PROMPT, generator=seeded(SEED + row), **plain).frames for row in range(N)])
    draws = seeded(_draws(SEED))
    expected, _ = judge.score_clean(drafts, tiny.PROMPT, 700, num_draws=2, generator=draws, **call)
    assert torch.allclose(torch.tensor(list(result.scores[0]["scores"].values())).T, expected, atol=1e-4)
    assert result.ledger.denoiser_rows == N * STEPS + N * 2 * TAP / 3 + 2 * STEPS


def test_rows_of_a_guided_half_by_hand() -> None:
    """Of 8 steps with 2 passes 4 are guided; taylorseer computes steps 1, 2, 3, 5, 7."""
    cache = parse("taylorseer:2,guidance:0.5")
    assert cache.rows((2,) * 8, "two_calls") == [2, 2, 2, 0, 1, 0, 1, 0]
    assert cache.rows((2,) * 8, "one_batch") == [2, 2, 2, 0, 1, 1, 1, 0]  # other rows from step 5: it warms up again
    assert cache.whole_steps((2,) * 8, "two_calls") == 3
    assert parse("guidance:0.5").whole_steps((2,) * 8, "one_batch") == 4
    assert parse("first-block:0.1").whole_steps((2,) * 8, "one_batch") == 0
    load = Workload(4, (2,) * 8, "two_calls", 0.5)
    assert Draft(draft_cache="taylorseer:2,guidance:0.5").rows(load) == 4 * 8 + 4 * 2 * 0.5 + 2 * 5
    few = Workload(4, (2,) * 8, "two_calls", 0.5, draft_calls=(2,) * 4)
    assert Draft(draft_steps=4, draft_cache="guidance:0.5").rows(few) == 4 * 6 + 4 + 16


@pytest.mark.parametrize("name", ["hunyuan", "wan22_a14b_t2v", "ltx", "mochi", "skyreels_v2_df"])
def test_other_families(name: str) -> None:
    """Passes that the pipeline names or not, two denoisers, blocks of two kinds, packed latents."""
    pipe, call = VARIANTS[name]()
    backbone, call = Backbone(pipe), {**normalised(call), "output_type": "latent"}
    before = list(map(_traces, backbone.denoisers))
    cache = parse("taylorseer:2").fitted(backbone)
    assert list(map(_traces, backbone.denoisers)) == before
    candidates = [Candidate(0, 3), Candidate(1, 8)]
    arguments = {**call, **backbone.batch(["a cat runs"] * 2, [3, 8], call)}
    steps = backbone.steps(arguments)
    outputs = []
    for each in (cache, StepCache()):
        drafter = Drafter(each, backbone, candidates, {c: Recording() for c in candidates}, guided_steps=len(steps))
        with backbone.held(), torch.no_grad(), Meter(backbone).open() as ledger:
            drafter.run(arguments)
        outputs.append(drafter.finished())
        if len(backbone.denoisers) == 1:  # else each of them warms up
            assert ledger.denoiser_rows == 2 * sum(each.rows(steps.calls, backbone.family.cfg))
    assert (len(steps) <= 3) == torch.equal(*outputs)


# -- what is left behind


class Mine(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return output


@pytest.mark.parametrize("way", ["first-block:0.1", "taylorseer:2"])
@pytest.mark.parametrize("broken", ["denoiser", "judge"])
def test_the_pipeline_is_as_it_was_after_an_error(way: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=TAP, dim=16)
    call = {**tiny.CALL_WAN, "output_type": "latent"}
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[1]).register_hook(Mine(), "mine")
    plain = pipe(tiny.PROMPT, generator=seeded(0), **call).frames
    before, calls = _traces(pipe.transformer), []

    def interrupt(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 5 or broken == "judge":
            raise KeyboardInterrupt

    handle = pipe.transformer.blocks[0].norm1.register_forward_pre_hook(interrupt) if broken == "denoiser" else None
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if broken == "judge":
            patched.setattr(judge, "score_clean", interrupt)
        prism.best_of_n(pipe, judge, tiny.PROMPT, 2, strategy="draft", draft_cache=way, batch_size=1, **call)
    if handle is not None:
        handle.remove()
    assert calls
    assert _traces(pipe.transformer) == before
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(pipe(tiny.PROMPT, generator=seeded(0), **call).frames, plain)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=ALL_SKIPPED))  # no stale list of its hooks is left
    assert not torch.equal(pipe(tiny.PROMPT, generator=seeded(0), **call).frames, plain)


# -- refusals


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("teacache", "names a cache of first-block, taylorseer.*found teacache"),
        ("", "names a cache"),
        ("first-block:0.1,first-block:0.2", "names a cache"),
        (["first-block"], "names a cache"),
        (0.1, "names a cache"),
        ({"first-block": 0.1, "taylorseer": 3}, "one cache; found first-block and taylorseer"),
        ("first-block:much", "takes a number, such as first-block:0.06; found much"),
        ({"first-block": float("nan")}, "first-block in draft_cache"),
        ("first-block:-1", "first-block in draft_cache"),
        ("taylorseer:0", "taylorseer in draft_cache"),
        ("taylorseer:2.5", "whole number of steps; found 2.5"),
        ("guidance:1.5", "guidance in draft_cache"),
        ("guidance", "guidance with the share of steps"),
    ],
)
def test_what_is_no_cache_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        parse(value)


@pytest.mark.parametrize("text", ["first-block", "first-block:0.1", "taylorseer:4,guidance:0.25", "guidance:1"])
def test_a_cache_is_its_text(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("name", "way", "sentence"),
    [
        (
            "ltx",
            "first-block",
            "'ltx-video' has no calibrated number.*give one, such as draft_cache=\"first-block:0.06\"",
        ),
        ("skyreels_v2", "first-block:0.1", "does not fit SkyReelsV2Transformer3DModel"),
        ("skyreels_v2_df", "guidance:0.5", "leave guidance out"),
        ("latte", "first-block:0.1", "does not fit LatteTransformer3DModel .*do not all change the same tokens"),
        ("kandinsky5_t2v", "taylorseer:2", "has no proj_out"),
        ("svd", "taylorseer:2", "has no enable_cache"),
    ],
)
def test_what_does_not_fit_the_family_is_refused(name: str, way: str, sentence: str) -> None:
    backbone = Backbone(VARIANTS[name]()[0])
    before = [{module: set(vars(module)) for module in denoiser.modules()} for denoiser in backbone.denoisers]
    with pytest.raises(PrismError, match=sentence):
        parse(way).fitted(backbone)
    assert [{module: set(vars(module)) for module in denoiser.modules()} for denoiser in backbone.denoisers] == before


def test_refused_before_any_work() -> None:
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=TAP, dim=16)
    ran: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: ran.append(1))

    def refused(sentence: str, **options: Any) -> None:
        with pytest.raises(PrismError, match=sentence):
            prism.best_of_n(pipe, judge, tiny.PROMPT, N, **{"strategy": "draft", **options}, **tiny.CALL_WAN)

    refused('A draft cache belongs to the strategy "draft"', strategy="early", draft_cache="first-block")
    refused("longer than the run", draft_steps=7, draft_cache="first-block")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    refused("cache skips blocks .* disable_cache", draft_cache="first-block")
    pipe.transformer.disable_cache()
    pipe.transformer.blocks[0].compile()
    refused("does not fit WanTransformer3DModel .it is compiled", draft_cache="first-block")
    assert not ran


def test_the_family_decides_the_number_and_fewer_steps_may_be_cached(wan: Setting) -> None:
    options = {"strategy": "draft", "seed": SEED, "draft_cache": "first-block", "draft_steps": 4, **wan.call}
    result = prism.best_of_n(wan.pipe, wan.judge(TAP), tiny.PROMPT, N, **options)
    assert result.scores[0]["draft_cache"] == "first-block:0.06"
    assert result.scores[0]["step"] == 4
    with pytest.raises(PrismError, match="cannot follow 'timesteps'"):
        Draft(draft_cache="first-block", draft_steps=4).checked(3, 1, 6, {"timesteps": [3, 2, 1]})
    assert Draft(draft_cache={"first-block": None}).checked(3, 1, 6, {"timesteps": [3, 2, 1]}).drafts() == 0


def test_the_command_refuses_a_cache_that_there_is_not(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--prompt", "a red circle", "--strategy", "draft", "--draft-cache", "fast:2"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "draft-cache names a cache" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
