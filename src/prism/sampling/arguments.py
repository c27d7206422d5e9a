"""The caller's input to `best_of_n`, checked: arguments, weights to rank by, and an oracle's answers."""

from __future__ import annotations

import inspect
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from prism.backbone import Backbone
from prism.backbone.arguments import shows_adapters
from prism.errors import DRAWS, PrismError, number, quoted, whole
from prism.judge import Judge
from prism.sampling.plan import Plan

RESERVED = {
    "generator": "candidates draw from CPU generators seeded with seed + i; give seed or seeds",
    "latents": "every candidate starts from the noise of its own seed; give seed or seeds",
    "num_videos_per_prompt": "the number of candidates is n",
    "num_images_per_prompt": "the number of candidates is n",
}
DEFAULT_N, MAX_N = 8, 10_000  # candidates
SMALL_DENOISER = 500_000_000  # parameters; up to as many, all candidates are sampled in one batch


def backbone_of(pipe: Any, judge: Any, kind: type[Plan], oracle: Any) -> tuple[Backbone, Any]:
    """The backbone of a run and its judge, which is loaded if it is given as a folder or Hub id."""
    if isinstance(pipe, Backbone):
        pipe = pipe.pipe
    if isinstance(pipe, str | os.PathLike):
        raise PrismError(
            f"pipe is {quoted(os.fspath(pipe), 120)}; load it first: DiffusionPipeline.from_pretrained(...)."
        )
    if _is_judge(pipe):
        raise PrismError("pipe is a judge; the arguments are best_of_n(pipe, judge, prompt).")
    if kind.needs_oracle():
        if oracle is None:
            raise PrismError(f'The strategy "{kind.strategy}" needs `oracle`, a function of a video and its prompt.')
        check_oracle(oracle)
    if judge is None:
        if kind.needs_judge():
            raise PrismError(f'The strategy "{kind.strategy}" needs a judge; load one with Judge.from_pretrained.')
        return Backbone(pipe), None
    if isinstance(judge, str | os.PathLike):
        judge = Judge.from_pretrained(judge, pipe)
    if not _is_judge(judge):
        raise PrismError(
            f"judge is {quoted(judge, 80)} of type {type(judge).__name__}, which scores nothing; load one with "
            "Judge.from_pretrained(head, pipe)."
        )
    if judge.backbone.pipe is not pipe:
        raise PrismError(
            "The judge was put onto another pipeline; use Judge.from_pretrained(head, pipe) with this one."
        )
    if kind.looks_at == "steps" and not hasattr(judge, "score_tokens"):
        raise PrismError(
            f'The strategy "{kind.strategy}" reads hidden states on the way, and this judge reads none; use full or '
            "draft."
        )
    return judge.backbone, judge


def _is_judge(value: Any) -> bool:
    scores = any(callable(getattr(value, name, None)) for name in ("score_clean", "score_tokens"))
    return scores and hasattr(value, "dimensions") and isinstance(getattr(value, "backbone", None), Backbone)


def draw_seed() -> int:
    """A seed drawn by the system, small enough to be typed."""
    return secrets.randbelow(2**31)


def seed_of(value: Any) -> int:
    """A seed that torch's generators take."""
    return whole("A seed", value, 0, 2**63 - 1)


def seeds_of(n: Any, seed: int, seeds: Any) -> tuple[int, ...]:
    """The candidates' seeds: the `seeds` given, or n that count up from `seed`."""
    if seeds is None:
        count = DEFAULT_N if n is None else whole("n", n, 1, MAX_N)
        return tuple(seed_of(seed + index) for index in range(count))
    try:  # a set is refused: it has no order to number candidates by
        listed = None if isinstance(seeds, str | bytes | Mapping | set | frozenset) else list(seeds)
    except TypeError:
        listed = None
    if listed is None:
        raise PrismError(f"seeds must be a list of whole numbers; found {quoted(seeds, 80)}.")
    if not 0 < len(listed) <= MAX_N or (n is not None and whole("n", n, 1, MAX_N) != len(listed)):
        raise PrismError(f"seeds must hold one seed per candidate, at most {MAX_N:,}; found {len(listed)} for n = {n}.")
    checked = tuple(map(seed_of, listed))
    if len(set(checked)) < len(checked):
        twice = next(seed for seed in checked if checked.count(seed) > 1)
        warnings.warn(f"The seed {twice} is given more than once; its candidates are one and the same.", stacklevel=3)
    return checked


