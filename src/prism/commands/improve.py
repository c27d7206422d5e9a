"""`prism improve`: generate, judge, tune, judge again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from prism import files
from prism.commands import speaks
from prism.commands.options import Head, Models, Repeated, Resuming, Seed, levels_of, option, recorded
from prism.commands.sample import Call
from prism.commands.train import recipe
from prism.errors import PrismError, number, quoted, whole
from prism.rewards.settings import CONTROLS, ImproveConfig

NOTES = (
    "The judge read the original backbone throughout: the LoRA was off whenever anything was judged.",
    "Prompts of the judge’s training, of the tuning and of the test share none. All models sampled the test prompts "
    "with the same seeds, so that differences are paired.",
    "Whether the rounds stop, and hence which LoRA is kept, is decided on these same test prompts, by the outer judge; "
    "measure the LoRA on further prompts where that choice matters.",
    "A gain by the judge itself shows that the tuning worked, not that the videos are better. What people would say is "
    "not on this page.",
)
STRIPS = 3  # test prompts that are shown
FLAGS = {"steps": "tuning-steps", "targets": "target", "max_rows": "batch-size"}  # by setting, where they differ
IDENTITY = {"judge": "head", "outer": "outer", "outer_files": "outer", "rewards": "reward", "reward_files": "reward"}
IDENTITY |= {"prompts": "prompts", "test_prompts": "test-prompts", "backbone": "backbone"}


@dataclass(frozen=True)
class Prompts:
    """Prompts of the tuning and of the test, which must share none with each other or with the judge's training."""

    prompts: Annotated[Path | None, option("FILE", "800 new ones of ShapeWorld, on the embedded model")] = None
    """Prompts to tune on: a text file with one a line, or a table with a column prompt or prompt_en."""
    test_prompts: Annotated[
        Path | None, option("FILE", "200 of the split test of ShapeWorld, on the embedded model")
    ] = None
    """Prompts that each round is measured on."""
    num_prompts: Annotated[int, option(default="all")] = 0
    """Take the first ones of the tuning's alone."""
    num_test_prompts: Annotated[int, option(default="all")] = 0
    """Take the first ones of the test's alone."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of the prompts' files, such as cp1252."""


@dataclass(frozen=True)
class Judges:
    """Judges and rewards."""

    head: Head = None
    outer: Annotated[str | None, option("SPEC", "the shipped pixel judge, on the embedded model")] = None
    """Second judge, which never selects: a folder of a head or of a pixel judge, a reward as of --reward, or none.
    Where it falls, or the judge runs ahead of it, the rounds stop."""
    outer_backbone: Annotated[str | None, option("NAME", "the same")] = None
    """Backbone of the outer head: a folder, or an id on the Hub."""
    rewards: Annotated[tuple[str, ...], Repeated, option("SPEC", "the referee, on the embedded model", "reward")] = ()
    """Reward of decoded videos that is measured on the test prompts, as prism collect takes it."""
    reward_timeout: float = 600.0
    """Seconds that one call of a reward may take."""
    fps: Annotated[float | None, option(default="not told")] = None
    """Frames per second, for functions that ask."""
    control: Annotated[tuple[str, ...], Repeated, option("NAME")] = ()
    """The same steps on other picks, measured beside: random picks, or the worst (the judge's order turned round)."""


@dataclass(frozen=True)
class Retrained:
    """Does the tuned backbone also judge better? Heads trained alike on the original and on the tuned one."""

    retrain_head: bool = False
    """Train heads on both, by the labels of --reward of the first round's candidates, and compare them."""
    head_steps: int = 1500
    """Optimiser steps of each head."""
    head_seeds: int = 3
    """Heads on each backbone."""


