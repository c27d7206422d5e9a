"""Judges for the tests of the service, made alike in every process."""

from __future__ import annotations

import warnings

from tests import tiny

from prism import Judge
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.rewards.scorer import Scorer


def scorers():
    """Judges of videos, and one of pictures, on one tiny pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = Backbone(tiny.wan())
        first, second = (Judge.untrained(backbone, seed=seed) for seed in (0, 1))
        return {
            "prism": Scorer(first, tiny.CALL_WAN, levels=(699, 499), draws=None),
            "second": Scorer(second, tiny.CALL_WAN, dimension="VQ", levels=(499,), draws=2),
            "picture": Scorer(first, {**tiny.CALL_WAN, "num_frames": 1}, levels=(499,)),
        }


def one(name):
    """What a process of a cluster loads."""
    return {name: scorers()[name]}, {}


def none():
    raise PrismError("There is no such head.")
