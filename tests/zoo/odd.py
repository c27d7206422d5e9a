"""Bare pipelines with what most do not have, one thing each: what a row of facts can say of a model of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from tests.zoo.bare import BarePipeline, Boxes, Net
from torch import Tensor, nn

from prism.backbone import OwnClock


class Joined(Net):
    """Its blocks carry a global token before the video's and the text's behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1, 1, 16))

    def mix(self, states: Tensor, told: Tensor) -> Tensor:
        count, rows = states.shape[1], len(states)
        states = torch.cat([self.first.expand(rows, -1, -1), states, told], 1)
        for layer in self.layers:
            states = layer(states, told)
        return states[:, 1 : count + 1]


class InDictionary(Net):
    """It takes its text in a dictionary, with a number and a table that is not of rows."""

    def forward(self, z: Tensor, when: Tensor, **rest: Any) -> Tensor:
        told = rest["told"]
        assert told["scale"] == 2.0
        assert len(told["inner"]["table"]) == 2
        return super().forward(z, when, words=told["inner"]["words"]) * told["scale"] / 2


class WithSound(Net):
    """It denoises four samples of sound beside the video, and each sees the other."""

    def forward(self, z: Tensor, when: Tensor, **rest: Any) -> Any:
        sound = rest.pop("sound")
        velocity = super().forward(z, when + sound.mean(1), **rest)
        return velocity, sound - z.mean((1, 2, 3, 4))[:, None]


class Tuples(Boxes):
    def encode(self, x: Tensor) -> Any:
        return (SimpleNamespace(latents=super().encode(x)),)


@dataclass
class Output:
    """What a pipeline with sound gives."""

    frames: Any
    sound: Tensor | None = None

    def __getitem__(self, place: int) -> Any:
        return (self.frames, self.sound)[place]


class OddPipeline(BarePipeline):
    """BarePipeline with its loop in parts, which the oddities change."""

    kind: Callable[[], Net] = Net

    def __init__(self) -> None:
        super().__init__()
        self.transformer = self.kind()
        self.components = {"transformer": self.transformer}

    def told(self, words: Tensor) -> dict[str, Any]:
        return {"words": words}

    def when(self, share: float) -> float:
        return share

    @torch.no_grad()
    def __call__(
        self, prompt: Any, generator: Any, strength: float = 4.0, num_inference_steps: int = 6, output_type: str = "np"
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words = torch.tensor([[ord(letter) for letter in text[:24].ljust(24)] for text in prompts])
        z = self.start((len(prompts), 3, 4, 4, 6), generator)
        for step in range(num_inference_steps):
            when = torch.full((len(z),), self.when(1 - step / num_inference_steps))
            velocity = self.denoise(z, when, self.told(words))
            if strength > 1:
                unconditional = self.denoise(z, when, self.told(torch.zeros_like(words)))
                velocity = unconditional + strength * (velocity - unconditional)
            z = self.scheduler.step(velocity, z, 1 / num_inference_steps)
        return self.output(z, output_type)

    def start(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        return randn_tensor(shape, generator=generator)

    def denoise(self, z: Tensor, when: Tensor, told: dict[str, Any]) -> Tensor:
        return self.transformer(z, when, **told)

    def output(self, z: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return (z,)
        return ((self.vae.decode(z.transpose(1, 2)) * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy(),)


class JoinedPipeline(OddPipeline):
    family = replace(BarePipeline.family, name="joined", text_argument="words", tokens_before=1, tokens_behind="text")
    kind = Joined


class DictionaryPipeline(OddPipeline):
    family = replace(
        BarePipeline.family, name="dictionary", batched_arguments=frozenset(["z", "when", "told.inner.words"])
    )
    kind = InDictionary

    def told(self, words: Tensor) -> dict[str, Any]:
        return {"told": {"scale": 2.0, "inner": {"words": words, "table": torch.zeros(2)}}}


class ClockPipeline(OddPipeline):
    """Its timesteps are the squares of the noise levels."""

    family = replace(
        BarePipeline.family,
        name="clock",
        clock=OwnClock(
            level=lambda scheduler, t: (1 - t / 1000, t / 1000, (t / 1000) ** 2),
            t_of=lambda scheduler, timestep: 1000 * timestep**0.5,
        ),
    )

    def when(self, share: float) -> float:
        return share**2


class CarriedPipeline(OddPipeline):
    """Its loop, and what it gives as latents, has channels before frames; its denoiser frames before channels."""

    family = replace(BarePipeline.family, name="carried", loop_layout="BCTHW")

    def start(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        return super().start(shape, generator).transpose(1, 2)

    def denoise(self, z: Tensor, when: Tensor, told: dict[str, Any]) -> Tensor:
        return super().denoise(z.transpose(1, 2), when, told).transpose(1, 2)

    def output(self, z: Tensor, output_type: str) -> Any:
        return (z,) if output_type == "latent" else super().output(z.transpose(1, 2), output_type)


class OneTextPipeline(OddPipeline):
    family = replace(BarePipeline.family, name="one-text", single_prompt=True)

    def __call__(
        self, prompt: Any, generator: Any, strength: float = 4.0, num_inference_steps: int = 6, output_type: str = "np"
    ) -> Any:
        prompt.lower()
        return super().__call__(prompt, generator, strength, num_inference_steps, output_type)


class TuplePipeline(OddPipeline):
    """Its VAE gives latents in a tuple, in an object of its own, and no distribution."""

    family = replace(BarePipeline.family, name="tuple")

    def __init__(self) -> None:
        super().__init__()
        self.vae = Tuples()


class SoundPipeline(OddPipeline):
    """A sound is denoised beside the video, by the same network."""

    family = replace(
        BarePipeline.family,
        name="sound",
        returns_tensor=False,
        outputs=2,
        batched_arguments=frozenset(["z", "when", "words", "sound"]),
    )
    kind = WithSound

    @torch.no_grad()
    def __call__(
        self, prompt: Any, generator: Any, strength: float = 4.0, num_inference_steps: int = 6, output_type: str = "np"
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words = torch.tensor([[ord(letter) for letter in text[:24].ljust(24)] for text in prompts])
        z, sound = (randn_tensor((len(prompts), *shape), generator=generator) for shape in ((3, 4, 4, 6), (4,)))
        for step in range(num_inference_steps):
            when = torch.full((len(z),), 1 - step / num_inference_steps)
            found = self.transformer(z, when, words=words, sound=sound)
            if strength > 1:
                others = self.transformer(z, when, words=torch.zeros_like(words), sound=sound)
                found = [other + strength * (one - other) for one, other in zip(found, others)]
            sound = sound - found[1] / num_inference_steps
            z = self.scheduler.step(found[0], z, 1 / num_inference_steps)
        return Output(self.output(z, output_type)[0], sound)


ODD: dict[str, type[OddPipeline]] = {
    "tokens before and behind": JoinedPipeline,
    "rows in a dictionary": DictionaryPipeline,
    "a clock of its own": ClockPipeline,
    "latents carried otherwise": CarriedPipeline,
    "one text and no list": OneTextPipeline,
    "a VAE without a distribution": TuplePipeline,
    "sound beside the video": SoundPipeline,
}


def odd(kind: type[OddPipeline]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    return kind(), {"num_inference_steps": 6, "strength": 4.0}
