"""Generate, judge, tune, judge again: rounds in which a generator is tuned on a judge's verdicts of its own videos.

A run's folder:

    config.json                    the settings; --resume refuses others
    untuned/test/                  a store: videos of the test prompts by the untuned model
    judge/round-1/candidates/      a store: candidates of the round's prompts
    judge/round-1/scores.json      the judge's scores of them, and picks.json, which of them were tuned on
    judge/round-1/lora/            the LoRA after the round, as diffusers loads it
    judge/round-1/test/            a store: the test prompts by the tuned model, with the same seeds
    random/, worst/                the same for controls; their first round takes the candidates of judge/
    lora/                          the LoRA of the last round before a stop rule held; none where it held in round 1

The judge always reads the original backbone: a LoRA is on while videos are sampled and while it is tuned, and never
while anything is judged.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism import runs
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.backbone.denoising import Target, target_of
from prism.backbone.fingerprint import VERSIONED
from prism.errors import PrismError, choice, quoted, whole
from prism.judge import Judge
from prism.judge.scoring import default_levels, head_digest
from prism.preference import LatentStore
from prism.preference.prompts import Prompt
from prism.preference.sources import Place
from prism.rewards import measuring
from prism.rewards.lora import applied, check
from prism.rewards.measuring import Outer
from prism.rewards.picks import check_prompts, decisive, groups_of, judged, picked
from prism.rewards.retrain import check_labels, retrained
from prism.rewards.run_folder import OURS, RunFolder
from prism.rewards.settings import CONTROLS, ImproveConfig
from prism.rewards.tuning import levels_tuned, tune
from prism.training import TrainConfig
from prism.training.collect import collect
from prism.training.conditionings import check_bare
from prism.training.logs import Trackers
from prism.training.reward import Reward

FEWEST, FEWEST_TEST = 4, 2  # prompts
CHANGEABLE: tuple[str, ...] = ("arms", "config.max_rows", "config.checkpoint_every", "config.gradient_checkpointing")
CHANGEABLE += tuple(f"backbone.{name}" for name in VERSIONED)


@dataclass
class Improvement:
    """The results of a run.

    rounds: a row per arm and round: arm, round, facts of the picks (reward_avg, ...), the tuning's last entry, and
        "measures", the rows of `prism.rewards.measuring.gains`. history: the tuning's entries by arm and round.
    against: paired differences to the controls. retrained: as `prism.rewards.retrain.retrained` gives them.
    best_of_n: the untuned model's Best-of-N. cost: what was spent.
    stopped: why it stopped before the last round, or "". kept: the round whose LoRA is in lora/; 0: none helped.
    """

    folder: Path
    rounds: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    against: list[dict[str, Any]] = field(default_factory=list)
    best_of_n: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    retrained: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    kept: int = 0

    @property
    def lora(self) -> Path:
        """The folder of the LoRA, for `pipe.load_lora_weights`; not there where no round was kept."""
        return self.folder / "lora"

    @property
    def final_round(self) -> dict[str, Any] | None:
        """The row in `rounds` of the round whose LoRA is in lora/, which is what the run gained; None: none was kept.

        After a stop that is not the last row of the judge's picks, which is of the rejected round.
        """
        return next((row for row in self.rounds if (row["arm"], row["round"]) == (OURS, self.kept)), None)


def improve(
    backbone: Backbone,
    judge: Judge,
    prompts: Sequence[Prompt | str],
    test_prompts: Sequence[Prompt | str],
    call: Mapping[str, Any],
    out: str | Path,
    config: ImproveConfig | None = None,
    *,
    outer: Outer | None = None,
    rewards: Sequence[Reward] = (),
    controls: Sequence[str] = (),
    fps: float | None = None,
    retrain: TrainConfig | None = None,
    head_seeds: int = 3,
    reuse: str | Path | None = None,
    report_to: str = "",
    resume: bool = False,
    progress: bool = True,
) -> Improvement:
    """Tune a LoRA on the backbone's denoiser by a judge's verdicts, in rounds, and measure each.

    Args:
        backbone: its pipeline samples; it is as before when this returns or raises, to the bit.
        judge: on this backbone. It chooses what is tuned on.
        prompts: of the tuning; the rounds share them evenly, each its own.
        test_prompts: on which each round is measured; disjoint from the tuning's and the judge's.
        call: the pipeline's arguments, as JSON.
        out: the run's folder; new, or with `resume` the same run's.
        config: settings.
        outer: a second judge, which never selects; without one no stop rule can hold.
        rewards: functions of decoded videos that are measured on the test prompts and tune nothing.
        controls: "random", "worst": the same steps on other picks. A run that is continued may have others.
        fps: frames per second, for rewards that take them.
        retrain: settings with which heads are trained at last, on the original and on the tuned backbone, by the
            labels of `rewards` of the first round's candidates; None: none. head_seeds: heads on each.
        reuse: folder of another run with the same model, prompts and seeds, such as of another recipe: the untuned
            model's videos are copied from there, and not sampled again.
        report_to: trackers of accelerate, apart by commas.
        resume: continue a run that was stopped or killed, on a CPU to the same bits.
        progress: show progress bars.

    Raises:
        PrismError: for a denoiser that takes no LoRA or whose target is not known, prompts that are shared or too few,
            an outer judge that is the judge itself, layers that take no LoRA, an `out` of another run or with damaged
            files, or a loss that is not finite.
    """
    config = config or ImproveConfig()
    run = _Run(backbone, judge, prompts, test_prompts, call, Path(out), config, outer, rewards, fps, progress)
    arms = [OURS, *dict.fromkeys(choice("control", each, CONTROLS) for each in controls)]
    run.check()
    if retrain is not None:
        check_labels(rewards, config.test_candidates)
    trackers = Trackers(report_to)
    run.begin(resume, arms)
    if reuse is not None:
        run.folder.take_over(Path(reuse))
    trackers.start(run.out / "logs", config.to_dict())
    result = Improvement(run.out)
    tables: dict[str, list[dict[str, dict[str, float]]]] = {}
    untuned = run.measured("untuned", None)
    run.test_groups = groups_of(LatentStore.open(run.out / "untuned" / "test"))
    for arm in arms:
        tables[arm] = [untuned]
        for number in range(1, config.rounds + 1):
            row, history, after = run.round(arm, number, untuned)
            result.rounds.append(row)
            result.history += history
            tables[arm].append(after)
            trackers.log(_tracked(row, len(result.rounds)))
            if arm == OURS:
                stop = measuring.stop_sentence(number, run.test_groups, tables[arm], config.seed)
                result.kept = number if stop is None else number - 1
                if stop is not None:
                    result.stopped = stop
                    break
            elif number == len(tables[OURS]) - 1:
                break
    run.compare(result, tables)
    if retrain is not None:
        result.retrained = run.retrain(result.kept or len(tables[OURS]) - 1, retrain, whole("head_seeds", head_seeds))
    run.folder.publish(result.kept)
    trackers.finish()
    run.folder.parts.release()
    return result


class _Run:
    """What the rounds of a run share."""

    def __init__(
        self, backbone: Backbone, judge: Judge, prompts: Sequence[Prompt | str], test_prompts: Sequence[Prompt | str],
        call: Mapping[str, Any], out: Path, config: ImproveConfig, outer: Outer | None, rewards: Sequence[Reward],
        fps: float | None, progress: bool,
    ) -> None:  # fmt: skip
        self.backbone, self.judge, self.config, self.outer = backbone, judge, config, outer
        self.rewards, self.fps, self.progress, self.out = list(rewards), fps, progress, out
        self.call = {name: value for name, value in call.items() if name != "output_type"}
        self.prompts = _as_prompts(prompts, "train")
        self.test_prompts = _as_prompts(test_prompts, "test")
        self.levels = config.levels or default_levels(judge)
        self.weights = np.array(decisive(judge, config.dimension))
        self.test_groups: list[Any] = []
        self.folder = RunFolder(out)
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        if self._target is None:
            first, call = self.prompts[0], self._call_of(self.prompts[0])
            check_bare(self.backbone, first.text, call, f'The prompt "{quoted(first.text, 100)}"')
            self._target = target_of(self.backbone, first.text, normalised(call))
        return self._target

    def _call_of(self, prompt: Prompt) -> dict[str, Any]:
        return self.call if prompt.image is None else {**self.call, "image": prompt.image}

    def check(self) -> None:
        """Refuse, before any work, what could not be tuned or measured."""
        check(self.backbone)
        levels_tuned(self.backbone, self.config)
        with applied(self.backbone, **self._lora()):  # refuses names of layers that are none
            pass
        if self.outer is not None and self.outer.is_judge(self.judge):
            raise PrismError(
                f"The outer judge, {self.outer.name}, is the judge that selects: its weights and its backbone are the "
                "same, so it could not tell where the judge is played. Give another one as --outer, or none."
            )
        seen = {"the judge": self.judge.trained_on.get("prompt_keys") or ()}
        if not seen["the judge"] and not self.judge.is_untrained:
            warnings.warn(
                "The judge does not say which prompts it was trained on, so that it is not checked that they are none "
                "of the tuning's and the test's.",
                stacklevel=3,
            )
        if self.outer is not None:
            seen[f"the outer judge, {self.outer.name},"] = self.outer.trained_on
        texts = [each.text for each in self.prompts], [each.text for each in self.test_prompts]
        check_prompts(*texts, seen, (max(FEWEST, self.config.rounds), FEWEST_TEST))
        _ = self.target

    def begin(self, resume: bool, arms: Sequence[str]) -> None:
        """Claim the run's folder."""

        def digest(prompts: Sequence[Prompt]) -> dict[str, Any]:
            text = "\n".join(f"{each.text}\t{each.image or ''}" for each in prompts)
            return {"count": len(prompts), "sha256": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()}

        identity = {
            "command": "improve",
            "config": self.config.to_dict(),
            "backbone": self.backbone.fingerprint(),
            "judge": head_digest(self.judge),
            "outer": None if self.outer is None else self.outer.name,
            "rewards": [each.name for each in self.rewards],
            "arms": list(arms),
            "call": self.call,
            "prompts": digest(self.prompts),
            "test_prompts": digest(self.test_prompts),
        }
        versions = {each.name: each.version for each in self.rewards if each.version}
        if self.outer is not None and self.outer.digest:
            identity["outer_files"] = self.outer.digest
        if versions:
            identity["reward_files"] = versions
        self.folder.claim(identity, resume, CHANGEABLE)

    def of_round(self, number: int) -> list[Prompt]:
        """The prompts of a round: every round has its own, an equal share of all."""
        count = len(self.prompts) // self.config.rounds
        return self.prompts[(number - 1) * count : number * count]

    def collected(
        self, name: str, prompts: Sequence[Prompt], start: Path | None, test: bool, labelled: bool = False
    ) -> LatentStore:
        """A store of candidates by the model with the LoRA of the folder `start`, or by the untuned one. labelled: have
        the rewards label candidates that are not the test's too."""
        rewards = (self.rewards or [Reward(_brightness, "frames")]) if test or labelled else []
        folder, config = self.out / name, self.config
        candidates = config.test_candidates if test else config.candidates
        settings: dict[str, Any] = {
            "candidates": candidates,
            "batch_size": config.sample_batch_size,
            "unit": max(1, config.sample_batch_size // candidates),
            "seed": config.seed + (0 if test else 1),
            "fps": self.fps,
            "resume": folder.exists(),
            "command": "prism improve",
            "progress": self.progress,
            "reports": False,
        }
        with contextlib.ExitStack() as stack:
            if start is not None:
                stack.enter_context(applied(self.backbone, **self._lora(), start=start))
            return collect(prompts, self.backbone, self.call, folder, rewards, **settings)

    def _lora(self) -> dict[str, Any]:
        config = self.config
        return {"rank": config.rank, "alpha": config.alpha, "targets": config.targets, "seed": config.seed}

    def measured(self, name: str, start: Path | None) -> dict[str, dict[str, float]]:
        """The measures of a model on the test prompts, by measure and video."""

        def make() -> dict[str, Any]:
            store = self.collected(f"{name}/test", self.test_prompts, start, True)
            table = self._columns(store)
            return {"measures": {key: _with_none(values) for key, values in table.items()}}

        table = self.folder.once(f"{name}/measures", "measures", make)["measures"]
        return {key: {v: np.nan if x is None else x for v, x in values.items()} for key, values in table.items()}

    def _columns(self, store: LatentStore) -> dict[str, dict[str, float]]:
        rewards = self.rewards
        return measuring.columns(store, self.judge, self.outer, rewards, self.config, self.levels)

    def round(
        self, arm: str, number: int, untuned: Mapping[str, Mapping[str, float]]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, dict[str, float]]]:
        """One round of an arm: its row, the tuning's history, and the measures after it."""
        name, config = f"{arm}/round-{number}", self.config
        before = None if number == 1 else self.out / arm / f"round-{number - 1}" / "lora"
        of_candidates = f"{OURS}/round-1" if number == 1 else name  # by the untuned model: the same for every arm

        def score() -> dict[str, Any]:
            store = self.collected(f"{of_candidates}/candidates", self.of_round(number), before, False)
            return {"scores": judged(self.judge, store, config, self.levels)}

        scores = self.folder.once(f"{of_candidates}/scores", "scores", score)["scores"]
        store = LatentStore.open(self.out / of_candidates / "candidates")
        deciding = {video: float(np.dot(self.weights, row)) for video, row in scores.items()}
        control = "" if arm == OURS else arm
        picks, facts = picked(groups_of(store), deciding, config.margin, control, config.seed + number)
        chosen = [{"prompt": p.group.prompt, "winner": p.winner, "loser": p.loser} for p in picks]
        self.folder.once(f"{name}/picks", "picks", lambda: {"picks": chosen})

        def tuned(folder: Path) -> list[dict[str, Any]]:
            old = before if config.recipe == "weighted" else None
            with applied(self.backbone, **self._lora(), start=before, old=old, trains=True) as lora:
                entries = tune(
                    self.backbone, store, picks, config, lora, self.target, self.out / name, number, self.progress
                )
                lora.save(folder)
            return entries

        history = self.folder.tuned(arm, number, tuned)
        for checkpoint in (self.out / name).glob("step-*"):
            runs.discard(checkpoint)
        after = self.measured(name, self.out / name / "lora")
        measures = measuring.gains(self.test_groups, untuned, after, config.seed)
        row = {"arm": arm, "round": number, **facts, "tuning": history[-1], "measures": measures}
        return row, [{"arm": arm, "round": number, **entry} for entry in history], after

    def compare(self, result: Improvement, tables: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> None:
        """Fill in Best-of-N by the untuned model, the differences to the controls, and the cost."""
        config, groups = self.config, self.test_groups
        named = [each.name for each in self.rewards] + [name for name in (measuring.OUTER,) if self.outer is not None]
        for measure in [*named, measuring.JUDGE]:
            for n in range(2, config.test_candidates + 1):
                result.best_of_n.append(measuring.best_of(groups, tables[OURS][0], measure, n, config.seed))
            for arm, of_arm in tables.items():
                for number in range(1, min(len(of_arm), len(tables[OURS]))):
                    if arm == OURS:
                        continue
                    difference = measuring.against(
                        groups, tables[OURS][number][measure], of_arm[number][measure], config.seed
                    )
                    result.against.append({"arm": arm, "round": number, "measure": measure, **difference})
        call, count = self._call_of(self.prompts[0]), len(self.prompts) // config.rounds
        rounds = len(tables[OURS]) - 1
        result.cost = measuring.tuning_cost(self.backbone, self.judge, call, config, count, rounds, self.levels)

    def retrain(self, number: int, config: TrainConfig, seeds: int) -> dict[str, Any]:
        """Heads trained on the original backbone and on that of a round."""

        def make() -> dict[str, Any]:
            store = self.collected(f"{OURS}/round-1/candidates", self.of_round(1), None, False, labelled=True)
            test = LatentStore.open(self.out / "untuned" / "test")
            lora = self.folder.lora(OURS, number)
            return retrained(self.judge, store, test, lora, self._lora(), config, seeds, self.levels, self.progress)

        return self.folder.once(f"retrained-{number}-{config.steps}-{seeds}", "comparison", make)


def _as_prompts(prompts: Sequence[Prompt | str], split: str) -> list[Prompt]:
    listed = [each if isinstance(each, Prompt) else Prompt(each, Place("", row)) for row, each in enumerate(prompts)]
    return [each._replace(split=split) for each in listed]


def _with_none(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Values with None, as JSON takes it, for what is not finite."""
    return {video: value if value is not None and np.isfinite(value) else None for video, value in values.items()}


def _brightness(video: np.ndarray) -> float:
    """A stand-in where no reward is measured, so that videos are decoded and their motion is known."""
    return float(video.mean())


def _tracked(row: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A round's row as trackers take it."""
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    tuning = {name: value for name, value in row["tuning"].items() if name != "step"}
    measures = {f"{each['measure']}/{name}": each[name] for each in row["measures"] for name in ("mean", "gain")}
    measures = {name: value for name, value in measures.items() if value is not None}
    return {"step": step, **{f"{row['arm']}/{name}": v for name, v in {**numbers, **tuning, **measures}.items()}}
