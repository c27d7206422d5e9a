"""What ships: whole, small, loadable with plain diffusers, and as good as the documentation says."""

from __future__ import annotations

import warnings
from collections import Counter

import pyarrow.compute as pc
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from prism import files, shapeworld
from prism.backbone import Backbone
from prism.backbone.fingerprint import fits
from prism.errors import PrismError
from prism.judge import Judge
from prism.preference import LatentStore
from prism.preference.pairs import prompt_key
from prism.shapeworld import CALL, candidates, generator, grammar, referee, world


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
    assert fits(store.meta["backbone"], backbone) == ([], [])
    assert store.call == CALL
    for split, (count, per_prompt) in candidates.SHIPPED.items():
        prompts = store.videos.filter(pc.equal(store.videos["split"], split))["prompt"].to_pylist()
        assert Counter(prompts) == dict.fromkeys(grammar.prompts(split, count), per_prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge = Judge.from_pretrained(shapeworld.asset_folder("head"), backbone)
    assert not set(judge.trained_on["prompt_keys"]) & {prompt_key(p) for p in grammar.prompts("test")}


def test_kept_scores_are_the_referees_of_the_decoded_latents(backbone):
    store = LatentStore.open(shapeworld.asset_folder("candidates"))
    rows = store.videos.slice(0, 16).to_pylist()
    videos = torch.cat(
        [backbone.decode(store.latents([row["video"] for row in part])) for part in (rows[:8], rows[8:])]
    )
    scores = referee.batch(videos, [row["prompt"] for row in rows])
    for name in referee.DIMENSIONS:
        kept = torch.tensor([row[name] for row in rows])
        assert (scores[name] - kept).abs().mean() < 0.02, name  # a byte a number costs little


def test_weaker_backbones_differ_in_the_generator_alone(backbone):
    for name in ("early", "small"):
        weaker = shapeworld.pipeline(name)
        assert torch.equal(weaker.vae.decoder.conv_in.weight, backbone.pipe.vae.decoder.conv_in.weight)
        assert weaker.scheduler.config == backbone.pipe.scheduler.config
        count = sum(p.numel() for p in weaker.transformer.parameters())
        assert (count < backbone.num_parameters) == (name == "small")
        assert files.read_json(shapeworld.asset_folder(name) / "training.json")["seed"] == 0
        frames = weaker("a red circle grows", **{**CALL, "num_inference_steps": 1}).frames
        assert frames.shape == (1, 17, 64, 64, 3)
    with pytest.raises(PrismError, match="early"):
        shapeworld.pipeline("strong")


def test_everything_shipped_is_of_use_and_stays_small():
    assert [path.name for path in generator.ROOT.rglob("*log*.json*")] == []  # docs/evidence/training holds them
    sizes = [path.stat().st_size for path in generator.ROOT.rglob("*") if path.is_file()]
    assert sum(sizes) < 40 * 2**20
