"""Tiny pipelines with an untrained judge, and what a plain call of them gives for each seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests import tiny

from prism.judge import Judge

BUILDERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan-euler": (lambda: tiny.wan("euler"), tiny.CALL_WAN),
    "wan-unipc": (lambda: tiny.wan("unipc"), tiny.CALL_WAN),
    "cogvideox-dpm": (lambda: tiny.cogvideox("dpm"), tiny.CALL_COGVIDEOX),  # draws noise at every step
}


@dataclass
class Setting:
    """A pipeline, its call arguments, and the stock results by seed."""

    name: str
    pipe: Any
    call: dict[str, Any]
    plain: dict[int, tuple[Any, torch.Tensor, list[Any]]] = field(default_factory=dict)

    def judge(self, tap: int = 1, seed: int = 0) -> Judge:
        return Judge.untrained(self.pipe, tap=tap, dim=16, seed=seed)

    def stock(self, seed: int) -> tuple[Any, torch.Tensor, list[Any]]:
        """A plain call's video, its final latents (1, ...), and its latents after each step with its timestep."""
        if seed not in self.plain:
            after: list[Any] = []

            def keep(_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                after.append((tensors["latents"].clone(), timestep))
                return tensors

            def generator() -> torch.Generator:
                return torch.Generator("cpu").manual_seed(seed)

            video = self.pipe(tiny.PROMPT, generator=generator(), **self.call).frames[0]
            watched = {**self.call, "output_type": "latent", "callback_on_step_end": keep}
            latents = self.pipe(tiny.PROMPT, generator=generator(), **watched).frames
            self.plain[seed] = (video, latents, after)
        return self.plain[seed]


@functools.cache
def made(name: str) -> Setting:
    make, call = BUILDERS[name]
    return Setting(name, make(), {**call, "output_type": "np"})


@pytest.fixture(scope="session", params=["wan-unipc", "cogvideox-dpm"])
def setting(request: pytest.FixtureRequest) -> Setting:
    """Guidance in two calls and in one batch; a solver with a memory, and one that draws noise. The Euler solver, which
    has neither, is asked for by tests of exactness: `parametrize("setting", BUILDERS, indirect=True)`.
    """
    return made(request.param)  # once, also where files that use it come apart


@pytest.fixture(scope="session")
def wan() -> Setting:
    return Setting("wan-unipc", tiny.wan("unipc"), {**tiny.CALL_WAN, "output_type": "np"})
