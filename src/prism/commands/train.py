"""`prism train`: a fresh head on a labelled store, resumable, with its report."""

from __future__ import annotations

import inspect
import runpy
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from prism import files, runs
from prism.commands import show, speaks
from prism.commands.options import Labelled, Replacing, Resuming, option, recorded
from prism.errors import PrismError, quoted
from prism.report.rows import AccuracyRow
from prism.training.config import Recipe, TrainConfig

TAPS, DIM = (4, 5), 144  # the study's choice for the embedded backbone (docs/study.md)
FEW = 100  # training prompts; a head learns nothing from fewer
NOTES = (
    "The loss falls on the pairs the head learns from, and says little about others: run prism eval on a split that "
    "was held out.",
)


@dataclass(frozen=True)
class Folder(Replacing, Resuming):
    """The folder of results, and a file of options."""

    recipe: Annotated[str | None, option("FILE[:NAME]", "")] = None
    """Python file that is run; its function returns a prism.training.Recipe. Flags and --config override it."""


Width = Annotated[int | None, option(default="144 on the embedded model, else 1536, or twice the backbone's if less")]
Rate = Annotated[float | None, option(default="5e-4 on the embedded model, else 1e-4")]
WarmUp = Annotated[int | None, option(default="20, or a tenth of the steps if less")]


@dataclass(frozen=True)
class HeadOptions:
    """The head, or the heads whose scores are averaged."""

    tap: Annotated[str | None, option("BLOCK,BLOCK", "4,5 of the embedded model, else one at 0.4 of the blocks")] = None
    """Blocks whose tokens are read, from 1; each gets a head, whose scores are averaged."""
    dim: Width = None
    """Width of a head."""
    aggregation: Annotated[str, option("NAME")] = "query"
    """query: cross-attention, as in the paper. Ablations: mean pooling, or a linear probe."""
    num_queries: int = 1
    """Queries, whose readings are averaged."""
    num_heads: int = 8
    """Attention heads; their number divides the width."""
    mlp_layers: int = 5
    """Linear layers of the MLP."""


@dataclass(frozen=True)
class Training(TrainConfig):
    """Every setting of the training; where a default is another than the paper's, the study chose it."""

    steps: int = 1500
    learning_rate: Rate = None  # type: ignore[assignment]
    schedule: Annotated[str, option("NAME")] = "cosine"
    warmup_steps: WarmUp = None  # type: ignore[assignment]
    objective: Annotated[str, option("NAME")] = "btt"
    source: Annotated[str, option("NAME or NAME=X,...")] = "renoised"
    levels: Annotated[str, option("NAME")] = "uniform"
    token_cache: Annotated[str, option("FOLDER", "none")] = ""
    report_to: Annotated[str, option("NAME,NAME", "none")] = ""
    max_gradient_norm: Annotated[float, option("NUM")] = 1.0
    max_rows: Annotated[int, option("INT", name="batch-size")] = 64
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Check nothing: settings may still be None, and `recipe` fills them in and checks them."""


@dataclass(frozen=True)
class Train:
    """Train a judge on labelled pairs; the backbone stays frozen.

    Writes head/ (what --head takes), history.json and the report, and prints the accuracy on validation pairs. Its
    defaults are the recipe that the study chose; on the embedded model this takes some ten minutes on two cores.

    A run that was stopped or killed goes on with --resume, on CPU to the same weights bit for bit.
    """

    output: Folder
    models: Labelled = field(default_factory=Labelled)
    head: HeadOptions = HeadOptions()
    training: Training = Training()

    def main(self) -> None:
        """Train, and print the head's folder and accuracies."""
        metrics = run(self)
        if speaks():
            print(f"Head: {self.output.out / 'head'}")
            show(metrics, self.output.out)


