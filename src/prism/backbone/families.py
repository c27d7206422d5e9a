"""One table of facts per family of pipelines: latent layout, clock, VAE normalisation, CFG form, text tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from prism.errors import PrismError

# Arguments of a denoiser call that carry one row per sample. Rows are taken by name and never by shape alone: a list
# of rotary positions may happen to be as long as the batch.
BATCHED = frozenset(
    [
        *("hidden_states", "sample", "timestep", "guidance", "pooled_projections", "image_embeds", "added_time_ids"),
        *("encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_image"),
        *("attention_mask", "encoder_attention_mask", "encoder_attention_mask_2", "condition_mask"),
    ]
)


@dataclass(frozen=True)
class Family:
    """Facts shared by pipelines with one latent layout, clock, VAE normalisation and form of guidance."""

    name: str
    pipelines: tuple[str, ...]
    blocks: str  # the denoiser's list of blocks
    text_embedder: str  # the denoiser's own text embedding: its output is D_vis wide and does not see the timestep
    cfg: Literal["two_calls", "one_batch"]  # conditional call first | one batch [unconditional, conditional]
    clock: Literal["flow", "ddpm"]
    layout: Literal["BCTHW", "BTCHW"]  # of the latents inside the sampling loop
    vae_normalisation: Literal["mean_std", "scale"]
    text_padding: Literal["zeros", "unknown"]  # what the text rows behind the prompt hold
    capture_with: Mapping[str, Any] = field(default_factory=dict)  # call arguments that spare work while capturing

    def level(self, scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise level `t` in [0, 1000] (0 clean, 1000 noise) as `(alpha, sigma, model timestep)`, each shaped like `t`.

        Flow (paper, Eq. 1): alpha = 1 - t/1000, sigma = t/1000. DDPM: the scheduler's own cumulative alphas at index
        t/1000 * T, and exactly clean at t = 0.
        """
        t = t.to(torch.float32)
        if not bool(((t >= 0) & (t <= 1000)).all()):
            raise PrismError(f"t must lie in [0, 1000], 0 clean and 1000 noise; found {t.tolist()}.")
        if self.clock == "flow":
            return 1 - t / 1000, t / 1000, t
        steps = len(scheduler.alphas_cumprod)
        index = (t.double() * steps / 1000).floor().clamp(max=steps - 1).long()
        kept = scheduler.alphas_cumprod.to(t.device)[index].to(torch.float32)
        kept = torch.where(t == 0, torch.ones_like(kept), kept)
        return kept.sqrt(), (1 - kept).sqrt(), index.to(torch.float32)

    def t_of(self, scheduler: Any, timestep: Any) -> float:
        """The noise level in [0, 1000] at which the model was called with `timestep`."""
        scale = 1000.0 if self.clock == "flow" else float(len(scheduler.alphas_cumprod))
        return 1000.0 * float(timestep) / scale

    def grid(self, config: Any, latents_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Token grid (T, H, W) of latents in the loop's layout."""
        size = dict(zip(self.layout, latents_shape))
        patch = config.patch_size
        p_t, p_h, p_w = (
            patch if not isinstance(patch, int) else (getattr(config, "patch_size_t", None) or 1, patch, patch)
        )
        return size["T"] // p_t, size["H"] // p_h, size["W"] // p_w

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents of the loop as the VAE's (B, C, T, H, W), or back: the permutation is its own inverse."""
        return latents if self.layout == "BCTHW" else latents.permute(0, 2, 1, 3, 4)

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        """VAE latents (B, C, T, H, W) to the scale of the sampling loop."""
        if self.vae_normalisation == "scale":
            return latents * vae.config.scaling_factor
        mean, inverse_std = _channel_statistics(vae, latents)
        return (latents - mean) * inverse_std

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of `normalise`, with the arithmetic of the pipelines."""
        if self.vae_normalisation == "scale":
            return 1 / vae.config.scaling_factor * latents
        mean, inverse_std = _channel_statistics(vae, latents)
        return latents / inverse_std + mean

    def text_mask(self, text: Tensor) -> Tensor | None:
        """Which rows of the text (B, Lt, D_text), before the embedder, are real tokens: (B, Lt) bool or None."""
        return text.ne(0).any(-1) if self.text_padding == "zeros" else None


def _channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(like.device, like.dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(like.device, like.dtype)
    return mean, inverse_std


FAMILIES: tuple[Family, ...] = (
    Family(
        name="wan",
        pipelines=("WanPipeline",),
        blocks="blocks",
        text_embedder="condition_embedder.text_embedder",
        cfg="two_calls",
        clock="flow",
        layout="BCTHW",
        vae_normalisation="mean_std",
        text_padding="zeros",  # no mask is passed: the padding is found as zero rows
        capture_with={"guidance_scale": 1.0},
    ),
    Family(
        name="cogvideox",
        pipelines=("CogVideoXPipeline",),
        blocks="transformer_blocks",
        text_embedder="patch_embed.text_proj",
        cfg="one_batch",
        clock="ddpm",
        layout="BTCHW",
        vae_normalisation="scale",
        text_padding="unknown",  # the text encoder runs without a mask, and the backbone attends to the padding too
        capture_with={"guidance_scale": 1.0},
    ),
)


def family_of(pipe: Any) -> Family:
    """The row of a pipeline, by the name of its class."""
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise PrismError(f"The pipeline {name} is not supported yet; use one of {known}.")
