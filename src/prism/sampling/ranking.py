"""Candidates ranked: by a judge's dimensions, or by the answers of the caller's own oracle."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prism.errors import PrismError, number, quoted


def ranking(judge: Any, select_by: str | Mapping[str, float]) -> dict[str, float]:
    """Weights of the judge's dimensions by which candidates are ranked.

    "overall" of a judge that has none is the mean of its dimensions, with a warning. Raises PrismError for a dimension
    that it has not, weights that are no finite numbers, or no weight at all.
    """
    return weights_over(judge.dimensions, select_by, "judge")


def weights_over(names: Sequence[str], select_by: str | Mapping[str, float], whose: str) -> dict[str, float]:
    """As `ranking`, over dimensions `names` of a judge, or of an oracle's answers."""
    weights = check_weights(select_by)
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


def check_weights(select_by: Any) -> dict[str, float]:
    """The weights by dimension that `select_by` gives, which are finite numbers and not all zero."""
    if isinstance(select_by, str):
        return {select_by: 1.0}
    if not isinstance(select_by, Mapping):
        raise PrismError(
            f'select_by must be a dimension, or weights by dimension such as {{"VQ": 1.0}}; found '
            f"{quoted(select_by, 80)}."
        )
    weights = {name: number(f"The weight of {quoted(name, 40)}", value) for name, value in select_by.items()}
    if not any(weights.values()):
        raise PrismError("select_by (--select-by) gives no dimension a weight; name one, for example overall.")
    return weights


ANSWERS = "a number, or a dict of numbers by dimension"


def check(oracle: Any) -> None:
    """Raise PrismError for what cannot be called with a video and its prompt."""
    if not callable(oracle):
        raise PrismError(
            f"oracle must be a function of a video and its prompt; found {quoted(oracle, 80)} of type "
            f"{type(oracle).__name__}."
        )
    try:
        signature = inspect.signature(oracle)
    except (TypeError, ValueError):  # of a builtin that does not say
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise PrismError(
            f"oracle is called as oracle(video, prompt), which {quoted(oracle, 80)} refuses: {quoted(error, 120)}."
        ) from None


def ask(oracle: Callable[[Any, Any], Any], videos: Sequence[np.ndarray], prompt: str) -> list[dict[str, float]]:
    """The oracle's answers for videos (T, H, W, 3), by dimension; "oracle" where it gives one number.

    One whose attribute `batched` is true is called once, with the videos as (B, T, H, W, 3) and a list of B prompts,
    and answers with B numbers, or with B numbers by dimension.
    """
    if not videos:
        return []
    if not getattr(oracle, "batched", False):
        return [_answer(oracle(video, prompt)) for video in videos]
    found = oracle(np.stack(videos), [prompt] * len(videos))
    if isinstance(found, Mapping):
        columns = {name: _rows(values, len(videos)) for name, values in found.items()}
        return [_answer({name: values[row] for name, values in columns.items()}) for row in range(len(videos))]
    return [_answer(value) for value in _rows(found, len(videos))]


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
    """One answer by dimension. Raises PrismError for what is no number, and no dict of numbers."""
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) for name in value):
            raise PrismError(f"The oracle must answer with {ANSWERS}; found the dict {quoted(dict(value), 120)}.")
        return {name: _number(inner) for name, inner in value.items()}
    return {"oracle": _number(value)}


def _number(value: Any) -> float:
    """A single number of any library, True and False included; NaN is one."""
    try:
        if isinstance(value, str | bytes) or value is None or isinstance(value, list | tuple | set | Mapping):
            raise TypeError
        return float(value)
    except Exception:
        kind = type(value).__name__
        raise PrismError(f"The oracle must answer with {ANSWERS}; found {quoted(value, 120)} of type {kind}.") from None


def columns(
    answers: Sequence[Mapping[str, float]], select_by: str | Mapping[str, float]
) -> tuple[list[str], dict[str, float]]:
    """The dimensions of an oracle's answers, and the weights to rank by."""
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
