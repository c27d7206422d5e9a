"""`prism collect`: sample candidates of a user's backbone, label them by rewards, and write a latent store."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from prism.commands import speaks
from prism.commands.encode import shares_of
from prism.commands.options import Adapted, Repeated, Resuming, Seed, Several, option
from prism.commands.sample import Call
from prism.errors import SEEDS, PrismError, number, quoted, whole


@dataclass(frozen=True)
class Rewards:
    """Rewards that label the videos."""

    rewards: Annotated[tuple[str, ...], Repeated, option("SPEC", name="reward")] = ()
    """Reward of decoded videos: FILE.py:function, module:function, a teacher as videoreward=FOLDER, or referee."""
    reward_timeout: float = 600.0
    """Seconds that one call of a reward may take."""
    margin: Annotated[str, option("X or NAME:X,...")] = "0"
    """Largest difference of scores that is a tie, for all dimensions or by dimension."""
    soft: Annotated[str, option("X or NAME:X,...", "none")] = ""
    """Scale of the scores, for all dimensions or by dimension: pairs get the probability sigmoid(difference / X)."""
    fps: Annotated[float | None, option(default="not told")] = None
    """Frames per second, for functions that ask."""
    label: bool = False
    """Label the store in --out anew, by other rewards; nothing is sampled."""


@dataclass(frozen=True)
class Kept:
    """Candidates, and the latents of them that the store holds."""

    candidates: int = 4
    """Candidates per prompt."""
    seed: Seed = 0
    states: Annotated[str, option("STEP,...", "none")] = ""
    """Steps from 1 whose states are kept beside the final latents."""
    predicted: Annotated[bool, option(default="with them")] = True
    """Without the clean latents that the denoiser predicts at these steps."""
    half: bool = False
    """Keep latents in float16, not in the dtype of the pipeline."""
    held_out: Annotated[str, option("V,T")] = "0.1,0.1"
    """Shares of validation and test prompts, where the file names no splits."""
    unit: int = 1
    """Prompts per shard: what a kill can cost."""
    batch_size: int = 1
    """Candidates of a shard per denoiser call; above 1, latents are those of each seed up to rounding."""


@dataclass(frozen=True)
class Collect:
    """Sample candidates of your own model, have a reward label them, and write a store, which train and eval read.

    A launcher's processes share the prompts, or workers of Ray on several machines; a run that was killed, or whose
    reward failed, goes on with --resume.
    """

    output: Resuming
    prompts: Annotated[Path | None, option("FILE", "")] = None
    """Prompts: a text file with one a line, or a table with a column prompt or prompt_en."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of the prompts' file, such as cp1252."""
    kept: Kept = Kept()
    rewards: Rewards = Rewards()
    models: Adapted = field(default_factory=Adapted)
    several: Several = field(default_factory=Several)
    call: Call = field(default_factory=Call)

    def main(self) -> None:
        """Collect, and say what the store holds."""
        store = run(self)
        if speaks():
            prompts = len(set(store.videos["prompt"].to_pylist()))
            named = f" in {', '.join(store.dimensions)}" if store.dimensions else ""
            print(
                f"{len(store.videos):,} videos of {prompts:,} prompt{'s' if prompts != 1 else ''} and "
                f"{len(store.pairs):,} pairs{named}: "
                f"{store.folder}"
            )


