"""What strangers ran into on the three roads is refused before work, in words of the command line; nothing is left."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import get_type_hints

import numpy as np
import pytest
from docstring_parser import parse_from_object
from tests import tiny
from tests.zoo.latte_to_qwen import ltx_i2v

from prism import cli
from prism.backbone import Backbone
from prism.clips import FramePolicy
from prism.commands.options import in_flags
from prism.commands.scores import _read_as
from prism.errors import PrismError
from prism.loading import check_rewards, load_reward
from prism.preference import LatentStore, StoreWriter
from prism.preference.check import summary
from prism.preference.prompts import Prompt, read_prompts
from prism.preference.readers import read, read_clips
from prism.preference.shards import check_seal
from prism.preference.sources import Place
from prism.training.annotation import export, read_back
from prism.training.collect import collect, label
from prism.training.encode import encode
from prism.training.reward import Reward
from prism.video import write_video

CALL = {**tiny.CALL_WAN, "num_inference_steps": 2}
POLICY = FramePolicy(num_frames=9, height=32, width=32, start="first")
PROMPTS = [Prompt("a red circle", Place("p.txt", 0), "train"), Prompt("a cat", Place("p.txt", 1), "test")]


def light(video, prompt):
    return {"light": float(video.mean())}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("strangers")
    tiny.wan().save_pretrained(folder / "pipe")
    (folder / "pipe" / "call.json").write_text(json.dumps(CALL))
    return folder


def collected(backbone, out, rewards=(), call=CALL, **options) -> LatentStore:
    return collect(PROMPTS, backbone, call, out, rewards, **{"candidates": 2, "progress": False, **options})


@pytest.fixture(scope="module")
def store(backbone, tmp_path_factory) -> LatentStore:
    return collected(backbone, tmp_path_factory.mktemp("store") / "store", [Reward(light, "plain")])


def said(capsys, *words) -> str:
    """What a command that is refused prints."""
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def clips(folder: Path, count: int = 2, **more: str) -> Path:
    """A table of pairs and its clips, 0a.mp4, 0b.mp4, ..."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (f"{number}{side}.mp4" for number in range(count) for side in "ab"):
        write_video(folder / name, rng.uniform(size=(9, 32, 32, 3)), 8)
    with (folder / "pairs.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "chosen", "rejected", "split", *more])
        for number in range(count):
            split = ("train", "validation", "test")[number % 3]
            writer.writerow([f"prompt {number}", f"{number}a.mp4", f"{number}b.mp4", split, *more.values()])
    return folder / "pairs.csv"


# -- folders


def test_a_run_that_is_refused_late_leaves_the_folder_as_it_was(backbone, tmp_path):
    too_long = {**CALL, "num_frames": 400}  # more than the transformer takes, which shows at its first step
    with pytest.raises(PrismError, match="broke at step 1"):
        collected(backbone, tmp_path / "new", call=too_long)
    assert not (tmp_path / "new").exists()
    (tmp_path / "was-there").mkdir()
    with pytest.raises(PrismError, match="broke at step 1"):
        collected(backbone, tmp_path / "was-there", call=too_long)
    assert list((tmp_path / "was-there").iterdir()) == []
    assert len(collected(backbone, tmp_path / "was-there").videos) == 4  # another run may begin there


def test_what_was_made_and_what_is_a_users_stays(backbone, tmp_path):
    def fails(video, prompt):
        raise RuntimeError("gone")

    with pytest.raises(PrismError, match="raised RuntimeError"):
        collected(backbone, tmp_path / "sampled", [Reward(fails, "plain")])
    assert len(list((tmp_path / "sampled" / "shards").glob("*.safetensors"))) == 1
    writer = StoreWriter(tmp_path / "theirs", {"a": 1}, {"call": {}})
    (tmp_path / "theirs" / "images").mkdir()
    (tmp_path / "theirs" / "images" / "mine.png").write_bytes(b"mine")
    writer.withdraw()
    assert [path.name for path in (tmp_path / "theirs").rglob("*")] == ["images", "mine.png"]
    first = StoreWriter(tmp_path / "again", {"a": 1}, {"call": {}})
    StoreWriter(tmp_path / "again", {"a": 1}, {"call": {}}, resume=True).withdraw()
    assert (tmp_path / "again" / "store.json").is_file()  # the run in it was begun before
    assert first.folder.is_dir()


def test_a_set_without_a_clip_that_can_be_read_leaves_no_folder(backbone, tmp_path):
    pairs = clips(tmp_path / "set", 1)
    for name in ("0a.mp4", "0b.mp4"):
        (tmp_path / "set" / name).write_bytes(b"no video")
    with pytest.raises(PrismError, match="None of the 2 clips could be read"):
        encode(read(pairs), backbone, CALL, POLICY, tmp_path / "out", progress=False)
    for name in ("0a.mp4", "0b.mp4"):
        (tmp_path / "set" / name).unlink()
    with pytest.raises(PrismError, match=r"None of the 2 clips of pairs is there, such as 0a.mp4 .* --root"):
        encode(read(pairs), backbone, CALL, POLICY, tmp_path / "out", progress=False)
    pairs.write_text("prompt,chosen,rejected\na cat,0a.mp4,0a.mp4\n")
    with pytest.raises(PrismError, match=r"no pair of clips, .* \(1 left out, both sides are the same clip\)"):
        encode(read(pairs), backbone, CALL, POLICY, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# -- what is told


def test_data_check_tells_what_encode_refuses(tmp_path, capsys):
    rows = ("prompt,chosen,rejected,split", "one,x.mp4,y.mp4,train", "two,x.mp4,z.mp4,dev")
    pairs = table(tmp_path / "two.csv", *rows)
    facts = summary(read(pairs, media=False))
    assert (facts["several_prompts"], facts["unknown_splits"]) == (["x.mp4"], ["dev"])
    assert cli.main(["data", "check", str(pairs)]) == 0
    out = capsys.readouterr().out
    assert "Clips in pairs of several prompts, which prism encode refuses: 1 (x.mp4)" in out
    assert "Splits that prism encode refuses, as a store has train, validation, test, unseen: 1 (dev)" in out
    assert cli.main(["data", "check", str(table(tmp_path / "empty.csv", rows[0]))]) == 0
    assert "There is no pair to learn from: the table has no rows." in capsys.readouterr().out
    line = said(capsys, "data", "check", table(tmp_path / "rated.csv", "prompt,video,VQ"))
    assert "rated.csv holds no rows, only the columns prompt, video, VQ." in line
    alone = table(tmp_path / "alone.csv", "prompt,video,VQ", "one,x.mp4,1")
    assert cli.main(["data", "check", str(alone)]) == 0
    assert "There is no pair to learn from: no prompt has two rated clips." in capsys.readouterr().out


def test_ties_alone_and_splits_without_pairs_are_told(backbone, tmp_path, capsys):
    collected(backbone, tmp_path / "ties", [Reward(lambda video: 0.5, "same")])
    err = capsys.readouterr().err
    assert (
        "prism: warning: all pairs are ties in overall, and nothing can be learned from it: all scores are 0.5." in err
    )
    assert "prism: warning: there are no pairs in the split validation: give more prompts" in err
    label(tmp_path / "ties", backbone, [Reward(light, "plain")], margins=300.0, progress=False)
    assert "ties in light, and nothing can be learned from it: no two scores of a prompt differ by more than 300" in (
        capsys.readouterr().err
    )
    label(tmp_path / "ties", backbone, [Reward(light, "plain")], progress=False)
    assert "ties" not in capsys.readouterr().err
    collected(backbone, tmp_path / "one", candidates=1)
    collected(backbone, tmp_path / "rated", [Reward(light, "plain")], candidates=1)
    err = capsys.readouterr().err
    assert err.count("one candidate a prompt gives no pairs; give --candidates 2 or more") == 2
    assert "there are no pairs: a pair is two videos of one prompt" in err


def test_a_set_whose_splits_lack_pairs_is_told_once_it_is_encoded(backbone, tmp_path, capsys):
    encode(read(clips(tmp_path / "set", 1)), backbone, CALL, POLICY, tmp_path / "out", progress=False)
    assert "there are no pairs in the splits validation and test" in capsys.readouterr().err
    encode(read(clips(tmp_path / "whole", 3)), backbone, CALL, POLICY, tmp_path / "all", progress=False)
    assert "no pairs" not in capsys.readouterr().err


def test_prompts_that_recur_are_counted(tmp_path):
    path = table(tmp_path / "p.txt", "a cat", "a dog", "a cat", "a cat ")
    with pytest.warns(UserWarning, match=r'2 of 4 prompts in .*p.txt stand there before.*"a cat" in row 2 of p.txt'):
        assert [each.text for each in read_prompts(path)] == ["a cat", "a dog"]


# -- margins and rewards


def test_a_margin_of_no_dimension_is_told_before_sampling_or_after_the_first_reward(backbone, tmp_path):
    calls = []

    def counted(video, prompt):
        calls.append(prompt)
        return light(video, prompt)

    with pytest.raises(PrismError, match="margin of lihgt is of no dimension; there are light"):
        collected(backbone, tmp_path / "out", [Reward(counted, "plain")], margins={"lihgt": 0.1})
    assert len(calls) == 2  # the first prompt's candidates
    collected(backbone, tmp_path / "out", [Reward(counted, "plain")], margins={"light": 0.1}, resume=True)
    assert len(calls) == 4  # what was labelled was kept
    stating = Reward(counted, "plain", dimensions=("light",))
    with pytest.raises(PrismError, match="margin of TA is of no dimension; there are light"):
        collected(backbone, tmp_path / "other", [stating], margins={"TA": 0.1})
    assert not (tmp_path / "other").exists()
    both = [stating, Reward(counted, "b", dimensions=("light",))]
    with pytest.raises(PrismError, match=r"margin of light is of no dimension; there are plain.light, b.light"):
        collected(backbone, tmp_path / "other", both, margins={"light": 0.1})
    assert len(calls) == 4


def test_an_error_of_a_reward_names_file_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ("import numpy as np", "def boom(video):", "    return deeper(video)", "def deeper(video):",
            "    return np.mean(video, axis=9)", "class Model:", "    def __init__(self):", "        self.x = y",
            "    def __call__(self, video):", "        return 1")  # fmt: skip
    table(tmp_path / "mine.py", *rows)
    frames = [np.zeros((1, 2, 2, 3), np.uint8)]
    with pytest.raises(PrismError, match=r"The reward boom \(mine.py, line 5\) raised AxisError"):
        load_reward("mine.py:boom").score(frames, ["a"])
    with pytest.raises(PrismError, match=r"mine.py:Model \(mine.py, line 8\) could not be made: NameError"):
        load_reward("mine.py:Model")
    table(tmp_path / "broken.py", "x = 1", "def broken(video)")
    with pytest.raises(PrismError, match=r"broken.py \(broken.py, line 2\) cannot be run: SyntaxError"):
        load_reward("broken.py:broken")
    for answer, words in {
        "0.5": 'gave the text "0.5" where',
        True: "gave True of type bool where",
        (1, 2): "gave a list of 2 values where",
        2j: "gave 2j of type complex where",
    }.items():
        with pytest.raises(PrismError, match=re.escape(words)):
            Reward(lambda video, answer=answer: list(answer) if isinstance(answer, tuple) else answer, "r").score(
                frames, ["a"]
            )
    with pytest.raises(PrismError, match="The reward r is 3 of type int; a function is needed"):
        Reward(3, "r")


TEACHERS = {
    "videoreward:weights": "takes its weights behind =, and found a colon; write videoreward=weights",
    "videoreward:/some/folder": "write videoreward=/some/folder",
    "videorewrd=weights": "no teacher videorewrd; did you mean videoreward?",
    "HPSv3": "no teacher HPSv3; did you mean hpsv3?",
    "videoreward=nowhere": "The teacher videoreward=nowhere cannot be loaded: there is no folder nowhere",
    "videoreward=empty": r"The teacher videoreward=empty cannot be loaded: .*model_config.json does not exist",
    "hpsv3=empty": "The teacher hpsv3=empty cannot be loaded: The folder empty has no HPSv3.safetensors",
    "hpsv2=empty": "The folder empty has none of HPS_v2.1_compressed.safetensors",
    "imagereward=empty": "The folder empty has no ImageReward.safetensors",
    "videoscore=empty": "The folder empty has no model.safetensors",
    "videoscore2=file.txt": "file.txt is a file; name the folder that holds configuration and weights",
    "hpsv3=empty,count=x": "The option count of hpsv3 must be a whole number",
    "hpsv3=empty,cuont=3": "The teacher hpsv3 has no option cuont",
    "vbench,dimensions=beauty": "A dimension of vbench must be one of subject_consistency",
}


@pytest.mark.parametrize("spec", TEACHERS)
def test_a_teacher_that_is_not_there_is_told_before_the_backbone_is_loaded(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    table(Path("file.txt"), "a cat")
    monkeypatch.setattr("prism.loading.load_backbone", None)
    line = said(capsys, "collect", "--prompts", "file.txt", "--reward", spec, "--out", "out")
    assert re.search(TEACHERS[spec], line), line
    assert not Path("out").exists()


def test_a_teacher_that_samples_by_time_needs_the_rate_before_sampling(backbone, tmp_path):
    reward = load_reward("vbench", device="cpu")
    with pytest.raises(PrismError, match=r"The reward vbench takes fps, .* give --fps"):
        collected(backbone, tmp_path / "out", [reward])
    assert not (tmp_path / "out").exists()
    check_rewards(["referee", "vbench", "prism.shapeworld.referee:reward", "nothing-like-it.py:f"])


# -- flags and files


def test_messages_name_flags_and_not_pythons_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = table(tmp_path / "held_out.csv", "prompt,chosen,rejected", "one,x.mp4,y.mp4")
    line = said(capsys, "data", "check", pairs, "--rule", "most")
    assert "prism: --rule must be one of majority, paper; found most." in line
    assert "--margin must be a number of at least 0" in said(capsys, "data", "check", pairs, "--margin", "-1")
    encoding = ("encode", pairs, "--out", "o")
    assert "prism: --held-out must be two shares" in said(capsys, *encoding, "--held-out", "0.9,0.2")
    line = said(capsys, "train", "--out", "o", "--keep-best")
    assert "The training setting --keep-best must be false without --validate-every, found True" in line
    levels = {"t": ("--t", str), "draws": ("--draws", int), "held_out": ("--held-out", str)}
    for sentence, words in {
        "timesteps names a noise level more than once.": "--t names a noise level more than once.",
        "num_draws must be 1.": "--draws must be 1.",
        "The file a/held_out.csv has no column 'held_out'; held_out.json.": None,
        "A name held_out, at the end held_out.": "A name --held-out, at the end --held-out.",
        "draws": None,
    }.items():
        assert cli._with_flags(sentence, levels) == (words or sentence)


@pytest.fixture(scope="module")
def exported(store, backbone, tmp_path_factory) -> Path:
    export(store, backbone, out := tmp_path_factory.mktemp("export") / "to-label")
    return out


def test_sentences_of_sample_name_flags_and_what_is_empty(tmp_path, capsys):
    sentences = {
        ("--max-n", 9): "The --max-n bounds the candidates of a run with --until; give --until, or leave --max-n out.",
        ("--until", 1.5): "--until must be a number above 0, at most 1; found 1.5.",
        ("--draft-steps", 3): "A length of drafts (--draft-steps) belongs to",
        ("--strategy", "race", "--num-draws", 4): "A number of noise draws (--num-draws) belongs to",
        ("--until", 0.5, "--select-by", "VQ:1,TA:1"): "--until compares one dimension of the judge with its reference",
        ("--budget", ""): 'The --budget "" must be a number',
        ("--look", ""): 'ahead-conditional; found "".',
        ("--strategy", ""): 'There is no strategy ""; choose one',
    }
    for words, sentence in sentences.items():
        assert sentence in said(capsys, "sample", "--prompt", "a cat", "--out", tmp_path / "out", *words)
        assert not (tmp_path / "out").exists()
    with pytest.raises(PrismError) as error, in_flags("until"):
        raise PrismError(
            "until needs top_k, not /a/top_k or 'top_k' or num_steps=20 (--steps 20), but goes until max_n."
        )
    assert str(error.value) == (
        "--until needs --top-k, not /a/top_k or 'top_k' or num_steps=20 (--steps 20), but goes until --max-n."
    )


def test_wrong_files_are_told_apart(store, exported, place, tmp_path, capsys):
    assert "is what prism data export wrote; name its filled pairs.csv" in said(
        capsys, "data", "import", store.folder, exported
    )
    tasks = said(capsys, "data", "import", store.folder, exported / "tasks.json")
    assert "holds tasks without answers, as Label Studio imports them" in tasks
    for command in (("encode", store.folder, "--out", tmp_path / "o"), ("data", "check", store.folder)):
        assert "is a latent store and no table of clips: prism train and prism eval" in said(capsys, *command)
    assert "is a latent store and no table of clips" in said(capsys, "score", store.folder)
    assert "is a diffusers pipeline, which --backbone takes" in said(capsys, "data", "check", place / "pipe")
    with pytest.raises(PrismError, match=r"no known format: prompt, clip\. The simplest format has .* prompt, video"):
        read_clips(table(tmp_path / "wrong.csv", "prompt,clip", "a,x.mp4"))


def test_a_store_that_cannot_be_written_is_told_without_a_flag_that_import_lacks(
    store, exported, tmp_path, monkeypatch
):
    rows = (exported / "pairs.csv").read_text().splitlines()
    filled = table(tmp_path / "filled.csv", rows[0].replace("Overall", "mine"), *(f"{row}A" for row in rows[1:]))

    def read_only(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("prism.preference.writer.files.new_file", read_only)
    with pytest.raises(PrismError, match=r"cannot be written .Permission denied.*import the answers again") as caught:
        read_back(store, filled)
    assert "--resume" not in str(caught.value)


def test_a_changed_shard_is_told_without_a_line_of_parquet(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(PrismError, match=r"Copy or write the store again\.$"):
        check_seal(tmp_path / "x", "0", "index.parquet")
    with pytest.raises(PrismError, match=r"delete its entry in seals.json\.$"):
        check_seal(tmp_path / "x", "0", "seals.json")


def test_flags_that_do_nothing_are_refused(store, tmp_path, capsys):
    assert "--resume goes on with the file of --out" in said(capsys, "score", tmp_path / "x.mp4", "--resume")
    assert "--overwrite replaces the file of --out" in said(capsys, "score", tmp_path / "x.mp4", "--overwrite")
    assert "There is no option --data" in said(capsys, "score", tmp_path / "x.mp4", "--data", store.folder)
    words = ("collect", "--label", "--reward", "referee", "--out", store.folder)
    for flags in (("--candidates", 7), ("--steps", 3), ("--no-predicted",), ("--seed", 4), ("--encoding", "cp1252")):
        assert f"The --label samples nothing; leave {flags[0]} out." in said(capsys, *words, *flags)
    table(tmp_path / "p.txt", "a cat")
    line = said(capsys, "collect", "--prompts", tmp_path / "p.txt", "--margin", 1, "--out", tmp_path / "o")
    assert "The --margin is of scores, and no reward gives any; give --reward." in line


def test_a_changed_image_is_noticed_when_an_encoding_goes_on(tmp_path):
    pipe, call = ltx_i2v()
    image = call.pop("image")
    pairs = clips(tmp_path / "set", 1, image="start.png")
    image.save(tmp_path / "set" / "start.png")
    size = {name: call[name] for name in ("num_frames", "height", "width")}
    policy = FramePolicy(**size, start="uniform")
    options = {"progress": False}
    backbone = Backbone(pipe)
    encode(read(pairs), backbone, call, policy, tmp_path / "out", **options)
    encode(read(pairs), backbone, call, policy, tmp_path / "out", resume=True, **options)
    image.rotate(90).save(tmp_path / "set" / "start.png")
    with pytest.raises(PrismError, match="differs in key: images"):
        encode(read(pairs), backbone, call, policy, tmp_path / "out", resume=True, **options)


# -- help


def dataclasses_in(kind):
    """A command's dataclass, and those of its groups of options."""
    yield kind
    for hint in get_type_hints(kind).values():
        if is_dataclass(hint):
            yield from dataclasses_in(hint)


WITH_HELP = ("train", "encode", "collect", "score", "eval", "data check", "data export", "data import", "reference")


@pytest.mark.parametrize("command", WITH_HELP)
def test_the_help_names_values_and_breaks_lines_at_sentences(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert not re.search(r" STR\b", text), text
    assert not re.search(r"\(default:\s*('')?\)", text), text
    for kind in dataclasses_in(resolve_name(cli.COMMANDS[command])):
        for each in parse_from_object(kind).params:
            lines = (each.description or "").splitlines()
            assert all(line.rstrip().endswith(".") for line in lines[:-1]), each.description


@pytest.mark.parametrize("levels", [(600.0,), (600.0, 300.0), (300.0,)])
def test_a_score_at_a_level_outside_the_reference_has_no_percentile(levels):
    document = {
        **{"levels": levels, "clips": [{"reference_of": "prompt"}], "call": {}, "frames": {}},
        "reference": {"levels": [300.0, 699.0], "intervals": {}, "store": {"name": "s"}, "split": "test"},
    }
    text = "\n".join(_read_as(document))
    assert ("reference has no level t = 600, so that scores there have no percentile" in text) == (600 in levels)
    assert ("Percentile, and probability" in text) == (300 in levels)
    assert ("at t = 300." in text) == (300 in levels)


def test_prompts_that_the_referee_cannot_judge_are_refused_before_sampling(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle moves right\na cat\n")
    words = ("collect", "--prompts", tmp_path / "prompts.txt", "--reward", "referee", "--out", tmp_path / "store")
    told = "The reward referee refuses the prompts: prompt 'a cat' is outside ShapeWorld's grammar"
    assert told in said(capsys, *words)
    assert not (tmp_path / "store").exists()