def batch_size_of(backbone: Backbone, batch_size: Any, n: int, call: Mapping[str, Any]) -> int:
    """Candidates per denoiser call."""
    size = None if batch_size is None else min(n, whole("batch_size", batch_size))
    if backbone.family.batch_size_one or shows_adapters(call):
        return 1
    return size or (n if backbone.num_parameters <= SMALL_DENOISER else 1)


def top_k_of(top_k: Any, n: int) -> int:
    """The number of candidates that are finished, from 1 to n."""
    count = whole("top_k", top_k)
    if count > n:
        raise PrismError(f"top_k is {count}, and there are {n} candidates.")
    return count


def judge_at_of(judge_at: Any, default: float, t_range: tuple[float, float]) -> float:
    """The noise level at which finished latents are judged."""
    low, high = t_range
    return min(max(default, low), high) if judge_at is None else number("judge_at", judge_at, 0, 1000, above=True)


def check_plan(plan: Any, settings: Mapping[str, Any], function: Callable[..., Any], decides: str = "plan") -> None:
    """Refuse what is no `Plan`, and arguments of `function` beside it that are not at their defaults.

    decides: the argument that decides in their place: "plan", or "budget" without a plan.
    """
    if not isinstance(plan, Plan) and decides == "plan":
        raise PrismError(
            f"plan is {quoted(plan, 80)} of type {type(plan).__name__}; give a strategy with its settings, such as "
            "prism.sampling.strategies.Early(schedule=((4, 1),)), or a plan.json of prism plan."
        )
    defaults = inspect.signature(function).parameters
    for name, value in settings.items():
        if value is not defaults[name].default and value != defaults[name].default:
            raise PrismError(f"The {decides} says {name} itself; leave the argument {name!r} out.")


def resolved(plan: Plan, judge_at: float, t_range: tuple[float, float]) -> Plan:
    """The plan with its settings checked, and those that are None replaced. judge_at: the default of that level."""
    changes: dict[str, Any] = {}
    for field in fields(plan):
        value = getattr(plan, field.name)
        if field.name == "judge_at":
            changes[field.name] = judge_at_of(value, judge_at, t_range)
        elif field.name == "num_draws":
            changes[field.name] = whole("num_draws", value, 1, DRAWS)
    return replace(plan, **changes)


def ranking(judge: Any, select_by: str | Mapping[str, float], name: str = "select_by") -> dict[str, float]:
    """Weights of the judge's dimensions by which candidates are ranked.

    Where the judge has no "overall", that stands for the mean of its dimensions, with a warning. Raises PrismError for
    a dimension that the judge does not have, for weights that are not finite numbers, or where all weights are zero.
    """
    return weights_over(judge.dimensions, select_by, "judge", name)


def weights_over(
    names: Sequence[str], select_by: str | Mapping[str, float], whose: str, argument: str = "select_by"
) -> dict[str, float]:
    """Weights as from `ranking`, over the dimensions `names` of `whose`: a judge or an oracle."""
    weights = check_weights(select_by, argument)
    if weights == {"overall": 1.0} and "overall" not in names:
        warnings.warn(
            f"The {whose} has no dimension overall; candidates are ranked by the mean of {', '.join(names)}.",
            stacklevel=4,
        )
        return dict.fromkeys(names, 1 / len(names))
    for name in weights:
        if name not in names:
            raise PrismError(
                f"The {whose} has no dimension {quoted(repr(name), 60)} to select by; it has {', '.join(names)}."
            )
    return weights


