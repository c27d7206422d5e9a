"""`prism plan`: what each way of spending would have bought on recorded candidates, and the best one for a budget."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prism import files, runs
from prism.commands import speaks
from prism.commands.budgets import Budget, in_samples, parse_budget, seconds_per_sample
from prism.commands.options import BatchSize, Head, Models, Repeated, Replacing, Seed, levels_of, option, recorded
from prism.commands.sample import parse_weights
from prism.errors import DRAWS, SEEDS, PrismError, quoted, whole

if TYPE_CHECKING:
    from prism.evaluation.measured import Measured
    from prism.evaluation.planning import Replayed
    from prism.evaluation.recorded import Recorded
    from prism.report.plan_rows import MeasuredFacts
    from prism.sampling.plan import Plan as PlanOfRun

NOTES = (
    "A replayed plan’s numbers are what it would have picked of candidates that were sampled beforehand. A run of it "
    "with the same seeds makes the same picks, up to rounding.",
    "The share says how much of what a perfect pick gains by this reward a plan gets. It does not show what people "
    "would say, nor how the plan does with another model, other prompts, guidance or numbers of steps.",
    "Costs are denoiser rows in closed form, judging included; VAE, text encoder and scheduler are not in them.",
)
SCORES = "scores.parquet"
REPLAYED = "plans.csv"


@dataclass(frozen=True)
class Planned(Models):
    """Models and data."""

    data: Annotated[Path | None, option("FOLDER", "")] = None
    """Latent store of prism collect --states: recorded candidates of your own prompts."""
    head: Head = None
    from_scores: Annotated[Path | None, option("FILE", "")] = None
    """A scores.parquet that prism plan left, in place of models and data."""
    measured: Annotated[tuple[str, ...], Repeated, option("FILE")] = ()
    """Lines of plans that were played on the same prompts, such as searches, which no replay covers."""


@dataclass(frozen=True)
class Plan:
    """Find the plan of Best-of-N that gains most for a budget, on recorded candidates of your own model.

    Every recorded candidate is scored once wherever a plan may look; then any number of candidates, cuts, looks and
    draws is table arithmetic. Writes plan.json for best_of_n and prism sample, every plan, the scores and the report.
    """

    output: Replacing
    budget: Annotated[tuple[str, ...], Repeated, option("X", "1.2, 1.5, 2, 3, 4, 6 and 8")] = ()
    """Cost of one video: in plain samples (1.5), denoiser rows (200rows) or seconds of this machine (30s)."""
    by: Annotated[str, option("NAME")] = "overall"
    """Reward of the store that says what a video is worth."""
    select_by: Annotated[str, option("NAME")] = "overall"
    """The head's dimension that decides, or weights: VQ:1,MQ:0.5,TA:2."""
    split: Annotated[str, option("NAME")] = "all"
    """Split whose prompts are taken, or all; prompts that the head was trained on are left out."""
    levels: Annotated[str, option("T,T")] = "500,700"
    """Noise levels at which predicted and finished latents are judged."""
    num_draws: int = 2
    """Noise draws at each of them; plans with fewer are compared too."""
    save_to: Annotated[Path | None, option("FOLDER", "")] = None
    """Also write the plans into this head's folder, from where a budget alone finds them."""
    batch_size: BatchSize = 64
    seed: Seed = 0
    models: Planned = field(default_factory=Planned)

    def main(self) -> None:
        """Plan, and print the plan of each budget."""
        metrics = run(self)
        if speaks():
            from rich.console import Console

            from prism.report.plan_page import chosen_table, rivals_sentence

            console = Console(highlight=False)
            if metrics["mean_of"]:
                console.print(f"The reward {self.by} is the mean of {', '.join(metrics['mean_of'])}.", markup=False)
            console.print(chosen_table(metrics["plans"]))
            if "rivals" in metrics:
                console.print(rivals_sentence(metrics["rivals"]), highlight=False)
            if self.save_to is not None:
                console.print(f"The head carries these plans: {self.save_to}", soft_wrap=True, markup=False)
            console.print(f"Plans: {self.output.out / 'plan.json'}", soft_wrap=True, markup=False)
            console.print(f"Report: {self.output.out / 'report.html'}", soft_wrap=True, markup=False)


