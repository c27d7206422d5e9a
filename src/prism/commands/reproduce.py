"""`prism reproduce`: the paper's claims, each answered by an experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from prism.commands import speaks
from prism.commands.options import BatchSize, Labelled, Repeated, Resuming, Seed, option, recorded


@dataclass(frozen=True)
class Anywhere(Resuming):
    """The folder of results, and a file of options."""

    out: Annotated[Path, option("FOLDER")] = Path("runs/reproduce")  # type: ignore[misc]


@dataclass(frozen=True)
class Reproduce:
    """Answer the paper's claims, each by an experiment with intervals: all of them, or those that are named.

    Trains heads of several seeds, measures them on prompts they have not seen, and writes a page with a verdict per
    claim, tables as CSV and figures as SVG and PNG. A run that was stopped goes on with --resume.
    """

    experiments: Annotated[tuple[str, ...], tyro.conf.Positional, option("EXPERIMENT", "all")] = ()
    """noise-robustness, best-of-n, query-and-pooling, related-judges, depth, states, fine-tuning, attention,
    refutation, correlation, self-improvement."""
    output: Anywhere = field(default_factory=Anywhere)
    scale: Annotated[str, option("NAME")] = "quick"
    """quick (minutes), or full (hours: what narrow intervals need)."""
    tap: Annotated[int | None, option("BLOCK", "4 of the embedded model's 6, else 0.4 of the blocks")] = None
    """Block whose tokens heads read, from 1."""
    correlate: Annotated[tuple[str, ...], Repeated, option("NAME", "15 of ShapeWorld, 12 of them trained")] = ()
    """A backbone for the experiment correlation: a folder, or an id on the Hub; five or more, of one VAE."""
    quality: Annotated[Path | None, option("FILE", "the referee's scores")] = None
    """Their generative quality: a table with a row per backbone and VBench's dimensions as columns."""
    batch_size: BatchSize = 64
    seed: Seed = 0
    models: Labelled = field(default_factory=Labelled)

    def main(self) -> None:
        """Run the experiments, and print their answers."""
        from prism.lab import reproduce

        metrics = reproduce.run(
            self.output.out,
            self.experiments,
            self.scale,
            self.models.data,
            self.models.backbone,
            self.models.device,
            self.models.dtype,
            self.tap,
            self.seed,
            self.batch_size,
            self.output.resume,
            self.correlate,
            self.quality,
            recorded(self),
        )
        if speaks():
            from rich.console import Console

            from prism.report.claim_page import answers_table

            console = Console(highlight=False)
            console.print(answers_table(metrics["answers"]))
            console.print(f"Report: {self.output.out / 'report.html'}", soft_wrap=True, markup=False)
