"""Load on `prism serve`: many clients whose scores must be the judge's own, then bodies that must all be refused.

python benchmarks/serve_load.py [--requests 10000] [--clients 64] [--hostile 100000] [--out FILE.json]

Starts the service on the embedded model as a process of its own, and compares each answer with what the same judge
gives in this process. Fails where an answer is lost or wrong, where a hostile body is answered by anything but a 4xx
with one sentence, where the service's memory grows from one half of the work to the other, or where it does not end
with code 0 at SIGTERM.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from prism import files
from prism.loading import load_backbone, load_judge

V1 = {"x-drm-protocol-version": "1"}
TOLERANCE = 1e-4  # of a score, for rounding in batches
GROWTH = 64 * 2**20  # bytes by which memory may differ between the middle and the end
PROMPTS = ("a red circle moves left", "a blue square moves up", "a green triangle bounces off the floor")


@dataclass(frozen=True)
class Request:
    """A request, and the scores that it must be answered with."""

    path: str
    headers: dict[str, str]
    body: bytes
    expected: list[float]


def scores_in(path: str, document: Any) -> list[float]:
    """The rewards of an answer."""
    if path == "/score":
        return [result["prism"]["overall"] for result in document["results"]]
    return document["raw_scores"] if path == "/v1/score" else document["rewards"]


def requests(count: int) -> list[Request]:
    """Distinct requests of the three protocols, with scores of the judge in this process."""
    backbone, call, _ = load_backbone(device="cpu")
    judge = load_judge(None, backbone, embedded=True)
    shape = backbone.condition([PROMPTS[0]], **call).shape
    embeddings = {
        prompt: backbone.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=call["max_sequence_length"], device="cpu"
        )[0].detach()
        for prompt in PROMPTS
    }
    made = []
    for index in range(count):
        prompt, kind = PROMPTS[index % 3], index % 8
        generator = torch.Generator().manual_seed(index)
        if kind < 6:
            rows, level = 1 + index % 2, (0.25, 0.5, 0.75)[index % 3]
            latents = torch.randn(rows, *shape, generator=generator)
            tensors = {"latents": latents, "u": torch.tensor([level]), "seeds": torch.tensor([index])}
            given: dict[str, Any] = {}
            if kind % 2:
                given = {"prompt_embeds": embeddings[prompt]}
            scores = [
                judge.score_clean(
                    latents[[row]],
                    None if given else prompt,
                    1000 * level,
                    1,
                    torch.Generator().manual_seed(index),
                    **{**call, **given},
                )[0]
                for row in range(rows)
            ]
            body = save({**tensors, **given}, metadata=None if given else {"prompt": prompt})
            made.append(Request("/v1/score", V1, body, torch.cat(scores)[:, 3].tolist()))
            continue
        noise = np.random.default_rng(index).integers(0, 256, (17, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        pictures = [Image.fromarray(frame) for frame in noise]
        expected = judge.score_video([noise], prompt, **call).scores.mean(1)[:, 3].tolist()
        if kind == 6:
            document: Any = {"prompt": [prompt], "video": [[in_base64(each, "PNG") for each in pictures]]}
            made.append(Request("/compute", {}, json.dumps(document).encode(), expected))
        else:
            stream = io.BytesIO()
            pictures[0].save(stream, "WEBP", save_all=True, append_images=pictures[1:], lossless=True, duration=100)
            turn = {"text": prompt, "video_b64": base64.b64encode(stream.getvalue()).decode()}
            document = {"requests": [{"history": [turn], "required_rewards": ["prism"]}]}
            made.append(Request("/score", {}, json.dumps(document).encode(), expected))
    return made


def in_base64(picture: Image.Image, kind: str) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def hostile(request: Request, dice: random.Random) -> tuple[str, dict[str, str], bytes]:
    """A body that must be refused, made from a good one."""
    body, latents = request.body, request.path == "/v1/score"
    if latents:
        kind = dice.randrange(8)
        length = int.from_bytes(body[:8], "little")
        if kind == 0:
            body = body[: dice.randrange(len(body))]
        elif kind == 1:
            body = dice.randrange(2**17, 2**63).to_bytes(8, "little") + body[8:]
        elif kind == 2:
            body = pickle.dumps({"latents": list(range(dice.randrange(1, 99)))}, protocol=dice.randrange(2, 6))
        elif kind == 3:
            offset = json.loads(body[8 : 8 + length])["latents"]["data_offsets"]
            place = 8 + length + offset[0] + 4 * dice.randrange((offset[1] - offset[0]) // 4)
            body = body[:place] + np.float32(dice.choice([np.nan, np.inf, -np.inf])).tobytes() + body[place + 4 :]
        elif kind == 4:
            rank = dice.choice([1, 2, 3, 4, 6])
            sizes = [1, 48, 5, 4, 4, 1][:rank]
            body = save({"latents": torch.zeros(sizes), "u": torch.zeros(1)}, metadata={"prompt": "a"})
        elif kind == 5:
            body = dice.randbytes(dice.randrange(1, 4096))
        elif kind == 6:
            body = save({"latents": torch.zeros(1, 48, 5, 4, 4), "u": torch.full((1,), dice.choice([-1.0, 2.0]))})
        else:
            return request.path, {}, body  # without its header
        return request.path, V1, body
    kind = dice.randrange(4)
    if kind == 0:
        body = body[: dice.randrange(len(body))]
    elif kind == 1:
        body = pickle.dumps([1, 2, 3])
    elif kind == 2:
        body = b"[" * dice.randrange(1, 100_000)
    else:
        body = body.replace(b"UklGR", b"AAAAA").replace(b"iVBOR", b"AAAAA")
    return request.path, {}, body


class Clients:
    """Threads that send requests and check each answer.

    Attributes: `seconds` of each answer; `failures`, in words; `statuses`, counted.
    """

    def __init__(self, port: int, count: int) -> None:
        self.port, self.count = port, count
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self.statuses: Counter[int] = Counter()
        self._lock = threading.Lock()

    def send(self, total: int, of: Any) -> None:
        """Send `total` requests; `of` gives a number's path, headers, body, and check of status and text."""
        numbers = iter(range(total))

        def work() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            while True:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                path, headers, body, check = of(number)
                start = time.perf_counter()
                try:
                    connection.request("POST", path, body, headers)
                    answer = connection.getresponse()
                    status, text = answer.status, answer.read()
                except (OSError, http.client.HTTPException) as error:
                    status, text = 0, repr(error).encode()
                    connection.close()
                spent, wrong = time.perf_counter() - start, check(status, text)
                with self._lock:
                    self.seconds.append(spent)
                    self.statuses[status] += 1
                    if wrong:
                        self.failures.append(f"{number} {path}: {wrong}")

        threads = [threading.Thread(target=work) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def check_scores(request: Request, status: int, text: bytes) -> str:
    if status != 200:
        return f"status {status}: {text[:200]!r}"
    scores = scores_in(request.path, json.loads(text))
    close = len(scores) == len(request.expected) and np.allclose(scores, request.expected, rtol=0, atol=TOLERANCE)
    return "" if close else f"scores {scores}, expected {request.expected}"


def check_refused(status: int, text: bytes) -> str:
    if not 400 <= status < 500:
        return f"status {status}: {text[:200]!r}"
    document = json.loads(text)
    sentence = document.get("detail", "")
    return (
        "" if list(document) == ["detail"] and sentence.endswith(".") and "\n" not in sentence else f"said {document}"
    )


def slow_senders(port: int, count: int) -> Counter[bytes]:
    """The first bytes that `count` connections get that send a body's beginning and then nothing."""
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=120) for _ in range(count)]
    for each in sockets:
        each.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    found = Counter(each.recv(64)[:12] for each in sockets)
    for each in sockets:
        each.close()
    return found


