"""How winners are found among the candidates: none, random, full, early, draft, oracle."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone, Interceptor, Recording, Tokens
from prism.backbone.arguments import embedded_rows
from prism.backbone.interceptor import OnCut
from prism.backbone.patches import is_patched
from prism.backbone.steps import Steps
from prism.errors import PrismError
from prism.media import frames
from prism.sampling import oracles
from prism.sampling.ledger import cut_rows
from prism.sampling.processes import Team, merged
from prism.sampling.schedule import Schedule


@dataclass
class Search:
    """One run over the candidates of a prompt. Candidates are named by their index in `seeds`.

    Processes that share a run each work on the candidates that `owners` says are theirs, and agree at each cut.
    """

    backbone: Backbone
    judge: Any
    prompt: str
    call: dict[str, Any]
    seeds: tuple[int, ...]
    seed: int
    batch_size: int
    weights: Mapping[str, float]  # of the judge's dimensions, for ranking
    select_by: str | Mapping[str, float] = "overall"  # as it was given, for the dimensions of an oracle
    top_k: int = 1
    team: Team = field(default_factory=Team)
    schedule: Schedule = ()
    steps: Steps | None = None  # of the call, and of a draft's: once the scheduler was asked
    drafted: Steps | None = None
    draft_steps: int = 0
    judge_at: float = 0.0
    num_draws: int = 2
    oracle: Callable[[Any, Any], Any] | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    recordings: dict[int, Recording] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)  # of candidates that were sampled to the end
    owners: dict[int, int] = field(default_factory=dict)  # the process of each candidate
    reserve: list[int] = field(default_factory=list)  # who comes next, should a winner's latents not be finite
    state: str = ""  # of the denoisers as they sample, where a callback may change it
    noise: set[str] = field(default_factory=set)  # where winners' schedulers drew noise, see Interceptor

    def __post_init__(self) -> None:
        self.start_anew(self.batch_size)

    def start_anew(self, batch_size: int) -> None:
        """Forget what was found, and go on with other batches; the ledger keeps what it cost."""
        self.batch_size = batch_size
        self.recordings = {candidate: Recording() for candidate in range(len(self.seeds))}
        self.owners = self.team.owners(range(len(self.seeds)), {})
        self.scores.clear()
        self.latents.clear()
        self.reserve.clear()

    def own(self, candidates: Iterable[int]) -> list[int]:
        """Those of the candidates that are this process's, rising."""
        return [candidate for candidate in sorted(candidates) if self.owners[candidate] == self.team.rank]

    def chunks(self, candidates: Iterable[int]) -> list[list[int]]:
        """This process's own of the candidates, in batches of at most `batch_size`."""
        size, own = self.batch_size, self.own(candidates)
        return [own[start : start + size] for start in range(0, len(own), size)]

    def batch_call(self, candidates: Sequence[int], **changes: Any) -> dict[str, Any]:
        """The user's call for several candidates at once, without the user's callback."""
        call = {k: v for k, v in self.call.items() if not k.startswith("callback_on_step_end")}
        own = self.backbone.batch([self.prompt] * len(candidates), [self.seeds[c] for c in candidates], call)
        form = {"return_dict": True} if self.backbone.takes("return_dict") else {}
        return {**call, **own, **form, **changes}

    def finish(self, winners: Sequence[int]) -> dict[int, tuple[Any, Tensor]]:
        """The pipeline's output and the final latents (1, ...) of each winner, best first, finished by a stock call of
        its own.

        In place of one whose latents are not finite comes the next of the reserve.
        """
        self.share(winners)
        parts = self.team.agree(lambda: {candidate: self._finish(candidate) for candidate in self.own(winners)})
        finished = {candidate: value for candidate, value in merged(parts).items() if value is not None}
        failed = [candidate for candidate in winners if candidate not in finished]
        if failed:
            substitutes, self.reserve = self.reserve[: len(failed)], self.reserve[len(failed) :]
            if len(substitutes) < len(failed):
                raise self.too_few()
            if self.scores:
                last = self.scores[-1]
                kept = {*last["kept"], *substitutes} - {*failed}
                last["kept"] = sorted(kept.intersection(last["candidates"]))
                last["dropped"] = sorted({*last["dropped"], *failed})
            finished |= self.finish(substitutes)
        return {candidate: finished[candidate] for candidate in [*winners, *finished] if candidate in finished}

    def _finish(self, candidate: int) -> tuple[Any, Tensor] | None:
        """The stock call for one candidate, answered from its recording where there is one; None: it is dropped."""
        # Code of others may do more than answer, such as change its arguments: a call past it is made in whole.
        if is_patched(self.backbone.denoisers, self.backbone.pipe.scheduler):
            self.recordings.pop(candidate, None)
        self.recordings.setdefault(candidate, Recording())
        call = {**self.call, "generator": _generator(self.seeds[candidate])}
        if self.backbone.family.prompts and not embedded_rows(call):
            call["prompt"] = self.prompt
        interceptor = Interceptor(self.backbone, [candidate], self.recordings, False, searches=False, state=self.state)
        output = interceptor.run(call)
        self.noise.add(interceptor.noise)
        if not self._take_latents([candidate], interceptor):
            return None
        return output, self.latents[candidate][None]

    def sample_all(self, record: bool = True, **changes: Any) -> Iterator[dict[int, Any]]:
        """Every candidate of this process to the end: for each chunk the pipeline's output by candidate, without those
        that are dropped."""
        for chunk in self.chunks(range(len(self.seeds))):
            interceptor = Interceptor(self.backbone, chunk, self.recordings, record=record)
            output = interceptor.run(self.batch_call(chunk, **changes))
            fine = self._take_latents(chunk, interceptor)
            yield {candidate: value for candidate, value in zip(chunk, output[0]) if candidate in fine}

    def _take_latents(self, candidates: list[int], interceptor: Interceptor) -> list[int]:
        """Keep the final latents of candidates; those that are finite are returned, the others dropped."""
        latents = interceptor.finished()
        fine = self.finite(candidates, latents.flatten(1).isfinite().all(1))
        self.latents.update({c: row for c, row in zip(candidates, latents) if c in fine})
        return fine

    def rank(
        self,
        step: int,
        t: float,
        scores: Mapping[int, Sequence[float]],
        keep: int,
        alive: Iterable[int],
        names: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
    ) -> list[int]:
        """The best `keep` candidates by weighted score, best first; the cut is noted down, the losers forgotten.

        `names` and `weights` are those of the columns of `scores` where they are not the judge's. Those of the `alive`
        that have no scores were dropped. Those kept are shared out evenly among the processes, with what was recorded
        of them. Raises PrismError where fewer than `top_k` have scores.
        """
        names, weights = names or self.judge.dimensions, self.weights if weights is None else weights
        if len(scores) < self.top_k:
            raise self.too_few()
        overall = {
            c: sum(weights.get(name, 0.0) * value for name, value in zip(names, row)) for c, row in scores.items()
        }
        order = sorted(scores, key=lambda candidate: (-overall[candidate], candidate))
        best, candidates, dropped = order[:keep], sorted(scores), sorted(set(alive) - set(scores))
        if len(scores) > len(best) and len(set(overall.values())) == 1 and self.team.rank == 0:
            warnings.warn(
                f"All {len(scores)} candidates have the same score at step {step}, so that the first are kept; see "
                "whether the judge is trained and select_by names what it tells apart.",
                stacklevel=2,
            )
        self.reserve[:0] = order[keep:]
        for loser in {*order[keep:], *dropped}:
            self.recordings.pop(loser, None)
        columns = {name: [scores[c][column] for c in candidates] for column, name in enumerate(names)}
        entry = {"step": step, "t": t, "candidates": candidates, "scores": columns, "kept": sorted(best)}
        self.scores.append({**entry, "dropped": dropped})
        self.share(best)
        return best

    def share(self, candidates: Sequence[int]) -> None:
        """Share these candidates out evenly among the processes, with what was recorded of them."""
        before, self.owners = self.owners, self.team.owners(sorted(candidates), self.owners)
        self.team.move(self.recordings, before, self.owners)

    def score(self, t: float, candidates: list[int], tokens: Tokens, finite: Tensor) -> dict[int, list[float]]:
        """The judge's scores of candidates at a cut, from their tokens, without those that are dropped."""
        if hasattr(self.judge, "check_level"):
            self.judge.check_level(t)
        if len(fine := self.finite(candidates, finite)) < len(candidates):
            tokens = tokens[[candidates.index(candidate) for candidate in fine]]
        return self.finite_scores(fine, self.judge.score_tokens(tokens)) if fine else {}

    def finite(self, candidates: Sequence[int], finite: Tensor) -> list[int]:
        """Those of the candidates with finite latents, (B,) bool; the others are dropped with a warning."""
        return self._keep(candidates, finite, "its latents hold NaN or infinity (a wider dtype may help)")

    def finite_scores(self, candidates: Sequence[int], scores: Tensor) -> dict[int, list[float]]:
        """The scores (B, num_dimensions) of candidates, without those that are not finite, which is warned of."""
        fine = self._keep(candidates, scores.isfinite().all(1), "the judge's score of it is NaN or infinite")
        return {candidate: row for candidate, row in zip(candidates, scores.tolist()) if candidate in fine}

    def _keep(self, candidates: Sequence[int], finite: Tensor, reason: str) -> list[int]:
        for candidate, fine in zip(candidates, finite.tolist()):
            if not fine:
                self.warn_dropped(candidate, reason)
        return [candidate for candidate, fine in zip(candidates, finite.tolist()) if fine]

    def warn_dropped(self, candidate: int, reason: str) -> None:
        """Say why a candidate is dropped without a score."""
        warnings.warn(f"The candidate with seed {self.seeds[candidate]} is dropped: {reason}.", stacklevel=2)

    def too_few(self) -> PrismError:
        """That fewer than `top_k` candidates are left."""
        few = "No candidate has" if self.top_k == 1 else f"Fewer than the {self.top_k} candidates of top_k have"
        seeds = ", ".join(map(str, self.seeds[:8])) + (", ..." if len(self.seeds) > 8 else "")
        return PrismError(
            f"{few} finite latents and scores, of those with the seeds {seeds}; sample in a wider dtype, and check the "
            "judge."
        )