@dataclass(frozen=True)
class Settings(ImproveConfig):
    """Rounds and tuning; what is left open is as the recipe has it."""

    recipe: Annotated[str, option("NAME")] = "pairs"
    rounds: int = 1
    steps: Annotated[int, option("INT", name="tuning-steps")] = 200
    learning_rate: Annotated[float | None, option(default="1e-4, of winners 2e-5")] = None
    beta: Annotated[float | None, option(default="500 of pairs, 0.1 of weighted")] = None
    prompt_dropout: Annotated[float | None, option(default="0.15 of winners, else 0")] = None
    ema_decay: Annotated[float | None, option(default="0.99 of winners, 0.9 of weighted, 0 of pairs")] = None
    alpha: Annotated[float | None, option(default="the rank")] = None
    targets: Annotated[tuple[str, ...], Repeated, option("NAME", "the attention's", "target")] = ()
    dimension: Annotated[str, option("NAME", "overall, else the mean of all")] = ""
    levels: Annotated[str, option("T,T", "those at which the judge is best")] = ""  # type: ignore[assignment]
    max_rows: Annotated[int, option("INT", name="batch-size")] = 16
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Check nothing: `resolved` does."""

    def resolved(self) -> ImproveConfig:
        """The settings of the library, checked."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(ImproveConfig)}
        return ImproveConfig(**{**values, "levels": levels_of("--levels", self.levels) if self.levels else ()})


@dataclass(frozen=True)
class Improve:
    """Tune your generator by a judge: sample candidates, judge them, tune a LoRA on the verdicts, measure, again.

    Writes lora/, which pipe.load_lora_weights loads, the videos and measures of each round, and the report. A run that
    was stopped or killed goes on with --resume. It needs peft: pip install "prism-video[improve]".
    """

    output: Resuming
    texts: Prompts = Prompts()
    judges: Judges = Judges()
    settings: Settings = Settings()
    heads: Retrained = Retrained()
    reuse: Annotated[Path | None, option("FOLDER", "")] = None
    """Another run with the same model, prompts and seeds, such as of another recipe, whose videos of the untuned model
    are copied and not sampled again."""
    report_to: Annotated[str, option("NAME,NAME", "none")] = ""
    """Trackers of accelerate that get each round, apart by commas: tensorboard, wandb, trackio, ..."""
    models: Models = field(default_factory=Models)
    call: Call = field(default_factory=Call)

    def main(self) -> None:
        """Improve, and print what the rounds gained."""
        metrics = run(self)
        if speaks():
            from rich.console import Console

            from prism.report.improve_page import against_table, measures_table, verdict

            console = Console(highlight=False)
            console.print(measures_table(metrics["rounds"], parts=False))
            if metrics["against"]:
                console.print(against_table(metrics["against"]))
            console.print(verdict(metrics), markup=False)
            if metrics["kept"]:
                console.print(f"LoRA: {self.output.out / 'lora'}", soft_wrap=True, markup=False)
            console.print(f"Report: {self.output.out / 'report.html'}", soft_wrap=True, markup=False)


