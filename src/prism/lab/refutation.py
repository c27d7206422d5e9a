"""The test that would refute the claim: does the same head judge as well without what training gave the backbone?

The head is trained in the same way on the trained backbone, on random weights, on shuffled weights and on statistics of
the latents without any backbone. Does accuracy fall to chance, and does Best-of-N by early states stop helping?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from prism import files
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation.intervals import prompt_interval
from prism.evaluation.recorded import candidates_of, reward_columns
from prism.judge import Judge
from prism.lab import controls
from prism.lab.correlation_shown import Answer, shown
from prism.lab.findings import Drawing, Finding, Tables
from prism.lab.judging_power import HeadRecipe, HeadsOnBackbones, Subject, dimension_of, file_name, right_of
from prism.preference import LatentStore, prompt_key
from prism.report.claim_plots import Line, over_levels
from prism.runs import Clock, Parts
from prism.training.conditionings import conditioned

CHANCE = 0.5
NEAR = 0.05  # a control whose accuracy is at most so much lower is as good
CUT = 4  # the step that the verdict's sentence names, or the nearest that was recorded: that of the default plan
BATCH = 64  # candidates in a pass of the backbone
SET = "refutation"


def refute(
    parts: Parts,
    trained: Subject,
    store: LatentStore,
    played: LatentStore | None = None,
    recipe: HeadRecipe | None = None,
    randomised: Sequence[str] = (),
    tested: LatentStore | None = None,
) -> Finding:
    """Run the test, piece by piece in the run's folder.

    Args:
        trained: the backbone that is put to the test.
        store: pairs to train heads on and to measure them on.
        played: candidates of test prompts with recorded states and rewards, for early Best-of-N; None: without it. What
            cannot be played is left out, and the text says why.
        tested: the store whose test pairs are measured on; None: `store`.
        randomised: components that get other weights, where more than the denoiser was trained (see `controls`).

    Raises:
        PrismError: for a store without pairs or with other latents.
    """
    recipe = recipe or HeadRecipe()
    others = [
        controls.untrained(trained, recipe.seed, randomised),
        controls.shuffled(trained, recipe.seed, randomised),
        controls.statistics_of(trained, store),
    ]
    bench = HeadsOnBackbones(parts, {SET: store}, {} if tested is None else {SET: tested}, recipe)
    measured = bench.measured([trained, *others])[SET]
    dimension = dimension_of(measured[trained.name][0], recipe.dimension)
    accuracy = _accuracy(measured, trained.name, dimension)
    early, left_out = list[dict[str, Any]](), ""
    if played is not None:
        try:
            early = _early(bench, [trained, *others], played, dimension, store)
        except PrismError as error:  # too few candidates, or no recorded states
            left_out = f" Best-of-N by early states was left out: {error}"
    verdict = judge_of(accuracy, early, trained.name)
    tables = {"refutation": accuracy} | ({"refutation-early": early} if early else {})
    text = (
        f"{recipe.seeds} heads of one recipe on each, intervals over prompts, paired. A head on "
        "random weights still reads the noisy latent, mixed at random, and the prompt's words: what it gets above "
        "chance comes from there. One draw of random weights was tried."
    )
    text += " Best-of-N chose among recorded candidates of the trained backbone." if early else left_out
    seeds = tuple(range(recipe.seed, recipe.seed + recipe.seeds))
    return Finding(verdict.word, verdict.sentence, text, tables, accuracy[0]["prompts"], seeds)


def _accuracy(measured: Mapping[str, Any], trained: str, dimension: str) -> list[dict[str, Any]]:
    """A row per backbone and noise level, and one over all levels (t None). difference: of the trained one minus it."""
    rows: list[dict[str, Any]] = []
    base, prompts, _, levels = right_of(measured[trained], dimension)
    for name, heads in measured.items():
        right = right_of(heads, dimension)[0]
        for number, t in [*enumerate(levels), (None, None)]:
            kept = slice(None) if number is None else slice(number, number + 1)
            values, before = right[:, kept].mean((0, 1)), base[:, kept].mean((0, 1))
            row = {
                "backbone": name,
                "t": t,
                "dimension": dimension,
                "accuracy": float(values.mean()),
                "accuracy_ci95": prompt_interval(values, prompts),
                "difference": None,
                "difference_ci95": None,
                "pairs": len(values),
                "prompts": len(set(prompts.tolist())),
                "heads": len(heads),
            }
            if name != trained:
                row["difference"] = float((before - values).mean())
                row["difference_ci95"] = prompt_interval(before - values, prompts)
            rows.append(row)
    return rows


# -- Best-of-N by recorded states


def _early(
    bench: HeadsOnBackbones, subjects: Sequence[Subject], played: LatentStore, dimension: str, store: LatentStore
) -> list[dict[str, Any]]:
    """A row per backbone and step: what the pick by the states after it gains over a random one."""
    trained_on = [group.prompt for group in store.groups("train")]
    by_prompt, _ = candidates_of(played, "test", [prompt_key(prompt) for prompt in trained_on])
    names = reward_columns(played)
    rewards = [dimension] if dimension in names else names
    columns = [[rows[name].to_pylist() for name in rewards] for rows in by_prompt.values()]
    values = np.array(columns, dtype=np.float64).mean(1)
    prompts = np.arange(len(values))
    oracle = values.max(1) - values.mean(1)
    clock = Clock("early picks", len(subjects), every=30)
    gains: dict[str, np.ndarray] = {}
    steps: list[int] = []
    for number, subject in enumerate(subjects):
        name = f"early/{file_name(subject.name)}.safetensors"
        missing = not bench.parts.has(name)

        def make(path: Path, subject: Subject = subject) -> None:
            backbone = subject.load()
            judges = bench.judges(SET, subject.name, backbone)
            save_file(_scores(judges, backbone, played, by_prompt, dimension), path)

        scored = bench.parts.piece(name, make, files.load_safetensors)
        steps = scored["steps"].tolist()
        picks = scored["scores"].numpy().argmax(-1)  # (heads, steps, P)
        picked = np.take_along_axis(np.broadcast_to(values, (*picks.shape, values.shape[1])), picks[..., None], -1)
        gains[subject.name] = (picked[..., 0] - values.mean(1)).mean(0)  # (steps, P)
        clock.tick(number + 1, missing)
    rows, base = list[dict[str, Any]](), gains[subjects[0].name]
    for name, gain in gains.items():
        for index, step in enumerate(steps):
            ratio = np.stack([gain[index], oracle], 1)
            row = {
                "backbone": name,
                "step": step,
                "gain": float(gain[index].mean()),
                "share_of_oracle": float(gain[index].sum() / oracle.sum()) if oracle.any() else None,
                "share_of_oracle_ci95": prompt_interval(ratio, prompts, lambda sums: sums[:, 0] / sums[:, 1]),
                "difference": None,
                "difference_ci95": None,
                "prompts": len(values),
                "candidates": values.shape[1],
            }
            if name != subjects[0].name:
                apart = np.stack([base[index] - gain[index], oracle], 1)
                row["difference"] = float(apart[:, 0].sum() / oracle.sum()) if oracle.any() else None
                row["difference_ci95"] = prompt_interval(apart, prompts, lambda sums: sums[:, 0] / sums[:, 1])
            rows.append(row)
    return rows


@torch.no_grad()
def _scores(
    judges: Sequence[Judge], backbone: Backbone, played: LatentStore, by_prompt: Mapping[str, Any], dimension: str
) -> dict[str, Tensor]:
    """Each head's scores of the states (heads, steps, prompts, candidates), and the steps; one read feeds all heads."""
    column = judges[0].dimensions.index(dimension)
    steps = list((played.meta.get("key") or {})["states"])
    per = max(1, BATCH // len(next(iter(by_prompt.values()))))
    items = list(by_prompt.items())
    parts: list[Tensor] = []
    with backbone.freed():
        for start in range(0, len(items), per):
            some = items[start : start + per]
            rows = [(prompt, video) for prompt, table in some for video in table["video"].to_pylist()]
            conditioning = conditioned(backbone, played, [prompt for prompt, _ in rows], played.call)
            by_step = []
            for index in range(len(steps)):
                states, t = played.trajectory([video for _, video in rows], index)
                tokens = backbone.tokens(states.float().to(backbone.device), conditioning, t, judges[0].taps)
                by_step.append(torch.stack([judge.score_tokens(tokens)[:, column].cpu() for judge in judges]))
            parts.append(torch.stack(by_step, 1).unflatten(2, (len(some), -1)))
    return {"scores": torch.cat(parts, 2).contiguous(), "steps": torch.tensor(steps)}


# -- what it says


def judge_of(accuracy: Sequence[Mapping[str, Any]], early: Sequence[Mapping[str, Any]], trained: str) -> Answer:
    """Does the signal come from what the backbone learned? In one line, with its intervals.

    It holds where the trained backbone is better than every control, random and shuffled weights stay at chance, and
    early picks, where they were played, are better too; in part where accuracy alone says so, or the weights are not
    shown to stay within five points of chance, or are clear of it at a level where the trained one is not told to be
    better. It does not where some control is as good: the difference from it lies below five points.
    """
    over_all = {row["backbone"]: row for row in accuracy if row["t"] is None}
    ours, others = over_all[trained], [row for name, row in over_all.items() if name != trained]
    if any(row["difference_ci95"] is None for row in others):
        few = f"{ours['prompts']} test prompts are too few for an interval; measure 10 or more."
        return Answer("cannot be told", few)
    parts = [f"{row['backbone']} {shown(row['accuracy'])} (trained minus it {_ends(row)})" for row in others]
    sentence = f"Over all noise levels accuracy is {shown(ours['accuracy'])} when trained, on {', '.join(parts)}"
    if early:
        steps = sorted({row["step"] for row in early})
        at = min(steps, key=lambda step: abs(step - CUT))
        here = {row["backbone"]: row for row in early if row["step"] == at}
        picked = [f"{name} {_share(row)}" for name, row in here.items() if name != trained]
        sentence += f"; a pick after step {at} gets {_share(here[trained])} of the oracle's gain, {', '.join(picked)}"
    if ours["accuracy_ci95"][0] <= CHANCE:
        return Answer(
            "cannot be told", f"{sentence}: the trained backbone's head is at chance itself; train it longer."
        )
    as_good = [row["backbone"] for row in others if row["difference_ci95"][1] < NEAR]
    if as_good:
        return Answer("does not hold", f"{sentence}: {' and '.join(as_good)} judge{'s' * (len(as_good) == 1)} as well.")
    if any(row["difference_ci95"][0] <= 0 for row in others):
        return Answer("cannot be told", f"{sentence}: not every difference is clear of zero.")
    if early and not all(_is_better(row) for name, row in here.items() if name != trained):
        return Answer("holds in part", f"{sentence}: training makes accuracy, but early picks are not told apart.")
    weights = [row["accuracy_ci95"] for row in others if row["backbone"] != controls.STATISTICS]
    still = [f"{row['backbone']} at t = {row['t']:g}" for row in accuracy if _still_judges(row)]
    if all(low <= CHANCE and high < CHANCE + NEAR for low, high in weights) and not still:
        return Answer("holds", f"{sentence}: without training the signal is gone.")
    if still:
        sentence += f"; clear of chance, and not told from the trained one, are {', '.join(still)}"
    return Answer("holds in part", f"{sentence}: training adds to it, but accuracy does not fall to chance without.")


def _still_judges(row: Mapping[str, Any]) -> bool:
    """True for a level at which random or shuffled weights are clear of chance, and not told to be worse."""
    if row["t"] is None or row["difference_ci95"] is None or row["backbone"] == controls.STATISTICS:
        return False
    return bool(row["accuracy_ci95"][0] > CHANCE and row["difference_ci95"][0] <= 0)


def _is_better(row: Mapping[str, Any]) -> bool:
    """True where the trained backbone's pick gains more than a control's, beyond the interval."""
    interval = row["difference_ci95"]
    return interval is not None and interval[0] > 0


def _ends(row: Mapping[str, Any]) -> str:
    low, high = (f"{end:.3f}".replace("0.", ".", 1) for end in row["difference_ci95"])
    return f"{shown(row['difference'])}, {low} to {high}"


def _share(row: Mapping[str, Any]) -> str:
    interval = row["share_of_oracle_ci95"]
    ends = "" if interval is None else f" ({round(100 * interval[0])} to {round(100 * interval[1])})"
    return f"{round(100 * (row['share_of_oracle'] or 0))} %{ends}"


def drawn(tables: Tables) -> list[Drawing]:
    """The figures of a finding's tables."""
    figure = over_levels(_lines(tables["refutation"], "t", "accuracy"), "noise level t of the latent that is judged")
    caption = "Accuracy by noise level of one recipe’s heads on trained, random and shuffled weights, and on statistics"
    drawings = [Drawing("refutation", caption, figure)]
    if tables.get("refutation-early"):
        lines = _lines(tables["refutation-early"], "step", "share_of_oracle")
        figure = over_levels(lines, "the step that the pick is made after", chance=0.0, falling=False)
        caption = "What a pick by the states after a step gains, as a share of the best candidate's gain."
        drawings.append(Drawing("refutation-early", caption, figure))
    return drawings


def _lines(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Line]:
    """A line per backbone, the trained one first and drawn strong."""
    lines = []
    for number, name in enumerate(dict.fromkeys(row["backbone"] for row in rows)):
        some = [row for row in rows if row["backbone"] == name and row[x] is not None and row[y] is not None]
        some.sort(key=lambda row: float(row[x]))
        ends = [row[f"{y}_ci95"] for row in some]
        lines.append(Line(name, [row[x] for row in some], [row[y] for row in some], ends, number == 0))
    return lines
