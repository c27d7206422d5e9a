"""Options that several commands share, with their one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.errors import PrismError, quoted

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


def seed_or_random(text: str) -> int | None:
    """The seed that a text tells; None for "random"."""
    if text == "random":
        return None
    try:
        return int(text)
    except ValueError:
        raise PrismError(f'--seed must be a whole number, or "random"; found {quoted(text, 60)}.') from None


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
        help="Precision of the backbone: fp32, bf16 or fp16. The embedded model stays in fp32.",
        show_default="bf16 on cuda, else fp32",
        rich_help_panel=MODELS,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        "--offload",
        metavar="NAME",
        help="Keep models in host memory until needed: whole (model), or layer by layer (group).",
        rich_help_panel=MODELS,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="LoRA for the backbone (of two denoisers the first), a local safetensors file; may be repeated.",
        show_default="none",
        rich_help_panel=MODELS,
    ),
]
