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


@pytest.mark.parametrize(("variant", "tap"), [("wan21_t2v_euler", 1), ("hunyuan", 3), ("wan22_a14b_t2v", 2)])
def test_later_shards_may_be_absent(variant, tap, tmp_path):
    pipe, call = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="8KB")
    whole = Judge.untrained(pipe, tap=tap, dim=16)
    whole.save_pretrained(tmp_path / "head", trained_on={})
    place = tmp_path / "pipe" / "transformer"
    where = json.loads((place / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    late = list(whole.backbone.blocks[tap:])
    names = {f"{path}.{name}" for path, module in pipe.transformer.named_modules() if any(module is b for b in late)
             for name in module.state_dict()}  # fmt: skip
    needless = set(where.values()) - {shard for name, shard in where.items() if name not in names}
    assert needless
    for shard in needless:
        (place / shard).unlink()

    alone = Judge.from_pretrained(tmp_path / "head", tmp_path / "pipe")
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
    with pytest.raises(PrismError, match="The tap must lie in 1 to 3"):
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=4)
    for shard in (tmp_path / "pipe" / "transformer").glob("*00001-of*"):
        shard.unlink()
    with pytest.raises(PrismError, match="is missing; it holds blocks that the head reads"):
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=1)
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "OddPipeline"}')
    with pytest.raises(PrismError, match="OddPipeline is not supported yet"):
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=1)
