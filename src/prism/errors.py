"""`PrismError`, a user's mistake in one sentence, and checks of numbers, lists and texts that raise it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 500  # characters of a sentence, whatever it quotes


class PrismError(Exception):
    """A mistake of the user. `str(error)` names the file, field or flag, says what was found and what to do.

    The command line prints the sentence on stderr and exits with code 2; every other exception is a bug of ours.
    It is one line of at most `LONGEST` characters; longer ones are shortened in the middle.
    """

    def __init__(self, sentence: str = ""):
        line = re.sub(r"\s*[^\S ]\s*", " ", str(sentence)).strip()  # quoted prompts keep their spaces
        line = line.replace(f'"{EMPTY}"', EMPTY)
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        end = LONGEST // 3
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - end - 5]} ... {line[-end:]}")


SEEDS = 2**32 - 1  # the largest seed that NumPy's and torch's generators take
DRAWS = 1000  # largest number of noise draws per score
EMPTY = '""'  # an empty text, quoted
QUOTED = 300  # largest number of characters that are quoted from a foreign text


def quoted(foreign: Any, limit: int = QUOTED) -> str:
    """A foreign text, error or value on one line, cut at `limit` characters; `EMPTY` for an empty text."""
    try:
        text = str(foreign) if isinstance(foreign, str | BaseException) else repr(foreign)
    except Exception:  # a repr that fails
        text = f"a {type(foreign).__name__}"
    text = " ".join(text.split()) or (EMPTY if isinstance(foreign, str) else type(foreign).__name__)
    return text if len(text) <= limit else f"{text[: limit - 4].rstrip()} ..."


def reason(error: BaseException, limit: int = 200) -> str:
    """An error's class and message, as the message alone may say little: `KeyError: None`."""
    return quoted(f"{type(error).__name__}: {quoted(error, limit)}", limit).rstrip(".")


def is_bool(value: Any) -> bool:
    """True for a boolean, or an array of booleans, of any library."""
    return str(getattr(value, "dtype", type(value).__name__)).endswith("bool")


def whole(name: str, value: Any, low: int | None = 1, high: int | None = None) -> int:
    """`value` as an int, if it is a whole number from `low` to `high`, of any library (`operator.index`).

    Raises `PrismError` for anything else, True and False included.
    """
    try:
        number = None if is_bool(value) else operator.index(value)
    except Exception:  # not only TypeError: a tensor of several values raises other errors
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise PrismError(f"{name} must be a whole number{_bounds(low, high)}; found {found(value)}.")
    return number


def instance(name: str, value: Any, kind: Any, description: str) -> None:
    """Raise PrismError for a value that is not of the `kind`; `description` is that kind in words."""
    if not isinstance(value, kind):
        raise PrismError(f"{name} must be {description}; found {quoted(value, 80)} of type {type(value).__name__}.")


def listed(name: str, values: Any, kind: type = str, description: str = "texts") -> list[Any]:
    """The items of a list, tuple, array or iterator, all of a `kind`. Refuses a single text, a set and a mapping."""
    try:
        ordered = not isinstance(values, str | bytes | bytearray | Mapping | set | frozenset)
        items = list(values) if ordered else None
    except Exception:  # not iterable
        items = None
    if items is None or not all(isinstance(item, kind) for item in items):
        raise PrismError(f"{name} must be a list of {description}; found {quoted(values, 80)}.")
    return items


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, if it is one of the `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise PrismError(f"{name} must be one of {', '.join(choices)}; found {quoted(value, 80)}.")
    return value


def flag(name: str, value: Any) -> bool:
    """`value` as a bool, if it is True or False, of any library."""
    if str(getattr(value, "dtype", type(value).__name__)) not in ("bool", "torch.bool"):
        raise PrismError(f"{name} must be True or False; found {quoted(value, 80)}.")
    return bool(value)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False) -> float:
    """`value` as a float, if it is a finite number from `low` (or `above` it) to `high`, of any library.

    Raises `PrismError` for anything else: NaN and infinity, texts, True and False.
    """
    try:
        if isinstance(value, str | bytes) or is_bool(value):
            raise TypeError
        converted = float(value)
    except Exception:
        converted = math.nan
    if not math.isfinite(converted) or not low <= converted <= high or (above and converted == low):
        kind = "number" if math.isfinite(low) or math.isfinite(high) else "finite number"
        raise PrismError(f"{name} must be a {kind}{_bounds(low, high, above)}; found {found(value)}.")
    return converted


def found(value: Any) -> str:
    """A value of the wrong kind, quoted; a text that looks like a number is said to be a text."""
    looks = isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d.]+\s*", value)
    return f"the text {quoted(repr(value), 80)}" if looks else quoted(value, 80)


def _bounds(low: float | None, high: float | None, above: bool = False) -> str:
    upper = high is not None and high != math.inf
    if low is None or low == -math.inf:
        return f" of at most {_plain(high)}" if upper else ""
    if upper:
        return f" above {_plain(low)}, at most {_plain(high)}" if above else f" from {_plain(low)} to {_plain(high)}"
    return f" above {_plain(low)}" if above else f" of at least {_plain(low)}"


def _plain(value: Any) -> str:
    if isinstance(value, int) and value > 10**15:
        power = value.bit_length() - (0 if value & (value + 1) == 0 else 1)
        return f"2**{power} - 1" if value == 2**power - 1 else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def without(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A configuration without some names; "a.b" is b of the object a."""
    left = dict(config)
    for name in names:
        key, _, inner = name.partition(".")
        if not inner:
            left.pop(key, None)
        elif isinstance(left.get(key), dict):
            left[key] = without(left[key], [inner])
    return left


def first_difference(old: Any, new: Any) -> str:
    """Name the first difference of two configurations: "steps was 4 and is now 8"."""
    name = ""
    while isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**new, **old} if old.get(key) != new.get(key))
        name, old, new = (f"{name}.{key}" if name else key), old.get(key), new.get(key)
    return f"{name or 'it'} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
