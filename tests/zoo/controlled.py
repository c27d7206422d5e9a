"""Tiny real diffusers pipelines with a ControlNet, each of the parts of one without; see `tests.zoo.images`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    MultiControlNetModel,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImagePipeline,
)
from tests.zoo.images import _z_image, sana
from tests.zoo.latte_to_qwen import flux, qwen_image
from tests.zoo.unets import _one_text, _unet, animatediff, sd15, sdxl
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


def _deeper(built: Built, **layers: int) -> Built:
    """With so many blocks that the tap stands behind those after which a ControlNet's first outputs are added."""
    pipe, call = built
    pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, **layers}).eval()
    return pipe, call


def _sd15() -> Built:
    """`sd15` with a scheduler that says what is predicted."""
    pipe, call = sd15()
    pipe.scheduler = _one_text()["scheduler"]
    return pipe, call


def _of_unet(unet: Any) -> Any:
    return _filled(ControlNetModel.from_unet(unet, conditioning_channels=3))


def sd15_two_controlnets() -> Built:
    """As `sd15`, with two ControlNets in the first half, which guess: they see the conditional rows alone."""
    built = _sd15()
    nets = MultiControlNetModel([_of_unet(built[0].unet), _of_unet(built[0].unet)])
    more: dict[str, Any] = {
        "image": [_image(64, 96)] * 2,
        "controlnet_conditioning_scale": [0.5, 0.8],
        "guess_mode": True,
    }
    more["control_guidance_end"] = 0.6
    return _with(StableDiffusionControlNetPipeline, built, nets, **more)


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
    """As `qwen_image`; the ControlNet works from the second step on."""
    built = _deeper(qwen_image(), num_layers=4)
    transformer = built[0].transformer
    net = QwenImageControlNetModel.from_transformer(
        transformer, num_layers=1, attention_head_dim=12, num_attention_heads=2
    )
    more = {"control_image": _image(32, 48), "control_guidance_start": 0.2}
    return _with(QwenImageControlNetPipeline, built, _filled(net), **more)


def animatediff_controlnet() -> Built:
    """As `animatediff`; the ControlNet is one of images, and takes frames as rows."""
    pipe, call = animatediff()
    frames = {"conditioning_frames": [_image(64, 96)] * 2}
    return _with(AnimateDiffControlNetPipeline, (pipe, call), _of_unet(_unet()), **frames)


def sana_controlnet() -> Built:
    """As `sana`."""
    pipe, call = _deeper(sana(), num_layers=7)
    taken = inspect.signature(SanaControlNetModel).parameters
    config = {name: value for name, value in pipe.transformer.config.items() if name in taken}
    net = SanaControlNetModel(**{**config, "num_layers": 2})
    return _with(SanaControlNetPipeline, (pipe, call), _filled(net), control_image=_image(128, 256))


def z_image_controlnet() -> Built:
    """As `z_image`; the ControlNet's outputs are of the second and third block."""
    pipe, call = _deeper(_z_image(ZImagePipeline), n_layers=4)
    sizes = {"control_in_dim": 4, "dim": 24, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    net = ZImageControlNetModel(control_layers_places=[0, 1], control_refiner_layers_places=[0], **sizes)
    return _with(ZImageControlNetPipeline, (pipe, call), _filled(net), control_image=_image(32, 48))


BUILDERS: dict[str, Callable[[], Built]] = {
    "sd15_two_controlnets": sd15_two_controlnets,
    "sdxl_controlnet": sdxl_controlnet,
    "flux_controlnet": flux_controlnet,
    "qwen_image_controlnet": qwen_image_controlnet,
    "animatediff_controlnet": animatediff_controlnet,
    "sana_controlnet": sana_controlnet,
    "z_image_controlnet": z_image_controlnet,
}
