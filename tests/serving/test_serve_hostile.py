"""Whatever arrives is answered by a 4xx with one sentence, and the service goes on."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import socket
import struct
import time
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.serving.clients import V1, ask, latent_body, raw, recorded, replay

from prism.errors import PrismError
from prism.serving import tensors
from prism.serving.process import Running, bind
from prism.serving.server import Limits
from prism.serving.service import Service

ONE = torch.zeros(1, 16, 3, 4, 4)
WHOLE = latent_body(ONE)


class Bomb:
    """An object that ends the process that unpickles it."""

    def __reduce__(self):
        return (exec, ("import os; os._exit(3)",))


def header(entries, data=b"", length=None):
    """A safetensors body with a header of its own."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, start=0, size=None, dtype="F32"):
    count = 4
    for each in shape:
        count *= each
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + (count if size is None else size)]}


LATENTS = {
    "empty": (b"", "0 bytes"),
    "a few bytes": (b"\x01\x02", "2 bytes"),
    "pickle": (pickle.dumps(Bomb()), "is a pickle, which is never loaded"),
    "torch file": (b"PK\x03\x04" + bytes(100), "is a pickle, which is never loaded"),
    "cut in the header": (WHOLE[:40], "ends within its header"),
    "cut in the numbers": (WHOLE[:-1], "bytes of tensors"),
    "bytes behind": (WHOLE + b"x", "bytes of tensors"),
    "header of exabytes": (header({}, length=2**63), "of at most 65,536"),
    "long header": (header(b" " * 70_000), "of at most 65,536"),
    "header of garbage": (header(b"\xff\xfe{"), "is no JSON"),
    "nested header": (header(b"[" * 60_000), "is no JSON"),
    "a list": (header([]), "is no JSON object"),
    "a name twice": (header(b'{"u":1,"u":1}'), "a name comes twice"),
    "NaN in the header": (header(b'{"u":NaN}'), "NaN is no number"),
    "an entry that is none": (header({"latents": 3}), "is of None"),
    "unknown dtype": (header({"latents": entry([1], dtype="F4")}, bytes(8)), "is of F4"),
    "negative size": (header({"latents": entry([1], size=4) | {"shape": [-1]}}, bytes(4)), "has the shape"),
    "huge size": (header({"latents": entry([2**40], size=4)}, bytes(4)), "has the shape"),
    "size that overflows": (header({"latents": entry([2**32, 2**32], size=0)}), "has 73,786,976,294,838,206,464 bytes"),
    "fraction": (header({"latents": entry([1], size=4) | {"shape": [1.0]}}, bytes(4)), "has the shape"),
    "True": (header({"latents": entry([1], size=4) | {"shape": [True]}}, bytes(4)), "has the shape"),
    "offsets turned": (header({"latents": entry([1]) | {"data_offsets": [4, 0]}}, bytes(4)), "has the offsets"),
    "offsets beyond": (header({"latents": entry([1], 100)}, bytes(4)), "overlap or leave gaps"),
    "overlap": (header({"a": entry([1]), "b": entry([1])}, bytes(4)), "overlap"),
    "metadata of numbers": (header({"__metadata__": {"prompt": 3}}), "metadata must be texts"),
    "no prompt": (latent_body(ONE, prompt=None), "found neither"),
    "two prompts": (latent_body(ONE, prompt_embeds=torch.zeros(1, 4, 32)), "found both"),
    "no level": (latent_body(ONE, u=None), "no tensor u"),
    "unknown tensor": (latent_body(ONE, evil=torch.zeros(1)), "the tensor evil"),
    "rank 4": (latent_body(torch.zeros(1, 16, 4, 4)), "rank 4, and this judge takes rank 5"),
    "rank 6": (latent_body(torch.zeros(1, 1, 16, 3, 4, 4)), "rank 6"),
    "another size": (latent_body(torch.zeros(1, 16, 3, 4, 8)), "[1, 16, 3, 4, 8], and this judge's pipeline makes"),
    "no rows": (latent_body(torch.zeros(0, 16, 3, 4, 4)), "send 1 to 64 rows"),
    "many rows": (
        latent_body(torch.zeros(65, 16, 3, 4, 4).half(), u=torch.zeros(1), seeds=None),
        "numbers, of at most",
    ),
    "whole numbers": (latent_body(torch.zeros(1, 16, 3, 4, 4, dtype=torch.int64)), "latents are of I64"),
    "NaN": (latent_body(torch.full_like(ONE, torch.nan)), "latents holds NaN"),
    "infinity": (latent_body(torch.full_like(ONE, -torch.inf)), "latents holds NaN or infinity"),
    "overflow": (latent_body(torch.full_like(ONE, 3e38)), "no finite score"),
    "level above 1": (latent_body(ONE, 1.5), "from 0 (clean) to 1 (noise)"),
    "level NaN": (latent_body(ONE, torch.nan), "u holds NaN"),
    "levels of others": (latent_body(ONE, u=torch.zeros(2)), "one per row"),
    "level of rank 2": (latent_body(ONE, u=torch.zeros(1, 1)), "u must be one number"),
    "negative seed": (latent_body(ONE, seed=-1), "seeds must be from 0"),
    "seeds as floats": (latent_body(ONE, seeds=torch.zeros(1)), "seeds must be one number of I64"),
    "an empty prompt": (latent_body(ONE, prompt=" "), "prompt is empty"),
    "embeddings of rank 2": (latent_body(ONE, prompt=None, prompt_embeds=torch.zeros(1, 4)), "must have rank 3"),
    "embeddings of another width": (
        latent_body(ONE, prompt=None, prompt_embeds=torch.zeros(1, 4, 7)),
        "takes a text's embeddings of width 32, and encoder_hidden_states has 7",
    ),
    "embeddings of NaN": (
        latent_body(ONE, prompt=None, prompt_embeds=torch.full((1, 4, 32), torch.nan)),
        "prompt_embeds holds NaN",
    ),
}


