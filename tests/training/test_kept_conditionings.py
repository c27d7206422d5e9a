"""Conditionings kept in a store: a second training encodes no text, and reads the bits that the first one captured."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import forks, machinery, stores, tiny
from tests.zoo import VARIANTS
from tests.zoo.wan_to_kandinsky import wan21_i2v

from prism import files, runs
from prism.backbone import Backbone, Conditioning
from prism.cli import main
from prism.errors import PrismError
from prism.judge import Judge
from prism.loading import load_backbone
from prism.preference import LatentStore
from prism.preference.prompts import read_prompts
from prism.team import Team
from prism.training import TrainConfig, kept_conditionings, train, train_together
from prism.training.collect import collect
from prism.training.conditionings import Conditionings
from prism.training.kept_conditionings import KeptConditionings
from prism.training.reward import Reward

CONFIG = TrainConfig(
    steps=3, prompts_per_step=3, learning_rate=1e-3, log_every=3, checkpoint_every=1, keep_conditionings=True
)
PLAIN = dataclasses.replace(CONFIG, keep_conditionings=False)


def light(video: Any, prompt: str) -> dict[str, float]:
    return {"VQ": float(video.mean())}


def i2v_store(folder: Path) -> LatentStore:
    for name, seed in (("a.png", 0), ("b.png", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "p.csv").write_text(
        "prompt,split,image\na cat runs,train,a.png\na cat runs,train,b.png\na dog,train,a.png"
    )
    pipe, call = wan21_i2v()
    call.pop("image")
    return collect(
        read_prompts(folder / "p.csv"), Backbone(pipe), call, folder / "store", [Reward(light, "light")],
        candidates=2, progress=False,
    )  # fmt: skip


MAKERS = {"wan": tiny.wan, "cogvideox": tiny.cogvideox, "wan_i2v": lambda: wan21_i2v()[0]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kept")
    cog = {"meta": {"call": tiny.CALL_COGVIDEOX}, "shape": (3, 4, 4, 4)}
    (folder / "i2v").mkdir()
    return {
        "wan": stores.make(folder / "wan", (20, 1, 1), 2).folder,
        "cogvideox": stores.make(folder / "cogvideox", (4, 1, 1), 2, **cog).folder,
        "wan_i2v": i2v_store(folder / "i2v").folder,
    }


@pytest.fixture
def fresh(made: dict[str, Path], tmp_path: Path) -> Any:
    """Copies of a store, in which nothing is kept."""
    return lambda name: LatentStore.open(shutil.copytree(made[name], tmp_path / name))


def judge_for(pipe: Any, seed: int = 0) -> Judge:
    return Judge.untrained(pipe, tap=2, dim=32, dimensions=("VQ",), seed=seed)


def same(one: Judge, other: Judge) -> bool:
    theirs = other.head.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.head.state_dict().items())


def kept_files(store: LatentStore) -> list[Path]:
    return sorted((store.folder / "conditionings").rglob("*.safetensors"))


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, of the same types, in the same order."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name, value in one.items():
            assert_same(value, other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def assert_same_row(one: Conditioning, other: Conditioning) -> None:
    for each in dataclasses.fields(Conditioning):
        assert_same(getattr(one, each.name), getattr(other, each.name))


@pytest.mark.parametrize("name", MAKERS)
def test_a_second_training_encodes_no_text_and_gives_the_same_weights(name, fresh, tmp_path, capsys):
    store = fresh(name)
    plain, first, again = (judge_for(MAKERS[name]()) for _ in range(3))
    train(store, plain, PLAIN, tmp_path / "plain", progress=False)
    assert not (store.folder / "conditionings").exists()
    train(store, first, CONFIG, tmp_path / "one", progress=False)
    prompts = len(store.groups("train", ("VQ",)))
    rows = [path for path in kept_files(store) if not path.name.startswith("shared")]
    assert len(rows) == (3 if name == "wan_i2v" else prompts)  # of the same text with two images: two
    assert "prism: conditionings are kept in" in capsys.readouterr().err
    texts = machinery.count(again.backbone.pipe.text_encoder)
    store = LatentStore.open(store.folder)
    train(store, again, CONFIG, tmp_path / "two", progress=False)
    other = judge_for(again.backbone, seed=3)  # another head on the same texts
    train_together(store, [other], [dataclasses.replace(CONFIG, learning_rate=1e-2)], progress=False)
    assert not texts
    assert same(first, again)
    assert same(plain, first)


ROUND_TRIPS = (
    *("wan21_t2v_euler", "cogvideox_ddim", "cogvideox15", "cogvideox_i2v", "wan21_i2v", "wan21_i2v_last_image"),
    *("wan22_5b_i2v", "hunyuan15_i2v", "qwen_image", "ltx_condition", "kandinsky5_t2v", "opensora"),
)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_what_is_read_is_what_was_captured(name, tmp_path, monkeypatch):
    pipe, call = VARIANTS[name]()
    monkeypatch.setattr(kept_conditionings, "SHARED", 256)
    call.pop("prompt", None)
    backbone = Backbone(pipe)
    one, other = (KeptConditionings(backbone, tmp_path, Team()) for _ in range(2))  # before and after a use
    captured = backbone.condition(["a red circle moves left", "a cat"], **call)
    for row in range(2):
        assert one.keep(str(row) * 64, captured[row])
        assert_same_row(other.read(str(row) * 64), captured[row])
    if name == "cogvideox15":  # the rotary frequencies, once
        assert len(list(one.folder.glob("shared-*"))) == 2
    again = KeptConditionings(Backbone(pipe), tmp_path, Team())
    assert again.folder == one.folder


def test_a_store_that_grew_and_a_run_of_fewer_prompts_encode_what_is_missing_alone(fresh, tmp_path):
    store, judge = fresh("wan"), judge_for(tiny.wan())
    train(store, judge, dataclasses.replace(CONFIG, max_prompts=5), tmp_path / "few", progress=False)
    texts = machinery.count(judge.backbone.pipe.text_encoder)
    train(store, judge_for(judge.backbone), CONFIG, tmp_path / "all", progress=False)
    assert sum(texts) == 15


def test_any_flipped_byte_is_seen_and_the_prompt_encoded_again(fresh, tmp_path):
    store, first, again = fresh("wan"), judge_for(tiny.wan()), judge_for(tiny.wan())
    groups = store.groups("train", ("VQ",))
    train(store, first, CONFIG, tmp_path / "one", progress=False)
    path = kept_files(store)[0]
    whole = path.read_bytes()
    kept = KeptConditionings(first.backbone, store.folder, Team())
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.warns(UserWarning, match=r"safetensors is damaged \(.*\); its prompt is encoded again"):
            assert kept.read(path.stem) is None
    path.write_bytes(whole)
    for path in kept_files(store):  # of every kind of damage one
        path.write_bytes(path.read_bytes()[:-7])
    kept_files(store)[1].write_bytes(b"\x80\x04K\x01.")
    shutil.copy(kept_files(store)[2], kept_files(store)[3])
    conditionings = Conditionings(again.backbone, store, groups, kept)
    with pytest.warns(UserWarning, match="its prompt is encoded again") as said:
        conditionings.of(range(20))
    assert len(said) == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(20):  # in this run, and in the next one
            alone = again.backbone.condition([groups[index].prompt], **store.call)[0]
            again.backbone.forget()
            assert_same_row(conditionings.of([index]), alone)
            assert_same_row(Conditionings(again.backbone, store, groups, kept).of([index]), alone)


def test_a_copied_row_and_a_damaged_shared_tensor_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_conditionings, "SHARED", 256)
    pipe, call = VARIANTS["cogvideox15"]()
    backbone = Backbone(pipe)
    row = backbone.condition(["a cat"], **call)[0]
    kept = KeptConditionings(backbone, tmp_path, Team())
    assert kept.keep("0" * 64, row)
    shutil.copy(kept.folder / f"{'0' * 64}.safetensors", kept.folder / f"{'1' * 64}.safetensors")
    with pytest.warns(UserWarning, match="its checksum is another"):
        assert kept.read("1" * 64) is None
    for path in kept.folder.glob("shared-*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    later = KeptConditionings(backbone, tmp_path, Team())
    with pytest.warns(UserWarning, match=r"the checksum of shared-.* is another"):
        assert later.read("0" * 64) is None
    assert later.keep("0" * 64, row)
    assert_same_row(KeptConditionings(backbone, tmp_path, Team()).read("0" * 64), row)


def test_what_texts_depend_on_decides_the_folder(tmp_path):
    def folder(pipe: Any) -> Path:
        return KeptConditionings(Backbone(pipe), tmp_path, Team()).folder

    plain = folder(tiny.wan())
    assert folder(tiny.wan()) == plain
    middle = tiny.wan()
    weight = middle.text_encoder.encoder.block[1].layer[1].DenseReluDense.wo.weight
    with torch.no_grad():
        weight[weight.shape[0] // 2, 3] += 1e-3  # one number, in the middle
    words = tiny.wan()
    words.tokenizer.add_tokens(["penguin"])
    low = tiny.wan()
    low.text_encoder.to(torch.bfloat16)
    layers = tiny.wan()
    layers.text_encoder.config.layer_norm_epsilon = 1e-3
    folders = {plain, *(folder(pipe) for pipe in (middle, words, low, layers, tiny.wan("unipc")))}
    assert len(folders) == 6
    judged = tiny.wan()
    with torch.no_grad():
        judged.transformer.proj_out.weight += 1  # no text depends on it
    assert folder(judged) == plain


def test_what_cannot_be_kept_is_said_once_and_the_run_goes_on(fresh, tmp_path, monkeypatch):
    store, plain, judge = fresh("wan"), judge_for(tiny.wan()), judge_for(tiny.wan())
    train(store, plain, PLAIN, tmp_path / "plain", progress=False)
    condition = Backbone.condition

    def odd(self: Backbone, *args: Any, **call: Any) -> Any:
        rows = condition(self, *args, **call)
        arguments = {**rows.arguments, "attention_kwargs": {"chosen": np.float64(2.0)}}
        return dataclasses.replace(rows, arguments=arguments)

    kept = KeptConditionings(judge.backbone, store.folder, Team())
    conditionings = Conditionings(judge.backbone, store, store.groups("train", ("VQ",)), kept)
    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "condition", odd)
        with pytest.warns(UserWarning, match="Conditionings are not kept") as said:
            conditionings.capture()
    assert conditionings.of([4]).arguments["attention_kwargs"] == {"chosen": 2.0}
    (line,) = {str(each.message) for each in said}
    assert "WanPipeline passes its denoiser arguments.attention_kwargs.chosen, a float64" in line
    assert not kept_files(store)
    (store.folder / "conditionings" / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(kept_conditionings, "FOLDER", "conditionings/file")
        with pytest.raises(PrismError, match=r"cannot be kept in .*; make room .* or leave out --keep-conditionings"):
            train(store, judge, CONFIG, tmp_path / "none", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(kept_conditionings.shutil, "disk_usage", lambda at: SimpleNamespace(free=0))
        with pytest.raises(PrismError, match=r"of 4 more prompts would take about .* make room"):
            train(store, judge, CONFIG, tmp_path / "full", progress=False)
    train(store, judge, CONFIG, tmp_path / "full", resume=True, progress=False)
    assert same(plain, judge)


def test_plain_values_keep_their_types(tmp_path):
    backbone = Backbone(tiny.wan())
    row = backbone.condition(["a cat"], **tiny.CALL_WAN)[0]
    values = {"size": torch.Size([2, 3]), "kind": torch.bfloat16, "nested": [(1, 2.5, None), [True, "\ud800 é"], {}]}
    values |= {"float": float("inf"), "tensors": ([torch.tensor(1)], torch.zeros(0, 2), torch.ones(2, 2).t()[:1])}
    row = dataclasses.replace(row, arguments={**row.arguments, "extra": values})
    kept = KeptConditionings(backbone, tmp_path, Team())
    assert kept.keep("a" * 64, row)
    assert_same_row(kept.read("a" * 64), row)


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    backbone = Backbone(tiny.wan())
    row = backbone.condition(["a cat"], **tiny.CALL_WAN)[0]
    folders = [KeptConditionings(backbone, tmp_path, Team()) for _ in range(4)]
    failures: list[Any] = []

    def work(kept: KeptConditionings) -> None:
        for _ in range(40):
            if not kept.keep("b" * 64, row) or kept.read("b" * 64) is None:
                failures.append(kept)

    threads = [threading.Thread(target=work, args=(kept,)) for kept in folders]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    assert {path.name for path in folders[0].folder.iterdir()} == {"identity.json", f"{'b' * 64}.safetensors"}


def test_the_store_is_whole_with_them_and_replaceable(fresh, tmp_path):
    store = fresh("wan")
    before = files.sha256(store.folder / "store.json")
    train(store, judge_for(tiny.wan()), CONFIG, tmp_path / "run", progress=False)
    again = LatentStore.open(store.folder)
    assert len(again.videos) == 44
    assert files.sha256(store.folder / "store.json") == before
    assert runs.foreign(store.folder) is None
    runs.discard(store.folder)
    assert not store.folder.exists()


def test_a_run_takes_the_flag_up_when_it_is_resumed(fresh, tmp_path):
    store, whole, judge = fresh("wan"), judge_for(tiny.wan()), judge_for(tiny.wan())
    train(store, whole, PLAIN, tmp_path / "whole", progress=False)
    config = files.read_json(tmp_path / "whole" / "config.json")
    config["train"].pop("keep_conditionings")  # as an earlier version wrote it
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / "config.json", config)
    train(store, judge, CONFIG, tmp_path / "run", resume=True, progress=False)
    assert same(whole, judge)


def by_command(folder: Path) -> int:
    options = "--device cpu --dim 16 --tap 2 --steps 2 --prompts-per-step 4 --keep-conditionings"
    return main(f"train --backbone {folder}/pipe --data {folder}/wan --out {folder}/run --resume {options}".split())


def test_processes_of_one_command_share_them_wherever_the_pipeline_lies(fresh, tmp_path, monkeypatch):
    store, pipe = fresh("wan"), tiny.wan()
    pipe.save_pretrained(tmp_path / "pipe")
    assert [each.code for each in forks.run(by_command, tmp_path)] == [0, 0]
    before = {path: path.stat().st_mtime_ns for path in kept_files(store)}
    assert len(before) == 20
    shutil.move(tmp_path / "pipe", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    backbone, *_ = load_backbone("moved", "cpu", "float32")
    texts = machinery.count(backbone.pipe.text_encoder)
    train(store, judge_for(backbone), CONFIG, tmp_path / "later", progress=False)
    assert not texts
    assert before == {path: path.stat().st_mtime_ns for path in kept_files(store)}