def run(config: Train) -> dict[str, Any]:
    """Train into `out`: head/, history.json, config.json, metrics.json and report.html; returns the metrics.

    With `overwrite` the run works in `<out>.parts`, which replaces the old `out` at the end; a run that was killed
    continues there if its configuration is the same. Of several processes (`torchrun`) only the first reads and writes
    folders.
    """
    from prism.judge import Judge
    from prism.judge.hub import origin
    from prism.loading import check_store, describe, load_backbone, open_store
    from prism.report.metrics import document
    from prism.team import Team
    from prism.training import train
    from prism.training.trainer import untrained_heads

    models, head, out, overwrite = config.models, config.head, config.output.out, config.output.overwrite
    embedded, taps = models.backbone is None, _blocks(head.tap)
    settings = recipe(embedded, **vars(config.training))
    if config.output.resume and overwrite:
        raise PrismError("--resume continues the run in the folder and --overwrite replaces it; give one of them.")
    team = Team.gathered(models.device)
    if not config.output.resume:
        team.on_first(lambda: runs.check(out, overwrite, "train"))
    folder = runs.parts_of(out) if overwrite else out
    store = open_store(models.data)
    backbone, _, name = load_backbone(models.backbone, models.device, models.dtype)
    check_store(models.data, store, backbone)
    if not store.dimensions:
        raise PrismError(
            f"The store {store.folder} has no labels to learn from; label it with prism collect --label --reward, or "
            "with prism data import."
        )
    options = {name: value for name, value in vars(head).items() if name != "tap"}
    options |= {"dim": DIM if embedded and head.dim is None else head.dim, "dimensions": store.dimensions}
    judge = Judge.average(untrained_heads(backbone, taps or (TAPS if embedded else (None,)), settings.seed, **options))
    prompts = len(store.groups("train", store.dimensions))
    if team.first and 0 < prompts < FEW:
        warnings.warn(
            f"{prompts} training prompt{'s' * (prompts > 1)}: too few to learn from; the study needed some 800.",
            stacklevel=2,
        )
    try:
        result = train(store, judge, settings, folder, resume=config.output.resume, restart=overwrite)
    except BaseException:
        if team.first:
            runs.abandon(folder)
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
    team.on_first(lambda: _write(config, folder, metrics, result, origin(backbone.pipe)))
    return metrics


def recipe(embedded: bool, **changes: Any) -> TrainConfig:
    """The settings of `prism train`: the study's choice (docs/study.md), with `changes` that are not None.

    For a backbone other than the embedded one the head is as wide as the paper's and learns at the paper's rate.
    """
    defaults = {
        "steps": 1500,
        "learning_rate": 5e-4 if embedded else 1e-4,
        "schedule": "cosine",
        "checkpoint_every": 100,
    }
    settings = {**defaults, **{name: value for name, value in changes.items() if value is not None}}
    return TrainConfig.from_dict({"warmup_steps": min(20, settings["steps"] // 10), **settings})


def recipe_options(text: str) -> dict[str, Any]:
    """The options of `prism train` that a recipe sets. text: FILE, or FILE:NAME where it holds several functions.

    The file is run as Python code. Therefore only the command line may name one, not a file of options.
    """
    path, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    option_text = f"The --recipe {quoted(text, 200)}"
    try:
        defined = runpy.run_path(path or text, run_name="prism_recipe").items()
        makers = {
            key: value for key, value in defined if inspect.isfunction(value) and value.__module__ == "prism_recipe"
        }
        public = [key for key in makers if not key.startswith("_")]
        if not name and len(public) == 1:
            name = public[0]
        if name not in makers:
            raise PrismError(
                f"{option_text} must name one function of its file, FILE:NAME; there are {', '.join(public)}."
            )
        chosen = makers[name]()
    except PrismError:
        raise
    except Exception as error:
        raise PrismError(f"{option_text} cannot be run: {type(error).__name__}: {quoted(error, 160)}.") from error
    if not isinstance(chosen, Recipe):
        raise PrismError(f"{option_text} must return a prism.training.Recipe, found {quoted(chosen, 60)}.")
    taps = ",".join(map(str, chosen.taps))
    return {"backbone": chosen.backbone, "tap": taps, "dim": chosen.dim, **chosen.head, **asdict(chosen.train)}


def _measured(judge: Any, store: Any, config: TrainConfig) -> list[AccuracyRow]:
    """Rows "accuracy" of metrics.json at the main noise levels, on validation pairs or, without any, on test pairs."""
    from prism.evaluation import evaluate
    from prism.training.validation import levels

    for split in ("validation", "test"):
        if store.groups(split, judge.dimensions):
            return evaluate(
                judge, store, split, levels(judge.backbone), num_draws=1, seed=config.seed, batch_size=config.max_rows
            )
    return []


def _blocks(text: str | None) -> tuple[int, ...] | None:
    """The blocks of --tap, or None for the default."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PrismError(
            f'The --tap "{quoted(text, 80)}" is no block\'s number, nor several apart by commas.'
        ) from None


def _write(
    config: Train, folder: Path, metrics: dict[str, Any], result: dict[str, Any], base_model: str | None
) -> None:
    from prism.judge.saved import note_evaluation
    from prism.report.page import write_report

    note_evaluation(folder / "head", metrics["accuracy"], base_model=base_model)
    files.write_json(folder / "metrics.json", metrics)
    settings = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {**settings, "options": recorded(config)})
    title = f"A head trained on {result['pairs']} pairs of {result['prompts']} prompts"
    write_report(folder / "report.html", metrics, title=title, notes=NOTES, config=settings)
    if folder != config.output.out:
        runs.publish(folder, config.output.out)
