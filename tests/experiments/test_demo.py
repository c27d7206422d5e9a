"""The demo from end to end, on an untrained pipeline and a handful of candidates."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from prism import files, media, shapeworld
from prism.experiments import demo
from prism.judge import Judge
from prism.report.metrics import validate
from prism.shapeworld import CALL, candidates, recipe, referee, world
from prism.shapeworld import vae as video_vae


def test_the_demo_writes_everything_it_promises(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pipe = recipe.assemble(video_vae.build(), recipe.build_transformer(2, 1), recipe.build_text_encoder())
    monkeypatch.setattr(shapeworld, "pipeline", lambda: pipe)
    monkeypatch.setitem(CALL, "num_inference_steps", 3)
    monkeypatch.setitem(CALL, "guidance_scale", 2.5)
    some = {"train": world.prompts("train")[:2], "validation": world.prompts("validation")[:1]}
    some["test"] = world.prompts("test")[:2]
    monkeypatch.setattr(world, "prompts", lambda split: some[split])
    monkeypatch.setattr(shapeworld, "prompts", lambda split: some[split])
    monkeypatch.setattr(candidates, "run", partial(candidates.run, per_prompt=3))
    # an untrained model's videos are all grey to the referee: let it see a difference
    monkeypatch.setattr(referee, "batch", _brightness)

    config = demo.DemoConfig(
        n=3, prompts=2, tap=1, dim=16, steps=3, prompts_per_step=2, schedule=((2, 1),), draft_steps=1
    )
    out = tmp_path / "out"
    metrics = demo.run(out, fresh=True, seed=1, config=config)

    validate(files.read_json(out / "metrics.json"))
    assert {row["t"] for row in metrics["accuracy"]} == {989, 949, 899, 699, 499, 299, 99, 0}
    best = {row["strategy"]: row for row in metrics["best_of_n"]}
    assert list(best) == ["none", "random", "full", "early", "draft", "oracle"]
    assert best["oracle"]["oracle_share"] == pytest.approx(1.0)
    assert best["oracle"]["vae_decodes"] > best["early"]["vae_decodes"] == 2
    # one cut at step 2 of 3, tap after 1 of 2 blocks, two calls a step: 3 (2 + 1/2) + 4 for the winner
    assert best["early"]["denoiser_rows"] == pytest.approx(2 * (3 * 2.5 + 4))
    assert media.read_video(out / "winner.mp4").shape == (17, 64, 64, 3)
    assert "<svg" in (out / "report.html").read_text()
    judge = Judge.from_pretrained(out / "head", pipe)
    assert judge.tap == 1
    assert judge.trained_on["seed"] == 1
    assert not (out / "training" / "checkpoints").exists()


def _brightness(videos, prompts):
    mean = torch.as_tensor(videos).mean((1, 2, 3, 4))
    return dict.fromkeys(referee.DIMENSIONS, mean)
