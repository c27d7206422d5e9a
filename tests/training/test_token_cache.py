"""The token cache: further heads train without the backbone, on the same tokens, and it says what it holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import machinery, stores, tiny

from prism import files
from prism.errors import PrismError
from prism.judge import Judge
from prism.preference import LatentStore
from prism.training import TrainConfig, tokens, train, train_together
from prism.training.batches import Batches

CONFIG = TrainConfig(steps=6, prompts_per_step=4, learning_rate=1e-3, noise_draws=2, log_every=3, checkpoint_every=2)
DIMENSIONS = ("VQ", "MQ")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return stores.make_kinds(tmp_path_factory.mktemp("tokens") / "store")


@pytest.fixture(scope="module")
def wan() -> Any:
    return tiny.wan()


def judge_for(pipe: Any, **options: Any) -> Judge:
    return Judge.untrained(pipe, **{"tap": 2, "dim": 32, "dimensions": DIMENSIONS, **options})


def weights(judge: Judge) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in judge.head.state_dict().items()}


def same(one: Judge, other: Judge) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the backbone was read")


def test_a_second_training_reads_no_backbone_and_the_first_is_repeated_to_the_bit(store, tmp_path):
    config = dataclasses.replace(CONFIG, token_cache=str(tmp_path / "cache"), steps=8)
    first, again, uncached = judge_for(tiny.wan()), judge_for(tiny.wan()), judge_for(tiny.wan())
    one = train(store, first, config, tmp_path / "one", progress=False)
    pipe = again.backbone.pipe
    texts = machinery.count(pipe.text_encoder)
    again.backbone.tokens = never
    two = train(store, again, config, tmp_path / "two", progress=False)
    assert same(first, again)
    assert one["history"] == two["history"]
    other = judge_for(again.backbone, dim=16, aggregation="mean", seed=3)  # and a head of another kind
    changed = dataclasses.replace(config, learning_rate=5e-3, objective="bt", prompts_per_step=3)
    train(store, other, changed, tmp_path / "three", progress=False)
    assert not texts
    train(store, uncached, dataclasses.replace(config, token_cache=""), tmp_path / "none", progress=False)
    for name, value in weights(uncached).items():
        torch.testing.assert_close(weights(first)[name], value, atol=2e-5, rtol=2e-3)


def test_it_says_what_it_is(store, wan, tmp_path, capsys):
    cache = tmp_path / "cache"
    config = dataclasses.replace(CONFIG, token_cache=str(cache), steps=1)
    train(store, judge_for(wan), config, tmp_path / "run", progress=False)
    train(store, judge_for(wan), dataclasses.replace(config, seed=1), tmp_path / "other", progress=False)
    train(store, judge_for(wan, tap=1), config, tmp_path / "lower", progress=False)
    assert len(list(cache.iterdir())) == 3  # other draws and taps are other tokens
    noted = files.read_json(tmp_path / "run" / "config.json")["tokens"]
    label = files.read_json(cache / noted["digest"] / "cache.json")
    assert noted["folder"] == str(cache / noted["digest"])
    assert (
        label["what"]
        == noted["what"]
        == ("Tokens after blocks 2 at 2 fixed draws of noise and t per prompt, to train heads on")
    )
    assert (label["format"], label["taps"], label["dtype"]) == ("prism-tokens", [2], "float32")
    assert label["train"]["noise_draws"] == 2
    assert f"prism: tokens are kept in {noted['folder']}, about" in capsys.readouterr().err


def test_a_resumed_run_reads_the_same_bits_whatever_was_kept_by_then(store, wan, tmp_path, monkeypatch):
    whole, resumed = judge_for(wan), judge_for(wan)
    train(store, whole, dataclasses.replace(CONFIG, token_cache=str(tmp_path / "a")), tmp_path / "one", progress=False)
    config, draw = dataclasses.replace(CONFIG, token_cache=str(tmp_path / "b")), Batches.draw

    def stop(self: Any, step: int, slots: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return draw(self, step, slots)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Batches, "draw", stop)
        train(store, judge_for(wan), config, tmp_path / "two", progress=False)
    kept = sorted((tmp_path / "b").rglob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:-20])  # damaged: read anew
    kept[1].write_bytes(b"\x80\x04K\x01.")
    kept[2].unlink()
    train(store, resumed, config, tmp_path / "two", resume=True, progress=False)
    assert same(whole, resumed)


def test_heads_trained_together_share_it(store, wan, tmp_path):
    config = dataclasses.replace(CONFIG, token_cache=str(tmp_path / "cache"), steps=2)
    configs = [config, dataclasses.replace(config, steps=1)]  # the higher tap is done first, and kept all the same
    backbone = judge_for(wan).backbone
    judges = [judge_for(backbone, tap=1), judge_for(backbone, dim=16)]
    train_together(store, judges, configs, progress=False)
    backbone.tokens = never
    again = [judge_for(backbone, tap=1), judge_for(backbone, dim=16)]
    train_together(store, again, configs, progress=False)
    longer = [judge_for(backbone, tap=1), judge_for(backbone, dim=16)]
    train_together(store, longer, [config] * 2, progress=False)
    assert all(same(one, other) for one, other in zip(judges, again, strict=True))


def test_what_cannot_be_kept_is_said_in_a_sentence(store, wan, tmp_path, monkeypatch):
    with pytest.raises(PrismError, match="token_cache must be empty without noise_draws"):
        TrainConfig(token_cache="x")
    (tmp_path / "file").write_text("mine")
    config = dataclasses.replace(CONFIG, token_cache=str(tmp_path / "file"))
    with pytest.raises(PrismError, match=r"token cache .* cannot be written .*; choose another folder"):
        train(store, judge_for(wan), config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    config = dataclasses.replace(CONFIG, token_cache=str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(
            tokens.shutil, "disk_usage", lambda at: SimpleNamespace(free=0 if tmp_path in Path(at).parents else 1e12)
        )
        with pytest.raises(PrismError, match=r"would take about 0\.0 GB, and 0\.0 GB are free; lower noise_draws"):
            train(store, judge_for(wan), config, tmp_path / "run", progress=False)
    (label,) = Path(tmp_path / "cache").rglob("cache.json")
    label.write_text(json.dumps({**files.read_json(label), "taps": [7]}))
    with pytest.raises(PrismError, match=r"cache.json does not describe these tokens; delete its folder"):
        train(store, judge_for(wan), config, tmp_path / "other", progress=False)
