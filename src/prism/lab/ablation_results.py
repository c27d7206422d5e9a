"""Variants of a recipe, and the scores, tables and confirmations of the heads trained by each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism import files
from prism.errors import PrismError, quoted
from prism.evaluation import calibrate, compare_judges, measure, prompt_interval
from prism.evaluation.calibration import fit, margins_of, reliability
from prism.evaluation.evaluator import Video, noised, videos_of
from prism.judge import Judge
from prism.preference import LatentStore
from prism.report import tables, wording
from prism.report.rows import AccuracyRow, CalibrationRow, StudyRow
from prism.runs import Parts
from prism.team import in_batches
from prism.training.conditionings import conditioned
from prism.training.config import TrainConfig
from prism.training.validation import LEVELS, levels

BASE = "base"
BASE_HEADS = 5  # heads trained by the recipe itself, so that up to so many can be averaged


@dataclass(frozen=True)
class Variant:
    """A recipe for a judge.

    question, what: the question that it helps to answer, and the variant in words.
    train, head: its changes of `TrainConfig` and of the arguments of `Judge.untrained`.
    members: other variants whose heads it averages; it trains none.
    heads: number of heads that it averages, of different first weights; `across`: of different seeds, each with batches
        and noise of its own.
    draws: noise draws that a score is averaged over.
    standardised: True to divide members by the spread of their scores before they are averaged.
    """

    name: str
    question: str
    what: str
    train: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    heads: int = 1
    across: bool = False
    draws: int = 1
    standardised: bool = False

    @property
    def trained(self) -> bool:
        """True for a variant with heads of its own."""
        return not self.members and self.heads == 1 and self.draws == 1


def table(
    blocks: int, tap: int, prompts: int, per_prompt: int, train: TrainConfig, trajectories: bool
) -> list[Variant]:
    """Every variant, the recipe first.

    blocks, tap: of the backbone and the recipe. prompts, per_prompt: training prompts and videos of each in the store.
    train: the recipe's settings. trajectories: True where the store holds recorded states.
    """
    steps, learning_rate = train.steps, train.learning_rate
    rows = [Variant(BASE, "recipe", "the recipe that all others differ from in one thing")]

    def add(question: str, name: str, what: str, **changes: Any) -> None:
        rows.append(Variant(name, question, what, **changes))

    for part in (2, 4, 8):
        if prompts // part >= 2:
            count = prompts // part
            add("videos", f"prompts-{count}", f"{count} prompts of {prompts}", train={"max_prompts": count})
    for count in (4, 2):
        if count < per_prompt:
            add("videos", f"per-prompt-{count}", f"{count} videos a prompt, not {per_prompt}",
                train={"per_prompt": count})  # fmt: skip
    for count in (1, 4, 16):
        add("noise draws", f"noise-{count}", f"every video gets {count} noise draws for good, not fresh ones",
            train={"noise_draws": count})  # fmt: skip
    half = max(1, train.prompts_per_step // 2)
    add("noise draws", "draws-per-step-2", "half the prompts a step, each noised twice",
        train={"draws_per_step": 2, "prompts_per_step": half})  # fmt: skip
    add("noise draws", "shared-noise", "the videos of a prompt get the same noise", train={"shared_noise": True})
    if trajectories:
        add("states", "trajectory", "states recorded while sampling alone", train={"source": "trajectory"})
        for share in (0.25, 0.5):
            add("states", f"mixed-{share:g}", f"{share:.0%} of the steps on recorded states",
                train={"source": "mixed", "trajectory_share": share})  # fmt: skip
    for count in (2, 3, BASE_HEADS):
        add("averages", f"heads-{count}", f"{count} heads averaged, trained on the same batches", heads=count)
    add("averages", "heads-across", "a head of each seed averaged, each trained on batches of its own", across=True,
        heads=2)  # fmt: skip
    others = [block for block in range(1, blocks + 1) if block != tap]
    for block in others:
        add("taps", f"tap-{block}", f"read after block {block} of {blocks}, not {tap}", head={"tap": block})
    for block in others:
        members = (BASE, f"tap-{block}")
        add("taps", f"taps-{min(block, tap)}+{max(block, tap)}", f"heads after blocks {block} and {tap} averaged",
            members=members)  # fmt: skip
    if others:
        everything = (BASE, *(f"tap-{block}" for block in others))
        add("taps", "taps-all", "a head after every block, averaged", members=everything)
        add("taps", "taps-all-standardised", "the same, each divided by its spread first", members=everything,
            standardised=True)  # fmt: skip
    for count in (2, 4, 8):
        add("scoring draws", f"draws-{count}", f"scores averaged over {count} noise draws", draws=count)
    add("scoring draws", f"heads-{BASE_HEADS}-draws-8", f"{BASE_HEADS} heads and 8 noise draws averaged",
        heads=BASE_HEADS, draws=8)  # fmt: skip
    for dim in (64, 128, 512):
        add("head", f"width-{dim}", f"a head {dim} wide", head={"dim": dim})
    for layers in (1, 3):
        add("head", f"layers-{layers}", f"an MLP of {layers} layers, not 5", head={"mlp_layers": layers})
    add("head", "queries-4", "four queries, not one", head={"num_queries": 4})
    add("aggregation", "mean", "the mean token in place of the query", head={"aggregation": "mean"})
    add("aggregation", "linear", "a linear probe on the mean token", head={"aggregation": "linear"})
    for factor in (0.1, 0.3, 3.0):
        add("optimiser", f"rate-{factor * learning_rate:.0e}", f"learning rate times {factor:g}",
            train={"learning_rate": factor * learning_rate})  # fmt: skip
    for factor in (0.25, 0.5, 2.0):
        count = round(factor * steps)
        add("optimiser", f"steps-{count}", f"{count} steps, not {steps}", train={"steps": count})
    add("optimiser", "ema", "the moving average of the weights", train={"ema_decay": 0.99})
    add("regularising", "decay-1", "weight decay 1, not 0.01", train={"weight_decay": 1.0})
    add("regularising", "smoothing", "a tenth of each label spread over all outcomes", train={"label_smoothing": 0.1})
    add("objective", "eta-1.5", "eta 1.5, near the share of ties, not 5", train={"eta": 1.5})
    add("objective", "bt", "ties left out", train={"objective": "bt"})
    add("levels", "levels-noise", "more steps at high noise", train={"levels": "noise"})
    add("levels", "levels-clean", "more steps at low noise", train={"levels": "clean"})
    add("levels", "levels-200-950", "t from 200 to 950 alone", train={"t_low": 200.0, "t_high": 950.0})
    return rows


def chosen(rows: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """The variants of some names or questions, with the recipe and all members of averages.

    Raises PrismError for a name that no variant and no question has.
    """
    if not only:
        return list(rows)
    for name in only:
        if not any(name in (row.name, row.question) for row in rows):
            questions = ", ".join(dict.fromkeys(row.question for row in rows))
            near = difflib.get_close_matches(name, [row.name for row in rows], 3)
            near_it = f"the variants nearest to it are {', '.join(near)}, and " if near else ""
            raise PrismError(
                f"The study has no variant and no question {quoted(repr(name), 60)}; {near_it}its questions are "
                f"{questions}."
            )
    names = {row.name for row in rows if row.name in only or row.question in only} | {BASE}
    names |= {member for row in rows if row.name in names for member in row.members}
    return [row for row in rows if row.name in names]


SCORES = "scores.safetensors"
SEED = 0  # of the noise that validation videos are scored under


@torch.no_grad()
def score_heads(judges: Sequence[Judge], store: LatentStore, config: Any) -> list[Tensor]:
    """Each judge's scores of the validation videos, (levels, draws, videos, num_dimensions); tokens are read once."""
    backbone, store = judges[0].backbone, LatentStore.of(store)
    taps = sorted({tap for judge in judges for tap in judge.taps})
    passes = [(t, draw) for t in levels(backbone) for draw in range(config.draws)]
    parts: list[list[Tensor]] = []

    def work(batch: Sequence[Video]) -> None:
        videos, prompts = [video for video, _ in batch], [prompt for _, prompt in batch]
        latents, conditioning = store.latents(videos), conditioned(backbone, store, prompts, store.call)
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


