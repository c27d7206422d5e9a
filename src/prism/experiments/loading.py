"""Backbones, heads and stores by name: the embedded ones, a folder, or an id on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prism import files
from prism.errors import PrismError

EMBEDDED = "ShapeWorld (embedded)"


def load_backbone(
    name: str | None = None, device: str | None = None, dtype: str | None = None
) -> tuple[Any, dict[str, Any], str]:
    """A `Backbone`, the call arguments that go with it, and its name for reports.

    name: None for the embedded model; a folder or Hub id of a diffusers pipeline, whose arguments are read from
    call.json beside it where there is one. device: None for cuda where there is one. dtype: None for bfloat16 on cuda,
    float32 elsewhere; the embedded model stays in float32. Raises `PrismError` for what cannot be loaded.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from prism import shapeworld
    from prism.backbone import Backbone

    for logging in (diffusers_logging, transformers_logging):  # loading takes a moment; what follows shows progress
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    own = f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else ""  # of several processes on a machine
    device = device or (f"cuda{own}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PrismError(f"The device {device} cannot be used ({reason}); choose another --device.") from error
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise PrismError(f"The --dtype is {dtype}; choose float32, bfloat16 or float16.")
    if name is None:
        return Backbone(shapeworld.pipeline().to(device)), dict(shapeworld.CALL), EMBEDDED
    kind = kinds[dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    backbone = Backbone.from_pretrained(name, dtype=kind)
    backbone.pipe.to(device)
    return backbone, _call_beside(name), str(name)


def _call_beside(name: str) -> dict[str, Any]:
    path = Path(name) / "call.json"
    if not path.is_file():
        return {}
    call = files.read_json(path)
    if not isinstance(call, dict):
        raise PrismError(f"The file {path} is not a JSON object; pipeline arguments by name are needed.")
    return call


def load_judge(head: str | None, backbone: Any, embedded: bool) -> Any:
    """The `Judge` of a saved head on `backbone`; None takes the head that ships for the embedded backbone."""
    from prism import shapeworld
    from prism.judge import Judge

    if head is None and not embedded:
        raise PrismError("The embedded head fits the embedded backbone alone; name a head for this one with --head.")
    if head is None:
        return Judge.from_pretrained(shapeworld.asset_folder("head"), backbone)
    return Judge.from_pretrained(head, backbone)


def open_store(folder: Path | None) -> Any:
    """The `LatentStore` in `folder`; None opens the labelled candidates that ship with the package."""
    from prism import shapeworld
    from prism.preference import LatentStore

    return LatentStore.open(shapeworld.asset_folder("candidates") if folder is None else folder)


def describe(backbone: Any, name: str) -> dict[str, Any]:
    """The "backbone" entry of metrics.json: its name and fingerprint."""
    return {"name": name, **backbone.fingerprint()}