def check_weights(select_by: Any, argument: str = "select_by") -> dict[str, float]:
    """The weights per dimension in `select_by`, checked: finite numbers, not all zero. argument: its name."""
    if isinstance(select_by, str):
        return {select_by: 1.0}
    if not isinstance(select_by, Mapping):
        raise PrismError(
            f'{argument} must be a dimension, or weights by dimension such as {{"VQ": 1.0}}; found '
            f"{quoted(select_by, 80)}."
        )
    weights = {name: number(f"The weight of {quoted(name, 40)}", value) for name, value in select_by.items()}
    if not any(weights.values()):
        raise PrismError(f"{argument} gives no dimension a weight; name one, for example overall.")
    return weights


ANSWERS = "a number, or a dict of numbers by dimension"


def check_oracle(oracle: Any) -> None:
    """Raise PrismError for an oracle that cannot be called with a video and its prompt."""
    if not callable(oracle):
        raise PrismError(
            f"oracle must be a function of a video and its prompt; found {quoted(oracle, 80)} of type "
            f"{type(oracle).__name__}."
        )
    try:
        signature = inspect.signature(oracle)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise PrismError(
            f"oracle is called as oracle(video, prompt), which {quoted(oracle, 80)} refuses: {quoted(error, 120)}."
        ) from None


def ask_oracle(oracle: Callable[[Any, Any], Any], videos: Sequence[np.ndarray], prompt: str) -> list[dict[str, float]]:
    """The oracle's answers for videos (T, H, W, 3), each by dimension; a single number is the dimension "oracle".

    An oracle whose attribute `batched` is true is called once, with the videos as (B, T, H, W, 3) and a list of B
    prompts. It answers with B numbers, or with a dict of B numbers per dimension.
    """
    if not videos:
        return []
    if not getattr(oracle, "batched", False):
        return [_answer(oracle(video, prompt)) for video in videos]
    answers = oracle(np.stack(videos), [prompt] * len(videos))
    if isinstance(answers, Mapping):
        columns = {name: _rows(values, len(videos)) for name, values in answers.items()}
        return [_answer({name: values[row] for name, values in columns.items()}) for row in range(len(videos))]
    return [_answer(value) for value in _rows(answers, len(videos))]


def _rows(values: Any, count: int) -> list[Any]:
    values = values.detach().cpu().tolist() if hasattr(values, "detach") else values
    try:
        if isinstance(values, str | bytes | Mapping):
            raise TypeError
        rows = list(values)
    except TypeError:
        raise PrismError(
            f"A batched oracle must answer with {count} numbers for {count} videos; found {quoted(values, 120)}."
        ) from None
    if len(rows) != count:
        raise PrismError(f"A batched oracle must answer with {count} numbers for {count} videos; found {len(rows)}.")
    return rows


def _answer(value: Any) -> dict[str, float]:
    """One answer, by dimension. Raises PrismError unless it is a number or a dict of numbers."""
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) for name in value):
            raise PrismError(f"The oracle must answer with {ANSWERS}; found the dict {quoted(dict(value), 120)}.")
        return {name: _number(inner) for name, inner in value.items()}
    return {"oracle": _number(value)}


def _number(value: Any) -> float:
    """A number of any library as a float; True, False and NaN are accepted."""
    try:
        if isinstance(value, str | bytes) or value is None or isinstance(value, list | tuple | set | Mapping):
            raise TypeError
        return float(value)
    except Exception:
        kind = type(value).__name__
        raise PrismError(f"The oracle must answer with {ANSWERS}; found {quoted(value, 120)} of type {kind}.") from None


def oracle_columns(
    answers: Sequence[Mapping[str, float]], select_by: str | Mapping[str, float]
) -> tuple[list[str], dict[str, float]]:
    """The dimensions of an oracle's answers, which must all have the same, and the weights to rank by."""
    names = list(answers[0]) if answers else ["oracle"]
    for answer in answers:
        if set(answer) != set(names):
            raise PrismError(
                f"The oracle must answer with the same dimensions for each video; found {', '.join(names)} and "
                f"{', '.join(answer)}."
            )
    if names == ["oracle"]:
        return names, {"oracle": 1.0}
    return names, weights_over(names, select_by, "oracle")
