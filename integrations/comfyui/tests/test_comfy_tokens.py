"""A judge trained in diffusers reads the same tokens in ComfyUI, and refuses a model that computes otherwise."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.comfyui import self_check
from integrations.comfyui.by_hand import VARIANTS
from integrations.comfyui.families import MATCHES
from integrations.comfyui.judge import LoadedJudge, family_of
from integrations.comfyui.reading import Reader, conditional, text_mask
from integrations.comfyui.tests import wan_stand_in
from integrations.comfyui.tests.comfy_stand_in import CONFIG
from tests import tiny

from prism.backbone.families import FAMILIES
from prism.errors import PrismError
from prism.sampling.plan import judging_noise

WAN = MATCHES[0]


def difference(**config: Any) -> float:
    return self_check.difference(WAN, FAMILIES["wan"], wan_stand_in.WanModel, {**CONFIG, **config})


def test_the_two_classes_give_the_same_tokens(comfy: Any) -> None:
    assert difference() < 1e-5
    assert difference(in_dim=48, out_dim=48) < 1e-5  # Wan 2.2 5B


def exact_gelu(self: Any, *args: Any) -> None:
    self.ffn[1] = torch.nn.GELU()


def untrained_norm(self: Any, *args: Any) -> None:
    self.norm3 = torch.nn.LayerNorm(args[0], eps=1e-6, elementwise_affine=False)


PLANTED = {
    "rows before columns": lambda patch: patch.setattr(
        wan_stand_in, "positions", lambda grid, width: true_positions((grid[0], grid[2], grid[1]), width)
    ),
    "an exact GELU": lambda patch: patch.setattr(wan_stand_in.Block, "__init__", then(exact_gelu)),
    "a norm without weights": lambda patch: patch.setattr(wan_stand_in.Block, "__init__", then(untrained_norm)),
    "a norm per head": lambda patch: patch.setattr(
        wan_stand_in.RMSNorm, "forward", lambda self, x: rms(x.unflatten(-1, (2, -1))).flatten(-2) * self.weight
    ),
}
true_positions, true_init, rms = (
    wan_stand_in.positions,
    wan_stand_in.Block.__init__,
    lambda x: x / x.pow(2).mean(-1, True).sqrt(),
)


def then(change: Any) -> Any:
    def init(self: Any, *args: Any) -> None:
        true_init(self, *args)
        change(self, *args)

    return init


@pytest.mark.parametrize("planted", PLANTED)
def test_a_class_that_computes_otherwise_is_refused(comfy: Any, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_passed", {})
    PLANTED[planted](monkeypatch)
    with pytest.raises(PrismError, match=r"differ by|has nothing"):
        self_check.check(WAN, FAMILIES["wan"], wan_stand_in.WanModel, CONFIG)
    assert not self_check._passed


def test_a_check_is_made_once_a_configuration(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(self_check, "_passed", {})
    monkeypatch.setattr(self_check, "difference", lambda *args: made.append(1) or 1e-7)
    for config in (CONFIG, CONFIG, {**CONFIG, "dim": 48}, {**CONFIG, "dtype": torch.float16}):
        self_check.check(WAN, FAMILIES["wan"], wan_stand_in.WanModel, config)
    assert len(made) == 2


def test_a_class_that_cannot_be_built_gives_a_sentence(comfy: Any) -> None:
    with pytest.raises(PrismError, match="cannot be compared with diffusers' WanTransformer3DModel"):
        self_check.difference(WAN, FAMILIES["wan"], torch.nn.Linear, CONFIG)


def test_scores_are_those_of_the_judge_in_diffusers(world: Any) -> None:
    from integrations.comfyui import nodes

    (judge,) = nodes.LoadJudge.execute("judge").args
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    t, (positive, _) = 650.0, world.conditionings
    found, best = nodes.ScoreLatent.execute(world.model, judge, positive, {"samples": latents}, t, 3, 7).args
    generator, draws = judging_noise(7), []
    for _ in range(3):
        noise = torch.randn(latents[:1].shape, generator=generator)
        noisy = (1 - t / 1000) * world.model.get_model_object("latent_format").process_in(latents) + t / 1000 * noise
        embeds = {"prompt_embeds": world.texts[:1], "negative_prompt_embeds": world.texts[1:]}
        draws.append(world.judge.score(noisy, None, t, **tiny.CALL_WAN, **embeds))
    wanted, errors = torch.stack(draws).mean(0), torch.stack(draws).std(0) / math.sqrt(3)
    for row in found["candidates"]:
        got = torch.tensor([row["scores"][name] for name in world.judge.dimensions])
        torch.testing.assert_close(got, wanted[row["sample"]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(row["errors"]), errors[row["sample"]], rtol=1e-3, atol=1e-5)
    assert best == max(row["scores"]["overall"] for row in found["candidates"])


def changed(model: Any, **objects: Any) -> Any:
    return dataclasses.replace(model, objects={**model.objects, **objects})


def test_a_model_that_the_judge_was_not_trained_on_is_refused(world: Any) -> None:
    judge = LoadedJudge(str(world.folder))
    model, scale = world.model, world.model.get_model_object("latent_format")
    larger = SimpleNamespace(unet_config={**CONFIG, "num_layers": 30})
    wider = SimpleNamespace(unet_config={**CONFIG, "in_dim": 36})
    double = SimpleNamespace(latent_channels=16, latent_dimensions=3, process_in=lambda x: 2 * scale.process_in(x))
    for other, said in (
        (changed(model, diffusion_model=torch.nn.Linear(1, 1)), "is WanModel in ComfyUI, and this model is Linear"),
        (changed(model, model_config=larger), "with blocks 3, and this model has 30"),
        (changed(model, model_config=wider), "with in channels 16, and this model has 36"),
        (changed(model, model_sampling=torch.nn.Identity()), "those of Identity and not of flow matching"),
        (changed(model, latent_format=double), "on latents of another scale than those of SimpleNamespace"),
        (changed(model, latent_format=SimpleNamespace(latent_channels=4)), "latents of 16 channels, and this model's"),
    ):
        with pytest.raises(PrismError, match=said):
            judge.reader(other)


def test_every_family_of_the_table_is_one_of_prism_and_of_diffusers() -> None:
    import diffusers

    for match in MATCHES:
        assert hasattr(diffusers, match.diffusers)
        for name in match.families:
            assert family_of({"pipeline": FAMILIES[name].pipelines[0]}, "x") == (FAMILIES[name], match)
    with pytest.raises(PrismError, match="was trained on LattePipeline, which no class of ComfyUI is matched with"):
        family_of({"pipeline": "LattePipeline"}, "x")


@pytest.mark.parametrize("match", MATCHES, ids=lambda match: match.kind)
def test_each_example_is_a_call_of_diffusers_class(match: Any) -> None:
    """What the check gives to diffusers' class fits it, and the tokens read lie on the latents' grid."""
    name, _, config = next(each for each in VARIANTS if each[0] == match.families[0])
    small = match.small(config)
    with torch.random.fork_rng(devices=[]):
        import diffusers

        model = getattr(diffusers, match.diffusers)(**match.config(small)).eval()
    example, family = match.example(small, name), FAMILIES[name]
    blocks = len(family.block_list(model))
    with torch.no_grad():
        tokens = self_check.read_diffusers(family, model, example, [blocks // len(match.blocks), blocks])
    size = (1, *example.latents.shape[2:])[-3:]
    assert tokens.grid == tuple(extent // patch for extent, patch in zip(size, match.patch))
    assert tokens.visual.shape == (2, math.prod(tokens.grid), family.block_widths(model)[-1])
    assert set(tokens.lower) == ({blocks // 2} if len(match.blocks) > 1 else set())
    assert tokens.text is not None


def test_parameters_that_hold_several_of_diffusers_are_split() -> None:
    for match in (match for match in MATCHES if match.parts):
        qkv, first = torch.arange(12.0).view(12, 1), torch.arange(28.0).view(28, 1)
        state = match.state(
            {
                **{"double_blocks.1.txt_attn.qkv.weight": qkv, "single_blocks.0.linear1.weight": first},
                **{"single_blocks.0.linear2.weight": torch.zeros(4, 20), "double_blocks.1.img_mlp.2.bias": qkv},
                "single_blocks.0.norm.key_norm.scale": qkv,
            }
        )
        assert [state[f"transformer_blocks.1.attn.add_{name}_proj.weight"][0, 0] for name in "qkv"] == [0, 4, 8]
        single = "single_transformer_blocks.0."
        assert [state[f"{single}attn.to_{name}.weight"][0, 0] for name in "qkv"] == [0, 4, 8]
        assert torch.equal(state[f"{single}proj_mlp.weight"], first[12:])
        assert {"transformer_blocks.1.ff.net.2.bias", f"{single}proj_out.weight", f"{single}attn.norm_k.weight"} < set(
            state
        )


def test_conditional_rows_and_text_masks() -> None:
    assert conditional({"cond_or_uncond": [1, 0]}, 4) == slice(2, 4)
    assert conditional({"cond_or_uncond": [0, 1]}, 2) == slice(0, 1)
    assert conditional({}, 3) == slice(0, 3)
    text, mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[1, 0]])
    expected = {"wan": [[True, False]], "ltx-video": [[True, False]], "flux": None}
    for name, rows in expected.items():
        seen = text_mask(FAMILIES[name], text, mask)
        assert (None if seen is None else seen.tolist()) == rows
    added = text_mask(FAMILIES["hunyuan-video"], text, torch.tensor([[0.0, -torch.inf]]))
    assert torch.equal(torch.as_tensor(added), torch.tensor([[True, False]]))
    assert text_mask(FAMILIES["hunyuan-video"], text, None) is None


def test_other_tokens_beside_the_videos_are_refused(world: Any) -> None:
    reader = Reader(WAN, FAMILIES["wan"], world.model.get_model_object("diffusion_model"), [2])
    reader._grid, reader._batch, reader._text = (3, 2, 2), 1, torch.zeros(1, 5, 24)
    assert reader._tokens(2, torch.zeros(1, 12, 24)).shape == (1, 12, 24)
    with pytest.raises(PrismError, match="gives 16 tokens, where the video has 3 x 2 x 2 and its text 0 beside them"):
        reader._tokens(2, torch.zeros(1, 16, 24))
