"""Whatever is given for whatever argument: a sentence before any work, or work."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import fractions
import io
import math
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny

import prism
from prism import video as media
from prism.errors import PrismError
from prism.judge import Judge


class Odd:
    """Its own text fails."""

    def __repr__(self) -> str:
        raise ValueError("no text")


class Index:
    """A whole number by its protocol alone."""

    def __index__(self) -> int:
        return 2


def foreign() -> list[Any]:
    """Values of all kinds, anew each time: some can be used up."""
    plain = [None, True, False, 0, -1, 2, 3, 10**30, -(10**30), 0.0, 1.5, math.nan, math.inf, 1j, Ellipsis]
    texts = ["", "x", "5", "nan", b"x", bytearray(b"x"), "x" * 1000, "\ud800", "a\0b", pathlib.Path("nope")]
    nested = [[], [1], [None], ["a"], [[1, 2]], (), {}, {"a": 1}, {1: 2}, {1}, range(3), iter([1]), slice(1)]
    arrays = [np.array(shape) for shape in ([], 3, [1, 2], [[1, 2]], ["a", "b"], [None])]
    scalars = [np.float64(1), np.nan, np.str_("x"), np.datetime64("2020"), decimal.Decimal("NaN"), decimal.Decimal(2)]
    tensors = [torch.tensor(1), torch.tensor([]), torch.ones(2, 2), torch.tensor(math.nan), torch.tensor(True)]
    objects = [object(), Odd(), Index(), int, print, lambda: 1, lambda *a: 1, torch.nn.Linear(1, 1), io.BytesIO()]
    others = [fractions.Fraction(1, 2), datetime.date(2020, 1, 1), Image.new("RGB", (8, 8)), memoryview(b"abc")]
    return [*plain, *texts, *nested, *arrays, *scalars, *tensors, *objects, *others]


class Reached(Exception):
    """The pipeline's first work."""


ARGUMENTS = [
    *("pipe", "judge", "prompt", "n", "schedule", "strategy", "draft_steps", "judge_at", "seed", "seeds", "batch_size"),
    *("top_k", "select_by", "num_draws", "oracle", "keep_latents", "distribute", "progress"),
]
PIPELINES = [  # arguments of its call, which each strategy checks and hands on alike
    *("height", "num_frames", "num_inference_steps", "guidance_scale", "prompt_embeds", "negative_prompt_embeds"),
    *("negative_prompt", "generator", "latents", "num_videos_per_prompt", "max_sequence_length", "unknown"),
]


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Judge]:
    def reach(*_: Any) -> None:
        raise Reached

    pipe = tiny.wan()
    judge = Judge.untrained(pipe, tap=1, dim=16)
    pipe.text_encoder.register_forward_pre_hook(reach)
    pipe.transformer.register_forward_pre_hook(reach)
    return pipe, judge


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARGUMENTS + PIPELINES)
def test_any_value_of_any_argument(subject: tuple[Any, Judge], name: str) -> None:
    for strategy in ("early", "oracle") if name in ARGUMENTS else ("early",):
        for value in foreign():
            call = {"pipe": subject[0], "judge": subject[1], "prompt": tiny.PROMPT, "n": 3, "strategy": strategy}
            call |= {"oracle": lambda video, prompt: 1.0} if strategy == "oracle" else {}
            call |= {**tiny.CALL_WAN, name: value}
            if name == "prompt_embeds":
                call["prompt"] = None
            with contextlib.suppress(Reached):
                try:
                    prism.best_of_n(**call)
                except PrismError as error:
                    if not re.fullmatch(".{1,500}", str(error)):
                        raise AssertionError(f"not one line of at most 500 characters: {error}") from error


def test_any_value_for_frames() -> None:
    for make in (lambda value: value, lambda value: [value], lambda value: [value, value]):
        for place in range(len(foreign())):
            for take in (media.frames, media.videos):
                with contextlib.suppress(PrismError):
                    take(make(foreign()[place]))
