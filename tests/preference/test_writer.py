"""Stores of schema 2: written shard by shard, by several processes, through kills, full disks and flipped bytes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests import forks, kills

from prism import files
from prism.errors import PrismError
from prism.preference import LatentStore, StoreWriter, pairs_from_scores, unit_name

KEY = {"backbone": "tiny", "vae": "v", "frames": {"fps": 8}, "dtype": "float16"}
META = {"call": {"height": 32, "width": 32}, "dimensions": ["VQ"], "command": "test", "seed": 0}
SHAPES = ((2, 3, 4), (2, 5, 4))
UNITS, ROWS = 6, 4


def rows_of(unit: int) -> pa.Table:
    """Four videos of one prompt; those of odd units are larger, and say so in their call."""
    ids = [f"v{unit}-{row}" for row in range(ROWS)]
    call = '{"height": 40}' if unit % 2 else "{}"
    return pa.table(
        {
            "video": ids,
            "prompt": [f"prompt {unit}"] * ROWS,
            "split": [("train", "test")[unit % 2]] * ROWS,
            "call": [call] * ROWS,
            "seed": list(range(ROWS)),
            "VQ": np.random.default_rng(unit).normal(size=ROWS),
        }
    )


def tensors_of(unit: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(unit)
    shape = SHAPES[unit % 2]
    return {
        "latents": torch.randn(ROWS, *shape, generator=generator).half(),
        "states": torch.randn(ROWS, 2, *shape, generator=generator).half(),
        "predicted": torch.randn(ROWS, 2, *shape, generator=generator).half(),
        "t": torch.tensor([[900.0, 600.0]]).repeat(ROWS, 1),
    }


def name_of(unit: int) -> str:
    return unit_name(unit, rows_of(unit)["video"].to_pylist())


def fill(folder: Path, units=range(UNITS), resume=False, main=True) -> StoreWriter:
    writer = StoreWriter(folder, KEY, META, resume=resume, main=main)
    for unit in units:
        if not writer.has(name_of(unit)):
            writer.write(name_of(unit), rows_of(unit), tensors_of(unit))
    return writer


def labels() -> pa.Table:
    return pairs_from_scores(pa.concat_tables([rows_of(unit) for unit in range(UNITS)]), {"VQ": 0.1})


def finished(folder: Path, **options) -> LatentStore:
    writer = fill(folder, **options)
    writer.label(pairs=labels())
    assert writer.finish() == UNITS * ROWS
    return LatentStore.open(folder)


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_whole(store: LatentStore) -> None:
    assert store.videos["video"].to_pylist() == [f"v{unit}-{row}" for unit in range(UNITS) for row in range(ROWS)]
    for unit in range(UNITS):
        ids, tensors = [f"v{unit}-{row}" for row in (2, 0)], tensors_of(unit)
        assert torch.equal(store.latents(ids), tensors["latents"][[2, 0]].float())
        states, t = store.trajectory(ids, index=1)
        assert torch.equal(states, tensors["states"][[2, 0], 1].float())
        assert t.tolist() == [600.0, 600.0]
        assert torch.equal(store.predicted(ids, -2)[0], tensors["predicted"][[2, 0], 0].float())
        assert store.shape_of(ids[0]) == SHAPES[unit % 2]
        assert store.call_of(ids[0]) == {"height": 40 if unit % 2 else 32, "width": 32}
    assert len(store.pairs) == UNITS * 6
    assert len(store.groups("train")) == UNITS // 2


def test_reads_back_what_was_written(tmp_path):
    store = finished(tmp_path / "store")
    check_whole(store)
    assert store.num_states() == 2
    assert store.dimensions == ("VQ", "overall")
    with pytest.raises(PrismError, match="several shapes"):
        store.latents(["v0-0", "v1-0"])
    with pytest.raises(PrismError, match="no video 'x'"):
        store.call_of("x")


def test_without_an_index_and_with_an_old_one_the_shards_are_read_themselves(tmp_path):
    writer = fill(tmp_path / "store", range(2))
    writer.label(pairs=labels())
    with pytest.warns(UserWarning, match="24 of 36 pairs"):
        assert len(LatentStore.open(tmp_path / "store").videos) == 2 * ROWS
    writer.finish()
    writer = fill(tmp_path / "store", resume=True)
    check_whole(LatentStore.open(tmp_path / "store"))


def test_another_key_is_refused_by_the_writer_and_by_the_reader(tmp_path):
    finished(tmp_path / "store")
    with pytest.raises(PrismError, match=r"differs in key: frames\.fps"):
        StoreWriter(tmp_path / "store", {**KEY, "frames": {"fps": 16}}, META, resume=True)
    with pytest.raises(PrismError, match="--resume"):
        StoreWriter(tmp_path / "store", KEY, META)
    other = fill(tmp_path / "other", [7])
    other.key = "0" * 16
    other.write(name_of(8), rows_of(8), tensors_of(8))
    with pytest.raises(PrismError, match=r"000008-\w+\.parquet was written for another backbone"):
        LatentStore.open(tmp_path / "other")


@pytest.mark.parametrize("name", ["index.parquet", "pairs.parquet", "shards/*.safetensors", "store.json", "seals.json"])
def test_a_flipped_bit_is_found_and_named(tmp_path, name):
    finished(tmp_path / "store")
    path = sorted((tmp_path / "store").glob(name))[-1]
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 12).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        if name.endswith("json"):  # no checksum of its own: it must open as it was, or be refused in a sentence
            with contextlib.suppress(PrismError):
                LatentStore.open(tmp_path / "store")
            continue
        with pytest.raises(PrismError, match=path.name.partition(".")[0]):
            store = LatentStore.open(tmp_path / "store")
            store.latents([f"v{UNITS - 1}-{row}" for row in range(ROWS)])


def test_a_full_disk_leaves_what_was_written_and_the_run_goes_on(tmp_path, monkeypatch):
    from prism.preference import writer as module

    save = module.save_file

    def full(tensors, path):
        Path(path).write_bytes(b"half a")
        raise OSError(28, "No space left on device")

    folder = tmp_path / "store"
    writer = fill(folder, range(3))
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(PrismError, match=r"No space left on device.*--resume"):
        writer.write(name_of(3), rows_of(3), tensors_of(3))
    assert len(LatentStore.open(folder).videos) == 3 * ROWS
    monkeypatch.setattr(module, "save_file", save)
    check_whole(finished(folder, resume=True))
    undisturbed = tmp_path / "undisturbed"
    finished(undisturbed)
    assert sums(folder) == sums(undisturbed)


def test_kills_at_random_points_lose_and_double_nothing(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finished(undisturbed)
    for number, point in enumerate(np.random.default_rng(0).integers(2, 20, 6).tolist()):
        assert kills.dies(lambda: fill(killed, resume=begun(killed)), killed, point)
        if begun(killed) and number % 3 == 2:
            LatentStore.open(killed)
    check_whole(finished(killed, resume=begun(killed)))
    assert sums(killed) == sums(undisturbed)


def begun(folder: Path) -> bool:
    return (folder / "store.json").is_file()


def share(folder: Path) -> None:
    fill(folder, range(int(os.environ["RANK"]), UNITS, 2), resume=True, main=False)


def test_processes_write_into_one_store(tmp_path):
    StoreWriter(tmp_path / "store", KEY, META)
    assert [run.code for run in forks.run(share, tmp_path / "store")] == [0, 0]
    store = finished(tmp_path / "store", resume=True)
    check_whole(store)


def broken(change):
    rows, tensors = rows_of(0), tensors_of(0)
    change_rows, change_tensors = change
    return rows.select([n for n in rows.column_names if n not in change_rows]) if change_rows else rows, {
        **tensors,
        **change_tensors,
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ((["prompt"], {}), "column prompt of unit"),
        (([], {"latents": torch.zeros(3, 2, 3, 4)}), "must be"),
        (([], {"latents": torch.zeros(ROWS, 2, 3, 4, dtype=torch.long)}), "floating-point"),
        (([], {"t": torch.zeros(ROWS, 3)}), "must be"),
        (([], {"latents": torch.full((ROWS, 2, 3, 4), torch.nan)}), "NaN"),
        (([], {"noise": torch.zeros(1)}), "must be latents and optionally"),
        (([], {"scale": torch.ones(1, 2, 3, 4)}), "scale"),
    ],
)
def test_rows_and_tensors_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, change, sentence):
    writer = StoreWriter(tmp_path / "store", KEY, META)
    with pytest.raises(PrismError, match=sentence):
        writer.write(name_of(0), *broken(change))
    assert not (tmp_path / "store" / "shards").exists()
    with pytest.raises(PrismError, match="has no name"):
        writer.write("../up", rows_of(0), tensors_of(0))


def test_a_video_in_two_shards_is_refused(tmp_path):
    writer = fill(tmp_path / "store", [0])
    writer.write(unit_name(9, ["x"]), rows_of(0), tensors_of(0))
    with pytest.raises(PrismError, match=r"v0-0.*two shards"):
        writer.finish()


def test_what_is_no_shard_is_passed_by_or_named(tmp_path):
    finished(tmp_path / "store")
    shards = tmp_path / "store" / "shards"
    (shards / "notes.txt").write_text("mine")
    check_whole(LatentStore.open(tmp_path / "store"))
    pq.write_table(pa.table({"a": [1]}), shards / f"{unit_name(50, ['a'])}.parquet")
    with pytest.raises(PrismError, match=r"000050-\w+\.parquet is no table of a latent store"):
        LatentStore.open(tmp_path / "store")


def test_int8_latents_come_back_scaled(tmp_path):
    writer = StoreWriter(tmp_path / "store", KEY, META)
    numbers = torch.arange(-12, 12, dtype=torch.int8).view(ROWS, 2, 3)
    scale = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    writer.write(name_of(0), rows_of(0), {"latents": numbers, "scale": scale})
    writer.finish()
    found = LatentStore.open(tmp_path / "store").latents(["v0-3", "v0-1"])
    assert torch.equal(found, numbers[[3, 1]].float() * scale)
