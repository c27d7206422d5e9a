"""The reward service over HTTP: bodies with limits, three protocols, health and metrics, a stop that loses nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from prism.errors import PrismError, number, quoted, whole
from prism.rewards.worker import Overloaded
from prism.serving import clips, tensors
from prism.serving.service import PROTOCOLS, Judges, Judging, missing_extra

_SLOWEST = 2**18  # bytes per second that a long body must come at
_DRAINED, _DRAIN_SECONDS = 2**24, 1.0  # what is read of a refused body, so that its sender comes to read the answer
_log = logging.getLogger("prism.serving")


@dataclass(frozen=True)
class Limits:
    """Limits of a request. Raises PrismError for values out of range."""

    body: int = 256 * 2**20
    """Bytes of a body."""
    bodies: int = 1024 * 2**20
    """Bytes of all bodies that are in memory."""
    elements: int = 2**26
    """Numbers in the tensors of a body."""
    body_seconds: float = 10.0
    """Seconds that a body's sender may take, beside the time of 256 KiB per second."""

    def __post_init__(self) -> None:
        whole("body", self.body, 1, 2**36)
        whole("bodies", self.bodies, self.body, 2**40)
        whole("elements", self.elements, 1, 2**36)
        number("body_seconds", self.body_seconds, 0, 86_400, above=True)


