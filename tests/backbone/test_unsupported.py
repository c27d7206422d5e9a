"""Each living pipeline of diffusers has a row of facts, or is listed with the reason why it has none."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

from prism.backbone import FAMILIES
from prism.backbone.registry import family_named
from prism.backbone.unsupported import UNSUPPORTED
from prism.errors import PrismError

SUPPORTED = {name for family in FAMILIES.values() for name in family.pipelines}


def _living() -> set[str]:
    """The classes of pipelines that can be called, neither deprecated nor modular."""
    living = set()
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or name.endswith("ModularPipeline") or name.startswith(("Onnx", "AutoPipe")):
            continue
        kind: Any = getattr(diffusers, name)
        home = inspect.getmodule(kind).__name__  # type: ignore[union-attr]
        if ".deprecated" not in home and ".pipelines." in home and callable(kind):
            living.add(name)
    return living - {"DiffusionPipeline"}


def test_no_pipeline_is_both_supported_and_not() -> None:
    assert SUPPORTED & set(UNSUPPORTED) == set()


@pytest.mark.skipif(diffusers.__version__ != "0.42.1", reason="the list is of diffusers 0.42.1")
def test_every_living_pipeline_has_a_row_or_a_reason() -> None:
    living = _living()
    assert len(living) > 200
    assert sorted(living - SUPPORTED - set(UNSUPPORTED)) == []
    assert sorted(set(UNSUPPORTED) - set(dir(diffusers))) == []


def test_the_message_says_the_reason() -> None:
    with pytest.raises(PrismError, match=r"LTX2HDRPipeline is not supported: what it decodes is linear light"):
        family_named("LTX2HDRPipeline")
