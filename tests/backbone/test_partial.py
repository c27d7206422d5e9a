"""A judge that stands alone loads the blocks it reads: later ones are neither read nor allocated."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from tests import tiny
from tests.mutations import copied, watchdog
from tests.works import works
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
    with pytest.raises(PrismError, match="There is no folder nobody/tiny, and no diffusers pipeline of this name"):
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny.wan().save_pretrained(place := tmp_path_factory.mktemp("saved") / "pipe", max_shard_size="8KB")
    return place


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first_shard(folder):
    return min((folder / "transformer").glob("*.safetensors"))


def in_its_place(path, make):
    path.unlink()
    make(path)


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
DAMAGES = {
    "a cut shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-9]), "pipeline could be|whole"),
    "an empty shard": (lambda f: first_shard(f).write_bytes(b""), "pipeline could be|whole safetensors"),
    "a pickle as shard": (lambda f: first_shard(f).write_bytes(pickle.dumps({})), "pipeline could be|is a pickle"),
    "a pipe as shard": (lambda f: in_its_place(first_shard(f), os.mkfifo), "cannot be read: it is a pipe"),
    "a device as scheduler": (
        lambda f: in_its_place(f / "scheduler/scheduler_config.json", lambda path: path.symlink_to("/dev/zero")),
        "cannot be read: it is a device",
    ),
    "a list as index": (lambda f: (f / INDEX).write_text("[]"), "pipeline could be|does not name files beside it"),
    "a shard elsewhere": (
        lambda f: edit(f / INDEX, weight_map={"scale_shift_table": "../../secret.safetensors"}),
        "pipeline could be|does not name files beside it",
    ),
    "no object": (lambda f: (f / "model_index.json").write_text("[1]"), "does not name a pipeline's class"),
    "class null": (lambda f: edit(f / "model_index.json", _class_name=None), "does not name a pipeline's class"),
    "class a list": (lambda f: edit(f / "model_index.json", _class_name=["os", "system"]), "does not name a pipeline"),
    "class unknown": (lambda f: edit(f / "model_index.json", _class_name="OddPipeline"), "OddPipeline"),
    "class no pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="WanTransformer3DModel"),
        "WanTransf|loaded",
    ),
    "component odd": (lambda f: edit(f / "model_index.json", transformer=["diffusers", 3]), "pipeline could be loaded"),
    "component null": (lambda f: edit(f / "model_index.json", vae=None), "pipeline could be loaded"),
    "blocks without end": (lambda f: edit(f / "transformer/config.json", num_layers=10**9), "num_layers = 1e"),
    "positions without end": (lambda f: edit(f / "transformer/config.json", rope_max_seq_len=10**9), "_len = 1e"),
    "words for blocks": (lambda f: edit(f / "transformer/config.json", num_layers="three"), "pipeline could be loaded"),
    "other heads": (lambda f: edit(f / "transformer/config.json", num_attention_heads=3), "could be loaded"),
    "nested": (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "not valid JSON"),
    "NaN": (lambda f: edit(f / "vae/config.json", z_dim=float("nan")), "pipeline could be loaded"),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), "pipeline could be loaded"),
}


@works(
    "Inputs and outputs",
    "a pipeline's folder that is damaged: cut shards, odd configurations, pipes and devices in place of files",
    "refused",
    "one sentence that names the folder or the file, before any weight is allocated where that can be known",
)
@pytest.mark.parametrize("up_to", [None, 1], ids=["whole", "first blocks"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_a_sentence(folder, tmp_path, name, up_to):
    damage, sentence = DAMAGES[name]
    damage(copied(folder, tmp_path / "pipe"))
    with watchdog(), pytest.raises(PrismError, match=sentence) as caught:
        Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=up_to)
    assert len(str(caught.value)) <= 500


USED = {
    "timesteps in words": ("scheduler/scheduler_config.json", {"num_train_timesteps": "many", "shift": "x"}),
    "eps in words": ("transformer/config.json", {"eps": "small"}),
    "a patch of the VAE": ("vae/config.json", {"patch_size": 1.5}),
    "statistics in words": ("vae/config.json", {"latents_mean": [{"a": 1}] * 16}),
    "too few statistics": ("vae/config.json", {"latents_mean": [0.0] * 3}),
}


@pytest.mark.parametrize("name", USED)
def test_what_breaks_only_when_used_is_a_sentence(folder, tmp_path, name):
    file, changes = USED[name]
    edit(copied(folder, tmp_path / "pipe") / file, **changes)
    latents = torch.zeros(1, 16, 3, 4, 4)
    with watchdog(), pytest.raises(PrismError, match=r"loaded|refused|broke|must"):
        backbone = Backbone.from_pretrained(str(tmp_path / "pipe"))
        Judge.untrained(backbone, tap=1, dim=16).score(latents, tiny.PROMPT, 500.0, **tiny.CALL_WAN)
        backbone.encode(backbone.decode(latents))


class OwnError(Exception):
    """As a user's own hook raises it."""


@pytest.mark.parametrize(
    "error", [OwnError("mine"), MemoryError("no"), RuntimeError("CUDA out of memory."), KeyboardInterrupt()]
)
@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_what_is_nobodys_fault_passes_as_it_is(part, error):
    pipe = tiny.wan()
    judge = Judge.untrained(pipe, tap=2, dim=16)

    def explode(*_):
        raise error

    (pipe.text_encoder if part == "text_encoder" else pipe.transformer.blocks[0]).register_forward_pre_hook(explode)
    with pytest.raises(type(error)):
        judge.score(torch.zeros(1, 16, 3, 4, 4), tiny.PROMPT, 500.0, **tiny.CALL_WAN)
