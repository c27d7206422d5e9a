"""How winners are found among the candidates: none, random, full, early, draft, oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone, Interceptor, Recording, Tokens
from prism.backbone.interceptor import OnCut
from prism.errors import PrismError
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
    top_k: int = 1
    team: Team = field(default_factory=Team)
    schedule: Schedule = ()
    guided: bool = True
    draft_steps: int = 0
    judge_at: float = 0.0
    num_draws: int = 2
    oracle: Callable[[Any, str], float] | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    recordings: dict[int, Recording] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)  # of candidates that were sampled to the end
    owners: dict[int, int] = field(default_factory=dict)  # the process of each candidate

    def __post_init__(self) -> None:
        self.start_anew(self.batch_size)

    def start_anew(self, batch_size: int) -> None:
        """Forget what was found, and go on with other batches; the ledger keeps what it cost."""
        self.batch_size = batch_size
        self.recordings = {candidate: Recording() for candidate in range(len(self.seeds))}
        self.owners = self.team.owners(range(len(self.seeds)), {})
        self.scores.clear()
        self.latents.clear()

    def own(self, candidates: Iterable[int]) -> list[int]:
        """Those of the candidates that are this process's, rising."""
        return [candidate for candidate in sorted(candidates) if self.owners[candidate] == self.team.rank]

    def chunks(self, candidates: Iterable[int]) -> list[list[int]]:
        """This process's own of the candidates, in batches of at most `batch_size`."""
        size, own = self.batch_size, self.own(candidates)
        return [own[start : start + size] for start in range(0, len(own), size)]

    def batch_call(self, candidates: Sequence[int], **changes: Any) -> dict[str, Any]:
        """The user's call for several candidates at once, without the user's callback."""
        n = len(candidates)
        call = {k: v for k, v in self.call.items() if not k.startswith("callback_on_step_end")}
        if isinstance(call.get("negative_prompt"), list | tuple):
            call["negative_prompt"] = list(call["negative_prompt"]) * n
        if isinstance(call.get("negative_prompt_embeds"), Tensor):
            call["negative_prompt_embeds"] = call["negative_prompt_embeds"].repeat_interleave(n, 0)
        own = self.backbone.batch([self.prompt] * n, [self.seeds[candidate] for candidate in candidates], call)
        form = {"return_dict": True} if self.backbone.takes("return_dict") else {}
        return {**call, **own, **form, **changes}

    def finish(self, winners: Sequence[int]) -> dict[int, tuple[Any, Tensor]]:
        """Video and final latents (1, ...) of each winner, finished by a stock call of its own."""
        self.share(winners)
        parts = self.team.agree(lambda: {candidate: self._finish(candidate) for candidate in self.own(winners)})
        return merged(parts)

    def _finish(self, candidate: int) -> tuple[Any, Tensor]:
        """The stock call for one candidate, answered from its recording where there is one."""
        call = {**self.call, "generator": _generator(self.seeds[candidate])}
        if self.backbone.family.prompts:
            call["prompt"] = self.prompt
        interceptor = Interceptor(self.backbone, [candidate], self.recordings, record=False)
        output = interceptor.run(call)
        self._take_latents([candidate], interceptor)
        return output[0][0], self.latents[candidate][None]

    def sample_all(self, record: bool = True, **changes: Any) -> list[tuple[list[int], Any]]:
        """Every candidate of this process to the end: for each chunk its candidates and the pipeline's output."""
        outputs = []
        for chunk in self.chunks(range(len(self.seeds))):
            interceptor = Interceptor(self.backbone, chunk, self.recordings, record=record)
            output = interceptor.run(self.batch_call(chunk, **changes))
            self._take_latents(chunk, interceptor)
            outputs.append((chunk, output[0]))
        return outputs

    def _take_latents(self, candidates: list[int], interceptor: Interceptor) -> None:
        assert interceptor.latents is not None
        self.check_latents(candidates, interceptor.latents.flatten(1).isfinite().all(1))
        self.latents.update(zip(candidates, interceptor.latents))

    def rank(
        self,
        step: int,
        t: float,
        scores: Mapping[int, Sequence[float]],
        keep: int,
        weights: Mapping[str, float] | None = None,
    ) -> list[int]:
        """The best `keep` candidates by weighted score, best first; the cut is noted down, the losers forgotten.

        `weights` names the columns of `scores` where they are not the judge's. Those kept are shared out evenly among
        the processes, with what was recorded of them.
        """
        names = list(self.judge.dimensions) if weights is None else list(weights)
        weights = self.weights if weights is None else weights
        overall = {
            c: sum(weights.get(name, 0.0) * value for name, value in zip(names, row)) for c, row in scores.items()
        }
        best = sorted(scores, key=lambda candidate: (-overall[candidate], candidate))[:keep]
        candidates = sorted(scores)
        for loser in set(candidates) - set(best):
            self.recordings.pop(loser, None)
        columns = {name: [scores[c][column] for c in candidates] for column, name in enumerate(names)}
        self.scores.append({"step": step, "t": t, "candidates": candidates, "scores": columns, "kept": sorted(best)})
        self.share(best)
        return best

    def share(self, candidates: Sequence[int]) -> None:
        """Share these candidates out evenly among the processes, with what was recorded of them."""
        before, self.owners = self.owners, self.team.owners(sorted(candidates), self.owners)
        self.team.move(self.recordings, before, self.owners)

    def score(self, t: float, candidates: list[int], tokens: Tokens, finite: Tensor) -> dict[int, list[float]]:
        """The judge's scores of candidates at a cut, from their tokens; all must have finite latents and scores."""
        if hasattr(self.judge, "check_level"):
            self.judge.check_level(t)
        self.check_latents(candidates, finite)
        scores = self.judge.score_tokens(tokens)
        self.check_scores(candidates, scores)
        return dict(zip(candidates, scores.tolist()))

    def check_latents(self, candidates: Sequence[int], finite: Tensor) -> None:
        """Raise PrismError naming the seed of a candidate whose latents are not finite: (B,) bool."""
        for candidate, fine in zip(candidates, finite.tolist()):
            if not fine:
                raise PrismError(
                    f"The latents of the candidate with seed {self.seeds[candidate]} hold NaN or infinity; "
                    "sample in a wider dtype or leave this seed out."
                )

    def check_scores(self, candidates: Sequence[int], scores: Tensor) -> None:
        """Raise PrismError naming the seed of a candidate whose scores (B, num_dimensions) are not finite."""
        for candidate, fine in zip(candidates, scores.isfinite().all(1).tolist()):
            if not fine:
                raise PrismError(
                    f"The judge's score of the candidate with seed {self.seeds[candidate]} is NaN or infinite; "
                    "check the head."
                )


