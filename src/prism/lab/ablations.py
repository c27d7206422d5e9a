"""`prism study`: many recipes for a judge, compared on validation prompts; the winner confirmed once on test."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prism import files, runs
from prism.errors import PrismError, quoted, whole
from prism.lab.ablation_results import BASE, BASE_HEADS, Variant, chosen, heads_of, table
from prism.training.config import RESULTLESS, TrainConfig

RECIPE = TrainConfig(
    steps=1000, prompts_per_step=8, learning_rate=5e-4, schedule="cosine", warmup_steps=20, checkpoint_every=0
)
NOTES = (
    "Accuracies are on validation prompts, of pairs with a decided overall label, averaged over t = 899, 699 and 499, "
    "over noise draws, and over heads of several seeds and first weights. Intervals resample prompts, not trainings: "
    "the column of the spread says how far single heads lie apart.",
    "Many variants are looked at here: one whose interval barely clears zero may well be luck. What was chosen was "
    "measured on the test prompts once.",
)

# Settings that may change when a study is resumed; `store` and `model` identify the latents and weights that it reads.
CHANGEABLE = (
    *("data", "backbone", "device", "store.name", *(f"train.{name}" for name in RESULTLESS)),
    *(f"model.{name}" for name in ("denoiser_config", "vae_config", "settings")),
)


@dataclass(frozen=True)
class StudyConfig:
    """Options of `prism study`.

    data: a latent store; None for the labelled candidates that ship with the package.
    train: the recipe, from which each variant differs. tap, dim: of its head; None for the defaults.
    seeds: trainings of each variant, each with batches and noise of its own.
    inits: heads of different first weights in each training. draws: noise draws scored per level.
    """

    data: Path | None = None
    train: TrainConfig = field(default_factory=lambda: RECIPE)
    tap: int | None = None
    dim: int | None = None
    seeds: int = 2
    inits: int = 2
    draws: int = 8
    backbone: str | None = None
    device: str | None = None
    dtype: str | None = None


def run(
    config: StudyConfig,
    out: Path,
    only: Sequence[str] = (),
    confirm: Sequence[str] = (),
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the study, or the variants and questions named in `only`, in `out`; return the metrics.

    With `resume` finished parts are not repeated. Variants named in `confirm` are measured on the test split, each at
    most once. config.json also holds the `options` of the command line.
    """
    from prism.lab import ablation_results as results
    from prism.loading import check_alone, check_store, describe, load_backbone, open_store
    from prism.preference.store import store_identity
    from prism.report.metrics import document
    from prism.report.page import write_report
    from prism.training.validation import levels

    check_alone("study")
    for name in ("seeds", "inits", "draws"):
        whole(f"The study's {name}", getattr(config, name), 1, 1000)
    store = open_store(config.data)
    backbone, _, name = load_backbone(config.backbone, config.device, config.dtype)
    check_store(config.data, store, backbone)
    tap = backbone.default_tap if config.tap is None else config.tap
    groups = store.groups("train")
    everything = table(
        backbone.num_blocks,
        tap,
        min(config.train.max_prompts or len(groups), len(groups)),
        max((len(group.videos) for group in groups), default=0),
        config.train,
        store.has_trajectories,
    )
    everything = [row for row in everything if row.draws <= config.draws and (not row.across or config.seeds > 1)]
    to_train = chosen(everything, [*only, *confirm] if only else ())
    for variant in confirm:
        _named(variant, everything, "")
    identity = {"command": "study", **_json(config), "store": store_identity(store), "model": backbone.fingerprint()}
    parts = runs.claim(out, identity, resume, changeable=CHANGEABLE)
    started = time.perf_counter()
    _score_unscored(config, parts, store, backbone, to_train)
    _train(config, parts, store, backbone, tap, to_train)
    done = [row for row in everything if results.complete(parts, row, config)]
    measured = results.Results(out, store, config, levels(backbone))
    rows = [measured.row(row) for row in done]
    (out / "results").mkdir(exist_ok=True)
    for row in rows:
        files.write_json(out / "results" / f"{row['variant']}.json", row)
    for variant in confirm:
        results.confirm(parts, _named(variant, done, "finished "), everything, config, store, backbone)
    confirmed = results.confirmations(out)
    metrics = document(
        "study",
        describe(backbone, name),
        config.train.seed,
        accuracy=results.accuracy(confirmed),
        timings={"study": time.perf_counter() - started},
        study=rows,
        calibration=measured.calibration([row for row in done if row.name in (BASE, f"heads-{BASE_HEADS}")]),
        confirmed=[row for entry in confirmed for row in entry["comparison"]],
    )
    files.write_json(out / "metrics.json", metrics)
    (out / "study.md").write_text(results.markdown(rows, metrics["calibration"]), encoding="utf-8")
    settings = {**files.read_json(out / "config.json"), "options": dict(options or {})}
    files.write_json(out / "config.json", settings)
    write_report(out / "report.html", metrics, title="What makes the judge better", notes=NOTES, config=settings)
    parts.release()
    return metrics


