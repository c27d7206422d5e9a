"""The least that PRISM can use: a bare `nn.Module` without a configuration, and a loop around it of thirty lines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from prism.backbone import Family


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, states: Tensor, told: Tensor) -> Tensor:
        states = states + self.attend(states, *[torch.cat([states, told], 1)] * 2, need_weights=False)[0]
        return states + self.think(states)


class Net(nn.Module):
    """z: (B, T, 4, H, W). when: (B,) in [0, 1], 1 is noise. words: (B, Lt). Gives noise minus data, like z."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.read = nn.Linear(17, 16), nn.Linear(16, 16), nn.Embedding(128, 16)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, z: Tensor, when: Tensor, **rest: Any) -> Tensor:
        cells = z.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 5, 2, 4, 6)  # patches of 2 x 2
        states = cells.flatten(4).flatten(1, 3)
        states = self.enter(torch.cat([states, when.view(-1, 1, 1).expand(-1, states.shape[1], 1)], 2))
        return (
            self.leave(self.mix(states, self.read(rest["words"])))
            .view(cells.shape)
            .permute(0, 1, 4, 2, 5, 3, 6)
            .flatten(5, 6)
            .flatten(3, 4)
        )

    def mix(self, states: Tensor, told: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, told)
        return states


class Boxes:
    """A VAE without weights: means over boxes of 8 x 8."""

    def encode(self, x: Tensor) -> Tensor:
        return F.pad(F.avg_pool3d(x, (1, 8, 8)), (0, 0, 0, 0, 0, 0, 0, 1))

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z[:, :3], scale_factor=(1.0, 8.0, 8.0))


class Euler:
    def step(self, velocity: Tensor, z: Tensor, share: float) -> Tensor:
        return z - share * velocity


class BarePipeline:
    family = Family(
        name="bare",
        models="a bare nn.Module",
        pipelines=("BarePipeline",),
        blocks=("layers",),
        cfg="two_calls",
        guidance="strength",
        pure_noise_timestep=1.0,
        layout="BTCHW",
        latents_argument=("z",),
        timestep_argument="when",
        batched_arguments=frozenset(["z", "when", "words"]),
        returns_tensor=True,
        patch=(1, 2, 2),
        widths=16,
        text_embedder="read",
    )

    def __init__(self) -> None:
        self.transformer, self.vae, self.scheduler = Net(), Boxes(), Euler()
        self.components = {"transformer": self.transformer}

    @torch.no_grad()
    def __call__(
        self, prompt: Any, generator: Any, strength: float = 4.0, num_inference_steps: int = 6, output_type: str = "np"
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words = torch.tensor([[ord(letter) for letter in text[:24].ljust(24)] for text in prompts])
        z = randn_tensor((len(prompts), 3, 4, 4, 6), generator=generator)
        for step in range(num_inference_steps):
            when = torch.full((len(z),), 1 - step / num_inference_steps)
            velocity = self.transformer(z, when, words=words)
            if strength > 1:
                unconditional = self.transformer(z, when, words=torch.zeros_like(words))
                velocity = unconditional + strength * (velocity - unconditional)
            z = self.scheduler.step(velocity, z, 1 / num_inference_steps)
        if output_type == "latent":
            return (z,)
        return ((self.vae.decode(z.transpose(1, 2)) * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy(),)


def bare() -> tuple[Any, dict[str, Any]]:
    """Latents (3, 4, 4, 6); 18 tokens of width 16."""
    torch.manual_seed(0)
    return BarePipeline(), {"num_inference_steps": 6, "strength": 4.0}