def status_of(process: int) -> tuple[int, float]:
    """Bytes of memory and seconds of CPU of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return pages * os.sysconf("SC_PAGE_SIZE"), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--hostile", type=int, default=100_000)
    parser.add_argument("--slow", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pool = requests(48)
    command = [sys.executable, "-m", "prism", "serve", "--port", "0", "--max-queue-seconds", "3600", "--device", "cpu"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        line = next(line for line in service.stdout if line.startswith("listening on "))
        port = int(line.rpartition(":")[2])
        result: dict[str, Any] = {"requests": options.requests, "clients": options.clients, "hostile": options.hostile}

        def good(number: int) -> Any:
            request = pool[number % len(pool)]
            return request.path, request.headers, request.body, lambda *answer: check_scores(request, *answer)

        def bad(number: int) -> Any:
            dice = random.Random(number)
            return *hostile(pool[number % len(pool)], dice), check_refused

        for name, total, of in (("good", options.requests, good), ("hostile", options.hostile, bad)):
            memory, failures, statuses, seconds = [], [], Counter(), []
            _, before = status_of(service.pid)
            for half in range(2):
                clients = Clients(port, options.clients)
                start = half * (total // 2)
                clients.send(total // 2, lambda number, start=start, of=of: of(start + number))
                memory.append(status_of(service.pid)[0])
                failures += clients.failures
                statuses += clients.statuses
                seconds += clients.seconds
            spent = status_of(service.pid)[1] - before
            result[name] = {
                **{"answers": len(seconds), "statuses": dict(statuses), "wrong": len(failures)},
                **{"p50_seconds": float(np.quantile(seconds, 0.5)), "p95_seconds": float(np.quantile(seconds, 0.95))},
                **{"cpu_ms_per_request": 1000 * spent / max(1, len(seconds)), "memory_bytes": memory},
            }
            print(json.dumps({name: result[name]}, indent=2), flush=True)
            assert not failures, failures[:5]
            assert len(seconds) == total // 2 * 2
            assert memory[1] - memory[0] < GROWTH, memory
        result["slow"] = {key.decode(): count for key, count in slow_senders(port, options.slow).items()}
        assert list(result["slow"]) in (["HTTP/1.1 408"], []), result["slow"]
        alive = Clients(port, 1)
        alive.send(8, good)
        assert not alive.failures, alive.failures
        service.send_signal(signal.SIGTERM)
        assert service.wait(600) == 0
    finally:
        service.kill()
    print(json.dumps(result, indent=2))
    if options.out:
        files.write_json(options.out, result)


if __name__ == "__main__":
    main()
