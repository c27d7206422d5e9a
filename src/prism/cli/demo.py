"""`prism demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.cli import options


def demo(
    out: options.Out = Path("runs/demo"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Sample and label the training candidates anew, not the shipped ones.")
    ] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Show the whole idea on the embedded model in minutes: train a head, judge, pick the best of 8.

    Trains a head on labelled candidates, measures it by noise level on prompts
    it has not seen, and runs Best-of-N with every strategy on fresh prompts.

    Writes the report, metrics.json, the winner's video and the trained head.
    """
    from prism.cli.printing import show
    from prism.experiments import demo as experiment

    show(experiment.run(out=out, fresh=fresh, seed=seed, overwrite=overwrite), out)
