"""Foreign values for every parameter of public functions around stores, training, evidence: a sentence, or work."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import stores, tiny
from tests.sampling.test_foreign import foreign

import prism
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import clustered_bootstrap, compare_judges, prompt_interval
from prism.judge import Judge, QueryHead
from prism.preference import (
    LatentStore,
    check_disjoint,
    group_by_prompt,
    pairs_from_scores,
    prompt_key,
    write_store,
)
from prism.training import TrainConfig

Case = tuple[Callable[..., Any], dict[str, Any]]


def cases(folder: Path) -> dict[str, Case]:
    """By name a function and arguments that it takes; those that it never gets to use are left out."""
    pipe = tiny.wan()
    judge = Judge.untrained(pipe, tap=1, dim=16)
    backbone = judge.backbone
    store = stores.make(folder / "store", prompts=(2, 1, 2), per_prompt=2)
    table, latents = store.videos.select(["video", "prompt", "seed", "split", "VQ"]), torch.zeros(10, 16, 3, 4, 4)
    one, call = latents[:1], tiny.CALL_WAN
    conditioning = backbone.condition([tiny.PROMPT], **call)
    empty = folder / "empty"
    empty.mkdir()

    def measured(**given: Any) -> Any:
        return prism.evaluate(**{"judge": judge, "store": store, "timesteps": [0], "progress": False, **given})

    def trained(**given: Any) -> Any:
        config = TrainConfig(steps=1, prompts_per_step=1)
        return prism.train(**{"store": store, "judge": judge, "config": config, "out": folder / "run", **given})

    head = {"dim": 16, "num_dimensions": 2, "num_queries": 1, "num_heads": 2, "mlp_layers": 1, "chunk_size": None}
    written = {"folder": empty, "videos": table, "latents": latents, "pairs": store.pairs, "meta": {"call": call}}
    written |= {"trajectories": None, "shard_bytes": 1 << 20, "eight_bits": False}
    given: dict[str, Case] = {
        "untrained": (Judge.untrained, {"pipe": pipe, "tap": 1, "dim": 16, "dimensions": ("VQ",), "seed": 0}),
        "head": (QueryHead, {"width": 24, **head, "aggregation": "query"}),
        "average": (Judge.average, {"judges": [judge]}),
        "from_pretrained": (Judge.from_pretrained, {"source": "nope", "pipe": pipe}),
        "save_pretrained": (judge.save_pretrained, {"folder": folder / "h", "trained_on": {}, "overwrite": True}),
        "probabilities": (judge.probabilities, {"margins": torch.zeros(1, 4)}),
        "score": (judge.score, {"noisy_latents": one, "prompts": tiny.PROMPT, "t": 500.0, **call}),
        "score_clean": (
            judge.score_clean,
            {"latents": one, "prompts": tiny.PROMPT, "t": 500.0, "num_draws": 1, "generator": None, **call},
        ),
        "backbone": (Backbone, {"pipe": pipe, "reads": None}),
        "condition": (backbone.condition, {"prompts": [tiny.PROMPT], "seeds": None, **call}),
        "add_noise": (backbone.add_noise, {"latents": one, "t": 5.0, "noise": one}),
        "tokens": (
            backbone.tokens,
            {"noisy_latents": one, "conditioning": conditioning, "t": 5.0, "block": 1, "stop": True},
        ),
        "decode": (backbone.decode, {"latents": one, "grid": None, "num_frames": None}),
        "evaluate": (measured, {"judge": judge, "store": store, "split": "test", "timesteps": [0], "num_draws": 1}),
        "evaluate more": (measured, {"seed": 0, "batch_size": 8, "progress": False}),
        "compare": (compare_judges, {"one": None, "other": None, "seed": 0, "any_draws": False}),
        "accuracy": (
            prism.pairwise_accuracy,
            {"labels": [1, -1], "margins": [0.1, 0.2], "threshold": None, "method": "exact"},
        ),
        "bootstrap": (
            clustered_bootstrap,
            {"values": [1.0, 2.0], "clusters": [0, 1], "statistic": None, "seed": 0, "draws": 10},
        ),
        "interval": (
            prompt_interval,
            {"values": [1.0] * 12, "prompts": list(range(12)), "statistic": None, "seed": 0},
        ),
        "train": (trained, {"store": None, "judge": None, "config": None, "resume": False, "restart": False}),
        "open": (LatentStore.open, {"folder": folder / "store"}),
        "of": (LatentStore.of, {"store": store}),
        "groups": (store.groups, {"split": "test", "dimensions": None}),
        "latents": (store.latents, {"ids": ["video-000"]}),
        "trajectory": (store.trajectory, {"ids": ["video-000"], "index": 0}),
        "write": (write_store, written),
        "scores": (pairs_from_scores, {"videos": table, "margins": {"VQ": 0.1}}),
        "group": (group_by_prompt, {"pairs": store.pairs, "dimensions": ["VQ"], "split": "test"}),
        "disjoint": (check_disjoint, {"pairs": store.pairs}),
        "key": (prompt_key, {"prompt": "a"}),
        "config": (TrainConfig, {field.name: field.default for field in dataclasses.fields(TrainConfig)}),
        "config of a dict": (TrainConfig.from_dict, {"values": {}}),
        "register": (prism.backbone.register, {"family": None}),
    }
    return given


@pytest.mark.filterwarnings("ignore")
def test_any_value_for_any_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # texts that name no folder yet
    wrong: list[str] = []
    for case, (function, arguments) in cases(tmp_path).items():
        for name in arguments:
            for place, value in enumerate(foreign()):
                if name == "statistic" and callable(value):  # whose exceptions are the caller's own
                    continue
                try:
                    function(**{**arguments, name: value})
                except PrismError as error:
                    if not re.fullmatch(".{1,500}", str(error)):
                        wrong.append(f"{case}({name} = value {place}): not a line, {error}")
                except Exception as error:
                    wrong.append(f"{case}({name} = value {place}): {type(error).__name__}: {str(error)[:80]}")
    assert not wrong, "\n".join(wrong)