@pytest.mark.parametrize("case", LATENTS)
def test_latents(running, case):
    body, sentence = LATENTS[case]
    status, answer = ask(f"{running.url}/v1/score", "POST", body, V1)
    assert status in (400, 422)
    assert sentence in answer["detail"]
    assert ask(f"{running.url}/v1/score", "POST", WHOLE, V1)[0] == 200


def turn(**fields):
    return {"requests": [{"history": [{"text": "a cat", **fields}], "required_rewards": ["prism"]}]}


PNG = recorded("flow-factory-image.http")[2].decode().split('"image": ["')[1].split('"')[0]
SMALL = "iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAC0lEQVR4nGNgwAQAABQAAX3+Hu4AAAAASUVORK5CYII="  # 2 x 3
CLIPS = {
    "no JSON": ("/score", b"{", "is no JSON"),
    "no object": ("/score", [], "send a JSON object"),
    "pickle": ("/score", pickle.dumps(Bomb()), "is never loaded"),
    "nested": ("/compute", b"[" * 100_000, "is no JSON (nested too deeply)"),
    "many parts": ("/compute", b"[" + b"," * 1_000_000, "parts, of at most"),
    "a number that is long": ("/compute", b'{"prompt":' + b"1" * 10_000 + b"}", "is no JSON"),
    "NaN": ("/compute", b'{"prompt":NaN}', "NaN is no number"),
    "not UTF-8": ("/compute", b'{"prompt":"\xff"}', "is no JSON"),
    "no requests": ("/score", {}, "requests must be a list"),
    "no history": ("/score", {"requests": [{"history": [], "required_rewards": []}]}, "history is empty"),
    "unknown reward": ("/score", {"requests": [{"history": [{}], "required_rewards": ["x"]}]}, "no reward x"),
    "a path": ("/score", turn(video_path="/etc/passwd"), "no file of this machine is opened"),
    "text alone": ("/score", turn(), "neither image_b64 nor video_b64"),
    "no base64": ("/score", turn(video_b64="***"), "no base64"),
    "no video": ("/score", turn(video_b64=base64.b64encode(b"hello" * 99).decode()), "The video of 495 bytes"),
    "a list of files": ("/score", turn(video_b64=base64.b64encode(b"ffconcat version 1.0\nfile /x").decode()), "video"),
    "a picture for a video": ("/score", turn(image_b64=PNG), "frame"),
    "a number for a video": ("/score", turn(video_b64=3), "must be a text in base64"),
    "an image for a text model": (
        "/score",
        {"requests": [{"history": [{"text": "a cat", "image_b64": PNG}] * 2, "required_rewards": ["prism"]}]},
        "WanPipeline takes none",
    ),
    "nothing to score": ("/compute", {"prompt": ["a cat"]}, "neither of video and image"),
    "both": ("/compute", {"prompt": ["a cat"], "video": [[PNG]], "image": [PNG]}, "both of video and image"),
    "one missing": ("/compute", {"prompt": ["a cat"] * 2, "video": [[PNG]]}, "2 prompts and 1 of video"),
    "no prompts": ("/compute", {"prompt": [], "video": []}, "0 prompts"),
    "an empty prompt": ("/compute", {"prompt": [""], "video": [[PNG] * 9]}, "prompt is empty"),
    "no frames": ("/compute", {"prompt": ["a cat"], "video": [[]]}, "0 frames"),
    "too few frames": ("/compute", {"prompt": ["a cat"], "video": [[PNG] * 3]}, "9"),
    "frames of numbers": ("/compute", {"prompt": ["a cat"], "video": [[1] * 9]}, "must be a text in base64"),
    "frames of two sizes": ("/compute", {"prompt": ["a cat"], "video": [[PNG] * 8 + [SMALL]]}, "is 2 x 3, and those"),
    "frames of nothing": ("/compute", {"prompt": ["a cat"], "video": [["AAAA"] * 9]}, "picture"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_clips(running, case):
    path, body, sentence = CLIPS[case]
    status, answer = ask(running.url + path, "POST", body if isinstance(body, bytes) else json.dumps(body))
    assert status in (400, 422)
    assert sentence in answer["detail"]


def test_requests_of_another_kind(running):
    assert ask(f"{running.url}/v1/score", "POST", WHOLE)[0] == 400
    assert "found 2." in ask(f"{running.url}/v1/score", "POST", WHOLE, {"x-drm-protocol-version": "2"})[1]["detail"]
    assert ask(f"{running.url}/v1/score")[0] == 405
    assert ask(f"{running.url}/v1/score/", "POST", WHOLE, V1)[0] == 200  # and no redirect, which few clients follow
    assert ask(f"{running.url}/v2/score", "POST", WHOLE, V1)[0] == 404
    assert ask(f"{running.url}/judges/nobody/v1/score", "POST", WHOLE, V1)[0] == 404
    assert "There is no judge nobody" in ask(f"{running.url}/compute?judge=nobody", "POST", b"{}")[1]["detail"]
    assert b" 400 " in raw(running.url, b"\x16\x03\x01\x02\x00\x01" + bytes(50) + b"\r\n\r\n")  # TLS
    assert b" 400 " in raw(running.url, b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n")
    assert b" 400 " in raw(running.url, b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000)


def test_bodies_that_are_too_large(running):
    start = b"POST /score HTTP/1.1\r\nhost: x\r\n"
    assert b" 413 " in raw(running.url, start + b"content-length: 99999999999\r\n\r\n")
    assert b" 413 " in raw(running.url, start + b"content-length: 2000000\r\n\r\n" + bytes(2_000_000))
    chunk = b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n"
    assert b" 413 " in raw(running.url, start + b"transfer-encoding: chunked\r\n\r\n" + 2 * chunk + b"0\r\n\r\n")
    assert replay(running.url, "flow-factory-videos.http")[0] == 200


@pytest.fixture(scope="module")
def hasty(scorers):
    """A service that waits half a second for what is sent, and holds few bytes."""
    listening = Running(
        Service(scorers),
        bind(port=0),
        limits=Limits(body=2**16, bodies=2**16, elements=20_000, body_seconds=0.5),
        header_seconds=0.5,
    )
    listening.start()
    yield listening
    listening.stop(60)


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/score HTTP/1.1\r\nhost", b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"]
)
def test_senders_that_are_slow(hasty, sent):
    assert b" 408 " in raw(hasty.url, sent)


def test_bodies_that_are_too_many_together(hasty):
    address = urlsplit(hasty.url)
    first = socket.create_connection((address.hostname, address.port))
    first.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 60001\r\n\r\n" + bytes(60_000))
    deadline = time.monotonic() + 30
    while ask(f"{hasty.url}/score", "POST", bytes(30_000))[0] != 503:
        assert time.monotonic() < deadline
        if time.monotonic() > deadline - 29:  # the first was given up for being slow
            first = socket.create_connection((address.hostname, address.port))
            first.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 60001\r\n\r\n" + bytes(60_000))
    first.close()


def test_a_client_that_leaves_is_forgotten(running):
    address = urlsplit(running.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
    deadline = time.monotonic() + 60
    while "prism_body_bytes 0.0" not in ask(f"{running.url}/metrics")[1]:
        assert time.monotonic() < deadline


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bodies_are_refused_before_they_are_loaded(scorers, data):
    body = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 400))
        body[place] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.sampled_from([len(body), len(body), 300, 20]))])
    with contextlib.suppress(PrismError):
        rows = tensors.rows_of(cut, scorers["prism"], 20_000)
        assert rows[0].latents.shape == ONE.shape  # numbers or the prompt were changed
        assert 0 <= rows[0].t <= 1000


def test_the_header_agrees_with_what_safetensors_loads():
    made = {"a": torch.zeros(2, 3).half(), "b": torch.zeros(0, dtype=torch.int64), "c": torch.zeros(()).bfloat16()}
    described, metadata = tensors.header_of(save(made, metadata={"prompt": "a cat"}))
    assert described == {"a": ("F16", (2, 3)), "b": ("I64", (0,)), "c": ("BF16", ())}
    assert metadata == {"prompt": "a cat"}
