"""Damage done to folders at random: JSON, safetensors, plain bytes, and things that are no files at all.

`damage(folder, random)` changes one file and says how; `outcome(action)` tells what came of reading it. The fuzzers in
tests/fuzz run a few of each kind with hypothesis, `benchmarks/fuzz.py` as many as one likes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism.errors import PrismError

LONGEST = 500  # characters of a sentence
SECONDS = 20  # after which a reader is said to hang
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**6, 10**9, 10**30, -(10**9), 0.5, 1.5, -0.0, 1e-300, 1e308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        " ",
        "2",
        "text",
        "x" * 5000,
        "\ud800",
        "a\nb",
        "\x00",
        "../..",
        "é",
    ),
    *([], {}, [None], [[]], [1, 2], ["a", "a"], {"a": {}}, {"a": [1]}, [{"tap": 1}]),
]
BYTES = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1, "BF16": 2, "F16": 2, "I64": 8, "F64": 8, "C64": 8}
DTYPES = ["F8_E4M3", "F8_E5M2", "F4", "I64", "I8", "U8", "BOOL", "C64", "BF16", "F16", "F64", "F32", "X", "", 3, None]


def damage(folder: Path, random: Random, files: list[str] | None = None) -> str:
    """Change one of the files below `folder` (or one of `files`), and say what was done."""
    names = files or sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    name = random.choice(names)
    path = folder / name
    kinds: list[Callable[[Path, Random], str]] = [of_bytes]
    if name.endswith((".json", ".jsonl")):
        kinds = [of_json] * 8 + [of_bytes, of_json_text]
    elif name.endswith(".safetensors"):
        kinds = [of_safetensors] * 6 + [of_bytes]
    elif name.endswith(".parquet"):
        kinds = [of_parquet] * 6 + [of_bytes]
    kind = special if random.random() < 0.06 else random.choice(kinds)
    return f"{name}: {kind(path, random)}"


# -- JSON


def of_json(path: Path, random: Random) -> str:
    """One value of a JSON file made another one, renamed, removed or nested, once or a few times."""
    value = json.loads(path.read_text(encoding="utf-8"))
    told = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        value, what = mutated(value, random)
        told.append(what)
    path.write_text(json.dumps(value), encoding="utf-8")
    return "; ".join(told)


def mutated(value: Any, random: Random) -> tuple[Any, str]:
    """A JSON value with one place in it changed, and how."""
    places = list(_places(value))
    if not places or random.random() < 0.02:
        odd = json.loads(json.dumps(random.choice(ODD)))
        return odd, f"the whole is {_short(odd)}"
    holder, key = random.choice(places)
    label, old = f"{key!r}", holder[key]
    action = random.randrange(10)
    if action == 0:
        del holder[key]
        return value, f"{label} removed"
    if action == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
        return value, f"{label} renamed"
    if action == 2:
        holder[key] = [old] if random.random() < 0.5 else {"a": old}
        return value, f"{label} nested"
    if action == 3:
        for _ in range(random.choice([3, 50, 900])):
            old = [old]
        holder[key] = old
        return value, f"{label} nested deeply"
    if action == 4 and isinstance(old, list) and old:
        holder[key] = old * random.choice([2, 50])
        return value, f"{label} repeated"
    if action == 5 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = random.choice([old + 1, old - 1, old * 2, old // 2, -old, str(old), float(old), old * 10**7])
        return value, f"{label} is {_short(holder[key])}"
    holder[key] = json.loads(json.dumps(random.choice(ODD)))
    return value, f"{label} is {_short(holder[key])}"


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value but those deep down; of long lists the first few items alone."""
    keys: Any = list(value) if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else ()
    for key in keys if depth < 20 else ():
        yield value, key
        yield from _places(value[key], depth + 1)


def of_json_text(path: Path, random: Random) -> str:
    """JSON that no `json.dumps` would write."""
    text = path.read_text(encoding="utf-8")
    forms = {
        "brackets without end": "[" * 100_000,
        "brackets in brackets": '{"a":' * 5000 + "1" + "}" * 5000,
        "a number of 5000 digits": text.replace("1", "1" * 5000, 1),
        "a number beyond floats": text.replace("1", "1e999", 1),
        "a byte-order mark": "\ufeff" + text,
        "two documents": text + text,
        "a comment": "// " + text,
        "single quotes": text.replace('"', "'"),
    }
    name = random.choice(sorted(forms))
    path.write_text(forms[name], encoding="utf-8")
    return name


