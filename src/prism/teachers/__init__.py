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
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prism.errors import PrismError, instance, quoted, whole
from prism.judge import hub
from prism.teachers.hpsv2 import HPSv2
from prism.teachers.hpsv3 import HPSv3
from prism.teachers.imagereward import ImageReward
from prism.teachers.unifiedreward import UnifiedReward
from prism.teachers.vbench import VBench
from prism.teachers.videoreward import VideoReward
from prism.teachers.videoscore import VideoScore
from prism.teachers.videoscore2 import VideoScore2


class Teacher(Protocol):
    """A model that scores decoded videos.

    Attributes:
        name: as in `TEACHERS`.
        dimensions: names of its scores; the higher, the better.
        needs_fps: True where it samples by time, so that `fps` must be told; it may lack this where it does not.
    """

    name: str
    dimensions: tuple[str, ...]

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """Scores of videos (T, H, W, 3) of uint8 for their prompts, one per video: per video, scores by dimension.

        fps: the videos' frames per second, needed by teachers that sample frames by time.
        All scores of a video are NaN where a teacher that writes text gave no clear answer.
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
    """The teacher's name that a text begins with, alone or before a source and options; None for another text."""
    name = re.split("[=,]", spec, maxsplit=1)[0]
    return name if name in TEACHERS else None


def load(spec: str, device: str | None = None, dtype: str | None = None) -> Any:
    """Load a teacher by a text: `videoreward`, `videoreward=FOLDER_OR_ID`, `hpsv3,count=4` or
    `hpsv3=FOLDER_OR_ID,base=FOLDER_OR_ID,revision=COMMIT`.

    Args:
        spec: a name of `TEACHERS`, the source of its weights (by default their repository on the Hub), and options of
            its `load` such as revision, base, device and dtype.
        device: where it computes; by default a GPU where there is one.
        dtype: of its weights; by default bfloat16, on the CPU float32.

    Raises:
        PrismError: for an unknown name or option, and for weights that are missing or not of this teacher.
    """
    loader, source, options = _parsed(spec, device, dtype)
    try:
        return loader(*source, **options)
    except PrismError as error:
        if str(error).startswith("The teacher"):
            raise
        raise PrismError(f"The teacher {quoted(spec, 120)} cannot be loaded: {error}") from error


def check(spec: str) -> None:
    """Refuse a text that `load` would refuse for its name, an option, or a folder that is not there; nothing is loaded.

    Raises PrismError.
    """
    loader, source, _ = _parsed(spec, None, None)
    for name in source if loader != VBench.load else ():
        if not Path(name).expanduser().exists() and not hub.REPOSITORY.fullmatch(name):
            raise PrismError(
                f"The teacher {quoted(spec, 120)} cannot be loaded: there is no folder {quoted(name, 120)}; name a "
                "folder or a repository user/name."
            )


def check_name(spec: str) -> None:
    """Refuse a text that is nearly a teacher's name, or has its source behind a colon. Raises PrismError."""
    match = re.match(r"([\w.-]+)(?:([:=,])(.*))?$", spec, re.DOTALL)
    name, mark, source = match.groups() if match else ("", None, None)
    if name in TEACHERS:
        if mark == ":":
            raise PrismError(
                f"The teacher {name} takes its weights behind =, and found a colon; write {name}={quoted(source, 120)}."
            )
        return
    near = difflib.get_close_matches(name.lower(), TEACHERS, 1, 0.75)
    if near:
        raise PrismError(f"There is no teacher {quoted(name, 60)}; did you mean {near[0]}?")


def _parsed(spec: str, device: str | None, dtype: str | None) -> tuple[Callable[..., Any], list[str], dict[str, Any]]:
    """The loader of a teacher, its source (none, or one) and its options."""
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
    accepted = _options(loader)
    for key in options:
        if key not in accepted:
            raise PrismError(
                f"The teacher {name} has no option {quoted(key, 60)}; it takes {', '.join(sorted(accepted))}."
            )
    for key, kind in accepted.items():
        if kind.startswith("int") and isinstance(options.get(key), str):
            options[key] = whole(f"The option {key} of {name}", numbers.get(key, options[key]), 0)
    return loader, [source] if equals else [], options


def _options(loader: Callable[..., Any]) -> dict[str, str]:
    """The options of a loader and their annotations."""
    import inspect

    parameters = list(inspect.signature(loader).parameters.values())
    return {each.name: str(each.annotation) for each in parameters if each.name != "source"}
