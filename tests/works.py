"""What people do to pipelines and what PRISM does with each: said beside the test that shows it.

`docs/what_works.py` reads these lines from the tests' source and writes docs/what-works.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

Test = TypeVar("Test", bound=Callable[..., object])
Topic = Literal[
    "Offload and memory",
    "Precision and quantisation",
    "Adapters and training",
    "Compilation",
    "Caches and patches",
    "Schedulers and steps",
    "Callbacks and guidance",
    "Threads and processes",
    "Embeddings and encoders",
    "Inputs and outputs",
    "Families of one's own",
]
Outcome = Literal["exact", "to rounding", "warned", "refused", "works"]


def works(topic: Topic, what: str, outcome: Outcome, how: str) -> Callable[[Test], Test]:
    """Say what the test below shows: all arguments are literals, `how` is one short sentence for users."""
    return lambda test: test
