"""A judge as a reward: a generator that is tuned on the judge's verdicts of its own candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prism.rewards.settings import ImproveConfig as ImproveConfig

if TYPE_CHECKING:
    from prism.rewards.rounds import Improvement as Improvement
    from prism.rewards.rounds import improve as improve

__all__ = ["ImproveConfig", "Improvement", "improve"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("prism.rewards.rounds"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
