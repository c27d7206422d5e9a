"""Runs of `prism sample` that wait for each other: queued, watched at each cut, cancelled, listed, read back."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism import files
from prism.errors import PrismError, quoted

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
MOST_WAITING = 100


@dataclass(frozen=True)
class Wish:
    """A run as somebody asks for it.

    budget: costs of one plain sample that it may have, whose plan the head or the default cut gives; None: `n`
    candidates, cut by `schedule` with the look `look`.
    """

    prompt: str
    budget: float | None = None
    n: int = 8
    schedule: str = ""
    look: str | None = None
    seed: int = 0
    select_by: str = "overall"
    image: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A candidate at a cut: its seed, scores by dimension, the one that decides, the probability of being preferred to
    another candidate of this cut (None: it is alone), its predicted video (T, H, W, 3) uint8 if there is one."""

    seed: int
    index: int
    scores: Mapping[str, float]
    deciding: float
    win: float | None
    kept: bool
    video: np.ndarray | None = None


@dataclass(frozen=True)
class SeenCut:
    """A cut of a run, its candidates with the highest score first."""

    step: int
    t: float
    look: str
    candidates: tuple[Seen, ...]
    dropped: int = 0


@dataclass
class Job:
    """A run of the queue, or one that a folder holds. version: counts the changes of what is shown but `rows`."""

    name: str
    wish: Wish
    folder: Path
    state: str = WAITING
    rows: float = 0.0
    expected: float = 0.0
    cuts: list[SeenCut] = field(default_factory=list)
    error: str = ""
    metrics: Mapping[str, Any] | None = None
    started: float = 0.0
    version: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def is_live(self) -> bool:
        return self.state in (WAITING, RUNNING)


class Cancelled(Exception):
    """Somebody cancelled the run."""


Make = Callable[[Wish, Path, Any], Mapping[str, Any]]


class Jobs:
    """A queue of runs that one thread makes, each in a folder of its own below `out`.

    Args:
        out: folder of the runs. Those that it holds already are listed too.
        make: `make(wish, folder, watch)` makes a run's folder and returns its metrics.
        seen: `seen(wish, cut, previews)` describes a cut, as `prism.sampling.previews.Watch.cut` is told of it.
        lock: held while a run is made, by all who use the models.
    """

    def __init__(self, out: Path, make: Make, seen: Callable[..., SeenCut], lock: Any) -> None:
        self.out, self._make, self._seen, self._models = out, make, seen, lock
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        for folder in sorted(out.glob("*")) if out.is_dir() else ():
            self._found(folder)

    def submit(self, wish: Wish) -> Job:
        """Queue a run. Raises PrismError for one that cannot be made, as far as it is known before."""
        if not wish.prompt.strip() and not wish.image:
            raise PrismError("Say what the video should show.")
        with self._changed:
            if sum(job.is_live for job in self._jobs.values()) >= MOST_WAITING:
                raise PrismError(f"There are {MOST_WAITING} runs waiting already; cancel some, or come back later.")
            number = 1 + max((int(name[:4]) for name in self._jobs), default=0)
            slug = re.sub(r"[^a-z0-9]+", "-", wish.prompt.lower()).strip("-")[:40].strip("-") or "run"
            while (self.out / f"{number:04d}-{slug}").exists():
                number += 1
            job = Job(f"{number:04d}-{slug}", wish, self.out / f"{number:04d}-{slug}")
            self._jobs[job.name] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="runs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def cancel(self, name: str) -> bool:
        """Take a run out of the queue, or end it at its next denoiser call; False if it has ended already."""
        with self._changed:
            job = self._jobs.get(name)
            if job is None or not job.is_live:
                return False
            job.stop.set()
            if job.state == WAITING:
                self._end(job, CANCELLED)
        return True

    def get(self, name: str | None) -> Job | None:
        return self._jobs.get(name or "")

    def all(self) -> list[Job]:
        """The runs, the newest first."""
        with self._changed:
            return sorted(self._jobs.values(), key=lambda job: job.name, reverse=True)

    def ahead_of(self, job: Job) -> int:
        """The number of runs that are made before a waiting one."""
        return sum(other.is_live and other.name < job.name for other in self.all())

    def wait(self, name: str, seconds: float) -> Job:
        """The run, when it has ended or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs[name].is_live, seconds)
            return self._jobs[name]

    def close(self) -> None:
        """Cancel everything, and wait for the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for job in self.all():
            self.cancel(job.name)
        if self._thread is not None:
            self._thread.join(30)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(j.state == WAITING for j in self._jobs.values()))
                if self._closed:
                    return
                job = min((j for j in self._jobs.values() if j.state == WAITING), key=lambda job: job.name)
                job.state, job.started = RUNNING, time.time()
                job.version += 1
            try:
                with self._models:
                    job.metrics = self._make(job.wish, job.folder, _Watcher(job, self._seen))
                state = DONE
            except Cancelled:
                state = CANCELLED
            except PrismError as error:
                state, job.error = FAILED, str(error)
            except Exception as error:  # a run that breaks must not end the queue
                state, job.error = FAILED, f"{type(error).__name__}: {quoted(error)}"
            with self._changed:
                self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.state = state
        job.version += 1
        self._changed.notify_all()

    def _found(self, folder: Path) -> None:
        """List a run that the folder holds."""
        try:
            metrics, config = (files.read_json(folder / name) for name in ("metrics.json", "config.json"))
            if metrics["command"] != "sample" or not re.match(r"\d{4}-", folder.name):
                return
            wish = Wish(str(metrics["prompt"] or ""), None, len(metrics["seeds"]), seed=int(metrics["seed"]))
            job = Job(folder.name, wish, folder, DONE, metrics=metrics, cuts=_cuts_of(metrics, config))
        except (PrismError, OSError, KeyError, TypeError, ValueError):
            return
        job.rows = job.expected = float(metrics["ledger"]["denoiser_rows"])
        job.started = os.path.getmtime(folder / "metrics.json")
        self._jobs[job.name] = job


