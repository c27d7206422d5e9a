"""The conditionings of training prompts: each captured once per run, kept on disk, read back when a batch needs it.

They are kept in a temporary file, or for later runs too in the store (`prism.training.kept_conditionings`).
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone, Conditioning, Ragged
from prism.backbone.conditioning import compacted, tensors_of, with_tensors
from prism.backbone.denoiser_call import flattened
from prism.errors import PrismError, quoted
from prism.evaluation.evaluator import check_call
from prism.preference import LatentStore, PromptGroup
from prism.team import Team, in_batches, ran_out
from prism.training.kept_conditionings import KeptConditionings

CHUNK = 16  # prompts that are encoded together


def conditioned(
    backbone: Backbone, store: LatentStore, prompts: Sequence[str], call: Mapping[str, Any]
) -> Conditioning | Ragged:
    """The conditionings of prompts under a call of the store's. Raises PrismError for one that the pipeline rejects."""
    try:
        return backbone.condition(prompts, **call)
    except Exception as error:
        if not ran_out(error):
            check_call(backbone, store, prompts[0], call)
        raise


def check_bare(backbone: Backbone, prompt: str, call: Mapping[str, Any], what: str) -> None:
    """Refuse what has no image of its own, named `what`, where the pipeline does nothing without one."""
    if backbone.takes("image") and call.get("image") is None:
        try:
            backbone.condition([prompt], **call)
        except PrismError as error:
            raise PrismError(
                f"{what} has no image, and {type(backbone.pipe).__name__} needs one; name it in a column image "
                f"({quoted(error, 160)})."
            ) from error


@dataclass(frozen=True)
class _Form:
    """A row's conditioning without the tensors of its own (they are on the device "meta"), and where each belongs."""

    conditioning: Conditioning
    devices: tuple[torch.device, ...]


