"""Rounds of candidates, drawn until the winner is good enough by the clips of the judge's reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from prism.errors import PrismError, whole
from prism.sampling.arguments import MAX_N, ranking, seed_of
from prism.sampling.plan import Candidate
from prism.sampling.search import Search
from prism.sampling.stopping import probability, reference_of

ROUNDS = 8  # rounds at most, unless `max_n` says otherwise

T = TypeVar("T")
Find = Callable[[Search], list[Candidate]]
WithinMemory = Callable[[Search, Callable[[Search], Any]], Any]


@dataclass(frozen=True)
class Stop:
    """The end of a run with `until`.

    probability: of the best video to be preferred to a random clip of the judge's reference, in [0, 1].
    reached: True if this is at least `until`; False if the candidates ran out.
    rounds: the number of rounds.
    dimension, t, num_draws: the judge's dimension, noise level and noise draws by which winners are compared.
    clips: the number of reference clips. same_prompt: True if these are of the prompt, False if they are all.
    winners: each round's, {"round", "candidate", "score", "error", "probability"}: candidates by index; mean score over
        the draws and its standard error.
    """

    probability: float
    reached: bool
    rounds: int
    dimension: str
    t: float
    num_draws: int
    clips: int
    same_prompt: bool
    winners: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Until:
    """The rule by which a run goes on drawing candidates.

    until: the probability at which it stops. most: the most rounds. by: the judge's dimension that decides.
    judge_at: the winners are compared at the level of the judge's reference that is nearest.
    keep_latents: keep the final latents of all candidates that are sampled to the end, not of the best alone.
    """

    until: float
    most: int
    by: str
    judge_at: float = 700.0
    keep_latents: bool = False

    @classmethod
    def of(cls, until: Any, max_n: Any, judge: Any, select_by: Any, first: Sequence[int], seeds: Any) -> Until | None:
        """The rule of a run's arguments, or None if it has none. Raises PrismError for one that cannot be followed.

        first: the seeds of the first round.
        """
        if until is None:
            if max_n is not None:
                raise PrismError("max_n bounds the candidates of a run with until; give until, or leave max_n out.")
            return None
        until, n = probability("until", until), len(first)
        most = ROUNDS if max_n is None else whole("max_n", max_n, n, MAX_N) // n
        if seeds is not None:
            raise PrismError("until goes on from seed with further seeds, and seeds lists them; leave seeds out.")
        if judge is None:
            raise PrismError("until needs a judge that has a reference; load one with Judge.from_pretrained.")
        weights = {name: weight for name, weight in ranking(judge, select_by).items() if weight}
        if len(weights) > 1 or min(weights.values()) < 0:
            raise PrismError(
                f"until compares one dimension of the judge with its reference, and this run ranks by "
                f"{', '.join(f'{name}:{weight:g}' for name, weight in weights.items())}; name one with select_by."
            )
        (by,) = weights
        most = max(1, min(most, MAX_N // n))
        seed_of(first[0] + most * n - 1)
        reference_of(judge, "until", by, None, warns=False)  # each prompt's own warning comes with its run
        return cls(until, most, by)

    def draw(self, search: Search, find: Find, within_memory: WithinMemory) -> tuple[list[Candidate], Stop]:
        """The best candidates over all rounds, best first, and how it ended.

        Each round's winners, by the run's own plan, are sampled to the end, not decoded, and judged: re-noised to one
        level, with the same draws in all rounds, which are not those that the plan's own looks had. The rounds'
        candidates, cuts and the best ones' recordings are put into `search`, so that finishing replays.

        Args:
            search: of the first round's candidates.
            find: the winners of one round's search.
            within_memory: carries a function of a search out, anew with smaller batches where memory runs out.
        """
        n, seed, judge = len(search.candidates), search.candidates[0].seed, search.judge
        reference, column = (
            reference_of(judge, "until", self.by, search.prompt or None),
            judge.dimensions.index(self.by),
        )
        t = min(reference.levels, key=lambda level: (abs(level - self.judge_at), level))
        num_draws = int(reference.facts.get("num_draws") or 1)
        best: list[Candidate] = []
        winners: dict[Candidate, dict[str, Any]] = {}
        drawn: list[Candidate] = []
        for number in range(1, self.most + 1):
            numbered = range((number - 1) * n, number * n)
            part = _anew(search, tuple(Candidate(index, seed + index) for index in numbered))
            readings = within_memory(part, partial(_finals, find=find, t=t, num_draws=num_draws))
            search.batch_size = part.batch_size
            for candidate, rows in readings.items():
                mean, error = rows.mean(0), rows.std(0, ddof=1) / num_draws**0.5 if num_draws > 1 else rows[0] * np.nan
                wins = reference.win_probability(judge, mean[None], error[None], t)[0, column]
                winners[candidate] = {"round": number, "candidate": candidate.index, "score": float(mean[column])}
                winners[candidate] |= {"error": float(np.nan_to_num(error[column])), "probability": float(wins)}
            best = sorted(winners, key=lambda each: (-winners[each]["score"], each))[: search.top_k]
            drawn += part.candidates
            _take(search, part, best, number, self.keep_latents)
            if best and winners[best[0]]["probability"] >= self.until:
                break
        search.candidates = tuple(drawn)
        if len(best) < search.top_k:
            raise search.too_few()
        reached = winners[best[0]]["probability"]
        return best, Stop(
            probability=reached,
            reached=reached >= self.until,
            rounds=number,
            dimension=self.by,
            t=t,
            num_draws=num_draws,
            clips=len(reference.prompts),
            same_prompt=reference is not judge.reference,
            winners=tuple(winners.values()),
        )


def _anew(search: Search, candidates: tuple[Candidate, ...]) -> Search:
    """A search like this one over other candidates, with nothing done yet."""
    empty: dict[str, Any] = {"scores": [], "recordings": {}, "latents": {}, "owners": {}, "reserve": [], "noise": set()}
    return replace(search, candidates=candidates, **empty)


def _finals(part: Search, find: Find, t: float, num_draws: int) -> dict[Candidate, np.ndarray]:
    """Scores (num_draws, num_dimensions) of the final latents of a round's winners, those that break left out."""
    picked = find(part)
    for _ in part.sample_all(candidates=[each for each in picked if each not in part.latents], output_type="latent"):
        pass
    latents = {each: part.latents[each] for each in part.local(picked) if each in part.latents}
    draws = [part.judge_clean(lambda: latents, t, 1, f"until {draw}") for draw in range(num_draws)]
    return {each: np.array([scores[each] for scores in draws]) for each in picked if all(each in s for s in draws)}


def _take(search: Search, part: Search, best: Sequence[Candidate], number: int, keep_latents: bool) -> None:
    """Put a round's cuts into the run's search, and what finishing needs of the best so far; let go of the rest."""
    search.scores += [{**cut, "round": number} for cut in part.scores]
    if search.previews is not None and part.previews is not None:
        search.previews.take(part.previews)
    for name in ("recordings", "owners", "latents"):
        merged = {**getattr(search, name), **getattr(part, name)}
        every = keep_latents and name == "latents"
        setattr(search, name, {each: value for each, value in merged.items() if every or each in best})
