"""Ready-made teachers: published reward models that score decoded videos for a prompt, by name.

    teacher = prism.teachers.load("videoreward=path/to/VideoReward")
    teacher.score(videos, prompts, fps=16)     # [{"VQ": 0.4, "MQ": -0.1, "TA": 1.2}, ...]

Each is a thin adapter around the published weights, with the published question, frames and range. None comes with
PRISM: a folder on this machine or a repository of the Hub holds them (docs/teachers.md).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from prism.errors import PrismError, instance, quoted
from prism.teachers.hpsv2 import HPSv2
from prism.teachers.hpsv3 import HPSv3
from prism.teachers.imagereward import ImageReward
from prism.teachers.unifiedreward import UnifiedReward
from prism.teachers.vbench import VBench
from prism.teachers.videoreward import VideoReward
from prism.teachers.videoscore import VideoScore
from prism.teachers.videoscore2 import VideoScore2


class Teacher(Protocol):
    """What scores videos.

    Attributes:
        name: as in `TEACHERS`.
        dimensions: names of its scores; the higher, the better.
    """

    name: str
    dimensions: tuple[str, ...]

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """A score for each dimension of each video (T, H, W, 3) of uint8, of the prompt at its place.

        fps: the videos' frames per second; a teacher that samples by time needs it.
        NaN in all dimensions: a teacher that writes text gave no clear answer.
        """
        ...


TEACHERS: dict[str, Callable[..., Any]] = {
    "videoreward": VideoReward.load,
    "unifiedreward": UnifiedReward.load,
    "videoscore": VideoScore.load,
    "videoscore2": VideoScore2.load,
    "hpsv2": HPSv2.load,
    "hpsv3": HPSv3.load,
    "imagereward": ImageReward.load,
    "vbench": VBench.load,
}
_OPTION = re.compile(r",(?=[a-z_]+=)")


def named(spec: str) -> str | None:
    """The teacher that a text names, with or without a source and options behind it; None for another text."""
    name = re.split("[=,]", spec, maxsplit=1)[0]
    return name if name in TEACHERS else None


def load(spec: str, device: str | None = None, dtype: str | None = None) -> Any:
    """The teacher that a text such as `videoreward`, `videoreward=FOLDER_OR_ID`, `hpsv3,count=4` or
    `hpsv3=FOLDER_OR_ID,base=FOLDER_OR_ID,revision=COMMIT` names.

    Args:
        spec: a name of `TEACHERS`, the source of its weights (by default their repository of the Hub), and options of
            its `load` such as revision, base, device and dtype.
        device: where it computes; by default a GPU where there is one.
        dtype: of its weights; by default bfloat16, on the CPU float32.

    Raises:
        PrismError: for an unknown name or option, and for weights that are missing or not of this teacher.
    """
    instance("A teacher", spec, str, "a text such as videoreward=FOLDER")
    first, *pairs = _OPTION.split(spec)
    name, equals, source = first.partition("=")
    if name not in TEACHERS:
        near = difflib.get_close_matches(name, TEACHERS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TEACHERS)}."
        raise PrismError(f"There is no teacher {quoted(name, 60)}; {hint}")
    if equals and not source:
        raise PrismError(f"The teacher {quoted(spec, 120)} names no source behind =; name a folder or a repository.")
    options: dict[str, Any] = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
    options |= dict(pair.split("=", 1) for pair in pairs)
    numbers = {key: int(value) for key, value in options.items() if isinstance(value, str) and value.isdecimal()}
    loader = TEACHERS[name]
    known = _options(loader)
    for key in options:
        if key not in known:
            raise PrismError(
                f"The teacher {name} has no option {quoted(key, 60)}; it takes {', '.join(sorted(known))}."
            )
    options |= {key: value for key, value in numbers.items() if known[key].startswith("int")}
    return loader(*([source] if equals else []), **options)


def _options(loader: Callable[..., Any]) -> dict[str, str]:
    """The options of a loader and their annotations."""
    import inspect

    parameters = list(inspect.signature(loader).parameters.values())
    return {each.name: str(each.annotation) for each in parameters if each.name != "source"}
