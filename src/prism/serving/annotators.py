"""Who judges which pair next: an order of each annotator's own, sides drawn, some pairs asked again, agreement."""

from __future__ import annotations

import datetime
import hashlib
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism.errors import PrismError, quoted
from prism.serving.answers import LABELS, SIDES, Answer, Answers
from prism.serving.comparisons import Pair

GAP = 12  # pairs at least between a pair and its repeat, where there are so many
LONGEST_NAME = 60


@dataclass(frozen=True)
class Item:
    """A pair as it is shown: `left` is the clip on the left, "path_A" or "path_B"; `again`: a hidden repeat."""

    pair: Pair
    left: str
    again: bool = False

    @property
    def key(self) -> str:
        """A name of the item, for the answer to say what it is about; it tells nothing about a repeat."""
        return hashlib.sha256(repr((self.pair, self.again)).encode(errors="surrogatepass")).hexdigest()[:16]

    def sides(self) -> tuple[str, str]:
        """The paths of the left and the right clip."""
        both = (self.pair.path_a, self.pair.path_b)
        return both if self.left == "path_A" else both[::-1]

    def label(self, choice: str) -> str:
        """The label A, B or same of "left", "right" or "tie"."""
        if choice == "tie":
            return "same"
        return "A" if (choice == "left") == (self.left == "path_A") else "B"


