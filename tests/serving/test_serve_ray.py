"""The service by Ray Serve answers as that of one process does, where a process is lost too, and stops as gently."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.serving import judges
from tests.serving.clients import V1, ask
from tests.serving.conftest import BATCHING, LIMITS
from tests.serving.test_serve_hostile import (  # noqa: F401
    CLIPS,
    LATENTS,
    WHOLE,
    test_a_client_that_leaves_is_forgotten,
    test_bodies_that_are_too_large,
)
from tests.serving.test_serve_protocols import (  # noqa: F401
    test_flow_factory_scores_a_picture_by_a_judge_of_its_path,
    test_flow_factory_scores_videos,
    test_latents_of_another_precision_are_scored_as_they_are,
    test_many_at_once_get_their_own_scores,
    test_unirl_is_told_which_of_several_videos_cannot_be_read,
    test_unirl_scores_a_picture,
    test_unirl_scores_each_video_by_each_judge,
    test_verl_omni_of_a_picture_with_embeddings,
    test_videos_have_rank_5_and_rows_of_their_own,
    test_what_is_served_is_said,
)

from prism.errors import PrismError
from prism.serving.cluster import Cluster
from prism.training.actors import connected

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")


@pytest.fixture(scope="module")
def ray():
    """One cluster for all tests, whose processes can import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        ray, started = connected("local", 4)
    assert started
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def running(ray):
    loads = {name: partial(judges.one, name) for name in ("prism", "second", "picture")}
    cluster = Cluster(loads, port=0, limits=LIMITS, batching=BATCHING)
    cluster.start()
    yield cluster
    cluster.stop()


def processes(name):
    """The processes of a deployment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:prism:" + name.encode()):
            yield int(folder.name)


def test_hostile_bodies_are_refused_with_the_sentence_of_the_judges_process(running):
    for case in ("pickle", "cut in the numbers", "rank 4", "NaN", "overflow", "an empty prompt"):
        status, answer = ask(f"{running.url}/v1/score", "POST", LATENTS[case][0], V1)
        assert status in (400, 422)
        assert LATENTS[case][1] in answer["detail"]
    for case in ("pickle", "nested", "no video", "an image for a text model", "too few frames"):
        path, body, sentence = CLIPS[case]
        status, answer = ask(running.url + path, "POST", body if isinstance(body, bytes) else json.dumps(body))
        assert status in (400, 422)
        assert sentence in answer["detail"]


def test_rows_are_counted_by_judge(running):
    assert ask(f"{running.url}/judges/second/v1/score", "POST", WHOLE, V1)[0] == 200
    lines = dict(line.rsplit(" ", 1) for line in ask(f"{running.url}/metrics")[1].splitlines() if line[0] != "#")
    assert float(lines['prism_rows_total{judge="second"}']) >= 1
    assert float(lines['prism_requests_total{protocol="latents",status="200"}']) >= 1
    assert float(lines["prism_body_bytes"]) == 0


def test_another_service_on_the_same_cluster_is_refused(running):
    with pytest.raises(PrismError, match="runs on this cluster already"):
        Cluster({"prism": partial(judges.one, "prism")}, port=0).start()


def test_a_lost_process_is_replaced(running):
    (process,) = processes("judge-second")
    os.kill(process, signal.SIGKILL)
    deadline, statuses = time.monotonic() + 240, []
    while not statuses or statuses[-1] != 200:
        assert time.monotonic() < deadline
        statuses.append(ask(f"{running.url}/judges/second/v1/score", "POST", WHOLE, V1)[0])
        assert ask(f"{running.url}/judges/prism/v1/score", "POST", WHOLE, V1)[0] == 200
    assert set(statuses) <= {200, 503}
    assert process not in processes("judge-second")


def test_the_end_answers_what_was_taken_and_refuses_the_rest(running):
    address = urlsplit(running.url)
    head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\nx-drm-protocol-version: 1\r\ncontent-length: {len(WHOLE)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode() + WHOLE[:100])
        deadline = time.monotonic() + 60
        while "prism_body_bytes 0.0" in ask(f"{running.url}/metrics")[1]:  # until it is taken
            assert time.monotonic() < deadline
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        while ask(f"{running.url}/healthz")[0] != 503:
            assert time.monotonic() < deadline
        assert ask(f"{running.url}/v1/score", "POST", WHOLE, V1)[0] == 503
        connection.sendall(WHOLE[100:])
        assert b" 200 " in connection.recv(65536)
    stopping.join(120)
    assert not stopping.is_alive()


def test_a_judge_that_cannot_be_loaded_is_said(ray):
    cluster = Cluster({"prism": judges.none}, port=0)
    with pytest.raises(PrismError, match=r"^There is no such head\.$"):
        cluster.start()
    cluster.stop()
