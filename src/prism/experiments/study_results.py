"""What came of a study's heads: their scores of the validation videos, tables of them, and the one look at test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism import files
from prism.errors import PrismError
from prism.evaluation import calibrate, compare_judges, measure, prompt_interval
from prism.evaluation.calibration import fit, margins_of, reliability
from prism.evaluation.evaluator import Video, noised, videos_of
from prism.experiments.variants import BASE, Variant
from prism.judge import Judge
from prism.memory import in_batches
from prism.preference import LatentStore
from prism.training.conditionings import conditioned
from prism.training.validation import LEVELS, levels

SCORES = "scores.safetensors"
SEED = 0  # of the noise that validation videos are scored under


@torch.no_grad()
def score_heads(judges: Sequence[Judge], store: LatentStore, config: Any) -> list[Tensor]:
    """Each judge's scores of the validation videos, (levels, draws, videos, num_dimensions): one read for all."""
    backbone, store = judges[0].backbone, LatentStore.of(store)
    taps = sorted({tap for judge in judges for tap in judge.taps})
    passes = [(t, draw) for t in levels(backbone) for draw in range(config.draws)]
    parts: list[list[Tensor]] = []

    def work(batch: Sequence[Video]) -> None:
        videos, prompts = [video for video, _ in batch], [prompt for _, prompt in batch]
        latents, conditioning = store.latents(videos), conditioned(backbone, store, prompts)
        scores: list[list[Tensor]] = [[] for _ in judges]
        for t, draw in passes:
            tokens = backbone.tokens(noised(backbone, latents, videos, t, draw, SEED), conditioning, t, taps)
            for rows, judge in zip(scores, judges):
                rows.append(judge.score_tokens(tokens).cpu())
        parts.append([torch.stack(rows) for rows in scores])

    groups = store.groups("validation", judges[0].dimensions)
    in_batches(videos_of(groups), config.train.max_rows, work, "scoring heads")
    shape = len(passes) // config.draws, config.draws
    return [torch.cat(rows, 1).unflatten(0, shape) for rows in zip(*parts)]


def complete(out: Path, variant: Variant, everything: Sequence[Variant], config: Any) -> bool:
    """Whether all the heads that a variant needs are trained and scored."""
    names = variant.members or ((variant.name,) if variant.trained else (BASE,))
    folders = (out / "heads" / name / f"seed-{seed}" for name in {*names, BASE} for seed in range(config.seeds))
    return all((folder / SCORES).is_file() for folder in folders)


def replicates(variant: Variant, config: Any) -> list[list[tuple[str, int, int]]]:
    """Each judge that a variant was made into: its heads as (variant, seed, init)."""
    seeds, inits = range(config.seeds), range(config.inits)
    if variant.across:
        return [[(BASE, seed, init) for seed in list(seeds)[: variant.heads]] for init in inits]
    if variant.heads > 1:
        return [[(BASE, seed, init) for init in range(variant.heads)] for seed in seeds]
    names = variant.members or ((variant.name,) if variant.trained else (BASE,))
    return [[(name, seed, init) for name in names] for seed in seeds for init in inits]


