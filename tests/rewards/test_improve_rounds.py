"""Rounds on a tiny real pipeline: what is tuned, what stays as it is, what is refused, what a kill costs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests import kills, tiny
from tests.zoo import VARIANTS

from prism import files
from prism.backbone import Backbone
from prism.backbone.denoising import target_of
from prism.errors import PrismError
from prism.judge import Judge
from prism.preference import LatentStore, prompt_key
from prism.preference.prompts import Prompt
from prism.preference.sources import Place
from prism.rewards import measuring, rounds, tuning
from prism.rewards.lora import FILE, applied
from prism.rewards.measuring import Outer
from prism.rewards.picks import Group, groups_of, judged, picked
from prism.rewards.retrain import retrained
from prism.rewards.rounds import improve
from prism.rewards.run_folder import RunFolder
from prism.rewards.settings import ImproveConfig
from prism.rewards.tuning import Draws, tune
from prism.training import TrainConfig
from prism.training.collect import collect
from prism.training.reward import Reward

CALL = {**tiny.CALL_WAN, "num_inference_steps": 2, "num_frames": 5, "guidance_scale": 1.0}
PROMPTS = ["a red circle moves right", "a blue square moves up", "a cat runs", "a green triangle moves left"]
TEST = ["a yellow cat runs", "a red square moves down"]
SMALL = {"candidates": 2, "test_candidates": 1, "steps": 3, "prompts_per_step": 2, "rank": 2, "num_draws": 1}
SMALL |= {"levels": (500.0,), "checkpoint_every": 2}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan(num_layers=2))


@pytest.fixture(scope="module")
def judge(backbone) -> Judge:
    return Judge.untrained(backbone, dim=16)


def brightness(video):
    return float(video.mean())


def run(
    backbone,
    judge,
    out,
    prompts=PROMPTS,
    test=TEST,
    outer=None,
    resume=False,
    reuse=None,
    controls=("worst",),
    **settings,
):
    config = ImproveConfig(**{**SMALL, "rounds": 2, **settings})
    more = {"outer": outer or Outer("dark", dark), "controls": controls, "rewards": [Reward(brightness, "light")]}
    more |= {"resume": resume, "reuse": reuse, "progress": False}
    return improve(backbone, judge, prompts, test, CALL, out, config, **more)


def dark(latents, prompts, call, seeds):
    return (-latents.flatten(1).mean(1)).tolist()


@pytest.fixture(scope="module")
def two(backbone, judge, tmp_path_factory):
    """Two rounds with a control and an outer judge, and the denoiser's weights before."""
    weights = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    return run(backbone, judge, tmp_path_factory.mktemp("improve") / "run"), weights


def test_the_backbone_is_as_it_was_to_the_bit(two, backbone):
    _, weights = two
    after = backbone.denoiser.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_each_arm_has_its_rounds_and_the_first_shares_its_candidates(two):
    result, _ = two
    assert [(row["arm"], row["round"]) for row in result.rounds] == [
        (arm, number) for arm in ("judge", "worst") for number in (1, 2)
    ]
    made = {str(path.parent.relative_to(result.folder)) for path in result.folder.rglob("store.json")}
    assert "judge/round-1/candidates" in made
    assert "worst/round-1/candidates" not in made
    assert {"judge/round-2/candidates", "worst/round-2/candidates", "untuned/test"} <= made
    prompts = [
        set(LatentStore.open(result.folder / f"judge/round-{n}/candidates").videos["prompt"].to_pylist())
        for n in (1, 2)
    ]
    assert prompts == [set(PROMPTS[:2]), set(PROMPTS[2:])]  # each round its own
    names = {row["measure"] for row in result.rounds[0]["measures"]}
    assert names == {"judge", "outer", "light", "motion", "diversity"}
    assert {(row["arm"], row["round"]) for row in result.against} == {("worst", 1), ("worst", 2)}


def test_the_judge_reads_the_original_backbone_in_every_round(two, backbone, judge):
    result, _ = two
    folder = result.folder / "judge/round-2"
    fresh = Judge(Backbone(tiny.wan(num_layers=2)), judge.members, judge.dimensions)
    scores = judged(fresh, LatentStore.open(folder / "candidates"), ImproveConfig(**SMALL), (500.0,))
    assert files.read_json(folder / "scores.json")["scores"] == scores


