"""What the fuzzers read and use: a head, a pipeline's folder and a latent store, damaged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from tests import stores as tiny_stores
from tests import tiny
from tests.mutations import copied, damage, outcome

import prism
from prism import files
from prism.backbone import Backbone
from prism.lab.pixel import PixelJudge
from prism.preference import LatentStore

CALL = {**tiny.CALL_WAN, "num_inference_steps": 2}
LATENTS = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Case = Callable[[Random], tuple[str, str, str]]  # what was done, what came of it, the words


def heads(place: Path) -> Case:
    """Heads, some averages and calibrated ones among them, put onto a pipeline or a pipeline's folder, and used."""
    pipe = tiny.wan()
    pipe.save_pretrained(place / "pipe")
    one = prism.Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "MQ", "overall"))
    one.trained_on = {"seed": 0, "source": "renoised", "steps": 5, "prompts": 2, "pairs": 3, "store": {"name": "big"}}
    one.trained_on |= {"config": {"t_low": 0.0, "t_high": 1000.0, "steps": 5}, "prompt_keys": ["0123456789abcdef"] * 3}
    one.calibration = {name: {"temperature": 2.0, "eta": 4.0, "tie_threshold": 0.5} for name in one.dimensions}
    row = {"t": 700.0, "set": "test", "pairs": 3, "prompts": 2, "without_ties": 0.5, "without_ties_ci95": [0.25, 0.75]}
    rows = [{"dimension": name, **row} for name in one.dimensions]
    one.save_pretrained(place / "one", evaluation=rows)
    other = prism.Judge.untrained(pipe, tap=3, dim=16, dimensions=one.dimensions, seed=1)
    other.trained_on = dict(one.trained_on)
    prism.Judge.average([one, other]).save_pretrained(place / "average", evaluation=rows)

    store = tiny_stores.make(place / "store", (1, 1, 1), 2)

    def use(folder: Path, onto: Any, scratch: Path) -> None:
        judge = prism.Judge.from_pretrained(folder, onto)
        scores = judge.score(LATENTS, tiny.PROMPT, 700.0, **CALL)
        judge.probabilities(scores - scores.flip(0))
        judge.save_pretrained(scratch / "again", overwrite=True)
        prism.Judge.average([judge, judge]).score(LATENTS, tiny.PROMPT, 700.0, **CALL)
        prism.evaluate(judge, store, "test", (700.0,), progress=False)
        assert prism.Judge.from_pretrained(scratch / "again", onto).dimensions == judge.dimensions

    def case(random: Random) -> tuple[str, str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = copied(place / random.choice(["one", "average"]), Path(scratch) / "head")
            names = random.choices(["config.json", "model.safetensors", "evaluation.json"], [6, 4, 2])
            told = damage(folder, random, names)
            weights = folder / "model.safetensors"
            if weights.is_file() and not weights.is_symlink() and random.random() < 0.7:
                _reseal(folder)
            onto = str(place / "pipe") if random.random() < 0.1 else pipe
            return told, *outcome(lambda: use(folder, onto, Path(scratch)))

    return case


def pixels(place: Path) -> Case:
    """Pixel judges, put onto a pipeline and used."""
    pipe = tiny.wan()
    judge = PixelJudge.untrained(pipe, ("VQ", "MQ"), width=8, layers=1)
    judge.trained_on = {"seed": 0, "source": "decoded", "prompt_keys": ["0123456789abcdef"], "config": {"steps": 5}}
    judge.save_pretrained(place / "pixel")

    def use(folder: Path, scratch: Path) -> None:
        judge = PixelJudge.from_pretrained(folder, pipe)
        judge.score_videos(torch.zeros(1, 9, 32, 32, 3), tiny.PROMPT, **CALL)
        judge.save_pretrained(scratch / "again")

    def case(random: Random) -> tuple[str, str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = copied(place / "pixel", Path(scratch) / "pixel")
            told = damage(folder, random, random.choices(["config.json", "model.safetensors"], [6, 4]))
            return told, *outcome(lambda: use(folder, Path(scratch)))

    return case


def stores(place: Path) -> Case:
    """Latent stores, read, trained on and evaluated on; mostly without the checksums, which would tell alone."""
    pipe = tiny.wan()
    made = tiny_stores.make(place / "store", (2, 1, 1), 3).folder
    judge = prism.Judge.untrained(pipe, tap=1, dim=8, dimensions=("VQ", "overall"))
    config = prism.TrainConfig(steps=1, prompts_per_step=1, checkpoint_every=0, max_gradient_norm=0)

    def use(folder: Path, scratch: Path) -> None:
        store = LatentStore.open(folder)
        for split in ("train", "validation", "test", "unseen"):
            for group in store.groups(split):
                store.latents(group.videos)
                if store.has_trajectories:
                    store.trajectory(group.videos)
        for source in ("renoised", "trajectory"):
            settings = replace(config, source=source, t_high=950.0)
            prism.train(store, judge, settings, scratch / source, progress=False)
        prism.evaluate(judge, store, "validation", (500,), progress=False)

    def case(random: Random) -> tuple[str, str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = copied(made, Path(scratch) / "store")
            if random.random() < 0.9:
                meta = files.read_json(folder / "store.json")
                files.write_json(folder / "store.json", {name: meta[name] for name in meta if name != "sha256"})
            told = damage(folder, random)
            return told, *outcome(lambda: use(folder, Path(scratch)))

    return case


def _reseal(folder: Path) -> None:
    """Write the checksum anew, as one who knows of it would."""
    try:
        config = files.read_json(folder / "config.json")
        files.write_json(
            folder / "config.json", {**config, "weights_sha256": files.sha256(folder / "model.safetensors")}
        )
    except Exception:  # a file that is damaged itself
        return


def backbones(place: Path) -> Case:
    """Pipelines' folders, loaded whole or up to a block, and read once."""
    tiny.wan().save_pretrained(place / "pipe", max_shard_size="20KB")
    index = place / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert index.is_file()

    def use(folder: Path, up_to: int | None) -> None:
        backbone = Backbone.from_pretrained(str(folder), up_to=up_to, local_files_only=True)
        prism.Judge.untrained(backbone, tap=1, dim=16).score(LATENTS, tiny.PROMPT, 700.0, **CALL)
        backbone.encode(backbone.decode(LATENTS))
        backbone.fingerprint()

    def case(random: Random) -> tuple[str, str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = copied(place / "pipe", Path(scratch) / "pipe")
            told = damage(folder, random)
            up_to = random.choice([None, None, 2])
            return f"{told} (up to {up_to})", *outcome(lambda: use(folder, up_to))

    return case
