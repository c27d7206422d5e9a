"""Which backbone a head was trained on, told by class names, configurations and a sample of the weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(pipe: Any, denoiser: Any, whole: bool) -> dict[str, Any]:
    """See `Backbone.fingerprint`. Of a denoiser that is not `whole` the weights are not told: None."""
    sample = hashlib.sha256()
    for name, value in sorted(denoiser.named_parameters()):
        if not value.is_meta:
            sample.update(name.encode() + value.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": type(denoiser).__name__,
        "denoiser_config": _config_hash(denoiser),
        "vae": type(pipe.vae).__name__,
        "vae_config": _config_hash(pipe.vae),
        "weights": sample.hexdigest() if whole else None,
    }


def _config_hash(module: Any) -> str:
    public = {name: value for name, value in dict(module.config).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()
