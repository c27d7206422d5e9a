"""ShapeWorld backbones of several sizes and stages of training, which share the VAE that ships, made in one go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from prism import files, shapeworld
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.runs import IDENTITY, Parts, claim
from prism.shapeworld import candidates, generator, train

TOKENS = 80  # of a ShapeWorld video


@dataclass(frozen=True)
class Training:
    """A training of a transformer and its text encoder, some of whose steps become backbones.

    layers, heads: size of the transformer; its width is 32 a head. steps: of 32 videos; the learning rate falls over
    the last 30 %. snapshots: earlier steps whose averaged weights are kept. videos: that it learns from.
    """

    name: str
    layers: int
    heads: int
    steps: int
    snapshots: tuple[int, ...] = ()
    videos: int = 40_000
    seed: int = 0


TRAININGS = (
    Training("2x1", 2, 1, 4000, (1000,)),
    Training("3x2", 3, 2, 1000, (250, 500)),
    Training("4x3", 4, 3, 3000, (500, 1000)),
    Training("6x4", 6, 4, 4000, (250, 500, 2000)),
)
"""Twelve backbones beside the three that ship: from 0.05 M to 1.75 M parameters, about 60 minutes of one core."""


@dataclass(frozen=True)
class Member:
    """A backbone of a set.

    run: the training that it is a stage of, so that stages of one training can be left out together.
    parameters: of the transformer. compute: of its training, in FLOPs: 6 x parameters x tokens seen. folder: None for
    one that ships.
    """

    name: str
    run: str
    parameters: int
    compute: float
    folder: Path | None = None

    def load(self, device: str | None = None) -> Backbone:
        """The backbone."""
        home = shapeworld.asset_folder("pipeline")
        pipe = shapeworld.pipeline(self.name) if self.folder is None else generator.load_weaker(home, self.folder)
        return Backbone(pipe.to(device) if device else pipe)


def shipped() -> list[Member]:
    """The three backbones that ship. The early one is a stage of the default's training."""
    stages = {"default": ("6x4 shipped", 12_400), "early": ("6x4 shipped", 1000), "small": ("3x2 shipped", 4000)}
    members = []
    for name, (run, steps) in stages.items():
        parameters = _parameters(shapeworld.asset_folder("pipeline" if name == "default" else name))
        members.append(Member(name, run, parameters, _compute(parameters, steps)))
    return members


def make(out: Path, trainings: Sequence[Training] = TRAININGS, device: str = "cpu") -> list[Member]:
    """Train all of them in `out`, one after the other, and return their backbones; a run that was killed goes on.

    `out`, which may be a link, holds each training in `NAME`, with its checkpoints, and the weights of a backbone in
    `backbones/NAME-STEPS`. The latents that trainings of one seed and number of videos learn from are rendered once.

    Raises:
        PrismError: where `out/NAME` holds a training with other settings, or another process works in `out`.
    """
    names = [each.name for each in trainings]
    if len(set(names)) < len(names):
        raise PrismError(f"The trainings are named {', '.join(names)}; give each a name of its own.")
    held = claim(out.resolve(), {"command": "backbones"}, True, name=IDENTITY)  # a training checks its own settings
    members = []
    for each in trainings:
        members += _made(held, each, device)
    held.release()
    return members


def _made(held: Parts, training: Training, device: str) -> list[Member]:
    """The backbones of a training, which is run where they are missing."""
    run, members = held.folder / training.name, []
    for step in (*training.snapshots, training.steps):
        name = f"{training.name}-{step}"
        folder = held.folder / "backbones" / name
        if not folder.is_dir():
            if not (run / "transformer" / "text_encoder").is_dir():  # what a training saves last
                _train(held.folder, training, device)
            candidates.save_weaker(run, folder, None if step == training.steps else step)
        saved = files.read_json(folder / "training.json")
        for key in ("layers", "heads", "seed", "videos", "steps"):
            value = getattr(training, key)
            if saved.get(key) != value:
                raise PrismError(
                    f"The backbone in {files.shown(folder)} was trained with {key} {saved.get(key)}, and {value} is "
                    "asked for; name another folder."
                )
        parameters = _parameters(folder)
        members.append(Member(name, training.name, parameters, _compute(parameters, step), folder))
    return members


def _train(out: Path, training: Training, device: str) -> None:
    run = out / training.name
    settings = {key: value for key, value in asdict(training).items() if key != "name"}

    def copy(folder: Path) -> None:
        generator.load(shapeworld.asset_folder("pipeline")).vae.save_pretrained(folder)

    (run / "vae").mkdir(parents=True, exist_ok=True)
    Parts(run / "vae").piece("fitted/", partial(copy))
    pool = out / f"latents-{training.videos}-{training.seed}"
    pool.mkdir(exist_ok=True)
    train.run(run, "transformer", device, True, pool, **settings)


def _parameters(folder: Path) -> int:
    """Number of a transformer's parameters, from its file's header."""
    from safetensors import safe_open

    (path,) = (folder / "transformer").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _compute(parameters: int, steps: int) -> float:
    return 6.0 * parameters * steps * train.DEFAULTS["transformer"].batch_size * TOKENS
