"""Checks of a judge's heads, arguments and training provenance; each mistake is a sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from prism.errors import PrismError, found, number, quoted

if TYPE_CHECKING:
    from prism.judge.judge import Judge


def check_dimensions(dimensions: Any) -> None:
    """Refuse names of scores that are no list of texts: a single text would be taken letter by letter."""
    if not isinstance(dimensions, list | tuple) or not all(isinstance(name, str) and name for name in dimensions):
        raise PrismError(f"The dimensions must be a list of names; found {quoted(dimensions, 80)}.")


def check_options(options: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse options that a head does not have."""
    for name in sorted(set(options) - set(allowed)):
        raise PrismError(f"A head has no option {quoted(name, 60)}; it has {', '.join(allowed)}.")


def check_generator(generator: Any) -> None:
    """Refuse anything but one generator or None."""
    if not isinstance(generator, torch.Generator | None):
        raise PrismError(f"generator must be one torch.Generator on the CPU; found {quoted(generator, 80)}.")


def listed(judges: Any, kind: type) -> list[Any]:
    """List the judges of any iterable. Raise PrismError for none, or for items that are not of this kind."""
    iterable = (
        isinstance(judges, Iterable) and getattr(judges, "ndim", None) != 0 and not isinstance(judges, str | bytes)
    )
    members: list[Any] = list(judges) if iterable else [judges]
    if not members:
        raise PrismError("There is no judge to average; give at least one.")
    for judge in members:
        if not isinstance(judge, kind):
            raise PrismError(
                f"A list of judges is needed to average; found {quoted(judge, 80)} of type {type(judge).__name__}."
            )
    return members


def check_together(judges: Sequence[Judge], of_one_eta: bool = True) -> None:
    """Refuse judges of different pipelines, or whose scores differ in meaning, to be read or averaged together."""
    for other in judges[1:]:
        if other.backbone.pipe is not judges[0].backbone.pipe:
            raise PrismError("Judges on different pipelines cannot be averaged; put them onto the same one.")
        if other.backbone.reads != judges[0].backbone.reads:
            raise PrismError(
                f"Judges that read different denoisers cannot be averaged, found {judges[0].backbone.reads!r} and "
                f"{other.backbone.reads!r}; use each at the noise levels of its own."
            )
        if other.dimensions != judges[0].dimensions or (of_one_eta and other.eta != judges[0].eta):
            raise PrismError(
                f"Judges must have the same dimensions and eta to be averaged, found {', '.join(judges[0].dimensions)} "
                f"with eta {judges[0].eta:g} and {', '.join(other.dimensions)} with eta {other.eta:g}."
            )


def margins_of(margins: Any, dimensions: Sequence[str]) -> Tensor:
    """Convert margins to a tensor.

    Args:
        margins: (..., num_dimensions), a tensor or anything that torch turns into one.
        dimensions: the names along the last axis.

    Returns:
        (..., num_dimensions) of the tensor's dtype, float32 for anything else.

    Raises:
        PrismError: for anything else, or another number of dimensions.
    """
    try:
        values = margins if isinstance(margins, Tensor) else torch.as_tensor(margins, dtype=torch.float32)
    except Exception:  # NumPy and torch raise many kinds
        raise PrismError(f"The margins must be a tensor; found {quoted(margins, 80)}.") from None
    if values.ndim == 0 or values.shape[-1] != len(dimensions) or values.is_complex():
        raise PrismError(
            f"The margins must be (..., {len(dimensions)}), one for each of {', '.join(dimensions)}; found the shape "
            f"{tuple(values.shape)}."
        )
    return values


