"""What ships: whole, small, loadable with plain diffusers, and as good as the documentation says."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from prism import files, shapeworld
from prism.backbone import Backbone
from prism.judge import Judge
from prism.preference import LatentStore
from prism.shapeworld import CALL, assets, referee, world


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(shapeworld.pipeline())


def test_plain_diffusers_loads_the_same_pipeline(backbone):
    folder = shapeworld.asset_folder("pipeline")
    plain = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    assert type(plain) is WanPipeline
    assert files.read_json(folder / "call.json") == CALL
    call = {**CALL, "num_inference_steps": 2, "output_type": "latent"}
    one, two = (
        pipe("a red circle grows", generator=torch.Generator().manual_seed(0), **call).frames
        for pipe in (plain, backbone.pipe)
    )
    assert torch.equal(one, two)


def test_the_vae_keeps_what_the_referee_sees(backbone):
    videos, prompts = world.sample(24, seed=4242)
    kept = torch.cat([backbone.decode(backbone.encode(videos[i : i + 8])) for i in range(0, 24, 8)])
    before, after = referee.batch(videos, prompts), referee.batch(kept, prompts)
    for name in referee.DIMENSIONS:
        assert (after[name] - before[name]).abs().mean() < 0.05, name


def test_the_candidates_belong_to_the_pipeline_and_the_head_to_both(backbone):
    store = LatentStore.open(shapeworld.asset_folder("candidates"))
    assert store.meta["backbone"] == backbone.fingerprint()
    assert store.call == CALL
    assert store.videos.num_rows == 8 * len(world.SCENES)
    for split in world.SPLITS:
        assert {group.prompt for group in store.groups(split)} == set(world.prompts(split))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge = Judge.from_pretrained(shapeworld.asset_folder("head"), backbone)
    assert judge.trained_on["prompts"] == 140


def test_everything_shipped_stays_small():
    sizes = [path.stat().st_size for path in assets.ROOT.rglob("*") if path.is_file()]
    assert sum(sizes) < 40 * 2**20
