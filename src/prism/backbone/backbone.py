"""A frozen generator, read: conditioning by capture, noisy latents, tokens after a block, videos and latents."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from prism.backbone import layout, videos
from prism.backbone.conditioning import Conditioning, Ragged, Tokens, cache_key, is_single, noisy_name
from prism.backbone.families import family_named, family_of, is_denoiser
from prism.backbone.fingerprint import fingerprint
from prism.backbone.interceptor import StopForward, capture
from prism.backbone.partial import load_denoiser
from prism.errors import PrismError
from prism.files import read_json

_CACHE_BYTES = 256 * 2**20
_IRRELEVANT = {
    "guidance_scale",
    "true_cfg_scale",
    "min_guidance_scale",
    "max_guidance_scale",
    "guidance_scale_2",
    "num_inference_steps",
    "negative_prompt",
    "output_type",
    "negative_prompt_embeds",
}
_IRRELEVANT |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator", "return_dict"}


class Backbone:
    """A supported diffusers pipeline, frozen, as a judge and a sampler read it (DESIGN: backbone).

    Attributes: `pipe`; `family`, its row of facts; `denoiser` and its `blocks`; `num_blocks`; `widths`, D_vis
    after each block; `default_tap`, the number of blocks a head reads after when nothing else is said (paper, section
    3.2: 12 of 30); `t_range`, the noise levels at which the pipeline uses this denoiser.

    Args:
        pipe: a pipeline of a supported family.
        reads: the denoiser to read where the pipeline has two (Wan 2.2 A14B): "transformer", which it uses for the
            noisier levels, or "transformer_2".
    """

    def __init__(self, pipe: Any, reads: str | None = None):
        self.pipe = pipe
        self.family = family_of(pipe)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        named = {name: part for name, part in parts.items() if is_denoiser(name)}
        self.denoisers = tuple(named.values())
        self.reads = next(iter(named), "") if reads is None else reads
        if self.reads not in named:
            raise PrismError(f"The pipeline has no denoiser {reads!r} to read; it has {', '.join(named) or 'none'}.")
        self.denoiser: Any = named[self.reads]
        self.t_range = self._t_range(len(named))
        self.text_encoders: dict[str, nn.Module] = {
            name: module for name, module in parts.items() if name.startswith("text_encoder")
        }
        for module in parts.values():
            module.requires_grad_(False).eval()
        self.partial = False  # whether the denoiser has its first blocks alone
        self.blocks = self.family.block_list(self.denoiser)
        self.num_blocks = len(self.blocks)
        self.widths = self.family.block_widths(self.denoiser)
        self.default_tap = max(1, round(self.family.tap * self.num_blocks))
        self.num_parameters = sum(value.numel() for value in self.denoiser.parameters())
        self._call = inspect.signature(type(pipe).__call__).parameters
        self._conditionings: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()
        self._said: set[str] = set()

    def _t_range(self, denoisers: int) -> tuple[float, float]:
        """The noise levels of the denoiser that is read: all, or those on its side of `boundary_ratio`."""
        ratio = self.pipe.config.get("boundary_ratio")
        if ratio is None or denoisers == 1:
            return 0.0, 1000.0
        return (0.0, 1000.0 * ratio) if self.reads.endswith("_2") else (1000.0 * ratio, 1000.0)

    @classmethod
    def from_pretrained(
        cls, id_or_folder: str, up_to: int | None = None, reads: str | None = None, **kwargs: Any
    ) -> Backbone:
        """Load a pipeline from a folder or the Hub. Safetensors only; `kwargs` go to diffusers.

        Args:
            up_to: load the denoiser's first blocks alone, as many as a judge that stands by itself reads (folders).
                Such a backbone can read tokens and encode and decode videos, and cannot sample.
            reads: as of `Backbone`.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        try:
            if up_to is None:
                return cls(DiffusionPipeline.from_pretrained(str(id_or_folder), **kwargs), reads)
            return cls._partial(Path(id_or_folder), up_to, reads, kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PrismError(f"No diffusers pipeline could be loaded from {id_or_folder}: {reason}") from error

    @classmethod
    def _partial(cls, folder: Path, up_to: int, reads: str | None, kwargs: dict[str, Any]) -> Backbone:
        index = read_json(folder / "model_index.json")
        family = family_named(index.get("_class_name", ""))
        names = [name for name in index if is_denoiser(name) and index[name][0] is not None]
        read = reads or names[0]
        if read not in names:
            raise PrismError(f"The pipeline in {folder} has no denoiser {read!r}; it has {', '.join(names)}.")
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
        loaded = {name: load_denoiser(folder, name, family, up_to if name == read else 1, dtype) for name in names}
        models = {name: model for name, (model, _) in loaded.items()}
        kind = getattr(diffusers, index["_class_name"])  # which knows, unlike its base class, that these are components
        backbone = cls(kind.from_pretrained(str(folder), **kwargs, **models), read)
        backbone.num_blocks, backbone.partial = loaded[read][1], True
        backbone.default_tap = min(up_to, max(1, round(family.tap * backbone.num_blocks)))
        return backbone

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    # -- reading

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], **call: Any) -> Conditioning | Ragged:
        """What the denoiser is told about each prompt: (B rows), captured from the stock call `pipe(prompts, **call)`.

        `call` holds the pipeline's own arguments (height, width, num_frames, image, ...); of `image` there is one for
        all prompts, or a list with one a prompt. A prompt is encoded once; later calls take it from a cache.
        Raises PrismError for an empty prompt or an unknown argument.
        """
        self.check_call(prompts, call)
        prompts = [prompt or "" for prompt in prompts]
        images = call.get("image")
        if isinstance(images, list | tuple) and len(images) == len(prompts) > 1:
            own = [self.condition([prompt], **{**call, "image": image}) for prompt, image in zip(prompts, images)]
            return Conditioning.cat([part for part in own if isinstance(part, Conditioning)])
        relevant = {name: value for name, value in call.items() if self._is_relevant(name)}
        key = cache_key(relevant)
        found: dict[str, Conditioning] = {}
        missing = list(dict.fromkeys(prompts))
        if key is not None:
            found = {
                prompt: self._conditionings[key, prompt] for prompt in missing if (key, prompt) in self._conditionings
            }
            missing = [prompt for prompt in missing if prompt not in found]
        size = 1 if self.family.alone or self.family.texts_alone else 16
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            captured = self._capture(chunk, relevant)
            for row, prompt in enumerate(chunk):
                found[prompt] = captured[row]
                if key is not None:
                    self._conditionings[key, prompt] = captured[row]
        self._trim_cache()
        return Conditioning.cat([found[prompt] for prompt in prompts])

    def _is_relevant(self, name: str) -> bool:
        """Whether a call argument may change what the denoiser is told. An embedded guidance scale does."""
        if name == "guidance_scale" and self.family.guidance == "true_cfg_scale":
            return True
        return name not in _IRRELEVANT

    def _capture(self, prompts: list[str], call: dict[str, Any]) -> Conditioning:
        spared = {name: 1.0 for name in (self.family.guidance, "min_guidance_scale") if name in self._call}
        call = {**call, **spared, "num_inference_steps": 2, "output_type": "latent"}  # one is too few for Mochi
        call |= self.batch(prompts, [0] * len(prompts), call)  # never the global generator
        arguments = capture(self.pipe, self.denoisers, call)
        batch = len(arguments[noisy_name(arguments)])
        if batch not in (len(prompts), 2 * len(prompts)):
            raise PrismError(
                f"The pipeline made {batch} rows of {len(prompts)} prompts; leave num_videos_per_prompt at 1."
            )
        rows = slice(batch - len(prompts), batch)
        return Conditioning.of(arguments, rows, self.family, self.denoiser.config, type(self.pipe).__name__)

    def batch(self, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that make one stock call of several rows: prompts, CPU generators, and the image as often."""
        n = len(prompts)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        found: dict[str, Any] = {"generator": generators if n > 1 else generators[0]}
        if self.family.prompts:
            found["prompt"] = list(prompts)
        if self.family.images == "list":
            found |= {name: [call[name]] * n for name in ("image", "video") if is_single(name, call.get(name))}
        negative = call.get("negative_prompt")
        if isinstance(negative, str) and self.family.negatives == "list":
            found["negative_prompt"] = [negative] * n
        return found

    def _trim_cache(self) -> None:
        def size(entry: Conditioning) -> int:
            return sum(v.nbytes for v in entry.arguments.values() if isinstance(v, Tensor))

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
        conditioning: Conditioning | Ragged,
        t: Tensor | float,
        block: int | Sequence[int],
        stop: bool = True,
    ) -> Tokens:
        """Tokens after `block` blocks (1-based) of `noisy_latents` (B, ...) at t (scalar or (B,)), see `Tokens`.

        Several blocks are tapped in one pass. With `stop` the blocks after the last of them are not run: same tokens,
        `block / num_blocks` of the cost.
        """
        levels = _per_row(t, noisy_latents)
        low, high = self.t_range
        if not bool(((levels >= low) & (levels <= high)).all()):
            raise PrismError(
                f"The denoiser {self.reads!r} is used for t from {low:g} to {high:g}, found {levels.tolist()}; "
                "read the pipeline's other denoiser there."
            )
        if isinstance(conditioning, Ragged) or (self.family.alone and len(noisy_latents) > 1):
            rows = range(len(noisy_latents))
            one = (self.tokens(noisy_latents[r : r + 1], conditioning[r], levels[r : r + 1], block, stop) for r in rows)
            return Tokens.cat(list(one))
        _, _, timestep = self.family.level(self.pipe.scheduler, levels)
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
                f"This step does not run on the denoiser that the head reads, {self.reads!r}; cut at another step."
            )
        blocks = sorted({block} if isinstance(block, int) else set(block))
        last = blocks[-1]
        for number in blocks:
            if not 1 <= number <= self.num_blocks:
                raise PrismError(
                    f"The tap must lie in 1 to {self.num_blocks}, the denoiser's number of blocks; found {number}."
                )
        if last > len(self.blocks):
            raise PrismError(f"Of this backbone {len(self.blocks)} blocks were loaded; load it up to block {last}.")
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise PrismError("The denoiser's cache skips blocks that the head reads; call disable_cache() on it first.")
        visual: dict[int, Tensor] = {}
        grids: dict[int, Any] = {}
        noisy = arguments[noisy_name(arguments)]
        text: list[Tensor] = []

        def tap(number: int, _module: nn.Module, _args: Any, output: Any) -> None:
            visual[number] = self.family.states(output, arguments, len(noisy))
            grids[number] = self.family.grid(self.denoiser.config, arguments, noisy, self.family.video(output))
            if stop and number == last:
                raise StopForward(last)

        def text_tap(_module: nn.Module, _args: Any, output: Any) -> None:
            text.append(output.flatten(1, -2))

        output = None
        with ExitStack() as stack:
            for number in blocks:
                stack.callback(self.blocks[number - 1].register_forward_hook(partial(tap, number)).remove)
            if self.family.text_embedder is not None:
                embedder = self.denoiser.get_submodule(self.family.text_embedder)
                stack.callback(embedder.register_forward_hook(text_tap).remove)
            with suppress(StopForward):
                output = (forward or self.denoiser)(**arguments)
        if last not in visual:
            raise PrismError(
                "The denoiser is compiled as a whole, and compiled code passes the judge's hooks by; "
                "compile its blocks instead, with compile_repeated_blocks()."
            )
        mask = self.family.text_mask(arguments) if text else None
        return Tokens(visual.pop(last), grids[last], text[-1] if text else None, mask, visual), output

    # -- videos

    def encode(self, video: Tensor) -> Tensor:
        """Videos (B, F, H, W, 3) in [0, 1] to normalised float32 latents of the loop: the posterior's mode.

        Where tokens span several latent frames (CogVideoX 1.5), or the pipeline drops decoded frames in front
        (HunyuanVideo with latent_concat), the first one is repeated there.
        """
        return videos.encode(self.pipe, self.family, self.denoiser.config, torch.as_tensor(video).to(self.device))

    def decode(self, latents: Tensor, grid: layout.Grid | None = None) -> Tensor:
        """Latents of the loop to videos (B, F, H, W, 3), float32 in [0, 1], with the pipeline's own arithmetic.

        grid: (T, H, W) in tokens, which packed latents (LTX-Video, Flux, Qwen-Image) do not tell by themselves.
        """
        return videos.decode(self.pipe, self.family, self.denoiser.config, latents.to(self.device), grid)

    # -- checks

    def check_call(self, prompts: Sequence[str], call: dict[str, Any]) -> None:
        """Raise PrismError for arguments the pipeline does not take, and for empty or over-long prompts."""
        if isinstance(prompts, str):
            raise PrismError(f"prompts must be a list of texts; found the single text {prompts!r}.")
        unknown = sorted(set(call) - set(self._call))
        if unknown:
            raise PrismError(f"{type(self.pipe).__name__} takes no argument {unknown[0]!r}; leave it out.")
        for name, reason in self.family.fixed.items():
            if call.get(name, self.default(name)) != self.default(name):
                raise PrismError(
                    f"{name} = {call[name]!r} is not supported: {reason}. Leave it at {self.default(name)}."
                )
        if not self.family.prompts:
            if any(prompts):
                raise PrismError(f"{type(self.pipe).__name__} takes no prompt, only an image; leave the prompt empty.")
            return
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise PrismError(f"The prompt is empty ({prompt!r}); say what the video should show.")
        limit = call.get("max_sequence_length", self.default("max_sequence_length"))
        tokenizer = getattr(self.pipe, "tokenizer", None)
        new = [prompt for prompt in prompts if prompt not in self._said]
        if limit is None or tokenizer is None or not new:
            return
        self._said.update(new)
        for prompt, ids in zip(new, tokenizer(new).input_ids):
            if len(ids) > limit:
                warnings.warn(
                    f"The prompt {prompt[:60]!r} has {len(ids)} tokens and the pipeline takes {limit}; it is cut off "
                    "there. Shorten it, or raise max_sequence_length.",
                    stacklevel=3,
                )

    def num_inference_steps(self, call: dict[str, Any]) -> int:
        """The number of steps that `pipe(**call)` is going to make."""
        if call.get("timesteps") is not None:
            return len(call["timesteps"])
        return call.get("num_inference_steps", self.default("num_inference_steps"))

    def default(self, name: str) -> Any:
        """What the pipeline's call takes for an argument that is not given."""
        return self._call[name].default if name in self._call else None

    def takes(self, name: str) -> bool:
        """Whether the pipeline's call has this argument."""
        return name in self._call

    def main(self, latents: Tensor) -> Tensor:
        """What a pipeline carries through its loop, without the condition that some append to its channels."""
        axis = layout.channel_axis(self.family.layout)
        return latents.narrow(axis, 0, self.family.channels(self.denoiser.config, latents))

    def guided(self, call: dict[str, Any]) -> bool:
        """Whether `pipe(**call)` runs an unconditional pass beside the conditional one."""
        name = self.family.guidance
        if name == "guider":
            return self.pipe.guider.num_conditions > 1
        scale = call.get(name, self.default(name))
        if name == "true_cfg_scale":  # guidance is embedded as well, and this one takes a negative prompt
            given = (call.get(f"negative_prompt{kind}") is not None for kind in ("", "_embeds"))
            return scale > 1.0 and any(given)
        return scale > 1.0

    def fingerprint(self) -> dict[str, Any]:
        """Which backbone this is: class names, hashes of the configurations and of a fixed sample of the weights."""
        reads = {} if self.t_range == (0.0, 1000.0) else {"reads": self.reads}
        return {**fingerprint(self.pipe, self.denoiser, whole=not self.partial), **reads}


def _per_row(t: Tensor | float, latents: Tensor) -> Tensor:
    """t as (B,) beside latents (B, ...)."""
    t = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    return t.expand(len(latents)) if t.ndim == 0 else t
