"""A run's folder: claimed, kept for one configuration, replaced whole, swept; and nobody else's file deleted."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tests import kills

from prism import files, runs, temporary
from prism.errors import PrismError
from prism.runs import IDENTITY, Clock

Parts = functools.partial(runs.claim, resume=True, name=IDENTITY)


def test_a_piece_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        parts = Parts(tmp_path / "run.parts", {"seed": 1})
        found = parts.once("a/b", lambda: made.append(1) or {"x": [1, 2]})
    assert made == [1]
    assert found["x"] == [1, 2]
    assert found["seconds"] >= 0
    assert parts.has("a/b.json")


def test_a_piece_that_fails_leaves_nothing(tmp_path):
    parts = Parts(tmp_path / "p", {})
    with pytest.raises(KeyboardInterrupt):
        parts.once("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not parts.has("a.json")


def test_another_configuration_is_named_and_never_mixed(tmp_path, capsys):
    Parts(tmp_path / "p", {"seed": 1, "n": 8}).once("a", dict)
    with pytest.raises(PrismError, match=r"differs in n: it was 8 and is now 4.*--overwrite"):
        Parts(tmp_path / "p", {"seed": 1, "n": 4})
    assert Parts(tmp_path / "p", {"seed": 1, "n": 8}, restart=True).has("a.json")
    assert not Parts(tmp_path / "p", {"seed": 1, "n": 4}, restart=True).has("a.json")
    assert "deleting" in capsys.readouterr().err


def test_what_changes_no_piece_may_change(tmp_path):
    first = {"n": 8, "train": {"rows": 64, "rate": {"low": 1}}, "where": "a"}
    Parts(tmp_path / "p", first).once("a", dict)
    names = ("train.rows", "train.nothing", "where", "n.rows")
    assert Parts(tmp_path / "p", {"n": 8, "train": {"rate": {"low": 1}}}, restart=True, changeable=names).has("a.json")
    assert files.read_json(tmp_path / "p" / "identity.json") == first
    with pytest.raises(PrismError, match=r"differs in train: rate\.low was 1 and is now 2"):
        Parts(tmp_path / "p", {"n": 8, "train": {"rows": 1, "rate": {"low": 2}}}, changeable=names)


def test_a_finished_runs_folder_holds_the_users_copies_too(tmp_path):
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "before").mkdir()
    (tmp_path / "out" / "before" / "metrics.json").write_text("{}")  # a name that runs use
    with pytest.raises(PrismError, match=r"holds before/metrics\.json, which no run made"):
        make(tmp_path / "out", "new")


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


# -- folders made in one go


def make(out, text, overwrite=True):
    with runs.new(out, overwrite, "eval") as folder:
        files.write_json(folder / "config.json", {"command": "eval", "text": text})
        files.write_json(folder / "metrics.json", {"command": "eval", "text": text})
        (folder / "per_prompt").mkdir()
        (folder / "per_prompt" / "values.parquet").write_text(text)
        (folder / "report.html").write_text(text)


def holds(out):
    """The text that all files of a whole folder hold."""
    texts = {files.read_json(out / name)["text"] for name in ("config.json", "metrics.json")}
    (text,) = {*texts, (out / "report.html").read_text(), (out / "per_prompt" / "values.parquet").read_text()}
    return text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_anywhere_leaves_the_old_or_the_new_and_the_next_run_no_litter(
    tmp_path, monkeypatch, number, can_exchange
):
    if not can_exchange:
        monkeypatch.setattr(temporary, "exchange", lambda one, other: False)
    out, ends, point = tmp_path / "runs" / "out", set(), 1
    make(out, "old")
    while kills.dies(lambda: make(out, "new"), tmp_path / "runs", point, number):
        if not can_exchange:
            temporary.sweep(out)  # as the next run does first
        ends.add(holds(out))
        if number == signal.SIGTERM and holds(out) == "old":
            assert [path.name for path in out.parent.iterdir()] == ["out"]
        make(out, "old")
        assert holds(out) == "old"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        point += 1
    assert point > 20
    assert ends == {"old", "new"}


def test_a_live_runs_folder_is_left_alone_and_a_dead_ones_is_swept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PrismError, match="appeared while"), runs.new(out, False, "eval") as live:
        (tmp_path / ".out.prism-0a1b2c3d").mkdir()
        (tmp_path / ".out.prism-0a1b2c3d" / "x").write_text("1")
        (tmp_path / ".out-backup").mkdir()
        (tmp_path / ".other.prism-0a1b2c3d").mkdir()
        make(out, "second")
        assert live.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == {"out", live.name, ".out-backup", ".other.prism-0a1b2c3d"}
        (out / "mine.txt").write_text("1")  # and now the first one finds that it is too late
        with pytest.raises(PrismError, match=r"holds mine\.txt, which no run made"):
            make(out, "third")


def test_a_users_file_that_comes_while_a_run_works_is_kept(tmp_path):
    out = tmp_path / "out"
    make(out, "old")

    def work():
        with runs.new(out, True, "eval") as folder:
            (folder / "report.html").write_text("new")
            (out / "thesis.tex").write_text("x")

    with pytest.warns(UserWarning, match="no run made"):
        work()
    assert (out / "report.html").read_text() == "new"
    (kept,) = tmp_path.glob("out.kept-*/thesis.tex")
    assert kept.read_text() == "x"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"thesis.tex": "x"}, "holds nothing that PRISM made"),
        ({"config.json": '{"model_type": "wan"}', "model.safetensors": ""}, "holds nothing that PRISM made"),
        ({"store.json": "{}", "pairs.parquet": ""}, "holds a latent store"),
        ({"config.json": '{"format": "prism-head"}', "model.safetensors": ""}, "holds a head"),
        ({"config.json": '{"command": "train"}', "history.json": "{}"}, "holds a run of train"),
        ({"metrics.json": '{"command": "eval"}', "sub/notes.md": "x"}, "holds sub/notes.md, which no run made"),
    ],
)
def test_what_is_not_such_a_run_is_never_replaced(tmp_path, content, sentence):
    for name, text in content.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(PrismError, match=sentence) as caught:
        make(tmp_path / "out", "new")
    assert len(str(caught.value)) < 500
    for name, text in content.items():
        assert (tmp_path / "out" / name).read_text() == text


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("left", ["nothing", "folders", "a temporary file", "config.json"])
def test_an_empty_folder_will_do(tmp_path, overwrite, left):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True) if left == "folders" else out.mkdir()
    if left == "a temporary file":
        (out / ".config.json.prism-0a1b2c3d").mkdir()
        (out / ".config.json.prism-0a1b2c3d" / "config.json").write_text("{")
    if left == "config.json":
        files.write_json(out / "config.json", {"command": "train"})
    make(out, "new", overwrite)
    assert holds(out) == "new"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/out", "file", "link", "dangling"])
@pytest.mark.parametrize("how", ["new", "claim"])
def test_a_path_that_no_folder_can_have_gets_a_sentence(tmp_path, name, how):
    (tmp_path / "file").write_text("1")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PrismError, match=r"cannot be made|is not a folder") as caught:
        runs.claim(tmp_path / name, {"command": "train"}, True) if how == "claim" else make(tmp_path / name, "x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_a_long_name_that_a_folder_can_have_will_do(tmp_path):
    out = tmp_path / ("ü" * 127)
    make(out, "one")
    make(out, "two")
    assert holds(out) == "two"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(path, obj):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(PrismError, match=r"cannot be written: No space left"):
        runs.claim(tmp_path / "run", {"command": "train"})
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


def test_published_files_have_the_users_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with runs.new(tmp_path / "out", False, "eval") as folder:
            save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
            files.write_json(folder / "metrics.json", {"command": "eval"})
            with files.new_file(folder / "state.safetensors") as path:
                save_file({"x": torch.zeros(2)}, path)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


# -- folders that are worked in


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import sys\nfrom prism import runs\nheld = runs.claim(sys.argv[1], {'command': 'train'})\n"
        "open(sys.argv[1] + '/history.json', 'w').write('{}')\nprint('ready', flush=True)\nsys.stdin.read()\n"
    )
    out = tmp_path / "run"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(out)], **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(PrismError, match="Another process is working in"):
            runs.claim(out, {"command": "train"}, resume=True)
        with pytest.raises(PrismError, match="Another process is working in"):
            make(out, "x")
        process.stdin.close()
    assert runs.claim(out, {"command": "train"}, resume=True).resumed


def test_of_two_commands_at_once_the_second_is_refused_at_its_start(tmp_path, monkeypatch):
    code = (
        "import sys\nfrom prism import runs\nwith runs.new(sys.argv[1], True, 'eval') as f:\n"
        "    (f / 'report.html').write_text('first')\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    out = tmp_path / "out"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(out)], **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        for overwrite in (False, True):
            with pytest.raises(PrismError, match="Another process is working in"):
                make(out, "second", overwrite)
        make(tmp_path / "out2", "other")
        process.stdin.close()
    assert (out / "report.html").read_text() == "first"
    with temporary.scratch(tmp_path / "out2", shared=True):
        monkeypatch.setattr(temporary, "_own", set())  # it is another's, who looks whether the folder can be made
        make(tmp_path / "out2", "again")


def test_work_whose_name_was_taken_meanwhile_is_kept_beside_it(tmp_path):
    def work():
        with runs.new(tmp_path / "out", False, "eval") as folder:
            make(tmp_path / "out", "first")
            (folder / "report.html").write_text("second")

    with pytest.raises(PrismError, match=r"appeared while this run was working; what the run made is in .*out\.kept-"):
        work()
    assert holds(tmp_path / "out") == "first"
    (kept,) = tmp_path.glob("out.kept-*")
    assert (kept / "report.html").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", kept.name]


def test_processes_that_share_their_parts_do_not_refuse_each_other(tmp_path):
    first = Parts(tmp_path / "p", {"seed": 1}, shared=True)
    second = Parts(tmp_path / "p", {"seed": 1}, shared=True)
    first.once("a", dict)
    assert second.has("a.json")


def test_the_first_difference_is_named_however_deep(tmp_path):
    with runs_of(tmp_path / "run", {"command": "train", "train": {"steps": 4, "inner": {"a": [1, 2], "b": 1}}}):
        pass
    with pytest.raises(PrismError, match=r"differs in train: inner\.b was 1 and is now 2"):
        runs.claim(tmp_path / "run", {"command": "train", "train": {"steps": 4, "inner": {"a": (1, 2), "b": 2}}}, True)
    with pytest.raises(PrismError, match="exists already"):
        runs.claim(tmp_path / "run", {"command": "train"})
    with pytest.raises(PrismError, match="holds no run of study"):
        runs.claim(tmp_path / "run", {"command": "study"}, True)


@contextlib.contextmanager
def runs_of(folder, identity):
    claim = runs.claim(folder, identity)
    (folder / "history.json").write_text("{}")
    yield claim
    claim.release()


def test_only_what_a_run_made_is_deleted_at_its_end(tmp_path):
    parts = Parts(tmp_path / "out.parts", {"seed": 1})
    parts.once("a/b", dict)
    (parts.folder / "thesis.tex").write_text("x")
    with pytest.warns(UserWarning, match="no run made"):
        parts.remove()
    assert [path.name for path in parts.folder.rglob("*")] == ["thesis.tex"]
    with pytest.raises(PrismError, match="holds no parts"):
        Parts(parts.folder, {"seed": 1}, restart=True)


# -- pieces


def test_a_kill_between_pieces_or_inside_one_loses_no_more_than_that_one(tmp_path):
    folder, made = tmp_path / "run", tmp_path / "made"

    def note(name):
        with made.open("a") as file:
            file.write(f"{name}\n")

    def work():
        held = runs.claim(folder, {"command": "study"}, resume=True)
        for number in range(2):
            held.once(f"rows/{number}", lambda number=number: note(f"rows/{number}.json") or {"x": number})

        def fill(work):
            note("heads/a")
            for name in ("one", "two"):
                (work / name).write_text(name)

        held.piece("heads/a/", fill)
        held.piece("heads/a/scores", lambda path: note("heads/a/scores") or path.write_text("scores"))
        held.release()

    work()
    names = made.read_text().split()
    assert names == ["rows/0.json", "rows/1.json", "heads/a", "heads/a/scores"]
    whole, point, repeats = contents(folder), 1, []
    shutil.rmtree(folder)
    made.unlink()
    while kills.dies(work, folder, point):
        there = [name for name in names if (folder / name).exists()]
        begun = made.read_text().split() if made.exists() else []
        assert there == names[: len(there)]
        work()
        assert contents(folder) == whole
        again = made.read_text().split()[len(begun) :]
        assert again == names[len(there) :]  # all that is missing, and nothing twice
        repeats.append(len(begun) + len(again) - len(names))
        shutil.rmtree(folder)
        made.unlink()
        point += 1
    assert point > 40
    assert set(repeats) == {0, 1}  # between two pieces, or inside of one


def contents(folder):
    """The files of a run by name, but for wall times."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: json.loads(data)["x"] if name.startswith("rows") else data for name, data in found.items()}


def test_a_piece_that_its_reader_refuses_is_made_anew(tmp_path):
    held = runs.claim(tmp_path / "run", {"command": "study"})

    def read(path):
        if path.read_text() != "whole":
            raise PrismError(f"The file {path} is damaged.")
        return path.read_text()

    held.piece("a", lambda path: path.write_text("half"))
    with pytest.warns(UserWarning, match=r"run/a is damaged\. It is made anew"):
        assert held.piece("a", lambda path: path.write_text("whole"), read) == "whole"
    assert held.piece("a", lambda path: 1 / 0, read) == "whole"
    with pytest.raises(PrismError, match="is damaged"):
        held.piece("b", lambda path: path.write_text("half"), read)
