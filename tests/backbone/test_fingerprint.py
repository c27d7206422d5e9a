"""A head fits by what it cannot do without; other settings, wrappers and weights are warned of, and nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import tiny
from tests.machinery import blocks
from tests.works import works
from tests.zoo import VARIANTS
from torch import nn

import prism
from prism.backbone import Backbone
from prism.backbone.fingerprint import class_name, config_text, fits
from prism.backbone.pipeline import unwrapped
from prism.errors import PrismError

CALL = tiny.CALL_WAN
HASHES_ALONE = [False, True]  # as fingerprints were kept by earlier versions


@pytest.fixture(params=HASHES_ALONE, ids=["new head", "head of an earlier version"])
def head(request: Any, tmp_path: Path) -> Path:
    """A head saved on `tiny.wan()`."""
    prism.Judge.untrained(tiny.wan(), tap=2, dim=16).save_pretrained(tmp_path / "head", {})
    if request.param:
        make_old(tmp_path / "head")
    return tmp_path / "head"


def make_old(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("needs", "settings"):
        del config["backbone"][name]
    path.write_text(json.dumps(config))


def load(head: Path, pipe: Any) -> tuple[prism.Judge, list[str]]:
    """The judge, and what was warned of, each without the folder's name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        judge = prism.Judge.from_pretrained(head, pipe)
    return judge, [str(warning.message).replace(str(head), "HEAD") for warning in caught]


def scores(judge: prism.Judge) -> torch.Tensor:
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return judge.score(latents, tiny.PROMPT, 700, **CALL)


class QuantisationConfig:
    """As torchao's: an object, which diffusers keeps among the settings, and whose text has many lines."""

    def to_dict(self) -> dict[str, str]:
        return {"quant_method": "torchao", "quant_type": "int8wo"}

    def __repr__(self) -> str:
        return f"QuantisationConfig {json.dumps(self.to_dict(), indent=2)}"


@works(
    "Precision and quantisation",
    "a transformer loaded with `quantization_config=`, and the head that was trained on the unquantised one",
    "warned",
    "the head loads; the warning names the setting and says that the weights differ",
)
def test_a_quantised_transformer_takes_its_head(head: Path) -> None:
    """What `from_pretrained(quantization_config=...)` leaves: a key in the configuration, and quantised layers."""
    pipe = tiny.wan()
    pipe.transformer.register_to_config(quantization_config=QuantisationConfig())
    for block in blocks(pipe):
        torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, inplace=True)
    judge, said = load(head, pipe)
    assert len(said) == 2
    assert "another configuration of the denoiser (quantization_config was absent and is {'quant_method'" in said[0]
    assert "The head in HEAD was trained on other weights of this architecture; check its accuracy" in said[1]
    assert scores(judge).isfinite().all()


@works(
    "Families of one's own",
    "a diffusers release that adds an argument to a model's class",
    "exact",
    "heads, pixel judges and stores made before it go on loading, without a word where the argument is at its default",
)
def test_keys_of_a_newer_diffusers_are_no_difference(head: Path) -> None:
    pipe = tiny.wan()
    pipe.transformer.register_to_config(added_by_a_newer_diffusers=None)
    pipe.vae.register_to_config(added_by_a_newer_diffusers=None, added_too=None)
    judge, said = load(head, pipe)
    assert said == []
    assert torch.equal(scores(judge), scores(prism.Judge.from_pretrained(head, tiny.wan())))
    pipe.transformer.register_to_config(added_as_well=True)
    pipe.vae.register_to_config(clip_output=False)  # this one has a default of its own
    _, said = load(head, pipe)
    assert len(said) == 2
    assert "the denoiser (added_as_well was absent and is True); check" in said[0]
    assert "VAE (clip_output was " in said[1]


def test_keys_that_an_older_diffusers_lacks_are_no_difference(tmp_path: Path) -> None:
    """A class's default, absent from the configuration that a head was saved with."""
    pipe = tiny.wan()
    config = dict(pipe.transformer.config)
    assert config.pop("pos_embed_seq_len") is None
    assert config.pop("eps") == 1e-6
    pipe.transformer._internal_dict = type(pipe.transformer.config)(config)
    prism.Judge.untrained(pipe, tap=2, dim=16).save_pretrained(tmp_path / "head")
    assert load(tmp_path / "head", tiny.wan())[1] == []
    make_old(tmp_path / "head")
    assert load(tmp_path / "head", tiny.wan())[1] == []


