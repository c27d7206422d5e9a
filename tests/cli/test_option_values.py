"""Numbers, images, adapters and precision on the command line: in range and recorded, or one sentence before work."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tests import tiny
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism import Judge, cli, files, loading
from prism.errors import PrismError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone that takes a prompt, one that takes an image, their heads, an image and a LoRA."""
    folder = tmp_path_factory.mktemp("values")
    for name, (pipe, call) in {"wan": (tiny.wan("unipc"), dict(tiny.CALL_WAN)), "svd": VARIANTS["svd"]()}.items():
        image = call.pop("image", None)
        if image is not None:
            image.save(folder / "image.png")
        pipe.save_pretrained(folder / name)
        files.write_json(folder / name / "call.json", {**call, "num_inference_steps": 3})
        Judge.untrained(pipe, dim=16).save_pretrained(folder / f"{name}-head", {"seed": 3})
        if name == "wan":
            pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
            adapter = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.transformer))
            pipe.save_lora_weights(folder / "lora", transformer_lora_layers=adapter)
    return folder


def sample(place: Path, out: Path, *arguments: str, name: str = "wan") -> int:
    models = ["--backbone", str(place / name), "--head", str(place / f"{name}-head"), "--n", "2", "--batch-size", "1"]
    return cli.main(["sample", *models, "--out", str(out), "--strategy", "full", *arguments])


