"""The latent store: what is written is read back, and what is broken is refused with a sentence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import stores

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


def twice(path, column):
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_arrays([*table.columns, table[column]], [*table.column_names, column]), path)


def meta(folder, **changes):
    files.write_json(folder / "store.json", {**files.read_json(folder / "store.json"), **changes})


def pipe(path):
    path.unlink()
    os.mkfifo(path)


BREAKAGES = {
    "no store.json": (lambda f: (f / "store.json").unlink(), "store.json does not exist"),
    "a folder of videos": (lambda f: (f / "store.json").rename(f / "clip.mp4"), "is no store: .*write_store"),
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
    "labels in words": (
        lambda f: edit(f / "pairs.parquet", "VQ", ["1"] * 9),
        "VQ must be 1, -1, 0 or null, found string",
    ),
    "a null prompt": (lambda f: first(f / "pairs.parquet", "prompt", None), "prompt of .* found none in row 0"),
    "videos in numbers": (
        lambda f: edit(f / "videos.parquet", "video", list(range(9))),
        "must hold texts, found int64",
    ),
    "rows in words": (lambda f: edit(f / "videos.parquet", "row", ["0"] * 9), "must hold whole numbers from 0"),
    "column twice": (lambda f: twice(f / "videos.parquet", "prompt"), "has the column prompt twice"),
    "call is a list": (lambda f: meta(f, call=[1, 2]), "field call of .* must be an object"),
    "checksums are a text": (lambda f: meta(f, sha256="00"), "field sha256 of .* must be an object"),
    "backbone is a text": (lambda f: meta(f, backbone="vae"), "field backbone of .* must be an object"),
    "nested": (lambda f: (f / "store.json").write_text("[" * 100_000), "not valid JSON"),
    "a pipe": (lambda f: pipe(f / "store.json"), "is no regular file"),
    "a pipe of latents": (lambda f: pipe(f / "latents-00000.safetensors"), "is no regular file"),
    "float8": (
        lambda f: save_file(
            {"latents": torch.zeros(9, *SHAPE).to(torch.float8_e4m3fn)}, f / "latents-00000.safetensors"
        ),
        "latents in .* must be of F16, BF16, F32, F64, I8; found F8_E4M3",
    ),
    "one number": (
        lambda f: save_file({"latents": torch.zeros(9)}, f / "latents-00000.safetensors"),
        "found the shape",
    ),
    "no scale": (
        lambda f: save_file({"latents": torch.zeros(9, *SHAPE).to(torch.int8)}, f / "latents-00000.safetensors"),
        "no tensor 'scale'",
    ),
    "states of another shape": (
        lambda f: save_file(
            {"states": torch.zeros(9, 4, 2), "t": torch.zeros(9, 4)}, f / "trajectory-00000.safetensors"
        ),
        r"must be states \(rows, S, ...\)",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_stores_are_refused(tmp_path, name):
    folder, _, _ = make(tmp_path / "store")
    damage, sentence = BREAKAGES[name]
    damage(folder)
    with pytest.raises(PrismError, match=sentence) as refused:
        LatentStore.open(folder)
    assert len(str(refused.value)) <= 500
    assert str(refused.value).isprintable()


def test_a_missing_folder_or_video_is_named(tmp_path):
    with pytest.raises(PrismError, match="nowhere does not exist"):
        LatentStore.open(tmp_path / "nowhere")
    folder, _, _ = make(tmp_path / "store")
    with pytest.raises(PrismError, match="no video 'v77'"):
        LatentStore.open(folder).latents(["v77"])


def test_latents_that_are_not_numbers_are_named(tmp_path):
    latents = torch.randn(9, *SHAPE)
    latents[4, 0, 0, 0, 0] = float("nan")
    folder, _, _ = make(tmp_path / "store", latents=latents)
    store = LatentStore.open(folder)
    store.latents(["v3"])
    with pytest.raises(PrismError, match=r"'v4'.*NaN"):
        store.latents(["v3", "v4"])


@pytest.mark.parametrize("kind", ["latents", "trajectory"])
def test_a_flipped_bit_is_noticed_when_its_file_is_read(tmp_path, kind):
    folder, latents, _ = make(tmp_path / "store", shard_bytes=4 * 24 * 2)
    path = folder / f"{kind}-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    store = LatentStore.open(folder)
    assert torch.equal(store.latents(["v0", "v8"]), latents[[0, 8]].float())  # of other files
    read = store.latents if kind == "latents" else store.trajectory
    for _ in range(2):  # not the first time alone
        with pytest.raises(PrismError, match=f"{path.name} is not the one that was written"):
            read(["v5"])
    meta = files.read_json(folder / "store.json")
    del meta["sha256"][path.name]  # changed on purpose; stores of earlier versions have no checksums at all
    files.write_json(folder / "store.json", meta)
    read = LatentStore.open(folder).latents if kind == "latents" else LatentStore.open(folder).trajectory
    read(["v5"])


def test_a_table_that_was_changed_is_noticed_when_the_store_is_opened(tmp_path):
    folder, _, _ = make(tmp_path / "store")
    edit(folder / "pairs.parquet", "VQ", [1] * 9)
    with pytest.raises(PrismError, match=r"pairs\.parquet is not the one that was written"):
        LatentStore.open(folder)


def test_a_folder_named_like_a_column_adds_none(tmp_path):
    (tmp_path / "split=dev").mkdir()
    folder, _, _ = make(tmp_path / "split=dev" / "prompt=a")
    assert LatentStore.open(folder).videos["prompt"][0].as_py() == "prompt 0"


def test_a_store_is_its_folder_too(tmp_path):
    folder, _, _ = make(tmp_path / "store")
    store = LatentStore.open(folder)
    assert LatentStore.of(store) is store
    assert LatentStore.of(str(folder)).folder == folder
    with pytest.raises(PrismError, match="latent store or its folder is needed, found NoneType"):
        LatentStore.of(None)


def test_a_store_that_cannot_be_opened_is_not_written(tmp_path):
    with pytest.raises(PrismError, match="one row of latents per video"):
        make(tmp_path / "store", latents=torch.zeros(4, *SHAPE))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["store.json", "videos.parquet", "pairs.parquet", "latents-00000.safetensors"])
def test_a_file_that_may_not_be_read_is_named_and_not_called_damaged(tmp_path, monkeypatch, name):
    folder, real = stores.make(tmp_path / "store").folder, os.access  # root may read anything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name and real(path, mode))
    with pytest.raises(PrismError, match=rf"{name} cannot be read: permission denied"):
        LatentStore.open(folder)
