"""The former name of `prism.video`, kept for one version."""

from __future__ import annotations

import warnings
from typing import Any

from prism import video

warnings.warn("prism.media is called prism.video now; the old name goes in the next version.", FutureWarning, 2)


def __getattr__(name: str) -> Any:
    return getattr(video, name)
