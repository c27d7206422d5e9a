"""Tables of an opened store take little memory, and are to callers what they were."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import stores

from prism.preference import LatentStore, StoreWriter, compact
from prism.preference.compact import RowIndex, codes, compacted, equal_at, joint_codes, plain

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=40)


def column(texts, chunks=1) -> pa.ChunkedArray:
    return pa.chunked_array([texts[k::chunks] for k in range(chunks)], pa.string())


@given(TEXTS, TEXTS, st.integers(1, 3), st.sampled_from([hash, lambda text: len(text), lambda _: 0]))
def test_rows_are_found_whatever_the_hash(texts, wanted, chunks, hashed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "hash", hashed, raising=False)  # texts of one hash, too
        stored = column(texts, chunks)
        index, rows = RowIndex(stored), stored.to_pylist()
        first = {text: rows.index(text) for text in rows}
        asked = column(wanted, chunks)
        assert index.rows(asked).tolist() == [first.get(text, -1) for text in asked.to_pylist()]
        assert [index.get(text) for text in wanted] == [first.get(text) for text in wanted]
        assert (index.twice() is not None) == (len(first) < len(rows))
        assert index.twice() is None or rows.count(index.twice()) > 1
    assert index.get(None) is None


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from(["x", "y"])), max_size=20))
def test_codes_number_values_in_order_of_appearance(rows):
    table = pa.table({"prompt": pa.array([a for a, _ in rows], pa.string()), "n": [b for _, b in rows]})
    numbers = {value: number for number, value in enumerate(dict.fromkeys(a for a, _ in rows))}
    joint = {value: number for number, value in enumerate(dict.fromkeys(rows))}
    for each in (table, compacted(table)):
        assert codes(each["prompt"]).tolist() == [numbers[a] for a, _ in rows]
        assert joint_codes([each["prompt"], each["n"]]).tolist() == [joint[row] for row in rows]


def test_texts_are_compared_across_dictionaries():
    ours, theirs = column(["a", "b", "a"]), column(["b", "c", "b", "a"], 2)  # b, b, c, a
    assert equal_at(ours, np.array([1, 0, 0, 2]), theirs).tolist() == [True, False, False, True]


def test_looking_up_is_no_search(monkeypatch):
    """A count, for no clock can be trusted."""
    hashed = []
    monkeypatch.setattr(compact, "hash", lambda text: hashed.append(text) or hash(text), raising=False)
    ids = column([f"video-{number}" for number in range(10_000)])
    assert RowIndex(ids).rows(ids).tolist() == list(range(10_000))
    assert len(hashed) == 20_000


def test_a_stores_tables_are_plain_to_callers_and_small_inside(tmp_path, monkeypatch):
    monkeypatch.setattr("prism.preference.writer.ROW_GROUP", 7)  # several groups of rows, each with a dictionary
    store = stores.make_kinds(tmp_path / "store", train=[(0, 1, 2, 0)] * 6, validation=[(1, 1)] * 3)
    for name, table in (("index", store.videos), ("pairs", store.pairs)):
        file = pq.ParquetFile(store.folder / f"{name}.parquet")
        assert file.num_row_groups > 1
        assert table.schema == file.schema_arrow
        assert table.equals(file.read())
        assert plain(compacted(table)).equals(table)
    assert store._videos["prompt"].type == store._pairs["video_a"].type == compact.ENCODED
    assert store._videos.nbytes < 0.8 * store.videos.nbytes
    before = pa.default_memory_pool().backend_name
    writer = StoreWriter(store.folder, {"test": "kinds"}, {}, resume=True, main=False)
    writer.write("000099-0123456789ab", pa.table({"video": ["new"], "prompt": ["b"], "split": ["train"]}),
                 {"latents": store.latents([store.videos["video"][0].as_py()])})  # fmt: skip
    again = LatentStore.open(store.folder)  # a shard that the index has not
    assert again.videos.slice(0, len(store.videos)).equals(store.videos)
    assert again.videos["video"].to_pylist()[-1] == "new"
    assert pa.default_memory_pool().backend_name == before
