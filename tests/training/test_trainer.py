"""Training on a real tiny pipeline: it learns, resumes to the bit after kill -9, and refuses what is not its own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import forks, kills, stores, tiny
from tests.works import works

from prism import files, runs
from prism.errors import PrismError
from prism.evaluation import evaluate
from prism.judge import Judge
from prism.judge.objective import preference_loss
from prism.preference import LatentStore
from prism.training import TrainConfig, train
from prism.training.batches import Batches

CONFIG = TrainConfig(steps=8, prompts_per_step=2, learning_rate=1e-3, log_every=3, checkpoint_every=2)
# Everything that has a state: average, best weights, schedule, both sources, shared noise.
EVERYTHING = dataclasses.replace(
    CONFIG,
    ema_decay=0.9,
    schedule="cosine",
    warmup_steps=2,
    source="mixed",
    shared_noise=True,
    validate_every=1,
    keep_best=True,
)


@pytest.fixture(scope="module")
def wan():
    return tiny.wan()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("training") / "store")


def judge_for(pipe, **options) -> Judge:
    return Judge.untrained(pipe, **{"tap": 2, "dim": 32, "dimensions": ("VQ", "overall"), **options})


def weights(judge: Judge) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in judge.head.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source", ["renoised", "trajectory"])
def test_the_head_learns_what_the_latents_show(wan, store, tmp_path, source):
    judge = judge_for(wan)
    frozen = {name: value.clone() for name, value in wan.transformer.state_dict().items()}
    config = dataclasses.replace(
        CONFIG, steps=40, prompts_per_step=3, learning_rate=3e-3, log_every=10, checkpoint_every=0, source=source
    )
    result = train(store, judge, config, tmp_path / "run", progress=False)
    history = result["history"]
    assert [entry["step"] for entry in history] == [10, 20, 30, 40]
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]
    assert history[-1]["accuracy"]["VQ"] > 0.75
    assert same(frozen, wan.transformer.state_dict())
    assert all(parameter.grad is None for parameter in wan.transformer.parameters())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "history.json", "head"}
    loaded = Judge.from_pretrained(tmp_path / "run" / "head", wan)
    assert same(weights(loaded), weights(judge))
    assert loaded.trained_on["source"] == source
    assert (loaded.trained_on["prompts"], loaded.trained_on["pairs"]) == (6, 36)
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def test_one_step_is_adamw_on_the_loss_over_all_pairs(wan, store, tmp_path):
    """Oracle: the same step by hand, one video and one pair at a time."""
    config = dataclasses.replace(CONFIG, steps=1, max_gradient_norm=0, max_rows=3)
    ours, theirs = judge_for(wan), judge_for(wan)
    train(store, ours, config, tmp_path / "run", progress=False)

    groups = store.groups("train", theirs.dimensions)
    batches = Batches(store, groups, theirs.backbone, config)
    batch = batches.draw(0, range(2))
    scores = []
    for row, prompt in enumerate(batch.prompts):
        conditioning = theirs.backbone.condition([groups[prompt].prompt], **tiny.CALL_WAN)
        tokens = theirs.backbone.tokens(batch.noisy_latents[row : row + 1], conditioning, batch.t[row], 2)
        scores.append(theirs.head(tokens.visual, tokens.text, tokens.text_mask)[0])
    margins = torch.stack([scores[a] - scores[b] for a, b in zip(batch.first.tolist(), batch.second.tolist())])
    preference_loss(margins, batch.labels).backward()
    before, after = weights(theirs), weights(ours)
    gradients = {name: parameter.grad for name, parameter in ours.head.named_parameters()}
    for name, parameter in theirs.head.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
        # AdamW's first step: its moments are the gradient and the gradient squared.
        step = gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(after[name], before[name] * (1 - 1e-3 * 0.01) - 1e-3 * step, msg=name)


def test_batches_are_the_labelled_pairs_of_whole_prompts_at_one_level(wan, store):
    judge = judge_for(wan)
    groups = store.groups("train", ("VQ", "overall"))
    batches = Batches(store, groups, judge.backbone, CONFIG)
    rows = {(row["video_a"], row["video_b"]): (row["VQ"], row["overall"]) for row in store.pairs.to_pylist()}
    seen = []
    for step in range(6):
        batch = batches.draw(step, range(2))
        seen += list(dict.fromkeys(batch.prompts))
        names = [video for prompt in dict.fromkeys(batch.prompts) for video in groups[prompt].videos]
        assert len(names) == len(batch.t) == 8
        for prompt in set(batch.prompts):
            levels = {t for t, p in zip(batch.t.tolist(), batch.prompts) if p == prompt}
            assert len(levels) == 1
        for a, b, labels in zip(batch.first.tolist(), batch.second.tolist(), batch.labels.tolist()):
            assert batch.prompts[a] == batch.prompts[b]
            expected = [np.nan if label is None else label for label in rows[names[a], names[b]]]
            np.testing.assert_array_equal(labels, expected)
        sigma = (batch.t / 1000).view(-1, 1, 1, 1, 1)
        noise = (batch.noisy_latents - (1 - sigma) * store.latents(names)) / sigma
        assert abs(float(noise.std()) - 1) < 0.05  # Eq. 1
        assert not torch.allclose(noise[0], noise[1], atol=1e-3)  # separate draws
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))  # every prompt once an epoch
    assert seen[:6] != seen[6:]


def test_shared_noise_and_trajectory_states(wan, store):
    backbone = judge_for(wan).backbone
    groups = store.groups("train", ("VQ",))
    shared = Batches(store, groups, backbone, dataclasses.replace(CONFIG, shared_noise=True)).draw(0, [0])
    sigma = (shared.t / 1000).view(-1, 1, 1, 1, 1)
    noise = (shared.noisy_latents - (1 - sigma) * store.latents(groups[shared.prompts[0]].videos)) / sigma
    torch.testing.assert_close(noise[0], noise[1], atol=1e-3, rtol=1e-3)
    config = dataclasses.replace(CONFIG, source="trajectory", t_low=500)
    levels = set()
    for step in range(12):
        recorded = Batches(store, groups, backbone, config).draw(step, [0])
        videos = groups[recorded.prompts[0]].videos
        index = stores.LEVELS.index(float(recorded.t[0]))
        assert torch.equal(recorded.noisy_latents, store.trajectory(videos)[0][:, index])
        levels.add(float(recorded.t[0]))
    assert levels == {900.0, 600.0}


def test_processes_share_the_places_of_a_step(wan, store):
    """Two processes together draw what one draws alone."""
    groups = store.groups("train", ("VQ",))
    batches = Batches(store, groups, judge_for(wan).backbone, CONFIG)
    whole, first, second = (batches.draw(3, places) for places in (range(2), range(0, 2, 2), range(1, 2, 2)))
    assert torch.equal(whole.noisy_latents, torch.cat([first.noisy_latents, second.noisy_latents]))
    assert whole.prompts == first.prompts + second.prompts


def test_runs_are_seeded(wan, store, tmp_path):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        judge = judge_for(wan)
        torch.manual_seed(len(runs))  # the global state must not matter
        train(store, judge, dataclasses.replace(CONFIG, steps=3, seed=seed), tmp_path / name, progress=False)
        runs[name] = weights(judge)
    assert same(runs["a"], runs["b"])
    assert not same(runs["a"], runs["c"])


def killed(store: Path, out: Path) -> None:
    """What a process does that is killed when the third checkpoint is written, but not published."""
    torch.set_num_threads(1)  # as the tests' own process
    write = files.write_json

    def write_or_die(path: Path, obj: dict) -> None:
        write(path, obj)
        if path.name == "state.json" and obj["step"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    files.write_json = write_or_die
    train(LatentStore.open(store), judge_for(tiny.wan()), EVERYTHING, out, progress=False)


def test_resuming_after_kill_9_gives_the_same_bits(wan, store, tmp_path):
    whole = judge_for(wan)
    expected = train(store, whole, EVERYTHING, tmp_path / "whole", progress=False)
    (died,) = forks.run(killed, store.folder, tmp_path / "killed", count=1)
    assert died.code == -signal.SIGKILL, died.err
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert [name for name in left if not name.startswith(".")] == ["step-00000002", "step-00000004"]
    assert len(left) == 3  # and the torn third

    resumed = judge_for(wan)
    result = train(store, resumed, EVERYTHING, tmp_path / "killed", resume=True, progress=False)
    assert same(weights(whole), weights(resumed))
    assert result["history"] == expected["history"]
    head = "head/model.safetensors"
    assert (tmp_path / "killed" / head).read_bytes() == (tmp_path / "whole" / head).read_bytes()
    again = judge_for(wan)  # resuming a finished run loads it
    assert train(store, again, EVERYTHING, tmp_path / "killed", resume=True, progress=False) == result
    assert same(weights(whole), weights(again))


@pytest.mark.parametrize("state", [[], {}, {"step": "x"}, {"step": 6, "history": 3}, {"step": None, "window": []}])
def test_a_checkpoint_whose_state_is_odd_falls_back_on_the_one_before(wan, store, interrupted, state):
    files.write_json(interrupted / "checkpoints" / "step-00000006" / "state.json", state)
    with pytest.warns(UserWarning, match="Falling back"):
        train(store, judge_for(wan), CONFIG, interrupted, resume=True, progress=False)


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(wan, store, tmp_path, monkeypatch):
    """A run that stopped after its third checkpoint, at step 6 of 8."""
    draw = Batches.draw

    def stop(self, step, places):
        if step == 6:
            raise Interrupted
        return draw(self, step, places)

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "draw", stop)
        with pytest.raises(Interrupted):
            train(store, judge_for(wan), CONFIG, tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_checkpoints_hold_no_pickle_and_the_last_two_are_kept(interrupted):
    assert sorted(path.name for path in (interrupted / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    kinds = {path.suffix for path in interrupted.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    tensors = load_file(interrupted / "checkpoints" / "step-00000006" / "state.safetensors")
    assert float(tensors["optimizer.query.step"]) == 6


def test_a_damaged_checkpoint_falls_back_on_the_one_before(wan, store, tmp_path, interrupted):
    whole, resumed = judge_for(wan), judge_for(wan)
    train(store, whole, CONFIG, tmp_path / "whole", progress=False)
    damaged = interrupted / "checkpoints" / "step-00000006" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="Falling back"):
        train(store, resumed, CONFIG, interrupted, resume=True, progress=False)
    assert same(weights(whole), weights(resumed))


def test_checkpoints_that_are_all_damaged_are_refused(wan, store, interrupted):
    for path in (interrupted / "checkpoints").rglob("state.safetensors"):
        path.write_bytes(b"\x80\x04K\x01.")
    with pytest.warns(UserWarning, match="Falling back"), pytest.raises(PrismError, match="is a pickle"):
        train(store, judge_for(wan), CONFIG, interrupted, resume=True, progress=False)


def test_resuming_another_run_is_refused(wan, store, interrupted):
    other = dataclasses.replace(CONFIG, learning_rate=2e-3)
    with pytest.raises(PrismError, match=r"differs in train: learning_rate was 0.001 and is now 0.002"):
        train(store, judge_for(wan), other, interrupted, resume=True, progress=False)
    with pytest.raises(PrismError, match=r"differs in judge: aggregation was 'query' and is now 'mean'"):
        train(store, judge_for(wan, aggregation="mean"), CONFIG, interrupted, resume=True, progress=False)


def test_what_leaves_the_weights_alone_may_change_on_resume(wan, store, tmp_path, interrupted):
    """Memory, notes, the store's place, and what another diffusers adds to a configuration."""
    whole, resumed = judge_for(wan), judge_for(wan)
    train(store, whole, CONFIG, tmp_path / "whole", progress=False)
    known = files.read_json(interrupted / "config.json")
    known["judge"]["backbone"] |= {"denoiser_config": "0" * 64, "settings": {}}
    files.write_json(interrupted / "config.json", known)
    shutil.copytree(store.folder, tmp_path / "moved")
    other = dataclasses.replace(CONFIG, max_rows=5, log_every=3, checkpoint_every=1)
    train(tmp_path / "moved", resumed, other, interrupted, resume=True, progress=False)
    for one, two in zip(weights(whole).values(), weights(resumed).values()):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    for name in ("seed", "steps", "prompts_per_step"):
        changed = dataclasses.replace(CONFIG, **{name: getattr(CONFIG, name) + 1})
        with pytest.raises(PrismError, match=f"differs in train: {name} was"):
            train(store, judge_for(wan), changed, interrupted, resume=True, progress=False)
    known["judge"]["backbone"]["weights"] = "0" * 64
    files.write_json(interrupted / "config.json", known)
    with pytest.raises(PrismError, match=r"differs in judge: backbone\.weights was"):
        train(store, judge_for(wan), CONFIG, interrupted, resume=True, progress=False)


