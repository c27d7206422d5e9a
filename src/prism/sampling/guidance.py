"""The settings of guidance by a judge, in Python and as text, and its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from prism.errors import DRAWS, PrismError, choice, flag, number, quoted, whole
from prism.sampling.plan import Plan

STRONGEST = 10.0  # steps of the sampler


@dataclass(frozen=True)
class Guidance:
    """The settings of guidance by a judge.

    strength: length of a push, in lengths of the step that it follows, from 0 (none) to 10.
    look: "now": the judge reads the latents as they are. "ahead": the clean latents that the step predicts.
    steps: the first and the last step, from 1, that a push follows. Latents before step 1 are not seen, and after the
        last step nothing denoises what a push leaves, so that these two are never among them. None: all others.
    clip: the largest entry of a gradient, in its root mean squares; larger ones are cut before it is scaled. None: any.
    by: dimension of the judge, or weights of dimensions, whose score rises; None: those that a search selects by, or
        overall.
    judge_at: noise level in (0, 1000] to which predicted latents are re-noised; None: 700. num_draws: noise draws of
        them that a gradient is averaged over; other ones at each step. Both belong to look="ahead".
    checkpointed: keep only the inputs of the denoiser's blocks for the backward pass, which saves memory for one more
        forward pass.
    """

    strength: float
    look: Literal["now", "ahead"] = "now"
    steps: tuple[int, int] | None = None
    clip: float | None = None
    by: str | Mapping[str, float] | None = None
    judge_at: float | None = None
    num_draws: int = 1
    checkpointed: bool = False

    def __repr__(self) -> str:
        """The line of Python that makes it, without what is left at its default."""
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"prism.sampling.Guidance({', '.join(said)})"

    def checked(self) -> Guidance:
        """The guidance with its values checked, as far as they do not depend on a judge and a call."""
        choice("look of guidance_by_judge", self.look, ("now", "ahead"))
        if self.look == "now" and (self.judge_at is not None or self.num_draws != 1):
            raise PrismError(
                'judge_at and num_draws of guidance_by_judge belong to look="ahead"; give it, or leave them out.'
            )
        return replace(
            self,
            strength=number("strength of guidance_by_judge", self.strength, 0, STRONGEST),
            steps=None if self.steps is None else _window(self.steps),
            clip=None if self.clip is None else number("clip of guidance_by_judge", self.clip, 0, above=True),
            num_draws=whole("num_draws of guidance_by_judge", self.num_draws, 1, DRAWS),
            checkpointed=flag("checkpointed of guidance_by_judge", self.checkpointed),
        )

    def passes(self) -> int:
        """Truncated denoiser passes of a push: each draw's forward and backward pass, and its second forward one."""
        return self.num_draws * (3 if self.checkpointed else 2)


def _window(steps: Any) -> tuple[int, int]:
    try:
        first, last = (whole("A step of guidance_by_judge", step, 2) for step in steps)
    except (TypeError, ValueError):
        raise PrismError(
            f"steps of guidance_by_judge are a first and a last step such as (2, 10); found {quoted(steps, 60)}."
        ) from None
    if last < first:
        raise PrismError(f"steps of guidance_by_judge end at step {last} before they begin at {first}; turn them.")
    return first, last


def guidance_of(value: Any) -> Guidance | None:
    """A `Guidance`, or a strength in place of one, checked; None for None."""
    if value is None:
        return None
    return (
        value if isinstance(value, Guidance) else Guidance(number("guidance_by_judge", value, 0, STRONGEST))
    ).checked()


def check_guided(kind: type[Plan]) -> None:
    """Raise PrismError for a strategy, by the class of its plan, whose candidates a judge cannot guide."""
    if kind.completing is Plan.completing:
        raise PrismError(
            "guidance_by_judge (--guidance-by-judge) goes with the strategies none, random, early, full and oracle, "
            f'and this run\'s is "{kind.strategy}"; take one of them, or leave the guidance out.'
        )


def parse(text: str) -> Guidance:
    """Guidance from text: "0.1", or "0.1,look=ahead,steps=2-10,clip=3" with settings of `Guidance` by name.

    Weights of dimensions are written VQ:1+MQ:0.5.
    """
    strength, *rest = (part.strip() for part in text.split(","))
    kinds: dict[str, Callable[[str], Any]] = {
        "look": str,
        "steps": lambda value: tuple(int(step) for step in value.split("-")),
        "clip": float,
        "by": _weights,
        "judge_at": float,
        "num_draws": int,
        "checkpointed": {"true": True, "false": False}.__getitem__,
    }
    try:
        pairs = [part.split("=") for part in rest]
        names = [name.replace("-", "_") for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError
        settings = {name: kinds[name](value) for name, (_, value) in zip(names, pairs)}
        guidance = Guidance(float(strength), **settings)
    except (KeyError, ValueError):
        raise PrismError(
            f'The guidance "{quoted(text, 120)}" is not a strength and settings of '
            f"{', '.join(kinds)}; write for example 0.1 or 0.1,look=ahead,steps=2-10,clip=3."
        ) from None
    return guidance.checked()


def _weights(text: str) -> str | dict[str, float]:
    return text if ":" not in text else {n: float(w) for n, w in (part.split(":") for part in text.split("+"))}
