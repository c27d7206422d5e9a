"""The reward service over a cluster: by Ray Serve one deployment a judge, behind one that speaks HTTP.

A process of a judge holds its pipeline and its queue. The front holds no model: it reads bodies within the limits, and
hands them to a process of the judge that is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prism.errors import PrismError, reason
from prism.rewards.scorer import Scorer
from prism.rewards.worker import Batching, Overloaded
from prism.serving.process import bind, url_of
from prism.serving.server import Limits, application
from prism.serving.service import Metrics, Service, check_name
from prism.training.actors import MEMORY, connected

APPLICATION = "prism"
_OPEN = 65_536  # requests that a process may have taken; its queue has the limit
_SECONDS = 30.0  # in which the front ends what it has taken, beyond the time that work may wait in a queue

Load = Callable[[], tuple[Mapping[str, Scorer], Mapping[str, str]]]
"""Makes one judge by its name, and its backbone's name; picklable."""


class Replica:
    """A judge in a process of its own."""

    def __init__(self, load: Load, batching: Batching | None) -> None:
        service = Service(*load(), batching)
        service.warm()
        (self._judge,) = service.judges.values()

    async def ask(self, question: str, *arguments: Any) -> tuple[Any, PrismError | None]:
        """The answer of the judge's method, or its error, which Ray would wrap."""
        try:
            return await getattr(self._judge, question)(*arguments), None
        except PrismError as error:
            return None, error


