"""Prompts of text files and tables, each once, whatever the file."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism.errors import PrismError
from prism.preference.prompts import read_prompts

ROWS = [{"prompt_en": "a cat", "dimension": ["x"]}, {"prompt_en": "a dog, running"}, {"prompt_en": "a cat"}]
WRITTEN = {
    "p.txt": b"a cat\n\n  a dog, running  \r\na cat\n",
    "p.prompts": "a cat\ra dog, running".encode("utf-16"),
    "VBench_full_info.json": json.dumps(ROWS).encode(),
    "p.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "p.csv": b'id,prompt\n1,a cat\n2,"a dog, running"\n3,\n',
    "p.tsv": b"prompt\tid\na cat\t1\na dog, running\t2\n",
}


@pytest.mark.filterwarnings("ignore:1 of 3 prompts in .* stand there before")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_prompts_gives_each_once_with_its_place(name, tmp_path):
    (tmp_path / name).write_bytes(WRITTEN[name])
    prompts = read_prompts(tmp_path / name)
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog, running"]
    assert prompts[0].place == (name, 0)
    assert prompts[1].place == (name, 2 if name == "p.txt" else 1)
    assert {prompt.split for prompt in prompts} == {None}


def test_parquet_with_splits(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "split": ["test", "train"]}), tmp_path / "p.parquet")
    assert [(prompt.text, prompt.split) for prompt in read_prompts(tmp_path / "p.parquet")] == [
        ("a", "test"),
        ("b", "train"),
    ]


REFUSED = {
    "empty.txt": (b"\n \n", "empty.txt.* holds no prompt"),
    "p.txt": (b"caf\xe9", "is not utf-8: byte 3 is 0xe9"),
    "nulls.txt": (b"a\0b", "holds null characters"),
    "p.pkl": (b"\x80\x04", "is no list of prompts by its ending"),
    "p.json": (b'["a", "b"]', "must hold objects with named values"),
    "c.csv": (b"text,x\na,1\n", "has the columns text, x; one named prompt or prompt_en is needed"),
    "s.csv": (b"prompt,split\na,dev\n", "split in row 0 of s.csv .* must hold one of train, .*; found dev"),
    "two.csv": (b"prompt,split\na,train\nA ,test\n", 'prompt "A" in row 1 of two.csv .* is in two splits'),
    "n.jsonl": (b'{"prompt": ["a"]}', "prompt in row 0 of n.jsonl .* must hold a text"),
    "p.parquet": (b"PAR1", "is not a whole Parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_list_of_prompts_is_refused(name, tmp_path):
    data, sentence = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PrismError, match=sentence):
        read_prompts(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.* prompts in .* stand there before")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["p.txt", "p.csv", "p.json", "p.jsonl", "p.parquet"]))
def test_any_bytes_give_prompts_or_one_sentence(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    try:
        prompts = read_prompts(tmp_path / name)
    except PrismError:
        return
    assert prompts
    assert all(prompt.text.strip() for prompt in prompts)
