"""Options that several commands share, with their one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Panels of --help, from what a command is about to where its results go.
MODELS, CALL, OUTPUT = (
    "Models and data",
    "Pipeline call (default: call.json beside the backbone, or its own)",
    "Output",
)

Out = Annotated[
    Path,
    typer.Option("--out", metavar="FOLDER", help="Folder to write; it appears whole.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the folder if a run of this command made it.", rich_help_panel=OUTPUT),
]
Seed = Annotated[int, typer.Option("--seed", metavar="INT", help="Seed of everything random.")]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", metavar="INT", help="Videos per denoiser call; halved where memory runs out."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="Latent store: videos as latents, with labelled pairs.",
        show_default="the embedded candidates",
        rich_help_panel=MODELS,
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="Diffusers pipeline: a folder, or an id on the Hub.",
        show_default="the embedded ShapeWorld model",
        rich_help_panel=MODELS,
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="NAME",
        help="Trained head: a folder, or an id on the Hub.",
        show_default="the embedded head",
        rich_help_panel=MODELS,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where to compute: cpu, cuda, cuda:1, mps.",
        show_default="cuda, else cpu",
        rich_help_panel=MODELS,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="Precision of the backbone: float32, bfloat16 or float16. The embedded model stays in float32.",
        show_default="bfloat16 on cuda, else float32",
        rich_help_panel=MODELS,
    ),
]
