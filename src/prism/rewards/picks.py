"""The judge's verdicts on a round's candidates: scores, what is tuned on, and prompts that must not be shared."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prism.errors import PrismError, quoted
from prism.judge import Judge
from prism.preference import LatentStore, prompt_key
from prism.rewards.settings import ImproveConfig


@dataclass(frozen=True)
class Group:
    """A prompt's candidates that start from one image, if from any."""

    prompt: str
    videos: tuple[str, ...]

    @property
    def key(self) -> str:
        return prompt_key(self.prompt)


@dataclass(frozen=True)
class Pick:
    """What is tuned on of a prompt.

    winner, loser: the candidates with the highest and the lowest score. scores: (videos,) of all candidates.
    """

    group: Group
    scores: tuple[float, ...]

    @property
    def winner(self) -> str:
        return self.group.videos[int(np.argmax(self.scores))]

    @property
    def loser(self) -> str:
        return self.group.videos[int(np.argmin(self.scores))]


def groups_of(store: LatentStore) -> list[Group]:
    """A store's videos by prompt, and by image where prompts have several, in the store's order."""
    table = store.videos
    videos = table["video"].to_pylist()
    kinds = store.kinds(videos).tolist()
    members: dict[tuple[str, int], list[str]] = {}
    for video, prompt, kind in zip(videos, table["prompt"].to_pylist(), kinds):
        members.setdefault((prompt, kind), []).append(video)
    return [Group(prompt, tuple(each)) for (prompt, _), each in members.items()]


def judged(judge: Judge, store: LatentStore, config: ImproveConfig, levels: Sequence[float]) -> dict[str, list[float]]:
    """The judge's scores (num_dimensions,) of each video of a store, the mean over levels and draws.

    Videos of a prompt are judged under the same noise, and under the same whichever model made them. The backbone must
    have no adapter on.
    """
    scores: dict[str, list[float]] = {}
    with judge.backbone.held(), judge.backbone.freed():
        for group in groups_of(store):
            latents, call = store.latents(group.videos), store.call_of(group.videos[0])
            total = torch.zeros(len(group.videos), len(judge.dimensions), dtype=torch.float64)
            for level in levels:
                seed = int.from_bytes(hashlib.sha256(f"{config.seed} {group.key} {level}".encode()).digest()[:6], "big")
                for start in range(0, len(latents), config.max_rows):
                    part = slice(start, start + config.max_rows)
                    generator = torch.Generator().manual_seed(seed)  # the same noise for every part
                    mean, _ = judge.score_clean(
                        latents[part], group.prompt, level, config.num_draws if level else 1, generator, **call
                    )
                    total[part] += mean.double().cpu()
            scores |= zip(group.videos, (total / len(levels)).tolist())
    return scores


def decisive(judge: Any, dimension: str) -> list[float]:
    """The weight of each of a judge's dimensions in the score that decides."""
    dimensions = list(judge.dimensions)
    if dimension and dimension not in dimensions:
        raise PrismError(
            f"The judge has the dimensions {', '.join(dimensions)}, and dimension is {quoted(dimension, 60)}; name one "
            "of them."
        )
    name = dimension or ("overall" if "overall" in dimensions else "")
    if not name:
        return [1 / len(dimensions)] * len(dimensions)
    return [float(each == name) for each in dimensions]


def picked(
    groups: Sequence[Group], scores: Mapping[str, float], margin: float, control: str = "", seed: int = 0
) -> tuple[list[Pick], dict[str, float]]:
    """The picks of groups by the score of each video, and facts of the groups by DiffusionNFT's and verl-omni's names.

    Args:
        margin: groups whose best and worst differ by no more are left out.
        control: "random" shuffles the scores of each prompt, "worst" turns them round.
        seed: of the shuffling.

    Returns:
        The picks; and reward_avg and reward_std_mean (mean and spread within groups), zero_std_ratio (share of groups
        left out), group_size, and the numbers of prompts and of picks.

    Raises:
        PrismError: where nothing is left.
    """
    picks, means, spreads = [], [], []
    for group in groups:
        values = np.array([scores[video] for video in group.videos])
        means.append(float(values.mean()))
        spreads.append(float(values.std(ddof=1)) if len(values) > 1 else 0.0)
        if len(values) < 2 or values.max() - values.min() <= margin:
            continue
        if control == "random":
            values = np.random.default_rng([seed, int(group.key, 16)]).permutation(values)
        picks.append(Pick(group, tuple((-values if control == "worst" else values).tolist())))
    facts = {
        "reward_avg": float(np.mean(means)),
        "reward_std_mean": float(np.mean(spreads)),
        "zero_std_ratio": 1 - len(picks) / len(groups),
        "group_size": float(np.mean([len(group.videos) for group in groups])),
        "trained_prompt_num": len(picks),
        "prompts": len(groups),
    }
    if not picks:
        raise PrismError(
            f"In none of {len(groups)} prompts do the judge's scores of the candidates differ by more than "
            f"{margin:g}; there is nothing to tune on. Take more candidates, or a lower margin."
        )
    return picks, facts


def check_prompts(
    tuning: Sequence[str], test: Sequence[str], seen: Mapping[str, Collection[str]], least: tuple[int, int]
) -> None:
    """Refuse prompts of which tuning and test share one, or that a judge was trained on, and too few of them.

    seen: the keys of the prompts (`prism.preference.prompt_key`) that each judge was trained on, by its name in words.
    least: fewest prompts of tuning and of test.
    """
    keys = {"tuning": {prompt_key(p): p for p in tuning}, "test": {prompt_key(p): p for p in test}}
    for (name, prompts), fewest in zip(keys.items(), least):
        if len(prompts) < fewest:
            raise PrismError(
                f"There are {len(prompts)} {name} prompts, and at least {fewest} are needed; give a longer file."
            )
    shared = [prompt for key, prompt in keys["test"].items() if key in keys["tuning"]]
    if shared:
        raise PrismError(
            f"Tuning and test share {_counted(shared)}; tune on prompts that are not tested, or the gain would be of "
            "what was learnt by heart."
        )
    for judge, trained_on in seen.items():
        for name, prompts in keys.items():
            shared = [prompt for key, prompt in prompts.items() if key in trained_on]
            if shared:
                raise PrismError(
                    f"The {name} prompts and those that {judge} was trained on share {_counted(shared)}; take others, "
                    "on which its verdicts are not learnt by heart."
                )


def _counted(prompts: Sequence[str]) -> str:
    return f'{len(prompts)} prompt{"s" * (len(prompts) > 1)}, such as "{quoted(prompts[0], 100)}"'
