"""The pipeline that checks examine: its plain call, the denoiser calls within, and facts from a user's file."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prism.backbone import Backbone
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import vae_of
from prism.backbone.steps import passes
from prism.backbone.wrapping import StopCall, around, run_until_stopped
from prism.errors import PrismError

SEED = 5  # of plain calls; not 0, which a seed that goes nowhere may be
PROMPTS = ("a red circle moves right", "three blue squares stand still in the rain")


class Mismatch(PrismError):
    """A check that does not hold; the sentence names the facts of the row that may be wrong."""


@dataclass(frozen=True)
class Recorded:
    """A plain call that ended with latents.

    seen: its calls of the denoiser that is read, as `Subject.calls` records them. output: its output. last: the tensors
    that its last step's callback was given, empty where it takes none. times: the timestep of every denoiser call.
    """

    seen: list[tuple[DenoiserCall, Tensor]]
    output: Any
    last: dict[str, Tensor]
    times: list[Tensor]


@dataclass
class Subject:
    """A pipeline and the arguments of its call; what plain calls give is cached by seed."""

    backbone: Backbone
    call: dict[str, Any]
    texts: tuple[str, str] = PROMPTS
    cached: dict[Any, Any] = field(default_factory=dict)

    @property
    def pipe(self) -> Any:
        return self.backbone.pipe

    def _call(self, seed: int, prompt: str, changes: dict[str, Any]) -> dict[str, Any]:
        call = {**self.call, **changes, "generator": torch.Generator("cpu").manual_seed(seed)}
        return {**call, "prompt": prompt} if self.backbone.family.takes_prompts else call

    def plain(self, seed: int = SEED, **changes: Any) -> Any:
        """The stock call's first output."""
        with torch.no_grad():
            videos = self.backbone.family.videos(self.pipe(**self._call(seed, self.texts[0], changes)))
        return np.stack(videos) if isinstance(videos, list) and isinstance(videos[0], np.ndarray) else videos

    def shown(self, seed: int = SEED) -> tuple[Any, list[Tensor]]:
        """The stock call's videos, and what its VAE was given."""
        key = ("shown", seed)
        if key not in self.cached:
            with self.decoding() as decoded:
                self.cached[key] = self.plain(seed, output_type="np"), decoded
        return self.cached[key]

    def first_calls(self, count: int, prompt: str, **changes: Any) -> list[tuple[DenoiserCall, Tensor]]:
        """The first calls of the denoiser in a stock call, which ends there; see `calls`."""
        with self.calls(count) as seen, torch.no_grad():
            run_until_stopped(self.pipe, self._call(SEED, prompt, {**changes, "output_type": "latent"}))
        return seen

    def latents(self, seed: int = SEED) -> Tensor:
        """The latents (1, ...) at the end of the sampling loop: the call's output or, for a pipeline that repacks its
        output or drops a frame of it, the latents that the last step's callback is given."""
        key = ("latents", seed)
        if key not in self.cached:
            recorded = self.recorded(seed)
            latents, last = recorded.output, recorded.last
            shape = self.backbone.condition(self.prompts(1), **self.call).shape  # type: ignore[union-attr]
            with suppress(Exception):  # a repacked output may have other axes
                latents = self.backbone.main(latents)
            if last and (latents.shape[1:] != shape or self.backbone.family.denormalises_output):
                latents = self.backbone.main(last["latents"])
            if self.backbone.family.appends_conditions:
                latents = latents[:, : shape[0]]
            require(
                tuple(latents.shape[1:]) == tuple(shape),
                f"a call ends with latents of shape {tuple(latents.shape[1:])} a row, and the denoiser is given "
                f"{tuple(shape)}: say layout, and loop_layout where the loop carries another",
            )
            self.cached[key] = latents
        return self.cached[key]

    def recorded(self, seed: int = SEED) -> Recorded:
        """A plain call that ends with latents, see `Recorded`."""
        key = ("recorded", seed)
        if key not in self.cached:
            last: dict[str, Tensor] = {}
            watch: dict[str, Any] = {"callback_on_step_end": lambda *args: last.update(args[-1]) or {}}
            if not self.backbone.takes("callback_on_step_end"):
                watch = {}
            times: list[Tensor] = []

            def note(module: Any, args: Any, kwargs: Any) -> None:
                times.append(DenoiserCall.of(module, args, kwargs, self.backbone.family).timestep.max())

            handles = [
                denoiser.register_forward_pre_hook(note, with_kwargs=True) for denoiser in self.backbone.denoisers
            ]
            try:
                with self.calls() as seen:
                    output = self.plain(seed, output_type="latent", **watch)
            finally:
                for handle in handles:
                    handle.remove()
            self.cached[key] = Recorded(seen, output, last, times)
        return self.cached[key]

    def prompts(self, count: int) -> list[str]:
        """The first prompts, empty where the pipeline takes none."""
        return list(self.texts if self.backbone.family.takes_prompts else ("", ""))[:count]

    @contextmanager
    def calls(self, stop: int | None = None) -> Iterator[list[tuple[DenoiserCall, Tensor]]]:
        """Record denoiser calls, each with the tokens of all its rows after the default tap; `stop` of them end the
        pipeline's call."""
        seen: list[tuple[DenoiserCall, Tensor]] = []
        latest: list[DenoiserCall] = []
        backbone, family = self.backbone, self.backbone.family

        def before(module: Any, args: Any, kwargs: Any) -> None:
            call = DenoiserCall.of(module, args, kwargs, family)
            noisy = call.noisy.clone()  # some pipelines write their next latents into it
            latest[:] = [replace(call, arguments={**call.arguments, call.noisy_name: noisy})]

        def after(_module: Any, _args: Any, output: Any) -> None:
            seen.append((latest[0], latest[0].tokens(output)[0].clone()))
            if len(seen) == stop:
                raise StopCall

        handles = [d.register_forward_pre_hook(before, with_kwargs=True) for d in backbone.denoisers]
        handles.append(backbone.blocks[backbone.default_tap - 1].register_forward_hook(after))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @property
    def leaves_steps(self) -> bool:
        """True where the call skips its first steps: it starts from an image or a video, at `strength`."""
        return "strength" in self.call and self.backbone.takes("image" if "image" in self.call else "video")

    @property
    def calls_per_step(self) -> int:
        """Denoiser calls in a step: a conditional one or one of both groups of rows, an unconditional one, further
        ones of guidance."""
        together = self.backbone.guided(self.call) and self.backbone.family.cfg == "one_batch"
        return passes(self.backbone, self.call) - together

    def reads(self, seen: list[tuple[DenoiserCall, Tensor]]) -> list[tuple[DenoiserCall, Tensor]]:
        """Of a stock call's denoiser calls those that a judge reads: the first of each step, or, where a read has
        switches of its own, those with these."""
        switches = self.backbone.family.read_arguments.items()
        found = [each for each in seen if all(each[0].arguments.get(name) == value for name, value in switches)]
        return found[:: self.calls_per_step] if len(found) == len(seen) else found

    def tolerance(self, least: float) -> float:
        """The relative tolerance, `least` or what the denoiser's dtype allows."""
        return max(least, 4 * torch.finfo(self.backbone.dtype).eps)

    @contextmanager
    def decoding(self) -> Iterator[list[Tensor]]:
        """Record the latents that the VAE decodes, in calls of `best_of_n` too."""
        decoded: list[Tensor] = []

        def decode(inner: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            decoded.append(values.clone())
            return inner(values, *args, **kwargs)

        with around(vae_of(self.pipe), "decode", decode, reads=True):
            yield decoded


def difference(actual: Any, expected: Any) -> float:
    """The largest absolute difference, relative to the largest expected value; infinite where the shapes differ."""
    one = actual if isinstance(actual, Tensor) else torch.as_tensor(np.asarray(actual))
    other = expected if isinstance(expected, Tensor) else torch.as_tensor(np.asarray(expected))
    if one.shape != other.shape:
        return math.inf
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))


