"""What the study compares: one recipe, and variants that differ from it in one thing each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism.checks import quoted
from prism.errors import PrismError
from prism.training.config import TrainConfig

BASE = "base"
BASE_HEADS = 5  # heads of the recipe that are trained, for the averages


@dataclass(frozen=True)
class Variant:
    """A recipe for a judge.

    train, head: what it changes in `TrainConfig` and in `Judge.untrained`.
    members: other variants whose heads it averages in place of training its own.
    heads: how many heads of different first weights it averages. across: whether they come from different seeds, each
    with batches and noise of its own.
    draws: noise draws that a score is averaged over.
    standardised: whether members are divided by the spread of their scores before they are averaged.
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
        """Whether it has heads of its own."""
        return not self.members and self.heads == 1 and self.draws == 1


def table(
    blocks: int, tap: int, prompts: int, per_prompt: int, train: TrainConfig, trajectories: bool
) -> list[Variant]:
    """Every variant, the recipe first.

    blocks, tap: of the backbone and the recipe. prompts, per_prompt: training prompts and videos of each in the store.
    train: the recipe's settings. trajectories: whether the store holds recorded states.
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
    """The variants of some names or questions, the recipe among them, and the members they are made of.

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
    wanted = {row.name for row in rows if row.name in only or row.question in only} | {BASE}
    wanted |= {member for row in rows if row.name in wanted for member in row.members}
    return [row for row in rows if row.name in wanted]
