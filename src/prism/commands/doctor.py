"""`prism doctor`: what a machine and a backbone are good for, or whether a family of one's own fits a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prism.commands.options import Models, said

BESIDE = "call.json beside the pipeline, else its own"


@dataclass(frozen=True)
class Examined(Models):
    """The model, by default the embedded one."""

    backbone: Annotated[tyro.conf.Positional[str | None], said("the embedded ShapeWorld model", "[BACKBONE]")] = None
    """Diffusers pipeline: a folder, or an id on the Hub."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a video."""

    height: Annotated[int | None, said(BESIDE)] = None
    """Height in pixels."""
    width: Annotated[int | None, said(BESIDE)] = None
    """Width in pixels."""
    num_frames: Annotated[int | None, said(BESIDE)] = None
    """Frames."""


@dataclass(frozen=True)
class Doctor:
    """Say what a machine and a backbone are good for, before anything long is started.

    Versions, devices, what the pipeline is and which taps it has, how many rows fit, what Best-of-N would cost, and
    whether there is anything to cut.

    With --family: whether a row of facts of your own fits a pipeline, a line a check; exit code 1 where one does not
    hold. Choose small sizes.
    """

    models: Examined = Examined()
    n: int = 8
    """Candidates."""
    schedule: Annotated[str | None, said("one, at a fifth", "STEP:KEEP,...")] = None
    """Cuts."""
    steps: Annotated[int | None, said("the pipeline's own")] = None
    """Steps of a run."""
    run: Annotated[bool, said()] = True
    """Run no step of the denoiser to time it."""
    family: Annotated[Path | None, said(metavar="FILE")] = None
    """Check the `family` that this Python file defines on the pipeline. The file is run: it is your own code."""
    sizes: Sizes = Sizes()

    def main(self) -> int:
        """Print what is found; 1 where a check of a family does not hold."""
        from rich.console import Console

        from prism.commands.examination import check_family, run

        console = Console(highlight=False)
        if self.family is not None:
            checked = check_family(self)
            for what, holds, found in checked:
                console.print(f"  {'holds' if holds else 'FAILS':8}{what:22}{found}", soft_wrap=True, markup=False)
            return int(not all(holds for _, holds, _ in checked))
        for title, lines in run(self):
            console.print(f"[bold]{title}[/bold]")
            for what, found in lines:
                console.print(f"  {what:24}{found}", soft_wrap=True, markup=False)
        return 0
