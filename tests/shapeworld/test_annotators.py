"""Simulated annotators: votes against closed forms, majorities, labels that a store takes, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from prism import files
from prism.errors import PrismError
from prism.preference import LatentStore, pairs_from_scores, write_store
from prism.preference.pairs import label_matrix
from prism.shapeworld import annotators
from prism.shapeworld.annotators import NAMES, Annotator

MARGIN = dict.fromkeys(NAMES, 0.03)


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def table(difference: float, pairs: int = 20000) -> tuple[pa.Table, pa.Table]:
    """Two videos that differ by the same in every score, and many pairs of them."""
    videos = pa.table({"video": ["a", "b"], **{name: [0.5 + difference, 0.5] for name in NAMES}})
    row = {"prompt": "p", "video_a": "a", "video_b": "b", "split": "train"}
    return videos, pa.table({key: [value] * pairs for key, value in row.items()})


def random_store(folder, count: int = 36) -> LatentStore:
    chance = np.random.default_rng(0)
    videos = pa.table(
        {
            "video": [f"v{i}" for i in range(count)],
            "prompt": [f"prompt {i // 6}" for i in range(count)],
            "seed": list(range(count)),
            "split": ["train"] * count,
            **{name: chance.random(count) for name in NAMES},
        }
    )
    with files.new_folder(folder) as temporary:
        pairs = pairs_from_scores(videos, MARGIN)
        write_store(temporary, videos, torch.zeros(count, 2), pairs, {})
    return LatentStore.open(folder)


@pytest.mark.parametrize(("noise", "margin", "bias"), [(0.1, 0.0, 0.0), (0.05, 0.03, 0.0), (0.2, 0.1, -0.05)])
def test_votes_follow_the_normal_law(noise, margin, bias):
    who = Annotator(
        noise=dict.fromkeys(NAMES, noise), margin=dict.fromkeys(NAMES, margin), bias=dict.fromkeys(NAMES, bias)
    )
    for difference in (0.0, 0.04, -0.15):
        votes = annotators.vote(*table(difference), [who], seed=1)[0]
        spread, seen = math.sqrt(2) * noise, difference + bias
        worse, better = phi((-margin - seen) / spread), 1 - phi((margin - seen) / spread)
        for number, name in enumerate(NAMES):
            assert np.mean(votes[:, number] == -1) == pytest.approx(worse, abs=0.012)
            assert np.mean(votes[:, number] == 1) == pytest.approx(better, abs=0.012)
            law = who.probabilities(np.array([difference]), name)[0]
            assert law == pytest.approx([worse, 1 - worse - better, better], abs=1e-9)


def test_a_flip_is_as_likely_as_the_noise_says():
    who = Annotator(noise=dict.fromkeys(NAMES, 0.1), margin=dict.fromkeys(NAMES, 0.0))
    votes = annotators.vote(*table(0.1), [who], seed=0)
    assert np.mean(votes == -1) == pytest.approx(phi(-0.1 / (math.sqrt(2) * 0.1)), abs=0.006)


def test_lapses_are_votes_at_random():
    exact = Annotator(noise=dict.fromkeys(NAMES, 0.0), lapse=0.3)
    votes = annotators.vote(*table(0.2), [exact], seed=0)
    assert [np.mean(votes == side) for side in (-1, 0, 1)] == pytest.approx([0.1, 0.1, 0.8], abs=0.01)
    assert exact.probabilities(np.array([0.2]), "VQ")[0] == pytest.approx([0.1, 0.1, 0.8])


def test_two_alike_agree_as_often_as_the_squares_add_up_to():
    who = annotators.team(4, noise=0.08, lapse=0.1)
    videos, pairs = table(0.05)
    pairs = pairs.append_column("VQ", pa.array([1] * len(pairs), pa.int8()))
    for name in ("MQ", "TA"):
        pairs = pairs.append_column(name, pairs["VQ"])
    law = who[0].probabilities(np.array(0.05), "VQ")
    for found in annotators.agreement(annotators.vote(videos, pairs, who, seed=2), pairs).values():
        assert found["between"] == pytest.approx((law**2).sum(), abs=0.01)
        assert found["referee"] == pytest.approx(law[2], abs=0.01)
        assert found["flipped"] == pytest.approx(law[0], abs=0.01)
        assert found["ties"] == pytest.approx(law[1], abs=0.01)


def test_a_majority_needs_more_than_half():
    for votes in itertools.product((-1, 0, 1), repeat=4):
        wanted = next((side for side in (-1, 1) if votes.count(side) > 2), 0)
        assert annotators.majority(np.array(votes)[:, None])[0] == wanted


def test_a_majority_of_three_errs_less_by_the_binomial_law():
    who = Annotator(noise=dict.fromkeys(NAMES, 0.1), margin=dict.fromkeys(NAMES, 0.0))
    votes = annotators.vote(*table(0.05), [who] * 3, seed=3)
    one = phi(-0.05 / (math.sqrt(2) * 0.1))
    assert np.mean(annotators.majority(votes) == -1) == pytest.approx(one**3 + 3 * one**2 * (1 - one), abs=0.008)


def test_annotators_without_noise_are_the_referee(tmp_path):
    store = random_store(tmp_path / "store")
    assert annotators.label(store.videos, store.pairs, annotators.team(1, noise=0.0), seed=0).equals(store.pairs)


def test_a_store_takes_their_labels_in_place_of_its_own(tmp_path):
    store = random_store(tmp_path / "store")
    labels = annotators.label(store.videos, store.pairs, annotators.team(3, noise=0.2, lapse=0.1), seed=0)
    assert labels.schema == store.pairs.schema
    own = np.nan_to_num(label_matrix(labels, store.dimensions), nan=9)
    assert (own != np.nan_to_num(label_matrix(store.pairs, store.dimensions), nan=9)).mean() > 0.1
    noisy = copy.copy(store)
    noisy.pairs = labels
    assert noisy.dimensions == (*NAMES, "overall")
    assert sum(len(group.labels) for group in noisy.groups("train")) == len(store.pairs)
    with files.new_folder(tmp_path / "noisy") as temporary:
        write_store(temporary, store.videos, torch.zeros(len(store.videos), 2), labels, {})
    assert LatentStore.open(tmp_path / "noisy").pairs.equals(labels)


def test_another_annotator_changes_no_ones_votes(tmp_path):
    store = random_store(tmp_path / "store")
    few, more = (annotators.vote(store.videos, store.pairs, annotators.team(n, noise=0.1), 5) for n in (2, 3))
    assert np.array_equal(few, more[:2])
    assert not np.array_equal(more[0], more[1])


def test_bad_input_is_named():
    with pytest.raises(PrismError, match="TA"):
        Annotator(noise={"VQ": 0.1, "MQ": 0.1})
    with pytest.raises(PrismError, match="margin must be 0 or more"):
        Annotator(margin=dict.fromkeys(NAMES, -0.1))
    with pytest.raises(PrismError, match="noise must be 0 or more"):
        Annotator(noise=dict.fromkeys(NAMES, math.nan))
    with pytest.raises(PrismError, match="lapse"):
        Annotator(lapse=2.0)
    videos, pairs = table(0.1, pairs=2)
    with pytest.raises(PrismError, match="no annotators"):
        annotators.label(videos, pairs, [], seed=0)
    with pytest.raises(PrismError, match="'b' that has no scores"):
        annotators.label(videos.slice(0, 1), pairs, annotators.team(1, 0.1), seed=0)
