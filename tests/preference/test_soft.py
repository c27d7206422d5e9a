"""Soft labels and weights of a store's pairs: read as they were written, and refused with a sentence."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pytest
import torch

from prism import files
from prism.errors import PrismError
from prism.preference import LatentStore, group_by_prompt, write_store

PAIRS = {
    "prompt": ["p", "p", "p", "q", "q", "t"],
    "video_a": ["p0", "p0", "p1", "q0", "q1", "t0"],
    "video_b": ["p1", "p2", "p2", "q1", "q0", "t1"],
    "split": ["train"] * 5 + ["test"],
    "VQ": pa.array([1, 0, None, None, -1, None], pa.int8()),
    "MQ": pa.array([None, None, 1, None, 0, 1], pa.int8()),
}
SOFT = {
    "VQ:p_a": pa.array([0.7, None, 0.25, None, 0.0, 0.5], pa.float32()),
    "VQ:p_b": pa.array([0.3, None, 0.25, None, 1.0, 0.5], pa.float32()),
    "MQ:weight": pa.array([None, 3, 0.5, None, 0, 2], pa.float32()),
}


def written(folder: os.PathLike, **columns: object) -> LatentStore:
    """A store whose pairs have further columns, through `write_store`."""
    names = [f"{prompt}{i}" for prompt in "pqt" for i in range(3)]
    splits = ["test" if name[0] == "t" else "train" for name in names]
    videos = pa.table({"video": names, "prompt": [name[0] for name in names], "seed": range(9), "split": splits})
    with files.new_folder(folder) as temporary:
        write_store(temporary, videos, torch.zeros(9, 2), pa.table({**PAIRS, **columns}), {"call": {}})
    return LatentStore.open(folder)


def test_a_store_gives_the_soft_labels_and_weights_that_it_was_written_with(tmp_path):
    store = written(tmp_path / "store", **SOFT)
    assert store.dimensions == ("VQ", "MQ")
    first, second = store.groups("train")
    nan = np.nan
    np.testing.assert_array_equal(first.labels, [[1, nan], [0, nan], [nan, 1]])
    f = np.float32
    np.testing.assert_array_equal(
        first.soft, [[[f(0.7), f(0.3)], [nan, nan]], [[nan, nan]] * 2, [[0.25, 0.25], [nan, nan]]]
    )
    np.testing.assert_array_equal(first.weights, [[nan, nan], [nan, 3], [nan, 0.5]])
    assert second.videos == ("q1", "q0")  # the pair without any label is left out
    np.testing.assert_array_equal(second.soft, [[[0, 1], [nan, nan]]])
    np.testing.assert_array_equal(second.weights, [[nan, 0]])
    assert first.soft.dtype == first.weights.dtype == np.float64


def test_the_columns_of_the_asked_dimensions_are_those_that_come(tmp_path):
    store = written(tmp_path / "store", **SOFT)
    (group, other) = store.groups("train", ["MQ"])
    assert group.soft is None
    np.testing.assert_array_equal(group.weights, [[0.5]])
    np.testing.assert_array_equal(other.weights, [[0]])
    group = store.groups("train", ["VQ"])[0]
    assert group.weights is None
    assert len(group.labels) == 3
    plain = written(tmp_path / "plain").groups("train")[0]
    assert plain.soft is plain.weights is None
    assert len(plain.labels) == 3
    assert len(written(tmp_path / "again").groups("train", ["VQ"])[0].labels) == 2


def test_probabilities_alone_are_for_training(tmp_path):
    """A test pair without a hard label cannot be judged right or wrong."""
    store = written(tmp_path / "store", **SOFT)
    assert store.groups("test", ["VQ"]) == []
    assert len(store.groups("test", ["VQ", "MQ"])[0].labels) == 1
    with pytest.raises(PrismError, match="no labels for VQ:p_a; they have VQ, MQ"):
        store.groups("train", ["VQ:p_a"])


def six(*values: object, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([*values, *[None] * (6 - len(values))], kind or pa.float32())


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"VQ:p_a": six(1.5), "VQ:p_b": six(0.0)}, "VQ:p_a of .*pairs.parquet.* from 0 to 1, found 1.5 in row 0"),
        ({"VQ:p_a": six(0.5), "VQ:p_b": six(-0.1)}, "VQ:p_b of .* from 0 to 1, found -0.1 in row 0"),
        ({"VQ:p_a": six(0, 0.5), "VQ:p_b": six(0, 0.6)}, "sum to 1 at most .*, found 0.5 and 0.6 in row 1"),
        ({"VQ:p_a": six(0.5)}, "have the column VQ:p_a without VQ:p_b"),
        ({"VQ:p_b": six(0.5)}, "have the column VQ:p_b without VQ:p_a"),
        ({"VQ:p_a": six(0.5, 0.5), "VQ:p_b": six(0.5)}, "both or neither; in row 1 one of them is null"),
        ({"VQ:p_a": six(float("nan")), "VQ:p_b": six(0.5)}, "finite numbers or null, found nan in row 0"),
        ({"VQ:weight": six(1, -1)}, "VQ:weight of .* must hold numbers from 0, found -1 in row 1"),
        ({"VQ:weight": six(float("inf"))}, "finite numbers or null, found inf in row 0"),
        ({"VQ:weight": six(1e300, kind=pa.float64())}, r"finite numbers or null, found 1e\+300 in row 0"),
        ({"VQ:weight": six("1", kind=pa.string())}, "must hold numbers or null, found string"),
        ({"XQ:weight": six(1)}, "XQ:weight of .* needs a column XQ beside it"),
        ({"split:weight": six(1)}, "needs a column split beside it"),
        ({"VQ:P_A": six(1)}, "VQ:P_A of .* is not a column of pairs"),
        ({":": six(1)}, "is not a column of pairs"),
    ],
)
def test_a_store_with_broken_soft_labels_is_refused(tmp_path, columns, said):
    with pytest.raises(PrismError, match=said):
        written(tmp_path / "store", **columns)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("p_a", "p_b", "kind"), [(0.6, 0.4, pa.float32()), (1, 0, pa.int8()), (0.9, 0.1, pa.float64())]
)
def test_probabilities_that_sum_to_one_up_to_rounding_are_taken(p_a, p_b, kind):
    pairs = pa.table({**PAIRS, "VQ:p_a": six(p_a, kind=kind), "VQ:p_b": six(p_b, kind=kind)})
    (group,) = group_by_prompt(pairs.slice(0, 1), ["VQ"], "train")
    np.testing.assert_allclose(group.soft, [[[p_a, p_b]]], rtol=1e-7)
