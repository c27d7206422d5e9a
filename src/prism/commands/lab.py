"""`prism demo` and `prism study`: the laboratory's two long runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from prism.commands.options import (
    BatchSize,
    Device,
    Labelled,
    Repeated,
    Replacing,
    Resuming,
    Seed,
    named,
    recorded,
    said,
)
from prism.commands.printing import show


@dataclass(frozen=True)
class Anywhere(Replacing):
    """Where results go."""

    out: Annotated[Path | None, said("runs/demo, with --full runs/full", "FOLDER")] = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Demo:
    """Show the whole idea on the embedded model in minutes: train a head, judge, pick the best of 8.

    Trains a head on labelled candidates, measures it by noise level on prompts it has not seen, and runs Best-of-N with
    every strategy on fresh prompts. Two judges that look at decoded frames are measured beside it.

    Writes the report, metrics.json, the winner's video and the trained head.
    """

    output: Anywhere = Anywhere()
    full: bool = False
    """200 prompts, three judges, prompts out of the domain, evidence/: an hour or more; goes on after a kill."""
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
    """The recipe that all variants differ from in one thing."""

    steps: int = 1000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompts of a step."""
    max_prompts: int = 0
    """Training prompts; 0: all."""
    learning_rate: float = 5e-4
    """AdamW's step size."""
    tap: Annotated[int | None, said("0.4 of the blocks", "BLOCK")] = None
    """Block whose tokens are read, from 1."""


@dataclass(frozen=True)
class Study:
    """Compare recipes for a judge on validation prompts, and confirm the best on test.

    Number of videos and noise draws, states, averaged heads, taps, head sizes, optimiser, objective, calibration.
    Writes study.md and the report; what is done is kept when it is stopped, and --resume goes on.
    """

    output: Resuming
    only: Annotated[tuple[str, ...], Repeated, named("NAME")] = ()
    """A variant or a question, instead of all."""
    confirm: Annotated[tuple[str, ...], Repeated, named("VARIANT")] = ()
    """Measure it on the test prompts; each but once."""
    recipe: Recipe = Recipe()
    seeds: int = 2
    """Trainings of each variant, each on batches of its own."""
    inits: int = 2
    """Heads of different first weights in each training."""
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