def run(config: Collect) -> Any:
    """Collect or label; returns the opened store."""
    sampling, rewards = config.kept, config.rewards
    config.several.check()
    whole("--candidates", sampling.candidates, 1, 10_000)
    whole("--seed", sampling.seed, 0, SEEDS)
    whole("--unit", sampling.unit, 1, 100_000)
    whole("--batch-size", sampling.batch_size, 1, 10_000)
    number("--reward-timeout", rewards.reward_timeout, 0, above=True)
    if rewards.fps is not None:
        number("--fps", rewards.fps, 0, above=True)
    margins, scales = _numbers(rewards.margin, "margin"), _numbers(rewards.soft, "soft") if rewards.soft else None
    states, held_out = _states(sampling.states), shares_of(sampling.held_out)
    if rewards.label == (config.prompts is not None):
        raise PrismError(
            "The --label samples nothing; leave --prompts out."
            if rewards.label
            else "No prompts are named to sample candidates of; give --prompts FILE, or --label to label --out anew."
        )
    if rewards.label and not rewards.rewards:
        raise PrismError("The --label needs what labels; give --reward.")
    if rewards.label:
        _check_label_alone(config)
    if rewards.margin != Rewards.margin and not rewards.rewards:
        raise PrismError("The --margin is of scores, and no reward gives any; give --reward.")
    if rewards.soft and not rewards.rewards:
        raise PrismError("The --soft is of scores, and no reward gives any; give --reward.")
    from prism.loading import check_rewards, crew_of_backbone, load_rewards
    from prism.preference.prompts import read_prompts
    from prism.training import collect, labels

    prompts = [] if config.prompts is None else read_prompts(config.prompts, config.encoding)
    models, several, remote = config.models, config.several, config.several.ray is not None
    check_rewards(rewards.rewards)
    teachers = [] if remote else load_rewards(rewards.rewards, rewards.reward_timeout, models.device)
    labels.check_names(teachers)
    with crew_of_backbone(
        models.backbone, models.device, models.dtype, models.offload, models.loras, several.ray, several.ray_workers
    ) as (crew, call):
        if remote:
            teachers = load_rewards(rewards.rewards, rewards.reward_timeout, models.device, crew)
        common: dict[str, Any] = {
            "margins": margins,
            "scales": scales,
            "fps": rewards.fps,
            "resume": config.output.resume,
        }
        if rewards.label:
            return collect.label(config.output.out, crew, teachers, **common)
        for name, value in asdict(config.call).items():
            if value is not None:
                call[name] = os.path.abspath(value) if name in ("image", "last_image", "video") else value
        return collect.collect(
            prompts,
            crew,
            call,
            config.output.out,
            teachers,
            candidates=sampling.candidates,
            seed=sampling.seed,
            states=states,
            predicted=sampling.predicted,
            half=sampling.half,
            held_out=held_out,
            unit=sampling.unit,
            batch_size=sampling.batch_size,
            loras=models.loras,
            **common,
        )


def _check_label_alone(config: Collect) -> None:
    """Refuse options of the sampling where nothing is sampled."""
    flags = {"predicted": "--no-predicted", "num_inference_steps": "--steps", "loras": "--lora"}
    for options, default in ((config.kept, Kept()), (config.call, Call())):
        for name, value in asdict(options).items():
            if value != getattr(default, name):
                flag = flags.get(name, f"--{name.replace('_', '-')}")
                raise PrismError(f"The --label samples nothing; leave {flag} out.")
    for flag, is_set in {"--lora": config.models.loras, "--encoding": config.encoding}.items():
        if is_set:
            raise PrismError(f"The --label samples nothing; leave {flag} out.")


def _states(text: str) -> tuple[int, ...]:
    try:
        return tuple(whole("A step of --states", int(part), 1, 10_000) for part in text.split(",") if text.strip())
    except ValueError:
        raise PrismError(f'The --states "{quoted(text, 60)}" must be steps apart by commas, such as 3,4,6.') from None


def _numbers(text: str, option: str) -> dict[str, float] | float:
    """One number, or by dimension."""
    try:
        if ":" not in text:
            return number(f"--{option}", float(text), 0)
        parts = [part.rsplit(":", 1) for part in text.split(",")]
        return {name.strip(): number(f"--{option}", float(value), 0) for name, value in parts}
    except ValueError:
        raise PrismError(
            f'The --{option} "{quoted(text, 60)}" must be a number, or one by dimension such as VQ:0.03,MQ:0.1.'
        ) from None