def lora(module: nn.Module) -> Any:
    return get_peft_model(module, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


class Replicated(nn.Module):
    """As `DistributedDataParallel` and the like hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def sharded(module: nn.Module) -> Any:
    """The class that torch's `fully_shard` gives a module."""
    base = type("FSDPModule", (), {})
    module.__class__ = type(f"FSDP{type(module).__name__}", (base, type(module)), {})
    return module


def quantised_class(module: nn.Module) -> Any:
    """A class of its own over diffusers', as kernels for 4 bits bring it."""
    module.__class__ = type("FourBitTransformer", (type(module),), {})
    return module


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": torch.compile,
    "replicated": Replicated,
    "compiled and replicated": lambda module: Replicated(torch.compile(module)),
    "fully_shard": sharded,
    "quantised class": quantised_class,
    "peft": lora,
    "peft in torch.compile": lambda module: torch.compile(lora(module)),
}


@works(
    "Adapters and training",
    "a denoiser wrapped by `torch.compile`, peft's `get_peft_model`, FSDP or DDP, or of a quantised class",
    "works",
    "wrappers are looked through: its head loads, with a warning where adapters change what the weights compute",
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through(wrapper: str, head: Path) -> None:
    pipe = tiny.wan()
    inner = pipe.transformer
    wrapped = WRAPPERS[wrapper](inner)
    pipe.register_modules(transformer=wrapped)
    if wrapper == "replicated":  # the stock pipeline reads these of it
        pipe.transformer.config, pipe.transformer.dtype = inner.config, inner.dtype
    assert unwrapped(wrapped) is inner
    assert class_name(unwrapped(wrapped)) == "WanTransformer3DModel"
    backbone = Backbone(pipe)
    assert (backbone.num_blocks, backbone.widths) == (3, [24] * 3)
    _, said = load(head, backbone)
    assert [text for text in said if "other weights" not in text] == []
    assert len(said) == ("peft" in wrapper)


@works(
    "Adapters and training",
    "a denoiser that is a peft model (`pipe.transformer = get_peft_model(...)`)",
    "exact",
    "its judge scores what the adapter computes, and `best_of_n`'s winner is the stock call's",
)
def test_a_peft_model_as_denoiser() -> None:
    pipe, injected = tiny.wan(), tiny.wan()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(7)
    pipe.transformer = get_peft_model(pipe.transformer, config)
    torch.manual_seed(7)
    injected.transformer.add_adapter(config)
    one, other = (prism.Judge.untrained(each, tap=2, dim=16) for each in (pipe, injected))
    assert torch.equal(scores(one), scores(other))
    result = prism.best_of_n(pipe, one, tiny.PROMPT, n=2, schedule=[(2, 1)], batch_size=1, output_type="latent", **CALL)
    generator = torch.Generator("cpu").manual_seed(result.seed)
    assert torch.equal(result.latents, pipe(tiny.PROMPT, generator=generator, output_type="latent", **CALL).frames)


def with_vae(**changes: Any) -> Any:
    pipe = tiny.wan()
    pipe.vae.register_to_config(**changes)
    return pipe


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (tiny.cogvideox, "denoiser WanTransformer3DModel, this pipeline has CogVideoXTransformer3DModel"),
        (lambda: tiny.wan(num_layers=4), r"WanTransformer3DModel \((num layers|blocks) 3\), .* 4\)"),
        (lambda: with_vae(latents_mean=[0.5] * 16), "VAE AutoencoderKLWan"),
        (lambda: with_vae(latents_std=[0.5] * 16), "VAE AutoencoderKLWan"),
        (lambda: with_vae(scaling_factor=0.5), "VAE AutoencoderKLWan"),
    ],
)
def test_what_a_head_cannot_do_without_is_refused(make: Any, sentence: str, head: Path) -> None:
    with pytest.raises(PrismError, match=sentence):
        prism.Judge.from_pretrained(head, make())


def test_widths_and_channels_are_refused(tmp_path: Path) -> None:
    backbone = Backbone(tiny.wan())
    saved = backbone.fingerprint()
    assert fits(saved, backbone) == ([], [])
    for part, name, value in (
        ("denoiser", "widths", [48]),
        ("denoiser", "in_channels", 36),
        ("denoiser", "patch", [1, 1, 1]),
        ("vae", "latent_channels", 48),
        ("vae", "layout", "BTCHW"),
        ("vae", "compression_of_time", 8),
        ("vae", "latents_mean", None),
    ):
        other = copy.deepcopy(saved)
        other["needs"][part][name] = value
        refusals, said = fits(other, backbone)
        assert len(refusals) == 1, name
        assert name.replace("_", " ") in refusals[0][0]
        assert said == []
        assert fits(other, backbone, ("vae",))[0] == (refusals if part == "vae" else [])


