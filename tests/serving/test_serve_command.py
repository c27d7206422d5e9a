"""`prism serve`: which judges it loads, and what it refuses before it loads one."""

from __future__ import annotations

import socket

import pytest

from prism import cli
from prism.commands import serve
from prism.errors import PrismError
from prism.serving.judges import ALONE, load

FILES = {
    "judges.yaml": "wan: {head: x}\n",
    "list.yaml": "- a\n",
    "field.yaml": "wan: {heads: x}\n",
    "value.yaml": "wan: 3\n",
    "broken.yaml": "a: [\n",
    "call.yaml": "wan: {call: 3}\n",
    "gpu.yaml": "wan: {device: 'cuda:1'}\n",
    "short": "abc\n",
    "spaces": "a secret of words\n",
}
WRONG = {
    "--port 99999": "--port must be a whole number from 0 to 65,535; found 99999.",
    "--host 203.0.113.1": "The service cannot listen on --host 203.0.113.1 --port 8000",
    "--max-batch-size 0": "--max-batch-size must be a whole number from 1 to 4,096; found 0.",
    "--max-wait-ms nan": "--max-wait-ms must be a number from 0 to 60,000",
    "--max-body-mb 0": "--max-body-mb must be a whole number from 1 to 16,384; found 0.",
    "--token-file short": "The --token-file short must hold a token of 8 or more",
    "--token-file spaces": "must hold a token of 8 or more",
    "--token-file nothing": "The --token-file nothing cannot be read: No such file or directory.",
    "--judges nothing": "The --judges nothing cannot be read",
    "--judges list.yaml": "must hold judges by name",
    "--judges field.yaml": "a judge has no heads; it has head, backbone, device",
    "--judges value.yaml": "the judge wan must have settings by name",
    "--judges call.yaml": "the judge wan must have settings by name",
    "--judges broken.yaml": "cannot be read",
    "--judges judges.yaml --head y": "leave --head out",
    "--t 5000": "levels lie in 0",
    "--ray-workers 2": "The --ray-workers are of Ray; give --ray too.",
    "--ray --judges gpu.yaml": "The judge wan has the device cuda:1; Ray gives each process a GPU of its own",
}


@pytest.mark.parametrize("words", WRONG)
def test_mistakes_are_said_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prism.serving.judges.load", lambda entries: pytest.fail("a model was loaded"))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["serve", *words.split()]) == 2
    assert WRONG[words] in capsys.readouterr().err


def test_a_port_in_use_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("prism.serving.judges.load", lambda entries: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_judges_of_a_file_stand_over_the_flags(tmp_path):
    (tmp_path / "judges.yaml").write_text("wan: {head: a, levels: [500], call: {height: 64}}\ncog: {backbone: b}\n")
    config = serve.Serve(
        models=serve.Judged(judges=tmp_path / "judges.yaml", device="cpu"),
        scores=serve.Scores(levels="699,499", draws=3),
        size=serve.Size(num_frames=9),
    )
    entries = dict(serve.entries_of(config))
    assert list(entries) == ["wan", "cog"]
    assert entries["wan"]["call"] == {"num_frames": 9, "height": 64}
    assert (entries["wan"]["levels"], entries["cog"]["levels"]) == ([500], [699, 499])
    assert (entries["cog"]["backbone"], entries["cog"]["device"], entries["cog"]["draws"]) == ("b", "cpu", 3)


def test_the_token_of_the_environment(monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    assert serve.token_of(None) is None
    monkeypatch.setenv(serve.TOKEN, "a-long-secret")
    assert serve.token_of(None) == "a-long-secret"
    monkeypatch.setenv(serve.TOKEN, "short")
    with pytest.raises(PrismError, match="The variable PRISM_TOKEN must hold"):
        serve.token_of(None)


def test_a_judge_of_a_file_that_cannot_be_loaded_is_named():
    with pytest.raises(PrismError, match=r"^The judge wan: The device quantum cannot be used"):
        load({"wan": {"device": "quantum"}})
    with pytest.raises(PrismError, match=r"^The device quantum"):
        load({ALONE: {"device": "quantum"}})
