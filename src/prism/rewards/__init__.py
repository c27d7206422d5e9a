"""A judge as a reward: for trainers that call it, and for tuning a generator on verdicts of its own candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prism.rewards.settings import ImproveConfig as ImproveConfig

if TYPE_CHECKING:
    from prism.rewards.flow_factory import FlowFactoryReward as FlowFactoryReward
    from prism.rewards.rounds import Improvement as Improvement
    from prism.rewards.rounds import improve as improve

__all__ = ["ImproveConfig", "Improvement", "improve"]  # FlowFactoryReward needs Flow-Factory, so no star brings it


def __getattr__(name: str) -> Any:
    if name in (*__all__, "FlowFactoryReward"):
        from importlib import import_module

        module = "flow_factory" if name == "FlowFactoryReward" else "rounds"
        return getattr(import_module(f"prism.rewards.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
