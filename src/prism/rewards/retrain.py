"""Does a tuned backbone also judge better? Heads trained alike on the original and on the tuned one, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import Measurement, compare_judges, measure
from prism.evaluation.measurement import accuracy
from prism.judge import Judge
from prism.preference import LatentStore
from prism.rewards.lora import applied
from prism.training import TrainConfig, train_together
from prism.training.trainer import untrained_heads


def check_labels(rewards: Sequence[Any], test_candidates: int) -> None:
    """Refuse to train heads where nothing labels their pairs."""
    if not rewards:
        raise PrismError("A head is trained again on labels of a reward, and none is named; give --reward.")
    if test_candidates < 2:
        raise PrismError("A head that is trained again is measured on pairs; take test_candidates of 2 or more.")


def retrained(
    judge: Judge, store: LatentStore, test: LatentStore, lora: Path, settings: dict[str, Any], config: TrainConfig,
    seeds: int, levels: Sequence[float], progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Train heads as the judge's on the backbone as it is and with a LoRA, and compare them on a test store.

    Both see the same pairs of the same videos, labelled by a reward; only the hidden states differ.

    Args:
        store: training pairs; test: pairs of the split "test".
        lora: folder of the LoRA; settings: its rank, alpha, targets and seed.
        seeds: heads per backbone, of different initial weights.
        levels: noise levels at which they are measured.

    Returns:
        "accuracy": rows of the heads on the original and on the tuned backbone and of the judge itself; "comparison":
        rows of the tuned less the original, as `prism.evaluation.compare_judges` gives them.
    """
    original = _measured(judge.backbone, judge, store, test, config, seeds, levels, progress)
    with applied(judge.backbone, **settings, start=lora):
        tuned = _measured(judge.backbone, judge, store, test, config, seeds, levels, progress)
    named = {"original backbone": original, "tuned backbone": tuned}
    if set(judge.dimensions) & set(test.dimensions):
        given = measure(judge, test, "test", levels, seed=config.seed, progress=progress)
        named["the judge that chose"] = [given]
    rows = [{**row, "judge": name} for name, measured in named.items() for row in accuracy(measured, config.seed)]
    return {"accuracy": rows, "comparison": compare_judges(tuned, original, config.seed)}


def _measured(
    backbone: Backbone, judge: Judge, store: LatentStore, test: LatentStore, config: TrainConfig, seeds: int,
    levels: Sequence[float], progress: bool,
) -> list[Measurement]:  # fmt: skip
    """Heads of several seeds at the judge's taps, trained in one pass of the backbone per step, and measured."""
    taps, dim = judge.taps, judge.members[0].head.dim
    by_seed = [
        untrained_heads(backbone, taps, config.seed + 100_000 * number, dim=dim, dimensions=store.dimensions)
        for number in range(seeds)
    ]
    every = [head for heads in by_seed for head in heads]
    train_together(store, every, [replace(config) for _ in every], progress, "train heads")
    measured = []
    for number, heads in enumerate(by_seed):
        together = Judge.average(heads)
        together.trained_on = {**together.trained_on, "seed": number}
        measured.append(measure(together, test, "test", levels, seed=config.seed, progress=progress))
    return measured
