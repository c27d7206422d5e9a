"""Latents of a set's clips from another trainer's cache instead of the VAE, on the scale of the sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone, layout
from prism.backbone.pipeline import vae_of
from prism.backbone.videos import normalise
from prism.errors import PrismError, quoted
from prism.preference.caches import Entry, LatentCache

Result = tuple[dict[str, Tensor], dict[str, Any]]


class CachedLatents:
    """The latents of clips, looked up in a cache by the names of their files.

    Args:
        cache: FastVideo's or musubi-tuner's.
        backbone: the pipeline that the latents are for; its VAE's configuration scales them and is not run.
        shape: of one latent, as the pipeline makes it at its call.

    Raises:
        PrismError: where it is not known how the cache scales latents of this pipeline's VAE.
    """

    def __init__(self, cache: LatentCache, backbone: Backbone, shape: tuple[int, ...]) -> None:
        self.cache, self.backbone, self.shape = cache, backbone, shape
        family = backbone.family
        self._in_loop = cache.in_loop(type(vae_of(backbone.pipe)).__name__, family.vae_mean_std, family.vae_factor)
        self._entries: dict[str, Entry] = {}
        self._steps: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """The properties of the cache that the latents depend on, for a store's cache key."""
        scale = "loop" if self._in_loop else "vae"
        return {
            **{"cache": self.cache.kind, "digest": self.cache.digest},
            **{"architecture": self.cache.architecture, "scale": scale},
        }

    def find(self, clips: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[str]]:
        """The clips that the cache holds, in the cache's order, and a sentence for each clip that it lacks.

        Of several latents with one name (parts of a clip) the one with the pipeline's shape is taken, if just one has
        it.

        Raises:
            PrismError: if two clips have one latent (the cache's names leave out folders), or no clip has one.
        """
        absent: list[str] = []
        owners: dict[Entry, str] = {}
        for clip in clips:
            name = _name(clip)
            try:
                entry = self._entry(name)
            except PrismError as error:
                absent.append(str(error))
                continue
            if entry in owners:
                raise PrismError(
                    f"The clips {quoted(owners[entry], 100)} and {quoted(name, 100)} have one name in the cache, and "
                    f"one latent, {entry}; give the clips' files names of their own and write the cache again."
                )
            owners[entry] = name
            self._entries[clip["video"]] = entry
        if not owners:
            some = next(iter(self.cache.entries), "nothing")
            raise PrismError(
                f"The cache {quoted(str(self.cache.folder), 120)} has none of the {len(clips)} clips; it names "
                f"{quoted(some, 80)}, the set {quoted(_name(clips[0]), 80)}. {absent[0]}"
            )
        cached_clips = [clip for clip in clips if clip["video"] in self._entries]
        cached_clips.sort(key=lambda clip: self._entries[clip["video"]])
        self._steps = self._states_of_first(cached_clips)
        return cached_clips, absent

    def _entry(self, name: str) -> Entry:
        entries = self.cache.find(name)
        if not entries:
            raise PrismError(f"The clip {quoted(name, 120)} is not in the cache.")
        if len(entries) > 1:
            fitting = [entry for entry in entries if self._packed_shape(self.cache.shape(entry)) == self.shape]
            if len(fitting) != 1:
                raise PrismError(
                    f"The clip {quoted(name, 120)} has {len(entries)} latents in the cache, {len(fitting)} of them of "
                    f"the shape {self.shape} that the pipeline makes; one is needed."
                )
            entries = fitting
        return entries[0]

    def _packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        try:
            return tuple(layout.pack(torch.empty((1, *shape), device="meta"), self.backbone.family.layout).shape[1:])
        except (RuntimeError, IndexError, TypeError):  # no latent of a video
            return ()

    def _states_of_first(self, cached_clips: Sequence[Mapping[str, Any]]) -> int | None:
        """The number of recorded states in the first clip that can be read, which all others must have."""
        for clip in cached_clips:
            try:
                states = self.cache.read(self._entries[clip["video"]], self._in_loop).states
            except PrismError:
                continue
            return 0 if states is None else len(states)
        return None

    def each(self, clips: Sequence[Mapping[str, Any]]) -> Generator[Callable[[], Result], None, None]:
        """A function per clip, in their order, that reads it and gives its tensors and facts."""
        yield from (partial(self, clip) for clip in clips)

    def __call__(self, clip: Mapping[str, Any]) -> Result:
        """The tensors "latents" (1, ...) of one clip, float16, with a trajectory "states" (1, S, ...) and "t" (1, S),
        and no facts of its frames.

        Raises:
            PrismError: for a damaged latent, one of another shape than the pipeline makes, or of other states than the
                first clip's.
        """
        entry = self._entries[clip["video"]]
        cached = self.cache.read(entry, self._in_loop)
        shape = self._packed_shape(tuple(cached.latent.shape))
        if shape != self.shape:
            raise PrismError(
                f"The latent in {entry} is {tuple(cached.latent.shape)}, {shape} in the pipeline's layout, and the "
                f"pipeline makes {self.shape} at its own arguments; give --height, --width and --num-frames of the "
                "cached clips."
            )
        steps = 0 if cached.states is None else len(cached.states)
        if steps != self._steps:
            raise PrismError(f"The latent in {entry} has {steps} recorded states, and the first clip {self._steps}.")
        latents = self._in_layout(cached.latent[None], cached.in_loop)
        if cached.states is None or cached.t is None:
            return {"latents": latents}, {}
        if self.backbone.family.clock != "flow":
            raise PrismError(
                f"The trajectory in {entry} has timesteps of a flow, and the pipeline's noise levels are others "
                f"({quoted(self.backbone.family.clock, 60)})."
            )
        states = self._in_layout(cached.states, True)[None]
        return {"latents": latents, "states": states, "t": cached.t[None].float()}, {}

    def _in_layout(self, latents: Tensor, in_loop: bool) -> Tensor:
        """(n, C, F, H, W) as the sampling loop has them: scaled, in its layout, float16."""
        backbone = self.backbone
        scaled = latents if in_loop else normalise(backbone.family, backbone.pipe, latents)
        return layout.pack(scaled, backbone.family.layout).contiguous().half()


def _name(clip: Mapping[str, Any]) -> str:
    """The name of a clip's file, or the clip's identity where it is a cell of a table or a list of pictures."""
    path = clip["path"]
    return str(clip["video"] if path is None or ".parquet#" in path else path)
