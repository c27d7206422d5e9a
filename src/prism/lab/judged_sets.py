"""ShapeWorld videos that many backbones judge: from all of them in equal parts, and from none of them.

Each set is a store with training and test pairs, labelled by the referee. `quality` is the referee's mean of each
backbone's videos of the test prompts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from prism import files, shapeworld
from prism.errors import whole
from prism.lab.correlation import PerPrompt
from prism.lab.judging_power import Subject, file_name
from prism.preference import LatentStore, pairs_from_scores, write_store
from prism.runs import Clock, Parts
from prism.sampling.trajectory import candidate_seed
from prism.shapeworld import candidates, corruptions, generator, grammar, referee

OWN, NOBODYS = "own", "nobodys"
"""The set of videos from the backbones themselves, and that of renders."""
STRENGTHS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Of the faults of a prompt's renders, one each."""


@dataclass(frozen=True)
class Videos:
    """How many videos there are.

    train, test: prompts of each set. each: videos of a prompt by one backbone; a prompt has those of two. All backbones
    sample as many of each test prompt, for their quality.
    """

    train: int = 600
    test: int = 200
    each: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            whole(f"The {name} prompts of judged videos", getattr(self, name), 2, 100_000)
        whole("The videos of a prompt by one backbone", self.each, 2, 1000)

    def prompts(self) -> dict[str, list[str]]:
        """Texts by split."""
        return {split: list(shapeworld.prompts(split, getattr(self, split))) for split in ("train", "test")}


