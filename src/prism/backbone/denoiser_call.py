"""A denoiser call: its arguments by name, read by its family's facts (latents, timestep, rows, tokens, text)."""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism.backbone import layout
from prism.backbone.family import Family, TokenCount
from prism.backbone.layout import Grid
from prism.backbone.pipeline import config_of, unwrapped
from prism.errors import PrismError, quoted

# Arguments of a denoiser call that are a tensor of rows or a list of such: a text's states by layer (HiDream, FIBO),
# pictures by adapter (IP-Adapter), a ControlNet's outputs by block, and its pictures where it is several.
_LISTS = re.compile(
    r"(^|\.)(encoder_hidden_states_llama3|text_encoder_layers|context_latents|ip_adapter_image_embeds|ip_hidden_states"
    r"|added_cond_kwargs\.image_embeds|down_block_additional_residuals|controlnet_block_samples"
    r"|controlnet_single_block_samples|block_controlnet_hidden_states|controlnet_cond|controlnet_mode|control_type)"
    r"(\.|$)"
)


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of a denoiser: its arguments by name, its family's facts, its configuration."""

    arguments: Mapping[str, Any]
    family: Family
    config: Mapping[str, Any]

    @classmethod
    def of(cls, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any], family: Family) -> DenoiserCall:
        """The call `denoiser(*args, **kwargs)`."""
        return cls(by_name(denoiser, args, kwargs), family, config_of(denoiser))

    # -- the latents and their level

    @property
    def noisy_name(self) -> str:
        """The name under which the denoiser takes its latents."""
        for name in self.family.latents_argument:
            if name in self.arguments and name in self.family.batched_arguments:
                return name
            if name in self.arguments:
                raise PrismError(
                    f"{name!r}, the latents, is not among the arguments with a row per sample; name it in "
                    f"batched_arguments of the family {self.family.name!r}."
                )
        raise PrismError(
            f"The denoiser was called with {', '.join(self.arguments)}, none of which is the family's "
            f"latents_argument, {' or '.join(self.family.latents_argument)}."
        )

    @property
    def noisy(self) -> Tensor:
        """The latents (batch, ...), with the condition that the pipeline appends to their channels."""
        latents: Tensor = self.arguments[self.noisy_name]
        return latents

    def parted(self) -> tuple[Tensor, Tensor | None, int]:
        """The latents alone, the condition that the pipeline appends to them (None: none), and the axis it stands on:
        that of the channels, or of the tokens, where an image's tokens follow those of the latents (Kontext)."""
        noisy, family = self.noisy, self.family
        axis = layout.channel_axis(family.layout)
        count = family.channels(self.config, noisy)
        if layout.is_packed(family.layout) and count == noisy.shape[axis]:
            axis, count = 1, min(noisy.shape[1], math.prod(self.grid()))
        rest = noisy.shape[axis] - count
        return noisy.narrow(axis, 0, count), noisy.narrow(axis, count, rest) if rest else None, axis

    @property
    def batch(self) -> int:
        """The number of rows: one per sample, or two where guidance is computed in one batch."""
        return len(self.noisy)

    @property
    def timestep(self) -> Tensor:
        """The model timestep: (), (B,), or with further axes for frames or tokens."""
        timestep: Tensor = self._argument("timestep_argument")
        name = "timestep_r"  # of distilled models (mean flows)
        if self.arguments.get(name) is not None and name not in self.family.further_timesteps:
            raise PrismError(
                "The denoiser is told the next step's noise level too, which noisy latents by themselves do not have; "
                "load a model that is not distilled to mean flows (use_meanflow)."
            )
        return timestep

    def t(self, scheduler: Any) -> float:
        """The noise level in [0, 1000] of the sampled frames; frames of a condition have lower timesteps."""
        return self.family.t_of(scheduler, self.timestep.max())

    def without(self, names: Iterable[str]) -> DenoiserCall:
        """The call without some of its arguments."""
        left = {name: value for name, value in self.arguments.items() if name not in names}
        return replace(self, arguments=left) if len(left) < len(self.arguments) else self

    # -- rows

    def rows(self, rows: Any) -> DenoiserCall:
        """The call for some rows of its batch (a slice or a list of indices), also of tensors in dictionaries."""
        batch = self.batch
        taken = {
            path: take(value, rows, batch) if self.has_rows(path, value) else value
            for path, value in flattened(self.arguments).items()
        }
        return replace(self, arguments=nested(taken))

    def conditional(self, samples: int) -> slice:
        """The rows of the conditional pass, one per sample."""
        return self.family.conditional(self.batch, samples)

    def has_rows(self, name: str, value: Any) -> bool:
        """Tell whether an argument has one or several rows per sample (two for embeddings of a first and a last image).

        `name` is "argument.key" for a value in a dictionary; a dictionary has rows where any of its values has.
        """
        if isinstance(value, dict):
            return any(self.has_rows(f"{name}.{key}", inner) for key, inner in value.items())
        if not isinstance(value, Tensor | list):
            return False
        batched, batch = self.family.batched_arguments, self.batch
        named = name in batched or ("." in name and any(name.startswith(f"{other}.") for other in batched))
        if not named and _LISTS.search(name) is None:
            return False
        if isinstance(value, list):
            return len(value) == batch
        return value.ndim > 0 and len(value) > 0 and len(value) % batch == 0

    # -- tokens

    def grid(self, output: Any = None) -> Any:
        """Token grid (T, H, W); a U-Net's is read off a block's `output`."""
        family, arguments = self.family, self.arguments
        if family.token_form == "frames":
            video = family.video(output)
            return len(video) // self.batch, *video.shape[2:]
        if "img_shapes" in arguments:
            first = arguments["img_shapes"][0]  # a row's shapes, or its only one
            return tuple(first if isinstance(first, tuple) else first[0])
        if "img_ids" in arguments:  # (t, h, w, ...) a token; those of images beside the latents have other t
            ids = arguments["img_ids"]
            ids = (ids[0] if ids.ndim == 3 else ids)[:, :3]
            own = ids[ids[:, 0] == ids[0, 0]]
            _, height, width = (own.amax(0) - own.amin(0)).tolist()  # LongCat-Image counts on behind the text
            return 1, int(height) + 1, int(width) + 1
        if "position_ids" in arguments:  # (t, h, w) a token, the text's first, all zero (Krea 2)
            _, height, width = arguments["position_ids"].amax(0).tolist()
            return 1, int(height) + 1, int(width) + 1
        if "video_coords" in arguments and arguments["video_coords"].ndim == 3:  # LTX-2's have two ends per token
            return layout.grid_of(arguments["video_coords"][0])
        if layout.is_packed(family.layout):
            return tuple(arguments[name] for name in ("num_frames", "height", "width"))
        size = dict(zip(family.layout, self.noisy.shape))
        more = [patch - 1 if family.pads else 0 for patch in family.patches(self.config)]
        return tuple(
            (size.get(axis, 1) + extra) // patch for axis, patch, extra in zip("THW", family.patches(self.config), more)
        )

    def tokens(self, output: Any) -> tuple[Tensor, Grid]:
        """A block's output as video tokens (B, L, D_vis), raster order t, h, w, and their grid (T, H, W).

        Raises PrismError where the number of tokens is not the grid's plus those that the family says surround them.
        """
        family, grid = self.family, self.grid(output)
        states = layout.tokens(family.video(output), family.token_form, self.batch)
        cells = math.prod(grid)
        if layout.is_packed(family.layout) and states.shape[1] > cells and self.noisy.shape[1] > cells:
            states = states[:, : states.shape[1] - self.noisy.shape[1] + cells]  # an image's follow
        if states.shape[1] != cells:  # some blocks may give the video's tokens only
            rest = states.shape[1] - cells
            behind = self._count(family.tokens_behind, rest)
            before = self._count(family.tokens_before, rest - behind)
            if states.shape[1] != before + cells + behind:
                raise PrismError(
                    f"A block of the family {family.name!r} gives {states.shape[1]} tokens, and the video has "
                    f"{' x '.join(map(str, grid))} = {cells}; say in the family what stands before and behind them "
                    f"(tokens_before, tokens_behind: now {before} and {behind}), what a token covers (patch), or the "
                    "latents' layout."
                )
            states = states[:, before : before + cells]
        sparse = self.arguments.get("sparse_params")  # Kandinsky 5 with nabla attention
        if sparse and sparse["to_fractal"]:
            states = layout.from_squares(states, sparse["visual_shape"])
        return states, grid

    def _count(self, count: TokenCount, rest: int) -> int:
        if count == "rest":
            return rest
        if count == "text":
            shape = self._argument("text_argument").shape
            return math.prod(shape[1:-1]) if len(shape) > 2 else shape[1]  # embeddings, or ids (B, Lt)
        if not callable(count):
            return int(count)
        try:
            return operator.index(count(self.arguments))
        except Exception as error:
            raise PrismError(
                f"A function of the family {self.family.name!r} that counts tokens gives no number for the denoiser's "
                f"arguments {', '.join(self.arguments)}: {type(error).__name__}: {quoted(error, 120)}."
            ) from error

    # -- the text

    @property
    def text(self) -> Tensor:
        """The text before its embedder: (B, Lt, width); of a text repeated for each frame the first frame's."""
        text = self._argument("text_argument")
        text = layout.text_rows(pad_sequence(text, batch_first=True) if isinstance(text, list) else text)
        shown = any(name in self.arguments for name in self.family.latents_argument)
        frames = len(text) // self.batch if self.family.token_form == "frames" and shown else 1
        return text[::frames] if frames > 1 else text

    @property
    def text_mask(self) -> Tensor | None:
        """Mask of `text`, True for real tokens: (B, Lt) bool, or None where the padding is unknown."""
        if self.family.text_padding == "unknown":
            return None
        if self.family.text_padding == "zeros":
            return self.text.ne(0).any(-1)
        mask = self._argument("text_mask_argument")
        return None if mask is None else mask.flatten(1) > 0

    def _argument(self, fact: str) -> Any:
        """The argument whose name is the family's `fact`, such as "timestep_argument"."""
        name = getattr(self.family, fact)
        if name not in self.arguments:
            raise PrismError(
                f"The denoiser was called with {', '.join(self.arguments)}, and not with the family's {fact}, {name!r}."
            )
        return self.arguments[name]


