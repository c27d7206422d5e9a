"""What the experiments of `prism reproduce` share: labelled videos, heads trained alike, and their measurements.

Everything is made once and kept in the run's folder: heads/KIND/seed-N, measured/KIND-N.parquet (its margins on the
test pairs), stores (candidates of ShapeWorld's prompts, labelled by the referee).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from prism import shapeworld
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import TIMESTEPS, Measurement, measure, measure_together
from prism.judge import Judge
from prism.judge.joint import JointJudge
from prism.lab.ablations import RECIPE as RECIPE
from prism.lab.findings import CLAIMED, stored
from prism.lab.pixel import JointPixelJudge, PixelJudge
from prism.preference import LatentStore
from prism.preference.prompts import Prompt
from prism.preference.sources import Place
from prism.runs import Parts
from prism.shapeworld import referee
from prism.training import TrainConfig, train_together
from prism.training.collect import collect
from prism.training.trainer import SHARED

TAP = 4  # of the embedded model's blocks, chosen on validation prompts (docs/study.md)
BATCH = 8
"""Rows that are timed for the estimate of a run's time."""
EACH, VALIDATION = 4, 40
"""Candidates of a training prompt, and prompts of the validation pairs, where a scale collects its own."""
BASE = "query"
"""The kind of the paper's own recipe, from which each other kind differs in one thing."""


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    seeds: heads of each kind, each with first weights and batches of its own. train, dim: of every head.
    train_prompts: prompts x 4 videos to train on; 0: the store that ships, on whose test pairs accuracy is measured
    too. test_prompts, n: prompts of Best-of-N and their candidates; 0 prompts: the table of scores that ships. states:
    the steps whose latents are recorded. levels: of accuracy; pixel_levels: those at which judges of decoded frames are
    measured, which costs a decode per video and level. attended: videos in which the query's attention is measured.
    timed: prompts on which whole runs are made for the parts of their cost. registers: train the related head of
    registers too, which takes a pass of its own.
    """

    name: str
    seeds: int = 3
    train: TrainConfig = RECIPE
    dim: int = 144
    train_prompts: int = 600
    test_prompts: int = 200
    n: int = 10
    states: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 19)
    levels: tuple[float, ...] = TIMESTEPS
    pixel_levels: tuple[float, ...] = TIMESTEPS
    attended: int = 200
    timed: int = 3
    registers: bool = True


SCALES = {
    "quick": Scale(
        "quick",
        seeds=2,
        train=replace(RECIPE, steps=300, prompts_per_step=6),
        train_prompts=0,
        test_prompts=0,
        levels=(899, 699, 499, 0),
        pixel_levels=(899, 699, 0),
        attended=40,
        timed=1,
        registers=False,
    ),
    "full": Scale("full", train=replace(RECIPE, steps=600)),
}


@dataclass(frozen=True)
class Kind:
    """A recipe of a head: in words, what it changes in `TrainConfig`, and the arguments of `Judge.untrained`."""

    what: str
    train: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)


def kinds(blocks: int) -> dict[str, Kind]:
    """Every kind of head by name, for a backbone of so many blocks."""
    every = {
        BASE: Kind("one query, as in the paper"),
        "mean": Kind("the mean token in place of the query", head={"aggregation": "mean"}),
        "linear": Kind("a linear probe on the mean token", head={"aggregation": "linear"}),
        "queries-4": Kind("four queries", head={"num_queries": 4}),
        "queries-8": Kind("eight queries", head={"num_queries": 8}),
        "eta-3": Kind("eta 3 in place of 5", train={"eta": 3.0}),
        "eta-8": Kind("eta 8 in place of 5", train={"eta": 8.0}),
        "clean": Kind("more steps at low noise", train={"levels": "clean"}),
        "noise": Kind("more steps at high noise", train={"levels": "noise"}),
        "recorded": Kind("recorded states in place of new noise", train={"source": "recorded"}),
        "predicted": Kind("predicted clean latents, re-noised", train={"source": "predicted"}),
        "mixture": Kind("finished and predicted latents in equal parts", train={"source": "renoised=1,predicted=1"}),
    }
    return every | {
        f"depth-{block}": Kind(f"after block {block}", head={"tap": block}) for block in range(1, blocks + 1)
    }


class Bench:
    """The shared things of a run.

    Args:
        parts: the run's folder.
        scale: how much is computed.
        backbone, call: the backbone that judges, and the arguments of its pipeline.
        data: a store of the user's, with training, validation and test pairs; None: ShapeWorld's own, made here.
        seed: of everything random.
        tap: the block that heads read unless their kind says so; None: 4 of ShapeWorld's 6, the backbone's default.
        batch_size: videos per denoiser call.
        others, quality: backbones to correlate (folders or ids), and a table of published scores of their videos.
    """

    def __init__(
        self,
        parts: Parts,
        scale: Scale,
        backbone: Backbone,
        call: Mapping[str, Any],
        data: LatentStore | None = None,
        seed: int = 0,
        tap: int | None = None,
        batch_size: int = 64,
        others: Sequence[str] = (),
        quality: Path | None = None,
    ) -> None:
        self.parts, self.scale, self.backbone, self.call, self.data = parts, scale, backbone, dict(call), data
        self.seed, self.batch_size, self.others, self.quality = seed, batch_size, tuple(others), quality
        self.kinds = kinds(backbone.num_blocks)
        self.tap = (backbone.default_tap if data else TAP) if tap is None else tap

    # -- videos

    @cached_property
    def training(self) -> LatentStore:
        """The store whose training pairs heads learn from."""
        if self.data is not None:
            return self.data
        if not self.scale.train_prompts:
            return LatentStore.open(shapeworld.asset_folder("candidates"))
        return self.collected("training", {"train": self.scale.train_prompts}, EACH)

    @cached_property
    def tested(self) -> LatentStore:
        """The store whose test pairs accuracy is measured on."""
        return self.training if self.data is not None or not self.scale.train_prompts else self.played

    @property
    def sample_size(self) -> int:
        """Candidates per call while sampling, whose rows guidance doubles."""
        return max(1, self.batch_size // 2)

    @property
    def plays(self) -> bool:
        """True where Best-of-N chooses among the candidates of a store, not by the table of scores that ships."""
        return self.data is not None or self.scale.test_prompts > 0

    @property
    def test_prompts(self) -> list[str]:
        """The prompts of Best-of-N."""
        if not self.plays:
            return shapeworld.prompts("test", self.scale.timed)
        return list(dict.fromkeys(self.played.videos["prompt"].to_pylist()))

    @cached_property
    def played(self) -> LatentStore:
        """The store whose candidates of test prompts Best-of-N chooses among."""
        if self.data is not None:
            return self.data
        shares = {"test": self.scale.test_prompts}
        if self.scale.train_prompts:  # the threshold of ties is chosen on validation pairs
            shares["validation"] = VALIDATION
        return self.collected("played", shares, self.scale.n)

    def collected(
        self, name: str, shares: Mapping[str, int], each: int, backbone: Backbone | None = None
    ) -> LatentStore:
        """Candidates of ShapeWorld's prompts with recorded states, labelled by the referee, in stores/NAME.

        shares: the number of prompts by split. each: candidates per prompt.
        """
        from prism.loading import load_reward

        prompts = [
            Prompt(text, Place("", row), split)
            for split, count in shares.items()
            for row, text in enumerate(shapeworld.prompts(split, count))
        ]
        folder = self.parts.folder / "stores" / name
        folder.parent.mkdir(exist_ok=True)
        return collect(
            prompts,
            backbone or self.backbone,
            self.call,
            folder,
            [load_reward("referee")],
            candidates=each,
            seed=self.seed,
            states=self.scale.states,
            half=True,
            margins=referee.TIE_MARGINS,
            unit=8,
            batch_size=self.sample_size,
            reports=False,  # a store has the splits that it is made for, and no others
            resume=folder.exists(),
            command="prism reproduce",
        )

    # -- judges

    def arms(self, names: Sequence[str]) -> dict[tuple[Any, ...], list[tuple[str, int, TrainConfig]]]:
        """The heads of these kinds that are not there yet, by what they read: name, seed and settings of each."""
        arms: dict[tuple[Any, ...], list[tuple[str, int, TrainConfig]]] = {}
        for seed in self.seeds:
            for name in names:
                if not self.parts.has(head_of(name, seed)):
                    settings = replace(self.scale.train, seed=seed, **self.kinds[name].train)
                    shared = tuple(getattr(settings, each) for each in SHARED)
                    arms.setdefault(shared, []).append((name, seed, settings))
        return arms

    def train(self, names: Sequence[str]) -> None:
        """Train the heads of these kinds that are not there yet; those that read the same batches in one pass."""
        for arm in self.arms(names).values():
            judges = [self.untrained(name, seed) for name, seed, _ in arm]
            words = f"{', '.join(name for name, *_ in arm[:3])}{', ...' if len(arm) > 3 else ''}, seed {arm[0][1]}"
            train_together(self.training, judges, [settings for *_, settings in arm], desc=f"train {words}")
            for (name, seed, _), judge in zip(arm, judges):
                self.parts.piece(f"{head_of(name, seed)}/", partial(_save, judge))

    def untrained(self, name: str, seed: int, backbone: Backbone | None = None) -> Judge:
        """A judge of a kind with random weights."""
        options = {"tap": self.tap, "dim": self.scale.dim, **self.kinds[name].head}
        return Judge.untrained(backbone or self.backbone, dimensions=self.training.dimensions, seed=seed, **options)

    @property
    def seeds(self) -> range:
        """The seeds of the heads of each kind."""
        return range(self.seed, self.seed + self.scale.seeds)

    def judges(self, name: str) -> list[Judge]:
        """The judges of a kind, one per seed; trained first where they are not there yet."""
        self.train([name])
        return [self._loaded(name, seed) for seed in self.seeds]

    @cached_property
    def pixels(self) -> dict[str, PixelJudge]:
        """The judges of decoded frames that ship, by name; none for a backbone of the user's own."""
        if self.data is not None:
            return {}
        from prism.lab.judges import PIXEL

        return {name: PixelJudge.from_pretrained(shapeworld.asset_folder(name), self.backbone) for name in PIXEL}

    # -- measurements

    def measured(self, names: Sequence[str]) -> dict[str, list[Measurement]]:
        """Measurements on the test pairs by kind, one per seed; judges that lack theirs read the videos together."""
        self.train(names)
        judges = {table_of(name, seed): partial(self._loaded, name, seed) for name in names for seed in self.seeds}
        tables = iter(self.together(judges, self.tested, "test", self.levels))
        return {name: [next(tables) for _ in self.seeds] for name in names}

    def by_pixels(self) -> dict[str, Measurement]:
        """Measurements of the judges of decoded frames on the same pairs under the same noise, by name."""
        levels = [t for t in self.levels if t in self.scale.pixel_levels]
        judges = {f"measured/{name}.parquet": partial(self.pixels.__getitem__, name) for name in self.pixels}
        # what costs is decoding, once for all of them
        return dict(zip(self.pixels, self.together(judges, self.tested, "test", levels, JointPixelJudge)))

    def together(
        self,
        judges: Mapping[str, Callable[[], Any]],
        store: LatentStore,
        split: str,
        levels: Sequence[float],
        joint: Callable[[Sequence[Any]], Any] = JointJudge,
    ) -> list[Measurement]:
        """Measurements that are kept in the run's folder; those that are missing are made in one pass.

        judges: what gives each judge, by the file of its measurement; it is asked where the file is missing. joint: as
        of `prism.evaluation.measure_together`.
        """
        missing = {path: judge() for path, judge in judges.items() if not self.parts.has(path)}
        if missing:
            tables = measure_together(
                list(missing.values()), store, split, levels, seed=self.seed, batch_size=self.batch_size, joint=joint
            )
            for path, table in zip(missing, tables):
                self.parts.piece(path, table.save)
        return [stored(self.parts, path) for path in judges]

    def measure_claimed(self, judge: Any, store: LatentStore, split: str, path: Path) -> None:
        """Measure a judge on a split at the levels that claims are pooled over, and write it to a path."""
        measure(judge, store, split, self.claimed, seed=self.seed, batch_size=self.batch_size).save(path)

    @property
    def claimed(self) -> list[float]:
        """The levels that claims are pooled over, of those that are measured."""
        return [t for t in CLAIMED if t in self.levels]

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The noise levels that are measured: those of the scale at which the denoiser is used."""
        low, high = self.backbone.t_range
        return tuple(t for t in self.scale.levels if low <= t <= high) or ((low + high) / 2,)

    def _loaded(self, name: str, seed: int) -> Judge:
        return Judge.from_pretrained(self.parts.folder / head_of(name, seed) / "head", self.backbone)


def seconds(bench: Bench, names: Sequence[str], trainings: float, plays: bool) -> float:
    """A rough estimate of what is left of a run, from a batch that is timed now.

    names: the kinds of heads that experiments need. trainings: groups of heads that they train beside. plays: True
    where one of them plays Best-of-N.
    """
    backbone, shipped = bench.backbone, LatentStore.open(shapeworld.asset_folder("candidates"))
    store = bench.data or shipped  # nothing is sampled before the estimate is said
    group = store.groups("train")[0]
    latents = store.latents([group.videos[0]] * BATCH)
    conditioning = backbone.condition([group.prompt] * BATCH, **bench.call)

    def timed(work: Callable[[], Any]) -> float:
        work()  # the first call of anything is slower
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    row = timed(lambda: backbone.tokens(latents, conditioning, bench.levels[0], backbone.num_blocks)) / BATCH
    decode = timed(lambda: backbone.decode(latents[:1]))
    sample = 2 * backbone.num_inference_steps(bench.call) * row + 2 * decode
    total, collected = 0.0, bench.data is None and bench.scale.train_prompts > 0
    if collected:
        videos, measured = float(EACH), (bench.scale.test_prompts + VALIDATION) * bench.scale.n
        if not bench.parts.has("stores/training/store.json"):
            total += bench.scale.train_prompts * EACH * sample
    else:
        videos = float(np.mean([len(each.videos) for each in store.groups("train")]))
        measured = sum(len(each.videos) for split in ("test", "validation") for each in store.groups(split))
    trained = bench.scale.train.steps * bench.scale.train.prompts_per_step * videos  # rows
    for arm in bench.arms(names).values():
        deepest = max(int(bench.kinds[name].head.get("tap", bench.tap)) for name, *_ in arm) / backbone.num_blocks
        of_heads = 0.15 * len(arm)  # a step of a small head, in passes of a small denoiser
        total += trained * (deepest + of_heads) * row
    if any(not bench.parts.has(table_of(name, seed)) for name in names for seed in bench.seeds):
        total += len(bench.levels) * measured * row * 1.5
    total += trainings * (trained * bench.tap / backbone.num_blocks * 1.5 + len(bench.levels) * measured) * row
    if not all(bench.parts.has(f"measured/{name}.parquet") for name in bench.pixels):
        total += len(bench.scale.pixel_levels) * measured * decode
    if bench.data is None and bench.plays and (collected or plays) and not bench.parts.has("stores/played/store.json"):
        total += (measured if collected else bench.scale.test_prompts * bench.scale.n) * sample
    return total


def _save(judge: Judge, folder: Path) -> None:
    judge.save_pretrained(folder / "head")


def head_of(name: str, seed: int) -> str:
    """The folder of a head, within the run's."""
    return f"heads/{name}/seed-{seed}"


def table_of(name: str, seed: int) -> str:
    """The file of a head's margins, within the run's folder."""
    return f"measured/{name}-{seed}.parquet"


def check_store(store: LatentStore) -> None:
    """Refuse a store without the pairs that a reproduction needs."""
    for split in ("train", "test"):
        if not store.groups(split):
            raise PrismError(
                f"The store {store.folder} has no labelled pairs in the split {split}; a reproduction trains on train "
                "and measures on test: encode or collect them (--held-out)."
            )
