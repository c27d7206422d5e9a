"""`prism eval`: measure a saved head on a labelled store, or compute figures anew from the scores of such a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prism import files, runs
from prism.commands import show, speaks
from prism.commands.options import BatchSize, Head, Labelled, Replacing, Seed, levels_of, option, recorded
from prism.errors import SEEDS, PrismError, choice, quoted, whole

if TYPE_CHECKING:
    from prism.evaluation import Measurement
    from prism.team import Team

NOTES = (
    "The accuracy is the share of labelled pairs of this split that the judge orders as their labels do. No prompt and "
    "no video of it was in the training split of the same store.",
    "It does not show how the judge does on other prompts, other generators or other people’s labels, nor what "
    "picking by it gains: that takes Best-of-N.",
)

TIMESTEPS = "989,949,899,699,499,299,99,0"
SCORES = "scores.parquet"
LEVEL = 699
"""The noise level of the swap test: the nearest of those that are measured."""


@dataclass(frozen=True)
class Judged(Labelled):
    """Models and data."""

    head: Head = None
    against: Annotated[str | None, option("NAME", "")] = None
    """Second judge, compared on the same pairs: a head, or a scores.parquet that eval left."""
    from_scores: Annotated[Path | None, option("FILE", "")] = None
    """A scores.parquet that eval left, in place of models and data."""


@dataclass(frozen=True)
class Evaluate:
    """Measure how often a head agrees with the labels, by noise level, with intervals.

    Pairwise accuracy with and without ties, per dimension, overall and per pair of generators, calibration and bias
    probes, with 95 % intervals resampled by prompt. Writes metrics.json, the report, and the scores of each pair. A
    launcher's processes share the videos.
    """

    output: Replacing
    split: Annotated[str, option("NAME")] = "test"
    """Split to measure: test, validation or train."""
    timesteps: Annotated[str, option("T,T")] = TIMESTEPS
    """Noise levels to judge at, 0 (clean) to 1000 (noise)."""
    num_draws: int = 1
    """Noise draws averaged over at each level."""
    ties: Annotated[str, option("NAME")] = "exact"
    """exact, or videoalign to add the accuracy with ties of VideoGen-RewardBench's own script."""
    decode: bool = False
    """Decode clips whose brightness and motion the store lacks, for the bias probes."""
    batch_size: BatchSize = 64
    seed: Seed = 0
    models: Judged = Judged()

    def main(self) -> None:
        """Evaluate, and print the table."""
        metrics = run(self)
        if speaks():
            show(metrics, self.output.out)


def run(config: Evaluate) -> dict[str, Any]:
    """Evaluate and write metrics.json, scores.parquet, config.json and report.html to `out`; returns the metrics.

    Default levels at which the pipeline does not use the denoiser that the head reads are left out.
    """
    from prism.report.metrics import document
    from prism.report.page import write_report

    levels = None if config.timesteps == TIMESTEPS else levels_of("--timesteps", config.timesteps)
    whole("--batch-size", config.batch_size)
    whole("--num-draws", config.num_draws, 1, 1000)
    whole("--seed", config.seed, 0, SEEDS)
    choice("The --ties", config.ties, ("exact", "videoalign"))
    if config.models.from_scores:
        _check_scores_alone(config)
    from prism.team import Team

    team = Team.gathered(config.models.device)
    with contextlib.ExitStack() as stack:
        work = team.on_first(lambda: stack.enter_context(runs.new(config.output.out, config.output.overwrite, "eval")))
        start = time.perf_counter()
        measured, other = _from_scores(config) if config.models.from_scores else _measured(config, levels, team)
        timings = {"evaluate": time.perf_counter() - start}
        rows = figures(measured, other, config.ties)
        metrics = document("eval", measured.about["backbone"], measured.settings["seed"], timings=timings, **rows)

        def write() -> None:
            measured.save(work / SCORES)
            files.write_json(work / "metrics.json", metrics)
            files.write_json(work / "config.json", recorded(config))
            title = "How often the judge is right, by noise level"
            settings = files.read_json(work / "config.json")
            write_report(work / "report.html", metrics, title=title, notes=NOTES, config=settings)

        team.on_first(write)
    return metrics


