"""ComfyUI's stand-ins in `sys.modules`, a judge of a diffusers pipeline, and a ComfyUI model of the same weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.comfyui.tests import comfy_stand_in
from tests import tiny

from prism.judge import Judge


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The models folder of a ComfyUI that is not there."""
    folder = tmp_path_factory.mktemp("models")
    before = dict(sys.modules)
    made = comfy_stand_in.install(str(folder))
    yield folder
    for name in made:
        sys.modules.pop(name, None)
    sys.modules.update({name: before[name] for name in made if name in before})


@pytest.fixture(scope="session")
def world(comfy: Path) -> Any:
    """model: ComfyUI's; pipe, judge: diffusers', of the same weights; folder: the judge's; texts: two prompts'."""
    from integrations.comfyui.families import MATCHES

    pipe = tiny.wan()
    vae = pipe.vae.config
    model = comfy_stand_in.patcher(vae.latents_mean, vae.latents_std)
    wanted = pipe.transformer.state_dict()
    mapped = MATCHES[0].state(model.get_model_object("diffusion_model").state_dict())
    pipe.transformer.load_state_dict({name: mapped.get(name, value) for name, value in wanted.items()})
    judge = Judge.untrained(pipe, tap=2, seed=3)
    folder = comfy / "prism" / "judge"
    folder.parent.mkdir(exist_ok=True)
    judge.save_pretrained(folder)
    generator = torch.Generator().manual_seed(4)
    texts = torch.randn(2, 12, tiny.TEXT_WIDTH, generator=generator)
    texts[0, 7:], texts[1, 3:] = 0.0, 0.0  # padding
    conditionings = [[[text[None], {}]] for text in texts]
    return SimpleNamespace(model=model, pipe=pipe, judge=judge, folder=folder, texts=texts, conditionings=conditionings)
