"""Noise levels, token grids and VAE normalisation of each family, against the schedulers' and the VAEs' own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel
from tests import tiny

from prism.backbone import FAMILIES, Backbone, layout
from prism.backbone.registry import family_named, family_of
from prism.backbone.videos import denormalise, normalise
from prism.errors import PrismError


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return Backbone(getattr(tiny, request.param)())


def test_levels_run_from_clean_to_noise(backbone: Backbone) -> None:
    t = torch.linspace(0, 1000, 101)
    alpha, sigma, _ = backbone.family.level(backbone.pipe.scheduler, t)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[-1] == pytest.approx(0, abs=1e-4)
    assert sigma[-1] == pytest.approx(1, abs=1e-4)
    assert bool((alpha.diff() <= 0).all())
    assert bool((sigma.diff() >= 0).all())


def test_ddpm_level_is_the_scheduler_add_noise() -> None:
    backbone = Backbone(tiny.cogvideox())
    z, noise = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([989, 299])
    expected = backbone.pipe.scheduler.add_noise(z, noise, t)
    torch.testing.assert_close(backbone.add_noise(z, t.float(), noise), expected)
    assert backbone.family.level(backbone.pipe.scheduler, t.float())[2].tolist() == [989, 299]


def test_flow_level_is_equation_1() -> None:
    backbone = Backbone(tiny.wan())
    z, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    noisy = backbone.add_noise(z, torch.tensor([250.0, 1000.0]), noise)
    torch.testing.assert_close(noisy[0], 0.75 * z[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy[1], noise[1])
    torch.testing.assert_close(backbone.add_noise(z, 0.0, noise), z)


@pytest.mark.parametrize("t", [-1.0, 1000.5, float("nan")])
def test_a_level_outside_the_range_is_refused(backbone: Backbone, t: float) -> None:
    with pytest.raises(PrismError, match=r"t must lie in \[0, 1000\]"):
        backbone.family.level(backbone.pipe.scheduler, torch.tensor([t]))


def test_tokens_are_in_raster_order(backbone: Backbone) -> None:
    """Changing one latent cell changes most the token of its place on the grid."""
    call = tiny.CALL_WAN if backbone.family.name == "wan" else tiny.CALL_COGVIDEOX
    conditioning = backbone.condition([tiny.PROMPT], **call)
    family, shape = backbone.family, {"wan": (1, 16, 3, 4, 4), "cogvideox": (1, 3, 4, 4, 4)}[backbone.family.name]
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = backbone.tokens(latents, conditioning, 500.0, 1)
    assert plain.grid == (3, 2, 2)
    for place, (frame, row, column) in enumerate((t, h, w) for t in range(3) for h in range(2) for w in range(2)):
        changed = latents.clone()
        layout.unpack(changed, family.layout)[:, :, frame, 2 * row, 2 * column] += 5
        moved = (backbone.tokens(changed, conditioning, 500.0, 1).visual - plain.visual).norm(dim=-1)[0]
        assert int(moved.argmax()) == place


def test_vae_normalisation_inverts(backbone: Backbone) -> None:
    family, pipe = backbone.family, backbone.pipe
    latents = torch.randn(1, 16 if family.name == "wan" else 4, 3, 4, 4)
    back = denormalise(family, pipe, normalise(family, pipe, latents))
    torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-5)


def test_each_row_says_why_its_text_tokens_and_its_tap() -> None:
    """The blocks named are those that the tap's share gives."""
    for family in FAMILIES.values():
        assert family.text_reason, family.name
        assert family.tap_reason, family.name
        for block, blocks in re.findall(r"(\d+) of (\d+)", family.tap_reason):
            assert int(block) == max(1, round(family.tap * int(blocks))), family.name


@pytest.mark.parametrize(
    ("pipeline", "denoiser"),
    [("HunyuanVideoPipeline", HunyuanVideoTransformer3DModel), ("FluxPipeline", FluxTransformer2DModel)],
)
def test_the_tap_of_the_large_model_is_its_fourth_single_stream_block(pipeline: str, denoiser: Any) -> None:
    """By the sizes that diffusers gives these models where none are said."""
    family = family_named(pipeline)
    with torch.device("meta"):
        large = denoiser()
    blocks = family.block_list(large)
    tap = round(family.tap * len(blocks))
    assert tap - len(large.transformer_blocks) == 4
    assert f"{tap} of {len(blocks)}, the fourth" in family.tap_reason


def test_another_pipeline_is_named() -> None:
    with pytest.raises(PrismError, match="The pipeline dict is not supported yet"):
        family_of({})
