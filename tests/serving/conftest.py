"""A service of three judges on one tiny pipeline, which listens in a thread."""

from __future__ import annotations

import warnings

import pytest
from tests import tiny

from prism import Judge
from prism.backbone import Backbone
from prism.rewards.scorer import Scorer
from prism.rewards.worker import Batching
from prism.serving.process import Running, bind
from prism.serving.server import Limits
from prism.serving.service import Service

LIMITS = Limits(body=2**20, bodies=8 * 2**20, elements=20_000, body_seconds=30.0)


@pytest.fixture(scope="session")
def scorers():
    """Judges of videos, and one of pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = Backbone(tiny.wan())
        first, second = (Judge.untrained(backbone, seed=seed) for seed in (0, 1))
        return {
            "prism": Scorer(first, tiny.CALL_WAN, levels=(699, 499), draws=None),
            "second": Scorer(second, tiny.CALL_WAN, dimension="VQ", levels=(499,), draws=2),
            "picture": Scorer(first, {**tiny.CALL_WAN, "num_frames": 1}, levels=(499,)),
        }


@pytest.fixture(scope="session")
def running(scorers):
    service = Service(scorers, batching=Batching(max_batch=8, max_wait=0.02))
    listening = Running(service, bind(port=0), limits=LIMITS)
    listening.start()
    yield listening
    listening.stop(60)