class Conditionings:
    """The conditionings of the prompts of groups, under the calls and images of their videos.

    Prompts are encoded `CHUNK` at a time, in an order that depends on the groups alone, so that a resumed run reads the
    same bits. What was encoded lies in an unnamed file in the folder for temporary files (TMPDIR), which ends with the
    process: host memory holds a few numbers per prompt.

    kept: a folder that rows are read from where they are there, and else written to in place of the unnamed file.
        Prompts that it lacks are encoded `CHUNK` at a time. A file that turns out damaged is made again.
    team: the processes that share the run, which go by what the first of them saw in that folder, so that all encode
        the same prompts together.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: LatentStore,
        groups: Sequence[PromptGroup],
        kept: KeptConditionings | None = None,
        team: Team | None = None,
    ) -> None:
        self.backbone, self.store, self.groups, self._kept = backbone, store, groups, kept
        kinds = (np.unique(store.kinds(group.videos)) for group in groups)
        codes = [of_group * len(groups) + index for index, of_group in enumerate(kinds)]
        self._codes = np.sort(np.concatenate(codes))  # by kind, then by group
        self._offsets = np.full(len(self._codes), -1, dtype=np.int64)
        self._form_of = np.zeros(len(self._codes), dtype=np.int32)
        self._forms: dict[str, int] = {}
        self._known_forms: list[_Form] = []
        self._in_folder = np.zeros(len(self._codes), dtype=bool)
        if kept is not None:
            self._in_folder = (team or Team()).on_first(lambda: self._listed(kept))
        self._was_in_folder = self._in_folder.copy()  # when the run began, which decides what is encoded together
        self._file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # as long as this lives
        self._size = 0
        weakref.finalize(self, self._file.close)

    def capture(self) -> None:
        """Encode all prompts now, as suits pipelines whose models are offloaded: the text encoder moves once."""
        for position in range(len(self._codes)):
            self._need(position)

    def of(self, indices: Sequence[int], kind: int = 0) -> Conditioning | Ragged:
        """A row for each of some indices of groups, under the call of videos of a kind."""
        positions = np.searchsorted(self._codes, kind * len(self.groups) + np.asarray(indices)).tolist()
        rows = {position: self._row(position) for position in dict.fromkeys(positions)}
        return Conditioning.cat([rows[position] for position in positions])

    def _listed(self, kept: KeptConditionings) -> np.ndarray:
        """Whether each row is in the folder, (rows,) bool."""
        if kept.empty:
            return self._in_folder
        there = (kept.has(kept.name(*self._text(position))) for position in range(len(self._codes)))
        return np.fromiter(there, dtype=bool, count=len(self._codes))

    def _text(self, position: int) -> tuple[str, dict[str, Any]]:
        """The prompt of a row, and the call of its videos."""
        kind, index = divmod(int(self._codes[position]), len(self.groups))
        group = self.groups[index]
        return group.prompt, self.store.call_of(group.videos[int(np.argmax(self.store.kinds(group.videos) == kind))])

    def _row(self, position: int) -> Conditioning:
        self._need(position)
        if self._kept is not None and self._in_folder[position]:
            kept_row = self._kept.read(self._kept.name(*self._text(position)))
            if kept_row is not None:
                return kept_row
            self._capture([position], again=True)
            self._in_folder[position] = False
        form = self._known_forms[self._form_of[position]]
        self._file.seek(int(self._offsets[position]))
        devices = iter(form.devices)

        def back(value: Tensor) -> Tensor:
            return (self._read(value) if value.is_meta else value).to(next(devices))

        row: Conditioning = with_tensors(form.conditioning, back)
        return row

    def _need(self, position: int) -> None:
        """Encode the chunk of prompts that one is in, unless that was done."""
        if self._offsets[position] >= 0 or self._in_folder[position]:
            return
        count = len(self.groups)
        kind = int(self._codes[position]) // count
        start, end = np.searchsorted(self._codes, [kind * count, (kind + 1) * count]).tolist()
        missing = start + np.flatnonzero(~self._was_in_folder[start:end])
        first = int(np.searchsorted(missing, position)) // CHUNK * CHUNK
        in_batches(missing[first : first + CHUNK].tolist(), CHUNK, self._capture, "encoding prompts")

    def _capture(self, positions: Sequence[int], again: bool = False) -> None:
        """Encode prompts; `again`: their files were damaged, and this run reads the unnamed file in their place."""
        _, call = self._text(positions[0])
        prompts = [self.groups[int(self._codes[position]) % len(self.groups)].prompt for position in positions]
        rows = conditioned(self.backbone, self.store, prompts, call)
        before, kept = self._size, self._kept
        unwritten = kept is not None and not kept.written
        for row, position in enumerate(positions):
            if kept is not None and kept.keep(kept.name(prompts[row], call), rows[row]) and not again:
                self._in_folder[position] = True
            else:
                self._keep(position, rows[row])
        self.backbone.forget()
        if not before and not again:
            self._check_space(len(positions))
        if kept is not None and unwritten and kept.written:
            kept.check_space(len(positions), int((~self._in_folder & (self._offsets < 0)).sum()))

    def _keep(self, position: int, row: Conditioning) -> None:
        flat = flattened(row.arguments)
        of_row = [flat[path] for path in sorted(row.batched)], *row._tensor_fields().values()
        of_row_alone = {id(value) for value in tensors_of(of_row)}
        described = with_tensors(row, partial(_described, of_row_alone))
        number = self._forms.setdefault(repr(described), len(self._forms))
        if number == len(self._known_forms):  # tensors that all rows share stay in memory, once
            form = with_tensors(
                row, lambda v: v.to("meta") if id(v) in of_row_alone else compacted(v).to("cpu", copy=True)
            )
            self._known_forms.append(_Form(form, tuple(value.device for value in tensors_of(row))))
        offset = self._size
        self._file.seek(offset)
        for value in tensors_of(row):
            if id(value) in of_row_alone:
                self._write(value)
        self._offsets[position], self._form_of[position] = offset, number

    def _write(self, value: Tensor) -> None:
        content = memoryview(_bytes(value))
        try:
            while content:
                written = self._file.write(content)
                self._size += written
                content = content[written:]
        except OSError as error:
            raise self._no_room(str(error.strerror)) from error

    def _read(self, like: Tensor) -> Tensor:
        value = torch.empty(like.shape, dtype=like.dtype)
        content = memoryview(_bytes(value))
        while content:
            count = self._file.readinto(content)
            if not count:
                raise PrismError("The temporary file of encoded prompts was cut short; start again with --resume.")
            content = content[count:]
        return value

    def _check_space(self, done: int) -> None:
        """Refuse to begin where the file would not fit, judged by the first prompts."""
        needed, free = self._size / done * (len(self._codes) - done), shutil.disk_usage(tempfile.gettempdir()).free
        if needed > free:
            raise self._no_room(f"about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free")

    def _no_room(self, reason: str) -> PrismError:
        return PrismError(
            f"The encodings of {len(self._codes)} prompts find no room in {tempfile.gettempdir()} ({reason}); set "
            "TMPDIR to a folder with more, and start again."
        )


def _bytes(value: Tensor) -> Any:
    """The bytes of a tensor; of a contiguous one in host memory they are not copied."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _described(of_row_alone: set[int], value: Tensor) -> Any:
    """A text that is equal for tensors that may stand for each other in a form."""
    text = f"{value.dtype} {tuple(value.shape)} {value.device}"
    return text if id(value) in of_row_alone else f"{text} {hashlib.sha256(_bytes(value)).hexdigest()}"
