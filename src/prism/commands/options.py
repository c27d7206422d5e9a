"""Options that several commands share. A command's dataclass is its options: attributes, and docstrings as help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from prism.errors import PrismError, quoted, whole


def option(metavar: str | None = None, default: str | None = None, name: str | None = None, about: str = "") -> Any:
    """Describe an option, where its type and docstring do not.

    Args:
        metavar: name of its value in --help.
        default: its default in words in --help; "": none is shown.
        name: of the option, if it is not the attribute's.
        about: its help, in place of the attribute's docstring.
    """
    hint = default and f"(default: {default})"
    return tyro.conf.arg(name=name, metavar=metavar, help=about or None, help_behavior_hint=hint)


Repeated = tyro.conf.UseAppendAction
Seed = Annotated[int, option(about="Seed of everything random.")]
BatchSize = Annotated[int, option(about="Videos per denoiser call; halved where memory runs out.")]
Head = Annotated[str | None, option("NAME", "the embedded head", about="Trained head: a folder, or an id on the Hub.")]


@dataclass(frozen=True)
class Output:
    """The folder of results, and a file of options."""

    out: Annotated[Path, option("FOLDER")]
    """Folder to write; it appears whole."""
    config: Annotated[Path | None, option("FILE", "")] = None
    """YAML or JSON file of options, such as the config.json of a run; flags override it."""


@dataclass(frozen=True)
class Replacing(Output):
    """The folder of results, and a file of options."""

    overwrite: bool = False
    """Replace the folder if a run of this command made it."""


@dataclass(frozen=True)
class Resuming(Output):
    """The folder of results, and a file of options."""

    out: Annotated[Path, option("FOLDER")]
    """Folder to write and work in; what a stopped run wrote stays there for --resume."""
    resume: bool = False
    """Continue the same run in the folder after it was stopped or killed."""


@dataclass(frozen=True)
class Device:
    """The device of the models."""

    device: Annotated[str | None, option("NAME", "cuda, else cpu")] = None
    """Where to compute: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Models(Device):
    """Models and their precision."""

    dtype: Annotated[str | None, option("NAME", "bf16 on cuda, else fp32")] = None
    """Precision of the backbone: fp32, bf16 or fp16. The embedded model stays in fp32."""
    backbone: Annotated[str | None, option("NAME", "the embedded ShapeWorld model")] = None
    """Diffusers pipeline: a folder, or an id on the Hub."""


@dataclass(frozen=True)
class Adapted(Models):
    """Models, and where they are kept."""

    offload: Annotated[str, option("NAME")] = "none"
    """Keep models in host memory until needed: whole (model), or layer by layer (group)."""
    loras: Annotated[tuple[str, ...], Repeated, option("FILE[:SCALE]", name="lora")] = ()
    """LoRA for the backbone (of two denoisers the first), a local safetensors file."""


Address: Any = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[ADDRESS]",
    instance_from_str=lambda words: words[0] if words else "local",
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [] if value is None else [value],
)


@dataclass(frozen=True)
class Several:
    """Several machines, by Ray."""

    ray: Annotated[str | None, Address, option(default="without Ray")] = None
    """Share the work among workers of Ray: of the cluster at ADDRESS, or auto for this machine's.
    Without ADDRESS, or with local: of a cluster that is started on this machine."""
    ray_workers: Annotated[int | None, option(default="one per GPU, else per machine")] = None
    """Workers of Ray, each with the backbone."""

    def check(self) -> None:
        """Refuse a number of workers without Ray, and Ray in several processes."""
        from prism.loading import check_alone

        if self.ray_workers is not None:
            whole("--ray-workers", self.ray_workers, 1, 10_000)
            if self.ray is None:
                raise PrismError("The --ray-workers are of Ray; give --ray too.")
        if self.ray is not None:
            check_alone("with --ray")


@dataclass(frozen=True)
class Labelled(Models):
    """Models and data."""

    data: Annotated[Path | None, option("FOLDER", "the embedded candidates")] = None
    """Latent store: videos as latents, with labelled pairs."""


def levels_of(flag: str, text: str) -> tuple[float, ...]:
    """The noise levels in a text such as 899,699,0. `flag`: the option that it comes from, for errors."""
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PrismError(
            f'The {flag} "{quoted(text, 120)}" are not numbers apart by commas; write for example 899,699,0.'
        ) from None
    for level in levels:
        if not 0 <= level <= 1000:
            raise PrismError(f"The {flag} hold {level:g}; levels lie in 0 (clean) to 1000 (noise).")
    return tuple(int(level) if level.is_integer() else level for level in levels)


@contextmanager
def in_flags(*words: str) -> Iterator[None]:
    """Name arguments of the library as this command's options in the sentences of errors: max_n is --max-n.

    words: those of one plain word, as the name of which it counts at the start of a sentence and after "with", "give"
    and "of".
    """
    try:
        yield
    except PrismError as error:
        sentence = re.sub(r"(?<![\w./\\'\"-])[a-z]+(?:_[a-z]+)+(?![\w./\\'\"=(-]*[\w/\\'\"=(])", _flag, str(error))
        for word in words:
            sentence = re.sub(rf"(^|\b(?:with|give|of) ){word}\b", rf"\1--{word}", sentence)
        raise PrismError(sentence) from error


def _flag(name: re.Match[str]) -> str:
    return f"--{name[0].replace('_', '-')}"


def leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of nested groups, as one flat list of names and values."""
    for name, value in values.items():
        yield from leaves(value) if isinstance(value, dict) else [(name, value)]


def recorded(config: Any) -> dict[str, Any]:
    """A command's options by name, as config.json holds them, without those of its output folder."""
    options = {**asdict(config), "output": {}}
    return {name: str(value) if isinstance(value, Path) else value for name, value in leaves(options)}
