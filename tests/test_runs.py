"""Pieces on disk: made once, kept for their configuration alone."""

from __future__ import annotations

import pytest

from prism import files
from prism.errors import PrismError
from prism.runs import Clock, Parts


def test_a_piece_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        parts = Parts(tmp_path / "run.parts", {"seed": 1})
        found = parts.once("a/b", lambda: made.append(1) or {"x": [1, 2]})
    assert made == [1]
    assert found["x"] == [1, 2]
    assert found["seconds"] >= 0
    assert parts.has("a/b")


def test_a_piece_that_fails_leaves_nothing(tmp_path):
    parts = Parts(tmp_path / "p", {})
    with pytest.raises(KeyboardInterrupt):
        parts.once("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not parts.has("a")


def test_another_configuration_is_named_and_never_mixed(tmp_path, capsys):
    Parts(tmp_path / "p", {"seed": 1, "n": 8}).once("a", dict)
    with pytest.raises(PrismError, match=r"differs in n: it was 8 and is now 4.*--overwrite"):
        Parts(tmp_path / "p", {"seed": 1, "n": 4})
    assert Parts(tmp_path / "p", {"seed": 1, "n": 8}, restart=True).has("a")
    assert not Parts(tmp_path / "p", {"seed": 1, "n": 4}, restart=True).has("a")
    assert "deleting" in capsys.readouterr().err


def test_a_strangers_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PrismError, match="holds no parts of a run"):
        Parts(tmp_path, {}, restart=True)
    assert (tmp_path / "thesis.tex").exists()
    files.write_json(tmp_path / "broken.json", {})


def test_the_clock_is_quiet_unless_it_is_due(capsys):
    quiet, loud = Clock("x", 10), Clock("prompts", 10, every=0)
    quiet.tick(1, True)
    loud.tick(1, False)  # read from disk: nothing is known of the time left
    assert capsys.readouterr().err == ""
    loud.tick(2, True)
    assert "prompts: 2 of 10, about 0 minutes left" in capsys.readouterr().err
