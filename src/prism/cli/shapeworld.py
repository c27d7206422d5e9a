"""`prism shapeworld train`, `prism shapeworld candidates` and `prism shapeworld quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.cli import options

app = typer.Typer(help="Make the embedded model and its labelled candidates anew.", no_args_is_help=True)


@app.command("train")
def train(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the run, its logs and checkpoints.")],
    part: Annotated[
        str, typer.Option("--part", metavar="NAME", help="vae, transformer, or all: the VAE comes first.")
    ] = "all",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="INT", help="Optimiser steps.", show_default="4000 vae, 16000 transformer"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="INT", help="Videos of a step.", show_default="8 vae, 32 transformer"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="NUMBER",
            help="AdamW's highest step size.",
            show_default="0.0015 vae, 0.001 transformer",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="INT", help="Blocks of the transformer.", show_default="6")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", metavar="INT", help="Attention heads; the width is 32 a head.", show_default="4"),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--start",
            metavar="FOLDER",
            help="Earlier weights to train on: a VAE (its encoder is kept), or a transformer and its text encoder.",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, mps.")] = "cpu",
) -> None:
    """Train the embedded model from scratch; its pipeline is saved once both parts are done.

    Takes hours on two cores. A run that was stopped or killed goes on with --resume.
    """
    from prism.shapeworld import train as training

    training.run(
        out,
        part=part,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        layers=layers,
        heads=heads,
        start=None if start is None else str(start),
        seed=seed,
        device=device,
        resume=resume,
    )


@app.command("candidates")
def candidates(
    out: options.Out,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            metavar="NAME[:PROMPTS[xEACH]]",
            help="train, validation, test or unseen; may be repeated.",
            show_default="train:750x4 validation:40x6 test:100x4",
        ),
    ] = None,
    trajectories: Annotated[
        bool, typer.Option("--trajectories", help="Keep the states met while sampling too.")
    ] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Sample candidates of ShapeWorld prompts and label them by the referee."""
    from prism.loading import check_alone
    from prism.shapeworld import candidates as module

    check_alone("shapeworld candidates")
    splits = dict(module.parse_share(text) for text in split) if split else module.SHIPPED
    named = "".join(f" --split {text}" for text in split or ()) + (" --trajectories" if trajectories else "")
    command = f"prism shapeworld candidates{named} --seed {seed}"
    module.run(out, splits, seed=seed, trajectories=trajectories, overwrite=overwrite, command=command)


@app.command("quality")
def quality(
    out: options.Out,
    backbone: Annotated[
        str, typer.Option("--backbone", metavar="NAME", help="default, early, small, or the folder of a training run.")
    ] = "default",
    step: Annotated[
        list[int] | None,
        typer.Option("--step", metavar="INT", help="Steps at which that run kept its weights; may be repeated."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", metavar="INT", help="Prompts of each kind.")] = 100,
    per_prompt: Annotated[int, typer.Option("--per-prompt", metavar="INT", help="Videos of each prompt.")] = 2,
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="Whose prompts.")] = "validation",
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", metavar="NUMBER", help="Instead of the default call's.")
    ] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Referee what a generator samples: scores, how often each part of a prompt is right, how candidates differ."""
    from prism.loading import check_alone
    from prism.shapeworld import candidates as module

    check_alone("shapeworld quality")
    module.quality(out, backbone, step or (), prompts, per_prompt, split, guidance_scale, seed, overwrite)


@app.command("weaker")
def weaker(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    out: options.Out,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="INT", help="A step at which the run kept its weights.", show_default="the end"),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Save the transformer and text encoder of a run, or of a step of it, as an embedded weaker backbone."""
    from prism.shapeworld import candidates as module

    module.save_weaker(run, out, step, overwrite)
