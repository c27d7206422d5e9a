"""Judges by name, each with the queue of its pipeline, and what is counted of their work."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prism.errors import PrismError, quoted
from prism.rewards.scorer import Row, Scorer
from prism.rewards.worker import Batching, Worker
from prism.serving import clips, tensors

PROTOCOLS = ("latents", "unirl", "flow-factory")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def missing_extra() -> PrismError:
    """The error for a service whose libraries are not installed."""
    return PrismError(
        'A reward service needs fastapi, uvicorn and prometheus-client, and one is not installed; pip install "prism-'
        'video[serve]".'
    )


def check_name(name: str) -> None:
    """Raise PrismError for a judge's name that cannot be part of an address."""
    if not name or not all(char.isalnum() or char in "-_." for char in name):
        raise PrismError(
            f"A judge's name is part of an address: letters, digits, - _ and . are allowed; found {quoted(name, 60)}."
        )


class Metrics:
    """Counts and times for Prometheus, in a registry of their own."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise missing_extra() from error
        self.registry = registry = prometheus.CollectorRegistry()
        self._render = prometheus.generate_latest
        self.content_type = prometheus.CONTENT_TYPE_LATEST
        self.requests = prometheus.Counter(
            "prism_requests", "Requests, by protocol and status", ("protocol", "status"), registry=registry
        )
        self.seconds = prometheus.Histogram(
            "prism_request_seconds",
            "Seconds from a request's headers to its answer",
            ("protocol",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.rows = prometheus.Counter("prism_rows", "Rows that were scored", ("judge",), registry=registry)
        self.batches = prometheus.Histogram(
            "prism_batch_rows",
            "Rows per batch",
            ("pipeline",),
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.scoring = prometheus.Histogram(
            "prism_scoring_seconds", "Seconds per batch", ("pipeline",), buckets=_SECONDS, registry=registry
        )
        self.waiting = prometheus.Histogram(
            "prism_queue_seconds", "Seconds that a row waited", ("pipeline",), buckets=_SECONDS, registry=registry
        )
        self.queue = prometheus.Gauge("prism_queue_rows", "Rows that wait", ("pipeline",), registry=registry)
        self.held = prometheus.Gauge("prism_body_bytes", "Bytes of bodies in memory", registry=registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return bytes(self._render(self.registry))


class Judging(Protocol):
    """A judge as the HTTP side asks it, in this process or another one. All raise PrismError in place of an answer."""

    async def facts(self) -> dict[str, Any]:
        """What a client needs to know of it, as JSON."""

    async def latents(self, body: bytes, most_elements: int) -> dict[str, Any]:
        """The answer to a body of verl-omni's protocol."""

    async def unirl(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The scores of the clip of a history of UniRL's, by dimension."""

    async def flow_factory(self, body: bytes) -> dict[str, Any]:
        """The answer to a body of Flow-Factory's protocol."""


class Judges(Protocol):
    """Judges by name, the first of which is asked where none is named; what is counted; True once they stop."""

    metrics: Metrics
    stopping: bool

    @property
    def judges(self) -> Mapping[str, Judging]: ...


@dataclass(frozen=True)
class Served:
    """A judge of this process: its name, and the queue of its pipeline. See `Judging`."""

    name: str
    scorer: Scorer
    worker: Worker
    backbone: str
    """The backbone's name, as the user gave it."""
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    """Bodies whose media are decoded at a time."""

    async def facts(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.facts_now)

    async def latents(self, body: bytes, most_elements: int) -> dict[str, Any]:
        rows = await asyncio.to_thread(tensors.rows_of, body, self.scorer, most_elements)
        del body
        return tensors.answer(self.scorer, await self.scores(rows))

    async def unirl(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        async with self.decoding:
            row = await asyncio.to_thread(clips.unirl_row, self.scorer, history)
        return self.scorer.named((await self.scores([row]))[0])

    async def flow_factory(self, body: bytes) -> dict[str, Any]:
        async with self.decoding:
            rows = await asyncio.to_thread(lambda: clips.flow_factory_rows(clips.parsed(body), self.scorer))
        return clips.flow_factory_answer(self.scorer, await self.scores(rows))

    async def scores(self, rows: Sequence[Row]) -> list[list[float]]:
        """The scores of rows, per row one per dimension, once the judge's queue comes to them.

        A call that is cancelled takes its rows out of the queue.

        Raises:
            PrismError: of the first row that cannot be scored; `Overloaded` where too many wait.
        """
        by_key: dict[Any, list[tuple[int, Row]]] = {}
        for index, row in enumerate(rows):
            by_key.setdefault(self.scorer.key(row), []).append((index, row))
        futures: dict[int, Any] = {}
        try:
            for key, items in by_key.items():
                submitted = self.worker.submit(key, [row for _, row in items], self.scorer)
                futures |= {index: asyncio.wrap_future(each) for (index, _), each in zip(items, submitted)}
            outcomes = await asyncio.gather(*(futures[index] for index in sorted(futures)), return_exceptions=True)
        except BaseException:  # a full queue, or the caller is gone
            for future in futures.values():
                future.cancel()
            raise
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    def facts_now(self) -> dict[str, Any]:
        """See `facts`."""
        scorer, backbone = self.scorer, self.scorer.judge.backbone
        low, high = backbone.t_range
        return {
            "judge": scorer.judge.name,
            "backbone": self.backbone,
            "pipeline": type(backbone.pipe).__name__,
            "dimensions": list(scorer.judge.dimensions),
            "reward": scorer.dimension,
            "latents": {
                "ranks": tensors.ranks_of(scorer),
                "shape": None if scorer.shape is None else list(scorer.shape),
                "u": [low / 1000, high / 1000],
                "draws": scorer.draws or 1,
                "pooled_prompt_embeds": "read" if backbone.takes("pooled_prompt_embeds") else "ignored",
            },
            "clips": {
                "frames": scorer.policy.num_frames,
                "height": scorer.policy.height,
                "width": scorer.policy.width,
                "image": scorer.takes_image,
                "levels": list(scorer.levels),
                "draws": scorer.draws or 4,
            },
        }


class Service:
    """Judges by name; those on one pipeline share its queue.

    Args:
        scorers: by name, the first is the one that is asked where none is named.
        backbones: names of their backbones.
        batching: of every queue.

    Attributes: `judges` by name; `metrics`; `stopping`, True once new work is refused.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        backbones: Mapping[str, str] | None = None,
        batching: Batching | None = None,
    ) -> None:
        if not scorers:
            raise PrismError("There is no judge to serve; name at least one.")
        for name in scorers:
            check_name(name)
        self.metrics, self.stopping = Metrics(), False
        self._workers: dict[int, Worker] = {}  # by the id of a pipeline, which its judges keep alive
        decoding = asyncio.Semaphore(2)
        self.judges: dict[str, Served] = {}
        for name, scorer in scorers.items():
            pipe = scorer.judge.backbone.pipe
            if id(pipe) not in self._workers:
                self._workers[id(pipe)] = self._worker(f"pipeline-{len(self._workers)}", batching)
            backbone = (backbones or {}).get(name, type(pipe).__name__)
            self.judges[name] = Served(name, scorer, self._workers[id(pipe)], backbone, decoding)

    def _worker(self, label: str, batching: Batching | None) -> Worker:
        metrics = self.metrics

        def watch(rows: int, seconds: float, waits: Sequence[float]) -> None:
            metrics.batches.labels(label).observe(rows)
            metrics.scoring.labels(label).observe(seconds)
            for wait in waits:
                metrics.waiting.labels(label).observe(wait)

        worker = Worker(batching, watch, label)
        metrics.queue.labels(label).set_function(lambda: len(worker))
        return worker

    def warm(self) -> None:
        """Read every judge's shape once, so that the first request finds all in place, and mistakes show here."""
        for served in self.judges.values():
            _ = served.scorer.shape

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new work and finish what was taken; False if some is left after `timeout` seconds."""
        self.stopping = True
        ended = [worker.close(timeout) for worker in self._workers.values()]
        return all(ended)