def noise_levels(backbone: Any, timesteps: Any, name: str = "timesteps") -> tuple[float, ...]:
    """Noise levels, checked: t from 0 to 1000. Raises PrismError for none, for one that is named twice, and for one at
    which the pipeline does not use the denoiser that the judge reads. name: of the argument that holds them."""
    low, high = getattr(backbone, "t_range", (0.0, 1000.0))
    listed = np.asarray(timesteps, dtype=object)
    if listed.ndim != 1 or not len(listed):
        raise PrismError(
            f"{name} must be a list of noise levels, at least one t from 0 to 1000; found {found(timesteps)}."
        )
    checked = [number("The noise level t", t, 0, 1000) for t in listed]
    levels = tuple(t if isinstance(t, int) else level for t, level in zip(listed, checked))
    if len(set(levels)) < len(levels):
        raise PrismError(f"{name} names a noise level more than once; found {quoted(timesteps, 80)}.")
    for t in levels:
        if not low <= t <= high:
            raise PrismError(
                f"The denoiser that the judge reads is used for t from {low:g} to {high:g}, found the level {t:g}; "
                "stay within."
            )
    return levels


def finite(values: Tensor, what: str, latents: Tensor) -> Tensor:
    """Return values unchanged.

    Args:
        values: (B, ...), checked row by row.
        what: what they are, for the error.
        latents: (B, ...), which they come from.

    Returns:
        (B, ...), the values.

    Raises:
        PrismError: naming the first row that is not finite.
    """
    bad = ~values.isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        largest = float(latents[row].abs().max())
        they = "hold NaN or infinity"
        if math.isfinite(largest):
            why = "far above a pipeline's" if largest > 1e4 else "so that the model's weights may be damaged"
            they = f"reach {largest:.3g}, {why}"
        raise PrismError(f"Row {row} has no finite {what}; its latents {they}.")
    return values


def trained_range(trained_on: Mapping[str, Any]) -> tuple[float, float]:
    """(t_low, t_high) that a head was trained at, for an average the range that its members share; 0 to 1000 where
    unknown."""
    ranges = [trained_range(member) for member in trained_on.get("members", ())]
    config = trained_on.get("config") or {}
    low, high = config.get("t_low"), config.get("t_high")
    ranges.append((0.0 if low is None else low, 1000.0 if high is None else high))
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def warn_outside(trained_on: Mapping[str, Any], lowest: float, highest: float) -> bool:
    """Warn where noise levels from `lowest` to `highest` leave the trained range; return True then."""
    low, high = trained_range(trained_on)
    outside = lowest < low - 1 or highest > high + 1  # 1: schedulers round
    if outside:
        levels = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        warnings.warn(
            f"The head was trained at t from {low:g} to {high:g} and is asked to score at t = {levels}; do not rely on "
            "its scores there.",
            stacklevel=4,
        )
    return outside


def versions(heads: Iterable[nn.Module]) -> tuple[int, ...]:
    """Number of in-place writes to each weight, which any training loop raises; -1 where torch does not count them."""
    weights = [weight for head in heads for weight in head.parameters()]
    return tuple(-1 if weight.is_inference() else weight._version for weight in weights)


def warn_untrained() -> bool:
    """Warn that the scores of random weights are noise; return True."""
    warnings.warn(
        "This judge is untrained: its scores are noise, and a pick by them is random. Train it (prism.train), or load "
        "a trained one (Judge.from_pretrained).",
        stacklevel=4,
    )
    return True


def trained_together(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training provenance of an average: values that its members share, None where they differ, and all prompts."""
    keys = {key for trained_on in provenances for key in trained_on.get("prompt_keys", ())}
    members = [
        {name: value for name, value in trained_on.items() if name != "prompt_keys"} for trained_on in provenances
    ]
    first = provenances[0]
    shared = {
        name: first.get(name) if all(other.get(name) == first.get(name) for other in provenances) else None
        for name in ("store", "seed", "steps", "prompts", "pairs")
    }
    sources = sorted({str(trained_on.get("source", "untrained")) for trained_on in provenances})
    return {**shared, "source": "+".join(sources), "members": members, "prompt_keys": sorted(keys)}
