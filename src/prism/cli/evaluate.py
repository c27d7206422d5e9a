"""`prism eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from prism.cli import options


def evaluate(
    out: options.Out,
    data: options.Data = None,
    head: options.Head = None,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Split to measure: test, validation or train.")
    ] = "test",
    timesteps: Annotated[
        str,
        typer.Option("--timesteps", metavar="T,T", help="Noise levels to judge at, 0 (clean) to 1000 (noise)."),
    ] = "989,949,899,699,499,299,99,0",
    num_draws: Annotated[
        int, typer.Option("--num-draws", metavar="INT", help="Noise draws averaged over at each level.")
    ] = 1,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    backbone: options.Backbone = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure how often a head agrees with the labels, by noise level, with intervals.

    Pairwise accuracy with and without ties, per dimension and overall, with
    95 % intervals resampled by prompt. Writes metrics.json and the report.
    """
    from prism.cli.printing import show
    from prism.commands import evaluate as experiment

    config = experiment.EvaluateConfig(
        data=data,
        head=head,
        split=split,
        timesteps=timesteps,
        num_draws=num_draws,
        batch_size=batch_size,
        seed=seed,
        backbone=backbone,
        device=device,
        dtype=dtype,
    )
    show(experiment.run(config, out, overwrite), out)
