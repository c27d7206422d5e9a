"""What a judge is made of and asked, checked; each mistake is a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prism.checks import quoted
from prism.errors import PrismError


def check_dimensions(dimensions: Any) -> None:
    """Names of scores are a list of texts; a text alone would be taken letter by letter."""
    if not isinstance(dimensions, list | tuple) or not all(isinstance(name, str) and name for name in dimensions):
        raise PrismError(f"The dimensions must be a list of names; found {quoted(dimensions, 80)}.")


def check_options(options: Iterable[str], known: Sequence[str]) -> None:
    """Options of a head are those it has."""
    for name in sorted(set(options) - set(known)):
        raise PrismError(f"A head has no option {quoted(name, 60)}; it has {', '.join(known)}.")


def check_generator(generator: Any) -> None:
    if not isinstance(generator, torch.Generator | None):
        raise PrismError(f"generator must be one torch.Generator on the CPU; found {quoted(generator, 80)}.")


def listed(judges: Any, kind: type) -> list[Any]:
    """The judges of any iterable, at least one, all of them of a kind."""
    iterable = (
        isinstance(judges, Iterable) and getattr(judges, "ndim", None) != 0 and not isinstance(judges, str | bytes)
    )
    judges = list(judges) if iterable else [judges]
    if not judges:
        raise PrismError("There is no judge to average; give at least one.")
    for judge in judges:
        if not isinstance(judge, kind):
            raise PrismError(
                f"A list of judges is needed to average; found {quoted(judge, 80)} of type {type(judge).__name__}."
            )
    return judges


def margins_of(margins: Any, dimensions: Sequence[str]) -> Tensor:
    """Margins (..., num_dimensions) as a tensor."""
    try:
        given = margins if isinstance(margins, Tensor) else torch.as_tensor(margins, dtype=torch.float32)
    except Exception:  # numbers of no kind: NumPy and torch raise what they like
        raise PrismError(f"The margins must be a tensor; found {quoted(margins, 80)}.") from None
    if given.ndim == 0 or given.shape[-1] != len(dimensions) or given.is_complex():
        raise PrismError(
            f"The margins must be (..., {len(dimensions)}), one for each of {', '.join(dimensions)}; found the shape "
            f"{tuple(given.shape)}."
        )
    return given


def finite(values: Tensor, what: str) -> Tensor:
    """Values (B, n), all of them finite."""
    bad = ~values.isfinite().all(1)
    if bool(bad.any()):
        raise PrismError(f"Row {int(bad.nonzero()[0])} has no finite {what}; its latents hold NaN or infinity.")
    return values
