"""What heads were trained on: of an average put together, and told where a score is asked for at another level."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn


def trained_range(trained_on: Mapping[str, Any]) -> tuple[float, float]:
    """(t_low, t_high) of a head's training, of an average what its heads share; 0 to 1000 where unknown."""
    ranges = [trained_range(member) for member in trained_on.get("members", ())]
    config = trained_on.get("config") or {}
    low, high = config.get("t_low"), config.get("t_high")
    ranges.append((0.0 if low is None else low, 1000.0 if high is None else high))
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def warn_outside(trained_on: Mapping[str, Any], lowest: float, highest: float) -> bool:
    """Warn where noise levels from `lowest` to `highest` leave what a head was trained at; whether they do."""
    low, high = trained_range(trained_on)
    outside = lowest < low - 1 or highest > high + 1  # schedulers round
    if outside:
        found = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        warnings.warn(
            f"The head was trained at t from {low:g} to {high:g} and is asked to score at t = {found}; do not rely on "
            "its scores there.",
            stacklevel=4,
        )
    return outside


def versions(heads: Iterable[nn.Module]) -> tuple[int, ...]:
    """How often each weight was written to, which any training changes, by whatever loop."""
    weights = [weight for head in heads for weight in head.parameters()]
    return tuple(-1 if weight.is_inference() else weight._version for weight in weights)


def warn_untrained() -> bool:
    """Warn of scores of random weights; True."""
    warnings.warn(
        "This judge is untrained: its scores are noise, and a pick by them is random. Train it (prism.train), or load "
        "a trained one (Judge.from_pretrained).",
        stacklevel=4,
    )
    return True


def trained_together(known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an average was trained on: what its members share, null where they differ, and every prompt of any."""
    keys = {key for trained_on in known for key in trained_on.get("prompt_keys", ())}
    members = [{name: value for name, value in trained_on.items() if name != "prompt_keys"} for trained_on in known]
    shared = {
        name: known[0].get(name) if all(other.get(name) == known[0].get(name) for other in known) else None
        for name in ("store", "seed", "steps", "prompts", "pairs")
    }
    sources = sorted({str(trained_on.get("source", "untrained")) for trained_on in known})
    return {**shared, "source": "+".join(sources), "members": members, "prompt_keys": sorted(keys)}
