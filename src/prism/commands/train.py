"""What `prism train` runs: a fresh head on a labelled store, resumable, with its report."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism import files, runs
from prism.errors import PrismError
from prism.report.metrics import document
from prism.report.page import write_report
from prism.training.config import TrainConfig

TAPS, DIM = (4, 5), 144  # the study's choice for the embedded backbone (docs/study.md)
FEW = 100  # training prompts, below which nothing is learned
NOTES = (
    "The loss falls on the pairs the head learns from, and says little about others: run prism eval on a split that "
    "was held out.",
)


@dataclass(frozen=True)
class TrainRun:
    """Options of `prism train`: which store and backbone, the shape of the head, and how it is trained.

    data: a latent store; None for the labelled candidates that ship with the package.
    train: settings; None for `recipe`. taps: blocks whose tokens are read, from 1, a head for each, whose scores are
    averaged; None for the study's on the embedded backbone, and the default one on another. dim: width D of the heads;
    None for the study's, and on another backbone 1536 as in the paper, or twice the backbone's width where less.
    """

    data: Path | None = None
    train: TrainConfig | None = None
    taps: tuple[int, ...] | None = None
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
    from prism.judge import Judge
    from prism.judge.hub import origin
    from prism.loading import check_store, describe, load_backbone, open_store
    from prism.team import Team
    from prism.training import train

    if resume and overwrite:
        raise PrismError("--resume continues the run in the folder and --overwrite replaces it; give one of them.")
    team = Team.gathered(config.device)
    if not resume:
        team.on_first(lambda: runs.check(out, overwrite, "train"))
    place = runs.parts_of(out) if overwrite else out
    store = open_store(config.data)
    backbone, _, name = load_backbone(config.backbone, config.device, config.dtype)
    check_store(config.data, store, backbone)
    embedded = config.backbone is None
    settings = config.train or recipe(embedded)
    judge = Judge.average(
        [
            Judge.untrained(
                backbone,
                tap=tap,
                dim=DIM if embedded and config.dim is None else config.dim,
                dimensions=store.dimensions,
                aggregation=config.aggregation,
                seed=settings.seed + 1000 * number,
            )
            for number, tap in enumerate(config.taps or (TAPS if embedded else (None,)))
        ]
    )
    prompts = len(store.groups("train", store.dimensions))
    if team.first and 0 < prompts < FEW:
        warnings.warn(
            f"{prompts} training prompt{'s' * (prompts > 1)}: too few to learn from; the study needed some 800.",
            stacklevel=2,
        )
    try:
        result = train(store, judge, settings, place, resume=resume, restart=overwrite)
    except BaseException:
        if team.first:
            runs.abandon(place)
        raise
    measured = team.on_first(lambda: _measured(judge, store, settings))
    summary = {key: value for key, value in result.items() if key != "history"}
    metrics = document(
        "train",
        describe(backbone, name),
        settings.seed,
        accuracy=measured,
        timings={"train": result["seconds"]},
        train=summary,
        history=[entry for entry in result["history"] if "loss" in entry],
        validation=[entry for entry in result["history"] if "validation" in entry],
    )
    team.on_first(lambda: _write(place, out, metrics, result, origin(backbone.pipe)))
    return metrics


def recipe(embedded: bool, **changes: Any) -> TrainConfig:
    """How `prism train` trains unless told otherwise: as the study chose, with fewer steps for fewer prompts.

    A head as wide as the paper's, for another backbone, learns at the paper's rate.
    """
    defaults = {
        "steps": 1500,
        "learning_rate": 5e-4 if embedded else 1e-4,
        "schedule": "cosine",
        "checkpoint_every": 100,
    }
    settings = {**defaults, **{name: value for name, value in changes.items() if value is not None}}
    return TrainConfig(**{"warmup_steps": min(20, settings["steps"] // 10), **settings})


def _measured(judge: Any, store: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """Rows "accuracy" on validation pairs, or on test pairs where there are none, at the main noise levels."""
    from prism.evaluation import evaluate
    from prism.training.validation import levels

    for split in ("validation", "test"):
        if store.groups(split, judge.dimensions):
            return evaluate(
                judge, store, split, levels(judge.backbone), num_draws=1, seed=config.seed, batch_size=config.max_rows
            )
    return []


def _write(place: Path, out: Path, metrics: dict[str, Any], result: dict[str, Any], base_model: str | None) -> None:
    from prism.judge.saved import note_evaluation

    note_evaluation(place / "head", metrics["accuracy"], base_model=base_model)
    files.write_json(place / "metrics.json", metrics)
    settings = files.read_json(place / "config.json")
    title = f"A head trained on {result['pairs']} pairs of {result['prompts']} prompts"
    write_report(place / "report.html", metrics, title=title, notes=NOTES, config=settings)
    if place != out:
        runs.publish(place, out)