def test_the_controls_turn_the_picks_round_or_shuffle_them(two):
    picks = {arm: files.read_json(two[0].folder / f"{arm}/round-1/picks.json")["picks"] for arm in ("judge", "worst")}
    assert [(p["winner"], p["loser"]) for p in picks["judge"]] == [(p["loser"], p["winner"]) for p in picks["worst"]]


def test_the_tuned_videos_are_stock_calls_with_the_lora_and_the_same_seeds(two):
    result, _ = two
    pipe = tiny.wan(num_layers=2)
    pipe.load_lora_weights(result.folder / "judge/round-2/lora", weight_name=FILE)
    for row in LatentStore.open(result.folder / "judge/round-2/test").videos.to_pylist()[:2]:
        generator = torch.Generator().manual_seed(row["seed"])
        frames = pipe(row["prompt"], generator=generator, **CALL, output_type="latent").frames
        assert torch.allclose(
            LatentStore.open(result.folder / "judge/round-2/test").latents([row["video"]]), frames, atol=1e-5
        )
    stores = [LatentStore.open(result.folder / f"{each}/test").videos for each in ("untuned", "judge/round-1")]
    assert stores[0]["seed"].to_pylist() == stores[1]["seed"].to_pylist()
    assert (result.lora / FILE).is_file() == (result.kept > 0)


def sums(folder: Path) -> dict[str, object]:
    """The contents of a run's files, without the seconds that parts took."""
    contents: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        value = files.read_json(path) if path.suffix == ".json" else files.sha256(path)
        contents[str(path.relative_to(folder))] = (
            {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value
        )
    return contents


def test_a_damaged_lora_or_measures_are_refused_and_made_anew_once_deleted(two, backbone, judge, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(two[0].folder, out)
    lora, measures, published = (
        out / f"judge/round-2/lora/{FILE}",
        out / "judge/round-1/measures.json",
        out / "lora" / FILE,
    )
    for path, name in ((lora, rf"Delete the file \S*round-2/lora/{FILE}, and continue with --resume"),
                       (measures, r"Delete the file \S*round-1/measures.json, and")):  # fmt: skip
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(PrismError, match=name):
            run(backbone, judge, out, resume=True)
        path.unlink()
    published.write_bytes(b"of before")
    again = run(backbone, judge, out, resume=True)
    assert again.rounds == two[0].rounds
    assert sums(out) == sums(two[0].folder)
    numbers = bytearray(lora.read_bytes())
    numbers[-8:] = b"\x01" * 8
    lora.write_bytes(numbers)  # finite numbers, but not those that were tuned
    with pytest.raises(PrismError, match="is not the LoRA that was tuned"):
        run(backbone, judge, out, resume=True)
    assert files.sha256(published) == files.sha256(two[0].lora / FILE)


def test_what_came_of_a_lora_goes_where_tuning_again_gives_another(tmp_path):
    def tune(value):
        def write(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"a": torch.full((2,), value)}, folder / FILE)
            return [{"step": 1}]

        return write

    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.tuned("judge", number, tune(1.0))
        folder.once(f"judge/round-{number}/measures", "measures", lambda: {"measures": {}})
    (tmp_path / "judge/round-1/lora" / FILE).unlink()
    folder.tuned("judge", 1, tune(1.0))
    assert (tmp_path / "judge/round-1/measures.json").is_file()  # the same bits
    (tmp_path / "judge/round-1/lora" / FILE).unlink()
    folder.tuned("judge", 1, tune(2.0))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"judge/round-1/tuning.json", f"judge/round-1/lora/{FILE}"}
    lora = tmp_path / "judge/round-1/lora" / FILE
    files.write_json(tmp_path / "judge/round-1/tuning.json", {"history": []})  # of a version that kept no digest
    whole = lora.read_bytes()
    lora.write_bytes(whole[:-4])
    with pytest.raises(PrismError, match=r"is not a whole safetensors file .* Delete the file"):
        folder.publish(1)
    assert not (tmp_path / "lora").exists()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / FILE).write_bytes(b"of a round that is no longer kept")
    folder.publish(0)
    assert not (tmp_path / "lora").exists()