def _train(
    config: StudyConfig, parts: runs.Parts, store: Any, backbone: Any, tap: int, to_train: Sequence[Variant]
) -> None:
    """Train and score the variants that are not done yet; those that read the same batches are trained together."""
    from prism.training.trainer import SHARED

    arms: dict[tuple[Any, ...], list[tuple[Variant, TrainConfig]]] = {}
    for seed in range(config.seeds):
        for variant in to_train:
            if not variant.trained or parts.has(heads_of(variant.name, seed)):
                continue
            settings = dataclasses.replace(config.train, seed=config.train.seed + seed, **variant.train)
            arms.setdefault((seed, *(getattr(settings, key) for key in SHARED)), []).append((variant, settings))
    started, share = time.perf_counter(), [max(each.steps for _, each in arm) for arm in arms.values()]
    for number, (key, arm) in enumerate(arms.items()):
        _train_arm(config, parts, store, backbone, tap, key[0], arm)
        passed, left = time.perf_counter() - started, sum(share[number + 1 :]) / sum(share[: number + 1])
        names = ", ".join(variant.name for variant, _ in arm[:3]) + (", ..." if len(arm) > 3 else "")
        print(
            f"prism: study: {number + 1} of {len(arms)} trainings done ({names}), about {passed * left / 60:.0f} "
            "minutes to go",
            file=sys.stderr,
            flush=True,
        )


def _train_arm(
    config: StudyConfig,
    parts: runs.Parts,
    store: Any,
    backbone: Any,
    tap: int,
    seed: int,
    arm: Sequence[tuple[Variant, TrainConfig]],
) -> None:
    from prism.judge import Judge
    from prism.training import train_together

    labels, judges, settings = [], [], []
    for variant, train in arm:
        for init in range(max(config.inits, BASE_HEADS if variant.name == BASE else 1)):
            head = {"tap": tap, "dim": config.dim, **variant.head}
            # The first weights follow from seed and init alone: variants of one size begin with the same.
            judge = Judge.untrained(backbone, dimensions=store.dimensions, seed=1000 * seed + init, **head)
            labels.append((variant.name, init))
            judges.append(judge)
            settings.append(train)
    histories = train_together(store, judges, settings, desc=f"{arm[0][0].name} ({len(judges)} heads)")
    trained: dict[str, dict[str, Judge]] = {variant.name: {} for variant, _ in arm}
    for (name, init), judge in zip(labels, judges):
        trained[name][f"head-{init}"] = judge
    for name, heads in trained.items():  # before scoring, which may fail: training takes long
        history = {f"head-{init}": histories[p] for p, (each, init) in enumerate(labels) if each == name}

        def save(folder: Path, heads: dict[str, Judge] = heads, history: dict[str, Any] = history) -> None:
            for head_name, judge in heads.items():
                judge.save_pretrained(folder / head_name)
            files.write_json(folder / "history.json", history)

        parts.piece(f"{heads_of(name, seed)}/", save)
    scored = [(name, seed, head, judge) for name, heads in trained.items() for head, judge in heads.items()]
    _score(config, parts, store, scored)


def _score(config: StudyConfig, parts: runs.Parts, store: Any, heads: Sequence[tuple[str, int, str, Any]]) -> None:
    """Score heads (variant, seed, name, judge) on the validation videos in one read; save the scores beside them."""
    from safetensors.torch import save_file

    from prism.lab.ablation_results import SCORES, score_heads

    scores: dict[tuple[str, int], dict[str, Any]] = {}
    for (variant, seed, head, _), values in zip(heads, score_heads([judge for *_, judge in heads], store, config)):
        scores.setdefault((variant, seed), {})[head] = values.contiguous()
    for (variant, seed), tensors in scores.items():
        parts.piece(f"{heads_of(variant, seed)}/{SCORES}", partial(save_file, tensors))


def _score_unscored(
    config: StudyConfig, parts: runs.Parts, store: Any, backbone: Any, to_train: Sequence[Variant]
) -> None:
    """Score the heads of a run that ended after it trained them and before it scored them."""
    from prism.judge import Judge
    from prism.lab.ablation_results import SCORES

    for variant in to_train:
        for seed in range(config.seeds):
            name = heads_of(variant.name, seed)
            if parts.has(name) and not parts.has(f"{name}/{SCORES}"):
                folder = parts.folder / name
                names = sorted(path.name for path in folder.glob("head-*"))
                heads = [(variant.name, seed, name, Judge.from_pretrained(folder / name, backbone)) for name in names]
                _score(config, parts, store, heads)


def _named(name: str, rows: Sequence[Variant], state: str) -> Variant:
    for variant in rows:
        if variant.name == name:
            return variant
    names = quoted(", ".join(variant.name for variant in rows))
    raise PrismError(f"There is no {state}variant {quoted(name, 80)} to confirm; there are {names}.")


def _json(config: StudyConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "data": None if config.data is None else str(config.data)}
