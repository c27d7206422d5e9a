"""Open-Sora 1.2 (STDiT3) as a pipeline: modules that the user builds, in their published sampling loop.

Nothing is imported from Open-Sora. This is the worked example of `prism.backbone.Pipeline`, a backbone outside
diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from tqdm import tqdm

from prism.backbone.family import Family
from prism.backbone.pipeline import dtype_of
from prism.errors import PrismError

CHUNK, LATENT_CHUNK, STRIDE = 17, 5, 4  # the VAE turns 17 frames into 5 latent ones; of a remainder, 4 into 1
IMAGE_FPS = 120  # the fps that the model was trained with for single images


def frames_of(latent_frames: int) -> int:
    """The number of frames to decode from latent frames: 1, or whole chunks and the largest remainder."""
    if latent_frames == 1:
        return 1
    chunks, rest = divmod(latent_frames, LATENT_CHUNK)
    return chunks * CHUNK + rest * STRIDE


OPEN_SORA = Family(
    name="open-sora",
    models="Open-Sora 1.2 (STDiT3)",
    pipelines=("OpenSoraPipeline",),
    blocks=("temporal_blocks",),  # each runs after the spatial block of its index; both give (B, T H W, D)
    cfg="one_batch",
    conditional_first=True,
    latents_argument=("x",),
    text_argument="y",  # (B, 1, Lt, width)
    text_mask_argument="mask",
    batched_arguments=frozenset(["x", "timestep", "y", "mask", "fps", "height", "width"]),
    returns_tensor=True,
    pads=True,
    widths="hidden_size",
    text_embedder="y_embedder",
    text_padding="mask",
    text_reason="T5's, projected to the video's width before the first block",
    tap_reason="as deep as the paper's block 12 of 30: 11 of 28, each behind its spatial one",
    decode_num_frames=frames_of,  # the VAE normalises by itself
)


class RectifiedFlow:
    """The published sampler: even timesteps from 1000 down, shifted towards noise for larger and longer videos.

    The model's velocity is data minus noise, so that a step adds it. (`FlowMatchEulerDiscreteScheduler` divides in
    another order; results differ in the last bit.)
    """

    num_train_timesteps = 1000

    def set_timesteps(self, num_inference_steps: int, ratio: Tensor) -> None:
        """Set `timesteps` (S,), float32, falling from 1000, all above 0. ratio: (1,), from `timestep_ratio`."""
        even = [(1.0 - step / num_inference_steps) * self.num_train_timesteps for step in range(num_inference_steps)]
        share = torch.tensor(even, device=ratio.device) / self.num_train_timesteps
        self.timesteps = ratio * share / (1 + (ratio - 1) * share) * self.num_train_timesteps
        self.index = 0

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """The latents (B, C, T, H, W) at the next timestep; clean after the last one."""
        upcoming = self.timesteps[self.index + 1] if self.index + 1 < len(self.timesteps) else 0
        share = (self.timesteps[self.index] - upcoming) / self.num_train_timesteps
        self.index += 1
        return latents + velocity * share.view(1, 1, 1, 1, 1)


def timestep_ratio(height: int, width: int, num_frames: int, like: Tensor) -> Tensor:
    """The shift of the timesteps, (1,): sqrt(pixels / 512^2) sqrt(latent frames), in the dtype of `like`."""
    pixels, frames = like.new_tensor([height]) * like.new_tensor([width]), like.new_tensor([num_frames])
    latent_frames = frames if num_frames == 1 else frames // CHUNK * LATENT_CHUNK
    return (pixels / 512**2).sqrt() * latent_frames.sqrt()


class Output(NamedTuple):
    """The result of a call. frames: one video per prompt, in the form of `output_type`."""

    frames: Any


class OpenSoraPipeline:
    """Open-Sora 1.2 as a `prism.backbone.Pipeline`. Text to video; no reference frames, no loops.

    Args:
        transformer: an `STDiT3`.
        vae: a `VideoAutoencoderPipeline`; it has `get_latent_size`, `out_channels`, `encode` and
            `decode(latents, num_frames=)`, and normalises by itself.
        text_encoder, tokenizer: T5's: `.t5.model` and `.t5.tokenizer` of Open-Sora's `T5Encoder`.
        clean: cleans a prompt before the tokenizer, such as Open-Sora's `text_preprocessing`; None: no cleaning.
    """

    family = OPEN_SORA

    def __init__(
        self,
        transformer: nn.Module,
        vae: Any,
        text_encoder: nn.Module,
        tokenizer: Any,
        clean: Callable[[str], str] | None = None,
    ):
        self.transformer, self.vae, self.text_encoder, self.tokenizer = transformer, vae, text_encoder, tokenizer
        self.scheduler, self.clean = RectifiedFlow(), clean
        self._progress_bar_config: dict[str, Any] = {}

    @property
    def components(self) -> dict[str, Any]:
        names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int = 240,
        width: int = 426,
        num_frames: int = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        fps: float = 24,
        max_sequence_length: int = 300,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
    ) -> Output:
        """Sample a video per prompt.

        Args:
            height, width: size of the frames, in pixels.
            num_frames: 1 for an image, or 17 and more; the model was trained on 51, 102, ...
            guidance_scale: above 1, a step is one denoiser call of the prompts followed by as many null texts.
            fps: frames per second that the model is conditioned on; an image gets 120.
            max_sequence_length: text tokens, at most those of the model's null text; a longer prompt is cut off.
            generator: one, or a list with one per row.
            output_type: "np" (B, F, H, W, 3) in [0, 1], "pt", "pil" or "latent" (B, C, T, h, w).
        """
        if num_frames != 1 and num_frames < CHUNK:
            raise PrismError(f"num_frames must be 1 or at least {CHUNK}; found {num_frames}.")
        weight = next(self.transformer.parameters())
        like = torch.empty(0, device=weight.device, dtype=weight.dtype)
        y, mask = self.encode_prompt([prompt] if isinstance(prompt, str) else list(prompt), max_sequence_length)
        rows, guided = len(y), guidance_scale > 1
        if guided:
            null = self._null()[: y.shape[2]]
            y, mask = (
                torch.cat([y, null.expand(rows, 1, -1, -1)]),
                mask.repeat(2, 1),
            )  # the null texts take the prompts' masks
        sizes = {"fps": fps if num_frames > 1 else IMAGE_FPS, "height": height, "width": width}
        conditions = {"y": y, "mask": mask, **{name: like.new_full((len(y),), value) for name, value in sizes.items()}}
        shape = (rows, self.vae.out_channels, *self.vae.get_latent_size((num_frames, height, width)))
        latents = randn_tensor(shape, generator=generator, device=like.device, dtype=like.dtype)
        self.scheduler.set_timesteps(num_inference_steps, timestep_ratio(height, width, num_frames, like))
        for timestep in tqdm(self.scheduler.timesteps, **self._progress_bar_config):
            model_input = torch.cat([latents, latents]) if guided else latents
            output = self.transformer(model_input, timestep.expand(len(model_input)), **conditions)
            velocity = output[:, : shape[1]]  # the other channels are a variance, which sampling does not use
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, latents)
        if output_type == "latent":
            return Output(latents)
        pixels = self.vae.decode(latents.to(dtype_of(self.vae)), num_frames=num_frames)
        return Output(VideoProcessor().postprocess_video(pixels, output_type=output_type))

    def encode_prompt(self, prompt: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
        """Texts as the denoiser takes them, (B, 1, Lt, width), and the mask of their real tokens, (B, Lt)."""
        most_tokens = len(self._null())
        if max_sequence_length > most_tokens:
            raise PrismError(
                f"max_sequence_length must be at most {most_tokens} for this model; found {max_sequence_length}."
            )
        cleaned = [text if self.clean is None else self.clean(text) for text in prompt]
        form: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(cleaned, max_length=max_sequence_length, **form).to(self.text_encoder.device)
        encoded = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        device = next(self.transformer.parameters()).device
        return encoded.last_hidden_state[:, None].to(device), tokens.attention_mask.to(device)

    def _null(self) -> Tensor:
        """The null text that guidance was trained with, before its embedder: (Lt, width)."""
        return self.transformer.y_embedder.y_embedding  # type: ignore[union-attr,return-value]
