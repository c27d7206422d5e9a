"""`prism encode`: encode a preference set of video files into a latent store."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from prism.commands import speaks
from prism.commands.options import Models, Resuming, Several, option
from prism.errors import PrismError, number, quoted, whole


@dataclass(frozen=True)
class Frames:
    """Frames that are taken of each clip; the size is by default that of the pipeline's call."""

    num_frames: Annotated[int | None, option(default="the pipeline's")] = None
    """Frames of each clip."""
    height: Annotated[int | None, option("PIXELS", "the pipeline's")] = None
    """Height of a frame."""
    width: Annotated[int | None, option("PIXELS", "the pipeline's")] = None
    """Width of a frame."""
    fps: Annotated[float | None, option(default="every frame as it comes")] = None
    """Frames per second that are taken."""
    start: Annotated[str, option("NAME")] = "middle"
    """Position of the frames in the clip: first, middle, or uniform (spread over all of it; without --fps)."""
    fit: Annotated[str, option("NAME")] = "crop"
    """Way to bring frames of another shape to this size: crop, pad or stretch."""


@dataclass(frozen=True)
class Labels:
    """Rules that turn votes into labels."""

    rule: Annotated[str, option("NAME")] = "majority"
    """How annotators are joined: majority (more than half, else a tie) or paper (votes that conflict give no label)."""
    margin: float = 0.0
    """Largest difference of ratings, or of probabilities, that is a tie."""
    soft: bool = False
    """Keep the shares of several annotators' votes as probabilities beside the labels."""
    held_out: Annotated[str, option("V,T")] = "0.1,0.1"
    """Shares of validation and test prompts, where the set names no splits."""


@dataclass(frozen=True)
class Encode:
    """Encode the clips of a preference set into a latent store, which train and eval read.

    Reads what `prism data check` reads. A launcher's processes share the clips, or workers of Ray on several machines.
    A run that was killed goes on with --resume.
    """

    file: Annotated[str, tyro.conf.Positional, option("FILE")]
    """File, folder, or id of a data set on the Hub: clips and what people said of them."""
    output: Resuming
    form: Annotated[str | None, option("NAME", "by the columns")] = None
    """Format to read, where several fit."""
    root: Annotated[Path | None, option("FOLDER", "the file's own")] = None
    """Folder that paths in the file are relative to."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of text files, such as cp1252."""
    unit: int = 64
    """Clips per shard: what a kill can cost."""
    latents: Annotated[Path | None, option("FOLDER", "clips are decoded and encoded")] = None
    """Cache of FastVideo (Parquet) or musubi-tuner (safetensors) with the clips' latents, by their files' names."""
    frames: Frames = Frames()
    labels: Labels = Labels()
    models: Models = field(default_factory=Models)
    several: Several = field(default_factory=Several)

    def main(self) -> None:
        """Encode, and say what the store holds."""
        store = run(self)
        if speaks():
            splits = store.pairs["split"].to_pylist()
            counts = ", ".join(f"{splits.count(each):,} {each}" for each in ("train", "validation", "test"))
            print(f"{len(store.videos):,} clips and {len(store.pairs):,} pairs ({counts}) in {store.folder}")


def run(config: Encode) -> Any:
    """Encode the set; returns the opened store."""
    from prism.backbone.videos import call_frames
    from prism.loading import crew_of_backbone
    from prism.preference.caches import LatentCache
    from prism.preference.readers import read

    whole("--unit", config.unit, 1, 100_000)
    config.several.check()
    number("--margin", config.labels.margin, 0)
    held_out = shares_of(config.labels.held_out)
    chosen = [
        f"--{name}" for name in ("fps", "start", "fit") if getattr(config.frames, name) != getattr(Frames(), name)
    ]
    if config.latents and chosen:
        raise PrismError(f"With --latents no clip is decoded, and {chosen[0]} has no meaning; leave one of them out.")
    cache = LatentCache.open(config.latents) if config.latents else None
    preference_set = read(config.file, config.form, root=config.root, encoding=config.encoding)
    from prism.training.encode import encode

    models, several = config.models, config.several
    with crew_of_backbone(
        models.backbone, models.device, models.dtype, ray=several.ray, workers=several.ray_workers
    ) as (crew, call):
        policy, call = crew.ask(partial(call_frames, call=call, **asdict(config.frames)))
        return encode(
            preference_set,
            crew,
            call,
            policy,
            config.output.out,
            rule=config.labels.rule,
            margin=config.labels.margin,
            soft=config.labels.soft,
            held_out=held_out,
            unit=config.unit,
            resume=config.output.resume,
            latents=cache,
        )


def shares_of(text: str) -> tuple[float, float]:
    """The shares in the text of --held-out."""
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise PrismError(
            f'The --held-out "{quoted(text, 60)}" must be two shares apart by a comma, such as 0.1,0.1.'
        ) from None
    return first, second
