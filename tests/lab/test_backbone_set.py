"""Backbones of several sizes and stages, made in one go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prism import files, shapeworld
from prism.errors import PrismError
from prism.lab import backbone_set
from prism.lab.backbone_set import Training
from prism.shapeworld import generator, train

TRAININGS = (Training("a", 1, 1, 4, (2,), videos=16), Training("b", 2, 1, 2, videos=16))


def test_a_killed_run_goes_on_and_all_share_the_vae_that_ships(tmp_path, monkeypatch):
    monkeypatch.setitem(
        train.DEFAULTS, "transformer", dataclasses.replace(train.DEFAULTS["transformer"], batch_size=2, snapshots=())
    )
    with monkeypatch.context() as killed:
        kept = train.train_transformer

        def stop(folder, *arguments):
            if folder.parent.name == "b":
                raise KeyboardInterrupt
            return kept(folder, *arguments)

        killed.setattr(train, "train_transformer", stop)
        with pytest.raises(KeyboardInterrupt):
            backbone_set.make(tmp_path / "set", TRAININGS)
    before = files.sha256(tmp_path / "set/backbones/a-4/transformer/diffusion_pytorch_model.safetensors")
    members = backbone_set.make(tmp_path / "set", TRAININGS)
    assert [member.name for member in members] == ["a-2", "a-4", "b-2"]
    assert [member.run for member in members] == ["a", "a", "b"]
    assert files.sha256(members[1].folder / "transformer/diffusion_pytorch_model.safetensors") == before
    assert len(list((tmp_path / "set").glob("latents-*/*"))) == 1  # rendered once

    vae = generator.load(shapeworld.asset_folder("pipeline")).vae.state_dict()
    last = members[2].load()
    assert all(torch.equal(value, vae[name]) for name, value in last.pipe.vae.state_dict().items())
    early, late = (files.load_safetensors(next(each.folder.glob("transformer/*.safetensors"))) for each in members[:2])
    assert not torch.equal(early["patch_embedding.weight"], late["patch_embedding.weight"])
    count = sum(p.numel() for p in last.pipe.transformer.parameters())
    assert members[2].parameters == count
    assert members[2].compute == 6 * count * 2 * 2 * 80  # steps, videos a step, tokens

    with pytest.raises(PrismError, match="trained with layers 1, and 3 is asked for; name another folder"):
        backbone_set.make(tmp_path / "set", [dataclasses.replace(TRAININGS[0], layers=3)])
    with pytest.raises(PrismError, match="a, a; give each a name of its own"):
        backbone_set.make(tmp_path / "other", [TRAININGS[0]] * 2)
    assert not (tmp_path / "other").exists()


def test_the_shipped_backbones_are_known():
    default, early, small = backbone_set.shipped()
    assert default.run == early.run != small.run
    assert default.parameters == early.parameters == 1_753_520
    assert small.parameters == 249_392
    assert default.compute > early.compute > small.compute
