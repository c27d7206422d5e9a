"""The service as a process: it listens, and at SIGTERM or Ctrl-C refuses new work and finishes what it took."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from prism.errors import PrismError, quoted, whole
from prism.serving.server import Limits, application
from prism.serving.service import Service, missing_extra

HEADER_SECONDS = 10.0  # in which a connection must have sent a request's line and headers
MOST_CONNECTIONS = 1024
_LATE = b'{"detail":"No whole request came in time; send its line and headers at once."}'


class Running:
    """A service that listens.

    Args:
        service: the judges.
        bound: where to listen, see `bind`.
        token: see `prism.serving.server.application`.
        limits: of requests.
        header_seconds: that a connection may take to send a request's headers.

    `run` serves until a signal comes, `start` does so in a thread.

    Raises:
        PrismError: where uvicorn, FastAPI or prometheus-client is not installed.
    """

    def __init__(
        self,
        service: Service,
        bound: socket.socket,
        token: str | None = None,
        limits: Limits | None = None,
        header_seconds: float = HEADER_SECONDS,
    ) -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise missing_extra() from error
        self.service, self._socket = service, bound
        self.host, self.port = bound.getsockname()[:2]
        config = uvicorn.Config(
            application(service, token, limits),
            http=_connection(header_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # each malformed request would be a line
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=30,
            backlog=MOST_CONNECTIONS,
        )
        self._server = _server(service, config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens, as an address for clients on this machine."""
        return url_of(self.host, self.port)

    def facts(self) -> dict[str, Any]:
        """What `/healthz` says of each judge."""
        return {name: judge.facts_now() for name, judge in self.service.judges.items()}

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT; return when all that was taken is answered. A second SIGINT ends at once.

        `ready` is called once clients can connect.
        """
        self.service.warm()
        self._server.ready = ready
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.service.close(timeout=0.0 if self._server.force_exit else None)

    def start(self) -> None:
        """Serve in a thread, until `stop`; return once it listens."""
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.01)

    def stop(self, timeout: float | None = None) -> None:
        """End what `start` began, as a signal ends `run`."""
        self.service.stopping = self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout)


def url_of(host: str, port: int) -> str:
    """An address for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """True for an address that this machine alone reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A socket at an address, which is taken from now on; nobody can connect before the service runs.

    Args:
        host: address, or name of this machine.
        port: port; 0: any free one.

    Raises:
        PrismError: where that cannot be had.
    """
    whole("port", port, 0, 65_535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or quoted(error, 80)
        raise PrismError(
            f"The service cannot listen on --host {quoted(host, 60)} --port {port}: {reason}; choose others."
        ) from error
    return listener


def _server(service: Service, config: Any) -> Any:
    """A uvicorn server that tells the service of the signal first, and does not raise it again in the end."""
    import uvicorn

    class Server(uvicorn.Server):
        ready: Callable[[], None] | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and self.ready is not None:
                self.ready()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            handlers = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for each, handler in handlers.items():
                    signal.signal(each, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if not service.stopping:
                print("prism: finishing what was taken; Ctrl-C again ends at once", file=sys.stderr)
            service.stopping = True
            super().handle_exit(sig, frame)

    return Server(config)


def _connection(header_seconds: float) -> Any:
    """uvicorn's HTTP connection, closed where a request's headers do not come in time, which uvicorn waits for."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        _timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._timer is not None:
                self._timer.cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect()

        def _expect(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(max(header_seconds, self._idle()), self._late)

        def _idle(self) -> float:
            """Seconds that a connection may be idle between requests, after which uvicorn closes it."""
            return 0.0 if self.cycle is None else float(self.timeout_keep_alive)

        def _late(self) -> None:
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy or self.transport.is_closing():
                return
            head = f"HTTP/1.1 408 Request Timeout\r\ncontent-length: {len(_LATE)}\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-type: application/json\r\n\r\n".encode() + _LATE)
            self.transport.close()

    return Connection
