"""What `prism eval` runs: a saved head on a labelled store, by noise level."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism import files, runs
from prism.errors import SEEDS, PrismError, quoted, whole
from prism.loading import check_alone, check_store, describe, load_backbone, load_judge, open_store
from prism.report.metrics import document, write_config
from prism.report.page import write_report

NOTES = (
    "The accuracy is the share of labelled pairs of this split that the judge orders as their labels do. No prompt and "
    "no video of it was in the training split of the same store.",
    "It does not show how the judge does on other prompts, other generators or other people’s labels, nor what "
    "picking by it gains: that takes Best-of-N.",
)

TIMESTEPS = "989,949,899,699,499,299,99,0"


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `prism eval`.

    timesteps: levels in 0 to 1000, apart by commas; of the default ones those are taken at which the pipeline uses the
    denoiser that the head reads. batch_size: videos per denoiser call.
    data: a latent store; None for the labelled candidates that ship with the package.
    """

    data: Path | None = None
    head: str | None = None
    split: str = "test"
    timesteps: str = TIMESTEPS
    num_draws: int = 1
    batch_size: int = 64
    seed: int = 0
    backbone: str | None = None
    device: str | None = None
    dtype: str | None = None


def run(config: EvaluateConfig, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Evaluate and write metrics.json, config.json and report.html to `out`; returns the metrics."""
    check_alone("eval")
    levels = None if config.timesteps == TIMESTEPS else _levels(config.timesteps)
    whole("--batch-size", config.batch_size)
    whole("--num-draws", config.num_draws, 1, 1000)
    whole("--seed", config.seed, 0, SEEDS)
    with runs.new(out, overwrite, "eval") as folder:
        from prism.evaluation import evaluate

        store = open_store(config.data)
        backbone, _, name = load_backbone(config.backbone, config.device, config.dtype)
        check_store(config.data, store, backbone)
        judge = load_judge(config.head, backbone, embedded=config.backbone is None)
        start = time.perf_counter()
        rows = evaluate(judge, store, config.split, levels, config.num_draws, config.seed, config.batch_size)
        timings = {"evaluate": time.perf_counter() - start}
        metrics = document("eval", describe(backbone, name), config.seed, accuracy=rows, timings=timings)
        files.write_json(folder / "metrics.json", metrics)
        write_config(folder / "config.json", config)
        title = "How often the judge is right, by noise level"
        write_report(
            folder / "report.html", metrics, title=title, notes=NOTES, config=files.read_json(folder / "config.json")
        )
    return metrics


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PrismError(
            f'The --timesteps "{quoted(text, 120)}" are not numbers apart by commas; write for example 899,699,0.'
        ) from None
    for level in levels:
        if not 0 <= level <= 1000:
            raise PrismError(f"The --timesteps hold {level:g}; levels lie in 0 (clean) to 1000 (noise).")
    return tuple(int(level) if level.is_integer() else level for level in levels)
