"""`prism shapeworld train` and `prism shapeworld candidates`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.cli import options

app = typer.Typer(help="Make the embedded model and its labelled candidates anew.", no_args_is_help=True)


@app.command("train")
def train(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the run and its checkpoints.")],
    part: Annotated[str, typer.Option("--part", metavar="NAME", help="vae or transformer; the VAE comes first.")],
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="INT", help="Optimiser steps.", show_default="the part's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="INT", help="Videos of a step.", show_default="the part's")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
) -> None:
    """Train the embedded model's VAE or transformer from scratch."""
    from prism.shapeworld import train as training

    training.run(out=out, part=part, steps=steps, batch_size=batch_size, seed=seed, device=device, resume=resume)


@app.command("candidates")
def candidates(
    out: options.Out,
    per_prompt: Annotated[int, typer.Option("--per-prompt", metavar="INT", help="Candidates of each prompt.")] = 8,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME", help="train, validation or test; may be repeated.", show_default="all"),
    ] = None,
    trajectories: Annotated[
        bool, typer.Option("--trajectories", help="Keep the states met while sampling too.")
    ] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Sample candidates of ShapeWorld prompts and label them by the referee."""
    from prism.shapeworld import candidates as module

    splits = tuple(split) if split else module.SPLITS
    module.run(out, per_prompt=per_prompt, seed=seed, splits=splits, trajectories=trajectories, overwrite=overwrite)