def run(config: Improve) -> dict[str, Any]:
    """Improve; write the rounds, lora/, metrics.json and report.html; return the metrics."""
    from prism.loading import check_alone, describe, load_backbone, load_judge, load_reward
    from prism.report.metrics import document
    from prism.rewards import improve

    check_alone("improve")
    whole("--head-steps", config.heads.head_steps)
    whole("--head-seeds", config.heads.head_seeds, 1, 100)
    settings, judges, out = config.settings.resolved(), config.judges, config.output.out
    number("--reward-timeout", judges.reward_timeout, 0, above=True)
    if judges.fps is not None:
        number("--fps", judges.fps, 0, above=True)
    for control in judges.control:
        if control not in CONTROLS:
            raise PrismError(f"The --control is {quoted(control, 60)}; choose one of {', '.join(CONTROLS)}.")
    models = config.models
    embedded = models.backbone is None
    tuning, test = _prompts(config.texts, embedded)
    backbone, call, name = load_backbone(models.backbone, models.device, models.dtype)
    for key, value in asdict(config.call).items():
        if value is not None:
            call[key] = os.path.abspath(value) if key in ("image", "last_image", "video") else value
    judge = load_judge(judges.head, backbone, embedded)
    specs = judges.rewards or (("referee",) if embedded else ())
    rewards = [load_reward(spec, judges.reward_timeout, models.device) for spec in specs]
    outer = _outer(judges, backbone, call, settings, embedded, models.device)
    with _in_flags():
        result = improve(
            backbone,
            judge,
            tuning,
            test,
            call,
            out,
            settings,
            outer=outer,
            rewards=rewards,
            controls=judges.control,
            fps=judges.fps,
            retrain=recipe(embedded, steps=config.heads.head_steps) if config.heads.retrain_head else None,
            head_seeds=config.heads.head_seeds,
            reuse=config.reuse,
            report_to=config.report_to,
            resume=config.output.resume,
        )
    metrics = document(
        "improve",
        describe(backbone, name),
        settings.seed,
        rounds=result.rounds,
        tuning=result.history,
        against=result.against,
        untuned_best_of_n=result.best_of_n,
        cost=result.cost,
        retrained=result.retrained,
        stopped=result.stopped,
        kept=result.kept,
        measured={"outer": None if outer is None else outer.name, "rewards": [each.name for each in rewards]},
    )
    _write(config, metrics, _strips(backbone, out, [row["round"] for row in result.rounds if row["arm"] == "judge"]))
    return metrics


@contextmanager
def _in_flags() -> Iterator[None]:
    """Name settings of the library as this command's options where a run differs, or where no layer has a name."""

    def setting(name: re.Match[str]) -> str:
        return f"differs in --{FLAGS.get(name[1], name[1]).replace('_', '-')}: it was "

    try:
        yield
    except PrismError as error:
        sentence = re.sub(r"differs in config: (\w+) was ", setting, str(error), count=1)
        sentence = re.sub(
            rf"differs in ({'|'.join(IDENTITY)}): ", lambda m: f"differs in --{IDENTITY[m[1]]}: ", sentence
        )
        raise PrismError(re.sub(r"\bin targets\.$", "in --target.", sentence)) from error


