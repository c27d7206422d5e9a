"""ShapeWorld: a small synthetic video world with an exact referee, and three generators trained on it: the embedded
default and two weaker ones.

`pipeline()` is a plain diffusers `WanPipeline`, and `CALL` holds its arguments; `prompts(split)` gives the prompts of
train, validation, test and unseen; `referee.score(video, prompt)` gives the true quality of a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prism.errors import PrismError
from prism.shapeworld.generator import asset_folder
from prism.shapeworld.grammar import prompts
from prism.shapeworld.world import FPS

if TYPE_CHECKING:
    from diffusers import WanPipeline

__all__ = ["BACKBONES", "CALL", "FPS", "asset_folder", "pipeline", "prompts"]

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "max_sequence_length": 24,
}
"""Arguments of a call of the embedded pipeline; `call.json` beside its weights holds the same."""


BACKBONES = {
    "default": "the generator itself",
    "early": "the same, stopped early in its training",
    "small": "a smaller transformer, trained on the same videos",
}
"""Names that `pipeline` takes; the weaker two share the default's VAE, tokenizer and scheduler."""


def pipeline(name: str = "default") -> WanPipeline:
    """The embedded generator, or a weaker one of `BACKBONES`, loaded from the package in float32.

    Raises PrismError where its files are missing or altered, and for another name."""
    if name not in BACKBONES:
        raise PrismError(f'There is no embedded backbone "{name}"; choose one of {", ".join(BACKBONES)}.')
    from prism.shapeworld import generator

    folder = asset_folder("pipeline")
    return generator.load(folder) if name == "default" else generator.load_weaker(folder, asset_folder(name))
