"""Encode videos to latents of the sampling loop and decode them, with the pipeline's own VAE."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone import layout
from prism.backbone.conditioning import Conditioning
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.family import Family
from prism.backbone.pipeline import config_of, dtype_of, tensor_of, vae_of
from prism.backbone.sounds import check_pictures
from prism.clips import FramePolicy
from prism.errors import PrismError, quoted, whole


def finished(pipe: Any, latents: Tensor, call: DenoiserCall) -> Tensor:
    """See `Backbone.finished`."""
    family = call.family
    if family.appends_conditions:
        latents = latents[:, : call.parted()[0].shape[1]]
    if family.restores_condition:
        condition = Conditioning.of(call, call.conditional(len(latents)), type(pipe))
        if condition.given is not None and condition.kept is not None:
            latents = torch.where(condition.given, condition.kept.to(latents.dtype), latents)
    if family.after_loop and hasattr(pipe, family.after_loop):
        change = getattr(pipe, family.after_loop)
        try:
            latents = torch.cat([tensor_of(change(row[None])) for row in latents])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise PrismError(
                f"{type(pipe).__name__}.{family.after_loop}, after_loop of the family {family.name!r}, does not take "
                f"latents (1, ...) and give others: {type(error).__name__}: {quoted(error, 160)}."
            ) from error
    return latents


def call_frames(
    backbone: Any,
    call: Mapping[str, Any],
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    **policy: Any,
) -> tuple[FramePolicy, dict[str, Any]]:
    """The policy that cuts a clip to the frames of a pipeline's call, and the call with their number and size.

    Args:
        backbone: a `Backbone`.
        call: the pipeline's arguments.
        num_frames, height, width: replace the call's; None: the call's, or the pipeline's default.
        **policy: further fields of `FramePolicy`.

    Raises:
        PrismError: where neither the arguments nor the pipeline's defaults hold one of them.
    """
    sizes: dict[str, int] = {}
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        given = call.get(name) if value is None else value
        size = backbone.default(name) if given is None else whole(name, given)
        if size is None and backbone.takes(name):
            raise PrismError(f"The pipeline states no {name}; give --{name.replace('_', '-')}.")
        sizes[name] = size or 1  # image pipelines have one frame
    full = {**call, **{name: size for name, size in sizes.items() if backbone.takes(name)}}
    return FramePolicy(**{**policy, **sizes}), full


def encode_frames(backbone: Any, frames: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Latents (1, ...) of one video (T, H, W, 3), encoded by itself.

    Raises PrismError where their shape is not `shape`, that of the latents that the pipeline makes.
    """
    latents: Tensor = backbone.encode(frames[None])
    if tuple(latents.shape[1:]) != tuple(shape):
        raise PrismError(
            f"{len(frames)} frame{'s' if len(frames) > 1 else ''} of {frames.shape[1]} x {frames.shape[2]} "
            f"give{'s' if len(frames) == 1 else ''} latents {tuple(latents.shape[1:])}, and the pipeline makes "
            f"{tuple(shape)} at its own arguments; give --height, --width and --num-frames that it takes."
        )
    return latents


@torch.no_grad()
def encode(pipe: Any, family: Family, config: Mapping[str, Any], video: Tensor) -> Tensor:
    """See `Backbone.encode`; `config` is the denoiser's."""
    check_pictures(pipe, family)
    if family.vae_batch_size_one and len(video) > 1:
        return torch.cat([encode(pipe, family, config, row[None]) for row in video])
    vae = vae_of(pipe)
    pixels = video.to(dtype_of(vae)).permute(0, 4, 1, 2, 3) * 2 - 1
    if dropped := family.dropped_frames(config):
        pixels = torch.cat([pixels[:, :, :1].expand(-1, -1, dropped, -1, -1), pixels], 2)
    if family.vae_frame_by_frame:
        frames = _mode(vae, pixels.transpose(1, 2).flatten(0, 1))
        latents = frames.unflatten(0, (len(pixels), -1)).transpose(1, 2).float()
    else:
        latents = _mode(vae, pixels).float()
    if extra := family.num_extra_frames:
        first, last = latents[:, :, :1], latents[:, :, -1:]
        more = (first if family.extra_frames == "before" else last).expand(-1, -1, extra, -1, -1)
        latents = torch.cat([more, latents] if family.extra_frames == "before" else [latents, more], 2)
    if family.token_form != "frames" and (missing := -latents.shape[2] % family.patches(config)[0]):
        latents = torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], 2)
    return layout.pack(normalise(family, pipe, latents), family.layout).contiguous()


