"""The full demo with several processes on one machine: `python benchmarks/full_demo.py --workers 12 --out runs/full`.

Each process makes its share of the parts that `prism demo --full` makes one after another (candidates, heads, pixel
judges, measurements, contests); then `prism demo --full` itself finds them done and puts them together. So the figures
are those of the one command with the one seed, and only the minutes are not. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prism import files, shapeworld, video
from prism.evaluation import TIMESTEPS
from prism.judge.joint import JointJudge
from prism.lab import demo, judges, playing
from prism.lab.records import make_contest, record
from prism.loading import load_backbone
from prism.preference import LatentStore
from prism.runs import IDENTITY, claim, parts_of
from prism.shapeworld import candidates

STAGES = ("data", "join", "train", "measure", "contests", "matched")
TINY: dict[str, Any] = {
    "prompts": 2,
    "labelled": 2,
    "unseen": 1,
    "train_prompts": 3,
    "judges": 2,
    "alone": 1,
    "matched": 1,
    "few_steps": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/full"))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a few prompts and steps, to try the script")
    parser.add_argument("--stage", choices=STAGES, help="(of a worker)")
    parser.add_argument("--rank", type=int, default=0, help="(of a worker)")
    given = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # the VAE decodes as on a CPU
    if given.stage:
        Work(given).stage(given.stage)
        return
    for stage in STAGES:
        started = time.perf_counter()
        command = [sys.executable, *sys.argv, "--stage", stage]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = range(1 if stage == "join" else given.workers)
        workers = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in ranks]
        codes = [worker.wait() for worker in workers]
        print(f"{stage}: {time.perf_counter() - started:.0f} seconds", flush=True)
        if any(codes):
            sys.exit(f"The stage {stage} failed; start again, and it goes on.")
    demo.run(given.out, seed=given.seed, config=settings(given))


def settings(given: argparse.Namespace) -> demo.DemoConfig:
    config = replace(demo.FULL, seed=given.seed)
    if given.tiny:
        candidates.SHIPPED = {"train": (3, 4), "validation": (2, 4), "test": (2, 4)}
        config = replace(config, train=replace(config.train, steps=4, prompts_per_step=2), pixel_steps=4, **TINY)
    return config


class Work:
    """A worker's share of the parts of one demo."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.config, self.rank, self.size = settings(given), given.rank, given.workers
        self.seed = given.seed
        self.backbone, self.call, _ = load_backbone()
        identity = demo.identity(self.config, self.backbone, self.call, None)
        self.parts = claim(parts_of(given.out), identity, True, name=IDENTITY, shared=True)

    def mine(self, jobs: list[Callable[[], Any]]) -> None:
        for job in jobs[self.rank :: self.size]:
            job()

    def stage(self, name: str) -> None:
        getattr(self, name)()

    def _stores(self) -> dict[str, tuple[str, dict[str, tuple[int, int]], int]]:
        """Part -> its folder, shares and seed, as in `prism.lab.demo`."""
        config, seed = self.config, self.seed
        train = {**candidates.SHIPPED, "train": (config.train_prompts, candidates.SHIPPED["train"][1])}
        test = {"test": (config.prompts, config.labelled), "validation": (min(config.prompts, 40), config.labelled)}
        return {
            "data": ("candidates", train, seed),
            "test-data": ("test-store", test, seed + 3),
            "unseen-data": ("unseen-store", {"unseen": (config.unseen, 8)}, seed + 2),
        }

    def data(self) -> None:
        for name, (folder, shares, seed) in self._stores().items():
            if not self.parts.has(f"{name}.json"):
                share = (self.rank, self.size)
                candidates.run(self.parts.folder / folder, shares, seed=seed, backbone=self.backbone, share=share)

    def join(self) -> None:
        for name, (folder, shares, seed) in self._stores().items():
            out = self.parts.folder / folder
            self.parts.once(name, lambda: candidates.run(out, shares, seed=seed, backbone=self.backbone))  # noqa: B023

    def _store(self, name: str) -> LatentStore:
        return LatentStore.open(self.parts.folder / self._stores()[name][0])

    def _judge(self, k: int) -> Any:
        config = self.config
        store = self._store("data")
        return judges.trained(self.parts, store, self.backbone, config.taps, config.dim, config.train, self.seed + k)[0]

    def _pixel(self, name: str) -> Any:
        judges.PIXEL = {name: {"pixel": False, "pixel-noisy": True}[name]}
        return judges.pixel_judges(
            self.parts, self._store("data"), self.backbone, True, self.seed, self.config.pixel_steps
        )[0]

    def train(self) -> None:
        heads = [lambda k=k: self._judge(k) for k in range(self.config.judges)]
        self.mine([lambda: self._pixel("pixel-noisy"), lambda: self._pixel("pixel"), *heads])

    def measure(self) -> None:
        jobs = []
        for split, data in (("test", "test-data"), ("unseen", "unseen-data")):
            named = [(f"prism-{self.seed + k}", lambda k=k: self._judge(k)) for k in range(self.config.judges)]
            named += [(name, lambda name=name: self._pixel(name)) for name in ("pixel-noisy", "pixel")]
            for name, make in named:

                def job(split: str = split, data: str = data, name: str = name, make: Any = make) -> None:
                    part = f"accuracy/{split}-{name}"
                    store, rows = self._store(data), self.config.train.max_rows
                    judges._measured(self.parts, part, store, make(), split, self.seed, TIMESTEPS, rows)

                jobs.append(job)
        self.mine(jobs)

    def contests(self) -> None:
        config, seed = self.config, self.seed
        joint = JointJudge([self._judge(k) for k in range(config.judges)])
        jobs = []
        for split, count, first in (
            ("test", config.prompts, 10_000 * (seed + 1)),
            ("unseen", config.unseen, 10_000_000 * (seed + 1)),
        ):
            for place, prompt in enumerate(shapeworld.prompts(split, count)):
                seeds = [first + 1000 * place + i for i in range(config.n)]
                alone = split == "test" and place < config.alone

                def job(
                    name: str = f"{split}/{place:04d}",
                    prompt: str = prompt,
                    seeds: list[int] = seeds,
                    alone: bool = alone,
                ) -> None:
                    self.parts.once(
                        name,
                        lambda: record(make_contest(joint, config, prompt, seeds, self.call), config, alone),
                    )

                jobs.append(job)
        self.mine(jobs)

    def matched(self) -> None:
        for game in playing.games(self.config, self.backbone, self._pixel("pixel"), self.call):
            playing.as_parts(game, self.parts, (self.rank + 1, self.size))


if __name__ == "__main__":
    try:
        import av  # noqa: F401
    except ImportError:  # a machine that cannot write videos measures all the same
        video.write_video = lambda path, *_: files.write_json(path, "no video library on this machine")
        demo.write_report = lambda *_, **__: None
    main()
