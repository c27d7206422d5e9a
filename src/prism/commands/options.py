"""Options that several commands share. A command's dataclass is its options: attributes, and docstrings as help."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


def said(default: str = "", metavar: str | None = None, name: str | None = None) -> Any:
    """Mark an option whose default is said in words, as its value is None until the command finds a better one."""
    return tyro.conf.arg(name=name, metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


def named(metavar: str, name: str | None = None) -> Any:
    """Mark an option by what --help calls its value, and by its name where that is not the attribute's."""
    return tyro.conf.arg(name=name, metavar=metavar)


Repeated = tyro.conf.UseAppendAction
Seed = Annotated[int, tyro.conf.arg(help="Seed of everything random.")]
BatchSize = Annotated[int, tyro.conf.arg(help="Videos per denoiser call; halved where memory runs out.")]


@dataclass(frozen=True)
class Output:
    """Where results go."""

    out: Annotated[Path, named("FOLDER")]
    """Folder to write; it appears whole."""
    config: Annotated[Path | None, said(metavar="FILE")] = None
    """YAML or JSON file of options, such as the config.json of a run; flags go before it."""


@dataclass(frozen=True)
class Replacing(Output):
    """Where results go."""

    overwrite: bool = False
    """Replace the folder if a run of this command made it."""


@dataclass(frozen=True)
class Resuming(Output):
    """Where results go."""

    resume: bool = False
    """Continue the same run in the folder after it was stopped or killed."""


@dataclass(frozen=True)
class Device:
    """Where models compute."""

    device: Annotated[str | None, said("cuda, else cpu", "NAME")] = None
    """Where to compute: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Models(Device):
    """Models and their precision."""

    dtype: Annotated[str | None, said("bf16 on cuda, else fp32", "NAME")] = None
    """Precision of the backbone: fp32, bf16 or fp16. The embedded model stays in fp32."""
    backbone: Annotated[str | None, said("the embedded ShapeWorld model", "NAME")] = None
    """Diffusers pipeline: a folder, or an id on the Hub."""


@dataclass(frozen=True)
class Labelled(Models):
    """Models and data."""

    data: Annotated[Path | None, said("the embedded candidates", "FOLDER")] = None
    """Latent store: videos as latents, with labelled pairs."""


Head = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="NAME",
        help="Trained head: a folder, or an id on the Hub.",
        help_behavior_hint="(default: the embedded head)",
    ),
]


def recorded(config: Any) -> dict[str, Any]:
    """A command's options by name, as config.json holds them; none of where results go."""
    options: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            options |= {} if isinstance(value, Output) else recorded(value)
        else:
            options[field.name] = str(value) if isinstance(value, Path) else value
    return options
