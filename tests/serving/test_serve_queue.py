"""The queue: batches of what goes together, limits, failures that stay alone, a stop that loses nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from tests.serving.clients import V1, ask, latent_body

from prism.errors import PrismError
from prism.rewards.scorer import Scorer
from prism.rewards.worker import Batching, Overloaded, Stopped, Worker
from prism.serving.process import Running, bind
from prism.serving.service import Service


class Doubling:
    """Doubles numbers, and keeps its batches; 13 cannot be doubled. Works once `go` is set."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, values):
        assert self.go.wait(60)
        self.batches.append(list(values))
        if 13 in values:
            raise PrismError("13 cannot be doubled.")
        return [2 * value for value in values]


@pytest.fixture
def doubling():
    return Doubling()


def held_worker(doubling, **settings):
    """A worker that is busy with 0 until `doubling.go` is set."""
    worker = Worker(Batching(**{"max_wait": 0, **settings}))
    doubling.go.clear()
    worker.submit("busy", [0], doubling)
    deadline = time.monotonic() + 60
    while len(worker):
        assert time.monotonic() < deadline
    return worker


def test_what_goes_together_is_scored_together_and_in_order(doubling):
    worker = held_worker(doubling, max_batch=3)
    futures = [worker.submit(key, [value], doubling)[0] for value, key in enumerate("aababaaa")]
    doubling.go.set()
    assert [future.result(60) for future in futures] == [2 * value for value in range(8)]
    assert doubling.batches == [[0], [0, 1, 3], [2, 4], [5, 6, 7]]
    assert worker.close(60)


def test_a_batch_waits_for_others_but_not_for_ever(doubling):
    worker = Worker(Batching(max_batch=4, max_wait=0.2))
    futures = [worker.submit("a", [value], doubling)[0] for value in range(3)]
    assert [future.result(60) for future in futures] == [0, 2, 4]
    assert doubling.batches == [[0, 1, 2]]
    worker.close()


def test_one_that_fails_fails_alone(doubling):
    worker = Worker(Batching(max_wait=0.05))
    futures = worker.submit("a", [12, 13, 14], doubling)
    assert (futures[0].result(60), futures[2].result(60)) == (24, 28)
    with pytest.raises(PrismError, match="13 cannot be doubled"):
        futures[1].result(60)
    assert worker.submit("a", [1], doubling)[0].result(60) == 2
    worker.close()


def test_too_much_is_refused_whole_and_what_waits_too_long_is_given_up(doubling):
    worker = held_worker(doubling)
    worker.batching = Batching(max_wait=0, max_queue=3, max_queue_seconds=0.05)
    late = worker.submit("a", [1, 2], doubling)
    with pytest.raises(Overloaded, match="holds 2 of at most 3 items, and 2 more"):
        worker.submit("a", [3, 4], doubling)
    gone = worker.submit("a", [5], doubling)[0]
    gone.cancel()
    time.sleep(0.1)
    doubling.go.set()
    for future in late:
        with pytest.raises(Overloaded, match=r"waited .* behind others' work"):
            future.result(60)
    with pytest.raises(CancelledError):
        gone.result(60)
    worker.close()
    assert doubling.batches == [[0]]


def test_the_end_finishes_what_was_taken_and_takes_no_more(doubling):
    worker = held_worker(doubling)
    futures = worker.submit("a", [1, 2], doubling)
    assert not worker.close(0.01)
    with pytest.raises(Stopped, match="takes no further work"):
        worker.submit("a", [3], doubling)
    doubling.go.set()
    assert [future.result(60) for future in futures] == [2, 4]
    assert worker.close(60)


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"max_wait": -1}, {"max_queue": 0}, {"max_queue_seconds": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(PrismError, match=next(iter(settings))):
        Batching(**settings)


class Slow(Scorer):
    """A scorer that waits until `go` is set."""

    go: threading.Event

    def __call__(self, rows):
        assert self.go.wait(60)
        return super().__call__(rows)


def test_a_service_that_is_stopped_answers_what_it_took_and_refuses_the_rest(scorers):
    slow = Slow(scorers["prism"].judge, scorers["prism"].call)
    slow.go = threading.Event()
    listening = Running(Service({"slow": slow}, batching=Batching(max_queue=1, max_wait=0)), bind(port=0))
    listening.start()
    body, answers = latent_body(torch.zeros(1, 16, 3, 4, 4)), []
    two = latent_body(torch.zeros(2, 16, 3, 4, 4))
    status, answer = ask(f"{listening.url}/v1/score", "POST", two, V1)
    assert (status, "ask for fewer at once" in answer["detail"]) == (503, True)
    thread = threading.Thread(target=lambda: answers.append(ask(f"{listening.url}/v1/score", "POST", body, V1)))
    thread.start()
    deadline = time.monotonic() + 60
    while 'prism_requests_total{protocol="latents",status="503"}' in (text := ask(f"{listening.url}/metrics")[1]):
        if "prism_body_bytes 0.0" not in text and 'prism_queue_rows{pipeline="pipeline-0"} 0.0' in text:
            break  # the body is there, and the worker has it
        assert time.monotonic() < deadline
    listening.service.stopping = True
    assert ask(f"{listening.url}/healthz")[0] == 503
    assert ask(f"{listening.url}/v1/score", "POST", body, V1)[0] == 503
    stopping = threading.Thread(target=listening.stop)
    stopping.start()
    slow.go.set()
    thread.join(60)
    stopping.join(60)
    assert not stopping.is_alive()
    assert answers[0][0] == 200
    with pytest.raises(ConnectionRefusedError):
        ask(f"{listening.url}/healthz")
