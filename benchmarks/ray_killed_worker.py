"""A store by one process, and by two workers of Ray of which one is killed: python benchmarks/ray_killed_worker.py

Collects candidates of the embedded model, labelled by ShapeWorld's referee: first here, then by two workers of a local
cluster. One of them is killed with SIGKILL when two shards are written. Prints each store's checksum, over all of
its files, and ends with 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

PROMPTS = [
    f"a {colour} {shape} moves {way}"
    for way, shape, colour in (
        *(("left", "circle", "red"), ("right", "square", "green"), ("up", "triangle", "blue")),
        *(("down", "circle", "yellow"), ("left", "square", "blue"), ("right", "triangle", "red")),
    )
]


def checksum(folder: Path) -> tuple[int, str]:
    """The number of files in a folder, and one SHA-256 of their names and bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return len(paths), digest.hexdigest()


def kill(store: Path, crew: Any, ended: threading.Event) -> None:
    """Kill the process of a worker when the store has two shards."""
    while not ended.is_set():
        if len(list(store.glob("shards/*.parquet"))) >= 2:
            worker = crew.workers[0]
            os.kill(int(worker.split()[0]), signal.SIGKILL)
            print(f"killed the worker {worker}", flush=True)
            return
        time.sleep(0.02)


def run() -> int:
    from prism.loading import crew_of_backbone, load_rewards
    from prism.training.collect import collect

    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ray, workers in (("one", None, None), ("two", "local", 2)):
            store, ended, start = Path(folder) / name, threading.Event(), time.perf_counter()
            with crew_of_backbone(device="cpu", ray=ray, workers=workers) as (crew, call):
                rewards = load_rewards(["referee"], 600, "cpu", crew)
                if ray is not None:
                    threading.Thread(target=partial(kill, store, crew, ended), daemon=True).start()
                collect(PROMPTS, crew, {**call, "num_inference_steps": 6}, store, rewards, candidates=2, seed=0)
            ended.set()
            made[name] = checksum(store)
            what = "one process" if ray is None else "two workers of Ray, one killed"
            print(
                f"{made[name][1][:16]}  {made[name][0]} files, {time.perf_counter() - start:.0f} s, {what}", flush=True
            )
    print("equal" if made["one"] == made["two"] else "DIFFERENT")
    return int(made["one"] != made["two"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as workers have; sums by several threads are of another order
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    sys.exit(run())
