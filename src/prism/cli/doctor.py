"""`prism doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prism.cli import options

CHECKS = "A family of one's own"


def _checked(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="INT", help=f"{what} of a video.", min=1, rich_help_panel=options.CALL,
                        show_default="call.json beside the pipeline, else its own")  # fmt: skip


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
    family: Annotated[
        Path | None,
        typer.Option("--family", metavar="FILE", help="Check the `family` that this Python file defines on the "
                     "pipeline. The file is run: it is your own code.", rich_help_panel=CHECKS),
    ] = None,
    height: Annotated[int | None, _checked("--height", "Height in pixels")] = None,
    width: Annotated[int | None, _checked("--width", "Width in pixels")] = None,
    num_frames: Annotated[int | None, _checked("--num-frames", "Frames")] = None,
) -> None:  # fmt: skip
    """Say what a machine and a backbone are good for, before anything long is started.

    Versions, devices, what the pipeline is and which taps it has, how many rows
    fit, what Best-of-N would cost, and whether there is anything to cut.

    With --family: whether a row of facts of your own fits a pipeline, a line
    a check; exit code 1 where one does not hold. Choose small sizes.
    """
    from rich.console import Console

    from prism.commands import doctor as experiment

    sizes = {"family": family, "height": height, "width": width, "num_frames": num_frames}
    config = experiment.DoctorConfig(backbone, n, schedule, steps, run, device, dtype, **sizes)  # type: ignore[arg-type]
    console = Console(highlight=False)
    if family is not None:
        checked = experiment.check_family(config)
        for what, holds, found in checked:
            console.print(f"  {'holds' if holds else 'FAILS':8}{what:22}{found}", soft_wrap=True, markup=False)
        if not all(holds for _, holds, _ in checked):
            raise typer.Exit(1)
        return
    for title, lines in experiment.run(config):
        console.print(f"[bold]{title}[/bold]")
        for what, found in lines:
            console.print(f"  {what:24}{found}", soft_wrap=True, markup=False)