class Refused(PrismError):
    """A request that is answered with this status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Gone(Exception):
    """The client closed the connection."""


def application(service: Judges, token: str | None = None, limits: Limits | None = None) -> Any:
    """The ASGI application of a service.

    Args:
        service: the judges.
        token: that a client must send, as ``Authorization: Bearer TOKEN``, or as the password of ``http://x:TOKEN@host``;
            None: none. Health needs none.
        limits: of requests.

    Raises:
        PrismError: where FastAPI or prometheus-client is not installed.
    """
    try:
        from fastapi import FastAPI
        from starlette.routing import Route
    except ImportError as error:
        raise missing_extra() from error
    http = _Http(service, token, limits or Limits())
    routes = []
    for path, method, answer, protocol in (
        ("/v1/score", "POST", http.latents, PROTOCOLS[0]),
        ("/score", "POST", http.unirl, PROTOCOLS[1]),
        ("/compute", "POST", http.flow_factory, PROTOCOLS[2]),
        ("/rewards", "GET", http.rewards, ""),
        ("/healthz", "GET", http.healthz, ""),
        ("/health", "GET", http.health, ""),
        ("/metrics", "GET", http.metrics, ""),
    ):
        endpoint = partial(http.answered, answer, protocol, path not in ("/healthz", "/health"))
        for prefix in ("", "/judges/{judge}"):
            for end in ("", "/"):  # a redirect, in the place of the second one, would not be followed by every client
                routes.append(Route(prefix + path + end, _endpoint(endpoint), methods=[method]))
    app = FastAPI(title="PRISM", openapi_url=None, docs_url=None, redoc_url=None, routes=routes)
    for status in (404, 405):
        app.add_exception_handler(status, http.unknown)
    return app


def _endpoint(answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    async def endpoint(request: Any) -> Any:
        return await answer(request)

    return endpoint


class _Http:
    """The answers to requests."""

    def __init__(self, service: Judges, token: str | None, limits: Limits) -> None:
        self.service, self.token, self.limits = service, token, limits
        self._held = 0  # bytes of bodies in memory

    async def answered(
        self, answer: Callable[[Any], Awaitable[Any]], protocol: str, guarded: bool, request: Any
    ) -> Any:
        """The response to a request, whatever becomes of it: an error is one sentence as ``detail``."""
        from starlette.responses import JSONResponse, Response

        started, headers, status = time.monotonic(), {}, 200
        try:
            if guarded:
                self._authorise(request)
            document = await answer(request)
        except PrismError as error:
            status = error.status if isinstance(error, Refused) else 503 if isinstance(error, Overloaded) else 422
            status = 400 if isinstance(error, tensors.Malformed) else status
            document, headers = {"detail": str(error)}, _error_headers(status)
        except _Gone:
            status, document = 499, {"detail": "The client closed the connection."}
        except Exception:
            _log.exception("A request failed")
            status, document = 500, {"detail": "The service failed at this request; its log says why."}
        if protocol:
            self.service.metrics.requests.labels(protocol, str(status)).inc()
            self.service.metrics.seconds.labels(protocol).observe(time.monotonic() - started)
        if isinstance(document, Response):
            return document
        return JSONResponse(document, status, headers)

    async def unknown(self, request: Any, error: Any) -> Any:
        """The response where there is no such path, or no such method."""
        from starlette.responses import JSONResponse

        paths = "POST /v1/score, /score and /compute, GET /healthz, /health, /rewards and /metrics"
        sentence = f"There is no {request.method} {quoted(request.url.path, 80)}; there are {paths}."
        return JSONResponse({"detail": sentence}, error.status_code, _error_headers(error.status_code))

    # -- the three protocols

    async def latents(self, request: Any) -> dict[str, Any]:
        """verl-omni's: finished latents as safetensors."""
        name, judge = self._asked(request)
        version = request.headers.get(tensors.PROTOCOL_HEADER)
        if version != tensors.PROTOCOL_VERSION:
            raise Refused(
                400,
                f"The header {tensors.PROTOCOL_HEADER} must be {tensors.PROTOCOL_VERSION}; found "
                f"{'none' if version is None else quoted(version, 40)}.",
            )
        with self._room() as room:
            work = judge.latents(await self._body(request, room), self.limits.elements)
            answer = await self._unless_gone(request, work)
        self._count(name, len(answer["raw_scores"]))
        return answer

    async def unirl(self, request: Any) -> dict[str, Any]:
        """UniRL's: clips as JSON, each for one or several judges. One that fails is told beside the others' scores."""
        with self._room() as room:
            body = await self._body(request, room)
            document = await asyncio.to_thread(clips.parsed, body)
            del body
            asked = clips.unirl_requests(document, list(self.service.judges))
            del document
            work = asyncio.gather(*(self._unirl_request(history, names) for history, names in asked))
            outcomes = await self._unless_gone(request, work)
        values = [value for outcome in outcomes for value in outcome.values()]
        failed = [value for value in values if isinstance(value, PrismError)]
        if failed and len(failed) == len(values):
            raise failed[0]
        return clips.unirl_answer(outcomes)

    async def _unirl_request(self, history: Any, names: list[str]) -> dict[str, Any]:
        async def outcome(name: str) -> Any:
            try:
                scores = await self.service.judges[name].unirl(history)
            except Overloaded:
                raise
            except PrismError as error:
                return error
            self._count(name, 1)
            return scores

        return dict(zip(names, await asyncio.gather(*map(outcome, names))))

    async def flow_factory(self, request: Any) -> dict[str, Any]:
        """Flow-Factory's: clips as JSON, for one judge."""
        name, judge = self._asked(request)
        with self._room() as room:
            answer = await self._unless_gone(request, judge.flow_factory(await self._body(request, room)))
        self._count(name, len(answer["rewards"]))
        return answer

    # -- what is served

    async def rewards(self, request: Any) -> dict[str, Any]:
        """The names of the judges, as UniRL asks for them."""
        return {"rewards": list(self.service.judges)}

    async def health(self, request: Any) -> dict[str, Any]:
        """Readiness, as UniRL and Flow-Factory ask for it."""
        self._check_running()
        return {"status": "ok", "rewards": {name: [True] for name in self.service.judges}}

    async def healthz(self, request: Any) -> dict[str, Any]:
        """Readiness, and what each judge takes."""
        self._check_running()
        version = tensors.PROTOCOL_VERSION
        facts = await asyncio.gather(*(each.facts() for each in self.service.judges.values()))
        judges = dict(zip(self.service.judges, facts))
        return {"status": "ok", "protocol_version": version, "protocols": list(PROTOCOLS), "judges": judges}

    async def metrics(self, request: Any) -> Any:
        """Counts and times for Prometheus."""
        from starlette.responses import Response

        metrics = self.service.metrics
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    # -- a request

    def _check_running(self) -> None:
        if self.service.stopping:
            raise Refused(503, "This service stops and takes no further work; ask another one.")

    def _authorise(self, request: Any) -> None:
        self._check_running()
        if self.token is None:
            return
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(
            value.strip().encode(), self.token.encode()
        ):
            raise Refused(401, "This service needs its token; send the header Authorization: Bearer TOKEN.")

    def _asked(self, request: Any) -> tuple[str, Judging]:
        """The judge that a request names, or the first."""
        judges = self.service.judges
        name = request.path_params.get("judge") or request.query_params.get("judge") or next(iter(judges))
        if name not in judges:
            raise Refused(404, f"There is no judge {quoted(name, 60)}; there are {', '.join(judges)}.")
        return name, judges[name]

    def _count(self, name: str, rows: int) -> None:
        self.service.metrics.rows.labels(name).inc(rows)

    @contextlib.contextmanager
    def _room(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of a body, and refuses them where all bodies together are too many."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self._held + size > self.limits.bodies:
                raise Refused(503, "The service holds as many bodies as it may; ask again later.")
            mine += size
            self._held += size
            self.service.metrics.held.set(self._held)

        try:
            yield take
        finally:
            self._held -= mine
            self.service.metrics.held.set(self._held)

    async def _body(self, request: Any, take: Callable[[int], None]) -> bytes:
        """The body, read within the limits. Raises Refused (411, 413, 408) and `_Gone`."""
        limit, started, parts, size = self.limits.body, time.monotonic(), [], 0
        stated = request.headers.get("content-length", "")
        too_large = f"The body is larger than {limit:,} bytes; send less at once."
        try:
            if stated.isdecimal() and int(stated) > limit:
                raise Refused(413, too_large)
            while True:
                left = started + self.limits.body_seconds + size / _SLOWEST - time.monotonic()
                try:
                    message = await asyncio.wait_for(request.receive(), max(left, 0.001))
                except asyncio.TimeoutError:
                    sentence = f"The body came too slowly: {size:,} bytes in {time.monotonic() - started:.0f} seconds."
                    raise Refused(408, sentence) from None
                if message["type"] == "http.disconnect":
                    raise _Gone
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise Refused(413, too_large)
                take(len(part))
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
        except Refused as error:
            if error.status != 408:
                parts.clear()
                await _drain(request)
            raise

    async def _unless_gone(self, request: Any, work: Awaitable[Any]) -> Any:
        """The result of `work`, which is cancelled where the client closes the connection."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(request.receive())  # after the body this is the end of the connection
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Gone
            return task.result()
        finally:
            for each in (task, gone):
                each.cancel()


def _error_headers(status: int) -> dict[str, str]:
    headers = {"connection": "close"} if status in (408, 413) else {}
    if status == 503:
        headers["retry-after"] = "1"
    return headers | ({"www-authenticate": "Bearer"} if status == 401 else {})


async def _drain(request: Any) -> None:
    """Read on for a while and keep nothing: a sender that is cut off would not read the answer."""
    until, size = time.monotonic() + _DRAIN_SECONDS, 0
    with contextlib.suppress(asyncio.TimeoutError):
        while size < _DRAINED and (left := until - time.monotonic()) > 0:
            message = await asyncio.wait_for(request.receive(), left)
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return
