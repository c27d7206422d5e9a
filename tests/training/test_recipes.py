"""Each recipe is run to its first training step, on a tiny pipeline of its backbone's class or the embedded one."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from recipes import cogvideox_2b, shapeworld, wan21_1_3b
from tests import stores, tiny

import prism
from prism.backbone import Backbone
from prism.commands.train import DIM, TAPS, recipe
from prism.lab.demo import FULL
from prism.training import train

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
