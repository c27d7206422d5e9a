"""Heads of one recipe on many backbones: trained on the same pairs, measured on the same pairs, piece by piece."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism.backbone import Backbone
from prism.backbone.fingerprint import fits
from prism.errors import PrismError, quoted
from prism.evaluation import TIMESTEPS, Measurement, measure_together
from prism.evaluation.intervals import prompt_interval
from prism.judge import Judge
from prism.lab.ablations import RECIPE as RECIPE
from prism.lab.correlation import PerPrompt
from prism.lab.findings import stored
from prism.preference import LatentStore
from prism.runs import Clock, Parts
from prism.training import TrainConfig, train_together
from prism.training.trainer import untrained_heads

ONE_VAE = "backbones are compared on the same latents, so name those of one VAE."
DEPTH = 2 / 3  # of a ShapeWorld backbone's blocks: 4 of the default's 6, chosen on validation prompts (docs/study.md)


@dataclass(frozen=True)
class Subject:
    """A backbone that heads are put on.

    load: gives it. run: the training that it is a stage of, where others of its stages are compared with it.
    parameters, compute: of its denoiser and of its training; None: unknown.
    """

    name: str
    load: Callable[[], Backbone]
    parameters: float | None = None
    compute: float | None = None
    run: str | None = None


@dataclass(frozen=True)
class HeadRecipe:
    """What all heads have in common.

    seeds: heads on each backbone; they read the same batches and differ in their first weights. dim: width; None: twice
    that of the tokens. depth: share of the blocks after which a head reads; None: the family's own. levels: noise
    levels that accuracy is measured at. dimension: whose accuracy is judging power; "": overall, or else the first.
    """

    seeds: int = 3
    train: TrainConfig = RECIPE
    dim: int | None = 144
    depth: float | None = DEPTH
    levels: tuple[float, ...] = TIMESTEPS
    dimension: str = ""
    seed: int = 0
    batch_size: int = 64

    def tap(self, backbone: Backbone) -> int:
        """The block after which a head reads this backbone."""
        return backbone.default_tap if self.depth is None else max(1, round(self.depth * backbone.num_blocks))


Measured = dict[str, dict[str, list[Measurement]]]
"""By set of videos and backbone: a measurement per head."""


@dataclass
class HeadsOnBackbones:
    """Trains and measures the heads of subjects, each piece once.

    parts: the run's folder. stores: the sets of judged videos by name, each with pairs to train and to test on.
    tested: by name, another store whose test pairs are measured on.
    """

    parts: Parts
    stores: Mapping[str, LatentStore]
    tested: Mapping[str, LatentStore] = field(default_factory=dict)
    recipe: HeadRecipe = field(default_factory=HeadRecipe)
    _reference: tuple[str, dict[str, Any], np.ndarray] | None = None

    def measured(self, subjects: Sequence[Subject]) -> Measured:
        """The measurements of every subject on every set; those that are missing are made, backbone by backbone.

        Raises:
            PrismError: for a name that is given twice, or a backbone whose VAE is not the first one's.
        """
        names = [subject.name for subject in subjects]
        for name in names:
            if names.count(name) > 1:
                raise PrismError(f"The backbone {quoted(name, 80)} is named {names.count(name)} times; name it once.")
        clock, done = Clock("heads on backbones", len(subjects) * len(self.stores), every=30), 0
        for subject in subjects:
            loaded: Backbone | None = None
            for kind in self.stores:
                missing = not all(self.parts.has(self._table(kind, subject.name, k)) for k in range(self.recipe.seeds))
                if missing:
                    loaded = loaded or self._checked(subject, subjects[0])
                    self._judge(kind, subject.name, loaded)
                done += 1
                clock.tick(done, missing, f" ({subject.name} on {kind})")
        return {
            kind: {
                name: [stored(self.parts, self._table(kind, name, k)) for k in range(self.recipe.seeds)]
                for name in names
            }
            for kind in self.stores
        }

    def judges(self, kind: str, name: str, backbone: Backbone) -> list[Judge]:
        """The heads of a backbone that were trained on a set; they are trained where they are missing."""

        def train(folder: Path) -> None:
            options = {"dim": self.recipe.dim, "dimensions": store.dimensions}
            taps = [self.recipe.tap(backbone)] * self.recipe.seeds
            heads = untrained_heads(backbone, taps, self.recipe.seed, **options)
            config = self.recipe.train
            train_together(store, heads, [config] * len(heads), desc=f"heads of {name} on {kind}")
            for number, head in enumerate(heads):
                head.save_pretrained(folder / f"head-{number}", {**head.trained_on, "seed": number})

        store = self.stores[kind]
        folder = self.parts.piece(f"heads/{kind}/{file_name(name)}/", train)
        return [Judge.from_pretrained(folder / f"head-{number}", backbone) for number in range(self.recipe.seeds)]

    def _judge(self, kind: str, name: str, backbone: Backbone) -> None:
        low, high = backbone.t_range
        levels = [t for t in self.recipe.levels if low <= t <= high]
        judges, store = self.judges(kind, name, backbone), self.tested.get(kind, self.stores[kind])
        for judge in judges:
            judge.name = name
        seed, size = self.recipe.seed, self.recipe.batch_size
        for number, table in enumerate(measure_together(judges, store, "test", levels, seed=seed, batch_size=size)):
            self.parts.piece(self._table(kind, name, number), table.save)

    def _table(self, kind: str, name: str, number: int) -> str:
        return f"measured/{kind}/{file_name(name)}-{number}.parquet"

    def _checked(self, subject: Subject, first: Subject) -> Backbone:
        """A subject's backbone, if its VAE is that of the first subject."""
        backbone = subject.load()
        if self._reference is None:
            base = backbone if subject is first else first.load()
            self._reference = first.name, base.fingerprint(), _vae_sample(base)
        name, fingerprint, sample = self._reference
        refusals, _ = fits(fingerprint, backbone, ("vae",))
        if refusals:
            was, present = refusals[0]
            raise PrismError(
                f"The backbone {quoted(name, 80)} has the {was}, {quoted(subject.name, 80)} has {present}; {ONE_VAE}"
            )
        other = _vae_sample(backbone)
        if other.shape != sample.shape or not np.allclose(other, sample, rtol=1e-2, atol=1e-3):
            raise PrismError(
                f"The VAE of {quoted(subject.name, 80)} has other weights than that of {quoted(name, 80)}; {ONE_VAE}"
            )
        return backbone


