"""ShapeWorld: a small synthetic video world with an exact referee, and the generator trained on it (the embedded
default).

`pipeline()` is a plain diffusers `WanPipeline`, `CALL` its arguments; `prompts(split)` the prompts of train, validation
and test; `referee.score(video, prompt)` the truth about a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .assets import asset_folder
from .world import FPS, prompts

if TYPE_CHECKING:
    from diffusers import WanPipeline

__all__ = ["CALL", "FPS", "asset_folder", "pipeline", "prompts"]

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
    "max_sequence_length": 24,
}
"""Arguments of a call of the embedded pipeline; also in `call.json` beside its weights."""


def pipeline() -> WanPipeline:
    """The embedded generator, loaded from the package in float32. Raises PrismError where its files are missing or
    altered.
    """
    from . import recipe

    return recipe.load(asset_folder("pipeline"))
