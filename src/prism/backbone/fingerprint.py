"""Which backbone a head was trained on, told by class names, configurations and a sample of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn


def fingerprint(pipe: Any, denoiser: Any, whole: bool) -> dict[str, Any]:
    """See `Backbone.fingerprint`. Of a denoiser that is not `whole` the weights are not told: None."""
    sample = hashlib.sha256()
    for name, value in sorted(denoiser.named_parameters()):
        if not value.is_meta:
            sample.update(name.encode() + value.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": type(denoiser).__name__,
        "denoiser_config": hashlib.sha256(config_text(denoiser)).hexdigest(),
        "vae": type(pipe.vae).__name__,
        "vae_config": hashlib.sha256(config_text(pipe.vae)).hexdigest(),
        "weights": sample.hexdigest() if whole else None,
    }


def config_text(part: Any) -> bytes:
    """A configuration as diffusers keeps it; of parts without one, of the names and shapes of their parameters.

    Configurations of another kind hold what does not matter, such as the version they were written with.
    """
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        public: dict[str, Any] = {name: value for name, value in config.items() if not name.startswith("_")}
    else:
        named = part.named_parameters() if isinstance(part, nn.Module) else ()
        public = {name: list(value.shape) for name, value in named}
    return json.dumps(public, sort_keys=True, default=str).encode()