def run(config: Plan) -> dict[str, Any]:
    """Plan; write plan.json, plans.csv, scores.parquet, metrics.json, config.json and report.html; return the metrics.

    Scores of finished prompts stay in OUT.parts when the run is killed, and the same command goes on from there.
    """
    from prism.loading import check_alone
    from prism.report.metrics import document

    check_alone("plan")
    levels, weights = levels_of("--levels", config.levels), parse_weights(config.select_by)
    whole("--num-draws", config.num_draws, 1, DRAWS)
    whole("--batch-size", config.batch_size)
    whole("--seed", config.seed, 0, SEEDS)
    if not all(levels) or len(set(levels)) < len(levels):
        raise PrismError(f"The --levels {quoted(config.levels, 60)} must be different levels above 0.")
    budgets = [parse_budget(text) for text in config.budget]
    folder = None if config.save_to is None else _head_folder(config.save_to)
    if config.models.from_scores is not None:
        _check_scores_alone(config, budgets)
    elif config.models.data is None:
        raise PrismError("The plans need recorded candidates; give --data STORE, or --from-scores FILE.")
    out, start = runs.check(config.output.out, config.output.overwrite, "plan"), time.perf_counter()
    scores, seconds, parts = _from_scores(config) if config.models.data is None else _scored(config, levels, budgets)
    from prism.evaluation import planning
    from prism.sampling import planner

    part, measured, facts = _measured(config, scores)
    replayed = planning.Replayed.of(part.table(config.by, weights), scores.load, config.seed, measured)
    costs = [in_samples(budget, sum(scores.load.calls), seconds) for budget in budgets] or list(planning.BUDGETS)
    plans = [replayed.chosen(cost) for cost in sorted(set(costs))]
    about = scores.about
    extra = {name: about[name] for name in ("store", "split", "states", "levels", "num_draws", "seed")}
    more: dict[str, Any] = {}
    if facts is not None:
        more = {"measured": facts, "rivals": replayed.rivals([row["budget"] for row in plans])}
    filed = _document(about, plans, by=config.by, select_by=config.select_by, measured_on=extra)
    metrics = document(
        "plan",
        {"name": about["name"], **about["backbone"]},
        config.seed,
        timings={"plan": time.perf_counter() - start},
        front=[replayed.row(index) for index in replayed.front()],
        plans=plans,
        prune=replayed.prune(),
        sizes=replayed.sizes(),
        spread=replayed.spread,
        by=config.by,
        mean_of=part.mean_of(config.by),
        left_out=about.get("left_out", ""),
        not_replayed=planner.not_replayed(),
        replayed=replayed.replays,
        **more,
        seconds_per_sample=seconds,
        scored=extra,
    )
    with runs.new(out, config.output.overwrite, "plan") as work:
        _write(work, config, metrics, scores, replayed, filed)
    if folder is not None:
        from prism.sampling.plan_files import FILE_OF_HEAD

        files.write_json(folder / FILE_OF_HEAD, filed)
    if parts is not None:
        parts.remove()
    return metrics