def _cuts_of(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> list[SeenCut]:
    """The cuts of a run that was made earlier, without pictures."""
    cuts = []
    for cut in metrics["cuts"]:
        columns = cut.get("dimensions", {})
        seen = [
            Seen(
                *(metrics["seeds"][int(index)], int(index)),
                {name: column[place] for name, column in columns.items()},
                score,
                None,
                int(index) in cut["kept"],
            )
            for place, (index, score) in enumerate(cut["scores"].items())
        ]
        look = str(config.get("look") or "")
        ordered = tuple(sorted(seen, key=lambda each: -each.deciding))
        cuts.append(SeenCut(int(cut["step"]), float(cut["t"]), look, ordered, len(cut.get("dropped", ()))))
    return cuts


class _Watcher:
    """A `Watch` that notes a run's progress in its job."""

    def __init__(self, job: Job, seen: Callable[..., SeenCut]) -> None:
        self.job, self._seen = job, seen

    def rows(self, done: float, expected: float) -> None:
        self.job.rows, self.job.expected = done, expected
        if self.job.stop.is_set():
            raise Cancelled

    def cut(self, cut: Mapping[str, Any], previews: Mapping[Any, np.ndarray]) -> None:
        self.job.cuts = [*self.job.cuts, self._seen(self.job.wish, cut, previews)]
        self.job.version += 1
        if self.job.stop.is_set():
            raise Cancelled


def seen_cut(judge: Any, weights: Mapping[str, float], cut: Mapping[str, Any], previews: Mapping[Any, Any]) -> SeenCut:
    """A cut as `Watch.cut` is told of it, with the probabilities of Eq. 3-4.

    weights: of the dimensions by which the run ranks. The probability is that of being preferred to another candidate
    of the cut, P(better) + P(tie) / 2 on average over the others, and over the weighted dimensions.
    """
    names = list(cut["scores"])
    scores = torch.tensor([cut["scores"][name] for name in names], dtype=torch.float64).T  # (candidates, dimensions)
    wins = win_probabilities(judge, scores, [weights.get(name, 0.0) for name in names]) if judge is not None else None
    deciding = sum(weight * scores[:, names.index(name)] for name, weight in weights.items())
    seen = [
        Seen(
            *(candidate.seed, candidate.index),
            dict(zip(names, row.tolist())),
            float(deciding[place]),  # type: ignore[index]
            None if wins is None or len(scores) < 2 else float(wins[place]),
            candidate in cut["kept"],
            previews.get(candidate),
        )
        for place, (candidate, row) in enumerate(zip(cut["candidates"], scores))
    ]
    ordered = tuple(sorted(seen, key=lambda each: (-each.deciding, each.index)))
    return SeenCut(cut["step"], float(cut["t"]), str(cut.get("look") or "now"), ordered, len(cut["dropped"]))


def win_probabilities(judge: Any, scores: torch.Tensor, weights: list[float]) -> torch.Tensor | None:
    """The probability of each candidate to be preferred to another, (candidates,) float64; None without a dimension of
    positive weight.

    scores: (candidates, num_dimensions). weights: one per dimension.
    """
    positive = torch.tensor(weights, dtype=torch.float64).clamp(min=0)
    if not positive.sum() or list(getattr(judge, "dimensions", ())) == [] or scores.shape[1] != len(judge.dimensions):
        return None
    better, tie, _ = judge.probabilities(scores[:, None] - scores[None]).unbind(-1)  # (candidates, candidates, D)
    against = better + tie / 2
    others = (against.sum(1) - against.diagonal(dim1=0, dim2=1).T) / max(1, len(scores) - 1)
    return (others * positive).sum(1) / positive.sum()