def assigned(prompts: int, backbones: int) -> list[tuple[int, int]]:
    """The two backbones whose videos of each prompt are compared: all equally often, with changing partners."""
    others = max(1, backbones - 1)
    return [(row % backbones, (row % backbones + 1 + row // backbones % others) % backbones) for row in range(prompts)]


@dataclass
class JudgedSets:
    """The videos of a study, made piece by piece in the run's folder.

    subjects: the backbones, all on ShapeWorld's VAE. Videos that were sampled are kept by backbone and split.
    """

    parts: Parts
    subjects: Sequence[Subject]
    videos: Videos = Videos()

    def sample(self) -> None:
        """Sample and label all that is missing, backbone by backbone."""
        work = [(subject, split) for subject in self.subjects for split in ("train", "test")]
        clock = Clock("videos of the backbones", sum(len(self._rows(*each)) for each in work), every=30)
        done = 0
        for subject in self.subjects:
            backbone: Any = None
            for split in ("train", "test"):
                rows = self._rows(subject, split)
                for number, chunk in enumerate(_chunks(rows)):
                    missing = not self.parts.has(self._piece(subject, split, number))
                    if missing:
                        backbone = backbone or subject.load()
                        call = dict(shapeworld.CALL)

                        def make(path: Path, chunk: Any = chunk, backbone: Any = backbone, call: Any = call) -> None:
                            save_file(candidates.sample(backbone, call, chunk, False), path)

                        self.parts.piece(self._piece(subject, split, number), make, files.load_safetensors)
                    done += len(chunk)
                    clock.tick(done, missing, f" ({subject.name})")

    def quality(self) -> dict[str, PerPrompt]:
        """The referee's overall score of each backbone's videos of the test prompts, by backbone."""
        self.sample()
        prompts = self.videos.prompts()["test"]
        count = np.full(len(prompts), float(self.videos.each))
        return {
            subject.name: PerPrompt(
                self._sampled(subject, "test")["score/overall"].double().view(len(prompts), -1).sum(1).numpy()[None],
                count,
                tuple(prompts),
            )
            for subject in self.subjects
        }

    def own(self) -> LatentStore:
        """The store of the backbones' own videos."""

        def make(folder: Path) -> None:
            self.sample()
            columns: dict[str, list[Any]] = {name: [] for name in ("video", "prompt", "seed", "split", "model")}
            scores: dict[str, list[float]] = {name: [] for name in referee.DIMENSIONS}
            latents: list[Tensor] = []
            for split, prompts in self.videos.prompts().items():
                sampled = [self._sampled(subject, split) for subject in self.subjects]
                keys = [{key[1:]: row for row, key in enumerate(self._rows(each, split))} for each in self.subjects]
                for text, pair in zip(prompts, assigned(len(prompts), len(self.subjects))):
                    for which in dict.fromkeys(pair):
                        for number in range(self.videos.each):
                            seed = candidate_seed(self.videos.seed, text, number)
                            row, name = keys[which][text, seed], self.subjects[which].name
                            values = (f"{split}-{seed}-{file_name(name)}", text, seed, split, name)
                            for column, value in zip(columns.values(), values):
                                column.append(value)
                            for dimension, column in scores.items():
                                column.append(float(sampled[which][f"score/{dimension}"][row]))
                            latents.append(sampled[which]["latents"][row])
            self._write(folder, pa.table({**columns, **scores}), torch.stack(latents), "videos of every backbone")

        return self.parts.piece("stores/own/", make, LatentStore.open)

    def nobodys(self) -> LatentStore:
        """The store of renders with one graded fault each, which no backbone made.

        The four renders of a prompt differ in all that it leaves open. The referee sees them as the VAE decodes them.
        """

        def make(folder: Path) -> None:
            tables: list[dict[str, Any]] = []
            latents: list[Tensor] = []
            work = [(split, text) for split, prompts in self.videos.prompts().items() for text in prompts]
            chunks, backbone = list(_chunks(work)), None
            clock, read = Clock("renders", len(chunks), every=30), files.load_safetensors
            for number, chunk in enumerate(chunks):
                name = f"videos/renders-{number:05d}.safetensors"
                missing = not self.parts.has(name)
                if missing:
                    backbone = backbone or self.subjects[0].load()
                part = self.parts.piece(name, partial(_render, backbone, chunk), read)
                faults = [fault for split, text in chunk for fault in _faults(text)]
                for row, (kind, strength, seed) in enumerate(faults):
                    split, text = chunk[row // len(STRENGTHS)]
                    scores = {each: float(part[f"score/{each}"][row]) for each in referee.DIMENSIONS}
                    video = {"video": f"{split}-{seed}-{strength:.2f}", "prompt": text, "seed": seed, "split": split}
                    tables.append({**video, "model": f"render, {kind} {strength:.2f}", **scores})
                latents.append(part["latents"])
                clock.tick(number + 1, missing)
            self._write(folder, pa.Table.from_pylist(tables), torch.cat(latents), "renders with graded faults")

        return self.parts.piece("stores/nobodys/", make, LatentStore.open)

    def _write(self, folder: Path, table: pa.Table, latents: Tensor, what: str) -> None:
        meta = {
            "command": f"correlation study: {what}",
            "seed": self.videos.seed,
            "call": dict(shapeworld.CALL),
            "backbone": self.subjects[0].load().fingerprint(),
            "dimensions": list(referee.DIMENSIONS),
            "tie_margins": referee.TIE_MARGINS,
        }
        pairs = pairs_from_scores(table, referee.TIE_MARGINS)
        write_store(folder, table, latents, pairs, meta, None, eight_bits=True)

    def _rows(self, subject: Subject, split: str) -> list[tuple[str, str, int]]:
        """(split, prompt, seed) of each video that a backbone samples, a prompt's one after another."""
        prompts, number = self.videos.prompts()[split], self.subjects.index(subject)
        pairs = assigned(len(prompts), len(self.subjects))
        chosen = [text for text, pair in zip(prompts, pairs) if split == "test" or number in pair]
        return [
            (split, text, candidate_seed(self.videos.seed, text, each))
            for text in chosen
            for each in range(self.videos.each)
        ]

    def _piece(self, subject: Subject, split: str, number: int) -> str:
        return f"videos/{file_name(subject.name)}/{split}-{number:05d}.safetensors"

    def _sampled(self, subject: Subject, split: str) -> dict[str, Tensor]:
        """All that a backbone sampled of a split: latents and scores."""
        count = len(list(_chunks(self._rows(subject, split))))
        pieces = [
            files.load_safetensors(self.parts.folder / self._piece(subject, split, number)) for number in range(count)
        ]
        names: Mapping[str, Tensor] = pieces[0] if pieces else {}
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}


def _chunks(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[start : start + candidates.BATCH] for start in range(0, len(rows), candidates.BATCH)]


def _faults(text: str) -> list[tuple[str, float, int]]:
    """Kind, strength and seed of the fault of each of a prompt's renders."""
    scene = grammar.parse(text)
    assert scene is not None  # prompts of a split are in the grammar
    chance = random.Random(f"faults of {text}")
    kinds = [kind for kind in corruptions.CORRUPTIONS if corruptions.applies(kind, scene)]
    return [(chance.choice(kinds), strength, chance.randrange(2**31)) for strength in STRENGTHS]


def _render(backbone: Any, chunk: Sequence[tuple[str, str]], path: Path) -> None:
    code = generator.LinearCode.of(backbone.pipe.vae)
    rows = [(grammar.parse(text), text, fault) for _, text in chunk for fault in _faults(text)]
    clean = torch.cat([corruptions.corrupt([scene], *fault) for scene, _, fault in rows if scene is not None])
    latents = code(clean).half()
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(rows), 8):
        seen = backbone.decode(latents[start : start + 8].float()).cpu()
        parts.append(referee.batch(seen, [text for _, text, _ in rows[start : start + 8]]))
    scores = {f"score/{name}": torch.cat([part[name] for part in parts]) for name in referee.DIMENSIONS}
    save_file({"latents": latents.contiguous(), **scores}, path)
