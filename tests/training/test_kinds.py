"""Videos of several shapes and calls in one training: each is read under its own call, and pairs may span kinds."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import machinery, stores, tiny

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation.evaluator import noised
from prism.judge import Judge
from prism.judge.objective import preference_loss
from prism.preference import LatentStore
from prism.preference import store as store_module
from prism.training import TrainConfig, train
from prism.training.batches import Batches
from prism.training.validation import LEVELS, Validation, mean_accuracy

CONFIG = TrainConfig(steps=3, prompts_per_step=5, learning_rate=1e-3, log_every=1, max_gradient_norm=0)
DIMENSIONS = ("VQ", "MQ")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return stores.make_kinds(tmp_path_factory.mktemp("kinds") / "store")


@pytest.fixture(scope="module")
def wan() -> Any:
    return tiny.wan()


def judge_for(pipe: Any) -> Judge:
    return Judge.untrained(pipe, tap=2, dim=32, dimensions=DIMENSIONS)


def weights(judge: Judge) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in judge.head.state_dict().items()}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-5, rtol=2e-3, msg=lambda text, n=name: f"{n} {text}")


def test_one_step_is_that_of_videos_read_one_by_one_under_their_own_calls(wan, store, tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, max_rows=2, prompts_per_step=7)
    ours, theirs = judge_for(wan), judge_for(wan)
    train(store, ours, config, tmp_path / "run", progress=False)
    groups = store.groups("train", DIMENSIONS)
    batch = Batches(store, groups, theirs.backbone, config).draw(0, range(7))
    names = [video for row, _ in zip(np.cumsum([0, *(c for c, _ in batch.groups)]), batch.groups)
             for video in groups[batch.prompts[row]].videos]  # fmt: skip
    scores = []
    for video, latents, t, prompt in zip(names, batch.latents, batch.t, batch.prompts):
        assert tuple(latents.shape) == store.shape_of(video)
        conditioning = theirs.backbone.condition([groups[prompt].prompt], **store.call_of(video))
        tokens = theirs.backbone.tokens(latents[None], conditioning, t, 2)
        scores.append(theirs.head(tokens.visual, tokens.text, tokens.text_mask)[0])
    assert len({store.shape_of(video) for video in names}) == 3
    margins = torch.stack([scores[a] - scores[b] for a, b in zip(batch.first.tolist(), batch.second.tolist())])
    preference_loss(margins, batch.labels).backward()
    for (name, ours_), theirs_ in zip(ours.head.named_parameters(), theirs.head.parameters()):
        torch.testing.assert_close(ours_.grad, theirs_.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_pass_and_a_unit_hold_one_shape_and_call(store):
    groups = store.groups("train", DIMENSIONS)
    batch = Batches(store, groups, Backbone(tiny.wan()), CONFIG).draw(0, range(5))
    for part in [batch, *batch.parts(4)]:
        for rows in (2, 64):
            passes = list(part.passes(rows))
            assert sorted(row for each in passes for row in each) == list(range(len(part.t)))
            assert all(len(each) <= rows for each in passes)
            assert all(len({(part.kinds[row], part.latents[row].shape) for row in each}) == 1 for each in passes)
        units = [rows for _, _, rows in part.units()]
        assert sorted(row for each in units for row in each) == list(range(len(part.t)))
        assert all(len({(part.kinds[row], part.prompts[row]) for row in each}) == 1 for each in units)
    with pytest.raises(PrismError, match="have several shapes"):
        batch.noisy_latents  # noqa: B018


def test_validation_reads_each_video_under_its_own_call(wan, store):
    """Oracle: videos scored one by one."""
    judge = judge_for(wan)
    groups = store.groups("validation", DIMENSIONS)
    scores: list[dict[str, np.ndarray]] = []
    judge._warned = True  # that it is untrained
    for t in LEVELS:
        scores.append({})
        for group in groups:
            for video in group.videos:
                noisy = noised(judge.backbone, store.latents([video]), [video], t)
                scores[-1][video] = judge.score(noisy, [group.prompt], t, **store.call_of(video))[0].numpy()
    validation = Validation(store, DIMENSIONS, judge.taps, 2)
    assert validation.accuracy(judge) == pytest.approx(mean_accuracy(groups, scores))
    assert validation.accuracy(judge) == validation.accuracy(judge)  # from kept tokens


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 9}])
def test_gradients_of_a_step_in_parts_add_up(wan, store, tmp_path, changes):
    config = dataclasses.replace(CONFIG, draws_per_step=2)
    whole, parts = judge_for(wan), judge_for(wan)
    expected = train(store, whole, config, tmp_path / "whole", progress=False)["history"]
    reads, read = [], parts.backbone.tokens
    parts.backbone.tokens = lambda noisy, *a: reads.append(len(noisy)) or read(noisy, *a)
    found = train(store, parts, dataclasses.replace(config, **changes), tmp_path / "parts", progress=False)["history"]
    assert_close(weights(whole), weights(parts))
    assert len(reads) > 3 * min(changes["gradient_accumulation_steps"], 5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["accuracy"] == theirs["accuracy"]
        for name in ("loss", "grad_norm", "min_reward", "max_reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)


def test_few_shards_are_open_at_once(wan, store, tmp_path, monkeypatch):
    expected, found = judge_for(wan), judge_for(wan)
    train(store, expected, CONFIG, tmp_path / "one", progress=False)
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 1)
    again = LatentStore.open(store.folder)
    train(again, found, CONFIG, tmp_path / "two", progress=False)
    assert len(again._shards) == 1
    assert all(torch.equal(value, weights(found)[name]) for name, value in weights(expected).items())


def test_each_prompt_is_encoded_once_per_call(store, tmp_path):
    pipe = tiny.wan()
    rows = machinery.count(pipe.text_encoder)
    train(store, judge_for(pipe), CONFIG, tmp_path / "run", progress=False)
    assert sum(rows) == sum(len(set(kinds)) for kinds in stores.MIXED)


def test_a_run_killed_at_random_steps_goes_on_with_the_same_samples(store, tmp_path):
    """Kills in mid-epoch, three in one run; mixed sources, draws, parts and averages. Oracle: an undisturbed run."""
    config = dataclasses.replace(
        CONFIG,
        steps=12,
        prompts_per_step=3,
        source="renoised=1,recorded=1,predicted=2",
        draws_per_step=2,
        gradient_accumulation_steps=2,
        ema_decay=0.9,
        validate_every=5,
        keep_best=True,
        checkpoint_every=1,
        max_gradient_norm=1.0,
    )
    whole, resumed = judge_for(tiny.wan()), judge_for(tiny.wan())
    expected = train(store, whole, config, tmp_path / "whole", progress=False)
    steps = sorted(random.Random(7).sample(range(1, 12), 3))
    for stop in steps:
        _killed(store, config, tmp_path / "killed", stop)
    found = train(store, resumed, config, tmp_path / "killed", resume=True, progress=False)
    assert found["history"] == expected["history"]
    ours, theirs = (tmp_path / name / "head" / "model.safetensors" for name in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def _killed(store: LatentStore, config: TrainConfig, out: Path, stop: int) -> None:
    """Train in a process of its own that is killed while it draws the batch of a step."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    try:
        torch.set_num_threads(1)
        draw = Batches.draw

        def die(self: Batches, step: int, slots: Any) -> Any:
            if step == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(self, step, slots)

        Batches.draw = die  # type: ignore[method-assign]
        train(LatentStore.open(store.folder), judge_for(tiny.wan()), config, out, resume=True, progress=False)
    finally:
        os._exit(1)


def test_a_backbone_in_bfloat16_trains_a_head_in_float32(store, tmp_path):
    histories = {}
    for dtype in (torch.float32, torch.bfloat16):
        judge = judge_for(tiny.wan().to(dtype))
        assert judge.backbone.dtype == dtype
        result = train(store, judge, CONFIG, tmp_path / str(dtype), progress=False)
        histories[dtype] = [entry["loss"] for entry in result["history"]]
        assert {value.dtype for value in judge.head.parameters()} == {torch.float32}
    assert histories[torch.bfloat16] == pytest.approx(histories[torch.float32], rel=0.05)
    assert histories[torch.bfloat16] != histories[torch.float32]