def heads_of(name: str, seed: int) -> str:
    """The folder of a variant's heads of one seed, within the study's."""
    return f"heads/{name}/seed-{seed}"


def complete(parts: Parts, variant: Variant, config: Any) -> bool:
    """True once all heads that a variant needs are trained and scored."""
    names = variant.members or ((variant.name,) if variant.trained else (BASE,))
    return all(parts.has(f"{heads_of(name, seed)}/{SCORES}") for name in {*names, BASE} for seed in range(config.seeds))


def replicates(variant: Variant, config: Any) -> list[list[tuple[str, int, int]]]:
    """The judges of a variant, each as a list of its heads: (variant, seed, init)."""
    seeds, inits = range(config.seeds), range(config.inits)
    if variant.across:
        return [[(BASE, seed, init) for seed in list(seeds)[: variant.heads]] for init in inits]
    if variant.heads > 1:
        return [[(BASE, seed, init) for init in range(variant.heads)] for seed in seeds]
    names = variant.members or ((variant.name,) if variant.trained else (BASE,))
    return [[(name, seed, init) for name in names] for seed in seeds for init in inits]


class Results:
    """Rows of the study's table, from the scores in its folder."""

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
                self._scores[name, seed] = files.load_safetensors(self.out / heads_of(name, seed) / SCORES)
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

    def row(self, variant: Variant) -> StudyRow:
        """Accuracy of a variant without ties, and its difference from the recipe's, with intervals."""
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

    def calibration(self, variants: Sequence[Variant]) -> list[CalibrationRow]:
        """Rows of calibration: temperature and eta fitted on half of the prompts, their effect on the other half, and
        the mean of both ways round."""
        rows: list[CalibrationRow] = []
        for variant in variants:
            margins = self.margins(variant, replicates(variant, self.config)[0])[:, 0]  # one draw per level
            for column, dimension in enumerate(self.dimensions):
                labelled, decided = ~np.isnan(self.labels[:, column]), np.abs(self.labels[:, column]) == 1
                if any(not decided[self.prompts % 2 == half].any() for half in (0, 1)):
                    continue  # one half has nothing to fit on, or to measure the other half's fit on
                halves = []
                for half in (0, 1):
                    fitted, other = labelled & (self.prompts % 2 == half), labelled & (self.prompts % 2 != half)
                    labels, values = self.labels[:, column], margins[:, :, column]
                    calibration = fit(np.tile(labels[fitted], len(values)), values[:, fitted].ravel())
                    on_other = np.tile(labels[other], len(values)), values[:, other].ravel()
                    numbers = {"temperature": calibration.temperature, "eta": calibration.eta}
                    halves.append({**numbers, **reliability(*on_other, self.config.train.eta, numbers)})
                mean = {name: float(np.mean([half[name] for half in halves])) for name in halves[0]}
                rows.append(
                    {
                        "variant": variant.name,
                        "dimension": dimension,
                        "temperature": mean["temperature"],
                        "eta": mean["eta"],
                        "nll_before": mean["nll_before"],
                        "nll_after": mean["nll_after"],
                        "calibration_error_before": mean["calibration_error_before"],
                        "calibration_error_after": mean["calibration_error_after"],
                    }
                )
        return rows


