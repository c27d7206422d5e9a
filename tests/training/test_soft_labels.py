"""Soft labels and weights on their way from a store to the weights of a head. Oracles: stores of hard labels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests import stores, tiny

from prism import files
from prism.backbone import Backbone
from prism.judge import Judge
from prism.preference import LatentStore, write_store
from prism.training import TrainConfig, train
from prism.training.batches import Batches, training_groups

CONFIG = TrainConfig(steps=3, prompts_per_step=2, learning_rate=1e-3, label_smoothing=0.1)
DIMENSIONS = ("VQ", "MQ")


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return stores.make(tmp_path_factory.mktemp("soft") / "store")


def relabelled(store: LatentStore, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> LatentStore:
    """The same store with rows of pairs that `change` has made of its own."""
    pairs = pa.Table.from_pylist([change(dict(row)) for row in store.pairs.to_pylist()])
    videos = store.videos.drop_columns(["shard", "row"])
    meta = {"call": store.call, "command": "test", "seed": 0}
    with files.new_folder(folder) as temporary:
        write_store(temporary, videos, store.latents(videos["video"].to_pylist()), pairs, meta)
    return LatentStore.open(folder)


def trained(store: LatentStore, folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and history of a head trained on a store."""
    judge = Judge.untrained(tiny.wan(), tap=2, dim=32, dimensions=DIMENSIONS)
    result = train(store, judge, dataclasses.replace(CONFIG, **settings), folder, progress=False)
    return judge.head.state_dict(), result["history"]


def softened(row: dict[str, Any]) -> dict[str, Any]:
    """Labels as probabilities: in training pairs those of VQ are nowhere else, and MQ's own say the contrary."""
    train = row["split"] == "train"
    for name in DIMENSIONS:
        label = row[name]
        row |= {f"{name}:p_a": None if label is None else float(label == 1), f"{name}:weight": 1.0}
        row |= {f"{name}:p_b": None if label is None else float(label == -1)}
    return row | ({"VQ": None, "MQ": None if row["MQ"] is None else -row["MQ"]} if train else {})


@pytest.mark.parametrize("objective", ["btt", "bt"])
def test_probabilities_of_zero_and_one_train_the_same_head_to_the_bit(hard, tmp_path, objective):
    soft = relabelled(hard, tmp_path / "soft", softened)
    expected, history = trained(hard, tmp_path / "hard-run", objective=objective)
    found, soft_history = trained(soft, tmp_path / "soft-run", objective=objective)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [entry["loss"] for entry in soft_history] == [entry["loss"] for entry in history]


def test_a_label_of_weight_zero_is_no_label(hard, tmp_path):
    def is_out(row: dict[str, Any]) -> bool:
        return row["split"] == "train" and int(row["video_b"][-1]) % 2 == 0

    weighted = relabelled(hard, tmp_path / "weighted", lambda row: row | {"VQ:weight": 0.0 if is_out(row) else None})
    without = relabelled(hard, tmp_path / "without", lambda row: row | ({"VQ": None} if is_out(row) else {}))
    expected, _ = trained(without, tmp_path / "without-run")
    found, _ = trained(weighted, tmp_path / "weighted-run")
    plain, _ = trained(hard, tmp_path / "plain-run")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(found[name], value) for name, value in plain.items())


def own(row: dict[str, Any]) -> dict[str, Any]:
    """Probabilities and a weight that tell a pair from any other; none in a third of them."""
    number = 100 * int(row["video_a"][-3:]) + int(row["video_b"][-3:])
    if number % 3 == 0:
        return row | {"VQ:p_a": None, "VQ:p_b": None, "MQ:weight": None}
    return row | {"VQ:p_a": number / 10000, "VQ:p_b": 0.5 - number / 20000, "MQ:weight": float(number)}


@pytest.mark.parametrize("per_prompt", [0, 3])
def test_a_batch_and_its_parts_carry_the_values_of_their_own_pairs(hard, tmp_path, per_prompt):
    store = relabelled(hard, tmp_path / "own", own)
    rows = {(row["video_a"], row["video_b"]): row for row in store.pairs.to_pylist()}
    config = dataclasses.replace(CONFIG, per_prompt=per_prompt, draws_per_step=2)
    groups = list(training_groups(store, DIMENSIONS, config))
    groups[0] = dataclasses.replace(groups[0], soft=None, weights=None)  # as one of another store may be
    batches = Batches(store, groups, Backbone(tiny.wan()), config)
    seen = 0
    for step in range(3):
        batch = batches.draw(step, range(2))
        for part in [batch, *batch.parts(4)]:
            starts = np.cumsum([0, *(count for count, _ in part.groups)])
            names = [video for row in starts[:-1] for video in groups[part.prompts[row]].videos]
            assert part.soft.shape == (len(part.labels), 2, 2)
            assert part.weights.shape == part.labels.shape
            for place, (a, b) in enumerate(zip(part.first.tolist(), part.second.tolist())):
                row = rows[names[a], names[b]]
                bare = part.prompts[a] == 0
                wanted = [row["VQ:p_a"], row["VQ:p_b"], row["MQ:weight"]] if not bare else [None] * 3
                found = [*part.soft[place, 0].tolist(), part.weights[place, 1].item()]
                np.testing.assert_allclose(found, [np.nan if x is None else x for x in wanted], rtol=1e-6)
                assert part.soft[place, 1].isnan().all()
                assert part.weights[place, 0].isnan()
                seen += wanted[0] is not None
    assert seen > 20
    assert Batches(hard, hard.groups("train"), Backbone(tiny.wan()), config).draw(0, range(2)).soft is None
