"""`prism demo`, `prism study` and `prism shapeworld`: the laboratory's runs, and the embedded model that they use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from prism.commands import show
from prism.commands.options import (
    BatchSize,
    Device,
    Labelled,
    Repeated,
    Replacing,
    Resuming,
    Seed,
    option,
    recorded,
)


@dataclass(frozen=True)
class Anywhere(Replacing):
    """The folder of results, and a file of options."""

    out: Annotated[Path | None, option("FOLDER", "runs/demo, with --full runs/full")] = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Demo:
    """Show the whole idea on the embedded model in minutes: train a head, judge, pick the best of 8.

    Trains a head on labelled candidates, measures it by noise level on prompts it has not seen, and runs Best-of-N with
    every strategy on fresh prompts. Two judges that look at decoded frames are measured beside it.

    Writes the report, metrics.json, the winner's video and the trained head.
    """

    output: Anywhere = Anywhere()
    full: bool = False
    """200 prompts, three judges, all strategies at matched cost, evidence/: several hours; a killed run continues."""
    fresh: bool = False
    """Sample and label the training candidates anew, not the shipped ones."""
    batch_size: BatchSize = 64
    seed: Seed = 0
    models: Device = field(default_factory=Device)

    def main(self) -> None:
        """Run the demo, and print its tables."""
        from prism.lab import demo

        out = self.output.out or Path("runs/full" if self.full else "runs/demo")
        metrics = demo.run(
            out=out,
            full=self.full,
            fresh=self.fresh,
            seed=self.seed,
            overwrite=self.output.overwrite,
            device=self.models.device,
            batch_size=self.batch_size,
            options=recorded(self),
        )
        show(metrics, out)


@dataclass(frozen=True)
class Recipe:
    """The recipe; each variant differs from it in one thing."""

    steps: int = 1000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompts per step."""
    max_prompts: int = 0
    """Training prompts; 0: all."""
    learning_rate: float = 5e-4
    """AdamW's step size."""
    tap: Annotated[int | None, option("BLOCK", "0.4 of the blocks")] = None
    """Block whose tokens are read, from 1."""


@dataclass(frozen=True)
class Study:
    """Compare recipes for a judge on validation prompts, and confirm the best on test.

    Number of videos and noise draws, states, averaged heads, taps, head sizes, optimiser, objective, calibration.
    Writes study.md and the report; a study that was stopped continues with --resume.
    """

    output: Resuming
    only: Annotated[tuple[str, ...], Repeated, option("NAME")] = ()
    """A variant or a question, instead of all."""
    confirm: Annotated[tuple[str, ...], Repeated, option("VARIANT")] = ()
    """Measure this variant on the test prompts; each variant only once."""
    recipe: Recipe = Recipe()
    seeds: int = 2
    """Trainings per variant, each with other batches."""
    inits: int = 2
    """Heads per training, each with other first weights."""
    draws: int = 8
    """Noise draws scored at each level."""
    batch_size: BatchSize = 64
    models: Labelled = field(default_factory=Labelled)

    def main(self) -> None:
        """Run the study, and print its page."""
        from prism.lab import ablations

        settings: dict[str, Any] = {name: value for name, value in vars(self.recipe).items() if name != "tap"}
        config = ablations.StudyConfig(
            train=replace(ablations.RECIPE, max_rows=self.batch_size, **settings),
            tap=self.recipe.tap,
            seeds=self.seeds,
            inits=self.inits,
            draws=self.draws,
            **vars(self.models),
        )
        out = self.output.out
        options = {name: value for name, value in recorded(self).items() if name not in ("only", "confirm")}
        metrics = ablations.run(config, out, self.only, self.confirm, self.output.resume, options)
        print((out / "study.md").read_text(encoding="utf-8"))
        show(metrics, out)


