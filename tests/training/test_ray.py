"""Workers of a local Ray cluster make the store of one process, also where one of them is killed at its work."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests import tiny
from tests.teachers import small_models
from tests.training.test_encode import CALL, POLICY, make_set, sums

from prism.backbone import Backbone
from prism.cli import main
from prism.errors import PrismError
from prism.preference.readers import read
from prism.training import actors
from prism.training.actors import Actors
from prism.training.encode import encode

pytest.importorskip("ray", reason="Ray is not installed")

REWARD = """
import os, signal
from pathlib import Path

DIARY = Path({diary!r})

def light(video, prompt):
    with DIARY.open("a") as stream:
        stream.write("x")
    if DIARY.stat().st_size == 6 and {deadly}:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(video.mean())
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all tests: a Ray that the process has initialised is used as it is."""
    ray, started = actors.connected("local", 2)
    assert started
    yield ray
    ray.shutdown()


def redness(video) -> float:
    return float(video[..., 0].mean())


REDNESS = f"{__name__}:redness"


def note(diary: Path) -> int:
    """Add a character to a file that all processes share, and return its size."""
    with diary.open("a") as stream:
        stream.write("x")
    return diary.stat().st_size


def mortal(diary: Path) -> Backbone:
    """A backbone whose process is killed when the 13th clip of all processes is encoded."""
    encoded = Backbone.encode

    def counted(self, video):
        if note(diary) == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return encoded(self, video)

    Backbone.encode = counted  # in the worker's process alone
    return Backbone(tiny.wan())


def test_clips_of_a_killed_worker_are_encoded_by_others_to_the_store_of_one_process(tmp_path, capsys):
    table, options = make_set(tmp_path / "clips"), {"held_out": (0.2, 0.2), "unit": 5, "progress": False}
    encode(read(table), Backbone(tiny.wan()), CALL, POLICY, tmp_path / "one", **options)
    with Actors(partial(mortal, tmp_path / "diary"), workers=2) as crew:
        encode(read(table), crew, CALL, POLICY, tmp_path / "two", **options)
    assert sums(tmp_path / "two") == sums(tmp_path / "one")
    assert capsys.readouterr().err.count("was lost; another one makes again") == 1
    lost = (tmp_path / "diary").stat().st_size - 24
    assert 1 <= lost <= 5  # the unit of the killed worker, and no other


def test_the_command_collects_the_same_files_after_a_worker_was_killed_while_it_labelled(tmp_path, capsys):
    tiny.wan().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a cat runs\na red circle moves right\na blue square moves up\na cat\n")
    for out, words, deadly in (("one", [], False), ("two", ["--ray", "--ray-workers", "2"], True)):
        reward, diary = tmp_path / "reward.py", str(tmp_path / f"diary-{out}")
        reward.write_text(REWARD.replace("{deadly}", str(deadly)).replace("{diary!r}", repr(diary)))
        sizes = ["--steps", "2", "--height", "32", "--width", "32", "--num-frames", "9", "--candidates", "2"]
        words += ["--backbone", str(tmp_path / "pipe"), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
        code = main(["collect", *words, *sizes, "--reward", f"{reward}:light", "--out", str(tmp_path / out)])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert "8 videos of 4 prompts and 4 pairs" in said.out
    assert "was lost; another one makes again" in said.err
    ours, other = (
        {name: sum for name, sum in sums(tmp_path / out).items() if not name.startswith("labels")}
        for out in ("one", "two")
    )
    assert ours == other
    assert os.path.getsize(tmp_path / "diary-two") > 8


def test_actors_label_anew_by_a_teacher_that_each_loads_itself(tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    small_models.imagereward(tmp_path / "teacher", ["a", "red", "circle", "cat", "runs"])
    tiny.wan().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a cat runs\na red circle\na red cat\n")
    models = ["--backbone", str(tmp_path / "pipe"), "--device", "cpu"]
    sizes = ["--steps", "2", "--height", "32", "--width", "32", "--num-frames", "9", "--candidates", "2"]
    collected = ["collect", *models, "--prompts", str(tmp_path / "prompts.txt"), *sizes, "--reward", REDNESS]
    assert main([*collected, "--out", str(tmp_path / "one")]) == 0, capsys.readouterr().err
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for out, more in (("one", []), ("two", ["--ray", "--ray-workers", "2"])):
        rewards = ["--reward", f"imagereward={tmp_path / 'teacher'}", "--reward", REDNESS]
        code = main(["collect", "--label", *models, *rewards, *more, "--out", str(tmp_path / out)])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert "6 videos of 3 prompts and 3 pairs in imagereward.preference, redness.overall" in said.out
    assert sums(tmp_path / "two") == sums(tmp_path / "one")


class Small:
    """Nothing but a name."""

    @staticmethod
    def fingerprint() -> dict[str, str]:
        return {"pipeline": "small"}


def begin(backbone):
    def make(name, rows, count):
        warnings.warn("mind the gap", stacklevel=1)
        if name == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "wrong":
            raise PrismError("This unit is wrong.")
        return [f"{name} {row}" for row in rows]

    return make


def test_failures_warnings_and_units_that_kill_every_worker_are_told(monkeypatch, capsys):
    monkeypatch.setattr(actors, "LOSSES", 2)
    units = [(name, [1, 2]) for name in ("a", "b", "c")]
    with Actors(Small, workers=1) as crew:
        with pytest.warns(UserWarning, match="mind the gap") as told:
            sentences = crew.share("test", "rows", units, [False, True, False], begin, False)
        assert (sentences, len(told)) == (["a 1", "a 2", "c 1", "c 2"], 1)
        assert crew.share("test", "rows", units, [True, True, True], begin, False) == []
        with pytest.raises(PrismError, match=r"This unit is wrong\."):
            crew.share("test", "rows", [("wrong", [1])], [False], begin, False)
        with pytest.raises(PrismError, match="unit deadly ended 2 workers, one after another"):
            crew.share("test", "rows", [("deadly", [1])], [False], begin, False)
    assert "was lost" in capsys.readouterr().err


class Unreadable:
    """Sent by the driver, and read by no worker."""

    def __reduce__(self):
        return exec, (f"import os\nif os.getpid() != {os.getpid()}: raise ImportError('no such module here')",)

    def __call__(self):
        return Small()


def test_what_no_worker_can_read_is_told(monkeypatch):
    monkeypatch.setattr(actors, "LOSSES", 1)
    with Actors(Unreadable(), workers=1) as crew:
        with pytest.raises(PrismError, match=r"Workers of the Ray cluster do not start: .*no such module here"):
            crew.ask(type)


MACHINES = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 4.0}, {"memory": 1.0}]


@pytest.mark.parametrize(
    ("options", "workers", "needs"),
    [
        ({}, 9, {"GPU": 1, "CPU": 8}),
        ({"gpus": False}, 3, {"GPU": 0, "CPU": 4}),
        ({"gpus": False, "workers": 8}, 8, {"GPU": 0, "CPU": 1}),
        ({"workers": 2}, 2, {"GPU": 1, "CPU": 8}),
    ],
)
def test_each_gpu_has_a_worker_else_each_machine(cluster, options, workers, needs):
    crew = Actors(Small, **options)
    nodes = [{"Alive": True, "Resources": each} for each in MACHINES] + [{"Alive": False, "Resources": {"GPU": 8.0}}]
    crew._ray = SimpleNamespace(nodes=lambda: nodes, remote=cluster.remote)
    crew._describe()
    assert (crew._count, crew._needs) == (workers, needs)


def test_what_cannot_be_is_refused_in_a_sentence(cluster, monkeypatch, tmp_path, capsys):
    lock = threading.Lock()
    with pytest.raises(PrismError, match="What loads the backbone cannot be sent"):
        Actors(lambda: lock)
    with Actors(Small, gpus=True) as crew, pytest.raises(PrismError, match="has no GPU"):
        crew.ask(type)
    words = ["encode", "pairs.csv", "--out", str(tmp_path / "out")]
    assert main([*words, "--ray-workers", "2"]) == 2
    assert "The --ray-workers are of Ray; give --ray too." in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words, "--ray"]) == 2
    assert "without torchrun" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    for address in ("127.0.0.1:9", "[::1]:99999"):
        with pytest.raises(PrismError, match=r"The Ray cluster .* cannot be used: .* give --ray alone"):
            Actors(Small, address)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PrismError, match=r'Ray is not installed; install it with pip install "prism-video\[ray\]"'):
        Actors(Small)
    assert not (tmp_path / "out").exists()
