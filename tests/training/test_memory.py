"""Memory: what conditionings hold, how often prompts are encoded, and batches that become smaller where it runs out."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import machinery, stores, tiny
from tests.works import works

import prism
from prism import team
from prism.backbone import Backbone
from prism.backbone import backbone as backbone_module
from prism.backbone.conditioning import ConditioningCache, Stowed, compacted, tensors_of, with_tensors
from prism.errors import PrismError
from prism.evaluation import evaluate, evaluator, measure
from prism.judge import Judge
from prism.preference import LatentStore
from prism.training import TrainConfig, conditionings, train, train_together
from prism.training.batches import Batches, training_groups
from prism.training.conditionings import Conditionings
from prism.training.validation import Validation

CONFIG = TrainConfig(steps=4, prompts_per_step=3, learning_rate=1e-3, log_every=2, checkpoint_every=0)
CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
)
SHORTAGES = [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU), MemoryError("Unable to allocate")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return stores.make(tmp_path_factory.mktemp("memory") / "store")


def judge_for(pipe: Any, **options: Any) -> Judge:
    return Judge.untrained(pipe, tap=2, dim=32, dimensions=("VQ", "overall"), **options)


def weights(judge: Judge) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in judge.head.state_dict().items()}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, atol=2e-5, rtol=2e-3, msg=lambda text, name=name: f"{name} {text}"
        )


def text_of(warning: warnings.WarningMessage) -> str:
    return str(warning.message)


class Small:
    """Stands in for a function whose first argument with rows does not fit where it has more than so many."""

    def __init__(self, real: Any, rows: int, error: Exception, place: int = 0) -> None:
        self.real, self.rows, self.error, self.place, self.refused = real, rows, error, place, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments[self.place]) > self.rows:
            self.refused += 1
            raise self.error
        return self.real(*arguments, **options)


# -- batches


@works(
    "Offload and memory",
    "Memory that runs out in training",
    "to rounding",
    "The same step is taken in parts of half as many videos, with a warning; gradients add up to the whole step's.",
)
@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_a_training_step_that_does_not_fit_is_the_same_step_in_parts(store, tmp_path, monkeypatch, error):
    whole, parts = judge_for(tiny.wan()), judge_for(tiny.wan())
    config = dataclasses.replace(CONFIG, validate_every=2, draws_per_step=2, source="mixed")
    expected = train(store, whole, config, tmp_path / "whole", progress=False)
    small = Small(parts.backbone.tokens, 5, error)
    monkeypatch.setattr(parts.backbone, "tokens", small)
    with pytest.warns(UserWarning, match="Memory ran out") as said:
        found = train(store, parts, config, tmp_path / "parts", progress=False)
    assert "Memory ran out with 24 videos per batch while training; going on with 12." in map(text_of, said)
    assert_close(weights(whole), weights(parts))
    for ours, theirs in zip(found["history"], expected["history"]):
        assert ours.keys() == theirs.keys()
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert small.refused < 8  # smaller from then on, not at each step anew


@pytest.mark.filterwarnings("ignore:Memory ran out")
def test_heads_that_are_trained_together_shrink_together(store, monkeypatch):
    pipe, shorts = tiny.wan(), []
    for rows in (99, 2):
        backbone = Backbone(pipe)
        judges = [judge_for(backbone, seed=seed) for seed in (0, 1)]
        monkeypatch.setattr(backbone, "tokens", Small(backbone.tokens, rows, SHORTAGES[0]))
        train_together(store, judges, [CONFIG, dataclasses.replace(CONFIG, objective="bt")], progress=False)
        shorts.append(judges)
    for one, other in zip(*shorts):
        assert_close(weights(one), weights(other))


def test_where_one_video_does_not_fit_a_sentence_says_so(store, tmp_path, monkeypatch):
    judge = judge_for(tiny.wan())
    monkeypatch.setattr(judge.backbone, "tokens", Small(judge.backbone.tokens, 0, SHORTAGES[1]))
    with (
        pytest.warns(UserWarning, match="Memory ran out"),
        pytest.raises(PrismError, match="ran out with a single video per batch while train"),
    ):
        train(store, judge, CONFIG, tmp_path / "run", progress=False)
    with (
        pytest.warns(UserWarning, match="Memory ran out"),
        pytest.raises(PrismError, match="ran out with a single video per batch while eval"),
    ):
        evaluate(judge, store, timesteps=(500,), progress=False)
    other = RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(judge.backbone, "tokens", Small(judge.backbone.tokens, 0, other))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # a bug is not hidden
        evaluate(judge, store, timesteps=(500,), progress=False)


@works(
    "Offload and memory",
    "Memory that runs out in an evaluation",
    "to rounding",
    "The batch is scored again in halves under the same noise, with a warning.",
)
@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_an_evaluation_that_does_not_fit_goes_on_in_halves(store, monkeypatch, error):
    judge = judge_for(tiny.wan())
    expected = measure(judge, store, timesteps=(900, 0), num_draws=2, progress=False)
    small = Small(judge.backbone.tokens, 9, error)
    monkeypatch.setattr(judge.backbone, "tokens", small)
    with pytest.warns(UserWarning, match="Memory ran out") as said:
        found = measure(judge, store, timesteps=(900, 0), num_draws=2, progress=False)
    assert text_of(said[0]).startswith("Memory ran out with 28 videos per batch while evaluating")
    for ours, theirs in zip(found.pairs.to_pylist(), expected.pairs.to_pylist()):
        for name in ("margin", "score_a", "score_b"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=1e-5)
        assert ours == theirs


def test_a_batch_that_fails_is_done_again_and_none_twice():
    done: list[int] = []

    def work(batch: Any) -> None:
        if len(batch) > 3:
            raise MemoryError
        done.extend(batch)

    with pytest.warns(UserWarning, match="Memory ran out"):
        assert team.in_batches(range(20), 16, work, "working") == 2
    assert done == list(range(20))


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 100])
def test_parts_of_a_batch_are_whole_groups(store, rows):
    groups = training_groups(store, ("VQ",), CONFIG)
    batch = Batches(store, groups, Backbone(tiny.wan()), CONFIG).draw(0, range(3))
    parts = batch.parts(rows)
    assert torch.equal(torch.cat([part.noisy_latents for part in parts]), batch.noisy_latents)
    assert torch.equal(torch.cat([part.first + part.start for part in parts]), batch.first)
    assert torch.equal(torch.cat([part.second + part.start for part in parts]), batch.second)
    assert [prompt for part in parts for prompt in part.prompts] == batch.prompts
    assert all(len(part.t) <= max(rows, 4) for part in parts)
    assert len(parts) == (1 if rows >= 12 else 3 if rows < 8 else 2)


# -- conditionings


def encoded(pipe: Any) -> list[int]:
    return machinery.count(pipe.text_encoder)


def size_of(cache: Any) -> int:
    storages = {}
    for entry in cache._entries.values():
        for value in tensors_of(entry):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("levels", [(900, 500, 100)])
def test_an_evaluation_encodes_each_prompt_once_where_the_cache_has_room_for_fewer(tmp_path, monkeypatch, levels):
    """Room for 10 of 14 prompts (validation and test), three levels: 14 encodings."""
    store = stores.make(tmp_path / "store", prompts=(1, 4, 10), per_prompt=2)
    pipe = tiny.wan()
    judge, rows = judge_for(pipe), encoded(pipe)
    plain = measure(judge, store, timesteps=levels, num_draws=2, progress=False)
    one = judge.backbone._conditionings.nbytes // len(judge.backbone._conditionings)
    judge.backbone.forget()
    monkeypatch.setattr(backbone_module, "_CACHE_BYTES", 10 * one)
    rows.clear()
    found = measure(judge, store, timesteps=levels, num_draws=2, batch_size=4, progress=False)
    assert sum(rows) == 14
    for ours, theirs in zip(found.pairs.to_pylist(), plain.pairs.to_pylist()):
        for name in ("margin", "score_a", "score_b"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=1e-5)
        assert ours == theirs
    judge.backbone.forget()
    monkeypatch.setattr(backbone_module, "_CACHE_BYTES", 1)  # less than a batch: still once
    rows.clear()
    measure(judge, store, timesteps=levels, batch_size=4, progress=False)
    assert sum(rows) == 14


def test_the_cache_holds_what_it_says_and_drops_what_was_used_longest_ago(monkeypatch):
    pipe = tiny.wan()
    backbone, rows = Backbone(pipe), encoded(pipe)
    prompts = [f"a {word}" for word in tiny.WORDS]
    backbone.condition(prompts[:8], **tiny.CALL_WAN)
    cache = backbone._conditionings
    assert cache.nbytes == size_of(cache) > 0
    one = cache.nbytes // 8
    monkeypatch.setattr(backbone_module, "_CACHE_BYTES", 4 * one)
    for prompt in (*prompts[:4], prompts[0], prompts[4]):
        backbone.condition([prompt], **tiny.CALL_WAN)
        assert cache.nbytes == size_of(cache) <= 4 * one
    rows.clear()
    backbone.condition([prompts[0]], **tiny.CALL_WAN)  # used again in between
    assert not rows
    backbone.condition([prompts[1]], **tiny.CALL_WAN)
    assert sum(rows) == 1


def test_everything_that_a_conditioning_holds_is_counted_and_moves():
    shared, big = torch.zeros(5), torch.zeros(10, 8)
    arguments = {
        "a": big[2:3],
        "list": [torch.ones(2), (torch.ones(3), {"deep": torch.ones(4)})],
        "rope": shared,
        "n": 3,
    }
    fields = {"timed": "t", "noisy": "x", "axis": 1, "dtype": torch.float32, "shape": (1,), "batched": frozenset({"a"})}
    made = [
        backbone_module.Conditioning(
            arguments, timestep=torch.zeros(1), appended=torch.ones(1, 6), kept=torch.ones(1, 7), given=None, **fields
        )
        for _ in range(2)
    ]
    assert sum(value.numel() for value in tensors_of(made[0])) == 8 + 2 + 3 + 4 + 5 + 1 + 6 + 7
    cache: ConditioningCache[int, Any] = ConditioningCache()
    for place, each in enumerate(made):
        cache[place] = with_tensors(each, compacted)
    assert cache.nbytes == size_of(cache) == 4 * (5 + 2 + 3 + 4 + 2 * (8 + 1 + 6 + 7))  # what rows share counts once
    cache[1] = with_tensors(made[1], compacted)
    cache.trim(1, spared=1)
    assert cache.nbytes == 4 * (5 + 2 + 3 + 4 + 8 + 1 + 6 + 7)
    back = Stowed.of(made[0]).back()
    for one, other in zip(tensors_of(made[0]), tensors_of(back), strict=True):
        assert torch.equal(one, other)
    assert back.arguments["n"] == 3


def test_each_prompt_is_encoded_once_a_run_and_kept_on_disk(store, tmp_path, monkeypatch):
    """Two epochs of six prompts: six encodings, of which memory holds none."""
    monkeypatch.setattr(backbone_module, "_CACHE_BYTES", 0)
    pipe = tiny.wan()
    rows = encoded(pipe)
    train(store, judge_for(pipe), dataclasses.replace(CONFIG, prompts_per_step=1, steps=12), tmp_path, progress=False)
    assert sum(rows) == 6


@pytest.mark.parametrize("make", [tiny.wan, tiny.cogvideox])
def test_what_comes_back_from_disk_is_what_was_captured(make, tmp_path, monkeypatch):
    """Oracle: the pipeline's own conditioning; each row, rows again, and what all rows share (CogVideoX's RoPE)."""
    call = tiny.CALL_WAN if make is tiny.wan else tiny.CALL_COGVIDEOX
    shape = stores.SHAPE if make is tiny.wan else (3, 4, 4, 4)
    store = stores.make(tmp_path / "store", prompts=(20, 1, 1), per_prompt=2, meta={"call": call}, shape=shape)
    backbone, groups = Backbone(make()), store.groups("train")
    found = Conditionings(backbone, store, groups)
    for chunk in (range(16), range(16, 20)):
        backbone.forget()
        expected = backbone.condition([groups[index].prompt for index in chunk], **call)
        for index in (chunk[1], chunk[0], chunk[1]):
            ours, theirs = list(tensors_of(found.of([index]))), list(tensors_of(expected[index - chunk[0]]))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    both = found.of([3, 17, 3])
    assert len(both) == 3
    assert len(found._known_forms) == 1
    assert len(backbone._conditionings) == 0 or chunk == range(16, 20)
    small = SimpleNamespace(free=1)
    monkeypatch.setattr(conditionings.shutil, "disk_usage", lambda _: small)
    with pytest.raises(PrismError, match=r"20 prompts find no room .*; set TMPDIR to a folder with more"):
        Conditionings(backbone, store, groups).capture()


# -- a store's call, and paths


def test_a_folder_does_where_a_store_is_asked_for(store, tmp_path):
    one, other = judge_for(tiny.wan()), judge_for(tiny.wan())
    prism.train(str(store.folder), one, CONFIG, tmp_path / "one", progress=False)
    prism.train(store, other, CONFIG, tmp_path / "other", progress=False)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())
    assert prism.evaluate(one, store.folder, "test", (500,), progress=False) == evaluate(
        one, store, "test", (500,), progress=False
    )
    with pytest.raises(PrismError, match="store nowhere does not exist"):
        prism.evaluate(one, "nowhere", "test")
    with pytest.raises(PrismError, match="A judge on a pipeline is needed, found str"):
        prism.evaluate("out/head", store, "test")
    with pytest.raises(PrismError, match="A judge on a pipeline is needed, found str"):
        prism.train(store, "out/head", CONFIG, tmp_path / "third", progress=False)


@pytest.mark.parametrize("call", [{"height": "64"}, {"height": -64}, {"num_frames": [9]}, {"nothing": 1}])
def test_a_call_that_the_pipeline_rejects_is_named(tmp_path, call):
    store = stores.make(tmp_path / "store", prompts=(2, 1, 1), per_prompt=2, meta={"call": {**tiny.CALL_WAN, **call}})
    judge = judge_for(tiny.wan())
    for use in (
        lambda: train(store, judge, dataclasses.replace(CONFIG, prompts_per_step=1), tmp_path / "run", progress=False),
        lambda: evaluate(judge, store, timesteps=(500,), progress=False),
        lambda: Validation(store, judge.dimensions, judge.taps).accuracy(judge),
    ):
        with pytest.raises(PrismError) as refused:
            use()
        assert len(str(refused.value)) <= 500
        assert str(refused.value).isprintable()


def test_levels_of_a_denoiser_that_is_used_for_some_alone(store):
    judge = judge_for(tiny.wan())
    scorer = SimpleNamespace(backbone=SimpleNamespace(t_range=(875.0, 1000.0)))
    assert evaluator._levels(scorer, None) == (989, 949, 899)
    with pytest.raises(PrismError, match="used for t from 875 to 1000, found the level 699"):
        evaluator._levels(scorer, (899, 699))
    assert evaluator._levels(judge, None) == evaluator.TIMESTEPS
