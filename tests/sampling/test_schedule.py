"""Schedules: their text, their makers, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from prism.errors import PrismError
from prism.sampling.plan import default, halving, keep_one, parse, resolve


def test_text() -> None:
    assert parse("5:1") == keep_one(5) == ((5, 1),)
    assert parse("3:4,6:1") == parse(" 3:4 , 6 : 1 ") == ((3, 4), (6, 1))


@pytest.mark.parametrize("text", ["", "5", "5:1:2", "a:1", "5:1,", "5-1", "5:1.5"])
def test_text_that_is_no_schedule(text: str) -> None:
    with pytest.raises(PrismError, match="is not a list of STEP:KEEP"):
        parse(text)


@pytest.mark.parametrize(
    ("n", "expected"), [(8, ((3, 4), (5, 2), (7, 1))), (5, ((3, 3), (5, 2), (7, 1))), (1, ((3, 1),))]
)
def test_halving(n: int, expected: Any) -> None:
    assert halving(n, first=3, every=2) == expected
    assert resolve(expected, n, 7) == expected


@pytest.mark.parametrize(("num_steps", "step"), [(1, 1), (6, 1), (25, 5), (50, 10)])
def test_default_is_a_fifth(num_steps: int, step: int) -> None:
    assert default(num_steps) == ((step, 1),)
    assert resolve(default(num_steps), 8, num_steps) == ((step, 1),)


def test_a_schedule_ends_with_one() -> None:
    assert resolve([(3, 4)], 8, 10) == ((3, 4), (10, 1))
    assert resolve([(3, 4), (10, 2)], 8, 10) == ((3, 4), (10, 1))
    assert resolve([[3, 1]], 8, 10) == ((3, 1),)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ([], "The schedule is empty"),
        ([(3,)], "is a pair of whole numbers"),
        ([(3, 1.5)], "is a pair of whole numbers"),
        ([(3, True)], "is a pair of whole numbers"),
        ([(0, 1)], "cuts at step 0, and the run has steps 1 to 10"),
        ([(11, 1)], "cuts at step 11, and the run has steps 1 to 10"),
        ([(4, 4), (3, 1)], "cuts at step 3 after step 4"),
        ([(4, 4), (4, 1)], "cuts at step 4 after step 4"),
        ([(3, 0)], "keeps 0 candidates at step 3"),
        ([(3, 9)], "keeps 9 candidates at step 3, and only 8 are left"),
        ([(3, 2), (4, 3)], "keeps 3 candidates at step 4, and only 2 are left"),
    ],
)
def test_bad_schedules(schedule: Any, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        resolve(schedule, 8, 10)


def test_a_step_before_the_first_is_told_before_the_steps_are_known() -> None:
    with pytest.raises(PrismError, match=r"cuts at step 0, and the run counts its steps from 1\.$"):
        resolve([(0, 1)], 8, sys.maxsize)


@pytest.mark.parametrize("arguments", [(0, 3, 1), (8, 0, 1), (8, 3, 0)])
def test_bad_halving(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(PrismError, match="halving takes positive"):
        halving(*arguments)