def test_folders_of_the_users_among_checkpoints_are_kept(wan, store, interrupted):
    place = interrupted / "checkpoints"
    (place / "step-0-mine").mkdir()
    (place / "step-0-mine" / "notes.txt").write_text("x")
    (place / "step-00000001").mkdir()  # named like one of the run's, and none
    (place / "step-00000001" / "notes.txt").write_text("x")
    shutil.copytree(place / "step-00000004", place / "step-4-copy")
    (place / "step-00000004" / "notes.txt").write_text("x")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.parent.name[-1] != "6"}
    before = {path: content for path, content in before.items() if "step-00000004/state" not in path.as_posix()}
    assert len(before) == 5
    every = dataclasses.replace(CONFIG, checkpoint_every=1)
    with pytest.warns(UserWarning, match="no run made"):
        train(store, judge_for(wan), every, interrupted, resume=True, progress=False)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_output_folders(wan, store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(PrismError, match="exists already"):
        train(store, judge_for(wan), CONFIG, tmp_path / "full", progress=False)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(PrismError, match="cannot be made"):
        train(store, judge_for(wan), CONFIG, tmp_path / "full" / "mine.txt" / "run", progress=False)


def test_what_cannot_be_trained_on_is_refused(wan, store, tmp_path):
    judge = Judge.untrained(wan, dim=32)
    with pytest.raises(PrismError, match="no labels for TA"):
        train(store, judge, CONFIG, tmp_path / "run", progress=False)
    config = dataclasses.replace(CONFIG, source="trajectory", t_low=950)
    with pytest.raises(PrismError, match="No recorded state"):
        Batches(store, store.groups("train", ("VQ",)), judge.backbone, config)
    foreign = stores.make(tmp_path / "foreign", meta={"backbone": {"vae": "AutoencoderKL", "vae_config": "0"}})
    with pytest.raises(PrismError, match="made with the VAE AutoencoderKL, this backbone has AutoencoderKLWan"):
        train(foreign, judge_for(wan), CONFIG, tmp_path / "run", progress=False)
    untrainable = stores.make(tmp_path / "untrainable", prompts=(0, 2, 2))
    with pytest.raises(PrismError, match="no training pairs"):
        train(untrainable, judge_for(wan), CONFIG, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_divergence_stops_the_run(wan, store, tmp_path):
    judge = judge_for(wan)
    with torch.no_grad():
        judge.head.mlp[-1].weight.fill_(float("inf"))
    with pytest.raises(PrismError, match="loss of step 1 is not finite"):
        train(store, judge, CONFIG, tmp_path / "run", progress=False)


def test_the_run_writes_what_it_was_asked_for(wan, store, interrupted):
    written = files.read_json(interrupted / "config.json")
    assert TrainConfig.from_dict(written["train"]) == CONFIG
    assert written["judge"]["backbone"] == judge_for(wan).backbone.fingerprint()
    assert isinstance(store, LatentStore)


@works(
    "Offload and memory",
    "Training and evaluating with `enable_model_cpu_offload`",
    "works",
    "Models come to the accelerator once a run and are freed at its end, not after each pass.",
)
def test_offloaded_models_are_freed_at_the_end_and_not_after_each_pass(store, tmp_path):
    pipe, freed = tiny.wan(), []
    pipe.maybe_free_model_hooks = lambda: freed.append(1)
    counts = []
    for steps in (1, 4):
        judge = judge_for(pipe)
        judge.backbone.condition([group.prompt for group in store.groups("train")], **store.call)
        freed.clear()
        train(store, judge, dataclasses.replace(CONFIG, steps=steps), tmp_path / str(steps), progress=False)
        counts.append(len(freed))
        freed.clear()
        evaluate(judge, store, "train", [900.0, 500.0][: 1 + (steps > 1)], progress=False)
        counts.append(len(freed))
    assert counts == [1, 2, 1, 2]  # the evaluation encodes validation prompts first


def test_two_heads_on_one_pass_are_the_heads_trained_alone_and_resume_to_the_bit(wan, store, tmp_path, monkeypatch):
    def two():
        return Judge.average([judge_for(wan, tap=1), judge_for(wan, tap=2, seed=7)])

    alone = [judge_for(wan, tap=1), judge_for(wan, tap=2, seed=7)]
    for number, judge in enumerate(alone):
        train(store, judge, CONFIG, tmp_path / f"alone-{number}", progress=False)
    draw = Batches.draw

    def stop(self, step, places):
        if step == 5:
            raise Interrupted
        return draw(self, step, places)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Batches, "draw", stop)
        train(store, two(), CONFIG, tmp_path / "both", progress=False)
    both = two()
    result = train(store, both, CONFIG, tmp_path / "both", resume=True, progress=False)
    assert result["history"][-1]["loss"] > 0
    for member, judge in zip(both.members, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(member.head.parameters(), judge.head.parameters(), strict=True))
    assert both.trained_on["pairs"] == alone[0].trained_on["pairs"]
    assert not (tmp_path / "both" / "checkpoints").exists()


def test_a_run_resumed_after_its_end_knows_what_it_is(wan, store, tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, eta=2.5)
    first, again = judge_for(wan), judge_for(wan)
    train(store, first, config, tmp_path / "run", progress=False)
    train(store, again, config, tmp_path / "run", resume=True, progress=False)
    assert same(weights(first), weights(again))
    assert again.eta == 2.5
    assert again.trained_on == json.loads(json.dumps(first.trained_on))
    assert again.trained_on["prompt_keys"]
    assert again.trained_on["source"] == "renoised"


@pytest.mark.parametrize("left", [(), ("config.json",), (".x.prism-0a1b2c3d",)])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_no_run_got_anywhere_will_do(wan, store, tmp_path, left, resume):
    out = tmp_path / "run"
    out.mkdir()
    for name in left:
        if name == "config.json":
            files.write_json(out / name, {"command": "train", "train": {}})
        else:
            (out / name).mkdir()
            (out / name / "x").write_text("1")
    train(store, judge_for(wan), dataclasses.replace(CONFIG, steps=1), out, resume=resume, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "head", "history.json"]


def test_a_log_tells_how_far_training_is(wan, store, tmp_path, monkeypatch, capsys):
    clock = runs.Clock
    monkeypatch.setattr(runs, "Clock", lambda what, total, every: clock(what, total, 0))
    train(store, judge_for(wan), dataclasses.replace(CONFIG, steps=2), tmp_path / "run")
    assert "prism: train: 1 of 2 steps, loss " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_dies_anywhere_goes_on_to_the_same_bits_and_keeps_no_litter(wan, store, tmp_path, number):
    config = dataclasses.replace(CONFIG, steps=4)
    train(store, judge_for(wan), config, tmp_path / "whole", progress=False)
    head, out = "head/model.safetensors", tmp_path / "runs" / "out"
    out.parent.mkdir()

    def work(resume=True):
        train(store, judge_for(wan), config, out, resume=resume, progress=False)

    point, died = 1, True
    while died:  # time after time, until a run gets to its end
        died = kills.dies(work, out, point, number)
        assert [path.name for path in out.parent.iterdir()] in ([], ["out"])
        point += 11
    assert point > 30
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "head", "history.json"]
    assert [path for path in out.rglob("*") if path.name.startswith(".")] == []
    assert (out / head).read_bytes() == (tmp_path / "whole" / head).read_bytes()
    assert (out / head).stat().st_mode & 0o044 == 0o044