def order(pairs: Sequence[Pair], annotator: str, repeats: float = 0.05, seed: int = 0) -> list[Item]:
    """All pairs in an annotator's own order with sides drawn, and a share of them once more, sides the other way round.

    A repeat comes at least `GAP` pairs after the first time, or a third of the pairs where they are fewer than that.
    The order follows from its arguments alone.
    """
    chance = random.Random(f"{seed}/{annotator}")
    first = [Item(pair, chance.choice(SIDES)) for pair in chance.sample(list(pairs), len(pairs))]
    gap = min(GAP, len(first) // 3)
    count = min(round(repeats * len(first)), len(first) - gap)
    if repeats and not count and len(first) >= 10:
        count = 1
    places: dict[int, list[Item]] = {}
    for position in sorted(chance.sample(range(len(first) - gap), count)):
        item = first[position]
        later = chance.randrange(position + gap, len(first))
        places.setdefault(later, []).append(Item(item.pair, SIDES[item.left == SIDES[0]], True))
    return [shown for number, item in enumerate(first) for shown in (item, *places.get(number, ()))]


class Annotation:
    """Pairs that several annotators judge at once, with their answers in one file and the repeats in another.

    Args:
        pairs: to be judged.
        path: the CSV of answers; repeats stand in NAME-again.csv beside it, so that they count no vote twice.
        dimensions: the questions.
        repeats: share of the pairs that an annotator judges twice.
        seed: of the orders.
        root: folder that the clips' paths are relative to; None: the answers' own.
    """

    def __init__(
        self, pairs: Sequence[Pair], path: Path, dimensions: Sequence[str], repeats: float = 0.05, seed: int = 0,
        root: Path | None = None,
    ) -> None:  # fmt: skip
        self.pairs, self.repeats, self.seed, self.root = tuple(pairs), repeats, seed, root
        self.answers = Answers(path, dimensions)
        self.again = Answers(path.with_name(f"{path.stem}-again{path.suffix}"), dimensions)
        self.dimensions = tuple(dimensions)
        self._orders: dict[str, list[Item]] = {}
        self._lock = threading.RLock()

    def items(self, annotator: str) -> list[Item]:
        """The annotator's items in order."""
        with self._lock:
            if annotator not in self._orders:
                self._orders[annotator] = order(self.pairs, annotator, self.repeats, self.seed)
            return self._orders[annotator]

    def next(self, annotator: str) -> tuple[Item | None, int, int]:
        """The first item without an answer (None: all are done), the number of those with one, and of all."""
        name = checked_name(annotator)
        done = {(answer.pair, again) for again, answer in self._of(name)}
        items = self.items(name)
        left = [item for item in items if (_pair(item), item.again) not in done]
        return (left[0] if left else None), len(items) - len(left), len(items)

    def record(self, annotator: str, key: str, choices: Mapping[str, str], seconds: float) -> bool:
        """Write the judgement of the item that is shown; False if `key` is not that item (it was sent twice).

        choices: "left", "right" or "tie" by dimension. seconds: from the pair's appearance to the judgement.
        """
        name = checked_name(annotator)
        missing = [each for each in self.dimensions if choices.get(each) not in ("left", "right", "tie")]
        if missing:
            raise PrismError(f"The pair needs a judgement of {', '.join(missing)}: left, right or tie.")
        with self._lock:
            item, _, _ = self.next(name)
            if item is None or item.key != key:
                return False
            labels = tuple(item.label(choices[each]) for each in self.dimensions)
            assert all(label in LABELS for label in labels)
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(
                timespec="microseconds"
            )  # the order of both files
            answer = Answer(*_pair(item), labels, name, min(max(float(seconds), 0.0), 86_400.0), item.left, now)
            (self.again if item.again else self.answers).add(answer)
        return True

    def undo(self, annotator: str) -> bool:
        """Take the annotator's last judgement back, to be given anew; False if there is none."""
        name = checked_name(annotator)
        with self._lock:
            rows = self._of(name)
            if not rows:
                return False
            _, (again, last) = max(enumerate(rows), key=lambda row: (row[1][1].time, row[0]))
            (self.again if again else self.answers).withdraw(last)
        return True

    def _of(self, annotator: str) -> list[tuple[bool, Answer]]:
        both = ((False, self.answers.refresh()), (True, self.again.refresh()))
        return [(again, answer) for again, rows in both for answer in rows if answer.annotator == annotator]

    # -- agreement

    def annotators(self) -> list[dict[str, Any]]:
        """Per annotator: name, judgements, median seconds, and per dimension the share of repeats judged alike."""
        rows, again = self.answers.refresh(), self.again.refresh()
        table = []
        for name in dict.fromkeys(answer.annotator for answer in rows):
            own = [answer for answer in rows if answer.annotator == name]
            first = {answer.pair: answer for answer in own}
            both = [(first[each.pair], each) for each in again if each.annotator == name and each.pair in first]
            seconds = sorted(answer.seconds for answer in own)
            alike = [[a.labels[d] == b.labels[d] for a, b in both] for d in range(len(self.dimensions))]
            table.append(
                {
                    **{"annotator": name, "pairs": len(own), "seconds": seconds[len(seconds) // 2]},
                    **{"left": sum(_chose_left(answer) for answer in own) / max(1, sum(map(_decided, own)))},
                    **{"ties": sum(label == "same" for answer in own for label in answer.labels)},
                    "repeats": len(both),
                    "alike": {n: sum(same) / len(same) for n, same in zip(self.dimensions, alike) if same},
                }
            )
        return table

    def agreement(self) -> dict[str, dict[str, Any] | None]:
        """Krippendorff's alpha per dimension, as `prism.preference.check.agreement` gives it for the file."""
        from prism.preference.check import agreement
        from prism.preference.readers import read

        if not self.answers.refresh():
            return dict.fromkeys(self.dimensions)
        answers = read(self.answers.path, "videoalign", root=self.root)
        return {name: agreement(answers, name) for name in self.dimensions}


def checked_name(name: str) -> str:
    """An annotator's name without spaces around it. Raises PrismError for one that is no line of text."""
    text = " ".join(str(name or "").split())
    if not text or len(text) > LONGEST_NAME or not text.isprintable():
        raise PrismError(f"An annotator has a name of 1 to {LONGEST_NAME} letters; found {quoted(text, 60)}.")
    return text


def _pair(item: Item) -> tuple[str, str, str]:
    return item.pair.path_a, item.pair.path_b, item.pair.prompt


def _decided(answer: Answer) -> int:
    return sum(label != "same" for label in answer.labels)


def _chose_left(answer: Answer) -> int:
    left = "A" if answer.left == "path_A" else "B"
    return sum(label == left for label in answer.labels)
