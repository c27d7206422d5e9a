"""The judges of a demo: heads trained and averaged, and the pixel judges they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism import files, shapeworld
from prism.errors import PrismError
from prism.evaluation import TIMESTEPS, Measurement, compare_judges, measure
from prism.evaluation.measurement import accuracy as mean_over_seeds
from prism.judge import Judge
from prism.preference import LatentStore
from prism.report.rows import AccuracyRow, ComparisonRow
from prism.runs import Parts
from prism.training import TrainConfig, train_together
from prism.training.trainer import untrained_heads

PIXEL = {"pixel": False, "pixel-noisy": True}  # name of the judge and its asset -> True if trained on noisy videos too


def trained(
    parts: Parts, store: LatentStore, backbone: Any, taps: Sequence[int], dim: int, config: TrainConfig, seed: int
) -> tuple[Judge, dict[str, Any]]:
    """The judge of a seed, which is the average of a head at each of `taps`, and the summary of its training.

    Its heads see the same batches and differ in their initial weights.
    """
    folder = parts.folder / f"head-{seed}"

    def make() -> dict[str, Any]:
        judges = untrained_heads(backbone, taps, seed, dim=dim, dimensions=store.dimensions)
        configs = [replace(config, seed=seed) for _ in judges]
        train_together(store, judges, configs, desc=f"train judge {seed}")
        judge = Judge.average(judges)
        judge.save_pretrained(folder, {**judge.trained_on, "seed": seed}, overwrite=True)
        return {name: judges[0].trained_on[name] for name in ("steps", "pairs", "prompts")} | {"heads": len(judges)}

    summary = parts.once(f"train-{seed}", make)
    return Judge.from_pretrained(folder, backbone), summary


def shipped(backbone: Any) -> Judge:
    """The judge that ships: of the full run's first seed."""
    return Judge.from_pretrained(shapeworld.asset_folder("head"), backbone)


def pixel_judges(
    parts: Parts, store: LatentStore, backbone: Any, fresh: bool, seed: int, steps: int | None = None
) -> list[Any]:
    """The two pixel judges, one trained on clean videos, one on noisy videos too; they share decoded frames.

    fresh: train them on `store`, in place of loading the shipped ones. steps: of their training; None: the default.
    """
    from prism.lab.pixel import PixelJudge
    from prism.lab.pixel_training import DecodedCache, PixelConfig, train_pixel

    judges, frames = [], DecodedCache(parts.folder / "frames", backbone)
    for name, noisy in PIXEL.items():
        folder = parts.folder / name

        def make(folder: Path = folder, noisy: bool = noisy) -> dict[str, Any]:
            if folder.is_dir():  # a run was killed just after it saved the judge
                return {}
            config = PixelConfig(seed=seed) if steps is None else PixelConfig(seed=seed, steps=steps)
            return _summary(train_pixel(store, backbone, config, folder, noisy=noisy, frames=frames))

        if fresh:
            parts.once(f"train-{name}", make)
        judges.append(PixelJudge.from_pretrained(folder if fresh else shapeworld.asset_folder(name), backbone, frames))
    return judges


def _summary(result: Any) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "history"} if isinstance(result, dict) else {}


def measured(
    parts: Parts,
    store: LatentStore,
    ours: Sequence[Judge],
    others: Sequence[Any],
    split: str,
    seed: int,
    levels: Sequence[float] = (),
    batch_size: int = 64,
    fresh: Sequence[tuple[Judge, Sequence[float]]] = (),
) -> tuple[list[AccuracyRow], list[ComparisonRow], list[Measurement]]:
    """Rows "accuracy" and "judge_comparison" of metrics.json, and the measurements that they come from.

    Our judges (with several seeds first their mean), the other judges, and ours against each of the others are measured
    on the same pairs under the same noise.

    levels: noise levels to measure the other judges at, each of which costs them a decode per video; (): all.
    batch_size: videos per denoiser call. fresh: judges measured beside them at levels of their own, compared with none.
    """
    named: list[tuple[str, Any, Sequence[float]]] = [
        (f"prism-{judge.trained_on['seed']}", judge, TIMESTEPS) for judge in ours
    ]
    named += [(judge.name.replace(" ", "-"), judge, few) for judge, few in fresh]
    named += [(other.name, other, tuple(levels) or TIMESTEPS) for other in others]
    measurements = [
        _measured(parts, f"accuracy/{split}-{name}", store, judge, split, seed, t, batch_size)
        for name, judge, t in named
    ]
    for path in (parts.folder / "frames").glob(
        f"{'[0-9a-f]' * 32}.npy"
    ):  # no later measurement decodes the same latents
        path.unlink()
    of_ours, of_others = measurements[: len(ours)], measurements[len(ours) + len(fresh) :]
    rows = mean_over_seeds(of_ours, seed) + [row for each in measurements[len(ours) :] for row in each.rows]
    return rows, [row for each in of_others for row in compare_judges(of_ours, each, seed)], measurements


def _measured(
    parts: Parts,
    name: str,
    store: LatentStore,
    judge: Any,
    split: str,
    seed: int,
    timesteps: Sequence[float],
    batch_size: int,
) -> Measurement:
    path = parts.folder / f"{name}.parquet"

    def make() -> None:
        measurement = measure(judge, store, split, timesteps, seed=seed, batch_size=batch_size)
        with files.new_file(path) as whole:
            measurement.save(whole)

    parts.once(name, make)
    try:
        return Measurement.load(path)
    except PrismError as error:
        raise PrismError(f"{error} Delete {path.with_suffix('.json')} to do so.") from error
