"""A judge may be put onto a pipeline that its user trains: modules keep their gradients and their modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.machinery import CALL, seeded
from tests.stores import make
from tests.works import works

import prism
from prism.backbone import Backbone
from prism.judge import Judge

LATENTS = torch.randn(2, 16, 3, 4, 4, generator=seeded(0))


def trained() -> Any:
    """A pipeline whose transformer trains an adapter with dropout, part of it kept in evaluation mode."""
    peft = pytest.importorskip("peft")
    pipe = tiny.wan("unipc")
    pipe.transformer.requires_grad_(False)
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_dropout=0.5, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    pipe.transformer.train()
    pipe.transformer.blocks[1].eval()
    return pipe


def state(pipe: Any) -> dict[str, tuple[bool, list[bool]]]:
    """Each module's mode, and which of its parameters are trained."""
    return {
        f"{part} {name}": (module.training, [value.requires_grad for value in module.parameters(recurse=False)])
        for part, parent in pipe.components.items()
        if isinstance(parent, torch.nn.Module)
        for name, module in parent.named_modules()
    }


def step(pipe: Any) -> list[torch.Tensor]:
    """The gradients of one training step of the user's."""
    torch.manual_seed(0)
    text = torch.randn(2, 12, tiny.TEXT_WIDTH, generator=seeded(1))
    loss = pipe.transformer(LATENTS, torch.tensor([500.0, 300.0]), text, return_dict=False)[0].square().mean()
    parameters = [value for value in pipe.transformer.parameters() if value.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


@works(
    "Adapters and training",
    "put a judge onto a pipeline while an adapter trains on it",
    "exact",
    "Gradients and modes of the modules stay as they are; they are in evaluation mode while a judge reads or samples.",
)
def test_a_judge_beside_a_training_adapter() -> None:
    pipe = trained()
    before, gradients = state(pipe), step(pipe)
    assert len(gradients) == 24
    judge = Judge.untrained(pipe, tap=2, dim=16)
    assert state(pipe) == before
    modes: list[bool] = []
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    scores = judge.score(LATENTS, tiny.PROMPT, 700.0, **CALL)
    assert torch.equal(judge.score(LATENTS, tiny.PROMPT, 700.0, **CALL), scores)  # no dropout
    assert not scores.requires_grad
    for strategy in ("early", "full"):
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, seed=3, strategy=strategy, batch_size=1, **CALL)
        assert state(pipe) == before
    judge.backbone.decode(judge.backbone.encode(torch.rand(1, 9, 32, 32, 3)))
    handle.remove()
    assert modes
    assert not any(modes)
    assert state(pipe) == before
    assert all(torch.equal(one, other) for one, other in zip(step(pipe), gradients, strict=True))
    pipe.transformer.eval()
    plain = pipe(tiny.PROMPT, generator=seeded(result.seed), **CALL).frames
    assert torch.equal(result.latents, plain)


def test_modes_come_back_after_errors() -> None:
    pipe = trained()
    before, judge = state(pipe), Judge.untrained(pipe, tap=2, dim=16)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    for work in (
        lambda: judge.score(LATENTS, tiny.PROMPT, 700.0, **CALL),
        lambda: prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **CALL),
    ):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert state(pipe) == before
    handle.remove()


def test_a_judge_inside_the_users_own_training_loop() -> None:
    """The user's step, forward and backward, may be interrupted by scores."""
    pipe = trained()
    gradients, judge = step(pipe), Judge.untrained(pipe, tap=2, dim=16)
    text = torch.randn(2, 12, tiny.TEXT_WIDTH, generator=seeded(1))
    torch.manual_seed(0)
    loss = pipe.transformer(LATENTS, torch.tensor([500.0, 300.0]), text, return_dict=False)[0].square().mean()
    judge.score(LATENTS, tiny.PROMPT, 700.0, **CALL)
    parameters = [value for value in pipe.transformer.parameters() if value.requires_grad]
    assert all(
        torch.equal(one, other) for one, other in zip(torch.autograd.grad(loss, parameters), gradients, strict=True)
    )


def test_heads_train_and_the_backbone_does_not(tmp_path: Any) -> None:
    pipe = trained()
    before, weights = state(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    backbone = Backbone(pipe)
    judge = Judge.untrained(backbone, tap=2, dim=16, dimensions=("VQ", "MQ"))
    head = {k: v.clone() for k, v in judge.head.state_dict().items()}
    config = prism.TrainConfig(steps=2, validate_every=0)
    prism.train(make(tmp_path / "store"), judge, config, tmp_path / "run", progress=False)
    assert any(not torch.equal(value, head[name]) for name, value in judge.head.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert state(pipe) == before
    assert all(value.grad is None for value in pipe.transformer.parameters())