def none(search: Search) -> list[int]:
    """The first seeds."""
    search.reserve = list(range(search.top_k, len(search.seeds)))
    return list(range(search.top_k))


def pick_random(search: Search) -> list[int]:
    """Seeds drawn at random, from the run's seed and the prompt."""
    draws = random.Random(f"{search.seed} {search.prompt}")
    picked = draws.sample(range(len(search.seeds)), search.top_k)
    search.reserve = [candidate for candidate in range(len(search.seeds)) if candidate not in picked]
    return picked


def full(search: Search) -> list[int]:
    """Every candidate to the end, judged re-noised; winners are decoded alone, from their recordings."""

    def sample() -> dict[int, Tensor]:
        for _ in search.sample_all(output_type="latent"):
            pass
        return dict(search.latents)

    return _judge_clean(search, sample, step=len(search.steps or ()))


def draft(search: Search) -> list[int]:
    """Every candidate to the end in a few coarse steps, judged re-noised; then the winners in full."""

    def sample() -> dict[int, Tensor]:
        for _ in search.sample_all(record=False, output_type="latent", num_inference_steps=search.draft_steps):
            pass
        drafts, search.latents = search.latents, {}
        return drafts

    return _judge_clean(search, sample, step=len(search.drafted or ()))


def oracle(search: Search) -> list[int]:
    """Every candidate to the end and decoded; `oracle(video, prompt)` says how good each is."""
    assert search.oracle is not None
    ask = search.oracle

    def look() -> dict[int, dict[str, float]]:
        answers: dict[int, dict[str, float]] = {}
        for videos in search.sample_all(output_type="np"):
            shown: dict[int, Any] = {}
            for candidate, video in videos.items():
                try:
                    shown[candidate] = frames(video, "its video")
                except PrismError as error:  # a VAE that overflows
                    search.warn_dropped(candidate, str(error).rstrip("."))
            for candidate, answer in zip(shown, oracles.ask(ask, list(shown.values()), search.prompt)):
                if all(math.isfinite(value) for value in answer.values()):
                    answers[candidate] = answer
                else:
                    search.warn_dropped(candidate, "the oracle's score of it is NaN or infinite")
        return answers

    answers = merged(search.team.agree(look))
    names, weights = oracles.columns(list(answers.values()), search.select_by)
    scores = {candidate: [answer[name] for name in names] for candidate, answer in answers.items()}
    step = len(search.steps or ())
    return search.rank(step, 0.0, scores, search.top_k, range(len(search.seeds)), names, weights)