def test_overwriting_keeps_the_old_head_until_the_new_one_is_whole(wan, store, tmp_path, monkeypatch):
    from prism import loading
    from prism.commands import train as experiment

    monkeypatch.setattr(loading, "load_backbone", lambda *_: (judge_for(wan).backbone, {}, "tiny"))

    def command(settings, out, dim=None, **options):
        return experiment.Train(
            experiment.Folder(out=tmp_path / "runs" / out, **options),
            experiment.Labelled(data=store.folder),
            experiment.HeadOptions(tap="1,2", dim=dim),
            experiment.Training(**settings.to_dict()),
        )

    def work(seed, out="out", **options):
        settings = dataclasses.replace(CONFIG, steps=2, checkpoint_every=1, seed=seed)
        experiment.run(command(settings, out, dim=16, **options))

    head = "head/model.safetensors"
    work(1, "other")
    new = (tmp_path / "runs" / "other" / head).read_bytes()
    shutil.rmtree(tmp_path / "runs")
    work(0)
    old, ends = (tmp_path / "runs" / "out" / head).read_bytes(), set()
    for point in range(5, 1000, 29):
        died = kills.dies(lambda: work(1, overwrite=True), tmp_path / "runs", point)
        ends.add((tmp_path / "runs" / "out" / head).read_bytes())
        assert ends <= {old, new}
        if not died:
            break
    assert ends == {old, new}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]
    bad = command(dataclasses.replace(CONFIG, source="trajectory", t_low=950), "out", overwrite=True)
    with pytest.raises(PrismError, match="No recorded state"):  # which is known once the run has its folder
        experiment.run(bad)
    assert (tmp_path / "runs" / "out" / head).read_bytes() == new
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]