@dataclass(frozen=True)
class Train:
    """Train the embedded model from scratch; its pipeline is saved once both parts are done.

    Takes hours on two cores. A run that was stopped or killed goes on with --resume.
    """

    output: Resuming
    part: Annotated[str, option("NAME")] = "all"
    """vae, transformer, or all: the VAE comes first."""
    steps: Annotated[int | None, option(default="4000 vae, 16000 transformer")] = None
    """Optimiser steps."""
    batch_size: Annotated[int | None, option(default="8 vae, 32 transformer")] = None
    """Videos per step."""
    learning_rate: Annotated[float | None, option(default="0.0015 vae, 0.001 transformer")] = None
    """AdamW's highest step size."""
    layers: Annotated[int | None, option(default="6")] = None
    """Blocks of the transformer."""
    heads: Annotated[int | None, option(default="4")] = None
    """Attention heads; the width is 32 per head."""
    start: Annotated[str | None, option("FOLDER", "")] = None
    """Earlier weights to train on: a VAE (its encoder is kept), or a transformer and its text encoder."""
    seed: Seed = 0
    device: Annotated[str, option("NAME")] = "cpu"
    """Where to compute: cpu, cuda, mps."""

    def main(self) -> None:
        """Train the part, or both."""
        from prism.shapeworld import train

        settings = {name: value for name, value in vars(self).items() if name != "output"}
        train.run(self.output.out, resume=self.output.resume, **settings)


@dataclass(frozen=True)
class Candidates:
    """Sample candidates of ShapeWorld prompts and label them by the referee."""

    output: Replacing
    split: Annotated[
        tuple[str, ...], Repeated, option("NAME[:PROMPTS[xEACH]]", "train:750x4 validation:40x6 test:100x4")
    ] = ()
    """train, validation, test or unseen; may be repeated."""
    trajectories: bool = False
    """Keep the states of the sampling loop too."""
    seed: Seed = 0

    def main(self) -> None:
        """Sample and label them."""
        from prism.loading import check_alone
        from prism.shapeworld import candidates

        check_alone("shapeworld candidates")
        splits = dict(candidates.parse_share(text) for text in self.split) if self.split else candidates.SHIPPED
        named = "".join(f" --split {text}" for text in self.split) + (" --trajectories" if self.trajectories else "")
        command = f"prism shapeworld candidates{named} --seed {self.seed}"
        out, overwrite = self.output.out, self.output.overwrite
        candidates.run(
            out, splits, seed=self.seed, trajectories=self.trajectories, overwrite=overwrite, command=command
        )


@dataclass(frozen=True)
class Quality:
    """Measure a generator's videos by the referee: scores, how often each part of a prompt is right, and spread."""

    output: Replacing
    backbone: Annotated[str, option("NAME")] = "default"
    """default, early, small, or the folder of a training run."""
    step: Annotated[tuple[int, ...], Repeated, option("INT")] = ()
    """Steps at which that run kept its weights."""
    prompts: int = 100
    """Prompts per kind."""
    per_prompt: int = 2
    """Videos per prompt."""
    split: Annotated[str, option("NAME")] = "validation"
    """Split of the prompts."""
    guidance_scale: Annotated[float | None, option(default="the default call's")] = None
    """Classifier-free guidance."""
    seed: Seed = 0

    def main(self) -> None:
        """Sample, measure and write quality.json."""
        from prism.loading import check_alone
        from prism.shapeworld import candidates

        check_alone("shapeworld quality")
        candidates.quality(
            self.output.out,
            self.backbone,
            self.step,
            self.prompts,
            self.per_prompt,
            self.split,
            self.guidance_scale,
            self.seed,
            self.output.overwrite,
        )


@dataclass(frozen=True)
class Weaker:
    """Save the transformer and text encoder of a run, or of a step of it, as an embedded weaker backbone."""

    run: Annotated[Path, tyro.conf.Positional, option("RUN")]
    """Folder of a training run."""
    output: Replacing
    step: Annotated[int | None, option(default="the end")] = None
    """A step at which the run kept its weights."""

    def main(self) -> None:
        """Save it."""
        from prism.shapeworld import candidates

        candidates.save_weaker(self.run, self.output.out, self.step, self.output.overwrite)