@torch.no_grad()
def decode(
    pipe: Any,
    family: Family,
    config: Mapping[str, Any],
    latents: Tensor,
    grid: layout.Grid | None,
    num_frames: int | None = None,
) -> Tensor:
    """See `Backbone.decode`."""
    check_pictures(pipe, family)
    num_frames = None if num_frames is None else whole("num_frames", num_frames)
    if not layout.is_packed(family.layout) and latents.ndim != len(family.layout.rstrip("2")):
        raise PrismError(f"The latents must be ({', '.join(family.layout)}); found the shape {tuple(latents.shape)}.")
    if family.vae_batch_size_one and len(latents) > 1:
        return torch.cat([decode(pipe, family, config, row[None], grid, num_frames) for row in latents])
    vae = vae_of(pipe)
    if layout.is_packed(family.layout) and grid is None:
        raise PrismError("The latents of this pipeline are packed; give the token grid (T, H, W) to decode them.")
    latents = layout.unpack(latents.to(dtype_of(vae)), family.layout, grid)
    ratio = getattr(pipe, "vae_scale_factor_temporal", None)
    if num_frames is not None and ratio is not None:
        of_video = (num_frames - 1) // int(ratio) + 1 + family.dropped_frames(config) // int(ratio)
        count = min(latents.shape[2], of_video)
        latents = latents[:, :, -count:] if family.extra_frames == "before" else latents[:, :, :count]
    elif extra := family.num_extra_frames:
        latents = latents[:, :, extra:] if family.extra_frames == "before" else latents[:, :, :-extra]
    latents = denormalise(family, pipe, latents)
    if family.vae_frame_by_frame:
        frames = latents.transpose(1, 2).flatten(0, 1)
        # From the signature of `forward`, as the pipelines do: some versions of diffusers wrap `decode`, which hides
        # its signature.
        takes_num_frames = "num_frames" in inspect.signature(getattr(vae, "forward", vae.decode)).parameters
        options: dict[str, Any] = {"num_frames": latents.shape[2]} if takes_num_frames else {}
        if "force_not_quantize" in inspect.signature(vae.decode).parameters:  # a MoVQ's
            options["force_not_quantize"] = True
        pixels: Tensor = tensor_of(vae.decode(frames, **options)).unflatten(0, (len(latents), -1))
    else:
        options = {}
        if family.decode_num_frames is not None:
            options["num_frames"] = family.decode_num_frames(latents.shape[2])
        if config_of(vae).get("timestep_conditioning"):  # LTX-Video's decoder may take a noise level; it gets 0
            options["temb"] = latents.new_zeros(len(latents))
        pixels = tensor_of(vae.decode(latents, **options))
        pixels = pixels.transpose(1, 2) if family.decoded_layout == "BCTHW" else pixels
    pixels = pixels[:, family.dropped_frames(config) :]
    return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 1, 3, 4, 2).float()


def normalise(family: Family, pipe: Any, latents: Tensor) -> Tensor:
    """VAE latents (B, C, T, H, W) to the scale of the sampling loop."""
    if family.vae_mean_std:
        mean, inverse_std = _channel_statistics(vae_of(pipe), latents)
        latents = (latents - mean) * inverse_std
    return (latents - _shift(family, pipe)) * _factor(family, pipe)


def denormalise(family: Family, pipe: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalise`, with the arithmetic of the pipelines."""
    if family.vae_factor:
        latents = 1 / _factor(family, pipe) * latents + _shift(family, pipe)
    if family.vae_mean_std:
        mean, inverse_std = _channel_statistics(vae_of(pipe), latents)
        latents = latents / inverse_std + mean
    return latents


def _factor(family: Family, pipe: Any) -> float:
    if not family.vae_factor:
        return 1.0
    return float(config_of(pipe.scheduler if family.vae_factor == "sigma_data" else vae_of(pipe))[family.vae_factor])


def _shift(family: Family, pipe: Any) -> float:
    return float(config_of(vae_of(pipe)).get("shift_factor") or 0.0) if family.vae_shift else 0.0


def _channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """latents_mean and 1 / latents_std for latents (B, C, T, H, W): one value per channel, or per channel and frame."""
    config = config_of(vae)
    if (norm := getattr(vae, "bn", None)) is not None:  # of Flux.2: statistics of squares of 2 x 2 cells
        statistics = (norm.running_mean, torch.rsqrt(norm.running_var + config["batch_norm_eps"]))
        tiles = (1, 1, 1, like.shape[3] // 2, like.shape[4] // 2)
        means, inverses = (each.view(1, -1, 1, 2, 2).repeat(tiles).to(like) for each in statistics)
        return means, inverses
    names = ("latents_mean", "latents_std")  # buffers of the VAE in LTX-Video
    mean, std = (config[name] if name in config else getattr(vae, name, None) for name in names)
    if mean is None or std is None:
        return like.new_zeros(()), like.new_ones(())
    frames = like.shape[2]
    try:
        mean, std = (torch.as_tensor(v).view(1, like.shape[1], -1, 1, 1)[:, :, :frames] for v in (mean, std))
    except (TypeError, ValueError, RuntimeError) as error:
        raise PrismError(
            f"The {' and '.join(names)} of {type(vae).__name__} must hold a number for each of the {like.shape[1]} "
            f"channels of its latents; found {quoted(mean, 80)} and {quoted(std, 80)}."
        ) from error
    return mean.to(like.device, like.dtype), (1.0 / std).to(like.device, like.dtype)


def _mode(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mode, or the latents of a VAE that returns latents; a VAE that samples them is seeded."""
    with _seeded(pixels.device):
        latents = vae.encode(pixels)
    if isinstance(latents, tuple):
        latents = latents[0]
    for name in ("latent_dist", "latents", "latent", "sample"):
        if not isinstance(latents, Tensor) and not hasattr(latents, "mode"):
            latents = getattr(latents, name, latents)
    if isinstance(latents, Tensor):
        return latents
    if not hasattr(latents, "mode"):
        raise PrismError(
            f"{type(vae).__name__}.encode gives {type(latents).__name__}; latents are needed, themselves, first in a "
            "tuple, as .latents, or as a posterior .latent_dist with a .mode()."
        )
    mode: Tensor = latents.mode()
    return mode


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """While open the global generators of CPU and device are seeded; their state is restored afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(0)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(0)
        yield
