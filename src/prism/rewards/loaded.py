"""Scorers by name, loaded once per process, with a queue per pipeline: judges for trainers that call Python."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from prism.backbone.loading import call_beside, check_device
from prism.errors import PrismError, choice, instance
from prism.judge import Judge
from prism.rewards.scorer import Scorer
from prism.rewards.worker import Batching, Worker

DTYPES = ("float32", "bfloat16", "float16")
_lock = threading.Lock()
_judges: dict[Any, Judge] = {}
_scorers: dict[Any, Scorer] = {}
_workers: dict[int, Worker] = {}  # by the id of a pipeline


def scorer_of(
    head: str,
    backbone: str,
    device: str | None = None,
    dtype: str | None = None,
    call: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Scorer:
    """The scorer of a head on a backbone; equal arguments give the same one.

    Args:
        head: folder of a saved head, or its id on the Hub.
        backbone: folder or id of a diffusers pipeline, of which the blocks that the head reads are loaded.
        device: to compute on; None: cuda where there is one.
        dtype: "float32", "bfloat16" or "float16"; None: bfloat16 on cuda, else float32.
        call: arguments of the pipeline's call, over those of call.json beside its weights.
        **settings: dimension, draws, levels and seed of a `Scorer`.

    Raises:
        PrismError: where something cannot be loaded, or does not fit.
    """
    import torch

    for name, value in (("head", head), ("backbone", backbone)):
        if not isinstance(value, str) or not value:
            raise PrismError(f"{name} must name a folder or an id on the Hub; found {value!r}.")
    instance("call", call or {}, Mapping, "arguments by name")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    kind = getattr(torch, choice("dtype", dtype, DTYPES))
    key = head, backbone, device, dtype
    with _lock:
        if key not in _judges:
            check_device(device)
            backbone_of = Judge.from_pretrained(head, backbone, dtype=kind).backbone
            backbone_of.pipe.to(device)
            _judges[key] = Judge.from_pretrained(head, backbone_of)  # its heads go where the pipeline is
        whole_call = {**call_beside(backbone), **(call or {})}
        settled = *key, repr(sorted(whole_call.items())), repr(sorted(settings.items()))
        if settled not in _scorers:
            _scorers[settled] = Scorer(_judges[key], whole_call, **settings)
        return _scorers[settled]


def worker_of(scorer: Scorer) -> Worker:
    """The queue of a scorer's pipeline."""
    with _lock:
        key = id(scorer.judge.backbone.pipe)  # which the scorers of this module keep alive
        if key not in _workers:
            _workers[key] = Worker(Batching())
        return _workers[key]