def confirm(
    parts: Parts, variant: Variant, everything: Sequence[Variant], config: Any, store: LatentStore, backbone: Any
) -> dict[str, Any]:
    """Measure a variant and the recipe on the test split, and save the variant's judge; at most once per variant.

    Raises PrismError for a variant that was confirmed before, or of which no judge can be made.
    """
    name = f"confirmed/{variant.name}"
    if parts.has(f"{name}.json"):
        raise PrismError(
            f"The variant {variant.name} was confirmed before, see {parts.folder / name}.json; the test split is "
            "looked at once."
        )
    if variant.standardised:
        raise PrismError(f"The variant {variant.name} is a comparison alone: no judge standardises its heads.")
    return parts.once(name, lambda: _confirmation(parts.folder, variant, everything[0], config, store, backbone))


def _confirmation(
    out: Path, variant: Variant, recipe: Variant, config: Any, store: LatentStore, backbone: Any
) -> dict[str, Any]:
    """The entry of a confirmed variant; its judges and their measurements are saved in the same folder."""
    measured: dict[str, list[Any]] = {}
    calibration = []
    for each in {variant.name: variant, BASE: recipe}.values():
        measured[each.name] = []
        for number, heads in enumerate(replicates(each, config)[:: 1 if each.heads > 1 else config.inits]):
            folders = [out / heads_of(name, seed) / f"head-{init}" for name, seed, init in heads]
            judge = Judge.average([Judge.from_pretrained(folder, backbone) for folder in folders])
            judge.name = each.name
            on_test = measure(judge, store, "test", num_draws=each.draws)
            measured[each.name].append(on_test)
            if each is variant:
                on_test.save(out / "confirmed" / f"{variant.name}-{number}.parquet")
                on_validation = measure(judge, store, "validation", levels(backbone), num_draws=each.draws)
                calibrate(judge, on_validation)
                judge.save_pretrained(out / "confirmed" / f"{variant.name}-{number}", overwrite=True)
                calibration += [
                    {"dimension": dimension, "judge": number, **judge.calibration[dimension]}
                    | reliability(*pairs, judge.eta, judge.calibration[dimension])
                    for dimension, pairs in margins_of(on_test).items()
                ]
    return {
        "variant": variant.name,
        "accuracy": [row for measurements in measured.values() for each in measurements for row in each.rows],
        "comparison": []
        if variant.name == BASE
        else compare_judges(measured[variant.name], measured[BASE], any_draws=True),
        "calibration": calibration,
    }


def confirmations(out: Path) -> list[dict[str, Any]]:
    """The entries of the variants that were confirmed so far."""
    return [files.read_json(path) for path in sorted((out / "confirmed").glob("*.json"))]


def accuracy(confirmed: Sequence[Mapping[str, Any]]) -> list[AccuracyRow]:
    """The "accuracy" rows of confirmed variants, then those of the recipe, which every entry holds, once."""
    rows: list[AccuracyRow] = [row for entry in confirmed for row in entry["accuracy"] if row["judge"] != BASE]
    return rows + [row for row in confirmed[0]["accuracy"] if row["judge"] == BASE] if confirmed else []


def markdown(rows: Sequence[StudyRow], calibration: Sequence[CalibrationRow]) -> str:
    """The study's tables as Markdown, by question; shares in percent."""
    parts = [
        f"### {question.capitalize()}\n\n{tables.study_table(some).markdown()}\n"
        for question, some in wording.by_question(rows).items()
    ]
    if calibration:
        parts.append(f"### Calibration\n\n{tables.calibration_table(calibration).markdown()}\n")
    return "\n".join(parts)
