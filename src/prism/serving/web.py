"""The web server of the page: files under names that cannot be guessed, users, one address, nothing from outside."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import mimetypes
import os
import secrets
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prism.errors import PrismError, quoted

MISSING = 'The page needs gradio, which is not installed; pip install "prism-video[gradio]".'
POLICY = "; ".join(
    (
        "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'",
        "frame-ancestors 'self'",
        "object-src 'none'",
    )
)
"""The Content-Security-Policy of every answer: the browser itself refuses whatever is not from this server."""


class Shelf:
    """Files and pictures that the page shows, each at an address that cannot be guessed and tells nothing."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._items: dict[str, Path | bytes | Callable[[], Path]] = {}
        self._lock = threading.Lock()

    def file(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """The address of a file; `name`: the one that it is downloaded under."""
        full = Path(path).absolute()
        return self._put(str(full), full, name or full.name)

    def picture(self, data: bytes, kind: str = "png") -> str:
        """The address of a picture."""
        return self._put(hashlib.sha256(data).hexdigest(), data, f"picture.{kind}")

    def archive(self, folder: Path) -> str:
        """The address of a folder as a zip, which is made when it is asked for."""
        full = folder.absolute()
        return self._put(f"zip {full}", lambda: _zipped(full), f"{folder.name}.zip")

    def get(self, token: str) -> Path | bytes | None:
        """The file or bytes of an address; None for one that this shelf did not give."""
        item = self._items.get(token)
        return item() if callable(item) else item

    def _put(self, identity: str, item: Any, name: str) -> str:
        token = hmac.new(self._key, identity.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()[:32]
        with self._lock:
            self._items[token] = item
        return f"files/{token}/{quote(name)}"


def _zipped(folder: Path) -> Path:
    handle, name = tempfile.mkstemp(".zip", "prism-")
    os.close(handle)
    with zipfile.ZipFile(name, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return Path(name)


def users_of(texts: Sequence[str], host: str) -> list[tuple[str, str]]:
    """The users of --auth: each text is USER:PASSWORD, or a file with one such line per user.

    Raises:
        PrismError: for a text that is neither, and for an address that others reach without any user.
    """
    users: dict[str, str] = {}
    for text in texts:
        if os.path.isfile(text):
            where = f"The --auth file {quoted(text, 150)}"
            try:
                lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise PrismError(f"{where} cannot be read as text in UTF-8; write one USER:PASSWORD a line.") from error
            lines = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
            if not lines:
                raise PrismError(f"{where} names no user; write one USER:PASSWORD a line, or leave --auth out.")
        else:
            lines, where = [text], ""
        for number, line in enumerate(lines, 1):
            name, colon, password = line.partition(":")
            if not (name and colon and password):  # the line may hold a password: it is not quoted
                found = "The --auth is neither a file that is there nor USER:PASSWORD"
                if where:
                    found = f"{where} holds in line {number} something else than USER:PASSWORD"
                raise PrismError(f"{found}; write it so.")
            users[name] = password
    if not users and not is_loopback(host):
        raise PrismError(
            f"The --host {quoted(host, 60)} lets others reach the page; give --auth USER:PASSWORD (or a file), or "
            "leave --host out."
        )
    return list(users.items())


def is_loopback(host: str) -> bool:
    """True for an address that this machine alone reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def application(blocks: Any, shelf: Shelf, users: Sequence[tuple[str, str]], **shown: Any) -> Any:
    """The ASGI application: Gradio's blocks at /, the shelf at /files.

    users: names and passwords; none: everyone. shown: theme, css, head and the like, as of `gr.mount_gradio_app`.
    """
    import gradio
    from fastapi import FastAPI
    from starlette.background import BackgroundTask
    from starlette.responses import FileResponse, PlainTextResponse, Response

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/files/{token}/{name}")
    def file(token: str, name: str) -> Response:
        item = shelf.get(token)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"Cache-Control": "private, max-age=3600"}
        if isinstance(item, bytes):
            return Response(item, media_type=kind, headers=headers)
        if item is None or not item.is_file():
            return PlainTextResponse("There is no such file.", 404)
        if name.endswith(".zip"):
            return FileResponse(item, filename=name, background=BackgroundTask(item.unlink, missing_ok=True))
        return FileResponse(item, media_type=kind, headers=headers)

    @app.middleware("http")
    async def guarded(request: Any, call: Any) -> Any:
        response = await call(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return gradio.mount_gradio_app(
        app, blocks, path="/", auth=list(users) or None, footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, **shown,
    )  # fmt: skip


def typed(function: Callable[..., Any], **kinds: Any) -> Callable[..., Any]:
    """A listener whose arguments of these names are what Gradio tells by their type: `EventData`, `Request`."""
    function.__annotations__ = kinds
    return function


class Server:
    """The server in a thread of its own; `url` once `start` has returned.

    Args:
        app: of `application`. host, port: to listen at; port 0 takes a free one.
    """

    def __init__(self, app: Any, host: str, port: int) -> None:
        import socket

        import uvicorn

        self.host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host.strip("[]"), port))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise PrismError(
                f"The page cannot listen at {quoted(host, 60)}:{port} ({quoted(error, 80)}); choose another --port or "
                "--host."
            ) from error
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="page", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/"

    def start(self) -> Server:
        """Listen; return when the page can be opened."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise PrismError(f"The page at {self.url} did not start; see the lines above.")
            self._thread.join(0.02)
        return self

    def wait(self) -> None:
        """Return when the server has ended."""
        while self._thread.is_alive():
            self._thread.join(1)

    def stop(self) -> None:
        """End the server."""
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