class Results:
    """Rows of the study's table, from the scores that lie in its folder."""

    def __init__(self, out: Path, store: LatentStore, config: Any, levels: Sequence[float] = LEVELS) -> None:
        self.out, self.config, self.dimensions, self.levels = out, config, store.dimensions, levels
        groups = store.groups("validation", self.dimensions)
        if not groups:
            raise PrismError(f"The store {store.folder} has no validation pairs, which the study compares on.")
        starts = np.cumsum([0, *(len(group.videos) for group in groups)])
        self.first = np.concatenate([group.first + start for group, start in zip(groups, starts)])
        self.second = np.concatenate([group.second + start for group, start in zip(groups, starts)])
        self.labels = np.concatenate([group.labels for group in groups])
        self.prompts = np.repeat(np.arange(len(groups)), [len(group.labels) for group in groups])
        self._scores: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._base: dict[str, np.ndarray] = {}

    def margins(self, variant: Variant, heads: Sequence[tuple[str, int, int]]) -> np.ndarray:
        """(levels, groups of draws, pairs, num_dimensions) of one replicate."""
        members = []
        for name, seed, init in heads:
            if (name, seed) not in self._scores:
                path = self.out / "heads" / name / f"seed-{seed}" / SCORES
                self._scores[name, seed] = files.load_safetensors(path)
            scores = self._scores[name, seed][f"head-{init}"].double().numpy()
            margins = scores[:, :, self.first] - scores[:, :, self.second]
            members.append(margins / margins.std((0, 1, 2)) if variant.standardised else margins)
        mean, draws = np.mean(members, 0), variant.draws
        whole = mean.shape[1] // draws * draws
        return mean[:, :whole].reshape(mean.shape[0], -1, draws, *mean.shape[2:]).mean(2)

    def right(self, variant: Variant, dimension: str) -> np.ndarray:
        """(replicates, levels, decided pairs): how often each was judged right, over noise draws."""
        column = self.dimensions.index(dimension)
        decided = np.abs(self.labels[:, column]) == 1
        labels = self.labels[decided, column]
        margins = (self.margins(variant, heads)[:, :, decided, column] for heads in replicates(variant, self.config))
        return np.stack([(values * labels > 0).mean(1) for values in margins])

    def row(self, variant: Variant) -> dict[str, Any]:
        """What came of a variant: accuracy without ties, and its difference from the recipe's, with intervals."""
        right = {dimension: self.right(variant, dimension) for dimension in self.dimensions}
        if not self._base:
            self._base = {d: self.right(Variant(BASE, "", ""), d) for d in self.dimensions}
        main = "overall" if "overall" in right else self.dimensions[0]
        column = self.dimensions.index(main)
        prompts = self.prompts[np.abs(self.labels[:, column]) == 1]
        pairs, base = right[main].mean((0, 1)), self._base[main].mean((0, 1))
        single = right[main].mean((1, 2))
        return {
            "variant": variant.name,
            "question": variant.question,
            "what": variant.what,
            "train": dict(variant.train),
            "head": dict(variant.head),
            "set": "validation",
            "dimension": main,
            "accuracy": float(pairs.mean()),
            "accuracy_ci95": prompt_interval(pairs, prompts),
            "difference": float((pairs - base).mean()),
            "difference_ci95": prompt_interval(pairs - base, prompts),
            "spread": float(single.std(ddof=1)) if len(single) > 1 else None,
            "judges": len(single),
            "by_level": {f"{t:g}": float(value) for t, value in zip(self.levels, right[main].mean((0, 2)))},
            "by_dimension": {dimension: float(values.mean()) for dimension, values in right.items()},
            "pairs": len(pairs),
            "prompts": len(set(prompts.tolist())),
        }

    def calibration(self, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Temperature and eta fitted on half of the prompts, and what they do on the other half, each way round."""
        rows = []
        for variant in variants:
            margins = self.margins(variant, replicates(variant, self.config)[0])[:, 0]  # one draw a level
            for column, dimension in enumerate(self.dimensions):
                known, decided = ~np.isnan(self.labels[:, column]), np.abs(self.labels[:, column]) == 1
                if any(not decided[self.prompts % 2 == half].any() for half in (0, 1)):
                    continue  # nothing to fit on, or to see it on
                halves = []
                for half in (0, 1):
                    fitted, other = known & (self.prompts % 2 == half), known & (self.prompts % 2 != half)
                    labels, values = self.labels[:, column], margins[:, :, column]
                    found = fit(np.tile(labels[fitted], len(values)), values[:, fitted].ravel())
                    on_other = np.tile(labels[other], len(values)), values[:, other].ravel()
                    numbers = {"temperature": found.temperature, "eta": found.eta}
                    halves.append({**numbers, **reliability(*on_other, self.config.train.eta, numbers)})
                mean = {name: float(np.mean([half[name] for half in halves])) for name in halves[0]}
                rows.append({"variant": variant.name, "dimension": dimension, **mean})
        return rows


def confirm(
    out: Path, variant: Variant, everything: Sequence[Variant], config: Any, store: LatentStore, backbone: Any
) -> dict[str, Any]:
    """Measure a variant on the test split, beside the recipe, and save its judge; each variant but once.

    Raises PrismError for a variant that was confirmed before, or that no judge can be made of.
    """
    path = out / "confirmed" / f"{variant.name}.json"
    if path.exists():
        raise PrismError(
            f"The variant {variant.name} was confirmed before, see {path}; the test split is looked at once."
        )
    if variant.standardised:
        raise PrismError(f"The variant {variant.name} is a comparison alone: no judge standardises its heads.")
    path.parent.mkdir(exist_ok=True)
    measured: dict[str, list[Any]] = {}
    calibration = []
    for each in {variant.name: variant, BASE: everything[0]}.values():
        measured[each.name] = []
        for place, heads in enumerate(replicates(each, config)[:: 1 if each.heads > 1 else config.inits]):
            folders = [out / "heads" / name / f"seed-{seed}" / f"head-{init}" for name, seed, init in heads]
            judge = Judge.average([Judge.from_pretrained(folder, backbone) for folder in folders])
            judge.name = each.name
            found = measure(judge, store, "test", num_draws=each.draws)
            measured[each.name].append(found)
            if each is variant:
                found.save(path.with_name(f"{variant.name}-{place}.parquet"))
                on_validation = measure(judge, store, "validation", levels(backbone), num_draws=each.draws)
                calibrate(judge, on_validation)
                judge.save_pretrained(path.with_name(f"{variant.name}-{place}"), overwrite=True)
                calibration += [
                    {"dimension": dimension, "judge": place, **judge.calibration[dimension]}
                    | reliability(*pairs, judge.eta, judge.calibration[dimension])
                    for dimension, pairs in margins_of(found).items()
                ]
    entry = {
        "variant": variant.name,
        "accuracy": [row for found in measured.values() for each in found for row in each.rows],
        "comparison": []
        if variant.name == BASE
        else compare_judges(measured[variant.name], measured[BASE], any_draws=True),
        "calibration": calibration,
    }
    files.write_json(path, entry)
    return entry


def confirmations(out: Path) -> list[dict[str, Any]]:
    """What was confirmed so far."""
    return [files.read_json(path) for path in sorted((out / "confirmed").glob("*.json"))]


def accuracy(confirmed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The "accuracy" rows of what was confirmed; the recipe's, which each brings along, once."""
    rows = [row for entry in confirmed for row in entry["accuracy"] if row["judge"] != BASE]
    return rows + [row for row in confirmed[0]["accuracy"] if row["judge"] == BASE] if confirmed else []


HEADER = ("variant", "", "accuracy", "95 %", "difference", "95 %", "spread")
SIDES = ("VQ", "MQ", "TA")
CALIBRATION = ("judge", "dimension", "temperature", "eta", "NLL before", "after", "error before", "after")


def markdown(rows: Sequence[dict[str, Any]], calibration: Sequence[dict[str, Any]]) -> str:
    """The study's tables as Markdown, by question; shares in percent."""
    lines = []
    for question in dict.fromkeys(row["question"] for row in rows):
        header = (*HEADER, *rows[0]["by_level"], *SIDES)
        lines += [f"### {question.capitalize()}", "", *_table(header)]
        lines += [_line(_cells(row)) for row in rows if row["question"] == question] + [""]
    if calibration:
        lines += ["### Calibration", "", *_table(CALIBRATION)]
        for row in calibration:
            plain = [f"{row[name]:.2f}" for name in ("temperature", "eta", "nll_before", "nll_after")]
            plain[0] = plain[0] if row["temperature"] < 100 else "above 100"  # nothing there to be sure of
            errors = [f"{100 * row[f'calibration_error_{when}']:.1f}" for when in ("before", "after")]
            lines.append(_line([f"`{row['variant']}`", row["dimension"], *plain, *errors]))
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    percent = "{:.1f}".format
    intervals = row["accuracy_ci95"], row["difference_ci95"]
    interval = ["" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" for ends in intervals]
    sides = [row["by_dimension"].get(dimension) for dimension in SIDES]
    numbers = [row["spread"], *row["by_level"].values(), *sides]
    return [
        *(f"`{row['variant']}`", row["what"], percent(100 * row["accuracy"]), interval[0]),
        *(f"{100 * row['difference']:+.1f}", interval[1]),
        *("" if value is None else percent(100 * value) for value in numbers),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(header: Sequence[str]) -> list[str]:
    return [_line(header), "|" + "---|" * len(header)]
