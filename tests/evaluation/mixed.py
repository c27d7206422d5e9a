"""A store of schema 2 for the tiny Wan pipeline: two shapes and calls, three generators, soft labels, facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tests import stores, tiny

from prism.preference import LatentStore, StoreWriter, pairs_from_scores, unit_name

SHAPES = {"{}": (16, 3, 4, 4), '{"height": 48}': (16, 3, 6, 4)}
MODELS = ("sora", "veo", "wan")
PROMPTS, PER_PROMPT = {"train": 2, "validation": 6, "test": 12}, 4


def make(folder: Path) -> LatentStore:
    """Each prompt has two videos of either shape; a unit holds one shape of some prompts."""
    rng = np.random.default_rng(0)
    splits = [split for split, count in PROMPTS.items() for _ in range(count)]
    rows = [
        {
            "video": f"v{place}-{number}",
            "prompt": stores.PROMPTS[place],
            "split": split,
            "model": MODELS[(place + number) % 3],
            "call": list(SHAPES)[number % 2],
            "seed": number,
            "VQ": rng.uniform(),
            "clip_seconds": float(1 + (place + number) % 3),
            "clip_fps": 8.0,
            "clip_brightness": rng.uniform(),
            "clip_motion": None if place == 3 else rng.uniform(),
        }
        for place, split in enumerate(splits)
        for number in range(PER_PROMPT)
    ]
    meta = {"call": tiny.CALL_WAN, "command": "test", "seed": 0}
    writer = StoreWriter(folder, {"backbone": "tiny"}, meta)
    generator = torch.Generator().manual_seed(0)
    for unit, shape in enumerate(SHAPES):
        some = [row for row in rows if row["call"] == shape]
        latents = torch.randn(len(some), *SHAPES[shape], generator=generator).half()
        writer.write(unit_name(unit, [row["video"] for row in some]), pa.Table.from_pylist(some), {"latents": latents})
    writer.finish()
    pairs = pairs_from_scores(pa.Table.from_pylist(rows), {"VQ": 0.1})
    order = np.random.default_rng(1).permutation(len(pairs))  # prompts in turns, as files may have them
    pairs = pairs.take(pa.array(order))
    for side, share in (("p_a", 0.7), ("p_b", 0.1)):
        soft = np.where(np.arange(len(pairs)) % 3 == 0, share, np.nan)
        pairs = pairs.append_column(f"VQ:{side}", pa.array(soft, pa.float32(), from_pandas=True))
    writer.label(pairs)
    return LatentStore.open(folder)
