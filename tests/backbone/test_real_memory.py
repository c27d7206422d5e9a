"""Offloading, caches, parallelism and bad input: exact and freed on every way out, or refused before any work."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from diffusers import (
    ContextParallelConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig, apply_first_block_cache
from tests import tiny
from tests.machinery import CALL, FAMILIES, RUNS, assert_exact, assert_tokens, blocks, count, few, seeded, stock
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.backbone import Backbone
from prism.errors import PrismError

CPU = torch.device("cpu")
SHAPE = {"wan": (16, 3, 4, 4), "cogvideox": (3, 4, 4, 4)}


def group(kind: str) -> Callable[[Any], None]:
    per_group = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe: pipe.enable_group_offload(CPU, CPU, offload_type=kind, **per_group)


def on_meta(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does; itself it takes no CPU for an accelerator."""
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        cpu_offload(part, CPU)
    assert next(pipe.transformer.parameters()).is_meta


OFFLOADED: dict[str, Callable[[Any], Any]] = {
    "whole models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "layers on meta": on_meta,
    "groups of blocks": group("block_level"),
    "groups of leaves": group("leaf_level"),
}


@works(
    "Offload and memory",
    "`enable_model_cpu_offload`, group offload by block or leaf, weights on meta (sequential offload)",
    "exact",
    "Before a judge is put onto the pipeline or after; each text is encoded once.",
)
@pytest.mark.parametrize("first", [True, False], ids=["before the judge", "after the judge"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded(how: str, family: str, first: bool) -> None:
    """Before a judge is put onto it, or after: the numbers of the pipeline that is not, and one encoding a text."""
    pipe = FAMILIES[family]()
    plain = {seed: stock(pipe, seed) for seed in range(5, 8)}
    judge = None if first else prism.Judge.untrained(pipe, tap=2, dim=16)
    print_ = Backbone(pipe).fingerprint()
    OFFLOADED[how](pipe)
    judge = judge or prism.Judge.untrained(pipe, tap=2, dim=16)
    assert Backbone(pipe).fingerprint() == print_
    assert_tokens(pipe)
    rows = count(pipe.text_encoder)
    for name, arguments in RUNS.items():
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=few(name), seed=5, batch_size=1, **arguments, **CALL)
        assert torch.equal(result.latents, plain[result.seed]), name
        assert rows == [1, 1], name  # the prompt and the empty one, of drafts, replays, captures and the finish
        rows.clear()
    for _ in range(2):
        judge.score(torch.zeros(1, *SHAPE[family]), "a cat runs", 700, **CALL)
    assert rows == [1]  # moving weights to and fro is no change of them
    if how == "layers on meta":
        assert all(weight.is_meta for weight in pipe.transformer.parameters())  # a stopped call's own, too


class Explosion(Exception):
    pass


@works(
    "Offload and memory",
    "Offloaded models after a run, an error or Ctrl-C",
    "works",
    "They go back to where they wait, as after a plain call.",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_models_are_freed_on_every_way_out(family: str) -> None:
    """After the last run of a model comes the freeing, which takes accelerate's hooks off and puts them on again."""
    pipe, events = FAMILIES[family](), []
    pipe.enable_model_cpu_offload(device="cpu")
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    enable = pipe.enable_model_cpu_offload

    def freeing(*args: Any, **kwargs: Any) -> None:
        events.append("freed")
        enable(*args, **kwargs)

    def ran(*_: Any) -> None:
        events.append("ran")
        if left and events.count("ran") == left:
            raise Explosion

    def outcome(run: Callable[[], Any], explode_at: int = 0) -> None:
        nonlocal left
        left = explode_at
        events.clear()
        if explode_at:
            with pytest.raises(Explosion):
                run()
        else:
            run()
        assert "ran" in events
        assert events[-1] == "freed"
        assert all("_hf_hook" in vars(part) for part in (pipe.text_encoder, pipe.transformer, pipe.vae))

    left = 0
    pipe.enable_model_cpu_offload = freeing
    for part in (pipe.text_encoder, pipe.vae.encoder, pipe.vae.decoder, *blocks(pipe)):
        part.register_forward_pre_hook(ran)
    latents, backbone = torch.zeros(2, *SHAPE[family]), judge.backbone
    outcome(lambda: backbone.condition([tiny.PROMPT], **CALL))
    conditioning = backbone.condition([tiny.PROMPT] * 2, **CALL)
    outcome(lambda: backbone.tokens(latents, conditioning, 700.0, 2))
    outcome(lambda: backbone.tokens(latents, conditioning, 700.0, 2), explode_at=1)
    outcome(lambda: judge.score(latents, tiny.PROMPT, 700, **CALL))
    outcome(lambda: judge.score(latents, tiny.OTHER_PROMPT, 700, **CALL), explode_at=1)
    outcome(lambda: judge.score_clean(latents, tiny.PROMPT, 700, num_draws=3, **CALL))
    assert events.count("freed") == 1  # not after each draw
    outcome(lambda: backbone.decode(latents))
    outcome(lambda: backbone.encode(torch.zeros(1, 9, 32, 32, 3)))
    for arguments in RUNS.values():

        def run(arguments: Any = arguments) -> None:
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **arguments, **CALL)

        outcome(run)
        for at in (1, 3, 6, 12):  # the text encoder, the first steps, the search
            outcome(run, explode_at=at)
    assert_exact(pipe, judge, ["early"])


@works(
    "Offload and memory",
    "Two denoisers (Wan 2.2 A14B), offloaded or compiled",
    "exact",
    "Both are treated, and the cut falls on the one that the head reads.",
)
@pytest.mark.parametrize("how", ["whole models", "layers on meta", "compiled"])
def test_two_denoisers(how: str) -> None:
    """Wan 2.2 A14B, whose denoisers take turns: both are treated, and the cut falls on the one that is read."""
    pipe, call = VARIANTS["wan22_a14b_t2v"]()
    judge = prism.Judge.untrained(pipe, tap=1, dim=16)
    if how == "compiled":
        for denoiser in (pipe.transformer, pipe.transformer_2):
            denoiser.compile(backend="eager")
    else:
        OFFLOADED[how](pipe)
        if how == "layers on meta":
            cpu_offload(pipe.transformer_2, CPU)
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, schedule=[(1, 1)], batch_size=1, **call)
    assert judge.backbone.listens is (how != "compiled")
    plain = pipe(tiny.PROMPT, generator=seeded(result.seed), **call).frames[0]
    assert (torch.as_tensor(result.video) == torch.as_tensor(plain)).all()


