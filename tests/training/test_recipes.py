"""Each recipe is run to its first training step, on a tiny pipeline of its backbone's class or the embedded one."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import cogvideox_2b, shapeworld, wan21_1_3b
from tests import stores, tiny

import prism
from prism import cli, files
from prism.backbone import Backbone
from prism.commands.train import DIM, TAPS, Train, recipe
from prism.lab.demo import FULL
from prism.training import train

ROOT = Path(__file__).parents[2]
COGVIDEOX = ((3, 4, 4, 4), tiny.CALL_COGVIDEOX)
RECIPES = {
    "shapeworld": (shapeworld.default, prism.shapeworld.pipeline, None, {}),
    "shapeworld, full": (shapeworld.full, prism.shapeworld.pipeline, None, {}),
    "wan21_1_3b": (wan21_1_3b.paper, lambda: tiny.wan(num_layers=12), stores.SHAPE, tiny.CALL_WAN),
    "cogvideox_2b": (cogvideox_2b.paper, lambda: tiny.cogvideox(num_layers=12), *COGVIDEOX),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_its_first_step(name, tmp_path):
    make, pipeline, shape, call = RECIPES[name]
    chosen, pipe = make(), pipeline()
    one_step = replace(chosen.train, steps=1, prompts_per_step=1, log_every=1, warmup_steps=0)
    if shape is None:
        store = prism.shapeworld.asset_folder("candidates")
    else:
        store = stores.make(tmp_path / "store", (1, 0, 0), 2, {"call": call}, shape)
    dimensions = prism.preference.LatentStore.of(store).dimensions
    backbone = Backbone(pipe)
    judge = chosen.judge(backbone, dimensions)
    assert judge.taps == chosen.taps
    before = judge.members[0].head.query.detach().clone()
    (entry,) = train(store, judge, one_step, tmp_path / "out", progress=False)["history"]
    assert entry["loss"] > 0
    assert not torch.equal(judge.members[0].head.query, before)
    taken = inspect.signature(type(pipe).__call__).parameters
    assert chosen.call.keys() <= taken.keys()


def test_shapeworlds_are_those_of_the_commands():
    assert shapeworld.default().train == recipe(embedded=True)
    assert (shapeworld.default().taps, shapeworld.default().dim) == (TAPS, DIM)
    assert shapeworld.full().train == FULL.train
    assert (shapeworld.full().taps, shapeworld.full().dim) == (FULL.taps, FULL.dim)


@pytest.mark.parametrize("module", [wan21_1_3b, cogvideox_2b])
def test_the_papers_values(module):
    chosen = module.paper()
    assert (chosen.taps, chosen.dim) == ((12,), 1536)
    assert chosen.head == {"num_queries": 1, "mlp_layers": 5}
    assert (chosen.train.learning_rate, chosen.train.eta) == (1e-4, 5.0)
    assert (chosen.train.t_low, chosen.train.t_high, chosen.train.levels) == (0.0, 1000.0, "uniform")
    assert (chosen.train.objective, chosen.train.schedule, chosen.train.source) == ("btt", "constant", "renoised")


def options_of(*words):
    return cli._parsed("train", Train, [*cli._overlaid("train", Train, ["--out", "x", *words])])


@pytest.mark.parametrize("name", ["wan21_1_3b:paper", "cogvideox_2b:paper", "shapeworld:default", "shapeworld:full"])
def test_the_command_line_takes_a_recipe_as_its_defaults(name, tmp_path):
    module, function = name.split(":")
    path = ROOT / "recipes" / f"{module}.py"
    chosen = getattr({"wan21_1_3b": wan21_1_3b, "cogvideox_2b": cogvideox_2b}.get(module, shapeworld), function)()
    config = options_of("--recipe", f"{path}:{function}")
    assert config.models.backbone == chosen.backbone
    assert recipe(chosen.backbone is None, **vars(config.training)) == chosen.train
    assert (config.head.tap, config.head.dim) == (",".join(map(str, chosen.taps)), chosen.dim)
    assert chosen.head.items() <= vars(config.head).items()
    (tmp_path / "over.yaml").write_text("batch-size: 3\neta: 4\nkeep-best: true\n")
    over = options_of(f"--recipe={path}:{function}", "--eta=6", f"--config={tmp_path / 'over.yaml'}")
    assert (over.training.max_rows, over.training.eta, over.training.keep_best) == (3, 6, True)
    assert over.training.steps == chosen.train.steps


OWN = """
from prism.training import Recipe, TrainConfig

def small():
    return _of(TrainConfig(steps=2, prompts_per_step=2, keep_best=True, validate_every=1))

def _of(train):
    return Recipe(None, {}, (2,), 16, train, {"num_queries": 2, "mlp_layers": 3})
"""


def test_a_recipe_of_ones_own_trains_and_is_repeated_without_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("prism.training.validation.LEVELS", (499,))  # what is measured of both heads
    (tmp_path / "own.py").write_text(OWN)
    one, two, steps = tmp_path / "one", tmp_path / "two", ["--steps", "1"]
    assert cli.main(["train", "--recipe", str(tmp_path / "own.py"), "--out", str(one), *steps, "--no-keep-best"]) == 0
    (tmp_path / "own.py").unlink()
    assert cli.main(["train", "--config", str(one / "config.json"), "--out", str(two)]) == 0
    configs = [files.read_json(folder / "config.json") for folder in (one, two)]
    assert configs[0] == configs[1]
    assert configs[0]["train"]["steps"] == 1
    assert not configs[0]["train"]["keep_best"]
    assert files.read_json(one / "head" / "config.json")["num_queries"] == 2
    assert files.sha256(one / "head" / "model.safetensors") == files.sha256(two / "head" / "model.safetensors")


WRONG = {
    "none.py": "cannot be run: FileNotFoundError",
    "two.py": "must name one function of its file, FILE:NAME; there are one, two.",
    "two.py:three": "there are one, two.",
    "two.py:one": "must return a prism.training.Recipe, found 1.",
    "two.py:two": "cannot be run: ZeroDivisionError: division by zero.",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_recipe_that_cannot_be_used_is_refused_in_a_sentence(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.py").write_text("def one():\n    return 1\n\ndef two():\n    return 1 / 0\n")
    assert cli.main(["train", "--out", "x", "--recipe", text]) == 2
    assert WRONG[text] in capsys.readouterr().err


def test_a_configuration_file_cannot_have_python_run(tmp_path, capsys):
    (tmp_path / "bad.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "bad.yaml").write_text(f"recipe: {tmp_path / 'bad.py'}\n")
    assert cli.main(["train", "--out", str(tmp_path / "x"), "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "on the command line" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
