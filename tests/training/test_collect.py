"""Prompts and a reward become a store of the pipeline's own candidates, whatever happens on the way."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests import forks, kills, tiny

from prism import files
from prism.backbone import Backbone
from prism.cli import main
from prism.clips import CLIP_FACTS
from prism.errors import PrismError
from prism.judge import Judge
from prism.preference import LatentStore
from prism.preference.prompts import Prompt
from prism.preference.sources import Place
from prism.sampling.trajectory import candidate_seed
from prism.training import TrainConfig, train
from prism.training.collect import collect, label
from prism.training.encode import split_of
from prism.training.reward import Reward, load_reward

CALL = tiny.CALL_WAN
TEXTS = ("a red circle moves right", "a blue square moves up", "a cat runs", "a green triangle moves left")
SPLITS = ("train", "train", "validation", "test")
PROMPTS = [Prompt(text, Place("prompts.txt", row), split) for row, (text, split) in enumerate(zip(TEXTS, SPLITS))]
ROOT = Path(__file__).parents[2]


def brightness(video, prompt):
    assert video.dtype == np.uint8
    assert video.shape == (9, 32, 32, 3)
    assert prompt in TEXTS
    return {"VQ": float(video.mean()), "MQ": float(np.abs(np.diff(video.astype(float), axis=0)).mean())}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


def made(backbone, out, rewards=None, **options) -> LatentStore:
    rewards = [Reward(brightness, "plain")] if rewards is None else rewards
    options = {"candidates": 3, "seed": 5, "progress": False, **options}
    return collect(PROMPTS, backbone, CALL, out, rewards, **options)


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def store(backbone, tmp_path_factory) -> LatentStore:
    return made(backbone, tmp_path_factory.mktemp("collected") / "store", states=(2, 4))


def stock(pipe, prompt, seed, **more):
    return pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **CALL, output_type="latent", **more).frames


def test_latents_are_those_of_the_stock_call_of_each_seed(store, backbone):
    assert len(store.videos) == 12
    for row in (0, 7, 11):
        video = store.videos.slice(row, 1).to_pylist()[0]
        assert video["seed"] == candidate_seed(5, video["prompt"], row % 3)
        assert torch.equal(store.latents([video["video"]]), stock(backbone.pipe, video["prompt"], video["seed"]))
    assert store.call == CALL
    assert store.videos["source_row"].to_pylist()[::3] == [0, 1, 2, 3]
    assert store.videos["split"].to_pylist()[::3] == list(SPLITS)


def test_states_and_predictions_are_those_of_the_samplers_own_steps(store, backbone):
    """By the sampler's own sums: z' = z + (sigma' - sigma) v at each step, so that z - sigma v is what v predicts."""
    video = store.videos.slice(4, 1).to_pylist()[0]
    after = []

    def look(pipe, step, timestep, tensors):
        after.append(tensors["latents"].clone())
        return tensors

    stock(backbone.pipe, video["prompt"], video["seed"], callback_on_step_end=look)
    sigmas = backbone.pipe.scheduler.sigmas
    for index, step in enumerate((2, 4)):
        state, t = store.trajectory([video["video"]], index)
        assert torch.equal(state, after[step - 2])
        assert t.item() == pytest.approx(1000 * float(sigmas[step - 1]))
        velocity = (after[step - 1] - state) / (sigmas[step] - sigmas[step - 1])
        clean, level = store.predicted([video["video"]], index)
        assert torch.equal(level, t)
        assert torch.allclose(clean, state - sigmas[step - 1] * velocity, atol=1e-4)


def test_scores_are_what_the_reward_says_of_the_decoded_videos(store, backbone):
    columns = {name: store.videos[name].to_pylist() for name in ("video", "VQ", "MQ", "prompt")}
    for row in (1, 8):
        frames = backbone.decode(store.latents([columns["video"][row]]), num_frames=9)[0]
        frames = (frames * 255).round().byte().numpy()
        expected = brightness(frames, columns["prompt"][row])
        assert {name: columns[name][row] for name in ("VQ", "MQ")} == pytest.approx(expected)
        luma = frames @ np.array([0.2126, 0.7152, 0.0722]) / 255
        facts = {name: store.videos[name][row].as_py() for name in CLIP_FACTS}
        assert facts.pop("clip_brightness") == pytest.approx(luma.mean(), abs=1e-6)
        assert facts.pop("clip_motion") == pytest.approx(np.abs(np.diff(luma, axis=0)).mean(), abs=1e-6)
        assert facts == {"clip_seconds": None, "clip_fps": None, "clip_pixels": 32 * 32}  # without --fps
    ratings = pq.read_table(store.folder / "ratings.parquet")
    assert len(ratings) == 24
    assert set(ratings["annotator"].to_pylist()) == {"plain"}
    scores = dict(zip(columns["video"], columns["VQ"]))
    pairs = store.pairs.to_pylist()
    assert len(pairs) == 4 * 3
    assert all(np.sign(scores[pair["video_a"]] - scores[pair["video_b"]]) == pair["VQ"] for pair in pairs)
    agreeing = [pair for pair in pairs if pair["VQ"] == pair["MQ"]]
    assert all(pair["overall"] == pair["VQ"] for pair in agreeing)
    assert all(pair["overall"] is None for pair in pairs if pair not in agreeing)


def test_larger_shards_hold_the_same_videos_and_scores(store, backbone, tmp_path):
    larger = made(backbone, tmp_path / "store", unit=4, states=(2, 4))  # 12 videos, more than a reward is given at once
    assert len(list((tmp_path / "store" / "shards").glob("*.parquet"))) == 1
    for name in ("video", "seed", "VQ", "MQ"):
        assert larger.videos[name].to_pylist() == store.videos[name].to_pylist()
    ids = store.videos["video"].to_pylist()
    assert torch.equal(larger.latents(ids), store.latents(ids))
    assert larger.pairs.equals(store.pairs)


def test_batches_of_several_prompts_hold_the_same_videos_up_to_rounding(store, backbone, tmp_path):
    """Each row of a stock call is its own prompt's and seed's: 12 candidates in shards of 6, 5 and 1 at a time."""
    batched = made(backbone, tmp_path / "store", unit=2, states=(2, 4), batch_size=5)
    ids = store.videos["video"].to_pylist()
    assert batched.videos["video"].to_pylist() == ids
    pairs = [(batched.latents(ids), store.latents(ids))]
    pairs += [(batched.trajectory(ids, index)[0], store.trajectory(ids, index)[0]) for index in (0, 1)]
    pairs += [(batched.predicted(ids, index)[0], store.predicted(ids, index)[0]) for index in (0, 1)]
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(batched.trajectory(ids, 1)[1], store.trajectory(ids, 1)[1])
    with pytest.raises(PrismError, match="batch_size"):  # another size gives other bits, and so another store
        made(backbone, tmp_path / "store", unit=2, states=(2, 4), batch_size=4, resume=True)


def test_the_store_trains(store, backbone, tmp_path):
    judge = Judge.untrained(backbone, tap=2, dim=32, dimensions=("VQ", "overall"))
    config = TrainConfig(steps=2, prompts_per_step=2, validate_every=2)
    assert train(store, judge, config, tmp_path / "run", progress=False)["history"]


def test_other_rewards_label_the_same_videos_again(store, backbone, tmp_path):
    import shutil

    folder = tmp_path / "again"
    shutil.copytree(store.folder, folder)
    before = sums(folder / "shards")
    rows = {}

    def dark(videos, prompts, fps):
        assert fps == 8
        rows.update(dict.fromkeys(prompts, len(videos)))
        return [-float(video.mean()) for video in videos]

    again = label(folder, backbone, [Reward(dark, "dark")], fps=8, margins=0.01, progress=False)
    assert sums(folder / "shards") == before
    assert rows == dict.fromkeys(TEXTS, 3)  # a batch is a prompt's candidates
    assert again.dimensions == ("overall",)
    assert set(again.videos["clip_seconds"].to_pylist()) == {9 / 8}
    assert again.videos["clip_motion"].to_pylist() == store.videos["clip_motion"].to_pylist()
    scores = dict(zip(again.videos["video"].to_pylist(), again.videos["overall"].to_pylist()))
    first = again.pairs.to_pylist()[0]
    difference = scores[first["video_a"]] - scores[first["video_b"]]
    assert first["overall"] == (0 if abs(difference) <= 0.01 else np.sign(difference))
    annotators = pq.read_table(folder / "ratings.parquet")["annotator"].to_pylist()
    assert {name: annotators.count(name) for name in set(annotators)} == {"plain": 24, "dark": 12}
    both = label(folder, backbone, [Reward(dark, "dark"), Reward(brightness, "plain")], fps=8, progress=False)
    assert both.dimensions == ("dark.overall", "plain.VQ", "plain.MQ", "overall")
    scored = both.videos.select(["dark.overall", "plain.VQ"]).to_pylist()
    assert all(row["dark.overall"] == pytest.approx(-row["plain.VQ"]) for row in scored)
    with pytest.raises(PrismError, match=r"soft of TA is of no dimension; there are dark.overall"):
        label(folder, backbone, [Reward(dark, "dark"), Reward(brightness, "plain")], fps=8, scales={"TA": 1})
    with pytest.raises(PrismError, match=r"margin of TA is of no dimension; there are dark.overall"):
        label(folder, backbone, [Reward(dark, "dark"), Reward(brightness, "plain")], fps=8, margins={"TA": 1})


def test_differences_of_scores_become_probabilities_that_training_takes(store, backbone, tmp_path):
    import shutil

    folder = tmp_path / "soft"
    shutil.copytree(store.folder, folder)
    soft = label(folder, backbone, [Reward(brightness, "plain")], scales={"VQ": 9.0, "MQ": 4.0}, progress=False)
    rated = {row["video"]: row for row in soft.videos.to_pylist()}
    for pair in soft.pairs.to_pylist():
        a, b = rated[pair["video_a"]], rated[pair["video_b"]]
        odds = [(a[name] - b[name]) / scale for name, scale in (("VQ", 9), ("MQ", 4))]
        for name, each in zip(("VQ", "MQ", "overall"), (*odds, sum(odds) / 2)):
            expected = 1 / (1 + math.exp(-each))
            assert pair[f"{name}:p_a"] == pytest.approx(expected, abs=2e-6)
            assert pair[f"{name}:p_b"] == pytest.approx(1 - expected, abs=2e-6)
    groups = soft.groups("train")
    assert all(np.isfinite(group.soft).all() for group in groups)
    one = label(folder, backbone, [Reward(brightness, "plain")], scales={"VQ": 9}, progress=False)
    assert {name for name in one.pairs.column_names if ":" in name} == {
        *("VQ:p_a", "VQ:p_b", "overall:p_a", "overall:p_b")
    }
    judge = Judge.untrained(backbone.pipe, tap=1, dim=8, dimensions=one.dimensions)
    assert train(soft, judge, TrainConfig(steps=2), tmp_path / "run", progress=False)["history"]


FAILURES = {
    "raises": (lambda video, prompt: 1 / 0, "raised ZeroDivisionError: division by zero, for the video seed-"),
    "leaves": (lambda video, prompt: sys.exit(3), "raised SystemExit: 3"),
    "nan": (lambda video, prompt: float("nan"), "gave nan where a finite number is needed"),
    "infinite": (lambda video, prompt: {"VQ": np.inf}, "gave inf for VQ where a finite number is needed"),
    "text": (lambda video, prompt: "good", 'gave the text "good" where a finite number is needed'),
    "nothing": (lambda video, prompt: None, "gave None where a finite number"),
    "empty": (lambda video, prompt: {}, "gave the dimensions none where one at least is needed"),
    "keys": (lambda video, prompt: {"prompt": 1.0}, "names a dimension 'prompt'"),
    "hangs": (lambda video, prompt: time.sleep(60), "did not answer within 0.3 seconds"),
    "rows": (lambda videos, prompts: [1.0], "must answer with a row for each of 3 videos, and gave 1 of them"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_reward_that_fails_leaves_what_was_collected(name, store, backbone, tmp_path):
    import shutil

    function, sentence = FAILURES[name]
    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    before = sums(folder)
    with pytest.raises(PrismError) as caught:
        label(folder, backbone, [Reward(function, "bad", 0.3)], progress=False)
    assert sentence in str(caught.value)
    assert "The reward bad" in str(caught.value)
    assert name == "keys" or ('of the prompt "a red circle moves right"' in str(caught.value))
    assert sums(folder) == before


def test_a_run_whose_reward_failed_goes_on_with_the_labels_alone(store, backbone, tmp_path, monkeypatch):
    scored = []

    def fails(video, prompt):
        scored.append(prompt)
        if len(scored) == 8:
            raise RuntimeError("the model is gone")
        return brightness(video, prompt)

    with pytest.raises(PrismError, match="raised RuntimeError: the model is gone, for the video seed"):
        made(backbone, tmp_path / "store", [Reward(fails, "plain", source="plain")], states=(2, 4))
    assert len(list((tmp_path / "store" / "shards").glob("*.safetensors"))) == 3
    made(backbone, tmp_path / "store", [Reward(fails, "plain", source="plain")], states=(2, 4), resume=True)
    assert len(scored) == 8 + 12 - 6  # two units of three were whole
    assert sums(tmp_path / "store") == sums(store.folder)
    with pytest.raises(PrismError, match=r"are of another function, plain; name this one apart"):
        made(backbone, tmp_path / "store", [Reward(fails, "plain", source="b")], states=(2, 4), resume=True)
    with pytest.raises(PrismError, match="differs in key: states"):
        made(backbone, tmp_path / "store", states=(2, 5), resume=True)


def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_store(backbone, tmp_path):
    def work(out, resume=False):
        collect(PROMPTS[:2], backbone, CALL, out, [Reward(brightness, "plain")], candidates=2, states=(3,),
                progress=False, resume=resume)  # fmt: skip

    work(tmp_path / "whole")
    rng = np.random.default_rng(0)
    points = iter(sorted(rng.choice(np.arange(4, 60), 6, replace=False).tolist()))
    died = 0
    for number, point in enumerate(points):
        out = tmp_path / f"killed-{number}"
        if kills.dies(lambda out=out: work(out), out, point, signal.SIGKILL):
            died += 1
            work(out, resume=True)
        assert sums(out) == sums(tmp_path / "whole")
    assert died >= 4


def test_steps_and_schedulers_that_do_not_fit_are_refused(backbone, tmp_path):
    with pytest.raises(PrismError, match="makes no step 9; --states takes steps from 1 to 6"):
        made(backbone, tmp_path / "a", states=(9,))
    with pytest.raises(PrismError, match="takes no argument 'strength'"):
        collect(PROMPTS, backbone, {**CALL, "strength": 0.5}, tmp_path / "b", progress=False)
    with pytest.raises(PrismError, match="Two rewards are named x"):
        made(backbone, tmp_path / "c", [Reward(brightness, "x"), Reward(brightness, "x")])
    assert not (tmp_path / "b").exists()
    with pytest.raises(PrismError, match="was not made by prism collect"):
        label(ROOT / "src/prism/shapeworld/assets/candidates", backbone, [Reward(brightness, "x")])


def test_a_teacher_labels_and_an_unclear_answer_is_no_label(store, backbone, tmp_path, capsys):
    import shutil

    from tests.teachers import small_models

    from prism.loading import load_reward

    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    (tmp_path / "weights").mkdir()
    small_models.videoreward(tmp_path / "weights")
    spec = f"videoreward={tmp_path / 'weights'},device=cpu,dtype=float32"
    with pytest.raises(PrismError, match=r"reward videoreward takes fps, .*--fps"):
        label(folder, backbone, [load_reward(spec)], progress=False)
    again = label(folder, backbone, [load_reward(spec)], fps=8, progress=False)
    assert again.dimensions == ("VQ", "MQ", "TA", "overall")
    frames = (backbone.decode(again.latents(again.videos["video"].to_pylist()[:1])) * 255).round().byte()
    teacher = load_reward(spec).function
    (row,) = teacher([frames[0].numpy()], [TEXTS[0]], 8)
    assert {name: again.videos[name][0].as_py() for name in row} == pytest.approx(row, rel=1e-4)

    def writes(videos, prompts):
        return [{"a": float("nan"), "b": float("nan")} if p == TEXTS[0] and i == 1 else {"a": i, "b": -i}
                for i, p in enumerate(prompts)]  # fmt: skip

    capsys.readouterr()
    both = label(folder, backbone, [Reward(writes, "w", unclear=True), Reward(brightness, "plain")], progress=False)
    assert "1 of 12 videos have no score in w.a" in capsys.readouterr().err
    assert both.videos["w.a"].to_pylist() == [0, None, 2] + [0, 1, 2] * 3
    of_first = [row for row in both.pairs.to_pylist() if row["prompt"] == TEXTS[0]]
    assert [row["w.a"] for row in of_first] == [-1, None, None]  # (0, 2), then those of plain alone
    assert None not in [row["plain.VQ"] for row in of_first]


REWARD = '''
"""Light and colour of a clip."""
def light(video, prompt):
    return {"light": video.mean() / 255, "red": video[..., 0].mean() / 255}
def late(videos, prompts):
    return [video[-1].mean() / 255 for video in videos]
'''


def test_two_processes_write_the_store_of_one(tmp_path, capsys):
    tiny.wan().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "call.json").write_text(json.dumps(CALL))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    words = ["collect", "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu", "--candidates", "2"]
    words += ["--reward", f"{tmp_path / 'reward.py'}:light", "--states", "2", "--backbone", str(tmp_path / "pipe")]
    said = "8 videos of 4 prompts and 4 pairs in light, red, overall"
    assert command(*words, "--out", tmp_path / "one") == 0
    assert said in capsys.readouterr().out
    two = forks.run(main, [*words, "--out", str(tmp_path / "two")])
    assert [process.code for process in two] == [0, 0], two
    assert [said in process.out for process in two] == [True, False]
    assert sums(tmp_path / "one") == sums(tmp_path / "two")
    words = ["collect", "--label", *words[-2:], "--device", "cpu", "--reward", f"{tmp_path / 'reward.py'}:late"]
    said = "8 videos of 4 prompts and 4 pairs in overall"
    assert command(*words, "--out", tmp_path / "one") == 0
    assert said in capsys.readouterr().out
    two = forks.run(main, [*words, "--out", str(tmp_path / "two")])
    assert [process.code for process in two] == [0, 0], two
    assert [said in process.out for process in two] == [True, False]
    assert sums(tmp_path / "one") == sums(tmp_path / "two")


def test_a_reward_that_hangs_ends_the_command_with_one_sentence(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef slow(video):\n    time.sleep(600)\n")
    (tmp_path / "prompts.txt").write_text("a red circle moves right\n")
    words = ["collect", "--prompts", str(tmp_path / "prompts.txt"), "--reward", f"{tmp_path / 'slow.py'}:slow"]
    words += ["--reward-timeout", "0.2", "--candidates", "2", "--steps", "2", "--out", str(tmp_path / "store")]
    (run,) = forks.run(main, words, count=1, timeout=60)
    assert run.code == 2
    (line,) = [each for each in run.err.splitlines() if "prism:" in each]
    assert "The reward slow did not answer within 0.2 seconds, for the video seed-" in line
    assert len(list((tmp_path / "store" / "shards").glob("*.safetensors"))) == 1


def command(*words) -> int:
    return main([str(word) for word in words])


def test_shapeworld_is_labelled_by_its_referee_and_evaluated(tmp_path, capsys):
    from prism.shapeworld import grammar

    lines = [
        {"prompt_en": prompt, "split": split} for split in ("train", "test") for prompt in grammar.prompts(split, 2)
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(lines))
    words = ("--prompts", tmp_path / "prompts.json", "--reward", "referee", "--candidates", 2, "--steps", 4)
    assert command("collect", *words, "--margin", "VQ:0.03,MQ:0.03,TA:0.03", "--out", tmp_path / "store") == 0
    assert "8 videos of 4 prompts and 4 pairs in VQ, MQ, TA, overall" in capsys.readouterr().out
    store = LatentStore.open(tmp_path / "store")
    assert store.videos["split"].to_pylist() == ["train"] * 4 + ["test"] * 4
    assert store.call["num_inference_steps"] == 4
    for name in ("VQ", "MQ", "TA"):
        assert all(0 <= value <= 1 for value in store.videos[name].to_pylist())
    assert command("eval", "--data", tmp_path / "store", "--out", tmp_path / "eval", "--timesteps", "699") == 0
    assert command("collect", *words, "--out", tmp_path / "store") == 2
    assert "continue with --resume" in capsys.readouterr().err


def test_the_pages_second_road_runs_as_printed(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/your-own-model.md").read_text().partition("## Road 2")[2]
    lines = [line for line in page.split("```")[1].splitlines() if line]
    assert [line.split()[1] for line in lines] == ["collect", "train", "eval"]
    again = re.search(r"`prism (collect \S+ \S+ --label [^`]*)`", page).group(1)
    monkeypatch.chdir(tmp_path)
    pipe = tiny.wan()
    pipe.save_pretrained("pipe")
    Path("pipe/call.json").write_text(json.dumps({**CALL, "num_inference_steps": 2}))
    Path("reward.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1))
    Path("other.py").write_text(Path("reward.py").read_text().replace("steady(", "better("))
    colours, shapes, ways = (
        ("red", "green", "blue", "yellow"),
        ("circle", "square", "triangle"),
        ("left", "right", "up"),
    )
    everything = [f"a {colour} {shape} moves {way}" for colour in colours for shape in shapes for way in ways]
    by_split = {split: [p for p in everything if split_of(p, (0.1, 0.1)) == split] for split in SPLITS}
    prompts = [*by_split["train"][:4], *by_split["validation"][:1], *by_split["test"][:1]]
    Path("prompts.txt").write_text("\n".join(prompts))
    for line in [*(line.removeprefix("prism ") for line in lines), again]:
        short = ("--steps", 2, "--validate-every", 0) if line.startswith("train") else ()
        assert command(*line.replace("FOLDER_OR_ID", "pipe").split(), *short) == 0, capsys.readouterr().err
    assert "24 videos of 6 prompts and 36 pairs in steady, sharp, overall" in capsys.readouterr().out
    assert Path("evaluation/metrics.json").is_file()


LINES = {
    "": "give --prompts FILE, or --label",
    "--label": "--label needs what labels; give --reward",
    "--label --prompts nothing.txt --reward referee": "leave --prompts out",
    "--prompts nothing.txt": "nothing.txt does not exist",
    "--prompts p.txt --states 1,b": "must be steps apart by commas",
    "--prompts p.txt --margin x": 'The --margin "x" must be a number',
    "--prompts p.txt --soft VQ:y": 'The --soft "VQ:y" must be a number',
    "--prompts p.txt --reward referee --soft 0": "soft must be a number above 0",
    "--prompts p.txt --soft 0.1": "The --soft is of scores, and no reward gives any",
    "--prompts p.txt --reward nowhere.py:f": "nowhere.py of the --reward does not exist",
    "--prompts p.txt --reward f": 'The --reward "f" names no function',
    "--prompts p.txt --reward no.such.module:f": "cannot be imported: ModuleNotFoundError",
    "--prompts p.txt --reward json:dump": "cannot be called as dump(video, prompt=...)",
    "--prompts p.txt --reward json:bumps": "There is no function bumps in json; it has dump",
    "--prompts p.txt --reward-timeout 0": "--reward-timeout must be a number above 0",
}


@pytest.mark.parametrize("line", LINES)
def test_a_mistake_is_one_sentence(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n")
    assert command("collect", "--out", "store", *line.split()) == 2
    assert LINES[line] in capsys.readouterr().err
    assert not os.path.exists("store")


def test_rewards_are_found_by_file_and_module_and_named(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    (tmp_path / "mine.py").write_text(
        "import beside\n"
        "class Model:\n"
        "    dimensions = ('VQ',)\n"
        "    name = 'model'\n"
        "    def __call__(self, video, **more):\n"
        "        assert set(more) == {'prompt', 'fps'}\n"
        "        return {'VQ': beside.FACTOR}\n"
        "def broken(video)\n"
    )
    with pytest.raises(PrismError, match="cannot be run: SyntaxError"):
        load_reward(f"{tmp_path / 'mine.py'}:Model")
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("def broken(video)\n", ""))
    reward = load_reward(f"{tmp_path / 'mine.py'}:Model")
    assert (reward.name, reward.dimensions) == ("model", ("VQ",))
    assert reward.score([np.zeros((1, 2, 2, 3), np.uint8)], ["a"]) == [{"VQ": 2.0}]
    assert load_reward(f"other={tmp_path / 'mine.py'}:Model").name == "other"
    tensors = Reward(lambda videos, prompts: {"a": torch.ones(2), "b": np.zeros(2, np.float32)}, "batch")
    assert tensors.dimensions is None
    assert tensors.score([None, None], ["p", "q"]) == [{"a": 1.0, "b": 0.0}] * 2
    assert tensors.dimensions == ("a", "b")
    changing = iter(({"a": 1}, {"b": 1}))
    with pytest.raises(PrismError, match="gave the dimensions b where a is needed"):
        Reward(lambda video: next(changing), "c").score([None, None], ["p", "q"])


def test_candidates_that_are_not_finite_are_told_and_left_out(backbone, tmp_path, capsys):
    pipe = tiny.wan()
    broken, calls = Backbone(pipe), []
    pipe.scheduler.register_to_config(stochastic_sampling=False)

    def overflows(module, inputs, output):
        calls.append(len(calls))
        return (output[0] * float("nan"),) if 12 <= calls[-1] < 24 else output  # the second of 6 steps of 2 calls each

    pipe.transformer.register_forward_hook(overflows)
    store = collect(PROMPTS[:2], broken, CALL, tmp_path / "store", [Reward(brightness, "plain")], candidates=2,
                    progress=False)  # fmt: skip
    assert "1 candidates are left out: the latents of seed" in capsys.readouterr().err
    assert store.videos["prompt"].to_pylist() == [TEXTS[0], TEXTS[1], TEXTS[1]]
    assert len(store.pairs) == 1
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(float("nan"))
    with pytest.raises(PrismError, match="No candidate has finite latents"):
        collect(PROMPTS[:1], Backbone(pipe), CALL, tmp_path / "other", [Reward(brightness, "plain")], progress=False)
    assert not (tmp_path / "other").exists()


def test_a_reward_whose_file_changed_goes_on_with_a_warning(store, backbone, tmp_path):
    import shutil

    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    label(folder, backbone, [Reward(brightness, "plain", source="r.py:f", version="1")], progress=False)
    next((folder / "labels" / "plain").iterdir()).unlink()
    with pytest.warns(UserWarning, match="file of the reward plain has changed since it scored some"):
        again = label(
            folder, backbone, [Reward(brightness, "plain", source="r.py:f", version="2")], resume=True, progress=False
        )
    assert again.videos["VQ"].to_pylist() == store.videos["VQ"].to_pylist()


def test_pictures_and_numbers_that_json_does_not_hold_are_refused(backbone, tmp_path):
    with pytest.raises(PrismError, match="call holds what a store cannot keep as JSON"):
        collect(PROMPTS, backbone, {**CALL, "callback_on_step_end": print}, tmp_path / "a", progress=False)
    with pytest.raises(PrismError, match="held_out must be two shares"):
        made(backbone, tmp_path / "b", held_out=(0.9, 0.2))
    half = made(backbone, tmp_path / "half", [], half=True, candidates=1)
    assert half.latents([half.videos["video"][0].as_py()]).half().float().isfinite().all()
    assert len(half.pairs) == 0


def test_the_bias_probes_see_a_collected_store_without_decoding_it(store, backbone):
    from prism.evaluation.facts import facts_of

    videos = store.videos["video"].to_pylist()
    facts, units = facts_of(store, videos)
    assert {name: len(values) for name, values in facts.items()} == {
        **{"length": 12, "resolution": 12, "brightness": 12, "motion": 12}
    }
    assert units["length"] == "frames"
    with pytest.raises(PrismError, match="names a dimension 'clip_motion'; it must be a text"):
        Reward(lambda video: {"clip_motion": 1.0}, "taken").score([np.zeros((1, 2, 2, 3), np.uint8)], ["a"])


def test_what_can_be_refused_before_sampling_leaves_no_folder(backbone, tmp_path):
    with pytest.raises(PrismError, match="makes no step 9; --states takes steps from 1 to 6"):
        made(backbone, tmp_path / "out", states=(2, 9))
    with pytest.raises(PrismError, match=r"The reward timed takes fps, .* give --fps"):
        made(backbone, tmp_path / "out", [Reward(lambda video, prompt, fps: fps, "timed")])
    assert not (tmp_path / "out").exists()
    reward = Reward(lambda video, prompt, fps=7.0: fps, "timed")  # its own default stands
    assert reward.score([np.zeros((1, 2, 2, 3), np.uint8)], ["a"]) == [{"overall": 7.0}]
    assert reward.score([np.zeros((1, 2, 2, 3), np.uint8)], ["a"], 5.0) == [{"overall": 5.0}]