# -- what skips or slices

CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.2),
    "pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "mag": lambda pipe: MagCacheConfig(mag_ratios=[1.0] * 5, num_inference_steps=5),
    "sea": lambda pipe: SeaCacheConfig(),
    "text keys and values": lambda pipe: TextKVCacheConfig(),
}
SEARCHES = {**RUNS, "oracle": {"strategy": "oracle", "oracle": lambda video, prompt: 0.0}}


def assert_refused(pipe: Any, sentence: str, judge: prism.Judge) -> None:
    """Before the text encoder or the denoiser run."""
    ran: list[int] = []
    handles = [part.register_forward_pre_hook(lambda *_: ran.append(1)) for part in (pipe.text_encoder, *blocks(pipe))]
    try:
        for arguments in SEARCHES.values():
            with pytest.raises(PrismError, match=sentence):
                prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, **arguments, **CALL)
        assert not ran
        conditioning = judge.backbone.condition([tiny.PROMPT], **CALL)
        ran.clear()
        with pytest.raises(PrismError, match=sentence):
            judge.backbone.tokens(torch.zeros(1, *conditioning.shape), conditioning, 500.0, 2)
        assert not ran
    finally:
        for handle in handles:
            handle.remove()


@works(
    "Caches and patches",
    "diffusers' own caches (`enable_cache`, `apply_first_block_cache`)",
    "refused",
    "Before any work, with the line that takes the cache off; after `disable_cache()` everything is exact.",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CACHES)
def test_caches_are_refused_before_any_work(name: str, family: str) -> None:
    pipe = FAMILIES[family]()
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    try:
        pipe.transformer.enable_cache(CACHES[name](pipe))
    except (ValueError, KeyError, AttributeError) as error:
        pytest.skip(f"diffusers does not cache this denoiser so: {error}")
    assert_refused(pipe, "cache skips blocks .* disable_cache", judge)
    pipe.transformer.disable_cache()
    assert_exact(pipe, judge, ["early"])


def test_a_cache_that_was_put_on_by_hand() -> None:
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))
    assert not pipe.transformer.is_cache_enabled
    assert_refused(pipe, "cache skips blocks", judge)


