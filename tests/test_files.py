"""Folders appear whole or not at all; what is read is checked."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from prism import files
from prism.errors import PrismError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_appears_only_at_the_end(tmp_path):
    out = tmp_path / "runs" / "a"
    with files.new_folder(out) as temporary:
        assert temporary.parent == out.parent
        (temporary / "x").write_text("1")
        assert not out.exists()
    assert names(out) == ["x"]
    assert names(out.parent) == ["a"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~files._umask()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_new_folder_leaves_nothing_after_an_exception(tmp_path, error):
    with pytest.raises(error), files.new_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_new_folder_refuses_an_existing_one_before_any_work(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    with pytest.raises(PrismError, match=r"a exists already.*--overwrite"), files.new_folder(tmp_path / "a"):
        pytest.fail("the block ran")
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="is not a folder"), files.new_folder(tmp_path / "file", overwrite=True):
        pytest.fail("the block ran")


def test_overwrite_replaces_whole_and_only_on_success(tmp_path):
    out = tmp_path / "a"
    with files.new_folder(out) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(ValueError), files.new_folder(out, overwrite=True) as temporary:
        (temporary / "new").write_text("2")
        raise ValueError
    assert names(out) == ["old"]
    with files.new_folder(out, overwrite=True) as temporary:
        (temporary / "new").write_text("2")
        assert names(out) == ["old"]
    assert names(out) == ["new"]
    assert names(tmp_path) == ["a"]


def test_overwrite_refuses_the_current_directory_and_links(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(PrismError, match="current directory"), files.new_folder(tmp_path / "a", overwrite=True):
        pytest.fail("the block ran")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(PrismError, match="is not a folder"), files.new_folder(tmp_path / "link", overwrite=True):
        pytest.fail("the block ran")


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(PrismError, match="appeared while"), files.new_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("1")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("2")
    assert names(tmp_path / "a") == ["theirs"]
    (kept,) = tmp_path.glob("a.kept-*")  # and so is what was made
    assert names(kept) == ["x"]
    assert names(tmp_path) == ["a", kept.name]


def test_an_unwritable_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="cannot be made in"), files.new_folder(tmp_path / "file" / "a"):
        pytest.fail("the block ran")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PrismError, match="Permission denied"), files.new_folder(tmp_path / "a"):
        pytest.fail("the block ran")


def test_nothing_half_written_after_kill(tmp_path):
    """After kill -9 the folder is absent; only the hidden temporary one is left."""
    code = (
        "import sys, time\nfrom prism import files\n"
        "with files.new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'x').write_text('1')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "a").exists()
    assert all(name.startswith(".a.prism-") for name in names(tmp_path))


def test_json_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "a.json"
    value = {"ü": [1, 2.5, None, "x"]}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert names(tmp_path) == ["a.json"]
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path) == value
    path.write_text(path.read_text()[:-5])
    with pytest.raises(PrismError, match="not valid JSON"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PrismError, match="not valid JSON"):
        files.read_json(path)
    with pytest.raises(PrismError, match="does not exist"):
        files.read_json(tmp_path / "none.json")


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    with pytest.raises(PrismError, match="does not exist"):
        files.sha256(tmp_path / "none")


def test_safetensors_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = files.load_safetensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


class Bomb:
    def __reduce__(self):
        return (time.sleep, (1e9,))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        ("truncated", "truncated or altered"),
        (b"", "truncated or altered"),
        (b"not a tensor file at all", "truncated or altered"),
        (pickle.dumps(Bomb()), "is a pickle, which is never loaded"),
        ("torch.save", "is a pickle, which is never loaded"),
        ("nan", "tensor w in .* holds NaN"),
    ],
)
def test_bad_safetensors_are_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "model.safetensors"
    if content == "truncated":
        save_file({"w": torch.randn(100)}, path)
        path.write_bytes(path.read_bytes()[:-10])
    elif content == "torch.save":
        torch.save({"w": torch.randn(3)}, path)
    elif content == "nan":
        save_file({"v": torch.ones(2), "w": torch.tensor([1.0, float("nan")])}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(PrismError, match=sentence) as caught:
        files.load_safetensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/", "x/" * 2000 + "x", "surr\udcff", None, 5, "a\0b"])
def test_paths_that_no_folder_can_have_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrismError, match="The output folder"):
        files.check_new_folder(path)
    assert not any(tmp_path.iterdir())


def test_a_path_that_leads_through_the_folder_itself_is_replaced(tmp_path):
    (tmp_path / "deep" / "in").mkdir(parents=True)
    (tmp_path / "deep" / "old.txt").write_text("old")
    with files.new_folder(f"{tmp_path}/deep/in/../../deep", overwrite=True) as work:
        (work / "new.txt").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")] == ["deep/new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_litter_beside_a_name_with_a_line_break_is_swept(tmp_path):
    litter = tmp_path / ".a\nb.prism-0123abcd"
    litter.mkdir()
    files.check_new_folder(tmp_path / "a\nb")
    assert not litter.exists()