def by_name(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser call by their names (some pipelines pass them by position)."""
    if args:
        plain = unwrapped(denoiser)
        signature = inspect.signature(type(plain).forward)
        bound = signature.bind(plain, *args, **kwargs).arguments
        others = [name for name, taken in signature.parameters.items() if taken.kind is taken.VAR_KEYWORD]
        named = dict(list(bound.items())[1:])
        rest = named.pop(others[0], {}) if others else {}
        kwargs = {**named, **rest}
    if isinstance(kwargs.get("x"), list):  # Z-Image lists rows, and takes a batch as well
        kwargs = {**kwargs, "x": torch.stack(kwargs["x"])}
    if isinstance(layers := kwargs.get("encoder_hidden_states_llama3"), Tensor):  # (layers, B, ...), and takes a list
        kwargs = {**kwargs, "encoder_hidden_states_llama3": list(layers)}
    if isinstance(kwargs.get("fps"), list):  # SkyReels-V2 repeats one rate per row, and its denoiser takes one alone
        kwargs = {**kwargs, "fps": kwargs["fps"][:1]}
    return kwargs


def flattened(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Arguments by name, with nested values named "argument.key", and tensors of several layers or
    adapters "argument.key.[index]"."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict) and value and all(isinstance(key, str | int) for key in value):
            keyed = {f"#{key}" if isinstance(key, int) else key: inner for key, inner in value.items()}  # by block
            flat |= flattened(keyed, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and _LISTS.search(prefix + name):
            flat |= {f"{prefix}{name}.[{index}]": each for index, each in enumerate(value)}
        else:
            flat[prefix + name] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        *outer, name = path.split(".")
        listed = outer.pop() if name.startswith("[") else None  # an entry of a list, in the order of its indices
        branch = tree
        for each in outer:
            branch = branch.setdefault(each, {})
        if listed is not None:
            branch.setdefault(listed, []).append(value)
        else:
            branch[int(name[1:]) if name.startswith("#") else name] = value
    return tree


def take(value: Any, rows: Any, batch: int) -> Any:
    """Some rows of a tensor, which may have several per sample of the batch, or of a list with one per sample."""
    if isinstance(value, Tensor):
        return value.unflatten(0, (batch, -1))[rows].flatten(0, 1)
    return value[rows] if isinstance(rows, slice) else [value[int(row)] for row in rows]
