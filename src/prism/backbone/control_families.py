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
_BEHIND = "the first block behind the middle of the U-Net, where the ControlNet's outputs have come in"


def _controlled(name: str, control_arguments: tuple[str, ...], *pipelines: str, **changes: Any) -> Family:
    """The row `name` for pipelines with a ControlNet, whose outputs are these arguments of the denoiser."""
    row = _ROWS[name]
    facts: dict[str, Any] = {
        "name": f"{name}-controlnet",
        "models": row.models.replace(" (images)", " with a ControlNet (images)"),
        "pipelines": pipelines,
        "control_arguments": control_arguments,
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
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
    ),
    _controlled(
        "animatediff",
        _RESIDUALS,
        "AnimateDiffControlNetPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        models="AnimateDiff with a ControlNet",
        image_form="single",
        batch_size_one=True,  # its pipelines repeat the frames of the control for no batch
    ),
    _controlled("sana", _BLOCKS, "SanaControlNetPipeline"),
    _controlled(
        "z-image",
        _BLOCKS,
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        batched_arguments=_ROWS["z-image"].batched_arguments | {"control_context"},
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
