"""Heads of one recipe on several backbones, the refutation test, and what is taken off to see a bonus of one's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests import stores, tiny

from prism import files
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import measure
from prism.lab import controls, judging_power, refutation
from prism.lab.bench import SCALES, Bench
from prism.lab.correlation import Published
from prism.lab.correlation_study import drawn, study
from prism.lab.experiments import judging
from prism.lab.judging_power import HeadRecipe, HeadsOnBackbones, Subject, bonus_of_own, power, right_of
from prism.report.figures import as_svg
from prism.runs import Parts
from prism.training import TrainConfig

RECIPE = HeadRecipe(
    seeds=2, dim=16, levels=(600, 0), train=TrainConfig(steps=3, prompts_per_step=2, checkpoint_every=0)
)


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    backbone = Backbone(tiny.wan())
    return Subject("org/tiny", lambda: backbone, 1000.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("store") / "store", (4, 2, 12))


def test_a_killed_study_goes_on_and_measures_what_the_evaluator_does(tmp_path, subject, store, monkeypatch):
    other = controls.untrained(subject)
    bench = HeadsOnBackbones(Parts(tmp_path), {"set": store}, recipe=RECIPE)
    train = judging_power.train_together
    with monkeypatch.context() as killed:
        trained = []

        def once(*arguments, **options):
            trained.append(1)
            if len(trained) == 2:
                raise KeyboardInterrupt
            return train(*arguments, **options)

        killed.setattr(judging_power, "train_together", once)
        with pytest.raises(KeyboardInterrupt):
            bench.measured([subject, other])
    measured = bench.measured([subject, other])["set"]
    monkeypatch.setattr(judging_power, "train_together", None)  # nothing is made twice
    again = HeadsOnBackbones(Parts(tmp_path), {"set": store}, recipe=RECIPE).measured([subject, other])["set"]
    for name in ("org/tiny", "random weights"):
        for one, two in zip(measured[name], again[name], strict=True):
            assert one.pairs.equals(two.pairs)
    judges = bench.judges("set", "org/tiny", subject.load())
    assert judges[0].tap == 2  # two thirds of three blocks
    rows = [row for judge in judges for row in measure(judge, store, "test", RECIPE.levels).rows]
    expected = np.mean([row["without_ties"] for row in rows if row["dimension"] == "overall"])
    right, prompts, _, levels = right_of(measured["org/tiny"], "overall")
    assert levels == [600, 0]
    assert power(right, prompts).mean == pytest.approx(expected)

    quality = {"org/tiny": Published(0.6, 0.01), "random weights": Published(0.1)}
    found = study(Parts(tmp_path), [subject, other], {"set": store}, quality, RECIPE)
    assert found.verdict == "cannot be told"
    assert found.tables["correlation-backbones"][0]["power"] == pytest.approx(expected)
    drawings = drawn(found.tables)
    assert [each.name for each in drawings] == ["correlation-set"]  # two backbones have no coefficient
    with pytest.raises(PrismError, match="backbone random weights has no generative quality; give its scores"):
        study(Parts(tmp_path), [subject, other], {"set": store}, {"org/tiny": Published(0.6)}, RECIPE)
    with pytest.raises(PrismError, match="org/tiny is named 2 times"):
        bench.measured([subject, subject])


def test_backbones_of_another_vae_are_refused(tmp_path, subject, store):
    def load():
        pipe = tiny.wan()
        for weight in pipe.vae.parameters():
            weight.data += 0.1
        return Backbone(pipe)

    bench = HeadsOnBackbones(Parts(tmp_path), {"set": store}, recipe=RECIPE)
    with pytest.raises(PrismError, match="VAE of other has other weights than that of org/tiny; backbones are"):
        bench._checked(Subject("other", load), subject)
    assert not list(tmp_path.rglob("*.parquet"))


def test_controls_lose_what_was_trained_and_nothing_else(subject, store):
    base = subject.load()
    weights = dict(base.denoiser.named_parameters())
    random, mixed = (each(subject).load() for each in (controls.untrained, controls.shuffled))
    name = "blocks.0.attn1.to_q.weight"
    assert random.pipe.vae is base.pipe.vae
    for other in (random, mixed):
        assert other.widths == base.widths
        assert not torch.equal(dict(other.denoiser.named_parameters())[name], weights[name])
    for name, value in mixed.denoiser.named_parameters():
        assert torch.equal(value.flatten().sort()[0], weights[name].flatten().sort()[0])
    assert torch.equal(  # the same seed draws the same weights
        dict(random.denoiser.named_parameters())[name],
        dict(controls.untrained(subject).load().denoiser.named_parameters())[name],
    )
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = controls.statistics(latents)
    assert rows.shape == (2, 16 * 5 + 16 * 3)
    np.testing.assert_allclose(rows[1, 3], latents[1, 3].mean(), atol=1e-6)
    np.testing.assert_allclose(rows[1, 16 + 3], np.log(latents[1, 3].numpy().var()), rtol=1e-4)
    steps = latents[1, 3, 1:] - latents[1, 3, :-1]
    np.testing.assert_allclose(rows[1, 32 + 3], steps.square().mean().log(), rtol=1e-4)
    tokens = controls.Statistics(base, store).tokens(latents, None, 500.0, 2)
    assert tokens.visual.shape == (2, 1, rows.shape[1])
    assert tokens.text is None  # no prompt
    with pytest.raises(PrismError, match="Statistics need latents"):
        controls.statistics(latents[0])


def test_the_refutation_test_compares_with_every_control(tmp_path, subject, store):
    scale = replace(SCALES["quick"], seeds=2, train=RECIPE.train, dim=16, levels=(600, 0))
    bench = Bench(Parts(tmp_path), scale, subject.load(), tiny.CALL_WAN, store, tap=2)
    found = judging.refute(bench)
    rows = found.tables["refutation"]
    names = ["trained", "random weights", "shuffled weights", "statistics"]
    assert [row["backbone"] for row in rows if row["t"] is None] == names
    whole, random = (next(row for row in rows if row["backbone"] == name and row["t"] == 600) for name in names[:2])
    assert random["difference"] == pytest.approx(whole["accuracy"] - random["accuracy"])
    assert random["difference_ci95"][0] <= random["difference"] <= random["difference_ci95"][1]
    assert "Best-of-N by early states was left out: The store" in found.text  # it names no steps
    with pytest.raises(PrismError, match="One backbone cannot correlate"):
        judging.correlate(bench)

    # Planted scores: the referee's own pick the best, and its opposite the worst. One control is scored in earnest.
    played = stores.make(tmp_path / "played", (0, 0, 24), meta={"key": {"states": [2, 4, 6]}})
    values = np.array([played.videos[name].to_pylist() for name in ("VQ", "MQ")]).sum(0).reshape(24, 4)
    values = values[4:]  # heads were trained on the first four prompts
    for name, sign in zip(names[:3], (1, -1, 1)):
        planted = torch.tensor(sign * values).expand(2, 3, 20, 4).contiguous()
        (tmp_path / "early").mkdir(exist_ok=True)
        path = tmp_path / f"early/{judging_power.file_name(name)}.safetensors"
        save_file({"scores": planted, "steps": torch.tensor([2, 4, 6])}, path)
    trained = replace(subject, name="trained")
    found = refutation.refute(Parts(tmp_path), trained, store, played, judging._recipe(bench))
    rows = found.tables["refutation-early"]
    assert [row["share_of_oracle"] for row in rows[:3]] == pytest.approx([1, 1, 1])
    worst = (values.min(1) - values.mean(1)).sum() / (values.max(1) - values.mean(1)).sum()
    assert rows[3]["share_of_oracle"] == pytest.approx(worst)
    assert rows[3]["difference"] == pytest.approx(1 - worst)
    heads = HeadsOnBackbones(Parts(tmp_path), {refutation.SET: store}, recipe=judging._recipe(bench))
    backbone = controls.statistics_of(trained, store).load()
    states, t = played.trajectory([f"video-{row:03d}" for row in range(16, 20)], 1)
    judge = heads.judges(refutation.SET, "statistics", backbone)[1]
    expected = judge.score(states, [stores.PROMPTS[4]] * 4, float(t[0]), **tiny.CALL_WAN)[:, 2]
    scored = files.load_safetensors(tmp_path / "early/statistics.safetensors")["scores"]
    np.testing.assert_allclose(scored[1, 1, 0], expected, atol=1e-5)
    assert judge.dimensions[2] == "overall"
    drawings = refutation.drawn(found.tables)
    assert [each.name for each in drawings] == ["refutation", "refutation-early"]
    assert all("shuffled weights" in as_svg(each.figure, each.caption) for each in drawings)


def row_of(name, accuracy, low, difference=None, difference_low=None, t=None):
    ends = None if difference is None else [difference_low, difference + 0.1]
    high = 2 * accuracy - low
    return {"backbone": name, "t": t, "accuracy": accuracy, "accuracy_ci95": [low, high], "difference": difference,
            "difference_ci95": ends, "prompts": 99}  # fmt: skip


@pytest.mark.parametrize(
    ("random", "word"),
    [
        ((0.51, 0.48, 0.2, 0.1), "holds"),
        ((0.53, 0.49, 0.2, 0.1), "holds in part"),  # up to seven points above chance
        ((0.6, 0.55, 0.1, 0.05), "holds in part"),
        ((0.7, 0.6, -0.08, -0.1), "does not hold"),  # at most two points lower
        ((0.7, 0.6, 0.01, -0.02), "cannot be told"),
    ],
)
def test_the_verdict_follows_the_intervals(random, word):
    rows = [row_of("mine", 0.71, 0.7), row_of("random weights", *random), row_of("statistics", 0.6, 0.55, 0.1, 0.05)]
    assert refutation.judge_of(rows, [], "mine").word == word
    early = [
        {"backbone": name, "step": 4, "share_of_oracle": 0.3, "share_of_oracle_ci95": None, "difference_ci95": ends}
        for name, ends in (("mine", None), ("random weights", [0.1, 0.3]), ("statistics", [-0.1, 0.3]))
    ]
    assert refutation.judge_of(rows, early, "mine").word == ("holds in part" if word == "holds" else word)
    early[2]["difference_ci95"] = [0.01, 0.3]
    assert refutation.judge_of(rows, early, "mine").word == word
    at_chance = [row_of("mine", 0.51, 0.49), *rows[1:]]
    assert "at chance itself; train it longer" in refutation.judge_of(at_chance, [], "mine").sentence
    clean = [*rows, row_of("random weights", 0.58, 0.53, 0.04, -0.02, t=0)]
    answer = refutation.judge_of(clean, [], "mine")
    assert answer.word == ("holds in part" if word == "holds" else word)
    assert ("from the trained one, are random weights at t = 0" in answer.sentence) == (answer.word == "holds in part")
    rows[1]["difference_ci95"] = None
    assert refutation.judge_of(rows, [], "mine").word == "cannot be told"


def test_a_bonus_of_ones_own_is_told_from_judging_well_and_from_easy_pairs():
    chance = np.random.default_rng(0)
    names, count = ["a", "b", "c", "d"], 4000
    generators = [tuple([name] * 2) for name in chance.choice(names, count, p=[0.4, 0.3, 0.2, 0.1])]
    generators += [("a", "b")] * 50
    prompts = np.arange(count + 50) % 500
    skill, ease = {"a": 0.0, "b": 0.1, "c": 0.2, "d": 0.3}, {"a": 0.1, "b": 0.0, "c": 0.05, "d": -0.1}

    def judged(bonus):
        return {
            name: np.stack([
                chance.random((1, count + 50))
                < [0.5 + skill[name] + ease[g] + bonus * (g == h == name) for g, h in generators]
                for _ in range(2)
            ]).astype(float)
            for name in names
        }  # fmt: skip

    nothing, something = (bonus_of_own(judged(each), prompts, generators) for each in (0.0, 0.1))
    assert nothing["bonus_ci95"][0] < 0 < nothing["bonus_ci95"][1]
    assert something["bonus_ci95"][0] < 0.1 < something["bonus_ci95"][1]
    assert something["bonus_ci95"][0] > 0
    assert something["pairs"] == count
    assert bonus_of_own(judged(0.0), prompts, [("x", "y")] * (count + 50))["bonus"] is None


def test_names_with_slashes_become_files():
    assert judging_power.file_name("6x4-500") == "6x4-500"
    assert judging_power.file_name("a/b") != judging_power.file_name("a-b") != judging_power.file_name("../b")
    assert "/" not in judging_power.file_name("../a/b")
    assert replace(RECIPE, depth=None).tap(Backbone(tiny.wan())) == 1
