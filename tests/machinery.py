"""What people do to a pipeline of real size, and the question asked of each: is the result still the stock one?"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from tests import tiny
from torch import nn

import prism
from prism.backbone import Backbone

CALL: dict[str, Any] = {**tiny.CALL_WAN, "num_inference_steps": 5, "output_type": "latent"}  # of both families
STEP = 3  # of the first cut
RUNS: dict[str, dict[str, Any]] = {
    "early": {"schedule": [(STEP, 2), (4, 1)]},
    "draft": {"strategy": "draft", "draft_steps": 2, "num_draws": 1},
    "full": {"strategy": "full", "num_draws": 1},
}
FAMILIES: dict[str, Callable[[], Any]] = {"wan": lambda: tiny.wan("unipc"), "cogvideox": lambda: tiny.cogvideox("dpm")}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def stock(pipe: Any, seed: int, **changes: Any) -> torch.Tensor:
    """What a plain call gives."""
    return pipe(tiny.PROMPT, generator=seeded(seed), **{**CALL, **changes}).frames


def blocks(pipe: Any) -> list[nn.Module]:
    denoiser = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    return list(denoiser.blocks if hasattr(denoiser, "blocks") else denoiser.transformer_blocks)


def heard(pipe: Any, block: int, seed: int = 0, **changes: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """By plain hooks in a plain call: each denoiser call's arguments, and the video tokens after `block`."""
    arguments: list[dict[str, Any]] = []
    states: list[torch.Tensor] = []

    @torch.compiler.disable  # where a block is compiled, its hooks are too
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [
        pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: arguments.append(kwargs), with_kwargs=True),
        blocks(pipe)[block - 1].register_forward_hook(keep),
    ]
    try:
        stock(pipe, seed, **changes)
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(arguments, states, strict=True))


def assert_tokens(pipe: Any, block: int = 2) -> None:
    """A tap reads, to the bit, what a plain hook sees in the stock call, and stops behind it."""
    backbone, ran = Backbone(pipe), []
    found = heard(pipe, block)
    assert len(found) == CALL["num_inference_steps"] * (2 if backbone.family.cfg == "two_calls" else 1)
    late = blocks(pipe)[block].register_forward_hook(torch.compiler.disable(lambda *_: ran.append(1)))
    try:
        for arguments, states in found:
            with torch.no_grad():
                assert torch.equal(backbone.read(arguments, block, stop=True)[0].visual, states)
    finally:
        late.remove()
    assert not ran


def few(run: str) -> int:
    """Candidates of one of `RUNS`: two cuts need three of them, and to pick one takes two."""
    return 3 if run == "early" else 2


def assert_exact(
    pipe: Any, judge: Any = None, runs: Any = RUNS, options: Any = MappingProxyType({}), **changes: Any
) -> None:
    """At batch size 1 the winner of every strategy is the stock call's own, to the bit, and the scores are float32."""
    judge = prism.Judge.untrained(pipe, tap=2, dim=16) if judge is None else judge
    for name in runs:
        run = {"n": few(name), "seed": 5, "batch_size": 1, **CALL, **RUNS[name], **changes, **options}
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, **run)
        expected = stock(pipe, result.seed, **changes)
        assert result.latents.dtype == expected.dtype, name
        assert torch.equal(result.latents, expected), name
        assert torch.equal(result.video, expected[0]), name
    assert all(value.dtype == torch.float32 for member in judge.members for value in member.head.parameters())


def count(module: nn.Module) -> list[int]:
    """Rows of each real forward run of a text encoder, from now on."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    return rows