# -- safetensors


def of_safetensors(path: Path, random: Random) -> str:
    """Another header, other numbers, or a tensor that is not there, not named so, or not of this shape or dtype."""
    header, body = _parts(path.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return of_bytes(path, random)
    name = random.choice(names)
    entry = header[name]
    action = random.randrange(9)
    if action == 0:
        del header[name]
        told = f"{name} removed"
    elif action == 1:
        header[f"{name}_"] = header.pop(name)
        told = f"{name} renamed"
    elif action in (2, 3):
        entry["dtype"] = random.choice(DTYPES)
        told = f"{name} in {entry['dtype']}"
        size = {
            "F8_E4M3": 1,
            "F8_E5M2": 1,
            "I8": 1,
            "U8": 1,
            "BOOL": 1,
            "BF16": 2,
            "F16": 2,
            "I64": 8,
            "F64": 8,
            "C64": 8,
        }
        if random.random() < 0.7 and entry["dtype"] in size:  # a file that is whole, as its writer would make it
            body, header = _rewritten(header, body, name, size[entry["dtype"]], random)
    elif action == 4:
        entry["shape"] = random.choice(
            [[], [0], [1], entry["shape"][::-1], entry["shape"] + [1], [2**62, 4], [-1], "x"]
        )
        told = f"{name} of shape {entry['shape']}"
    elif action == 5:
        start, stop = entry["data_offsets"]
        number = struct.pack("<f", random.choice([float("nan"), float("inf"), -float("inf"), 1e38, -0.0, 1e-45]))
        at = start + 4 * random.randrange(max(1, (stop - start) // 4))
        body = body[:at] + number + body[at + 4 :]
        told = f"{name} holds {struct.unpack('<f', number)[0]}"
    elif action == 6:
        header, told = mutated(header, random)
        told = f"header: {told}"
    elif action == 7:
        body = body[: random.randrange(len(body) + 1)]
        told = f"cut to {len(body)} bytes"
    else:
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += b"\0\0\0\0"
        told = "a tensor more"
    with contextlib.suppress(ValueError, TypeError):
        _join(path, header, body)
    return told


def _rewritten(
    header: dict[str, Any], body: bytes, name: str, size: int, random: Random
) -> tuple[bytes, dict[str, Any]]:
    parts, place = [], 0
    ordered = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    for each in ordered:
        start, stop = header[each]["data_offsets"]
        data = body[start:stop]
        if each == name:
            count = 1
            for extent in header[each]["shape"]:
                count *= extent
            data = bytes(random.getrandbits(1) for _ in range(count * size))
        header[each]["data_offsets"] = [place, place + len(data)]
        place += len(data)
        parts.append(data)
    return b"".join(parts), header


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(path: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# -- Parquet


STRANGE: list[Callable[[int], pa.Array]] = [
    lambda n: pa.array([None] * n),
    lambda n: pa.array([None] * n, pa.string()),
    lambda n: pa.array(["text"] * n),
    lambda n: pa.array([f"a {i}\n" * 400 for i in range(n)]),
    lambda n: pa.array([[1, 2]] * n),
    lambda n: pa.array([{"a": 1}] * n),
    lambda n: pa.array([b"\xff\xfe"] * n),
    lambda n: pa.StringArray.from_buffers(
        n, pa.array(list(range(n + 1)), pa.int32()).buffers()[1], pa.py_buffer(b"\xff" * n)
    ),
    lambda n: pa.array(range(n), pa.int64()),
    lambda n: pa.array([2**40 + i for i in range(n)], pa.int64()),
    lambda n: pa.array([2**64 - 1] * n, pa.uint64()),
    lambda n: pa.array([-1] * n, pa.int8()),
    lambda n: pa.array([7] * n, pa.int8()),
    lambda n: pa.array([0.5] * n),
    lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array([True] * n),
    lambda n: pa.array([0] * n, pa.timestamp("us")),
    lambda n: pa.array(["test"] * n).dictionary_encode(),
    lambda n: pa.array([0] * n, pa.decimal128(5, 2)),
]


def of_parquet(path: Path, random: Random) -> str:
    """A column removed, renamed, doubled or of another type, a value in it made another one, or rows lost."""
    table = pq.read_table(path)
    name = random.choice(table.column_names)
    place = table.column_names.index(name)
    values = table[name].to_pylist()
    action = random.randrange(8)
    if action == 0:
        table, told = table.drop_columns([name]), f"{name} removed"
    elif action == 1:
        table, told = table.rename_columns([f"{n}_" if n == name else n for n in table.column_names]), f"{name} renamed"
    elif action == 2:
        table, told = table.slice(random.randrange(len(table) + 1)), "rows lost"
    elif action == 3:
        table, told = table.append_column(name, table[name]), f"{name} twice"
    elif action in (4, 5):
        odd = random.randrange(len(STRANGE))
        table, told = table.set_column(place, name, STRANGE[odd](len(table))), f"{name} is strange column {odd}"
    else:
        odds = [None, -1, 7, 10**12, 1.5, float("nan"), "text", "", "\x00", [1], {"a": 1}, b"\xff", True]
        value = random.choice(odds)
        told = f"{name} holds {_short(value)}"
        rows = range(len(values)) if random.random() < 0.5 else [random.randrange(len(values))]
        for row in rows:
            values[row] = value
        try:
            column = pa.array(values)
        except (pa.ArrowException, TypeError):  # two types in one column
            column = pa.array([str(each) for each in values])
        table = table.set_column(place, name, column)
    pq.write_table(table, path)
    return told


# -- any file


def of_bytes(path: Path, random: Random) -> str:
    """Bytes flipped, cut off, emptied, doubled, or those of another kind of file."""
    data = path.read_bytes()
    at = random.randrange(len(data)) if data else 0
    flipped = bytes([(data[at] if data else 0) ^ (1 << random.randrange(8))])
    forms: dict[str, bytes] = {
        f"byte {at} flipped": data[:at] + flipped + data[at + 1 :],
        f"cut at {at}": data[:at],
        "empty": b"",
        "twice": data * 2,
        "zeros": bytes(len(data)),
        "a pickle": pickle.dumps({"a": 1}),
        "a zip archive": b"PK\x03\x04" + data[4:],
        "not UTF-8": b"\xff\xfe" + data,
        "a header of 2^62 bytes": struct.pack("<Q", 2**62) + data[8:],
        "random bytes": bytes(random.getrandbits(8) for _ in range(64)),
        "HTML": b"<!doctype html><title>404</title>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    name = random.choice(list(forms))
    path.write_bytes(forms[name])
    return name


def special(path: Path, random: Random) -> str:
    """Something in the file's place that is no regular file: a reader that opens it may never come back."""
    path.unlink()
    kind = random.choice(["fifo", "folder", "socket", "loop", "device", "endless device", "nowhere", "missing"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, contextlib.suppress(OSError):  # a path that is too long
            made.bind(str(path))
    elif kind != "missing":
        target = {"loop": path.name, "device": "/dev/null", "endless device": "/dev/zero", "nowhere": "not-there"}[kind]
        path.symlink_to(target)
    return f"a {kind} in its place"


def copied(source: Path, target: Path) -> Path:
    """`target`, made a fresh copy of `source`."""
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target


# -- what comes of it


class Hang(BaseException):
    """Raised by the watchdog: no reader may catch it as an error of its own."""


@contextlib.contextmanager
def watchdog(seconds: int = SECONDS) -> Iterator[None]:
    """Raises `Hang` in the block after so many seconds."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(action: Callable[[], Any], seconds: int = SECONDS) -> tuple[str, str]:
    """What came of it: "fine", "sentence", or what is wrong ("raw", "long", "hang"), and the words."""
    try:
        with watchdog(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except PrismError as error:
        text = str(error)
        return ("sentence" if len(text) <= LONGEST and text.isprintable() else "long"), text
    except Hang:
        return "hang", traceback.format_exc(limit=-6)
    except Exception as error:  # what the fuzzers look for
        return "raw", f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    return "fine", ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
