"""What a judge that stands by itself saves: time and memory of loading a Wan2.1-1.3B whole, and its first 12 blocks.

    python benchmarks/partial_loading.py [--out FOLDER]

Random weights at the published shape of the denoiser, in bfloat16 and shards of 500 MB, are written to FOLDER (about
3 GB, a temporary one unless named); the rest of the pipeline is the small one that ships. Each load runs in a process
of its own, twice, so that the second one finds the files in the page cache. Prints a line a load.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCKS = 12


def build(folder: Path) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    import prism

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960)
    torch.set_default_dtype(torch.float32)
    pipe = prism.shapeworld.pipeline()
    pipe.transformer = transformer
    pipe.save_pretrained(folder, max_shard_size="500MB")


def load(folder: Path, up_to: int | None) -> None:
    import torch

    from prism import Backbone

    start, before = time.perf_counter(), _resident()
    backbone = Backbone.from_pretrained(str(folder), up_to=up_to, dtype=torch.bfloat16)
    for value in backbone.denoiser.parameters():  # files are mapped: memory is taken when they are read
        value.sum()
    count = sum(value.numel() for value in backbone.denoiser.parameters())
    found = {"seconds": time.perf_counter() - start, "bytes": _resident() - before, "weights": count}
    print(json.dumps(found))


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(folder: Path, load: str) -> str:
    command = [sys.executable, __file__, "--out", str(folder), "--load", load]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the weights; kept if named")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load == "build":
        return build(given.out)
    if given.load is not None:
        return load(given.out, int(given.load) or None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary) / "pipe"
        if not folder.exists():
            apart(folder, "build")  # in a process of its own, or its memory would count as its children's
        for what, up_to in (("whole", 0), (f"{BLOCKS} blocks", BLOCKS)):
            for again in ("first", "again"):
                found = json.loads(apart(folder, str(up_to)).strip().splitlines()[-1])
                size, weights = found["bytes"] / 2**30, found["weights"] / 1e6
                print(
                    f"{what:10} {again}: {found['seconds']:5.1f} s, {size:.2f} GiB, {weights:.0f} M weights", flush=True
                )


if __name__ == "__main__":
    main()
