"""The claim that a frozen backbone judges better out of domain than one that was fine-tuned (supplement Table 2).

The tuned judge trains its backbone's blocks, up to the one that its head reads, together with the head, on the same
pairs and batches as the frozen judge's head. Out of domain are videos of another generator, and prompts of unseen
combinations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from prism import shapeworld
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import Measurement
from prism.judge import Judge
from prism.judge.objective import label_counts, preference_loss
from prism.lab.bench import BASE, Bench
from prism.lab.findings import CLAIMED, Drawing, Experiment, Finding, Tables, judged, shares, stored
from prism.preference import LatentStore
from prism.report.claim_plots import Bar, forest
from prism.runs import Clock
from prism.training import TrainConfig
from prism.training.batches import Batches, training_groups
from prism.training.conditionings import Conditionings

RATES = (1e-5, 1e-4)
"""Learning rates of the backbone's blocks; the one of the better validation accuracy, by one seed, counts."""
VALIDATION = "validation"
SETS = {"test": "the judge's own generator", "foreign": "another generator", "unseen": "unseen combinations"}


def tuned(bench: Bench, seed: int, rate: float) -> Judge:
    """A judge whose backbone was trained with its head; the bench's own backbone stays as it is."""
    pipe = copy.copy(bench.backbone.pipe)
    setattr(pipe, bench.backbone.reads, copy.deepcopy(bench.backbone.denoiser))
    judge, store = bench.untrained(BASE, seed, Backbone(pipe)), bench.training
    config = replace(bench.scale.train, seed=seed)
    tune(judge, store, config, rate)
    return judge


def tune(judge: Judge, store: LatentStore, config: TrainConfig, rate: float) -> None:
    """Train a judge's head and the blocks below its tap, in place, by Eq. 3-4.

    rate: AdamW's step size for the blocks, under the head's schedule.
    """
    backbone, head = judge.backbone, judge.head
    blocks = [weight for block in backbone.blocks[: judge.tap] for weight in block.parameters()]
    rates = [(list(head.parameters()), config.learning_rate), (blocks, rate)]
    optimizer = torch.optim.AdamW([{"params": some, "lr": each} for some, each in rates], weight_decay=0.01)
    groups = training_groups(store, judge.dimensions, config)
    batches, conditionings = Batches(store, groups, backbone, config), Conditionings(backbone, store, groups)
    conditionings.capture()
    head.train()
    clock = Clock(f"fine-tuning at {rate:g}", config.steps, every=60)
    for step in tqdm(range(config.steps), desc=f"fine-tune at {rate:g}", disable=None):
        batch = batches.draw(step, range(config.prompts_per_step))
        counts = label_counts(batch.labels, config.objective)
        optimizer.zero_grad()
        for part in batch.parts(config.max_rows):
            noisy = part.noisy_latents.to(backbone.device)
            conditioning = conditionings.of(part.prompts, part.kinds[0])
            tokens = backbone.tokens(noisy, conditioning, part.t, judge.tap, grad=True)
            scores = head(tokens.after(judge.tap), tokens.text, tokens.text_mask)
            margins = scores[part.first] - scores[part.second]
            preference_loss(margins, part.labels, config.eta, config.objective, counts=counts).backward()
        share = config.learning_rate_at(step) / config.learning_rate
        for group, (some, each) in zip(optimizer.param_groups, rates):
            torch.nn.utils.clip_grad_norm_(some, config.max_gradient_norm)
            group["lr"] = each * share
        optimizer.step()
        clock.tick(step + 1, True)
    head.eval()
    judge.eta = config.eta
    judge.trained_on = {"source": config.source, "seed": config.seed}


