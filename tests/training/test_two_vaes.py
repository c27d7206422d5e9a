"""A judge of clips of a generator with another VAE: their files are encoded with the judge's VAE, and with no other."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism import cli, files
from prism.backbone import Backbone
from prism.clips import read_clip
from prism.evaluation import Measurement
from prism.judge import Judge
from prism.preference import LatentStore
from prism.video import write_video

CALL = {**tiny.CALL_WAN, "num_inference_steps": 2}
SPLITS = ("train",) * 2 + ("validation",) + ("test",) * 5
PIPELINES = {"wan": tiny.wan, "cogvideox": tiny.cogvideox}  # 16 and 4 latent channels, two kinds of VAE


def prism(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two clips of each prompt by either pipeline, pairs of all four, and what the commands make of them on Wan."""
    folder = tmp_path_factory.mktemp("two")
    pipes = {name: make() for name, make in PIPELINES.items()}
    pipes["wan"].save_pretrained(folder / "backbone")
    files.write_json(folder / "backbone" / "call.json", CALL)
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path_A", "path_B", "A_model", "B_model", "prompt", "split", "VQ"])
        for number, split in enumerate(SPLITS):
            prompt, clips = stores.PROMPTS[number], []
            for name, pipe in pipes.items():
                for seed in (0, 1):
                    chance = torch.Generator().manual_seed(100 * number + seed)
                    video = pipe(prompt, generator=chance, output_type="np", **CALL).frames[0]
                    clips.append((f"{name}-{number}-{seed}.mp4", name))
                    write_video(folder / clips[-1][0], video, 8)
            for a, b in ((0, 1), (2, 3), (0, 2), (3, 1)):
                sides = [clips[a][0], clips[b][0], clips[a][1], clips[b][1]]
                table.writerow([*sides, prompt, split, ("A", "B", "same")[rng.choice(3, p=(0.45, 0.45, 0.1))]])
    on = ("--backbone", folder / "backbone", "--device", "cpu")
    prism("encode", folder / "pairs.csv", *on, "--out", folder / "store")
    small = ("--steps", 3, "--prompts-per-step", 2, "--tap", 2, "--dim", 16)
    prism("train", "--data", folder / "store", *on, "--out", folder / "run", *small)
    on = (*on, "--head", folder / "run" / "head")
    prism("eval", "--data", folder / "store", *on, "--timesteps", "600,0", "--out", folder / "evaluation")
    prism("score", folder / "pairs.csv", *on, "--t", "0", "--draws", 1, "--out", folder / "scores.csv")
    return folder


@pytest.fixture(scope="module")
def judge(place) -> Judge:
    return Judge.from_pretrained(place / "run" / "head", Backbone.from_pretrained(str(place / "backbone")))


def test_latents_of_both_generators_are_the_judges_vae_of_their_files(place, judge):
    store, vae = LatentStore.open(place / "store"), judge.backbone.pipe.vae
    assert store.videos["model"].to_pylist().count("cogvideox") == 2 * len(SPLITS)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    for row in store.videos.to_pylist():
        pixels = torch.from_numpy(read_clip(place / row["video"]).frames).float() / 255 * 2 - 1
        with torch.no_grad():
            latents = vae.encode(pixels.permute(3, 0, 1, 2)[None]).latent_dist.mode()
        expected = ((latents - mean) / std).half().float()
        torch.testing.assert_close(store.latents([row["video"]]), expected, atol=1e-3, rtol=1e-3)
    other = Backbone(tiny.cogvideox())
    assert other.encode(read_clip(place / "cogvideox-3-0.mp4").frames[None]).shape[1:] == (3, 4, 4, 4)
    assert store.latents(["cogvideox-3-0.mp4"]).shape[1:] == (16, 3, 4, 4)


def test_scores_are_the_judges_of_those_latents(place, judge):
    store, expected = LatentStore.open(place / "store"), {}
    for row in store.videos.to_pylist():
        expected[row["video"]] = judge.score(store.latents([row["video"]]), row["prompt"], 0, **CALL).item()
    assert np.std(list(expected.values())) > 1e-4
    with (place / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * len(SPLITS)
    for row in rows:  # of latents that were not rounded to half precision
        assert float(row["score"]) == pytest.approx(expected[Path(row["video"]).name], abs=2e-3)
    measured = Measurement.load(place / "evaluation" / "scores.parquet")
    (block,) = (each for each in measured.blocks if each.t == 0)
    margins = [expected[a] - expected[b] for a, b in zip(*block.videos)]
    np.testing.assert_allclose(block.margins, margins, atol=1e-5)


def test_accuracy_is_that_of_each_pair_of_generators(place):
    metrics = files.read_json(place / "evaluation" / "metrics.json")
    rows = {(row["t"], row["model_a"], row["model_b"]): row for row in metrics["generators"]}
    assert {key[1:] for key in rows} == {("wan", "wan"), ("cogvideox", "cogvideox"), ("cogvideox", "wan")}
    labels, split_of = {}, dict(zip(stores.PROMPTS, SPLITS))
    with (place / "pairs.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if split_of[row["prompt"]] == "test":
                labels[row["path_A"], row["path_B"]] = {"A": 1, "B": -1, "same": 0}[row["VQ"]]
    for block in Measurement.load(place / "evaluation" / "scores.parquet").blocks:
        right: dict[tuple[str, str], list[bool]] = {}
        for a, b, margin in zip(*block.videos, block.margins):
            if label := labels[a, b]:
                models = sorted(name.split("-")[0] for name in (a, b))
                right.setdefault((models[0], models[1]), []).append(bool(label * margin > 0))
        for models, values in right.items():
            row = rows[(block.t, *models)]
            assert (row["decided_pairs"], row["without_ties"]) == (len(values), pytest.approx(np.mean(values)))
    assert sum(row["pairs"] for row in rows.values()) == 2 * len(labels)