def require(holds: bool, sentence: str) -> None:
    """Raise `Mismatch` with a sentence where something does not hold."""
    if not holds:
        raise Mismatch(f"{sentence[0].upper()}{sentence[1:]}.")


def with_own_facts(folder: str | None, file: Path, device: str | None, dtype: str | None, **changes: Any) -> Subject:
    """The pipeline in a folder with the `family` that a Python file defines; `changes` are arguments of its call.

    Raises PrismError for a file without a family, which is run as Python, and for a folder that cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    from prism.backbone import Family, register
    from prism.backbone.registry import pipeline_class
    from prism.loading import load_backbone

    if folder is None:
        raise PrismError("--family takes a file and the folder of a pipeline: prism doctor --family FILE FOLDER.")
    names = _run_file(file)
    family = names.get("family")
    if not isinstance(family, Family):
        others = [name for name, value in names.items() if isinstance(value, Family)]
        hint = f"; {others[0]} is one: call it `family`" if others else ""
        hint = hint or (f"; its `family` is {type(family).__name__}" if family is not None else "")
        raise PrismError(f"The file {file} defines no `family`, a prism.backbone.Family{hint}.")
    try:
        kind = str(DiffusionPipeline.load_config(folder).get("_class_name"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PrismError(f"No diffusers pipeline could be loaded from {folder}: {reason}") from error
    pipeline = names.get(kind)
    others = [name for name in family.pipelines if name != kind]
    if not isinstance(pipeline, type) and pipeline_class(kind) is None:
        raise PrismError(
            f"The folder {folder} holds a {kind[:60]}, which is none of diffusers'; the file "
            f"{file} must import or define that class beside `family`."
        )
    register(family, pipeline=[pipeline if isinstance(pipeline, type) else kind, *others], replace=True)
    backbone, call, _ = load_backbone(folder, device, dtype)
    call |= changes
    call["num_inference_steps"] = call.get("num_inference_steps", 5)
    if backbone.takes("image") and "image" not in call:
        call["image"] = _noise_image(backbone, call)
    return Subject(backbone, call)


def _run_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise PrismError(f"--family takes a Python file that defines `family`; {path} {problem}.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python FILE` does, so that the file can import modules beside it
        sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        raise PrismError(f"The file {path} could not be run: {type(error).__name__}: {reason}") from error


def _noise_image(backbone: Any, call: dict[str, Any]) -> Image.Image:
    width, height = (call.get(name) or backbone.default(name) or 512 for name in ("width", "height"))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
