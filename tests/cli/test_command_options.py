"""The options of every command: --help, a mistake in one sentence, --config under the flags, completion."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pkgutil import resolve_name

import pytest
from tests import stores, tiny

from prism import cli, files
from prism.training.config import TrainConfig

LIGHT = ["--help", "shapeworld --help", *(f"{name} --help" for name in cli.COMMANDS), "--print-completion bash"]
CODE = """
import contextlib, io, json, sys
from prism.cli import main

def answer(line):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(line.split()), out.getvalue(), "torch" in sys.modules

print(json.dumps({line: answer(line) for line in json.loads(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def answers():
    """What commands that work on nothing return and print, and whether torch is imported by then, in one process."""
    words = [sys.executable, "-c", CODE, json.dumps(LIGHT)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", ["", "shapeworld", *cli.COMMANDS])
def test_help_names_every_option_without_heavy_imports(command, answers):
    code, out, heavy = answers[f"{command} --help".strip()]
    assert (code or 0, heavy) == (0, False)
    assert out.startswith("usage: prism")
    if command in cli.COMMANDS:
        for flag, kind in cli._flags(resolve_name(cli.COMMANDS[command])).values():
            forms = {flag, f"--no-{flag[2:]}"} if kind is bool else {flag}
            assert len(forms & set(re.findall(r"--[a-z-]+", out))) == 1
    else:
        assert all(f"  prism {name} " in out for name in cli.COMMANDS if command in name)
    if command == "train":
        flags = cli._flags(resolve_name(cli.COMMANDS["train"]))
        assert {field.name for field in dataclasses.fields(TrainConfig)} <= set(flags)
        assert "(default: 5e-4 on the embedded model, else 1e-4)" in re.sub(r"[\s│]+", " ", out)


def test_completion_knows_commands_and_options(answers):
    code, out, heavy = answers["--print-completion bash"]
    assert (code or 0, heavy) == (0, False)
    assert all(word in out for word in ("shapeworld", "candidates", "--prompts-per-step", "--guidance-scale"))


WRONG = {
    "sing": 'There is no command "sing"; ',
    "trian": 'There is no command "trian"; the nearest is train.',
    "shapeworld trian": "the nearest is shapeworld train.",
    "--print-completion fish": "needs the name of a shell: bash, zsh, tcsh",
    "sample --prompt x": "--out must be given; prism sample --help has every option.",
    "shapeworld weaker --out x": "RUN must be given",
    "train --out x --stpes 5": "There is no option --stpes; the nearest is --steps; ",
    "train --out x --steps five": "--steps must be a whole number; found five; ",
    "train --out x --steps 1.5": "--steps must be a whole number; found 1.5; ",
    "train --out x --dim 2.5": "--dim must be a whole number; found 2.5; ",
    "train --out x --learning-rate a:b": "--learning-rate must be a number; found a:b; ",
    "train --out x --eta=": '--eta must be a number; found ""; ',
    "train --out x --steps": "--steps needs a value; ",
    "train --out x y": 'The word "y" belongs to no option; ',
    "train --out x --config none.yaml": "The --config none.yaml cannot be read: No such file or directory.",
    "train --out x --config list.yaml": "The --config list.yaml must hold options by name; found [1].",
    "train --out x --config options.yaml": "must hold options by name; found {'options': 5}.",
    "train --out x --config": "--config needs a value; ",
    "train --out x --config broken.yaml": "The --config broken.yaml cannot be read: ",
    "train --out x --config other.yaml": "The --config other.yaml is of prism eval; name one of prism train.",
    "train --out x --config key.yaml": 'holds "step", which is no option of prism train; the nearest is steps.',
    "train --out x --config value.yaml": "--steps must be a whole number; found many; ",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_one_sentence(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {
        "list": "[1]",
        "options": "options: 5",
        "broken": "a: [",
        "other": "command: eval",
        "key": "step: 5",
        "value": "steps: many",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert cli.main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prism: ")
    assert captured.err.count("\n") == 1
    assert WRONG[line] in captured.err
    assert not (tmp_path / "x").exists()


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path):
    (tmp_path / "some.yaml").write_text(
        "training: {steps: 7, learning-rate: 1e-3, max_rows: 3}\ntap: [1, 2]\nkeep_best: true\nresume: true\n"
    )
    words = ["--out", "x", "--steps=9", "--no-resume", f"--config={tmp_path / 'some.yaml'}"]
    kind = resolve_name(cli.COMMANDS["train"])
    config = cli._parsed("train", kind, [*cli._overlaid("train", kind, words)])
    assert (config.training.steps, config.training.learning_rate, config.training.max_rows) == (9, 1e-3, 3)
    assert config.head.tap == "1,2"
    assert config.training.keep_best
    assert not config.output.resume
    assert config.training.eta == 5
    kind = resolve_name(cli.COMMANDS["doctor"])
    assert [cli._parsed("doctor", kind, words).run for words in (["--no-run"], ["--no-run", "--run"])] == [False, True]
    (tmp_path / "sample.yaml").write_text("lora: [a, b]\nsteps: 4\n")
    kind = resolve_name(cli.COMMANDS["sample"])
    words = ["--out", "x", "--config", str(tmp_path / "sample.yaml")]
    assert cli._parsed("sample", kind, [*cli._overlaid("sample", kind, words)]).models.loras == ("a", "b")
    replaced = cli._parsed("sample", kind, [*cli._overlaid("sample", kind, [*words, "--lora", "c", "--lora", "d"])])
    assert replaced.models.loras == ("c", "d")
    assert replaced.call.num_inference_steps == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_is_repeated_from_its_own_config_json(tmp_path):
    tiny.wan("unipc").save_pretrained(tmp_path / "backbone")
    files.write_json(tmp_path / "backbone" / "call.json", tiny.CALL_WAN)
    stores.make(tmp_path / "store")
    words = ["--data", str(tmp_path / "store"), "--backbone", str(tmp_path / "backbone"), "--tap", "1,2", "--dim", "16"]
    words += ["--steps", "2", "--prompts-per-step", "2", "--eta", "4", "--weight-decay", "0.1", "--seed", "3"]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert cli.main(["train", *words, "--out", str(one)]) == 0
    assert cli.main(["train", "--config", str(one / "config.json"), "--out", str(two)]) == 0
    assert cli.main(["train", "--config", str(one / "config.json"), "--out", str(three), "--seed", "4"]) == 0
    head = "head/model.safetensors"
    assert files.sha256(two / head) == files.sha256(one / head) != files.sha256(three / head)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, two, three)]
    assert configs[0] == configs[1]
    assert configs[2]["options"] == {**configs[0]["options"], "seed": 4}
    assert cli.main(["train", "--config", str(one / "config.json"), "--out", str(one), "--resume"]) == 0
    evaluation = ["eval", *words[:4], "--head", str(one), "--timesteps", "900", "--num-draws", "2"]
    assert cli.main([*evaluation, "--out", str(tmp_path / "eval")]) == 0
    assert cli.main(["eval", "--config", str(tmp_path / "eval" / "config.json"), "--out", str(tmp_path / "again")]) == 0
    rows = [files.read_json(tmp_path / name / "metrics.json")["accuracy"] for name in ("eval", "again")]
    assert rows[0] == rows[1]
    models = [*words[2:4], "--head", str(one), "--dtype", "fp32"]
    sample = ["sample", "--prompt", "a cat", "--n", "2", "--seed", "random", "--steps", "3", "--strategy", "full"]
    assert cli.main([*sample, *models, "--out", str(tmp_path / "sample")]) == 0
    repeated = ["sample", "--config", str(tmp_path / "sample" / "config.json"), "--out", str(tmp_path / "once more")]
    assert cli.main(repeated) == 0
    found = [files.read_json(tmp_path / name / "metrics.json") for name in ("sample", "once more")]
    assert found[0]["cuts"] == found[1]["cuts"]
    assert found[0]["seeds"] == found[1]["seeds"]
