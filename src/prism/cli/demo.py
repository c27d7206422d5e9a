"""`prism demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.cli import options


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Folder to write; it appears whole.",
            show_default="runs/demo, with --full runs/full",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="200 prompts, three judges of different training seeds, prompts out of the domain, evidence/: an hour "
            "or more. Run it again after a kill, and it goes on where it was.",
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Sample and label the training candidates anew, not the shipped ones.")
    ] = False,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Show the whole idea on the embedded model in minutes: train a head, judge, pick the best of 8.

    Trains a head on labelled candidates, measures it by noise level on prompts
    it has not seen, and runs Best-of-N with every strategy on fresh prompts.

    Two judges that look at decoded frames are measured beside it.

    Writes the report, metrics.json, the winner's video and the trained head.
    """
    from prism.cli.printing import show
    from prism.lab import demo as experiment

    out = out or Path("runs/full" if full else "runs/demo")
    metrics = experiment.run(
        out=out, full=full, fresh=fresh, seed=seed, overwrite=overwrite, device=device, batch_size=batch_size
    )
    show(metrics, out)