def figures(measured: Measurement, other: Measurement | None, ties: str) -> dict[str, Any]:
    """The rows of metrics.json from a measurement, and from that of a second judge where there is one."""
    from prism.evaluation import accuracy_rows, bias_rows, compare_judges, generator_rows, reliability_rows

    rows: dict[str, Any] = {
        "accuracy": accuracy_rows(measured, ties, over_videos=True),
        "generators": generator_rows(measured),
        "reliability": reliability_rows(measured),
        "biases": bias_rows(measured),
        "swap": measured.about["swap"],
    }
    if other is not None:
        names = {"judge": measured.about["head"], "against": other.about["head"]}
        compared = compare_judges(measured, other, measured.settings["seed"])
        if not compared:
            raise PrismError(
                "The two judges have no noise level and dimension with decided pairs in common; give both the same "
                "--timesteps."
            )
        rows["judge_comparison"] = [{**row, **names} for row in compared]
    return rows


def _measured(config: Evaluate, levels: tuple[float, ...] | None, team: Team) -> tuple[Measurement, Measurement | None]:
    """The measurement of the head, and of the judge that it is compared with, if any."""
    from prism.loading import check_store, describe, load_backbone, load_judge, open_store

    models = config.models
    store = open_store(models.data)
    backbone, _, name = load_backbone(models.backbone, models.device, models.dtype)
    check_store(models.data, store, backbone)
    from prism.evaluation import measure, swap_test

    def measurement(head: str | None) -> Measurement:
        judge = load_judge(head, backbone, embedded=models.backbone is None)
        made = measure(
            judge,
            store,
            config.split,
            levels,
            config.num_draws,
            config.seed,
            config.batch_size,
            team=team,
            decode=config.decode,
        )
        nearest = min(made.about["levels"], key=lambda t: abs(t - LEVEL))
        swapped = team.on_first(lambda: swap_test(judge, store, config.split, nearest, config.seed))
        made.about.update(swap=[swapped], head=str(head or "the embedded head"), backbone=describe(backbone, name))
        return made

    other = None
    if models.against is not None:
        other = Path(models.against) if models.against.endswith(".parquet") else None
    theirs = None if other is None else _scores(other, "--against")  # before the work
    measured = measurement(models.head)
    return measured, measurement(models.against) if models.against is not None and other is None else theirs


def _from_scores(config: Evaluate) -> tuple[Measurement, Measurement | None]:
    models = config.models
    assert models.from_scores is not None
    return _scores(models.from_scores, "--from-scores"), (
        None if models.against is None else _scores(Path(models.against), "--against")
    )


def _check_scores_alone(config: Evaluate) -> None:
    """Refuse options that have no effect on a file of scores."""
    models, default = config.models, Evaluate(config.output)
    decided = {
        "--split": config.split != default.split,
        "--timesteps": config.timesteps != default.timesteps,
        "--num-draws": config.num_draws != default.num_draws,
        "--seed": config.seed != default.seed,
        "--decode": config.decode,
        "--head": models.head is not None,
        "--data": models.data is not None,
        "--backbone": models.backbone is not None,
    }
    for flag, is_set in decided.items():
        if is_set:
            raise PrismError(
                f"The --from-scores {quoted(str(models.from_scores), 120)} holds what was measured, and on what; leave "
                f"{flag} out, or measure anew without --from-scores."
            )
    if models.against is not None and not models.against.endswith(".parquet"):
        raise PrismError(
            f"With --from-scores there is no model, so that --against {quoted(models.against, 120)} must be a "
            f"{SCORES} too; run prism eval with that head first."
        )


def _scores(path: Path, flag: str) -> Measurement:
    """A file of scores that an earlier `prism eval` left."""
    from prism.evaluation import Measurement

    if not path.is_file():
        raise PrismError(f"The {flag} {quoted(str(path), 200)} is no file; name a {SCORES} that prism eval left.")
    measured = Measurement.load(path)
    kinds: dict[str, Callable[[Any], bool]] = {
        "backbone": lambda value: isinstance(value, dict),
        "head": lambda value: isinstance(value, str),
        "swap": lambda value: isinstance(value, list),
    }
    for name, is_kind in kinds.items():
        if not is_kind(measured.about.get(name)):
            raise PrismError(
                f"The {flag} {quoted(str(path), 200)} was not written by prism eval: it lacks {name}; measure anew."
            )
    return measured
