"""A pipeline of a user's own, saved and loaded as diffusers does, of classes that diffusers does not have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from tests import tiny


class OwnTransformer(WanTransformer3DModel, ModelMixin):  # type: ignore[misc]  # diffusers looks for its base here
    """A denoiser whose class diffusers does not know."""


class OwnOutput(BaseOutput):  # type: ignore[misc]
    frames: Any = None


class OwnPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to video in forty lines, with a callback of the usual kind."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, scheduler: Any, transformer: Any):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )

    def encode(self, texts: list[str]) -> torch.Tensor:
        form: dict[str, Any] = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": "pt"}
        told = self.tokenizer(texts, **form)
        return self.text_encoder(told.input_ids, told.attention_mask)[0] * told.attention_mask[..., None]

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        height: int = 32,
        width: int = 32,
        num_frames: int = 9,
        num_inference_steps: int = 4,
        guidance_scale: float = 4.0,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        told, empty = self.encode(texts), self.encode([""] * len(texts))
        shape = (len(texts), 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
        latents = randn_tensor(shape, generator=generator, device=told.device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            form = {"hidden_states": latents, "timestep": t.expand(len(latents)), "return_dict": False}
            found = self.transformer(encoder_hidden_states=told, **form)[0]
            if guidance_scale > 1:
                other = self.transformer(encoder_hidden_states=empty, **form)[0]
                found = other + guidance_scale * (found - other)
            latents = self.scheduler.step(found, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return OwnOutput(frames=latents) if return_dict else (latents,)
        config = self.vae.config
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        pixels = self.vae.decode(latents * std + mean, return_dict=False)[0]
        frames = VideoProcessor(vae_scale_factor=8).postprocess_video(pixels, output_type=output_type)
        return OwnOutput(frames=frames) if return_dict else (frames,)


def own() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6); tokens (18, 24)."""
    parts = tiny.wan().components
    transformer = OwnTransformer.from_config(parts["transformer"].config)
    transformer.load_state_dict(parts["transformer"].state_dict())
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    pipe = OwnPipeline(**{name: parts[name] for name in names}, transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 4.0}
