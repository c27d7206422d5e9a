"""`prism train`."""

from __future__ import annotations

from typing import Annotated

import typer

from prism.cli import options

_HEAD, _TRAINING = "Head", "Training"


def train(
    out: options.Out,
    data: options.Data = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the same run in the folder after it was stopped or killed.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    tap: Annotated[
        str | None,
        typer.Option(
            "--tap",
            metavar="BLOCK,BLOCK",
            help="Blocks whose tokens are read, from 1; each gets a head, whose scores are averaged.",
            show_default="4,5 of the embedded model, else one at 0.4 of the blocks",
            rich_help_panel=_HEAD,
        ),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            "--dim",
            metavar="INT",
            help="Width of a head.",
            show_default="144 on the embedded model, else 1536, or twice the backbone's if less",
            rich_help_panel=_HEAD,
        ),
    ] = None,
    aggregation: Annotated[
        str,
        typer.Option(
            "--aggregation",
            metavar="NAME",
            help="query: cross-attention, as in the paper. Ablations: mean pooling, or a linear probe.",
            rich_help_panel=_HEAD,
        ),
    ] = "query",
    steps: Annotated[
        int, typer.Option("--steps", metavar="INT", help="Optimiser steps.", rich_help_panel=_TRAINING)
    ] = 1500,
    prompts_per_step: Annotated[
        int,
        typer.Option(
            "--prompts-per-step",
            metavar="INT",
            help="Prompts of a step; each brings its videos and their pairs.",
            rich_help_panel=_TRAINING,
        ),
    ] = 8,
    batch_size: options.BatchSize = 64,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="NUMBER",
            help="AdamW's step size, reached over 20 steps.",
            show_default="5e-4 on the embedded model, else 1e-4",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="Of the learning rate: constant, or cosine to zero.",
            rich_help_panel=_TRAINING,
        ),
    ] = "cosine",
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="btt: Bradley-Terry with ties. bt: without, ties are left out.",
            rich_help_panel=_TRAINING,
        ),
    ] = "btt",
    eta: Annotated[
        float,
        typer.Option("--eta", metavar="NUMBER", help="Tie threshold of btt, above 1.", rich_help_panel=_TRAINING),
    ] = 5.0,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="NAME",
            help="Noisy latents: renoised (finished videos, noised anew), trajectory (recorded states), or mixed.",
            rich_help_panel=_TRAINING,
        ),
    ] = "renoised",
    trajectory_share: Annotated[
        float,
        typer.Option(
            "--trajectory-share",
            metavar="NUMBER",
            help="Of the source mixed: share of recorded states, 0 to 1.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.5,
    t_low: Annotated[
        float,
        typer.Option(
            "--t-low", metavar="T", help="Lowest noise level trained on, 0: clean.", rich_help_panel=_TRAINING
        ),
    ] = 0.0,
    t_high: Annotated[
        float,
        typer.Option(
            "--t-high", metavar="T", help="Highest noise level trained on, 1000: noise.", rich_help_panel=_TRAINING
        ),
    ] = 1000.0,
    ema_decay: Annotated[
        float,
        typer.Option(
            "--ema-decay",
            metavar="NUMBER",
            help="Save a moving average of the weights; 0: don't.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.0,
    validate_every: Annotated[
        int,
        typer.Option(
            "--validate-every",
            metavar="STEPS",
            help="Steps between measurements on the validation pairs; 0: none.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    keep_best: Annotated[
        bool,
        typer.Option(
            "--keep-best",
            help="Save the head of the best validation, not the last.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            "--checkpoint-every", metavar="STEPS", help="Steps between checkpoints.", rich_help_panel=_TRAINING
        ),
    ] = 100,
    seed: options.Seed = 0,
    backbone: options.Backbone = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Train a judge on labelled pairs; the backbone stays frozen.

    Writes head/ (what --head takes), history.json and the report, and prints
    the accuracy on validation pairs. As printed here it trains the recipe that
    the study chose, on the embedded model some ten minutes on two cores.

    A run that was stopped or killed goes on with --resume, on CPU to the same
    weights bit for bit.
    """
    from prism.cli.printing import show
    from prism.commands import train as experiment

    settings = experiment.recipe(
        backbone is None,
        steps=steps,
        prompts_per_step=prompts_per_step,
        max_rows=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        objective=objective,
        eta=eta,
        source=source,
        trajectory_share=trajectory_share,
        t_low=t_low,
        t_high=t_high,
        ema_decay=ema_decay,
        validate_every=validate_every,
        keep_best=keep_best,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    config = experiment.TrainRun(
        data=data,
        train=settings,
        taps=_blocks(tap),
        dim=dim,
        aggregation=aggregation,
        backbone=backbone,
        device=device,
        dtype=dtype,
    )
    metrics = experiment.run(config, out, resume=resume, overwrite=overwrite)
    print(f"Head: {out / 'head'}")
    show(metrics, out)


def _blocks(text: str | None) -> tuple[int, ...] | None:
    from prism.errors import PrismError, quoted

    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PrismError(
            f'The --tap "{quoted(text, 80)}" is no block\'s number, nor several apart by commas.'
        ) from None
