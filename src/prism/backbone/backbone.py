"""A frozen generator, read: conditioning by capture, noisy latents, tokens after a block, videos and latents."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from prism.backbone.conditioning import Conditioning, Tokens, noisy_name
from prism.backbone.families import family_of
from prism.backbone.interceptor import StopForward, capture
from prism.errors import PrismError

_CACHE_BYTES = 256 * 2**20
_IRRELEVANT = {
    "guidance_scale",
    "guidance_scale_2",
    "num_inference_steps",
    "negative_prompt",
    "output_type",
    "negative_prompt_embeds",
}
_IRRELEVANT |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator", "return_dict"}


class Backbone:
    """A supported diffusers pipeline, frozen, as a judge and a sampler read it (DESIGN: backbone).

    Attributes: `pipe`; `family`, its row of facts; `denoiser` and its `blocks`; `num_blocks`; `width`, D_vis;
    `default_tap`, the number of blocks a head reads after when nothing else is said (paper, section 3.2: 12 of 30).
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.family = family_of(pipe)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.denoisers = tuple(module for name, module in parts.items() if name.startswith("transformer"))
        self.denoiser = pipe.transformer
        self.text_encoders: dict[str, nn.Module] = {
            name: module for name, module in parts.items() if name.startswith("text_encoder")
        }
        for module in parts.values():
            module.requires_grad_(False).eval()
        self.blocks: Sequence[nn.Module] = self.denoiser.get_submodule(self.family.blocks)
        self.num_blocks = len(self.blocks)
        self.width: int = self.denoiser.config.num_attention_heads * self.denoiser.config.attention_head_dim
        self.default_tap = max(1, round(0.4 * self.num_blocks))
        self.num_parameters = sum(value.numel() for value in self.denoiser.parameters())
        self._call = inspect.signature(type(pipe).__call__).parameters
        self._conditionings: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()

    @classmethod
    def from_pretrained(cls, id_or_folder: str, **kwargs: Any) -> Backbone:
        """Load a pipeline from a folder or the Hub. Safetensors only; `kwargs` go to diffusers."""
        try:
            return cls(DiffusionPipeline.from_pretrained(str(id_or_folder), **{"use_safetensors": True, **kwargs}))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PrismError(f"No diffusers pipeline could be loaded from {id_or_folder}: {reason}") from error

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    # -- reading

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], **call: Any) -> Conditioning:
        """What the denoiser is told about each prompt: (B rows), captured from the stock call `pipe(prompts, **call)`.

        `call` holds the pipeline's own arguments (height, width, num_frames, ...). A prompt is encoded once; later
        calls take it from a cache. Raises PrismError for an empty or over-long prompt or an unknown argument.
        """
        self.check_call(prompts, call)
        relevant = {name: value for name, value in call.items() if name not in _IRRELEVANT}
        key = _key(relevant)
        found: dict[str, Conditioning] = {}
        missing = list(dict.fromkeys(prompts))
        if key is not None:
            found = {
                prompt: self._conditionings[key, prompt] for prompt in missing if (key, prompt) in self._conditionings
            }
            missing = [prompt for prompt in missing if prompt not in found]
        for start in range(0, len(missing), 16):
            chunk = missing[start : start + 16]
            captured = self._capture(chunk, relevant)
            for row, prompt in enumerate(chunk):
                found[prompt] = captured[row]
                if key is not None:
                    self._conditionings[key, prompt] = captured[row]
        self._trim_cache()
        return Conditioning.cat([found[prompt] for prompt in prompts])

    def _capture(self, prompts: list[str], call: dict[str, Any]) -> Conditioning:
        one_step = {"num_inference_steps": 1, "output_type": "latent"}
        generator = [torch.Generator("cpu").manual_seed(0) for _ in prompts]  # never the global one
        call = {**call, **one_step, **self.family.capture_with, "prompt": prompts, "generator": generator}
        arguments = capture(self.pipe, self.denoisers, call)
        batch = len(arguments[noisy_name(arguments)])
        if batch not in (len(prompts), 2 * len(prompts)):
            raise PrismError(
                f"The pipeline made {batch} rows of {len(prompts)} prompts; leave num_videos_per_prompt at 1."
            )
        return Conditioning.of(arguments, slice(batch - len(prompts), batch))

    def _trim_cache(self) -> None:
        def size(entry: Conditioning) -> int:
            return sum(value.nbytes for name, value in entry.arguments.items() if name in entry.batched)

        total = sum(size(entry) for entry in self._conditionings.values())
        while total > _CACHE_BYTES:
            total -= size(self._conditionings.popitem(last=False)[1])

    def add_noise(self, latents: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps (paper, Eq. 1).

        latents, noise: (B, ...) in the loop's layout. t: scalar or (B,) in [0, 1000], 0 clean and 1000 noise.
        """
        alpha, sigma, _ = self.family.level(self.pipe.scheduler, _per_row(t, latents))
        shape = (-1, *[1] * (latents.ndim - 1))
        return (alpha.view(shape) * latents + sigma.view(shape) * noise).to(latents.dtype)

    @torch.no_grad()
    def tokens(
        self,
        noisy_latents: Tensor,
        conditioning: Conditioning,
        t: Tensor | float,
        block: int | Sequence[int],
        stop: bool = True,
    ) -> Tokens:
        """Tokens after `block` blocks (1-based) of `noisy_latents` (B, ...) at t (scalar or (B,)), see `Tokens`.

        Several blocks are tapped in one pass. With `stop` the blocks after the last of them are not run: same tokens,
        `block / num_blocks` of the cost.
        """
        _, _, timestep = self.family.level(self.pipe.scheduler, _per_row(t, noisy_latents))
        return self.read(conditioning.call(noisy_latents, timestep), block, stop)[0]

    def read(
        self,
        arguments: dict[str, Any],
        block: int | Sequence[int],
        stop: bool,
        forward: Callable[..., Any] | None = None,
        denoiser: nn.Module | None = None,
    ) -> tuple[Tokens, Any]:
        """Run a denoiser call with a tap after `block` (or several): its tokens and, unless stopped, its output.

        `forward` is the call to make where the denoiser itself is intercepted.
        """
        if denoiser is not None and denoiser is not self.denoiser:
            raise PrismError(
                "This step runs on the pipeline's second denoiser, and the head reads the first; cut earlier."
            )
        blocks = sorted({block} if isinstance(block, int) else set(block))
        last = blocks[-1]
        for number in blocks:
            if not 1 <= number <= self.num_blocks:
                raise PrismError(
                    f"The tap must lie in 1 to {self.num_blocks}, the denoiser's number of blocks; found {number}."
                )
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise PrismError("The denoiser's cache skips blocks that the head reads; call disable_cache() on it first.")
        visual: dict[int, Tensor] = {}
        text: list[Tensor] = []

        def tap(number: int, _module: nn.Module, _args: Any, output: Any) -> None:
            visual[number] = output[0] if isinstance(output, tuple) else output
            if stop and number == last:
                raise StopForward(last)

        def text_tap(_module: nn.Module, _args: Any, output: Any) -> None:
            text.append(output)

        embedder = self.denoiser.get_submodule(self.family.text_embedder)
        output = None
        with ExitStack() as stack:
            for number in blocks:
                stack.callback(self.blocks[number - 1].register_forward_hook(partial(tap, number)).remove)
            stack.callback(embedder.register_forward_hook(text_tap).remove)
            with suppress(StopForward):
                output = (forward or self.denoiser)(**arguments)
        if last not in visual:
            raise PrismError(
                "The denoiser is compiled as a whole, and compiled code passes the judge's hooks by; "
                "compile its blocks instead, with compile_repeated_blocks()."
            )
        grid = self.family.grid(self.denoiser.config, tuple(arguments[noisy_name(arguments)].shape))
        mask = self.family.text_mask(arguments["encoder_hidden_states"])
        return Tokens(visual.pop(last), grid, text[-1] if text else None, mask, visual), output

    # -- videos

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Videos (B, F, H, W, 3) in [0, 1] to normalised float32 latents of the loop: the posterior's mode."""
        vae = self.pipe.vae
        pixels = torch.as_tensor(video).to(self.device, vae.dtype).permute(0, 4, 1, 2, 3) * 2 - 1
        latents = vae.encode(pixels).latent_dist.mode().float()
        return self.family.to_vae(self.family.normalise(vae, latents)).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the loop to videos (B, F, H, W, 3), float32 in [0, 1], with the pipeline's own arithmetic."""
        vae = self.pipe.vae
        latents = self.family.denormalise(vae, self.family.to_vae(latents.to(self.device, vae.dtype)))
        frames = self.pipe.video_processor.postprocess_video(
            vae.decode(latents, return_dict=False)[0], output_type="pt"
        )
        return frames.permute(0, 1, 3, 4, 2).float()

    # -- checks

    def check_call(self, prompts: Sequence[str], call: dict[str, Any]) -> None:
        """Raise PrismError for arguments the pipeline does not take, and for empty or over-long prompts."""
        if isinstance(prompts, str):
            raise PrismError(f"prompts must be a list of texts; found the single text {prompts!r}.")
        unknown = sorted(set(call) - set(self._call))
        if unknown:
            raise PrismError(f"{type(self.pipe).__name__} takes no argument {unknown[0]!r}; leave it out.")
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise PrismError(f"The prompt is empty ({prompt!r}); say what the video should show.")
        limit = call.get("max_sequence_length", self._default("max_sequence_length"))
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if limit is None or tokenizer is None:
            return
        for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids):
            if len(ids) > limit:
                raise PrismError(
                    f"The prompt {prompt[:60]!r} has {len(ids)} tokens and the pipeline takes {limit}; shorten it or "
                    "raise max_sequence_length."
                )

    def num_inference_steps(self, call: dict[str, Any]) -> int:
        """The number of steps that `pipe(**call)` is going to make."""
        if call.get("timesteps") is not None:
            return len(call["timesteps"])
        return call.get("num_inference_steps", self._default("num_inference_steps"))

    def _default(self, name: str) -> Any:
        """What the pipeline's call takes for an argument that is not given."""
        return self._call[name].default if name in self._call else None

    def guided(self, call: dict[str, Any]) -> bool:
        """Whether `pipe(**call)` runs an unconditional pass beside the conditional one."""
        return call.get("guidance_scale", self._default("guidance_scale")) > 1.0

    def fingerprint(self) -> dict[str, Any]:
        """Which backbone this is: class names, hashes of the configurations and of a fixed sample of the weights."""
        sample = hashlib.sha256()
        for name, value in sorted(self.denoiser.named_parameters()):
            if not value.is_meta:
                sample.update(name.encode() + value.detach().flatten()[:16].float().cpu().numpy().tobytes())
        return {
            "pipeline": type(self.pipe).__name__,
            "denoiser": type(self.denoiser).__name__,
            "denoiser_config": _config_hash(self.denoiser),
            "vae": type(self.pipe.vae).__name__,
            "vae_config": _config_hash(self.pipe.vae),
            "weights": sample.hexdigest(),
        }


def _per_row(t: Tensor | float, latents: Tensor) -> Tensor:
    """t as (B,) beside latents (B, ...)."""
    t = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    return t.expand(len(latents)) if t.ndim == 0 else t


def _key(call: dict[str, Any]) -> str | None:
    """A key of the cache, or None where an argument (an image, a tensor) has no short faithful text."""
    plain = (str, int, float, bool, type(None))
    return repr(sorted(call.items())) if all(isinstance(value, plain) for value in call.values()) else None


def _config_hash(module: Any) -> str:
    public = {name: value for name, value in dict(module.config).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()
