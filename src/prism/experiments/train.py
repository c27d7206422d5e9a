"""What `prism train` runs: a fresh head on a labelled store, resumable, with its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism import files, runs
from prism.errors import PrismError
from prism.report.metrics import document
from prism.report.page import write_report
from prism.training.config import TrainConfig

NOTES = (
    "The loss falls on the pairs the head learns from, and says little about others: run prism eval on a split that "
    "was held out.",
)


@dataclass(frozen=True)
class TrainRun:
    """Options of `prism train`: which store and backbone, the shape of the head, and how it is trained.

    data: a latent store; None for the labelled candidates that ship with the package.
    tap: block whose tokens are read, from 1; None for the backbone's default. dim: width D of the head; None for 1536
    as in the paper, or twice the backbone's width where that is less.
    """

    data: Path | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    tap: int | None = None
    dim: int | None = None
    aggregation: str = "query"
    backbone: str | None = None
    device: str | None = None
    dtype: str | None = None


def run(config: TrainRun, out: Path, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train into `out`: head/, history.json, config.json, metrics.json and report.html; returns the metrics.

    With `overwrite` the work is done in `<out>.parts`, which takes the name `out` at the end; a run of the same
    configuration that lies there goes on. What stood at `out` stays until then. Of several processes (`torchrun`) the
    first alone looks at folders and writes.
    """
    from prism.experiments.loading import describe, load_backbone, open_store
    from prism.judge import Judge
    from prism.training import train
    from prism.training.processes import Processes

    if resume and overwrite:
        raise PrismError("--resume continues the run in the folder and --overwrite replaces it; give one of them.")
    processes = Processes.on(config.device)
    if not resume:
        processes.on_first(lambda: runs.check(out, overwrite, "train"))
    place = runs.parts_of(out) if overwrite else out
    store = open_store(config.data)
    backbone, _, name = load_backbone(config.backbone, config.device, config.dtype)
    judge = Judge.untrained(
        backbone,
        tap=config.tap,
        dim=config.dim,
        dimensions=store.dimensions,
        aggregation=config.aggregation,
        seed=config.train.seed,
    )
    try:
        result = train(store, judge, config.train, place, resume=resume, restart=overwrite)
    except BaseException:
        if processes.first:
            runs.abandon(place)
        raise
    summary = {key: value for key, value in result.items() if key != "history"}
    metrics = document(
        "train",
        describe(backbone, name),
        config.train.seed,
        timings={"train": result["seconds"]},
        train=summary,
        history=[entry for entry in result["history"] if "loss" in entry],
        validation=[entry for entry in result["history"] if "validation" in entry],
    )
    processes.on_first(lambda: _write(place, out, metrics, result))
    return metrics


def _write(place: Path, out: Path, metrics: dict[str, Any], result: dict[str, Any]) -> None:
    files.write_json(place / "metrics.json", metrics)
    settings = files.read_json(place / "config.json")
    title = f"A head trained on {result['pairs']} pairs of {result['prompts']} prompts"
    write_report(place / "report.html", metrics, title=title, notes=NOTES, config=settings)
    if place != out:
        runs.publish(place, out)
