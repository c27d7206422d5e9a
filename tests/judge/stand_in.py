"""A stand-in of the Hub's HTTP interface on this machine: repositories with branches of whole files, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class StandIn(ThreadingHTTPServer):
    """Start with `StandIn()`; `address` is its HF_ENDPOINT, `close()` takes it off the network."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> branch or commit -> path -> content
        self.commits: dict[tuple[str, str], str] = {}  # (repository, branch) -> its last commit
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.fetched: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def put(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit that leaves a branch with these files."""
        digest = hashlib.sha1(repr((branch, len(self.messages), sorted(files.items()))).encode()).hexdigest()
        self.branches.setdefault(repository, {}).update({branch: files, digest: files})
        self.commits[repository, branch] = digest
        return digest


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            repository, _, rest = self._repository(path[len("/api/models/") :])
            kind, _, revision = rest.partition("/")
            found = self._branch(repository, revision or "main")
            if found is None:
                return
            if kind == "tree":
                sizes = {name: {"size": len(content), "oid": _oid(content)} for name, content in found.items()}
                return self._answer(200, [{"type": "file", "path": name, **size} for name, size in sizes.items()])
            sha = hub.commits.get((repository, revision or "main"), revision)
            siblings = [{"rfilename": name} for name in found]
            return self._answer(200, {"id": repository, "sha": sha, "siblings": siblings, "private": False, "tags": []})
        repository, _, rest = self._repository(path[1:])
        _, revision, name = rest.split("/", 2)
        found = self._branch(repository, revision)
        if found is None:
            return
        content = found[name]
        if self.command == "GET":
            hub.fetched.append(name)
        self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": revision})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in hub.branches:
                return self._answer(
                    409, {"error": "You already created this model repo", "url": f"{hub.address}/{repository}"}
                )
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(repository)
            hub.put(repository, {".gitattributes": b""})
            return self._answer(200, {"url": f"{hub.address}/{repository}"})
        repository, _, rest = self._repository(path[len("/api/models/") :])
        kind, _, revision = rest.partition("/")
        if kind == "branch":
            if (repository, revision) in hub.commits:
                return self._answer(409, {"error": "Reference already exists"})
            hub.put(repository, dict(hub.branches[repository]["main"]), revision)
            return self._answer(200, {})
        if kind == "preupload":
            wanted = json.loads(body)["files"]
            modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in wanted]
            return self._answer(200, {"files": modes})
        files = dict(hub.branches[repository][revision])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.messages.append(value["summary"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        digest = hub.put(repository, files, revision)
        self._answer(200, {"commitUrl": f"{hub.address}/{repository}/commit/{digest}", "commitOid": digest})

    def _repository(self, path: str) -> tuple[str, str, str]:
        owner, name, *rest = path.split("/", 2)
        return f"{owner}/{name}", "/", "".join(rest)

    def _branch(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit; None where the answer is already that there is none."""
        allowed = repository not in self.server.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository not in self.server.branches or not allowed:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in self.server.branches[repository]:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return self.server.branches[repository][revision]

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