def _write(
    work: Path, config: Plan, metrics: dict[str, Any], scores: Recorded, replayed: Replayed, filed: dict[str, Any]
) -> None:
    """Write the run's files into its folder."""
    from prism.evaluation.planning import name
    from prism.report.page import write_report
    from prism.report.plan_page import cards, sections
    from prism.sampling.plan_files import FILE

    scores.save(work / SCORES)
    files.write_json(work / FILE, filed)
    files.write_json(work / "metrics.json", metrics)
    files.write_json(work / "config.json", recorded(config))
    rows = [replayed.bare(index) for index in range(len(replayed.runs))]
    with open(work / REPLAYED, "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        columns: tuple[Any, ...] = ("how", "strategy", "n", "cost", "denoiser_rows", "share", "gain")
        table.writerow(["plan", *columns])
        for row, run in zip(rows, replayed.runs):
            table.writerow([name(run), *(row[key] for key in columns)])  # type: ignore[literal-required]
    settings = files.read_json(work / "config.json")
    title = "What a budget buys: plans of Best-of-N on recorded candidates"
    parts = sections(metrics, replayed.fulls(), replayed.dots())
    write_report(work / "report.html", metrics, (), title, NOTES, settings, sections=parts, cards=cards(metrics))


def _scored(
    config: Plan, levels: Sequence[float], budgets: Sequence[Budget]
) -> tuple[Recorded, float | None, runs.Parts]:
    """The store's candidates, scored; the seconds of a plain sample, where a budget is in seconds; the run's parts."""
    from prism.backbone.arguments import normalised
    from prism.backbone.fingerprint import VERSIONED
    from prism.evaluation import recorded as scoring
    from prism.loading import load_backbone, load_judge
    from prism.preference import LatentStore

    models = config.models
    store = LatentStore.open(str(models.data))
    backbone, _, name = load_backbone(models.backbone, models.device, models.dtype)
    judge = load_judge(models.head, backbone, embedded=models.backbone is None)
    by_prompt, left_out = scoring.candidates_of(store, config.split, judge.trained_on.get("prompt_keys", ()))
    about = {"name": name, **scoring.facts(judge, store, levels, config.num_draws, config.seed, config.split)}
    about["left_out"] = left_out
    if left_out and speaks():
        print(f"Left out: {left_out}.")
    scoring.check_choice(store, judge, config.by, parse_weights(config.select_by))
    seconds = None
    if any(budget.unit == "s" for budget in budgets):
        seconds = seconds_per_sample(backbone, normalised(store.call), next(iter(by_prompt)))
    for budget in budgets:
        in_samples(budget, sum(about["workload"]["calls"]), seconds)
    changeable = [f"backbone.{each}" for each in VERSIONED]
    folder = runs.parts_of(config.output.out)
    parts = runs.claim(folder, about, True, config.output.overwrite, name=runs.IDENTITY, changeable=changeable)
    scores = scoring.score(judge, store, by_prompt, about, parts, config.batch_size)
    return scores, seconds, parts


def _measured(config: Plan, scores: Recorded) -> tuple[Recorded, Measured | None, MeasuredFacts | None]:
    """The scores of the prompts that plans are compared on, and what was played on them."""
    if not config.models.measured:
        return scores, None, None
    from prism.evaluation import measured
    from prism.lab.matched import ARMS, FEW_STEPS, WHOLE

    arms = {**FEW_STEPS, **WHOLE, **ARMS}

    def named(name: str) -> PlanOfRun | None:
        arm = arms.get(name)
        return None if arm is None or arm.longer or arm.plan.needs_oracle() else arm.plan

    plays, others = measured.read(config.models.measured, len(scores.load.calls), named)
    part, played, facts = measured.beside(scores, plays, config.by, others, config.seed)
    if speaks():
        from prism.report.plan_page import measured_sentence

        print(measured_sentence(facts))
    return part, played, facts


def _from_scores(config: Plan) -> tuple[Recorded, None, None]:
    from prism.evaluation.recorded import Recorded

    path = config.models.from_scores
    assert path is not None
    if not path.is_file():
        raise PrismError(
            f"The --from-scores {quoted(str(path), 200)} is no file; name a {SCORES} that prism plan left."
        )
    return Recorded.load_file(path), None, None


def _check_scores_alone(config: Plan, budgets: Sequence[Budget]) -> None:
    """Refuse options that have no effect on a file of scores."""
    models, default = config.models, Plan(config.output)
    decided = {
        "--data": models.data is not None,
        "--backbone": models.backbone is not None,
        "--head": models.head is not None,
        "--split": config.split != default.split,
        "--levels": config.levels != default.levels,
        "--num-draws": config.num_draws != default.num_draws,
    }
    for flag, is_set in decided.items():
        if is_set:
            raise PrismError(
                f"The --from-scores {quoted(str(models.from_scores), 120)} holds what was scored, and how; leave "
                f"{flag} out, or score anew with --data."
            )
    if any(budget.unit == "s" for budget in budgets):
        raise PrismError("A --budget in seconds needs the model to be timed; give --data in place of --from-scores.")


def _head_folder(path: Path) -> Path:
    folder = path / "head" if (path / "head").is_dir() else path  # of a run's folder
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise PrismError(f"The --save-to {quoted(str(path), 200)} is no head's folder; plans are written into one.")
    return folder


def _document(about: dict[str, Any], plans: Sequence[Any], **extra: Any) -> dict[str, Any]:
    from prism.sampling import plan_files

    names = ("budget", "strategy", "settings", "n", "cost", "denoiser_rows", "share", "share_ci95", "gain", "gain_ci95")
    entries = [{name: plan[name] for name in (*names, "prompts", "chosen_on", "name", "how")} for plan in plans]
    return plan_files.document(about, entries, **extra)
