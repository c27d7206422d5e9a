"""Rows of facts of pipelines with a ControlNet, each a copy of the row of the same model without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prism.backbone.family import Family
from prism.backbone.image_families import IMAGES
from prism.backbone.unet_families import UNETS

_ROWS = {family.name: family for family in (*UNETS, *IMAGES)}
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
_BLOCKS = ("controlnet_block_samples",)
_WINDOW = dict.fromkeys(
    ("control_guidance_start", "control_guidance_end"),
    "whether a ControlNet works would go by the step, and a judge reads latents at a noise level",
)
_BEHIND = "the first block behind the middle of the U-Net, where the ControlNet's outputs have come in"


def _controlled(name: str, control_arguments: tuple[str, ...], *pipelines: str, **changes: Any) -> Family:
    """The row `name` for pipelines with a ControlNet, whose outputs are these arguments of the denoiser."""
    row = _ROWS[name]
    facts: dict[str, Any] = {
        "name": f"{name}-controlnet",
        "models": row.models.replace(" (images)", " with a ControlNet (images)"),
        "pipelines": pipelines,
        "control_arguments": control_arguments,
        "refused_arguments": {**row.refused_arguments, **_WINDOW},
    }
    if row.token_form == "frames":
        facts |= {"tap": 0.7, "tap_reason": _BEHIND}
    return replace(row, **{**facts, **changes})


CONTROLLED: tuple[Family, ...] = (
    _controlled(
        "stable-diffusion",
        _RESIDUALS,
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    _controlled(
        "stable-diffusion-xl",
        _RESIDUALS,
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    _controlled(
        "flux",
        ("controlnet_block_samples", "controlnet_single_block_samples"),
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        models="Flux.1 with a ControlNet (images)",
    ),
    _controlled("qwen-image", _BLOCKS, "QwenImageControlNetPipeline", models="Qwen-Image with a ControlNet (images)"),
)