def test_an_old_hash_that_says_nothing_warns(head: Path) -> None:
    """Of the same class, depth and width: several settings differ, which a hash does not tell."""
    pipe = tiny.wan()
    pipe.transformer.register_to_config(eps=1e-5, rope_max_seq_len=64)
    _, said = load(head, pipe)
    assert len(said) == 1
    assert "another configuration of the denoiser" in said[0]


def test_numbers_that_bfloat16_rounds_are_the_same() -> None:
    """LTX-Video keeps its VAE's statistics in buffers, which follow its dtype."""
    pipe, _ = VARIANTS["ltx"]()
    saved = Backbone(pipe).fingerprint()
    assert len(saved["needs"]["vae"]["latents_mean"]) == saved["needs"]["vae"]["latent_channels"]
    pipe.vae.to(torch.bfloat16)
    assert fits(saved, Backbone(pipe))[0] == []
    pipe.vae.latents_std.mul_(1.1)
    assert "latents std" in fits(saved, Backbone(pipe))[0][0][0]


@pytest.mark.parametrize("variant", [*list(VARIANTS)[::5], "bare_module", "wan22_a14b_t2v"])
def test_every_family_fits_itself(variant: str) -> None:
    """As JSON, and by the hashes of earlier versions alone."""
    pipe, _ = VARIANTS[variant]()
    backbone = Backbone(pipe)
    saved = json.loads(json.dumps(backbone.fingerprint()))
    assert fits(saved, backbone) == ([], [])
    assert saved["denoiser_config"] == hashlib.sha256(config_text(backbone.denoiser)).hexdigest()
    old = {name: value for name, value in saved.items() if name not in ("needs", "settings")}
    assert fits(old, backbone) == ([], [])
    own = ("bare_module", "opensora")  # whose VAE is a class of their own, without a configuration
    assert saved["needs"]["vae"]["latent_channels"] is not None or variant in own


def _circle() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["itself"] = circle
    return circle


class _Failing:
    def to_dict(self) -> Any:
        raise ValueError("no")


@pytest.mark.parametrize("value", [{1: 2, (1, 2): 3}, _circle(), _Failing(), {1: "a", "b": 2}], ids=lambda v: "value")
def test_settings_that_json_cannot_hold_are_warned_of(value: Any, head: Path) -> None:
    pipe = tiny.wan()
    pipe.transformer.register_to_config(odd=value)
    with pytest.warns(UserWarning, match="odd was absent and is"):
        prism.Judge.from_pretrained(head, pipe)


def test_statistics_as_arrays_are_the_same_numbers(tmp_path: Path) -> None:
    prism.Judge.untrained(tiny.wan(), tap=2, dim=16).save_pretrained(tmp_path / "head")
    pipe = tiny.wan()
    pipe.vae.register_to_config(latents_mean=np.array(pipe.vae.config.latents_mean))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prism.Judge.from_pretrained(tmp_path / "head", pipe)


@works(
    "Precision and quantisation",
    "a head on its own model in bfloat16, or with adapters on it",
    "warned",
    "One line that says so.",
)
def test_the_warning_says_what_may_have_changed_the_weights(head: Path) -> None:
    pipe = tiny.wan()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.transformer.to(torch.bfloat16)
    _, said = load(head, pipe)
    assert len(said) == 1
    assert "other weights of this architecture (here it is with adapters and in bfloat16); check" in said[0]


def test_a_head_of_one_denoiser_on_a_pipeline_with_two_is_told(head: Path) -> None:
    """The sentence said "denoiser None of two" and to make it with reads=None."""
    refusals, _ = fits(prism.Judge.from_pretrained(head, tiny.wan()).backbone.fingerprint(), Two(tiny.wan()))
    assert ("only denoiser of its pipeline", "the denoiser 'transformer' of two") in refusals


class Two(Backbone):
    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "reads": "transformer"}


@pytest.mark.parametrize("name", ["denoiser", "vae"])
def test_a_fingerprint_without_a_class_is_refused(head: Path, tmp_path: Path, name: str) -> None:
    """A null there was not compared at all."""
    shutil.copytree(head, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["backbone"][name] = None
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrismError, match=f"lacks '{name}', the class that the head belongs to"):
        load(tmp_path / "copy", tiny.wan())
