"""Small latent stores for the tiny Wan pipeline, whose labels can be read off the latents."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import torch
from tests import tiny

from prism import files
from prism.preference import LatentStore, pairs_from_scores, write_store

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
