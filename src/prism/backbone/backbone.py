"""A pipeline as a frozen feature extractor: captured conditionings, noisy latents, tokens after a block, VAE."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone import control, layout, taps, videos
from prism.backbone.arguments import (
    batch_of,
    check_call,
    draws_conditions,
    embedded_rows,
    normalised,
    of_prompt,
    relevant,
    shows_adapters,
    texts,
    unguided,
)
from prism.backbone.conditioning import Conditioning, ConditioningCache, Ragged, cache_key, compacted, with_tensors
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.fingerprint import fingerprint, surroundings, weights
from prism.backbone.loading import load, make
from prism.backbone.pipeline import (
    check,
    check_denoisers,
    check_whole,
    config_of,
    device_of,
    dtype_of,
    explain_failures,
    explain_misfits,
    is_denoiser,
)
from prism.backbone.registry import check_pipeline, family_of
from prism.backbone.steps import Steps, is_guided, steps_of
from prism.backbone.taps import Tokens
from prism.backbone.videos import finished
from prism.backbone.wrapping import capture, free_hooks, held, is_compiled
from prism.errors import PrismError, flag, instance, listed, whole
from prism.video import videos as as_videos

_CACHE_BYTES = 256 * 2**20


class Backbone:
    """A pipeline as a judge and a sampler use it: frozen, nothing on it is changed or trained.

    Attributes: `pipe`; `family`, its row of facts; `denoiser`, its `config` and its `blocks`; `num_blocks`; `widths`,
    D_vis after each block; `default_tap`, the block after which a head reads unless another is given (paper,
    section 3.2: 12 of 30); `t_range`, the noise levels at which the pipeline uses this denoiser.

    Args:
        pipe: a diffusers pipeline of a supported family, or an object as `prism.backbone.Pipeline` describes it.
        reads: the denoiser to read where the pipeline has two (Wan 2.2 A14B): "transformer", which it uses for the
            noisier levels, or "transformer_2".
    """

    def __init__(self, pipe: Any, reads: str | None = None):
        self.pipe = pipe
        self.family = family_of(pipe)
        check(pipe, self.family)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.denoiser_names = names = [name for name in parts if is_denoiser(name)]
        self.reads = next(iter(self.denoiser_names), "") if reads is None else reads
        instance("reads", self.reads, str, "the name of a denoiser")
        if self.reads not in self.denoiser_names:
            raise PrismError(f"The pipeline has no denoiser {reads!r} to read; it has {', '.join(names) or 'none'}.")
        for name in self.denoiser_names:
            if not hasattr(pipe, name):
                raise PrismError(f"The pipeline {type(pipe).__name__} lacks the member {name!r}, a component.")
        self.t_range = self._t_range(len(self.denoiser_names))
        check_pipeline(self.family, pipe, self.denoiser)
        self.partial = False  # True where only the denoiser's first blocks were loaded
        self.num_blocks = len(self.blocks)
        self.widths = self.family.block_widths(self.denoiser)
        self.default_tap = max(1, round(self.family.tap * self.num_blocks))
        self.num_parameters = sum(value.numel() for value in weights(self.denoiser).values())
        self._call = inspect.signature(type(pipe).__call__).parameters
        self._conditionings: ConditioningCache[tuple[str, str], Conditioning] = ConditioningCache()
        self._freeing = False
        self.steps_by_call: dict[str, Steps] = {}
        self._measured: dict[str, None] = {}  # prompts whose length was checked, as an ordered set

    def __repr__(self) -> str:
        partial = ", first blocks alone" if self.partial else ""
        return f"Backbone({type(self.pipe).__name__}, {self.num_blocks} blocks{partial}, {self.dtype}, {self.device})"

    def _t_range(self, denoisers: int) -> tuple[float, float]:
        """The noise levels of the denoiser that is read: all, or those on its side of `boundary_ratio`."""
        ratio = config_of(self.pipe).get("boundary_ratio")  # a share of the noise levels
        if ratio is None or denoisers == 1:
            return 0.0, 1000.0
        return (0.0, 1000.0 * ratio) if self.reads.endswith("_2") else (1000.0 * ratio, 1000.0)

    @classmethod
    def from_pretrained(
        cls, id_or_folder: str, up_to: int | None = None, reads: str | None = None, **kwargs: Any
    ) -> Backbone:
        """Load a pipeline from a folder or the Hub, its weights from safetensors files alone; `kwargs` go to diffusers.

        Args:
            up_to: load the denoiser's first blocks alone, this many, for a judge that reads no later one. Such a
                backbone reads tokens and encodes and decodes videos, but cannot sample.
            reads: see `Backbone`.
        """
        return load(cls, str(id_or_folder), up_to, reads, {"use_safetensors": True, **kwargs})

    def __reduce__(self) -> Any:
        attributes = {name: getattr(self, name) for name in ("num_blocks", "partial", "default_tap")}
        return make, (type(self), self.pipe, self.reads, attributes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self  # copies of a judge share its pipeline

    # Properties, because parts of a pipeline may be compiled, quantised or replaced after the backbone was made.

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.reads)

    @property
    def denoisers(self) -> tuple[Any, ...]:
        return tuple(getattr(self.pipe, name) for name in self.denoiser_names)

    @property
    def config(self) -> Mapping[str, Any]:
        return config_of(self.denoiser)

    @property
    def blocks(self) -> list[nn.Module]:
        return self.family.block_list(self.denoiser)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text and image encoders by component name."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return {name: part for name, part in parts.items() if name.startswith(("text_encoder", "image_encoder"))}

    @property
    def listens(self) -> bool:
        """True where blocks can be tapped in the sampler's own calls: a denoiser compiled as a whole calls none."""
        return not is_compiled(self.denoiser)

    @property
    def device(self) -> torch.device:
        return device_of(self.pipe, self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.denoiser)

    # -- reading

    @torch.no_grad()
    def condition(
        self, prompts: Sequence[str], seeds: Sequence[int] | None = None, **call: Any
    ) -> Conditioning | Ragged:
        """The denoiser's conditioning, one row per prompt, captured from the stock call `pipe(prompts, **call)`.

        `call` holds the pipeline's own arguments (height, width, num_frames, image, ...); `image` is one for
        all prompts, or a list with one per prompt. A prompt is encoded once; later calls take it from a cache of 256
        MiB, which drops the least recently used. Where `call` gives `prompt_embeds` and what goes with them, one row
        or one per prompt, the prompts are None. Raises PrismError for an empty prompt or an unknown argument.

        seeds: one per prompt; used where the condition is drawn with the video's seed, as latents of an image are (see
            docs/backbones.md).
        """
        rows = prompts if isinstance(prompts, str) else [prompt or "" for prompt in texts(prompts, "prompts")]
        seeds = None if seeds is None else [whole("A seed", seed, 0) for seed in listed("seeds", seeds, object)]
        if seeds is not None and len(seeds) != len(rows):
            raise PrismError(f"seeds must hold one seed per prompt; found {len(seeds)} for {len(rows)}.")
        with self.held():
            return self._condition(rows, normalised(call), seeds if self.draws_conditions(call) else None)

    def draws_conditions(self, call: Mapping[str, Any]) -> bool:
        """Tell whether the conditioning may depend on the seed, as where the call has an image or a video."""
        return draws_conditions(self.family, call)

    def _condition(
        self, prompts: Sequence[str], call: dict[str, Any], seeds: Sequence[int] | None
    ) -> Conditioning | Ragged:
        self.check_call(prompts, call)
        shared = control.shared(self)
        images, embedded = None if "image" in shared else call.get("image"), embedded_rows(call)
        several = embedded > 1 or (isinstance(images, list | tuple) and len(images) == len(prompts) > 1)
        if several or (seeds is not None and len(prompts) > 1):
            calls = [of_prompt(call, row, len(prompts), shared) if several else call for row in range(len(prompts))]
            parts = [self._condition([p], calls[row], seeds and [seeds[row]]) for row, p in enumerate(prompts)]
            return Conditioning.cat([part for part in parts if isinstance(part, Conditioning)])
        seed = seeds[0] if seeds else 0
        if embedded:
            return self._capture([""], call, seed)[[0] * len(prompts)]
        conditioning_call = relevant(self.family, call)
        key = cache_key(conditioning_call)
        key = None if key is None else f"{key} {seed} {surroundings(self.pipe)}"
        captured_rows: dict[str, Conditioning] = {}
        missing = list(dict.fromkeys(prompts))
        if key is not None:
            captured_rows = {p: self._conditionings[key, p] for p in missing if (key, p) in self._conditionings}
            missing = [prompt for prompt in missing if prompt not in captured_rows]
        size = 1 if self.family.batch_size_one or self.family.encode_prompts_singly or shows_adapters(call) else 16
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            captured = self._capture(chunk, conditioning_call, seed)
            for row, prompt in enumerate(chunk):
                captured_rows[prompt] = captured[row]
                if key is not None:
                    self._conditionings[key, prompt] = with_tensors(captured[row], compacted)
        # The prompts of this call stay, however large: a batch is read at several noise levels.
        self._conditionings.trim(_CACHE_BYTES, spared=len(captured_rows))
        return Conditioning.cat([captured_rows[prompt] for prompt in prompts])

    def forget(self) -> None:
        """Drop the conditionings of earlier prompts."""
        self._conditionings.clear()

    def held(self) -> AbstractContextManager[None]:
        """While open only this thread may use the pipeline, see `prism.backbone.wrapping.held`; every read opens it."""
        return held(self.pipe)

    @contextmanager
    def freed(self) -> Iterator[None]:
        """At the end of the outermost `freed`, offload models (`enable_model_cpu_offload`), as at the end of a call."""
        outermost, self._freeing = not self._freeing, True
        try:
            yield
        finally:
            if outermost:
                self._freeing = False
                with self.held():
                    free_hooks(self.pipe)

    def _capture(self, prompts: list[str], call: dict[str, Any], seed: int) -> Conditioning:
        steps = max(2, self.num_inference_steps(call) or 2, math.ceil(2 / min(1.0, call.get("strength") or 1.0)))
        call = {**call, **unguided(self.family, call, self._call), "output_type": "latent"}  # PNDM needs 4 steps
        call |= {"num_inference_steps": steps, **self.batch(prompts, [seed] * len(prompts), call)}
        with control.heard(self) as beside:
            captured = self.denoiser_call(capture(self.pipe, self.denoisers, control.full_time(self, call)))
        if captured.batch not in ((count := len(prompts)), 2 * count):
            raise PrismError(
                f"The pipeline made {captured.batch} rows of {count} prompts; leave num_videos_per_prompt at 1."
            )
        rows, told = captured.conditional(count), beside.conditioning(captured, count)
        return Conditioning.of(captured, rows, type(self.pipe), told, control.levels(self, call))

    def denoiser_call(self, arguments: Mapping[str, Any]) -> DenoiserCall:
        """A call of the denoiser with these arguments, by name."""
        return DenoiserCall(arguments, self.family, self.config)

    def batch(self, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that make one stock call of several rows, see `prism.backbone.arguments`."""
        return batch_of(self.family, prompts, seeds, call)

    def add_noise(self, latents: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps (paper, Eq. 1).

        latents, noise: (B, ...) in the loop's layout. t: scalar or (B,) in [0, 1000], 0 clean and 1000 noise.
        """
        alpha, sigma, _ = self.family.level(self.pipe.scheduler, layout.per_row(t, latents))
        layout.check_noise(noise, latents)
        shape = (-1, *[1] * (latents.ndim - 1))
        return (alpha.view(shape) * latents + sigma.view(shape) * noise).to(latents.dtype)

    def tokens(
        self,
        noisy_latents: Tensor,
        conditioning: Conditioning | Ragged,
        t: Tensor | float,
        block: int | Sequence[int],
        stop: bool = True,
        grad: bool = False,
    ) -> Tokens:
        """Tokens after `block` blocks (1-based) of `noisy_latents` (B, ...) at t (scalar or (B,)), see `Tokens`.

        Several blocks are tapped in one pass. With `stop` later blocks are not run, with `grad` tokens carry gradients.
        """
        instance("conditioning", conditioning, Conditioning | Ragged, "what Backbone.condition gives")
        levels, stop = layout.per_row(t, noisy_latents), flag("stop", stop)
        low, high = self.t_range
        if not bool(((levels >= low) & (levels <= high)).all()):
            raise PrismError(
                f"The denoiser {self.reads!r} is used for t from {low:g} to {high:g}, found {levels.tolist()}; "
                "read the pipeline's other denoiser there."
            )
        with torch.set_grad_enabled(grad), self.held(), self.freed():
            if isinstance(conditioning, Ragged) or (self.family.batch_size_one and len(noisy_latents) > 1):
                ones, how = [slice(row, row + 1) for row in range(len(noisy_latents))], (block, stop, grad)
                return Tokens.cat([self.tokens(noisy_latents[r], conditioning[r.start], levels[r], *how) for r in ones])
            _, _, timestep = self.family.level(self.pipe.scheduler, levels)
            with explain_failures(self.denoiser, "reading latents", conditioning.arguments), explain_misfits(self.pipe):
                return self.read(control.arguments(self, conditioning, noisy_latents, timestep), block, stop)[0]

    def read(
        self,
        arguments: Mapping[str, Any],
        block: int | Sequence[int],
        stop: bool,
        forward: Callable[..., Any] | None = None,
        denoiser: nn.Module | None = None,
    ) -> tuple[Tokens, Any]:
        """Run a denoiser call with a tap after `block` (or several): its tokens and, unless stopped, its output.

        `forward` is called in place of the denoiser, where the denoiser's own calls are intercepted. A denoiser that is
        compiled as a whole runs uncompiled here.
        """
        if denoiser is not None and denoiser is not self.denoiser:
            raise PrismError(
                f"This step does not run on the denoiser that the head reads, {self.reads!r}; cut at another step."
            )
        numbers = block if isinstance(block, list | tuple | set) and block else [block]
        blocks = sorted({whole("The tap, one of the denoiser's blocks,", each, 1, self.num_blocks) for each in numbers})
        last, tapped = blocks[-1], self.blocks
        if last > len(tapped):
            raise PrismError(f"Of this backbone {len(tapped)} blocks were loaded; load it up to block {last}.")
        check_denoisers(self)
        check_whole((self.denoiser,))
        chosen = {number: tapped[number - 1] for number in blocks}
        with self.held():
            return taps.read(self.denoiser, self.denoiser_call(arguments), chosen, stop, forward, self.listens)

    # -- videos

    def encode(self, video: Any) -> Tensor:
        """Encode videos (B, F, H, W, 3), or whatever `prism.video.videos` takes, to the loop's float32 latents:
        the posterior's mode, normalised.

        Where tokens span several latent frames (CogVideoX 1.5), or the pipeline drops decoded frames in front
        (HunyuanVideo with latent_concat), the first one is repeated there.
        """
        pixels = torch.from_numpy(as_videos(video))
        with self.held(), self.freed(), explain_failures(videos.vae_of(self.pipe), "encoding"):
            return videos.encode(self.pipe, self.family, self.config, pixels.to(self.device))

    def decode(self, latents: Tensor, grid: layout.Grid | None = None, num_frames: int | None = None) -> Tensor:
        """Decode latents of the loop to videos (B, F, H, W, 3), float32 in [0, 1], with the pipeline's own arithmetic.

        grid: (T, H, W) in tokens, needed for packed latents (LTX-Video, Flux, Qwen-Image).
        num_frames: the call's argument; latent frames that its loop carries beside the video's are dropped by it
            (CogVideoX 1.5; SkyReels-V2 diffusion forcing with last_image); None decodes all.
        """
        layout.per_row(0, latents)  # refuses anything but latents
        with self.held(), self.freed(), explain_failures(videos.vae_of(self.pipe), "decoding"):
            return videos.decode(self.pipe, self.family, self.config, latents.to(self.device), grid, num_frames)

    # -- checks

    def check_call(self, prompts: Sequence[str], call: dict[str, Any]) -> None:
        """Raise PrismError for arguments that the pipeline does not take, and for empty prompts; warn of long ones."""
        check_call(self, prompts, call)

    def steps(self, call: Mapping[str, Any]) -> Steps:
        """The steps that `pipe(**call)` makes, see `prism.backbone.steps`; `call` holds all it needs."""
        with self.held():
            return steps_of(self, call)

    def num_inference_steps(self, call: dict[str, Any]) -> int:
        """The number of steps that the call asks for; `steps` says how many `pipe(**call)` makes."""
        schedules = [call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None]
        return len(schedules[0]) if schedules else call.get("num_inference_steps", self.default("num_inference_steps"))

    def default(self, name: str) -> Any:
        """The default of an argument of the pipeline's call, or None where it has none."""
        value = self._call[name].default if name in self._call else None
        return None if value is inspect.Parameter.empty else value

    def takes(self, name: str) -> bool:
        """Tell whether the pipeline's call has this argument."""
        return name in self._call

    def main(self, latents: Tensor) -> Tensor:
        """Latents of the loop in the layout of the denoiser, without the condition that some pipelines append to their
        channels."""
        if self.family.loop_layout is not None:
            latents = layout.pack(layout.unpack(latents, self.family.loop_layout), self.family.layout)
        axis = layout.channel_axis(self.family.layout)
        return latents.narrow(axis, 0, self.family.channels(self.config, latents))

    def finished(self, latents: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The latents that the pipeline decodes, made of those (B, ...) that its loop ended with.

        arguments: those of a denoiser call with the same rows, by name.
        """
        return finished(self.pipe, latents, self.denoiser_call(arguments))

    def guided(self, call: dict[str, Any]) -> bool:
        """Tell whether `pipe(**call)` runs an unconditional pass beside the conditional one."""
        return is_guided(self, call)

    def fingerprint(self) -> dict[str, Any]:
        """The backbone's identity, as JSON: classes, what a head needs of them, other settings, hashes of weights."""
        reads = {} if self.t_range == (0.0, 1000.0) else {"reads": self.reads}
        return {**fingerprint(self), **reads}
