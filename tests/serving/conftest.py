"""A service of three judges on one tiny pipeline, which listens in a thread."""

from __future__ import annotations

import pytest
from tests.serving import judges

from prism.rewards.worker import Batching
from prism.serving.process import Running, bind
from prism.serving.server import Limits
from prism.serving.service import Service

LIMITS = Limits(body=2**20, bodies=8 * 2**20, elements=20_000, body_seconds=30.0)
BATCHING = Batching(max_batch=8, max_wait=0.02)


@pytest.fixture(scope="session")
def scorers():
    return judges.scorers()


@pytest.fixture(scope="session")
def running(scorers):
    service = Service(scorers, batching=BATCHING)
    listening = Running(service, bind(port=0), limits=LIMITS)
    listening.start()
    yield listening
    listening.stop(60)
