"""`prism eval`: a saved head on a labelled store, by noise level."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

from prism import files, runs
from prism.commands import show
from prism.commands.options import BatchSize, Head, Labelled, Replacing, Seed, levels_of, option, recorded
from prism.errors import SEEDS, whole

NOTES = (
    "The accuracy is the share of labelled pairs of this split that the judge orders as their labels do. No prompt and "
    "no video of it was in the training split of the same store.",
    "It does not show how the judge does on other prompts, other generators or other people’s labels, nor what "
    "picking by it gains: that takes Best-of-N.",
)

TIMESTEPS = "989,949,899,699,499,299,99,0"


@dataclass(frozen=True)
class Judged(Labelled):
    """Models and data."""

    head: Head = None


@dataclass(frozen=True)
class Evaluate:
    """Measure how often a head agrees with the labels, by noise level, with intervals.

    Pairwise accuracy with and without ties, per dimension and overall, with 95 % intervals resampled by prompt. Writes
    metrics.json and the report.
    """

    output: Replacing
    split: Annotated[str, option("NAME")] = "test"
    """Split to measure: test, validation or train."""
    timesteps: Annotated[str, option("T,T")] = TIMESTEPS
    """Noise levels to judge at, 0 (clean) to 1000 (noise)."""
    num_draws: int = 1
    """Noise draws averaged over at each level."""
    batch_size: BatchSize = 64
    seed: Seed = 0
    models: Judged = Judged()

    def main(self) -> None:
        """Evaluate, and print the table."""
        show(run(self), self.output.out)


def run(config: Evaluate) -> dict[str, Any]:
    """Evaluate and write metrics.json, config.json and report.html to `out`; returns the metrics.

    Default levels at which the pipeline does not use the denoiser that the head reads are left out.
    """
    from prism.loading import check_alone, check_store, describe, load_backbone, load_judge, open_store
    from prism.report.metrics import document
    from prism.report.page import write_report

    models = config.models
    check_alone("eval")
    levels = None if config.timesteps == TIMESTEPS else levels_of("--timesteps", config.timesteps)
    whole("--batch-size", config.batch_size)
    whole("--num-draws", config.num_draws, 1, 1000)
    whole("--seed", config.seed, 0, SEEDS)
    with runs.new(config.output.out, config.output.overwrite, "eval") as folder:
        from prism.evaluation import evaluate

        store = open_store(models.data)
        backbone, _, name = load_backbone(models.backbone, models.device, models.dtype)
        check_store(models.data, store, backbone)
        judge = load_judge(models.head, backbone, embedded=models.backbone is None)
        start = time.perf_counter()
        rows = evaluate(judge, store, config.split, levels, config.num_draws, config.seed, config.batch_size)
        timings = {"evaluate": time.perf_counter() - start}
        metrics = document("eval", describe(backbone, name), config.seed, accuracy=rows, timings=timings)
        files.write_json(folder / "metrics.json", metrics)
        files.write_json(folder / "config.json", recorded(config))
        title = "How often the judge is right, by noise level"
        write_report(
            folder / "report.html", metrics, title=title, notes=NOTES, config=files.read_json(folder / "config.json")
        )
    return metrics
