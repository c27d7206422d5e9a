"""Conditionings kept in a store's folder, a file per prompt and call, for later trainings: no text is encoded twice.

    STORE/conditionings/KEY/identity.json             what the files depend on; KEY is its SHA-256
    STORE/conditionings/KEY/NAME.safetensors          a row's tensors by path, and JSON of all else in the metadata
    STORE/conditionings/KEY/shared-SHA.safetensors    a large tensor that rows share, such as rotary frequencies

NAME is the SHA-256 of prompt, call and image. The folder may be deleted at any time; another text encoder has another
KEY. Files appear whole, so that several processes may keep and read the same ones. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from prism import files, temporary
from prism.backbone import Backbone, Conditioning
from prism.backbone.conditioning import tensors_of
from prism.backbone.denoiser_call import flattened
from prism.backbone.dependencies import dependencies
from prism.errors import PrismError, quoted
from prism.preference import images
from prism.team import Team, ran_out

FOLDER, SCHEMA = "conditionings", 1
SHARED = 1 << 16
"""Bytes from which a tensor that all rows share gets a file of its own."""
_PLAIN = (str, int, float, bool, type(None))
_SEQUENCES = {"list": list, "tuple": tuple, "size": torch.Size}


class KeptConditionings:
    """The folder of a store's conditionings under one backbone. Its `written` are the bytes that this process wrote.

    Raises PrismError where the folder cannot be made.
    """

    def __init__(self, backbone: Backbone, store: Path, team: Team) -> None:
        self.backbone, self.written = backbone, 0
        self._shared: dict[str, Tensor] = {}
        self._warned = False
        self.folder = team.on_first(lambda: _made(backbone, store))

    def name(self, prompt: str, call: Mapping[str, Any]) -> str:
        """The name of a row's file. Files that the call names, as its image, count by their content."""
        of_files = {key: _sha256(value) for key, value in call.items() if isinstance(value, str) and isfile(value)}
        text = json.dumps([prompt, {**call, **of_files}, sorted(of_files)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def empty(self) -> bool:
        return next(self.folder.glob("*.safetensors"), None) is None

    def has(self, name: str) -> bool:
        """Whether a row was kept; whether its file is whole, `read` says."""
        return self._path(name).is_file()

    def keep(self, name: str, row: Conditioning) -> bool:
        """Write a row's file; False, with one warning a run, where it holds what neither a tensor nor JSON can."""
        try:
            file = _File(self.backbone.device, row)
            content = file.content(name)
        except Exception as error:
            if ran_out(error):
                raise
            if not self._warned:
                reason = f"{type(self.backbone.pipe).__name__} passes its denoiser {quoted(error, 120)}"
                warnings.warn(f"Conditionings are not kept in {self.folder}: {reason}.", stacklevel=2)
            self._warned = True
            return False
        for digest, value in file.shared.items():
            self._share(digest, value)
        self._write(self._path(name), content)
        return True

    def read(self, name: str) -> Conditioning | None:
        """A row, compared with its checksum; None, with a warning, where its file is missing or damaged."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as opened:
                notes = opened.metadata()
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118  # no dict
            described = json.loads(notes["conditioning"])
            if _checksum(name, notes["conditioning"], tensors) != notes["sha256"]:
                raise ValueError("its checksum is another")
            values = {key: self._built(each, tensors) for key, each in described.items()}
            row = Conditioning(**values)
            if len(row) != 1 or not row.batched <= flattened(row.arguments).keys():
                raise ValueError("it is not of one row")
            return row
        except Exception as error:
            if ran_out(error):
                raise
            warnings.warn(
                f"The file {path} is damaged ({quoted(error, 120)}); its prompt is encoded again.", stacklevel=2
            )
            return None

    def check_space(self, done: int, left: int) -> None:
        """Say what the files of the rows that are left will take, judged by those of `done` rows; refuse what the disk
        does not hold."""
        needed, free = self.written / done * left, shutil.disk_usage(self.folder).free
        if needed > free:
            raise PrismError(
                f"The conditionings of {left} more prompts would take about {needed / 1e9:.1f} GB in {self.folder}, "
                f"and {free / 1e9:.1f} GB are free; make room, or leave out --keep-conditionings."
            )
        size = f"{self.written / done / 1e6:.2g} MB a prompt, about {needed / 1e9:.2g} GB more"
        print(f"prism: conditionings are kept in {self.folder}, {size}", file=sys.stderr, flush=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        try:
            with files.new_file(path) as work:
                work.write_bytes(content)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.written += len(content)

    def _share(self, digest: str, value: Tensor) -> None:
        if digest not in self._shared:
            try:
                self._load(digest)
            except Exception as error:  # not there yet, or damaged
                if ran_out(error):
                    raise
                self._write(self._path(f"shared-{digest}"), save({"tensor": value}))
                self._shared[digest] = value

    def _load(self, digest: str) -> Tensor:
        """A tensor that rows share, which stays in memory."""
        if digest not in self._shared:
            with safe_open(self._path(f"shared-{digest}"), framework="pt") as opened:
                value = opened.get_tensor("tensor").clone()
            if _digest(value) != digest:
                raise ValueError(f"the checksum of shared-{digest[:8]}... is another")
            self._shared[digest] = value
        return self._shared[digest]

    def _built(self, described: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The inverse of `_File.described`."""
        if isinstance(described, _PLAIN):
            return described
        ((kind, value),) = described.items()
        if kind == "tensor":
            tensor = self._load(value["shared"]) if "shared" in value else tensors[value["name"]]
            return tensor.to(value["device"] or self.backbone.device)
        if kind == "dtype":
            return getattr(torch, value)
        if kind == "dict":
            return {key: self._built(each, tensors) for key, each in value}
        if kind == "conditioning":
            return Conditioning(**{key: self._built(each, tensors) for key, each in value})
        if kind == "names":
            return frozenset(value)
        return _SEQUENCES[kind]([self._built(each, tensors) for each in value])


class _File:
    """A row on its way into a file: `tensors` by path, in host memory, and those in files of their own, `shared`.

    Raises TypeError for a value that is kept neither as a tensor nor as JSON.
    """

    def __init__(self, device: torch.device, row: Conditioning) -> None:
        self.device, self.tensors, self.shared = device, dict[str, Tensor](), dict[str, Tensor]()
        flat, of_fields = flattened(row.arguments), (*row._tensor_fields().values(), row.control)
        self._of_row = {id(value) for value in tensors_of([*(flat[path] for path in row.batched), *of_fields])}
        of_row = {each.name: self.described(getattr(row, each.name), each.name) for each in fields(row)}
        self.text = json.dumps(of_row)

    def content(self, name: str) -> bytes:
        """The whole file, whose checksum is of its name too."""
        notes = {"conditioning": self.text, "sha256": _checksum(name, self.text, self.tensors)}
        return save(self.tensors, notes)

    def described(self, value: Any, path: str) -> Any:
        """A value as JSON, its tensors by name: plain ones as they are, all others as {kind: content}."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, path)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is dict and all(type(key) is str for key in value):
            return {"dict": [[key, self.described(each, f"{path}.{key}")] for key, each in value.items()]}
        if kind is frozenset and all(type(each) is str for each in value):
            return {"names": sorted(value)}
        if kind is Conditioning:  # of a ControlNet
            of_fields = [(each.name, getattr(value, each.name)) for each in fields(value)]
            return {"conditioning": [[name, self.described(each, f"{path}.{name}")] for name, each in of_fields]}
        for name, sequence in _SEQUENCES.items():
            if kind is sequence:
                return {name: [self.described(each, f"{path}.[{place}]") for place, each in enumerate(value)]}
        raise TypeError(f"{path}, a {kind.__name__}")

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"{path}, a {type(value).__name__} that is not dense")
        device = None if _same_device(value.device, self.device) else str(value.device)
        plain = value.detach().to("cpu", copy=True).contiguous().resolve_conj().resolve_neg()
        if id(value) not in self._of_row and plain.nbytes >= SHARED:
            digest = _digest(plain)
            self.shared[digest] = plain
            return {"shared": digest, "device": device}
        name = path if path not in self.tensors else f"{path}.{len(self.tensors)}"
        self.tensors[name] = plain
        return {"name": name, "device": device}


def _made(backbone: Backbone, store: Path) -> Path:
    """The folder of a backbone's conditionings, without what killed processes left in it."""
    identity = {"format": "prism-conditionings", "schema": SCHEMA, **dependencies(backbone)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = store / FOLDER / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.sweep(folder)
        if not (folder / "identity.json").is_file():
            files.write_json(folder / "identity.json", identity)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _unwritable(folder: Path, error: OSError) -> PrismError:
    return PrismError(
        f"The conditionings cannot be kept in {folder} ({error.strerror or error}); make room or give write "
        "permission, or leave out --keep-conditionings and go on with --resume."
    )


def _sha256(path: str) -> str:
    """The SHA-256 of a file; an image of the store, which has checked it, is named by it."""
    named = images.NAME.fullmatch(Path(path).name)
    return named[1] if named else files.sha256(path)


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one == other or (one.type == other.type and None in (one.index, other.index))


def _checksum(name: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a row: of its name, its JSON, and of each tensor's name and content."""
    parts = [name, text, *(f"{key} {_digest(value)}" for key, value in sorted(tensors.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(value: Tensor) -> str:
    """SHA-256 of the dtype, shape and numbers of a contiguous tensor in host memory."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    content: Any = value.flatten().view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()