class _Remote:
    """A judge of other processes. See `prism.serving.service.Judging`."""

    def __init__(self, name: str, handle: Any) -> None:
        self._name, self._handle = name, handle

    async def facts(self) -> dict[str, Any]:
        return await self._ask("facts")

    async def latents(self, body: bytes, most_elements: int) -> dict[str, Any]:
        return await self._ask("latents", body, most_elements)

    async def unirl(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return await self._ask("unirl", history)

    async def flow_factory(self, body: bytes) -> dict[str, Any]:
        return await self._ask("flow_factory", body)

    async def _ask(self, *question: Any) -> Any:
        from ray.exceptions import RayError

        response = self._handle.ask.remote(*question)
        try:
            answer, error = await response
        except asyncio.CancelledError:  # the client is gone
            response.cancel()
            raise
        except RayError as error:
            raise Overloaded(f"A process of the judge {self._name} was lost; ask again.") from error
        if error is not None:
            raise error
        return answer


class _Remotes:
    """See `prism.serving.service.Judges`."""

    def __init__(self, judges: Mapping[str, _Remote]) -> None:
        self.judges, self.metrics, self.stopping = judges, Metrics(), False


class Front:
    """What speaks HTTP: the application of one process, whose judges are others."""

    def __init__(self, judges: Mapping[str, Any], token: str | None, limits: Limits | None) -> None:
        self._service = _Remotes({name: _Remote(name, handle) for name, handle in judges.items()})
        self._application = application(self._service, token, limits)
        self._open = 0

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        async def counted(scope: Any, receive: Any, send: Any) -> None:
            request = int(scope["type"] == "http")
            self._open += request
            try:
                await self._application(scope, receive, send)
            finally:
                self._open -= request

        return counted

    async def facts(self) -> dict[str, Any]:
        """What `/healthz` says of each judge."""
        return {name: await judge.facts() for name, judge in self._service.judges.items()}

    async def stop(self) -> None:
        """Refuse new work, and return when all that was taken is answered."""
        self._service.stopping = True
        while self._open:
            await asyncio.sleep(0.05)


class Cluster:
    """A service that listens on the first machine of a Ray cluster.

    Args:
        loads: what makes each judge, by its name, the first is the one that is asked where none is named.
        address: "local" to start a cluster on this machine, "auto", or an address, see `prism.training.actors.Actors`.
        replicas: processes of each judge.
        gpus: names of the judges that compute on a GPU where the cluster has any; each process takes one.
        host: address to listen on.
        port: port; 0: any free one.
        token: see `prism.serving.server.application`.
        limits: of requests.
        batching: of the queue of each process.

    `run` serves until a signal comes; `start` and `stop` do so in parts.

    Raises:
        PrismError: where Ray Serve is not installed or runs already, the cluster cannot be reached or is too small, the
            address cannot be had, or a judge cannot be loaded.
    """

    def __init__(
        self,
        loads: Mapping[str, Load],
        address: str = "local",
        replicas: int = 1,
        gpus: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        limits: Limits | None = None,
        batching: Batching | None = None,
    ) -> None:
        for name in loads:
            check_name(name)
        self._loads, self._replicas, self._gpus = loads, replicas, gpus
        self._token, self._limits, self._batching = token, limits or Limits(), batching or Batching()
        with bind(host, port) as free:  # Ray Serve's own process will listen
            self.host, self.port = free.getsockname()[:2]
        self.url = url_of(self.host, self.port)
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for work that nobody waits for
        memory = max(MEMORY, self._limits.bodies)  # bodies pass through it
        self._ray, self._started = connected(address, len(loads) * replicas, memory)
        self._serve: Any = None
        self._facts: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        """What `/healthz` says of each judge, once they have started."""
        return self._facts

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; return when all that was taken is answered. A second SIGINT ends at once."""
        ended = threading.Event()

        def end(number: int, frame: Any) -> None:
            print("prism: finishing what was taken; Ctrl-C again ends at once", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            ended.set()

        before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.start()
            for each in before:
                signal.signal(each, end)
            ready()
            while not ended.wait(1):  # a wait without an end would keep signals waiting
                pass
        finally:
            try:
                self.stop()
            finally:
                for each, handler in before.items():
                    signal.signal(each, handler)

    def start(self) -> None:
        """Deploy the judges and the front; return once all of them answer."""
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
        try:
            from ray import serve
        except ImportError as error:
            raise PrismError(
                'Ray Serve is not installed whole; install it with pip install "prism-video[serve-ray]".'
            ) from error
        if serve.status().applications or serve.status().proxies:
            raise PrismError("Ray Serve runs on this cluster already; end it with serve shutdown, or use another one.")
        needs = self._needs()
        self._serve = serve
        quiet = {"enable_access_log": False, "log_level": "ERROR"}
        seconds = self._batching.max_queue_seconds + _SECONDS
        common = {"max_ongoing_requests": _OPEN, "graceful_shutdown_timeout_s": seconds, "logging_config": quiet}
        common |= {"graceful_shutdown_wait_loop_s": 0.1, "max_constructor_retry_count": 1}
        judges = {
            name: serve.deployment(
                Replica, name=f"judge-{name}", num_replicas=self._replicas, ray_actor_options=needs[name], **common
            ).bind(load, self._batching)
            for name, load in self._loads.items()
        }
        front = serve.deployment(serve.ingress()(Front), name="front", ray_actor_options={"num_cpus": 0}, **common)
        where = {"host": self.host, "port": self.port, "keep_alive_timeout_s": 30}
        try:
            serve.start("HeadOnly", where, logging_config=quiet)
            logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
            handle = serve.run(front.bind(judges, self._token, self._limits), name=APPLICATION)
            self._facts = handle.facts.remote().result()
        except (RuntimeError, TimeoutError, self._ray.exceptions.RayError) as error:
            found = re.findall(r"PrismError: (.+)", f"{error} {_messages(serve.status())}")
            raise PrismError(found[-1] if found else f"Ray Serve failed: {reason(error, 400)}.") from error

    def stop(self) -> None:
        """Refuse new work, finish what was taken, and end the deployments, and the cluster if it was started here."""
        try:
            if self._serve is not None:
                if self._facts:
                    with contextlib.suppress(self._ray.exceptions.RayError):  # the front is lost
                        self._serve.get_app_handle(APPLICATION).stop.remote().result()
                self._serve.shutdown()
                self._serve = None
        finally:
            if self._started:
                self._ray.shutdown()
                self._started = False

    def _needs(self) -> dict[str, dict[str, int]]:
        """What a process of each judge takes of the cluster."""
        free, nodes = self._ray.available_resources(), [node for node in self._ray.nodes() if node["Alive"]]
        has_gpus = self._ray.cluster_resources().get("GPU", 0) >= 1
        on_gpu = [name for name in self._loads if name in self._gpus and has_gpus]
        others = self._replicas * (len(self._loads) - len(on_gpu))
        cpus = int(free.get("CPU", 0)) - self._replicas * len(on_gpu)
        gpus = self._replicas * len(on_gpu)
        if gpus > free.get("GPU", 0) or cpus < others:
            raise PrismError(
                f"The Ray cluster has {free.get('GPU', 0):g} GPU and {free.get('CPU', 0):g} CPU free, and "
                f"{self._replicas * len(self._loads)} processes of judges need one each; start fewer, or add machines."
            )
        sizes = [int(node["Resources"].get("CPU", 0)) for node in nodes]
        fitting = (each for each in range(cpus // max(1, others), 0, -1) if sum(n // each for n in sizes) >= others)
        threads = next(fitting, 1)
        return {
            name: {"num_gpus": 1, "num_cpus": 1} if name in on_gpu else {"num_gpus": 0, "num_cpus": threads}
            for name in self._loads
        }


def _messages(status: Any) -> str:
    """What Ray Serve says of each deployment."""
    return "\n".join(
        deployment.message for each in status.applications.values() for deployment in each.deployments.values()
    )
