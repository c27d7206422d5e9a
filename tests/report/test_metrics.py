"""The metrics document: what it must hold, and one sentence for what it does not."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.report import rows

from prism import files
from prism.errors import PrismError
from prism.report import metrics, page


@pytest.fixture
def document():
    return metrics.document("demo", {"name": "tiny"}, 0, rows.accuracy(), rows.picks(), {"train": 1.5}, extra=[1])


def test_a_document_is_json_and_valid(document, tmp_path):
    files.write_json(tmp_path / "metrics.json", document)
    read = files.read_json(tmp_path / "metrics.json")
    metrics.validate(read)
    assert read == document
    assert (read["schema"], read["command"], read["seed"], read["extra"]) == (1, "demo", 0, [1])
    assert len(read["accuracy"]) == 10
    assert len(read["best_of_n"]) == 6


def test_numbers_of_numpy_and_torch_become_plain(tmp_path):
    row = rows.pick("full", np.float64(0.5), np.float32(1.0), seconds=torch.tensor(3.0), vae_decodes=np.int64(7))
    document = metrics.document("demo", {}, np.int64(3), best_of_n=[row])
    assert json.loads(json.dumps(document))["best_of_n"][0]["vae_decodes"] == 7
    assert type(document["seed"]) is int


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("schema",), 2, "has schema 2"),
        (("command",), None, "'command' is None"),
        (("accuracy",), {}, "'accuracy' is missing or not a list"),
        (("accuracy", 0, "t"), "899", r"accuracy\[0\]: the field 't' is '899'"),
        (("accuracy", 1, "without_ties"), float("nan"), "a finite number"),
        (("accuracy", 1, "pairs"), 3.5, "int is needed"),
        (("accuracy", 1, "pairs"), True, "int is needed"),
        (("accuracy", 2, "without_ties_ci95"), [0.7, 0.6], "low <= high"),
        (("accuracy", 2, "without_ties_ci95"), [0.7], "low <= high"),
        (("accuracy", 0, "decided_pairs"), "871", r"'decided_pairs' is '871'; int is needed"),
        (("accuracy", 0, "head_seed"), "0", "int or null is needed"),
        (("best_of_n", 3, "denoiser_share_of_full"), "x", "int or float or null is needed"),
        (("best_of_n", 3, "schedule"), 3, "list or null is needed"),
        (("best_of_n", 3, "denoiser_rows"), None, r"best_of_n\[3\]: the field 'denoiser_rows'"),
    ],
)
def test_what_breaks_the_schema_is_named(document, path, value, sentence):
    broken = copy.deepcopy(document)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PrismError, match=sentence):
        metrics.validate(broken)


@pytest.mark.parametrize("key", ["accuracy", "best_of_n"])
def test_every_field_of_a_row_is_required(document, key):
    for field in sorted(document[key][0].keys() - {"decided_pairs", "decided_prompts"}):  # newer than the schema
        broken = copy.deepcopy(document)
        del broken[key][0][field]
        with pytest.raises(PrismError, match=f"'{field}' is missing"):
            metrics.validate(broken)


@pytest.mark.parametrize("folder", ["docs/evidence", "docs/evidence/rerun", "docs/evidence/claims"])
def test_committed_files_of_the_schema_are_read(folder):
    read = files.read_json(Path(__file__).parents[2] / folder / "metrics.json")
    metrics.validate(read)
    for key, kind in {**metrics._ROWS, **metrics._OPTIONAL_ROWS}.items():
        known = kind.__required_keys__ | kind.__optional_keys__
        assert {name for row in read.get(key, []) for name in row} <= known


@pytest.mark.parametrize("key", ["judge_comparison", "attention", "bars", "cuts"])
def test_rows_that_only_some_commands_write_are_checked_too(key):
    read = files.read_json(Path(__file__).parents[2] / "docs" / "evidence" / "rerun" / "metrics.json")
    for field in metrics._OPTIONAL_ROWS[key].__required_keys__:
        broken = {**read, key: [{name: value for name, value in read[key][0].items() if name != field}]}
        with pytest.raises(PrismError, match=rf"{key}\[0\]: the field '{field}' is missing"):
            metrics.validate(broken)
    del read[key]
    metrics.validate(read)


@pytest.mark.parametrize("key", ["generators", "reliability", "biases", "swap", "judge_comparison"])
def test_rows_of_an_evaluation_are_checked(key):
    document = metrics.document("eval", {"name": "tiny"}, 0, rows.accuracy(), **rows.evaluation())
    for field in metrics._OPTIONAL_ROWS[key].__required_keys__:
        broken = {**document, key: [{name: value for name, value in document[key][0].items() if name != field}]}
        with pytest.raises(PrismError, match=rf"{key}\[0\]: the field '{field}' is missing"):
            metrics.validate(broken)
    older = {name: value for name, value in document.items() if name not in rows.evaluation()}
    metrics.validate(older)
    page.write_report(os.devnull, older)


def test_environment_names_what_computed():
    environment = metrics.environment()
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["threads"] == torch.get_num_threads()


def test_a_config_is_written_as_plain_json(tmp_path):
    @dataclass(frozen=True)
    class Inner:
        rate: float = 1e-3

    @dataclass(frozen=True)
    class Config:
        data: Path = Path("a/b")
        inner: Inner = Inner()
        cuts: tuple = ((5, 1),)

    metrics.write_config(tmp_path / "config.json", Config())
    assert files.read_json(tmp_path / "config.json") == {"data": "a/b", "inner": {"rate": 0.001}, "cuts": [[5, 1]]}
