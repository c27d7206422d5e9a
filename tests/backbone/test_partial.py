"""A judge that stands alone loads the blocks it reads: later ones are neither read nor allocated."""

from __future__ import annotations

import json

import pytest
import torch
from tests import tiny
from tests.zoo import VARIANTS

import prism
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.judge import Judge


@pytest.mark.parametrize(
    ("variant", "tap"), [("wan21_t2v_euler", 1), ("hunyuan", 3), ("wan22_a14b_t2v", 2), ("latte", 1)]
)
def test_later_shards_may_be_absent(variant, tap, tmp_path):
    pipe, call = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="8KB")
    whole = Judge.untrained(pipe, tap=tap, dim=16)
    whole.save_pretrained(tmp_path / "head", trained_on={})
    place = tmp_path / "pipe" / "transformer"
    where = json.loads((place / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    late = list(whole.backbone.blocks[tap:])
    if variant == "latte":
        late += pipe.transformer.transformer_blocks[tap:]
    names = {f"{path}.{name}" for path, module in pipe.transformer.named_modules() if any(module is b for b in late)
             for name in module.state_dict()}  # fmt: skip
    needless = set(where.values()) - {shard for name, shard in where.items() if name not in names}
    assert needless
    for shard in needless:
        (place / shard).unlink()

    with pytest.raises(PrismError, match="loaded already, and 'dtype' says how"):
        Judge.from_pretrained(tmp_path / "head", pipe, dtype=torch.bfloat16)
    alone = Judge.from_pretrained(tmp_path / "head", tmp_path / "pipe", dtype=torch.float32)
    held = {name for name, _ in alone.backbone.denoiser.named_parameters()}
    assert held == {name for name, _ in pipe.transformer.named_parameters()} - names
    assert (alone.backbone.num_blocks, len(alone.backbone.blocks)) == (whole.backbone.num_blocks, tap)
    shape = whole.backbone.condition([tiny.PROMPT], **call)[0].shape
    latents = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    prompts = [tiny.PROMPT, tiny.OTHER_PROMPT]
    found = alone.score(latents, prompts, 950.0, **call)
    torch.testing.assert_close(found, whole.score(latents, prompts, 950.0, **call))
    with pytest.raises(PrismError, match="blocks were loaded; load it up to block"):
        conditioning = alone.backbone.condition(prompts, **call)
        alone.backbone.tokens(latents, conditioning, 950.0, tap + 1)
    with pytest.raises(PrismError, match="cannot sample"):
        prism.best_of_n(alone.backbone.pipe, alone, tiny.PROMPT, **call)


def test_what_is_missing_is_named(tmp_path):
    tiny.wan().save_pretrained(tmp_path / "pipe", max_shard_size="8KB")
    with pytest.raises(
        PrismError,
        match="WanTransformer3DModel, has 3; a head that reads after more is one of another",
    ):
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=4)
    for shard in (tmp_path / "pipe" / "transformer").glob("*00001-of*"):
        shard.unlink()
    with pytest.raises(PrismError, match="is missing; it holds blocks that the head reads"):
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=1)
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "OddPipeline"}')
    with pytest.raises(PrismError, match="OddPipeline is not supported yet"):
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=1)


def on_the_hub(cache, pipe, lost):
    """A repository as the Hub's client leaves it after a download, without shards of `lost` tensors alone."""
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("0" * 40)
    pipe.save_pretrained(snapshot, max_shard_size="8KB")
    place = snapshot / "transformer"
    where = json.loads((place / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    needless = set(where.values()) - {shard for name, shard in where.items() if not name.startswith(lost)}
    for shard in needless:
        (place / shard).unlink()
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert needless
    return {"cache_dir": str(cache), "local_files_only": True}


def test_of_a_repository_on_the_hub_later_shards_are_not_asked_for(tmp_path):
    pipe = tiny.wan()
    hub = on_the_hub(tmp_path, pipe, ("blocks.1.", "blocks.2."))
    alone, whole = Backbone.from_pretrained("someone/tiny", up_to=1, **hub), Backbone(pipe)
    latents = torch.randn((1, 16, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    found, expected = (
        each.tokens(latents, each.condition([tiny.PROMPT], **tiny.CALL_WAN), 500.0, 1) for each in (alone, whole)
    )
    # Weights mapped from a file lie elsewhere in memory than built ones, and some processors' kernels round by that.
    torch.testing.assert_close(found.visual, expected.visual, rtol=1e-5, atol=1e-6)
    with pytest.raises(PrismError, match=r"The file transformer/.*safetensors, which the head reads, could not be"):
        Backbone.from_pretrained("someone/tiny", up_to=2, **hub)
    with pytest.raises(PrismError, match="No diffusers pipeline could be loaded from nobody/tiny"):
        Backbone.from_pretrained("nobody/tiny", up_to=1, **hub)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, {"transformer": torch.bfloat16, "default": torch.float32}])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_are_those_that_diffusers_loads(dtype, variant, tmp_path):
    """In their dtype too: of Wan norms and timesteps stay in float32 beside blocks in bfloat16."""
    tiny.wan().to(torch.float16).save_pretrained(tmp_path / "pipe", max_shard_size="8KB", variant=variant)
    options = {"torch_dtype": dtype, "variant": variant}
    whole = Backbone.from_pretrained(str(tmp_path / "pipe"), **options)
    alone = Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=2, **options)
    if dtype is None:
        assert whole.dtype == alone.dtype == torch.float32
    else:
        assert {value.dtype for value in alone.denoiser.parameters()} == {torch.bfloat16, torch.float32}
    wanted = dict(whole.denoiser.named_parameters())
    found = dict(alone.denoiser.named_parameters())
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name