def _prompts(texts: Prompts, embedded: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """The prompts of the tuning and of the test."""
    from prism import shapeworld
    from prism.preference.prompts import read_prompts

    chosen: list[Sequence[Any]] = []
    for flag, file, count in (
        ("--prompts", texts.prompts, texts.num_prompts),
        ("--test-prompts", texts.test_prompts, texts.num_test_prompts),
    ):
        whole(f"--num-{flag[2:]}", count, 0, 10**9)
        if file is not None:
            every: Sequence[Any] = read_prompts(file, texts.encoding)
        elif not embedded:
            raise PrismError(
                f"No prompts are named to {'tune' if flag == '--prompts' else 'test'} on; give {flag} FILE."
            )
        elif flag == "--prompts":  # after those of the embedded candidates, which the embedded head was trained on
            every = shapeworld.prompts("train", 2400)[1600:]
        else:
            every = shapeworld.prompts("test", 200)
        chosen.append(every[:count] if count else every)
    return chosen[0], chosen[1]


def _outer(
    judges: Judges, backbone: Any, call: dict[str, Any], settings: ImproveConfig, embedded: bool, device: str | None
) -> Any:
    """The outer judge that a text names; None for none."""
    from prism import shapeworld
    from prism.judge import Judge
    from prism.judge.scoring import default_levels
    from prism.lab.pixel import FORMAT
    from prism.loading import load_backbone, load_reward
    from prism.rewards import measuring

    spec = judges.outer
    if spec == "none" or (spec is None and not embedded):
        if judges.outer_backbone is not None:
            raise PrismError("The --outer-backbone is of an outer head; give --outer too.")
        return None
    folder = Path(spec) if spec is not None else Path(shapeworld.asset_folder("pixel"))
    if not (folder / "config.json").is_file() and (folder / "head" / "config.json").is_file():
        folder = folder / "head"  # of a run of prism train
    if not (folder / "config.json").is_file():
        if judges.outer_backbone is not None:
            raise PrismError(
                f"The --outer {quoted(spec, 120)} is no head, and --outer-backbone is of one; leave it out."
            )
        try:
            reward = load_reward(str(spec), judges.reward_timeout, device)
        except PrismError as error:
            sentence = (
                str(error).replace("--reward", "--outer").replace("names no function", "names no head, no function")
            )
            raise PrismError(sentence.replace("; write ", "; write the folder of a head, ", 1)) from error
        return measuring.reward_outer(reward, backbone, judges.fps)
    described = files.read_json(folder / "config.json")
    if isinstance(described, dict) and described.get("format") == FORMAT:
        return replace(_pixel(folder, backbone), digest=_digest(folder))
    if judges.outer_backbone is None:
        judge = Judge.from_pretrained(folder, backbone)
        outer = measuring.judge_outer(judge, settings, default_levels(judge), f"the head {folder.name}")
        return replace(outer, digest=_digest(folder))
    other, other_call, name = load_backbone(judges.outer_backbone, device)
    judge = Judge.from_pretrained(folder, other)
    outer = measuring.other_outer(judge, backbone, {**call, **other_call}, settings, f"a head on {name}")
    return replace(outer, digest=_digest(folder, str(other.fingerprint()["weights"])))


def _digest(folder: Path, more: str = "") -> str:
    """The first digits of a hash of a judge's files."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    text = "".join(f"{path.name} {files.sha256(path)}\n" for path in names)
    return hashlib.sha256((text + more).encode()).hexdigest()[:16]


def _pixel(folder: Path, backbone: Any) -> Any:
    """A pixel judge as the outer one, on clean frames."""
    from prism.lab.pixel import PixelJudge
    from prism.rewards.measuring import Outer
    from prism.rewards.picks import decisive

    judge = PixelJudge.from_pretrained(folder, backbone)
    weights = decisive(judge, "")

    def score(latents: Any, prompts: Sequence[str], call: Any, seeds: Sequence[int]) -> Sequence[float]:
        rows = judge.score(latents.to(backbone.device), list(prompts), 0.0, **call).double().cpu()
        return [sum(weight * value for weight, value in zip(weights, row)) for row in rows.tolist()]

    return Outer("the pixel judge", score, frozenset(judge.trained_on.get("prompt_keys") or ()))


def _strips(backbone: Any, out: Path, rounds: Sequence[int]) -> list[Any]:
    """Film strips of the first test prompts: the same seed by the untuned model and after each round."""
    from prism.preference import LatentStore
    from prism.report.page import FilmRow, FilmStrip
    from prism.rewards.picks import groups_of
    from prism.training.labels import Decoder

    decoder, strips = Decoder(backbone), []
    stores = {"untuned": LatentStore.open(out / "untuned" / "test")}
    stores |= {f"round {n}": LatentStore.open(out / "judge" / f"round-{n}" / "test") for n in rounds}
    for group in groups_of(stores["untuned"])[:STRIPS]:
        video = group.videos[0]
        rows = []
        for label, store in stores.items():
            call = store.call_of(video)
            seed = int(video.rpartition("-")[2])
            rows.append(FilmRow(label, decoder.frames(store.latents([video]), group.prompt, call, seed)))
        strips.append(FilmStrip(group.prompt, rows, "The same seed before and after the tuning."))
    return strips


def _write(config: Improve, metrics: dict[str, Any], strips: Sequence[Any]) -> None:
    from prism.report.improve_page import sections
    from prism.report.page import write_report

    out = config.output.out
    settings = files.read_json(out / "config.json")
    files.write_json(out / "metrics.json", metrics)
    files.write_json(out / "config.json", {**settings, "options": recorded(config)})
    title = f"A generator tuned by its judge: {config.settings.recipe}"
    write_report(
        out / "report.html", metrics, strips, title=title, notes=NOTES, config=settings, sections=sections(metrics)
    )
