"""Clients for the tests: plain requests, the recorded ones of three trainers, and one that follows verl-omni's."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

RECORDED = Path(__file__).parent / "recorded"
"""Requests, byte for byte, of the clients of verl-omni a1139ba, UniRL 1a7b501 and Flow-Factory a0b2bc5."""
V1 = {"x-drm-protocol-version": "1"}


def ask(url, method="GET", body=None, headers=None):
    """Status and JSON of one request; the JSON of an error is one sentence."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    try:
        connection.request(method, f"{address.path}?{address.query}", body, headers or {})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    document = json.loads(text) if answer.headers["content-type"] == "application/json" else text.decode()
    if answer.status >= 400:
        assert list(document) == ["detail"]
        assert document["detail"].endswith(".")
        assert "\n" not in document["detail"]
    return answer.status, document


def recorded(name, path=None):
    """Path, headers and body of a recorded request."""
    head, _, body = (RECORDED / name).read_bytes().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return first.split()[1], {name: value for name, value in headers.items() if name.lower() != "host"}, body


def replay(url, name):
    """Status and JSON of the answer to a recorded request."""
    path, headers, body = recorded(name)
    return ask(url + path, "POST", body, headers)


def latent_body(latents, level=0.5, seed=0, prompt="a red circle moves right", **tensors):
    """A body of the latent protocol with the prompt as text; tensors take the place of others."""
    rows = len(latents)
    tensors = {"latents": latents, "u": torch.full((rows,), level), "seeds": torch.full((rows,), seed), **tensors}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    return save(tensors, metadata=None if prompt is None else {"prompt": prompt})


def raw(url, data, wait=30.0):
    """What comes back to bytes that are sent as they are."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # at what was sent behind the answer
            while part := connection.recv(65536):
                answer += part
                if b"connection: close" not in answer and b"}" in answer:
                    break
    return answer


def verl_score(server_url, payload, max_retries=2, retry_backoff=0.01):
    """A score as verl-omni's client asks for it: version and number checked, failures tried again."""
    failure = ""
    for attempt in range(max_retries + 1):
        status, result = ask(server_url, "POST", payload, {"content-type": "application/octet-stream", **V1})
        if status == 200:
            assert isinstance(result, dict)
            assert result["protocol_version"] == "1"
            assert isinstance(result["raw_scores"], list)
            assert len(result["raw_scores"]) == 1
            assert math.isfinite(float(result["raw_scores"][0]))
            return result["raw_scores"][0]
        failure = result["detail"]
        time.sleep(retry_backoff * 2**attempt)
    raise RuntimeError(failure)