def file_name(name: str) -> str:
    """A backbone's name as that of a file: an id on the Hub has a slash."""
    safe = re.sub(r"[^\w.+-]+", "-", name).lstrip(".")[:60]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _vae_sample(backbone: Backbone) -> np.ndarray:
    """The first numbers of each weight of the VAE, without their names."""
    vae = backbone.pipe.vae
    values = [value.detach().flatten()[:16].float().cpu().numpy() for _, value in sorted(vae.state_dict().items())]
    return np.concatenate([each for each in values if each.size])


def dimension_of(measured: Measurement, wanted: str = "") -> str:
    """The dimension whose accuracy counts: the wanted one, else overall, else the first."""
    names = list(dict.fromkeys(block.dimension for block in measured.blocks))
    if wanted and wanted not in names:
        raise PrismError(f"The pairs have no labels of {quoted(wanted, 60)}; they have those of {', '.join(names)}.")
    return wanted or ("overall" if "overall" in names else names[0])


def right_of(measured: Sequence[Measurement], dimension: str) -> tuple[np.ndarray, np.ndarray, list[Any], list[float]]:
    """(heads, levels, pairs) of 1 where a decided pair was judged right; the pairs' prompts, their generators, levels.

    generators: pairs of names, None where none is known.
    """
    blocks = [[block for block in each.blocks if block.dimension == dimension] for each in measured]
    first = blocks[0][0]
    kept = first.decided
    right = np.array([[block.right[block.decided] for block in each] for each in blocks], dtype=np.float64)
    table = measured[0].decided()[first.t, dimension]
    generators = list(zip(first.models[0][kept].tolist(), first.models[1][kept].tolist()))
    return right, np.asarray(table[1]), generators, [block.t for block in blocks[0]]


def power(right: np.ndarray, prompts: np.ndarray) -> PerPrompt:
    """Judging power: accuracy without ties over levels and pairs. right: (heads, levels, pairs)."""
    names, index = np.unique(prompts, return_inverse=True)
    sums = np.stack([np.bincount(index, each.sum(0), len(names)) for each in right])
    counts = np.bincount(index, np.full(len(index), right.shape[1]), len(names))
    return PerPrompt(sums, counts.astype(np.float64), tuple(names.tolist()))


def bonus_of_own(right: Mapping[str, np.ndarray], prompts: np.ndarray, generators: Sequence[Any]) -> dict[str, Any]:
    """How much better a backbone judges pairs of its own videos than the others do, with an interval over prompts.

    What each backbone judges better everywhere, and what is easier in each generator's pairs, is taken off: without a
    bonus each accuracy is a sum of both.

    Args:
        right: by backbone, (heads, levels, pairs).
        prompts, generators: of the pairs, as from `right_of`.

    Returns:
        {"bonus", "bonus_ci95", "pairs", "backbones"}; None where pairs of one backbone's own videos are missing.
    """
    names = list(right)
    own = np.array([names.index(a) if a == b and a in names else -1 for a, b in generators])
    kept = own >= 0
    size, seen = len(names), len(set(own[kept].tolist()))
    nothing = {"bonus": None, "bonus_ci95": None, "pairs": int(kept.sum()), "backbones": seen}
    if size < 2 or seen < size:
        return nothing
    shares = np.stack([right[name].mean((0, 1))[kept] for name in names])  # (K, pairs)
    centred = shares - shares.mean(0)
    of_generator = np.array([(own[kept] == g).sum() for g in range(size)])
    weights = 1 / of_generator[own[kept]] / size  # every generator counts alike
    centred = centred - (centred @ weights)[:, None]
    values = centred[own[kept], np.arange(int(kept.sum()))] * weights * size / (size - 1)
    # A resample's mean over generators is the ratio of resampled values to resampled weights.
    interval = prompt_interval(np.stack([values, weights], 1), prompts[kept], lambda sums: sums[:, 0] / sums[:, 1])
    return {"bonus": float(values.sum()), "bonus_ci95": interval, "pairs": int(kept.sum()), "backbones": size}
