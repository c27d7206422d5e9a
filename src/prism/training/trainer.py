"""The training loop: batches by prompt group, shared among processes, resumable to the bit.

A run's folder:

    config.json     the resolved settings; --resume refuses others
    checkpoints/    while it runs
    history.json    logged loss and accuracy, once it is done
    head/           the judge, once it is done
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from prism import files, runs
from prism.backbone.fingerprint import VERSIONED, fits
from prism.errors import PrismError
from prism.evaluation.evaluator import check_judge
from prism.judge import Judge
from prism.judge.checks import trained_together
from prism.judge.judge import Member
from prism.preference import LatentStore, PromptGroup
from prism.preference.store import store_identity
from prism.team import Team
from prism.training.batches import Batch, Batches, training_groups
from prism.training.conditionings import Conditionings
from prism.training.config import RESULTLESS, TrainConfig
from prism.training.kept_conditionings import KeptConditionings
from prism.training.learner import Learner, Steps, load_checkpoint, read, save_checkpoint
from prism.training.logs import Trackers, mean_entry
from prism.training.tokens import TokenCache, cache_of
from prism.training.validation import Validation

# Settings that decide which rows a step reads, and in which batches; `train_together` needs equal ones.
SHARED = (
    *("seed", "prompts_per_step", "max_rows", "max_prompts", "per_prompt", "source", "trajectory_share"),
    *("t_low", "t_high", "levels", "draws_per_step", "noise_draws", "shared_noise"),
    *("gradient_accumulation_steps", "token_cache", "keep_conditionings"),
)

# Entries of config.json that may differ when a run is resumed: memory, logging, the store's folder, and entries that a
# later version of diffusers adds to a model's configuration.
CHANGEABLE = (
    *(f"train.{name}" for name in RESULTLESS),
    *(f"judge.backbone.{name}" for name in VERSIONED),
    "store.name",
    "tokens",
)


def untrained_heads(pipe: Any, taps: Sequence[int | None], seed: int, **options: Any) -> list[Judge]:
    """A judge with a fresh head at each of `taps` (None: the backbone's default), to be trained together and averaged.

    The seeds of their weights are 1,000 apart. options: further arguments of `Judge.untrained`.
    """
    return [Judge.untrained(pipe, tap=tap, seed=seed + 1000 * number, **options) for number, tap in enumerate(taps)]


def train(
    store: LatentStore | str | Path,
    judge: Judge,
    config: TrainConfig,
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
    restart: bool = False,
) -> dict[str, Any]:
    """Train a judge's heads in place on the store's training pairs, and save the judge as ``out/head``.

    Several heads (``Judge.average``) see the same batches, and one pass of the backbone per step feeds them all.

    Several processes (``torchrun``, ``accelerate launch``) share the prompts of a step and together take the same step
    as one process would; the first of them writes.

    Args:
        store: opened store, or its folder; its pairs need a column per dimension of the judge.
        judge: its heads are trained from the weights they have, on its device. The backbone is frozen.
        config: settings.
        out: the run's folder; refused if it is not empty, unless ``resume``.
        resume: continue the run in ``out`` from its last checkpoint, or start it if there is none. On CPU the result is
            bit-identical to that of an uninterrupted run, up to rounding if ``max_rows`` was changed.
            ``max_rows``, ``checkpoint_every`` and ``log_every`` may change.
        progress: show a progress bar on a terminal, else a line every 30 seconds.
        restart: as ``resume``; but a run of another configuration in ``out`` is deleted, and this one starts.

    Returns:
        {"history": [...], "steps": int, "seconds": float, "pairs": int, "prompts": int}. An entry of the history has
        "step" and either "loss", "accuracy" (the share of decided pairs judged right, by dimension), both since the
        entry before, and "learning_rate"; or "validation" (that share on validation pairs). Of several heads: the mean.

    Raises:
        PrismError: on an output folder of another run, no training pairs, or a loss that is not finite.
    """
    started, out = time.perf_counter(), Path(out)
    check_judge(judge)
    store, checkpoints = LatentStore.of(store), out / "checkpoints"
    groups = training_groups(store, judge.dimensions, config)
    _check_backbone(store, judge)
    team = _team(judge, config)
    validation = Validation(store, judge.dimensions, judge.taps, config.max_rows) if config.validate_every else None
    trackers = Trackers(config.report_to if team.first else "")
    claims: list[runs.Parts] = []  # only the first process claims the folder
    resolved = _resolved(store, judge, config)
    cache = cache_of(config, store, judge.backbone, judge.dimensions, judge.taps, len(groups))
    resolved |= {} if cache is None else {"tokens": cache.description}
    team.on_first(lambda: claims.append(runs.claim(out, resolved, resume, restart, changeable=CHANGEABLE)))
    if (out / "head").is_dir():  # the run had already ended
        _take_over(judge, Judge.from_pretrained(out / "head", judge.backbone))
        team.on_first(lambda: runs.discard(checkpoints))
        return files.read_json(out / "history.json")

    batches = Batches(store, groups, judge.backbone, config)
    conditionings = _conditionings(judge, store, groups, cache, config, team)
    learners = [Learner(each, config, team, len(groups)) for each in _one_by_one(judge)]
    steps, start = Steps(config.max_rows), 0
    for number, learner in enumerate(learners):
        start = load_checkpoint(_checkpoints_of(checkpoints, number), learner, start if number else None)
    slots = range(team.rank, config.prompts_per_step, team.size)
    trackers.start(out / "logs", config.to_dict())

    shown = progress and team.first
    bar = tqdm(total=config.steps, initial=start, desc="train", disable=None if shown else True)
    clock = runs.Clock("train", config.steps, every=30) if shown and bar.disable else None
    with judge.backbone.freed():  # offload models once at the end, not after each step
        for step in range(start, config.steps):
            labels = batches.labels(step, slots)
            drawn = partial(_drawn, batches, step, slots, config.gradient_accumulation_steps)
            steps.take(
                step, learners, labels, drawn, lambda part, rows: read(learners, part, conditionings, rows, cache)
            )
            if validation is not None and _due(step, config.validate_every, config.steps):
                for learner in learners:
                    learner.validate(step, validation)
            for entries in _entries(learners, step + 1):
                bar.set_postfix(_shown(entries))
                trackers.log(entries)
            bar.update()
            if clock is not None:
                clock.tick(step + 1, True, f" steps, {_loss_text(learners)}")
            due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
            if due and step + 1 < config.steps and team.first:
                # The first head's checkpoint comes last: resuming reads its step, and then the others' have it too.
                for number in reversed(range(len(learners))):
                    save_checkpoint(_checkpoints_of(checkpoints, number), step + 1, learners[number])
    bar.close()
    trackers.finish()

    for learner in learners:
        learner.finish(store, groups)
    if len(learners) > 1:
        judge.eta, judge.trained_on = config.eta, trained_together([each.judge.trained_on for each in learners])
    result = {
        "history": [mean_entry(entries) for entries in zip(*(learner.history for learner in learners))],
        "steps": config.steps,
        "seconds": time.perf_counter() - started,
        "prompts": len(groups),
        "pairs": judge.trained_on["pairs"],
    }

    def publish() -> None:
        files.write_json(out / "history.json", result)
        judge.save_pretrained(out / "head")
        runs.discard(checkpoints)
        claims[0].release()

    team.on_first(publish)
    return result


def train_together(
    store: LatentStore | str | Path,
    judges: Sequence[Judge],
    configs: Sequence[TrainConfig],
    progress: bool = True,
    desc: str = "",
) -> list[list[dict[str, Any]]]:
    """Train several heads on the same batches: each pass of the backbone feeds them all.

    Each head gets the weights that ``train`` would give it alone. Nothing is written; a killed run is lost.

    Args:
        store: as in ``train``.
        judges: on one backbone, each with one head, at any taps and of any size.
        configs: one per judge; all settings in ``SHARED``, which decide what a step reads, must be equal. The numbers
            of steps may differ: each head is trained for its own.
        progress: show a progress bar (on a terminal).
        desc: label of the progress bar.

    Returns:
        The histories, as in ``train``.

    Raises:
        PrismError: as ``train``; for configurations that read different batches.
    """
    first, config = judges[0], configs[0]
    for other, judge in zip(configs[1:], judges[1:], strict=True):
        for name in SHARED:
            if getattr(other, name) != getattr(config, name):
                raise PrismError(
                    f"Heads trained together must read the same batches, found {name} {getattr(config, name)!r} and "
                    f"{getattr(other, name)!r}; train them separately."
                )
        if judge.backbone is not first.backbone or judge.dimensions != first.dimensions:
            raise PrismError("Heads trained together need one backbone and the same dimensions; train them separately.")
    store = LatentStore.of(store)
    groups = training_groups(store, first.dimensions, config)
    _check_backbone(store, first)
    team = _team(first, config)
    learners = [Learner(judge, each, team, len(groups)) for judge, each in zip(judges, configs)]
    taps = tuple(sorted({judge.tap for judge in judges}))
    validated = any(each.validate_every for each in configs)
    validation = Validation(store, first.dimensions, taps, config.max_rows) if validated else None
    batches = Batches(store, groups, first.backbone, config)
    cache = cache_of(config, store, first.backbone, first.dimensions, taps, len(groups))
    conditionings = _conditionings(first, store, groups, cache, config, team)
    slots, steps = range(team.rank, config.prompts_per_step, team.size), Steps(config.max_rows)
    last, hidden = max(each.steps for each in configs), None if progress and team.first else True
    with first.backbone.freed():  # offload models once at the end, not after each step
        bar = tqdm(range(last), desc=desc or "train", disable=hidden)
        clock = runs.Clock(desc or "train", last, every=30) if bar.disable and not hidden else None
        for step in bar:
            running = [learner for learner in learners if step < learner.config.steps]

            def forward(part: Batch, rows: int, running: Sequence[Learner] = running) -> list[Tensor]:
                return read(running, part, conditionings, rows, cache)

            drawn = partial(_drawn, batches, step, slots, config.gradient_accumulation_steps)
            steps.take(step, running, batches.labels(step, slots), drawn, forward)
            for learner in running:
                if validation is not None and _due(step, learner.config.validate_every, learner.config.steps):
                    learner.validate(step, validation)
            if clock is not None:
                clock.tick(step + 1, True)
    for learner in learners:
        learner.finish(store, groups)
    return [learner.history for learner in learners]


def _team(judge: Judge, config: TrainConfig) -> Team:
    """The processes that share a step's prompts; each needs at least one prompt."""
    team = Team.gathered(judge.backbone.device)
    if team.size > config.prompts_per_step:
        raise PrismError(
            f"The training setting prompts_per_step must be at least the number of processes, "
            f"{team.size}; found {config.prompts_per_step}."
        )
    return team


def _conditionings(
    judge: Judge,
    store: LatentStore,
    groups: Sequence[PromptGroup],
    cache: TokenCache | None,
    config: TrainConfig,
    team: Team,
) -> Conditionings:
    """The conditionings of all prompts, captured now; where tokens may be there already, when they are needed."""
    kept = KeptConditionings(judge.backbone, store.folder, team) if config.keep_conditionings else None
    conditionings = Conditionings(judge.backbone, store, groups, kept, team)
    if cache is None:
        conditionings.capture()
    return conditionings


def _drawn(batches: Batches, step: int, slots: Sequence[int], parts: int) -> Iterator[Batch]:
    """The batches of a step, in as many parts as the slots allow."""
    size = -(-len(slots) // parts)
    return (batches.draw(step, slots[start : start + size]) for start in range(0, len(slots), size))


def _entries(learners: Sequence[Learner], step: int) -> list[dict[str, Any]]:
    """The entries that a step (from 1) added to the history; of several heads their mean."""
    added = ([entry for entry in learner.history[-2:] if entry["step"] == step] for learner in learners)
    return [mean_entry(entries) for entries in zip(*added)]


def _due(step: int, every: int, steps: int) -> bool:
    """True after every `every` steps (counted from 0), and after the last."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def _one_by_one(judge: Judge) -> list[Judge]:
    """One judge per head of this judge; the heads are shared, not copied."""
    if len(judge.members) == 1:
        return [judge]
    return [Judge(judge.backbone, [Member(each.tap, each.head)], judge.dimensions) for each in judge.members]


def _checkpoints_of(folder: Path, number: int) -> Path:
    """The folder of a head's checkpoints; the first head's lie in `folder` itself."""
    return folder / f"head-{number}" if number else folder


def _loss_text(learners: Sequence[Learner]) -> str:
    """The loss since the last entry of the history, for a log."""
    states = [learner.window.state for learner in learners]
    if states[0]["steps"]:
        return f"loss {sum(state['loss'] / state['steps'] for state in states) / len(states):.3f}"
    losses = [[entry for entry in learner.history if "loss" in entry][-1]["loss"] for learner in learners]
    return f"loss {sum(losses) / len(losses):.3f}"


def _shown(entry: Mapping[str, Any]) -> dict[str, str]:
    """An entry of the history as the text of the progress bar."""
    if "validation" in entry:
        return {"validation": f"{sum(entry['validation'].values()) / len(entry['validation']):.3f}"}
    return {"loss": f"{entry['loss']:.3f}"}


def _resolved(store: LatentStore, judge: Judge, config: TrainConfig) -> dict[str, Any]:
    return {"command": "train", "train": config.to_dict(), "judge": judge.config(), "store": store_identity(store)}


def _take_over(judge: Judge, saved: Judge) -> None:
    """Copy weights, training provenance and calibration of a saved judge with the same heads."""
    for member, saved_member in zip(judge.members, saved.members, strict=True):
        member.head.load_state_dict(saved_member.head.state_dict())
        member.head.eval()
    judge.eta, judge.trained_on, judge.calibration = saved.eta, saved.trained_on, saved.calibration


def _check_backbone(store: LatentStore, judge: Judge) -> None:
    """Refuse a store whose latents were made by another VAE than the backbone's."""
    refusals, differences = fits(store.meta.get("backbone") or {}, judge.backbone, ("vae",))
    for saved, current in refusals:
        raise PrismError(
            f"The latents in {store.folder} were made with the {saved}, this backbone has {current}; encode them again."
        )
    for clause in differences:
        warnings.warn(f"The latents in {store.folder} were made with {clause}.", stacklevel=3)
