"""What a training sample is made of: finished latents or predicted ones with new noise, recorded states, mixtures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.preference import LatentStore
from prism.training import TrainConfig
from prism.training.batches import Batches

CONFIG = TrainConfig(steps=1, prompts_per_step=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return stores.make_kinds(tmp_path_factory.mktemp("sources") / "store")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


def drawn(store: LatentStore, backbone: Backbone, steps: int, **changes: Any) -> list[Any]:
    batches = Batches(store, store.groups("train"), backbone, dataclasses.replace(CONFIG, **changes))
    return [(batches.groups[batch.prompts[0]].videos, batch) for batch in (batches.draw(s, [0]) for s in range(steps))]


def states_of(store: LatentStore, videos: Any, batch: Any, kind: str) -> set[int]:
    """The recorded states whose tensors the batch is made of, to rounding."""
    matching = []
    for state in range(len(stores.LEVELS)):
        read = store.predicted if kind == "predicted" else store.trajectory
        kept = [read([video], state)[0][0] for video in videos]
        if all(torch.allclose(a, b, atol=0.01) for a, b in zip(kept, batch.latents, strict=True)):
            matching.append(state)
    return set(matching)


def test_predicted_latents_are_noised_to_a_level_of_their_own(store, backbone):
    """Near t = 0 there is hardly any noise: what is left is what the denoiser predicted at one recorded state."""
    states = set()
    for videos, batch in drawn(store, backbone, 20, source="predicted", t_high=1e-3):
        found = states_of(store, videos, batch, "predicted")
        assert len(found) == 1
        states |= found
        assert float(batch.t.max()) <= 1e-3
    assert states == {0, 1, 2}
    levels = [float(batch.t[0]) for _, batch in drawn(store, backbone, 20, source="predicted")]
    assert len(set(levels)) == 20
    videos, batch = drawn(store, backbone, 1, source="predicted")[0]
    sigma, spread = float(batch.t[0]) / 1000, []
    for state in range(3):
        clean = [store.predicted([video], state)[0][0] for video in videos]
        noise = [(row - (1 - sigma) * each) / sigma for row, each in zip(batch.latents, clean, strict=True)]
        spread.append(abs(float(torch.cat([each.flatten() for each in noise]).std()) - 1))
    assert min(spread) < 0.1  # Eq. 1


def test_a_mixture_has_its_shares(store, backbone):
    mixed = drawn(store, backbone, 200, source="predicted=1,recorded=2,renoised=1", t_high=1000)
    recorded = [float(batch.t[0]) in stores.LEVELS for _, batch in mixed]
    assert np.mean(recorded) == pytest.approx(0.5, abs=4 * 0.5 / 200**0.5)
    for videos, batch in [each for each, is_recorded in zip(mixed, recorded) if is_recorded][:5]:
        assert states_of(store, videos, batch, "recorded") == {stores.LEVELS.index(float(batch.t[0]))}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"source": "trajectory"}, {"source": "recorded"}),
        ({"source": "mixed", "trajectory_share": 0.3}, {"source": "recorded=0.3,renoised=0.7"}),
        ({"source": "renoised"}, {"source": "renoised=5"}),
    ],
)
def test_older_names_are_the_same_to_the_bit(store, backbone, older, newer):
    for (_, one), (_, other) in zip(drawn(store, backbone, 12, **older), drawn(store, backbone, 12, **newer)):
        assert torch.equal(one.t, other.t)
        assert all(torch.equal(a, b) for a, b in zip(one.latents, other.latents, strict=True))


@pytest.mark.parametrize(
    "text", ["", "predicted=", "predicted=0,renoised=1", "renoised=-1", "renoised=nan", "renoised=1,renoised=1", "x=1"]
)
def test_a_mixture_that_is_none_is_refused(text):
    with pytest.raises(PrismError, match="source must be one of recorded, predicted, renoised, or a mixture such as"):
        TrainConfig(source=text)


def test_what_the_store_does_not_hold_is_named(backbone, tmp_path):
    store = stores.make(tmp_path / "store")
    for source in ("predicted", "renoised=1,predicted=1"):
        with pytest.raises(PrismError, match="needs the denoiser's predicted clean latents, and"):
            drawn(store, backbone, 1, source=source)