def none(search: Search) -> list[int]:
    """The first seeds."""
    return list(range(search.top_k))


def pick_random(search: Search) -> list[int]:
    """Seeds drawn at random, from the run's seed and the prompt."""
    return random.Random(f"{search.seed} {search.prompt}").sample(range(len(search.seeds)), search.top_k)


def full(search: Search) -> list[int]:
    """Every candidate to the end, judged re-noised; winners are decoded alone, from their recordings."""

    def sample() -> dict[int, Tensor]:
        search.sample_all(output_type="latent")
        return dict(search.latents)

    return _judge_clean(search, sample, step=search.backbone.num_inference_steps(search.call))


def draft(search: Search) -> list[int]:
    """Every candidate to the end in a few coarse steps, judged re-noised; then the winners in full."""

    def sample() -> dict[int, Tensor]:
        search.sample_all(record=False, output_type="latent", num_inference_steps=search.draft_steps)
        drafts, search.latents = search.latents, {}
        return drafts

    return _judge_clean(search, sample, step=search.draft_steps)


def oracle(search: Search) -> list[int]:
    """Every candidate to the end and decoded; `oracle(video, prompt)` says how good each is."""
    assert search.oracle is not None
    ask = search.oracle

    def look() -> dict[int, float]:
        values = {}
        for chunk, videos in search.sample_all(output_type="np"):
            for candidate, video in zip(chunk, videos):
                values[candidate] = float(ask(video, search.prompt))
                if values[candidate] != values[candidate]:
                    raise PrismError(f"The oracle's score of the candidate with seed {search.seeds[candidate]} is NaN.")
        return values

    values = merged(search.team.agree(look))
    step = search.backbone.num_inference_steps(search.call)
    return search.rank(step, 0.0, {c: [value] for c, value in values.items()}, search.top_k, {"oracle": 1.0})


def early(search: Search) -> list[int]:
    """Candidates are judged on the way and dropped by the schedule; those left are recorded up to the last cut.

    While the living candidates do not fit one batch, they go chunk by chunk to the next cut, and later rounds replay
    what was recorded. Once they do, one call carries all the cuts that are left, dead rows gated out. Processes that
    share a run meet after each cut, so they go round by round.
    """
    alive, probed = list(range(len(search.seeds))), {}
    left, family = len(alive), search.backbone.family
    for step, keep in search.schedule:
        share = search.judge.tap / search.backbone.num_blocks
        probed[step] = cut_rows(left, keep, family.cfg, search.guided, share, search.backbone.listens)[1]
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
        kept = search.rank(step, t, search.score(t, living, tokens, finite), keeps[step])
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
    return search.rank(step, level, merged(part for part, _ in parts), keep)


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

    def judge() -> dict[int, list[float]]:
        latents = sample()
        scores: dict[int, list[float]] = {}
        for chunk in search.chunks(latents):
            stacked = torch.stack([latents[candidate] for candidate in chunk])
            # Not the run's own seed: the noise of its first candidate must not be the noise all are judged with.
            generator = _generator(random.Random(f"judge {search.seed}").randrange(2**62))
            prompts, draws = [search.prompt] * len(chunk), search.num_draws
            try:
                mean, _ = search.judge.score_clean(
                    stacked, prompts, search.judge_at, num_draws=draws, generator=generator, **search.call
                )
            except PrismError as error:
                seeds = ", ".join(str(search.seeds[candidate]) for candidate in chunk)
                raise PrismError(f"{error} (Its rows are the candidates with seeds {seeds}.)") from error
            search.check_scores(chunk, mean)
            scores.update(zip(chunk, mean.tolist()))
        return scores

    return search.rank(step, search.judge_at, merged(search.team.agree(judge)), search.top_k)


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
