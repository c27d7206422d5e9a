"""Which pairs, levels and noise a step reads by each option, early stopping, and several heads on one read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.errors import PrismError
from prism.evaluation import evaluate
from prism.judge import Judge
from prism.training import TrainConfig, train, train_together
from prism.training.batches import Batches, training_groups
from prism.training.trainer import SHARED
from prism.training.validation import LEVELS

CONFIG = TrainConfig(steps=6, prompts_per_step=2, learning_rate=1e-3, log_every=3, checkpoint_every=0)
DIMENSIONS = ("VQ", "overall")


@pytest.fixture(scope="module")
def wan():
    return tiny.wan()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("options") / "store")


@pytest.fixture(scope="module")
def backbone(wan):
    return Judge.untrained(wan, dim=16).backbone


def weights(judge):
    return {name: value.clone() for name, value in judge.head.state_dict().items()}


def test_fewer_prompts_and_videos_are_parts_of_more(store):
    everything = {group.prompt: group for group in training_groups(store, DIMENSIONS, CONFIG)}
    chosen = []
    for count in (2, 4, 6):
        groups = training_groups(store, DIMENSIONS, dataclasses.replace(CONFIG, max_prompts=count, per_prompt=3))
        assert len(groups) == count
        chosen.append({group.prompt for group in groups})
        for group in groups:
            whole = everything[group.prompt]
            ids = [row["video"] for row in store.videos.to_pylist() if row["prompt"] == group.prompt]
            assert group.videos == tuple(ids[:3])
            kept = {
                (whole.videos[a], whole.videos[b]): labels
                for a, b, labels in zip(whole.first, whole.second, whole.labels)
                if whole.videos[a] in group.videos and whole.videos[b] in group.videos
            }
            assert len(group.labels) == len(kept) == 3
            for a, b, labels in zip(group.first, group.second, group.labels):
                np.testing.assert_array_equal(labels, kept[group.videos[a], group.videos[b]])
    assert chosen[0] < chosen[1] < chosen[2]


def levels_of(backbone, store, steps=200, **options):
    config = dataclasses.replace(CONFIG, prompts_per_step=1, per_prompt=2, **options)
    batches = Batches(store, training_groups(store, DIMENSIONS, config), backbone, config)
    return [batches.draw(step, [0]) for step in range(steps)]


def test_levels_have_the_density_that_was_asked_for(backbone, store):
    """Mean t over [200, 800]: the middle, or a third and two thirds of the way."""
    for name, mean in (("uniform", 500.0), ("clean", 400.0), ("noise", 600.0)):
        t = torch.stack([batch.t[0] for batch in levels_of(backbone, store, levels=name, t_low=200, t_high=800)])
        spread = 600 / 12**0.5 if name == "uniform" else 600 / 18**0.5
        assert float(t.mean()) == pytest.approx(mean, abs=4 * spread / 200**0.5)
        assert float(t.std()) == pytest.approx(spread, rel=0.15)


def test_a_mixture_has_the_share_that_was_asked_for(backbone, store):
    batches = levels_of(backbone, store, source="mixed", trajectory_share=0.25)
    share = np.mean([float(batch.t[0]) in stores.LEVELS for batch in batches])
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 200) ** 0.5)


def test_noise_draws_come_again_and_draws_per_step_do_not(backbone, store):
    fixed = levels_of(backbone, store, steps=30, noise_draws=2)
    seen = {}
    for batch in fixed:
        seen.setdefault(batch.prompts[0], []).append(float(batch.noisy_latents.sum()))
    assert all(len(set(sums)) == 2 and len(sums) == 5 for sums in seen.values())
    fresh = levels_of(backbone, store, steps=30)
    assert len({float(batch.noisy_latents.sum()) for batch in fresh}) == 30

    config = dataclasses.replace(CONFIG, draws_per_step=3)
    groups = training_groups(store, DIMENSIONS, config)
    batch = Batches(store, groups, backbone, config).draw(0, range(2))
    once = Batches(store, groups, backbone, CONFIG).draw(0, range(2))
    assert len(batch.t) == 3 * len(once.t)
    assert len(batch.t.unique()) == 6
    assert len(batch.labels) == 3 * len(once.labels)
    assert torch.equal(batch.noisy_latents[:4], once.noisy_latents[:4])  # the first draw is the one there was


def test_heads_trained_together_are_those_trained_apart(wan, store, tmp_path):
    """k heads on one read, of other seeds, sizes, taps and settings, to the bit."""
    shared = dataclasses.replace(CONFIG, source="mixed", per_prompt=3, max_rows=4)
    options = [
        ({"seed": 0, "tap": 2}, {}),
        ({"seed": 1, "tap": 2, "dim": 16}, {"steps": 4, "learning_rate": 3e-3, "schedule": "cosine"}),
        ({"seed": 2, "tap": 3, "aggregation": "mean"}, {"ema_decay": 0.8, "eta": 3.0, "label_smoothing": 0.1}),
        ({"seed": 3, "tap": 1, "mlp_layers": 2}, {"validate_every": 2, "keep_best": True, "weight_decay": 0.5}),
    ]

    def make():
        backbone = Judge.untrained(wan).backbone
        return [Judge.untrained(backbone, **{"dim": 32, "dimensions": DIMENSIONS, **head}) for head, _ in options]

    configs = [dataclasses.replace(shared, **changes) for _, changes in options]
    together, apart = make(), make()
    histories = train_together(store, together, configs, progress=False)
    for place, (judge, config) in enumerate(zip(apart, configs)):
        result = train(store, judge, config, tmp_path / str(place), progress=False)
        ours = weights(together[place])
        assert all(torch.equal(ours[name], value) for name, value in weights(judge).items())
        assert result["history"] == histories[place]
        assert together[place].trained_on == judge.trained_on
        assert together[place].eta == judge.eta == config.eta
        assert not together[place].head.training


def test_the_backbone_is_read_once_for_all_heads(wan, store):
    backbone = Judge.untrained(wan).backbone
    judges = [Judge.untrained(backbone, tap=tap, dim=16, dimensions=DIMENSIONS) for tap in (1, 2, 2)]
    ran = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, _o, number=number: ran.append(number))
        for number, block in enumerate(backbone.blocks, 1)
    ]
    train_together(store, judges, [dataclasses.replace(CONFIG, steps=2)] * 3, progress=False)
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2] * 2


def test_heads_that_read_other_batches_are_refused(wan, store):
    judges = [Judge.untrained(wan, dim=16, dimensions=DIMENSIONS)] * 2
    for name, value in (("seed", 1), ("per_prompt", 2), ("levels", "noise")):
        assert name in SHARED
        with pytest.raises(PrismError, match=f"found {name}"):
            train_together(store, judges, [CONFIG, dataclasses.replace(CONFIG, **{name: value})], progress=False)
    with pytest.raises(PrismError, match="one backbone"):
        other = Judge.untrained(wan, dim=16, dimensions=DIMENSIONS)
        train_together(store, [judges[0], other], [CONFIG] * 2, progress=False)


def test_validation_is_evaluation_and_the_best_head_is_kept(wan, store, tmp_path):
    config = dataclasses.replace(CONFIG, steps=6, learning_rate=3e-2, validate_every=1, keep_best=True)
    judge = Judge.untrained(wan, tap=2, dim=16, dimensions=DIMENSIONS)
    history = train(store, judge, config, tmp_path / "run", progress=False)["history"]
    validated = {entry["step"]: entry["validation"] for entry in history if "validation" in entry}
    assert list(validated) == [1, 2, 3, 4, 5, 6]
    rows = evaluate(judge, store, "validation", LEVELS, progress=False)
    found = {d: np.mean([row["without_ties"] for row in rows if row["dimension"] == d]) for d in DIMENSIONS}
    best = max(validated.values(), key=lambda entry: sum(entry.values()))
    assert found == pytest.approx(best)
    assert sum(best.values()) > sum(validated[6].values())  # so that keeping it is seen
    without = stores.make(tmp_path / "store", prompts=(2, 0, 1))
    with pytest.raises(PrismError, match="no validation pairs"):
        train(without, judge, config, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()
