"""The latent store: what is written is read back, and what is broken is refused with a sentence."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from prism import files
from prism.errors import PrismError
from prism.preference import LatentStore, pairs_from_scores, write_store

SHAPE = (3, 2, 2, 2)


def make(folder, per_prompt=3, shard_bytes=1 << 30, trajectories=True, latents=None, eight_bits=False):
    count = 3 * per_prompt
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, *SHAPE, generator=generator).half() if latents is None else latents
    states = {"states": torch.randn(count, 4, *SHAPE, generator=generator), "t": torch.rand(count, 4) * 1000}
    videos = pa.table(
        {
            "video": [f"v{i}" for i in range(count)],
            "prompt": [f"prompt {i // per_prompt}" for i in range(count)],
            "seed": list(range(count)),
            "split": [("train", "validation", "test")[i // per_prompt] for i in range(count)],
            "VQ": torch.rand(count, generator=generator).tolist(),
        }
    )
    with files.new_folder(folder) as temporary:
        meta = {"call": {"height": 16}, "command": "test", "seed": 0}
        pairs = pairs_from_scores(videos, {"VQ": 0.1})
        write_store(temporary, videos, latents, pairs, meta, states if trajectories else None, shard_bytes, eight_bits)
    return folder, latents, states


def test_a_byte_a_number_is_off_by_half_a_step_at_most(tmp_path):
    folder, latents, _ = make(tmp_path / "store", shard_bytes=4 * 24 * 2, eight_bits=True)
    read = LatentStore.open(folder).latents([f"v{i}" for i in range(9)])
    for start in (0, 4, 8):  # each shard has its own scale
        shard = latents[start : start + 4].float()
        step = shard.abs().amax(0) / 127
        off = (read[start : start + 4] - shard).abs()
        assert (off <= step / 2 + 1e-6).all()
        assert off.max() > 0 or start == 8
    assert load_file(folder / "latents-00000.safetensors")["latents"].dtype == torch.int8


@pytest.mark.parametrize("shard_bytes", [1 << 30, 4 * 24 * 2])
def test_reads_back_what_was_written_in_any_order(tmp_path, shard_bytes):
    folder, latents, states = make(tmp_path / "store", shard_bytes=shard_bytes)
    assert len(list(folder.glob("latents-*.safetensors"))) == (1 if shard_bytes > 1000 else 3)
    store = LatentStore.open(folder)
    rows = [8, 0, 4, 4]
    ids = [f"v{i}" for i in rows]
    assert torch.equal(store.latents(ids), latents[rows].float())
    all_states, all_t = store.trajectory(ids)
    assert torch.equal(all_states, states["states"][rows])
    assert torch.equal(all_t, states["t"][rows])
    one, t = store.trajectory(ids, index=2)
    assert torch.equal(one, states["states"][rows][:, 2])
    assert torch.equal(t, states["t"][rows][:, 2])
    assert store.num_states() == 4
    assert store.call == {"height": 16}
    assert store.dimensions == ("VQ", "overall")
    assert [group.prompt for group in store.groups("test")] == ["prompt 2"]


def test_a_store_without_trajectories_says_so(tmp_path):
    folder, _, _ = make(tmp_path / "store", trajectories=False)
    store = LatentStore.open(folder)
    assert store.num_states() == 0
    with pytest.raises(PrismError, match="holds no trajectories"):
        store.trajectory(["v0"])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def edit(path, column, values):
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)


def first(path, column, value):
    edit(path, column, [value, *pq.read_table(path)[column].to_pylist()[1:]])


def last(path, column, value):
    edit(path, column, [*pq.read_table(path)[column].to_pylist()[:-1], value])


BREAKAGES = {
    "no store.json": (lambda f: (f / "store.json").unlink(), "store.json does not exist"),
    "other schema": (lambda f: files.write_json(f / "store.json", {"schema": 9}), "schema 9"),
    "no latents": (lambda f: (f / "latents-00000.safetensors").unlink(), "latents-00000.safetensors does not exist"),
    "truncated latents": (lambda f: truncate(f / "latents-00000.safetensors"), "latents-00000.*truncated"),
    "pickle": (lambda f: (f / "latents-00000.safetensors").write_bytes(pickle.dumps({"latents": 1})), "pickle"),
    "other tensor": (
        lambda f: save_file({"z": torch.zeros(9)}, f / "latents-00000.safetensors"),
        "no tensor 'latents'",
    ),
    "too few rows": (
        lambda f: save_file({"latents": torch.zeros(5, *SHAPE)}, f / "latents-00000.safetensors"),
        "holds 5 videos where .* refers to 9",
    ),
    "truncated table": (lambda f: truncate(f / "videos.parquet"), "not a whole Parquet file"),
    "missing column": (
        lambda f: pq.write_table(pq.read_table(f / "videos.parquet").drop_columns(["prompt"]), f / "videos.parquet"),
        "lacks the column prompt",
    ),
    "video twice": (lambda f: first(f / "videos.parquet", "video", "v1"), "'v1' is in .* twice"),
    "unknown split": (lambda f: edit(f / "videos.parquet", "split", ["train"] * 8 + ["dev"]), "split 'dev'"),
    "negative row": (lambda f: first(f / "videos.parquet", "row", -1), "whole numbers from 0"),
    "unknown video": (lambda f: first(f / "pairs.parquet", "video_a", "v99"), "'v99'.* names no video"),
    "pair of two prompts": (lambda f: first(f / "pairs.parquet", "prompt", "prompt 9"), "is of 'prompt 9'"),
    "leak in pairs": (lambda f: last(f / "pairs.parquet", "prompt", "prompt 0"), "in the splits train and test"),
    "leak in videos": (lambda f: last(f / "videos.parquet", "prompt", "prompt 0"), "in the splits train and test"),
    "label": (lambda f: edit(f / "pairs.parquet", "VQ", [5] * 9), "found 5"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_stores_are_refused(tmp_path, name):
    folder, _, _ = make(tmp_path / "store")
    damage, sentence = BREAKAGES[name]
    damage(folder)
    with pytest.raises(PrismError, match=sentence):
        LatentStore.open(folder)


def test_a_missing_folder_or_video_is_named(tmp_path):
    with pytest.raises(PrismError, match="nowhere does not exist"):
        LatentStore.open(tmp_path / "nowhere")
    folder, _, _ = make(tmp_path / "store")
    with pytest.raises(PrismError, match="no video 'v77'"):
        LatentStore.open(folder).latents(["v77"])


def test_latents_that_are_not_numbers_are_named(tmp_path):
    folder, _, _ = make(tmp_path / "store")
    path = folder / "latents-00000.safetensors"
    latents = load_file(path)["latents"].clone()
    latents[4, 0, 0, 0, 0] = float("nan")
    save_file({"latents": latents}, path)
    store = LatentStore.open(folder)
    store.latents(["v3"])
    with pytest.raises(PrismError, match=r"'v4'.*NaN"):
        store.latents(["v3", "v4"])


def test_a_store_that_cannot_be_opened_is_not_written(tmp_path):
    with pytest.raises(PrismError, match="one row of latents per video"):
        make(tmp_path / "store", latents=torch.zeros(4, *SHAPE))
    assert list(tmp_path.iterdir()) == []