def test_a_damaged_checkpoint_says_what_to_delete(tmp_path):
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002/state.safetensors").write_bytes(b"\x10\0")
    with pytest.raises(PrismError, match=r"Delete the folder \S*step-00000002, and continue with --resume"):
        tuning._restore(tmp_path, None, None, {}, [], [])


def test_an_outer_judge_that_is_the_judge_is_refused(backbone, judge, tmp_path):
    config = ImproveConfig(**SMALL)
    outer = measuring.judge_outer(Judge(backbone, judge.members, judge.dimensions), config, (500.0,), "the head a")
    with pytest.raises(PrismError, match="The outer judge, the head a, is the judge that selects"):
        run(backbone, judge, tmp_path / "out", outer=outer)
    same = Judge(Backbone(tiny.wan(num_layers=2)), judge.members, judge.dimensions)  # loaded a second time
    assert measuring.other_outer(same, backbone, CALL, config).is_judge(judge)
    torch.manual_seed(1)
    assert not measuring.judge_outer(Judge.untrained(backbone, dim=16, seed=5), config, (500.0,)).is_judge(judge)
    assert not (tmp_path / "out").exists()


def test_layers_and_levels_that_cannot_be_tuned_are_refused_before_anything_is_sampled(backbone, judge, tmp_path):
    with pytest.raises(PrismError, match="takes no LoRA at nope"):
        run(backbone, judge, tmp_path / "out", targets=("nope",))
    from_images = Judge.untrained(VARIANTS["wan21_i2v"]()[0], dim=16)
    with pytest.raises(PrismError, match="has no image, and WanImageToVideoPipeline needs one; name it in a column"):
        run(from_images.backbone, from_images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_killed_while_tuning_goes_on_to_the_same_files(two, backbone, judge, tmp_path, monkeypatch):
    out, kept = tmp_path / "run", tuning._keep
    shutil.copytree(two[0].folder, out)  # as a run that has come to its second round
    shutil.rmtree(out / "judge/round-2")

    def dies_after_the_second(*arguments):
        kept(*arguments)
        if arguments[0].name == "round-2":
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_keep", dies_after_the_second)
        assert kills.dies(lambda: run(backbone, judge, out, resume=True), out, 10**9)
    assert (out / "judge/round-2/step-00000002").is_dir()
    again = run(backbone, judge, out, resume=True)
    assert again.rounds == two[0].rounds
    assert sums(out) == sums(two[0].folder)


def test_a_control_may_be_added_to_a_run_that_is_done(two, backbone, judge, tmp_path):
    shutil.copytree(two[0].folder, tmp_path / "run")
    again = run(backbone, judge, tmp_path / "run", resume=True, controls=("random", "worst"))
    assert [row for row in again.rounds if row["arm"] != "random"] == two[0].rounds
    assert [row["round"] for row in again.rounds if row["arm"] == "random"] == [1, 2]


def test_batches_of_candidates_are_the_same_videos_up_to_rounding(two, backbone, judge, tmp_path):
    run(backbone, judge, tmp_path / "run", rounds=1, steps=1, sample_batch_size=4)
    for name in ("untuned/test", "judge/round-1/candidates"):
        ours, theirs = (LatentStore.open(folder / name) for folder in (tmp_path / "run", two[0].folder))
        ids = theirs.videos["video"].to_pylist()
        assert torch.allclose(ours.latents(ids), theirs.latents(ids), atol=1e-4)
    assert len(list((tmp_path / "run/untuned/test/shards").glob("*.parquet"))) == 1


def test_the_untuned_models_videos_are_taken_from_another_run(two, backbone, judge, tmp_path, monkeypatch):
    def sampled(prompts, backbone, call, out, *rest, **options):
        assert Path(out, "store.json").is_file(), f"{out} is sampled again"
        return collect(prompts, backbone, call, out, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="round-1/test is sampled again"):
        patch.setattr(rounds, "collect", sampled)
        run(backbone, judge, tmp_path / "other", reuse=two[0].folder, steps=1)
    scores = [files.read_json(each / "judge/round-1/scores.json") for each in (two[0].folder, tmp_path / "other")]
    assert scores[0]["scores"] == scores[1]["scores"]
    with pytest.raises(PrismError, match="seed"):
        run(backbone, judge, tmp_path / "seed", reuse=two[0].folder, seed=3)
    with pytest.raises(PrismError, match="holds no judge/round-1/candidates"):
        run(backbone, judge, tmp_path / "none", reuse=tmp_path)


def test_a_folder_of_another_configuration_is_refused(two, backbone, judge):
    with pytest.raises(PrismError, match="differs in config: learning_rate was"):
        run(backbone, judge, two[0].folder, resume=True, learning_rate=1e-3)
    with pytest.raises(PrismError, match="exists already"):
        run(backbone, judge, two[0].folder)
    with pytest.raises(PrismError, match="differs in outer_files"):  # of the same name
        run(backbone, judge, two[0].folder, resume=True, outer=Outer("dark", dark, digest="another"))


@pytest.fixture(scope="module")
def store(two) -> LatentStore:
    return LatentStore.open(two[0].folder / "judge/round-1/candidates")


@pytest.fixture(scope="module")
def picks(store):
    groups = groups_of(store)
    scores = {video: float(number) for group in groups for number, video in enumerate(group.videos)}
    return picked(groups, scores, 0.0)[0]


@pytest.mark.parametrize("recipe", ["pairs", "winners", "weighted"])
def test_tuning_moves_the_lora_alone_and_towards_what_was_picked(backbone, store, picks, tmp_path, recipe):
    """At a high rate on two prompts a few steps fit them: winners gain on the losers."""
    settings = {**SMALL, "steps": 12, "learning_rate": 3e-2, "warmup_steps": 0, "recipe": recipe, "checkpoint_every": 0}
    config = ImproveConfig(**{**settings, "prompt_dropout": 0.3 if recipe == "winners" else 0.0, "ema_decay": 0.0})
    target = target_of(backbone, PROMPTS[0], CALL)
    base = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    with applied(backbone, rank=4) as lora:
        before = lora.state()
        history = tune(backbone, store, picks, config, lora, target, tmp_path, progress=False)
        assert all(value.grad is None for name, value in backbone.denoiser.named_parameters() if name not in before)
        assert any(not torch.equal(before[name], value) for name, value in lora.weights.items())
    assert all(torch.equal(value, base[name]) for name, value in backbone.denoiser.state_dict().items())
    first, last = history
    assert (first["step"], last["step"]) == (10, 12)
    assert min(first["kl_div"], last["kl_div"]) > 0
    if recipe == "pairs":
        assert last["implicit_acc"] > 0.9
        assert last["loss"] < np.log(2)
    elif recipe == "winners":
        assert last["winner_loss"] < last["ref_winner_loss"]
    else:
        assert {"policy_loss", "kl_div_loss", "old_deviate"} <= last.keys()


def test_winner_and_loser_share_noise_and_level_and_a_step_needs_no_state(backbone, store, picks):
    config = ImproveConfig(**SMALL)
    draws = Draws(backbone, store, picks, config, 1)
    rows = draws.rows(5, 1)
    assert torch.equal(rows.noise[0], rows.noise[1])
    assert rows.t[0] == rows.t[1]
    pick = picks[rows.prompts[0]]
    assert torch.equal(rows.clean, store.latents([pick.winner, pick.loser]))
    again = Draws(backbone, store, picks, config, 1).rows(5, 1)
    assert torch.equal(rows.noise, again.noise)
    assert not torch.equal(rows.noise, Draws(backbone, store, picks, config, 2).rows(5, 1).noise)
    weighted = Draws(backbone, store, picks, ImproveConfig(**{**SMALL, "recipe": "weighted"}), 1).rows(0, 0)
    assert not torch.equal(weighted.noise[0], weighted.noise[1])
    assert weighted.r.tolist() == pytest.approx([0.4, 0.6])  # one pooled standard deviation from the mean, clipped at 5


def test_groups_with_nothing_to_choose_are_left_out_and_counted():
    groups = [Group("a", ("a0", "a1")), Group("b", ("b0", "b1")), Group("c", ("c0",))]
    scores = {"a0": 1.0, "a1": 3.0, "b0": 2.0, "b1": 2.0, "c0": 9.0}
    picks, facts = picked(groups, scores, 0.0)
    assert [(pick.winner, pick.loser) for pick in picks] == [("a1", "a0")]
    assert facts["zero_std_ratio"] == pytest.approx(2 / 3)
    assert facts["reward_std_mean"] == pytest.approx(np.sqrt(2) / 3)
    assert facts["reward_avg"] == pytest.approx((2 + 2 + 9) / 3)
    with pytest.raises(PrismError, match="nothing to tune on"):
        picked(groups, scores, 2.0)


def test_shared_and_too_few_prompts_are_refused_before_anything_is_made(backbone, judge, tmp_path):
    trained = Judge(backbone, judge.members, judge.dimensions, trained_on={"prompt_keys": [prompt_key("A cat  runs")]})
    with pytest.raises(PrismError, match=r'tuning prompts and those that the judge was trained on share 1 .*"a cat'):
        run(backbone, trained, tmp_path / "out")
    with pytest.raises(PrismError, match="Tuning and test share 1 prompt"):
        run(backbone, judge, tmp_path / "out", test=[*TEST, PROMPTS[0].upper()])
    outer = Outer("dark", dark, {prompt_key(TEST[0])})
    with pytest.raises(PrismError, match="test prompts and those that the outer judge, dark, was trained on share"):
        run(backbone, judge, tmp_path / "out", outer=outer)
    with pytest.raises(PrismError, match="There are 3 tuning prompts, and at least 4"):
        run(backbone, judge, tmp_path / "out", prompts=PROMPTS[:3])
    with pytest.raises(PrismError, match="The judge has the dimensions VQ"):
        run(backbone, judge, tmp_path / "out", dimension="charm")
    with pytest.raises(PrismError, match="recipe must be one of pairs, winners, weighted"):
        ImproveConfig(recipe="luck")
    assert not (tmp_path / "out").exists()


def tables(outer, inner):
    """Measures of 20 prompts with two videos each, from gains per round of the outer judge and of the judge."""
    rng, groups = np.random.default_rng(0), [Group(str(n), (f"{n}a", f"{n}b")) for n in range(20)]
    base = {video: float(rng.normal()) for group in groups for video in group.videos}
    return groups, [
        {
            name: {video: value + gain + 0.05 * float(rng.normal()) for video, value in base.items()}
            for name, gain in (("outer", out), ("judge", own))
        }
        for out, own in zip((0, *outer), (0, *inner))
    ]


def test_it_stops_where_the_outer_judge_falls_or_is_left_behind():
    groups, made = tables((0.3,), (0.5,))
    assert measuring.stop_sentence(1, groups, made, 0) is None
    groups, made = tables((-0.3,), (0.5,))
    assert "outer judge fell" in measuring.stop_sentence(1, groups, made, 0)
    groups, made = tables((0.3, 0.4), (0.5, 1.5))
    assert "ran ahead" in measuring.stop_sentence(2, groups, made, 0)
    groups, made = tables((0.3, 0.6), (0.5, 0.8))
    assert measuring.stop_sentence(2, groups, made, 0) is None
    assert measuring.stop_sentence(2, groups, [{"judge": each["judge"]} for each in made], 0) is None


def test_it_stops_where_small_steps_add_up():
    """Each round differs from the one before by less than its interval, and from the first by more."""
    drift = 0.015
    groups, made = tables((0.3,) * 6, tuple(0.5 + drift * step for step in range(6)))
    assert [measuring.stop_sentence(2, groups, [made[0], *made[k : k + 2]], 0) for k in range(1, 5)] == [None] * 4
    sentences = [measuring.stop_sentence(number, groups, made[: number + 1], 0) for number in range(1, 7)]
    assert "standard deviations more than in round 1 (" in next(each for each in sentences if each)
    groups, made = tables(tuple(0.3 - drift * step for step in range(6)), (0.5,) * 6)
    said = next(filter(None, (measuring.stop_sentence(n, groups, made[: n + 1], 0) for n in range(1, 7))))
    assert "the outer judge fell by" in said
    assert "against round 1 (" in said


def test_a_score_that_is_not_finite_leaves_its_prompt_out_everywhere():
    groups, (before, after) = tables((0.3,), (0.5,))
    bad = [{name: {**values, "3a": np.nan} for name, values in table.items()} for table in (before, after)]
    fewer = [group for group in groups if group.prompt != "3"]
    for first, second in ((bad[0], after), (before, bad[1])):
        assert [r["gain"] for r in measuring.gains(groups, first, second, 0)] == [
            r["gain"] for r in measuring.gains(fewer, before, after, 0)
        ]
        row = measuring.against(groups, first["outer"], second["outer"], 0)
        assert row == measuring.against(fewer, before["outer"], after["outer"], 0)
        assert (row["prompts"], np.isfinite(row["difference_ci95"]).all()) == (19, True)
        falls = measuring.stop_sentence(1, groups, [second, first], 0)  # turned round, so that the outer judge falls
        assert falls == measuring.stop_sentence(1, fewer, [after, before], 0) is not None
    assert measuring.best_of(groups, bad[0], "outer", 2, 0) == measuring.best_of(fewer, before, "outer", 2, 0)
    none = {"outer": dict.fromkeys(before["outer"], np.nan)}
    assert measuring.gains(groups, none, none, 0)[0]["gain"] is None
    assert measuring.against(groups, none["outer"], after["outer"], 0)["prompts"] == 0


def test_a_run_that_stops_keeps_the_round_before(two, backbone, judge, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(two[0].folder, folder)

    def stops(number, *rest):
        return "Stopped." if number == 2 else None

    monkeypatch.setattr(rounds.measuring, "stop_sentence", stops)
    result = run(backbone, judge, folder, resume=True)
    assert (result.kept, result.stopped) == (1, "Stopped.")
    assert result.final_round == result.rounds[0]
    assert rounds.Improvement(folder, rounds=result.rounds).final_round is None  # none was kept
    assert files.sha256(result.lora / FILE) == files.sha256(folder / "judge/round-1/lora" / FILE)


def test_heads_on_the_original_and_on_the_tuned_backbone_are_compared(two, backbone, judge, tmp_path):
    def collected(name, texts, split):
        prompts = [Prompt(text, Place("", row), split) for row, text in enumerate(texts)]
        rewards = [Reward(lambda video: dict.fromkeys(("VQ", "MQ", "TA"), float(video.mean())), "light")]
        return collect(prompts, backbone, CALL, tmp_path / name, rewards, candidates=2, progress=False, reports=False)

    stores = collected("train", PROMPTS[:2], "train"), collected("test", TEST, "test")
    lora, settings = two[0].folder / "judge/round-2/lora", {"rank": 2}
    config = TrainConfig(steps=2, prompts_per_step=2)
    before = judge.backbone.fingerprint()
    rows = retrained(judge, *stores, lora, settings, config, 2, (500.0,), progress=False)
    assert {row["judge"] for row in rows["accuracy"]} == {
        "original backbone", "tuned backbone", "the judge that chose"
    }  # fmt: skip
    compared = rows["comparison"]
    assert [(row["pairs"], row["t"]) for row in compared] == [(2, 500.0)] * 4
    assert [row["dimension"] for row in compared] == ["VQ", "MQ", "TA", "overall"]
    assert judge.backbone.fingerprint() == before


def test_best_of_n_averages_over_all_sets():
    groups = [Group("a", ("0", "1", "2"))]
    table = {"judge": {"0": 1.0, "1": 3.0, "2": 2.0}, "light": {"0": 10.0, "1": 20.0, "2": 60.0}}
    row = measuring.best_of(groups, table, "light", 2, 0)
    assert row["mean"] == pytest.approx((20 + 60 + 20) / 3)  # of {0, 1}, {0, 2}, {1, 2}
    assert row["gain"] == pytest.approx(100 / 3 - 30)
    assert measuring.diversity(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(np.sqrt(12.5))