def early(search: Search) -> list[int]:
    """Candidates are judged on the way and dropped by the schedule; those left are recorded up to the last cut.

    While the living candidates do not fit one batch, they go chunk by chunk to the next cut, and later rounds replay
    what was recorded. Once they do, one call carries all the cuts that are left, dead rows gated out. Processes that
    share a run meet after each cut, so they go round by round.
    """
    alive, probed = list(range(len(search.seeds))), {}
    left, backbone = len(alive), search.backbone
    for step, keep in search.schedule:
        calls, share = search.steps.calls[step - 1] if search.steps else 1, search.judge.tap / backbone.num_blocks
        probed[step] = cut_rows(left, keep, backbone.family.cfg, calls, share, backbone.listens)[1]
        left = keep
    cuts = list(search.schedule)
    while cuts:
        if search.team.alone and len(alive) <= search.batch_size:
            return _gate(search, sorted(alive), cuts, probed)
        alive = _round(search, alive, *cuts.pop(0), probed)
    return alive


def _gate(
    search: Search, candidates: list[int], cuts: Sequence[tuple[int, int]], probed: Mapping[int, bool]
) -> list[int]:
    """All the cuts in one call of all the candidates, which ends at the last of them."""
    keeps, last, kept = dict(cuts), cuts[-1][0], candidates

    def on_cut(step: int, t: float, living: list[int], tokens: Tokens, finite: Tensor) -> list[int] | None:
        nonlocal kept
        kept = search.rank(step, t, search.score(t, living, tokens, finite), keeps[step], living)
        return None if step == last else kept

    _until_cut(search, candidates, {step: probed[step] for step in keeps}, on_cut)
    return kept


