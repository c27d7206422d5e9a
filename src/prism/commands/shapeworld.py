"""`prism shapeworld`: the embedded model and its labelled candidates, made anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prism.commands.options import Repeated, Replacing, Resuming, Seed, named, said


@dataclass(frozen=True)
class Train:
    """Train the embedded model from scratch; its pipeline is saved once both parts are done.

    Takes hours on two cores. A run that was stopped or killed goes on with --resume.
    """

    output: Resuming
    part: Annotated[str, named("NAME")] = "all"
    """vae, transformer, or all: the VAE comes first."""
    steps: Annotated[int | None, said("4000 vae, 16000 transformer")] = None
    """Optimiser steps."""
    batch_size: Annotated[int | None, said("8 vae, 32 transformer")] = None
    """Videos of a step."""
    learning_rate: Annotated[float | None, said("0.0015 vae, 0.001 transformer")] = None
    """AdamW's highest step size."""
    layers: Annotated[int | None, said("6")] = None
    """Blocks of the transformer."""
    heads: Annotated[int | None, said("4")] = None
    """Attention heads; the width is 32 a head."""
    start: Annotated[str | None, said(metavar="FOLDER")] = None
    """Earlier weights to train on: a VAE (its encoder is kept), or a transformer and its text encoder."""
    seed: Seed = 0
    device: Annotated[str, named("NAME")] = "cpu"
    """Where to compute: cpu, cuda, mps."""

    def main(self) -> None:
        """Train the part, or both."""
        from prism.shapeworld import train

        settings = {name: value for name, value in vars(self).items() if name != "output"}
        train.run(self.output.out, resume=self.output.resume, **settings)


@dataclass(frozen=True)
class Candidates:
    """Sample candidates of ShapeWorld prompts and label them by the referee."""

    output: Replacing
    split: Annotated[
        tuple[str, ...], Repeated, said("train:750x4 validation:40x6 test:100x4", "NAME[:PROMPTS[xEACH]]")
    ] = ()
    """train, validation, test or unseen; may be repeated."""
    trajectories: bool = False
    """Keep the states met while sampling too."""
    seed: Seed = 0

    def main(self) -> None:
        """Sample and label them."""
        from prism.loading import check_alone
        from prism.shapeworld import candidates

        check_alone("shapeworld candidates")
        splits = dict(candidates.parse_share(text) for text in self.split) if self.split else candidates.SHIPPED
        named = "".join(f" --split {text}" for text in self.split) + (" --trajectories" if self.trajectories else "")
        command = f"prism shapeworld candidates{named} --seed {self.seed}"
        out, overwrite = self.output.out, self.output.overwrite
        candidates.run(
            out, splits, seed=self.seed, trajectories=self.trajectories, overwrite=overwrite, command=command
        )


@dataclass(frozen=True)
class Quality:
    """Referee what a generator samples: scores, how often each part of a prompt is right, how candidates differ."""

    output: Replacing
    backbone: Annotated[str, named("NAME")] = "default"
    """default, early, small, or the folder of a training run."""
    step: Annotated[tuple[int, ...], Repeated, named("INT")] = ()
    """Steps at which that run kept its weights."""
    prompts: int = 100
    """Prompts of each kind."""
    per_prompt: int = 2
    """Videos of each prompt."""
    split: Annotated[str, named("NAME")] = "validation"
    """Whose prompts."""
    guidance_scale: Annotated[float | None, said("the default call's")] = None
    """Classifier-free guidance."""
    seed: Seed = 0

    def main(self) -> None:
        """Sample, measure and write quality.json."""
        from prism.loading import check_alone
        from prism.shapeworld import candidates

        check_alone("shapeworld quality")
        candidates.quality(
            self.output.out,
            self.backbone,
            self.step,
            self.prompts,
            self.per_prompt,
            self.split,
            self.guidance_scale,
            self.seed,
            self.output.overwrite,
        )


@dataclass(frozen=True)
class Weaker:
    """Save the transformer and text encoder of a run, or of a step of it, as an embedded weaker backbone."""

    run: Annotated[Path, tyro.conf.Positional, named("RUN")]
    """Folder of a training run."""
    output: Replacing
    step: Annotated[int | None, said("the end")] = None
    """A step at which the run kept its weights."""

    def main(self) -> None:
        """Save it."""
        from prism.shapeworld import candidates

        candidates.save_weaker(self.run, self.output.out, self.step, self.output.overwrite)
