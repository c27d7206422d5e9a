"""Judges by name, each with the queue of its pipeline, and what is counted of their work."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism.errors import PrismError, quoted
from prism.rewards.scorer import Row, Scorer
from prism.rewards.worker import Batching, Worker

PROTOCOLS = ("latents", "unirl", "flow-factory")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def missing_extra() -> PrismError:
    """The error for a service whose libraries are not installed."""
    return PrismError(
        'A reward service needs fastapi, uvicorn and prometheus-client, and one is not installed; pip install "prism-'
        'video[serve]".'
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


@dataclass(frozen=True)
class Served:
    """A judge that is served: its name, and the queue of its pipeline."""

    name: str
    scorer: Scorer
    worker: Worker
    backbone: str
    """The backbone's name, as the user gave it."""

    def facts(self) -> dict[str, Any]:
        """What a client needs to know of it, as JSON."""
        from prism.serving.tensors import ranks_of

        scorer, backbone = self.scorer, self.scorer.judge.backbone
        low, high = backbone.t_range
        return {
            "backbone": self.backbone,
            "pipeline": type(backbone.pipe).__name__,
            "dimensions": list(scorer.judge.dimensions),
            "reward": scorer.dimension,
            "latents": {
                "ranks": ranks_of(scorer),
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
            if not name or not all(char.isalnum() or char in "-_." for char in name):
                raise PrismError(
                    f"A judge's name is part of an address: letters, digits, - _ and . are allowed; found "
                    f"{quoted(name, 60)}."
                )
        self.metrics, self.stopping = Metrics(), False
        self._workers: dict[int, Worker] = {}  # by the id of a pipeline, which its judges keep alive
        self.judges: dict[str, Served] = {}
        for name, scorer in scorers.items():
            pipe = scorer.judge.backbone.pipe
            if id(pipe) not in self._workers:
                self._workers[id(pipe)] = self._worker(f"pipeline-{len(self._workers)}", batching)
            backbone = (backbones or {}).get(name, type(pipe).__name__)
            self.judges[name] = Served(name, scorer, self._workers[id(pipe)], backbone)

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

    @property
    def first(self) -> Served:
        """The judge that is asked where none is named."""
        return next(iter(self.judges.values()))

    def warm(self) -> None:
        """Read every judge's shape once, so that the first request finds all in place, and mistakes show here."""
        for served in self.judges.values():
            _ = served.scorer.shape

    async def scores(self, served: Served, rows: Iterable[Row]) -> list[list[float]]:
        """The scores of rows, per row one per dimension, once the judge's queue comes to them.

        A call that is cancelled takes its rows out of the queue.

        Raises:
            PrismError: of the first row that cannot be scored; `Overloaded` where too many wait.
        """
        outcomes = await self.outcomes(served, rows)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [each for each in outcomes if not isinstance(each, BaseException)]

    async def outcomes(self, served: Served, rows: Iterable[Row]) -> list[list[float] | BaseException]:
        """As `scores`, with the error of a row in its place."""
        by_key: dict[Any, list[tuple[int, Row]]] = {}
        for index, row in enumerate(rows):
            by_key.setdefault(served.scorer.key(row), []).append((index, row))
        futures: dict[int, Any] = {}
        try:
            for key, items in by_key.items():
                submitted = served.worker.submit(key, [row for _, row in items], served.scorer)
                futures |= {index: asyncio.wrap_future(each) for (index, _), each in zip(items, submitted)}
            ordered = [futures[index] for index in sorted(futures)]
            outcomes = await asyncio.gather(*ordered, return_exceptions=True)
        except BaseException:  # a full queue, or the caller is gone
            for future in futures.values():
                future.cancel()
            raise
        scored = sum(not isinstance(each, BaseException) for each in outcomes)
        self.metrics.rows.labels(served.name).inc(scored)
        return outcomes

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new work and finish what was taken; False if some is left after `timeout` seconds."""
        self.stopping = True
        ended = [worker.close(timeout) for worker in self._workers.values()]
        return all(ended)