@pytest.mark.parametrize("strategy", ["none", "random"])
def test_nothing_is_refused_where_nothing_is_read(strategy: str) -> None:
    pipe = tiny.wan("unipc")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    result = prism.best_of_n(pipe, None, tiny.PROMPT, n=3, strategy=strategy, **CALL)
    assert torch.equal(result.latents, stock(pipe, result.seed))


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first of two processes: what is refused must not wait for the other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # diffusers counts accelerators, not CPUs
    yield
    dist.destroy_process_group()


@works(
    "Threads and processes",
    "Context parallelism",
    "refused",
    "Each process sees a slice of the tokens; give each process candidates of its own (`distribute`).",
)
def test_context_parallelism_is_refused_before_any_work(two_processes: None) -> None:
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    assert_refused(pipe, "context parallelism, where each process sees a slice of the tokens", judge)


# -- bad input


def test_folders_that_hold_no_pipeline(tmp_path: Any) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "unet": ["diffusers", "Nothing"]}
    (other / "model_index.json").write_text(json.dumps(index))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    garbled = tmp_path / "garbled"
    garbled.mkdir()
    (garbled / "model_index.json").write_text("{")
    (tmp_path / "file").write_text("")
    for name in ("empty", "other", "unknown", "garbled", "file", "nothing"):
        for up_to in (None, 1):
            with pytest.raises(PrismError) as caught:
                Backbone.from_pretrained(str(tmp_path / name), up_to=up_to, local_files_only=True)
            assert "\n" not in str(caught.value), name


def test_a_pipeline_of_no_family() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    ends = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe = DDPMPipeline(UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, **ends), DDPMScheduler())
    with pytest.raises(
        PrismError, match=r"DDPMPipeline is not supported: it samples pixels, .* See docs/backbones\.md"
    ):
        prism.Judge.untrained(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_of_another_shape(family: str) -> None:
    judge, shape = prism.Judge.untrained(FAMILIES[family](), tap=2, dim=16), SHAPE[family]
    for wrong in ((*shape[:-1], 8), shape[::-1], (shape[1], shape[0], *shape[2:]), shape[1:]):
        with pytest.raises(PrismError, match=r"The latents have the shape .* and the pipeline's call makes"):
            judge.score(torch.zeros(1, *wrong), tiny.PROMPT, 500, **CALL)
    for t in (-1.0, 1001.0):
        with pytest.raises(PrismError, match="must be from 0"):
            judge.score(torch.zeros(1, *shape), tiny.PROMPT, t, **CALL)


def test_a_level_that_the_head_was_not_trained_at_is_said_once() -> None:
    pipe, latents = tiny.wan("unipc"), torch.zeros(1, 16, 3, 4, 4)

    def trained(low: float, high: float) -> prism.Judge:
        judge = prism.Judge.untrained(pipe, tap=2, dim=16)
        judge.trained_on = {"config": {"t_low": low, "t_high": high}}
        judge._random = None  # as of one that was loaded
        return judge

    sentence = "trained at t from 600 to 1000 and is asked to score at t = 300;"
    judge = trained(600.0, 1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.score(latents, tiny.PROMPT, 700, **CALL)
    with pytest.warns(UserWarning, match=sentence):
        judge.score(latents, tiny.PROMPT, 300, **CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.score(latents, tiny.PROMPT, 300, **CALL)
    with pytest.warns(UserWarning, match=sentence):  # an average covers what all its heads do
        prism.Judge.average([trained(0.0, 1000.0), trained(600.0, 1000.0)]).score(latents, tiny.PROMPT, 300, **CALL)
    for arguments in RUNS.values():
        with pytest.warns(UserWarning, match="trained at t from 0 to 20 and is asked"):
            prism.best_of_n(pipe, trained(0.0, 20.0), tiny.PROMPT, n=2, **arguments, **CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an oracle judges, and not the head
        run = {"strategy": "oracle", "oracle": lambda video, prompt: float(video.mean())}
        prism.best_of_n(pipe, trained(600.0, 1000.0), tiny.PROMPT, n=2, **run, **{**CALL, "output_type": "np"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_is_said_once_a_pipeline(family: str) -> None:
    pipe, prompt = FAMILIES[family](), " ".join(["red"] * 30)
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prism.best_of_n(pipe, judge, prompt, n=2, strategy="draft", **CALL)
        judge.score(torch.randn(1, *SHAPE[family], generator=seeded(0)), prompt, 500, **CALL)
    assert len([each for each in caught if "has 31 tokens and the pipeline takes 12" in str(each.message)]) == 1
