"""Peak memory of a training against the number of videos in the store: python benchmarks/train_memory.py

Writes a store of tiny videos shard by shard, four to a prompt, and trains a head on it in a process of its own, for
each number of videos; prints the peak of the resident memory before, with the store open (its tables are what grows),
and after the training.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PER_PROMPT, UNIT, SHAPE = 4, 64, (16, 3, 8, 8)


def peak() -> float:
    """Peak of this process's resident memory, MB. On Linux `ru_maxrss` would count the parent's, from before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def make(folder: Path, count: int) -> None:
    """A store of `count` videos of noise, with labels by chance."""
    import numpy as np
    import pyarrow as pa
    import torch
    from tests import tiny

    from prism.preference import StoreWriter, unit_name

    call = {**tiny.CALL_WAN, "height": 64, "width": 64}
    writer = StoreWriter(folder, {"made": "at random"}, {"call": call, "command": "benchmark", "seed": 0})
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    pairs: dict[str, list] = {name: [] for name in ("prompt", "video_a", "video_b", "split", "VQ")}
    for unit in range(-(-count // UNIT)):
        numbers = range(unit * UNIT, min((unit + 1) * UNIT, count))
        videos = [f"video-{number:06d}" for number in numbers]
        prompts = [f"a cat runs {number // PER_PROMPT}" for number in numbers]
        rows = pa.table({"video": videos, "prompt": prompts, "split": ["train"] * len(videos)})
        latents = torch.randn(len(videos), *SHAPE, generator=generator).half()
        writer.write(unit_name(unit, videos), rows, {"latents": latents})
        for a in range(len(videos)):
            for b in range(a + 1, len(videos)):
                if prompts[a] == prompts[b]:
                    values = (prompts[a], videos[a], videos[b], "train", int(rng.integers(-1, 2)))
                    for name, value in zip(pairs, values):
                        pairs[name].append(value)
    writer.finish()
    writer.label(pa.table({**pairs, "VQ": pa.array(pairs["VQ"], pa.int8())}))


def run(folder: Path, steps: int) -> None:
    """Train on the store in a folder, and print peaks as JSON."""
    from tests import tiny

    from prism.judge import Judge
    from prism.preference import LatentStore
    from prism.training import TrainConfig, train

    judge = Judge.untrained(tiny.wan(), tap=2, dim=64, dimensions=("VQ",))
    before = peak()
    store = LatentStore.open(folder)
    opened = peak()
    config = TrainConfig(steps=steps, prompts_per_step=8, checkpoint_every=0)
    result = train(store, judge, config, folder.with_name("run"), progress=False)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    numbers = {"videos": len(store.videos), "store_mb": size / 1e6, "before": before, "opened": opened, "end": peak()}
    print(json.dumps({**numbers, "seconds": result["seconds"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--epochs", type=int, default=1, help="of the largest store; all take as many steps")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return run(options.measure, options.steps)
    steps = options.epochs * max(options.videos) // PER_PROMPT // 8
    for count in options.videos:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            make(store, count)
            command = [sys.executable, __file__, "--measure", str(store), "--steps", str(steps)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{found['videos']:6d} videos, {found['store_mb']:.1f} MB of store: peak {found['before']:.1f} MB before, "
            f"{found['opened']:.1f} MB with the store open, {found['end']:.1f} MB after {steps} steps "
            f"({found['seconds']:.0f} s)"
        )


if __name__ == "__main__":
    main()
