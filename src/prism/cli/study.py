"""`prism study`."""

from __future__ import annotations

from typing import Annotated

import typer

from prism.cli import options

_RECIPE = "Recipe that all variants differ from in one thing"


def study(
    out: options.Out,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="A variant or a question, again for more.", show_default="all"),
    ] = None,
    confirm: Annotated[
        list[str] | None,
        typer.Option("--confirm", metavar="VARIANT", help="Measure it on the test prompts; each but once."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the study in the folder.", rich_help_panel=options.OUTPUT),
    ] = False,
    data: options.Data = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="INT", help="Optimiser steps.", rich_help_panel=_RECIPE)
    ] = 1000,
    prompts_per_step: Annotated[
        int, typer.Option("--prompts-per-step", metavar="INT", help="Prompts of a step.", rich_help_panel=_RECIPE)
    ] = 8,
    max_prompts: Annotated[
        int, typer.Option("--max-prompts", metavar="INT", help="Training prompts; 0: all.", rich_help_panel=_RECIPE)
    ] = 0,
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", metavar="NUMBER", help="AdamW's step size.", rich_help_panel=_RECIPE),
    ] = 5e-4,
    tap: Annotated[
        int | None,
        typer.Option(
            "--tap",
            metavar="BLOCK",
            help="Block whose tokens are read, from 1.",
            show_default="0.4 of the blocks",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="INT", help="Trainings of each variant, each on batches of its own.")
    ] = 2,
    inits: Annotated[
        int, typer.Option("--inits", metavar="INT", help="Heads of different first weights in each training.")
    ] = 2,
    draws: Annotated[int, typer.Option("--draws", metavar="INT", help="Noise draws scored at each level.")] = 8,
    batch_size: options.BatchSize = 64,
    backbone: options.Backbone = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Compare recipes for a judge on validation prompts, and confirm the best on test.

    Number of videos and noise draws, states, averaged heads, taps, head sizes,
    optimiser, objective, calibration. Writes study.md and the report; what is
    done is kept when it is stopped, and --resume goes on.
    """
    import dataclasses

    from prism.cli.printing import show
    from prism.lab import ablations as experiment

    settings = dataclasses.replace(
        experiment.RECIPE,
        steps=steps,
        prompts_per_step=prompts_per_step,
        max_prompts=max_prompts,
        max_rows=batch_size,
        learning_rate=learning_rate,
    )
    config = experiment.StudyConfig(
        data=data,
        train=settings,
        tap=tap,
        seeds=seeds,
        inits=inits,
        draws=draws,
        backbone=backbone,
        device=device,
        dtype=dtype,
    )
    metrics = experiment.run(config, out, only=only or (), confirm=confirm or (), resume=resume)
    print((out / "study.md").read_text(encoding="utf-8"))
    show(metrics, out)