@works("Inputs and outputs", "`prism sample --image FILE` for a pipeline that takes no prompt", "works", "No --prompt")
def test_an_image_pipeline_needs_no_prompt(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(place, tmp_path / "out", "--image", str(place / "image.png"), "--seed", "random", name="svd") == 0
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    config = files.read_json(tmp_path / "out" / "config.json")
    assert metrics["prompt"] is None
    assert config["call"]["image"] == str(place / "image.png")
    assert config["seed"] == metrics["seeds"][0] == metrics["seed"]
    assert metrics["seeds"][1] == metrics["seeds"][0] + 1
    assert f"seeds {metrics['seeds'][0]} to" in capsys.readouterr().out
    assert "image.png" in (tmp_path / "out" / "report.html").read_text()
    assert sample(place, tmp_path / "other", "--prompt", "a cat", name="svd") == 2
    assert "starts from an image; give --image FILE" in capsys.readouterr().err


@works("Adapters and training", "`prism sample --lora FILE:SCALE`", "exact", "The plain call's winner with the adapter")
def test_a_lora_is_loaded_scaled_and_recorded(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{place / 'lora' / 'pytorch_lora_weights.safetensors'}:0.5"
    backbone, call, _ = loading.load_backbone(str(place / "wan"), "cpu", loras=[text])
    seeded = torch.Generator("cpu").manual_seed(4)
    pipe = tiny.wan("unipc")
    pipe.load_lora_weights(str(place / "lora"), adapter_name="mine")
    pipe.set_adapters("mine", 0.5)
    options = {**call, "output_type": "latent"}
    expected = pipe(tiny.PROMPT, generator=seeded, **options).frames
    result = prism.best_of_n(backbone.pipe, None, tiny.PROMPT, strategy="none", seeds=[4], **options)
    assert torch.equal(result.latents, expected)
    prompt = ("--prompt", tiny.PROMPT, "--dtype", "bf16")
    with pytest.warns(UserWarning, match="was trained on other weights of this architecture"):
        assert sample(place, tmp_path / "out", *prompt, "--lora", str(place / "lora"), "--lora", text) == 0
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    assert metrics["dtype"] == "bfloat16"
    assert metrics["offload"] == "none"
    assert metrics["loras"] == files.read_json(tmp_path / "out" / "config.json")["loras"] == [str(place / "lora"), text]
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x02")
    (tmp_path / "empty").mkdir()
    save_file({"other.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for wrong, sentence in {
        "none.safetensors": "does not exist; give a local file",
        "org/name": "does not exist; give a local file",
        str(tmp_path / "bad.safetensors"): "cannot be loaded",
        str(tmp_path / "other.safetensors"): "cannot be loaded|it is of another model",
        str(tmp_path / "pickle.bin"): "is no safetensors file",
        str(tmp_path / "empty"): "holds 0 safetensors files",
        f"{place / 'lora'}:nan": "must be a number from -100 to 100; found nan",
        f"{place / 'lora'}:x": "must be a number from -100 to 100; found x",
    }.items():
        capsys.readouterr()
        assert sample(place, tmp_path / "no", *prompt, "--lora", wrong) == 2
        assert re.search(sentence, capsys.readouterr().err), wrong
        assert not (tmp_path / "no").exists()


def test_offload_needs_an_accelerator_and_is_diffusers_own(place: Path) -> None:
    for kind in ("model", "group"):
        with pytest.raises(PrismError, match=f"The --offload {kind} brings models to an accelerator"):
            loading.load_backbone(str(place / "wan"), "cpu", offload=kind)
    with pytest.raises(PrismError, match="The --offload is disk; choose one of none, model, group"):
        loading.load_backbone(str(place / "wan"), "cpu", offload="disk")
    asked: list[Any] = []

    class Watched(type(tiny.wan())):  # type: ignore[misc]
        def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
            asked.append(("model", kwargs["device"]))

        def enable_group_offload(self, onload: Any, **kwargs: Any) -> None:
            asked.append(("group", str(onload), kwargs["offload_type"], kwargs["use_stream"]))

    pipe = Watched(**tiny.wan().components)
    for kind in ("model", "group"):
        loading.place(pipe, "cuda:1", kind)
    assert asked == [("model", "cuda:1"), ("group", "cuda:1", "leaf_level", True)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "float32", "bfloat16", "float16"])
def test_precision_by_short_names(place: Path, dtype: str) -> None:
    backbone = loading.load_backbone(str(place / "wan"), "cpu", dtype)[0]
    assert str(backbone.dtype).removeprefix("torch.") == loading.DTYPES.get(dtype, dtype)


WRONG: dict[str, tuple[str, str]] = {
    "no prompt": ("sample --out {out}", "The embedded model needs a prompt; give --prompt"),
    "image missing": ("sample --out {out} --prompt x --image no.png", "The --image no.png is no file"),
    "address": ("sample --out {out} --prompt x --image https://example.org/a.png", "is no file; give a local one"),
    "image to text": ("sample --out {out} --prompt x --image {image}", "takes no argument 'image'"),
    "fps": ("sample --out {out} --prompt x --fps 0.0001", "--fps must be a number from 0.1 to 240; found 0.0001"),
    "fps NaN": ("sample --out {out} --prompt x --fps nan", "--fps must be a number from 0.1 to 240; found nan"),
    "frames": ("sample --out {out} --prompt x --num-frames -1", "--num-frames must be a whole number from 1 to 10,000"),
    "height": ("sample --out {out} --prompt x --height 0", "--height must be a whole number from 1 to 16,384"),
    "steps": ("sample --out {out} --prompt x --steps 1000000000", "--steps must be a whole number from 1 to 10,000"),
    "guidance": ("sample --out {out} --prompt x --guidance-scale nan", "--guidance-scale must be a number from -100"),
    "weights": ("sample --out {out} --prompt x --select-by VQ:nan", "The weight of VQ in --select-by must be a finite"),
    "seed": ("sample --out {out} --prompt x --seed seven", '--seed must be a whole number, or "random"; found seven'),
    "seed below": ("sample --out {out} --prompt x --seed -1", "--seed must be a whole number from 0"),
    "many": ("sample --out {out} --prompt x --n 1000000000", "--n must be a whole number from 1 to 10,000"),
    "top": ("sample --out {out} --prompt x --n 2 --top-k 3", "--top-k must be a whole number from 1 to 2; found 3"),
    "long name": ("sample --prompt x --out {long}", "File name too long|cannot be made|cannot be used"),
    "long head": ("sample --prompt x --out {out} --head {long}", "too long|does not exist|cannot"),
    "long backbone": (
        "sample --prompt x --out {out} --backbone {long}",
        "There is no folder xxx",
    ),
    "long image": ("sample --prompt x --out {out} --image {long}", "is no file"),
    "long data": ("train --out {out} --data {long}", "too long|does not exist|no latent store|cannot"),
    "long eval data": ("eval --out {out} --data {long}", "too long|does not exist|no latent store|cannot"),
    "dtype": ("doctor --dtype int8", "The --dtype is int8; choose fp32, bf16, fp16"),
    "device": ("doctor --device quantum", "The device quantum cannot be used"),
    "device without numbers": ("sample --out {out} --prompt x --device meta", "The device meta cannot be used"),
    "select twice": ("sample --out {out} --prompt x --select-by VQ:1,VQ:2", "neither a dimension nor a list"),
    "root": ("sample --prompt x --out /", "The output folder / cannot be replaced"),
    "doctor n": ("doctor --n 0", "--n must be a whole number from 1 to 10,000"),
    "doctor height": ("doctor --height 999999999", "--height must be a whole number from 1 to 16,384"),
    "doctor frames": ("doctor --num-frames 999999999", "--num-frames must be a whole number from 1 to 10,000"),
    "doctor no folder": ("doctor wann", "There is no folder wann, and an id on the Hub is of the form owner/name"),
    "no family file": ("doctor wann --family no.py", "--family takes a Python file that defines `family`; no.py does"),
    "family folder": ("doctor wann --family .", "--family takes a Python file that defines `family`; . is a folder"),
    "study variant": ("study --out {out} --only taps-9", "no question 'taps-9'; the variants nearest to it are tap"),
    "select by nothing": (
        "sample --out {out} --prompt x --select-by VQ:0",
        "gives no dimension a weight",
    ),
    "doctor steps": ("doctor --steps 1000000000", "--steps must be a whole number from 1 to 10,000"),
    "eval draws": ("eval --out {out} --num-draws 0", "--num-draws must be a whole number from 1 to 1,000"),
    "eval seed": ("eval --out {out} --seed -1", "--seed must be a whole number from 0 to"),
    "eval NaN": ("eval --out {out} --timesteps nan", "The --timesteps hold nan"),
    "train rate": ("train --out {out} --learning-rate nan", "--learning-rate must be a finite number"),
    "train rate inf": ("train --out {out} --learning-rate inf", "--learning-rate must be"),
    "train eta": ("train --out {out} --eta inf", "eta must be a finite number"),
    "train seed": (
        "train --out {out} --seed 99999999999999",
        "seed must be a whole number of at most 1,000,000,000,000",
    ),
    "train steps": ("train --out {out} --steps 0", "steps must be 1 or more"),
    "demo seed": ("demo --out {out} --seed -1", "--seed must be a whole number from 0"),
    "study": ("study --out {out} --seeds 100000", "The study's seeds must be a whole number from 1 to 1,000"),
    "quality": ("shapeworld quality --out {out} --prompts 0", "--prompts must be a whole number from 1"),
    "quality guidance": ("shapeworld quality --out {out} --guidance-scale nan", "--guidance-scale must be a number"),
    "candidates": ("shapeworld candidates --out {out} --split train:0", "must be a whole number from 1"),
    "shapeworld": ("shapeworld train --out {out} --learning-rate nan", "--learning-rate of a training run must be"),
    "shapeworld steps": ("shapeworld train --out {out} --steps -1", "steps of a training run must be a whole number"),
    "shapeworld seed": ("shapeworld train --out {out} --seed -1", "seed of a training run must be a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_out_of_range_and_long_names_get_a_sentence(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, sentence = WRONG[name]
    words = {"out": tmp_path / "out", "long": "x" * 300, "image": place / "image.png"}
    assert cli.main(shlex.split(command.format(**words))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("prism: ")
    assert len(line) <= 507
    assert re.search(sentence, line)
    assert not (tmp_path / "out").exists()


class Reached(Exception):
    """The first work of a command: everything that can be checked before it has been."""


VALUES = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-3, 12).map(str),
    st.floats(allow_nan=True, allow_infinity=True).map(str),
    st.sampled_from(
        ["0", "-0", "1e400", "nan", "inf", "-inf", "", " ", "1,2", "3:1", "1:", ":", "VQ:1", "None", "0x1"]
    ),
    st.text(max_size=8),
    st.text("ab/.:", min_size=200, max_size=300),
)
OPTIONS = {
    "sample": "n strategy schedule draft-steps judge-at num-draws select-by seed batch-size top-k head device dtype "
    "offload lora steps guidance-scale height width num-frames negative-prompt image last-image video fps prompt plan "
    "budget",
    "eval": "data head split timesteps num-draws seed device dtype",
    "train": "data tap dim aggregation steps prompts-per-step learning-rate schedule objective eta source "
    "trajectory-share t-low t-high ema-decay validate-every checkpoint-every seed device dtype",
    "doctor": "n schedule steps device dtype",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_any_value_of_any_option_ends_in_a_sentence_or_in_work(
    command: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of any text, up to the first load of a backbone or store: exit code 0 or 2, never a traceback."""

    def reach(*_: Any, **__: Any) -> Any:
        raise Reached

    from prism import backbone as backbones

    monkeypatch.setattr(loading, "open_store", reach)
    monkeypatch.setattr(backbones.Backbone, "__init__", reach)
    folder = tmp_path_factory.mktemp("fuzz")
    pairs = st.tuples(st.sampled_from(OPTIONS[command].split()), VALUES)

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(pairs, min_size=1, max_size=3))
    def run(chosen: list[tuple[str, str]]) -> None:
        words = [f"--{option}={value}" for option, value in chosen]
        out = [] if command == "doctor" else ["--out", str(folder / "out")]
        prompt = ["--prompt", "x"] if command == "sample" else []
        with contextlib.suppress(Reached):
            assert cli.main([command, *out, *prompt, *words]) == 2
        assert not (folder / "out").exists() or command == "train"

    run()


def test_integers_of_numpy_train(tmp_path: Path) -> None:
    from prism.training.config import TrainConfig

    config = TrainConfig(steps=np.int64(3), learning_rate=np.float32(0.5), seed=torch.tensor(2))  # type: ignore[arg-type]
    assert (config.steps, config.learning_rate, config.seed) == (3, 0.5, 2)
    assert (type(config.steps), type(config.learning_rate)) == (int, float)
