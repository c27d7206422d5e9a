"""`prism doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from prism.cli import options


def doctor(
    backbone: Annotated[
        str | None,
        typer.Argument(metavar="[BACKBONE]", help="Diffusers pipeline: a folder, or an id on the Hub.",
                       show_default="the embedded ShapeWorld model"),
    ] = None,
    n: Annotated[int, typer.Option("--n", metavar="INT", help="Candidates.")] = 8,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="STEP:KEEP,...", help="Cuts.", show_default="one, at a fifth")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="INT", help="Steps of a run.", show_default="the pipeline's own")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run the denoiser to time a step.")] = True,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:  # fmt: skip
    """Say what a machine and a backbone are good for, before anything long is started.

    Versions, devices, what the pipeline is and which taps it has, how many rows
    fit, what Best-of-N would cost, and whether there is anything to cut.
    """
    from rich.console import Console

    from prism.experiments import doctor as experiment

    config = experiment.DoctorConfig(backbone, n, schedule, steps, run, device, dtype)
    console = Console(highlight=False)
    for title, lines in experiment.run(config):
        console.print(f"[bold]{title}[/bold]")
        for what, found in lines:
            console.print(f"  {what:24}{found}", soft_wrap=True, markup=False)
