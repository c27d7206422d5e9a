"""A Wan transformer under ComfyUI's names and calls, written from the paper's equations, and ComfyUI's wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

# -- wrappers


class Executor:
    """One of several wrappers around a method, and what is inside it."""

    def __init__(self, original: Any, owner: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


def wrapped(kind: str, original: Any, owner: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    several = options.get("wrappers", {}).get(kind.lower(), {}).values()
    return Executor(original, owner, [each for group in several for each in group])(*args, **kwargs)


def add_wrapper_with_key(kind: str, key: str, wrapper: Any, transformer_options: dict[str, Any]) -> None:
    transformer_options.setdefault("wrappers", {}).setdefault(kind, {}).setdefault(key, []).append(wrapper)


# -- the model


def attention_pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    several = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v)]
    return scaled_dot_product_attention(*several).transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: dict[str, Any]) -> Tensor:
    override = transformer_options.get("optimized_attention_override")
    if override is None:
        return attention_pytorch(q, k, v, heads)
    answer: Tensor = override(attention_pytorch, q, k, v, heads, transformer_options=transformer_options)
    return answer


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, context: Tensor, turn: Tensor | None, options: dict[str, Any]) -> Tensor:
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        if turn is not None:
            q, k = (turned(each, turn, self.heads) for each in (q, k))
        out: Tensor = self.o(attention(q, k, self.v(context), self.heads, options))
        return out


def turned(x: Tensor, turn: Tensor, heads: int) -> Tensor:
    """Rotary positions: pairs of numbers as complex ones, turned by `turn` (L, width of a head / 2)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (heads, -1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor, transformer_options: Any) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation + e).chunk(6, 1)
        normed = layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = x + gate * self.self_attn(normed, normed, freqs, transformer_options)
        x = x + self.cross_attn(self.norm3(x), context, None, transformer_options)
        return x + gate2 * self.ffn(layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)


class WanModel(nn.Module):
    """Wan's transformer, as ComfyUI names and calls it."""

    def __init__(self, *, device: Any = None, dtype: Any = None, operations: Any = None, **config: Any) -> None:
        super().__init__()
        width, self.dtype, self.config = config["dim"], dtype, config
        self.patch_embedding = nn.Conv3d(config["in_dim"], width, (1, 2, 2), (1, 2, 2))
        self.text_embedding = _two_layers(config["text_dim"], width, nn.GELU(approximate="tanh"))
        self.time_embedding = _two_layers(config["freq_dim"], width, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        blocks = (Block(width, config["ffn_dim"], config["num_heads"]) for _ in range(config["num_layers"]))
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(width, 4 * config["out_dim"])

    def forward(self, x: Any, timestep: Any, context: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
        options = transformer_options or {}
        return wrapped("DIFFUSION_MODEL", self._forward, self, options, x, timestep, context, options, **kwargs)

    def _forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: dict[str, Any], **kwargs: Any
    ) -> Tensor:
        size, heads = x.shape, self.config["num_heads"]
        states = self.patch_embedding(x)
        grid = states.shape[2:]
        states = states.flatten(2).transpose(1, 2)
        half = self.config["freq_dim"] // 2
        angles = timestep[:, None].double() * 10000 ** (-torch.arange(half).double() / half)
        level = self.time_embedding(torch.cat([angles.cos(), angles.sin()], 1).to(states.dtype))
        e, text = self.time_projection(level).unflatten(1, (6, -1)), self.text_embedding(context)
        freqs = positions(tuple(grid), states.shape[-1] // heads)
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for index, block in enumerate(self.blocks):

            def original(args: dict[str, Any], block: nn.Module = block) -> dict[str, Any]:
                return {"img": block(args["img"], args["vec"], args["pe"], args["txt"], args["transformer_options"])}

            args = {"img": states, "txt": text, "vec": e, "pe": freqs, "transformer_options": transformer_options}
            patch = replaced.get(("double_block", index))
            states = (original(args) if patch is None else patch(args, {"original_block": original}))["img"]
        cells = self.out(states).unflatten(1, tuple(grid)).unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        return cells.reshape(size[0], -1, *size[2:])


def _two_layers(width: int, out: int, between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), between, nn.Linear(out, out))


def positions(grid: tuple[int, ...], width: int) -> Tensor:
    """(L, width / 2) complex: angles by frame, row and column, of which the frame has the rest of the width."""
    sizes = [width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6)]
    axes = torch.meshgrid(*(torch.arange(extent).double() for extent in grid), indexing="ij")
    angles = [
        axis.flatten()[:, None] / 10000 ** (torch.arange(0, size, 2).double() / size) for axis, size in zip(axes, sizes)
    ]
    return torch.polar(torch.ones(1).double(), torch.cat(angles, 1))