def run(bench: Bench) -> Finding:
    """Accuracy of frozen and tuned judges in and out of domain, and their paired differences."""
    if bench.data is not None:
        raise PrismError("Fine-tuning is compared on the embedded model alone, whose other generators are at hand.")
    stores = _stores(bench)
    frozen = {name: _frozen(bench, name, store) for name, store in stores.items()}
    every = {**stores, VALIDATION: bench.tested}
    by_rate = {rate: _tuned(bench, rate, every, bench.seeds[:1]) for rate in RATES}
    best = max(RATES, key=lambda rate: shares(by_rate[rate][VALIDATION]).mean)
    by_set = _tuned(bench, best, every, bench.seeds)
    rows: list[dict[str, Any]] = []
    over = {}
    for name, what in SETS.items():
        ours, theirs = shares(frozen[name]), shares(by_set[name])
        over[name] = ours.less(theirs)
        rows.append(
            {"videos": what, "frozen": ours.mean, "frozen_ci95": ours.interval(bench.seed), "tuned": theirs.mean,
             "tuned_ci95": theirs.interval(bench.seed), "frozen less tuned": over[name].mean,
             "frozen less tuned_ci95": over[name].interval(bench.seed), "pairs": len(ours.right)}
        )  # fmt: skip
    rates: list[dict[str, Any]] = [
        {"rate": rate, VALIDATION: shares(by_rate[rate][VALIDATION]).mean,
         **{SETS[name]: shares(by_rate[rate][name]).mean for name in SETS}} for rate in RATES
    ]  # fmt: skip
    outside = [over[name].interval(bench.seed) for name in ("foreign", "unseen")]
    words = "; ".join(f"{SETS[name]} {over[name].points(bench.seed)}" for name in SETS)
    levels = ", ".join(f"{t:g}" for t in CLAIMED)
    text = (
        f"Frozen less tuned over t = {levels}: {words}. The blocks' learning rate, {best:g}, is the one of "
        f"{', '.join(f'{rate:g}' for rate in RATES)} with the better validation accuracy, by the first seed alone. The "
        "other generator shares the judge's VAE and was trained on the same videos, so that it is near; people's "
        "videos of other models are further away."
    )
    number = f"frozen less tuned: {words}"
    prompts = over["test"].num_prompts
    tables = {"fine-tuning": rows, "fine-tuning-rates": rates}
    return Finding(judged(outside), number, text, tables, prompts, tuple(bench.seeds))


def _stores(bench: Bench) -> dict[str, LatentStore]:
    """The labelled videos to measure on: the judge's own generator's, another's, and of unseen combinations."""
    foreign = Backbone(shapeworld.pipeline("early"))
    return {
        "test": bench.tested,
        "foreign": bench.collected("foreign", {"test": 100}, 6, foreign),
        "unseen": bench.collected("unseen", {"unseen": 60}, 6),
    }


def _frozen(bench: Bench, name: str, store: LatentStore) -> list[Measurement]:
    """The frozen judges on a store, one measurement per seed."""
    if name == "test":
        return bench.measured([BASE])[BASE]
    judges = bench.judges(BASE)
    files = {_file(f"frozen-{seed}", name): partial(judges.__getitem__, k) for k, seed in enumerate(bench.seeds)}
    return bench.together(files, store, _split(name), bench.claimed)


def _tuned(
    bench: Bench, rate: float, stores: dict[str, LatentStore], seeds: Sequence[int]
) -> dict[str, list[Measurement]]:
    """Judges tuned at a rate, by set of videos, one measurement per seed. A judge that lacks one is tuned again."""
    every: dict[str, list[Measurement]] = {name: [] for name in stores}
    for seed in seeds:
        names = {name: _file(f"tuned-{rate:g}-{seed}", name) for name in stores}
        if not all(bench.parts.has(path) for path in names.values()):
            judge = tuned(bench, seed, rate)
            for name, path in names.items():
                bench.parts.piece(path, partial(bench.measure_claimed, judge, stores[name], _split(name)))
        for name, path in names.items():
            every[name].append(stored(bench.parts, path))
    return every


def _split(name: str) -> str:
    return name if name in ("unseen", VALIDATION) else "test"


def _file(judge: str, name: str) -> str:
    return f"measured/{name}/{judge}.parquet"


def draw(tables: Tables) -> Sequence[Drawing]:
    """Frozen less tuned, in and out of domain."""
    rows: Sequence[Any] = tables["fine-tuning"]
    bars = [Bar(row["videos"], row["frozen less tuned"], row["frozen less tuned_ci95"]) for row in rows]
    figure = forest(bars, "accuracy of the frozen judge less that of the tuned one, percentage points")
    return [Drawing("fine-tuning", "Paired differences over t = 899, 699 and 499, with 95 % intervals.", figure)]


FINETUNED = Experiment(
    "fine-tuning",
    "Frozen against fine-tuned",
    "A frozen backbone judges better out of domain than a fine-tuned one.",
    "Supplement Table 2",
    run,
    draw,
    kinds=lambda bench: [BASE],
    scales=("full",),
    trainings=lambda bench: 3 * (len(RATES) + bench.scale.seeds - 1),
)
