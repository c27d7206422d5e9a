"""Tiny real diffusers pipelines with a ControlNet, each of the parts of one without; see `tests.zoo.images`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    MultiControlNetModel,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from tests.zoo.latte_to_qwen import flux, qwen_image
from tests.zoo.unets import _mask, _one_text, sd15, sd15_inpaint, sdxl
from tests.zoo.wan_to_kandinsky import _image, _quiet

Built = tuple[Any, dict[str, Any]]


def _filled(net: Any) -> Any:
    """A ControlNet whose outputs are as if trained: from a fresh one they are zeros."""
    for name, value in net.named_parameters():
        if not value.any():
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
            value.data.copy_(0.2 * noise)
    return net.eval()


def _with(kind: type, built: Built, net: Any, **changes: Any) -> Built:
    """A pipeline of the parts of another and a ControlNet."""
    pipe, call = built
    taken = inspect.signature(kind).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    own = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    return _quiet(kind(**parts, **own, controlnet=net)), {**call, **changes}


def _sd15() -> Built:
    """`sd15` with a scheduler that says what is predicted."""
    pipe, call = sd15()
    pipe.scheduler = _one_text()["scheduler"]
    return pipe, call


def _of_unet(unet: Any) -> Any:
    return _filled(ControlNetModel.from_unet(unet, conditioning_channels=3))


def sd15_two_controlnets() -> Built:
    """As `sd15`, with two ControlNets, which guess: they see the conditional rows alone."""
    built = _sd15()
    nets = MultiControlNetModel([_of_unet(built[0].unet), _of_unet(built[0].unet)])
    more = {"image": [_image(64, 96)] * 2, "controlnet_conditioning_scale": [0.5, 0.8], "guess_mode": True}
    return _with(StableDiffusionControlNetPipeline, built, nets, **more)


def sd15_controlnet_inpaint() -> Built:
    """As `sd15_inpaint`, with a ControlNet, which does not see the mask."""
    built = sd15_inpaint()
    net = _of_unet(sd15()[0].unet)
    more = {"image": _image(64, 96), "mask_image": _mask(), "control_image": _image(64, 96)}
    return _with(StableDiffusionControlNetInpaintPipeline, built, net, **more)


def sdxl_controlnet() -> Built:
    """As `sdxl`."""
    built = sdxl()
    return _with(StableDiffusionXLControlNetPipeline, built, _of_unet(built[0].unet), image=_image(64, 96))


def flux_controlnet() -> Built:
    """As `flux`."""
    built = flux()
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
    with warnings.catch_warnings(action="ignore"):  # it uses a class of diffusers that is going
        net = FluxControlNetModel.from_transformer(built[0].transformer, **sizes)
    return _with(FluxControlNetPipeline, built, _filled(net), control_image=_image(32, 48))


def qwen_image_controlnet() -> Built:
    """As `qwen_image`."""
    built = qwen_image()
    transformer = built[0].transformer
    net = QwenImageControlNetModel.from_transformer(
        transformer, num_layers=1, attention_head_dim=12, num_attention_heads=2
    )
    return _with(QwenImageControlNetPipeline, built, _filled(net), control_image=_image(32, 48))


BUILDERS: dict[str, Callable[[], Built]] = {
    "sd15_two_controlnets": sd15_two_controlnets,
    "sd15_controlnet_inpaint": sd15_controlnet_inpaint,
    "sdxl_controlnet": sdxl_controlnet,
    "flux_controlnet": flux_controlnet,
    "qwen_image_controlnet": qwen_image_controlnet,
}
