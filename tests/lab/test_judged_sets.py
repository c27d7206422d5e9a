"""Videos that many backbones judge: equal parts of each, and graded renders of nobody's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from prism import shapeworld
from prism.backbone import Backbone
from prism.lab import judged_sets
from prism.lab.judged_sets import JudgedSets, Videos, _faults, assigned
from prism.lab.judging_power import Subject
from prism.runs import Parts
from prism.shapeworld import candidates, referee

STRENGTHS = (0.0, 1.0)


def test_every_backbone_is_in_as_many_prompts_with_changing_partners():
    pairs = assigned(12 * 11, 12)
    assert set(Counter(number for pair in pairs for number in pair).values()) == {22}
    assert set(Counter(frozenset(pair) for pair in pairs).values()) == {2}
    assert assigned(3, 1) == [(0, 0)] * 3


def sample(_backbone, _call, chunk, _trajectories):
    """Latents and scores that follow from the seed, in place of sampling and the referee."""
    scores = torch.tensor([seed % 97 / 97 for _, _, seed in chunk])
    part = {f"score/{name}": scores.clone() for name in referee.DIMENSIONS}
    return {**part, "latents": scores.view(-1, 1, 1, 1, 1).expand(-1, 48, 5, 4, 4).half().contiguous()}


def test_both_sets_hold_the_same_prompts_and_the_quality_is_that_of_the_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "sample", sample)
    monkeypatch.setattr(judged_sets, "STRENGTHS", STRENGTHS)
    backbone = Backbone(shapeworld.pipeline("small"))
    subjects = [Subject(name, lambda: backbone) for name in ("a/b", "c")]
    sets = JudgedSets(Parts(tmp_path), subjects, Videos(train=2, test=2))
    own, nobodys, quality = sets.own(), sets.nobodys(), sets.quality()
    prompts = {split: shapeworld.prompts(split, 2) for split in ("train", "test")}
    for store in (own, nobodys):
        for split, texts in prompts.items():
            videos = store.videos.filter(pc.equal(store.videos["split"], split))
            assert videos["prompt"].to_pylist() == [text for text in texts for _ in range(4 if store is own else 2)]
    assert Counter(own.videos["model"].to_pylist()) == {"a/b": 8, "c": 8}
    for name, values in quality.items():
        assert values.prompts == tuple(prompts["test"])
        rows = own.videos.filter(pc.and_(pc.equal(own.videos["model"], name), pc.equal(own.videos["split"], "test")))
        assert values.mean == pytest.approx(np.mean(rows["overall"].to_pylist()), abs=1e-6)

    faults = [_faults(text) for text in [*prompts["train"], *prompts["test"]]]
    assert all([strength for _, strength, _ in each] == list(STRENGTHS) for each in faults)
    assert all(len({seed for *_, seed in each}) == len(STRENGTHS) for each in faults)
    overall = np.array(nobodys.videos["overall"].to_pylist()).reshape(-1, len(STRENGTHS))
    assert overall[:, 0].mean() > overall[:, -1].mean()  # the faultless renders are better than the worst
    monkeypatch.setattr(candidates, "sample", None)  # nothing is made twice
    assert JudgedSets(Parts(tmp_path), subjects, Videos(train=2, test=2)).own().folder == own.folder