def _round(search: Search, candidates: Sequence[int], step: int, keep: int, probed: Mapping[int, bool]) -> list[int]:
    """Each chunk in a call of its own that ends at the cut; the survivors over all chunks."""
    scores: dict[int, Sequence[float]] = {}
    levels: list[float] = []

    def on_cut(_step: int, t: float, living: list[int], tokens: Tokens, finite: Tensor) -> None:
        scores.update(search.score(t, living, tokens, finite))
        levels.append(t)

    def sample() -> tuple[dict[int, Sequence[float]], list[float]]:
        for chunk in search.chunks(candidates):
            _until_cut(search, chunk, {step: probed[step]}, on_cut)
        return scores, levels

    parts = search.team.agree(sample)
    level = next(t for _, told in parts for t in told)
    return search.rank(step, level, merged(part for part, _ in parts), keep, candidates)


def _until_cut(search: Search, candidates: list[int], cuts: Mapping[int, bool], on_cut: OnCut) -> None:
    interceptor = Interceptor(
        search.backbone, candidates, search.recordings, cuts=cuts, tap=search.judge.taps, on_cut=on_cut
    )
    if interceptor.run(search.batch_call(candidates, output_type="latent")) is not None:
        raise PrismError(
            f"The pipeline made {interceptor.step - 1} scheduler steps, and the schedule cuts at step {max(cuts)}."
        )


def _judge_clean(search: Search, sample: Callable[[], Mapping[int, Tensor]], step: int) -> list[int]:
    """The best of the finished latents that `sample` makes, each re-noised to `judge_at` with the same draws."""

    refused: dict[int, str] = {}

    def scored(chunk: list[int], latents: Mapping[int, Tensor]) -> dict[int, list[float]]:
        stacked = torch.stack([latents[candidate] for candidate in chunk])
        # Not the run's own seed: the noise of its first candidate must not be the noise all are judged with.
        generator = _generator(random.Random(f"judge {search.seed}").randrange(2**62))
        prompts, draws = [search.prompt] * len(chunk), search.num_draws
        own: dict[str, Any] = {}
        if hasattr(search.judge, "score_tokens") and search.backbone.draws_conditions(search.call):
            own["seeds"] = [search.seeds[candidate] for candidate in chunk]
        try:
            mean, _ = search.judge.score_clean(
                stacked, prompts, search.judge_at, num_draws=draws, generator=generator, **search.call, **own
            )
        except PrismError as error:
            if len(chunk) == 1:
                refused[chunk[0]] = str(error)
                return {}
            return {c: row for candidate in chunk for c, row in scored([candidate], latents).items()}
        return search.finite_scores(chunk, mean)

    def judge() -> tuple[dict[int, list[float]], dict[int, str]]:
        latents = sample()
        chunks = search.chunks(latents)
        return {c: row for chunk in chunks for c, row in scored(chunk, latents).items()}, refused

    parts = search.team.agree(judge)
    scores = merged(part for part, _ in parts)
    for candidate, reason in merged(part for _, part in parts).items():
        if not scores:  # no fault of a candidate's
            raise PrismError(reason)
        if search.owners[candidate] == search.team.rank:
            search.warn_dropped(candidate, f"the judge refuses it ({reason.rstrip('.')})")
    return search.rank(step, search.judge_at, scores, search.top_k, range(len(search.seeds)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


STRATEGIES: dict[str, Callable[[Search], list[int]]] = {
    "none": none,
    "random": pick_random,
    "full": full,
    "early": early,
    "draft": draft,
    "oracle": oracle,
}
