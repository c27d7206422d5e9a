"""Small latent stores for the tiny Wan pipeline, whose labels can be read off the latents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow as pa
import torch
from tests import tiny

from prism import files
from prism.preference import LatentStore, StoreWriter, pairs_from_scores, unit_name, write_store

SHAPE = (16, 3, 4, 4)
LEVELS = (900.0, 600.0, 300.0)
PROMPTS = [
    f"a {colour} {shape} moves {way}"
    for way, shape, colour in itertools.product(
        ("left", "right", "up", "down"), ("circle", "square", "triangle"), ("red", "green", "blue", "yellow")
    )
]


def make(folder: Path, prompts=(6, 3, 4), per_prompt=4, meta=None, shape=SHAPE) -> LatentStore:
    """Videos of three splits whose score is the strength of one fixed pattern; with recorded states at three levels."""
    count = sum(prompts) * per_prompt
    generator = torch.Generator().manual_seed(0)
    splits = [name for name, n in zip(("train", "validation", "test"), prompts) for _ in range(n)]
    score = torch.rand(count, generator=generator)
    pattern = torch.randn(shape, generator=generator)
    latents = 0.5 * torch.randn(count, *shape, generator=generator) + 2 * (score - 0.5).view(-1, 1, 1, 1, 1) * pattern
    t = torch.tensor(LEVELS).expand(count, -1).contiguous()
    sigma = (t / 1000).view(count, -1, 1, 1, 1, 1)
    states = (1 - sigma) * latents[:, None] + sigma * torch.randn(count, len(LEVELS), *shape, generator=generator)
    videos = pa.table(
        {
            "video": [f"video-{i:03d}" for i in range(count)],
            "prompt": [PROMPTS[i // per_prompt] for i in range(count)],
            "seed": list(range(count)),
            "split": [splits[i // per_prompt] for i in range(count)],
            "VQ": score.tolist(),
            "MQ": torch.rand(count, generator=generator).tolist(),
        }
    )
    pairs = pairs_from_scores(videos, {"VQ": 0.1, "MQ": 0.1})
    with files.new_folder(folder) as temporary:
        meta = {"call": tiny.CALL_WAN, "command": "test", "seed": 0, **(meta or {})}
        write_store(temporary, videos, latents, pairs, meta, {"states": states, "t": t})
    return LatentStore.open(folder)


KINDS = ({}, {"width": 48}, {"num_frames": 5})
KIND_SHAPES = (SHAPE, (16, 3, 4, 6), (16, 2, 4, 4))
MIXED = ((0, 0, 0), (1, 1, 1), (0, 1, 0), (2, 2), (1, 0, 2), (0, 0, 0), (2, 1))
"""Kinds of the videos of each training prompt of `make_kinds`."""


def make_kinds(folder: Path, train=MIXED, validation=((0, 1, 2), (1, 1))) -> LatentStore:
    """A store of schema 2 whose videos have three shapes and calls, also within a prompt; with recorded states."""
    generator = torch.Generator().manual_seed(0)
    writer = StoreWriter(folder, {"test": "kinds"}, {"call": tiny.CALL_WAN, "command": "test", "seed": 0})
    prompts = [("train", kinds) for kinds in train] + [("validation", kinds) for kinds in validation]
    rows: dict[int, list[tuple[str, str, str]]] = {kind: [] for kind in range(3)}
    pairs: dict[str, list] = {name: [] for name in ("prompt", "video_a", "video_b", "split", "VQ", "MQ")}
    for number, (split, kinds) in enumerate(prompts):
        videos = [f"v{number}-{place}" for place in range(len(kinds))]
        for kind, video in zip(kinds, videos):
            rows[kind].append((video, PROMPTS[number], split))
        for place, (a, b) in enumerate(itertools.combinations(videos, 2)):
            row = (
                PROMPTS[number],
                a,
                b,
                split,
                (1, -1, 0)[(number + place) % 3],
                (None, 1, -1)[(number + 2 * place) % 3],
            )
            for name, value in zip(pairs, row):
                pairs[name].append(value)
    for kind, of_kind in rows.items():
        if of_kind:
            count, shape = len(of_kind), KIND_SHAPES[kind]
            columns = dict(zip(("video", "prompt", "split"), map(list, zip(*of_kind))))
            table = pa.table({**columns, "call": [json.dumps(KINDS[kind])] * count})
            tensors = {"latents": torch.randn(count, *shape, generator=generator)}
            for name in ("states", "predicted"):
                tensors[name] = torch.randn(count, len(LEVELS), *shape, generator=generator)
            tensors["t"] = torch.tensor(LEVELS).expand(count, -1).contiguous()
            writer.write(unit_name(kind, columns["video"]), table, tensors)
    writer.finish()
    labels = {name: pa.array(pairs[name], pa.int8()) for name in ("VQ", "MQ")}
    writer.label(pa.table({**pairs, **labels}))
    return LatentStore.open(folder)
