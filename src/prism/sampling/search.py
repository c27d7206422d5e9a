"""The candidates of one prompt while they are searched: sampled in batches, ranked, finished."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone, Tokens, prediction
from prism.backbone.arguments import embedded_rows
from prism.backbone.patches import is_patched
from prism.errors import PrismError
from prism.sampling import edits, looks
from prism.sampling.guiding import Guide
from prism.sampling.lookahead import Predictor
from prism.sampling.plan import Candidate, Edit, Plan, Workload, generator_of, judging_noise, warn_blind, weighted
from prism.sampling.previews import Previews, Watch
from prism.sampling.recording import Recording
from prism.sampling.replay import Interceptor, OnCut
from prism.team import Team, merged


@dataclass
class Search:
    """One run over a prompt's candidates. Processes that share it sample those they own, and gather scores at cuts."""

    backbone: Backbone
    judge: Any
    prompt: str
    call: dict[str, Any]
    candidates: tuple[Candidate, ...]
    seed: int
    batch_size: int
    weights: Mapping[str, float]  # by dimension of the judge, to rank by
    top_k: int = 1
    team: Team = field(default_factory=Team)
    load: Workload = field(default_factory=lambda: Workload(0, ()))  # set by `settle`
    scores: list[dict[str, Any]] = field(default_factory=list)
    recordings: dict[Candidate, Recording] = field(default_factory=dict)
    latents: dict[Candidate, Tensor] = field(default_factory=dict)  # final ones, of candidates sampled to the end
    owners: dict[Candidate, int] = field(default_factory=dict)  # the rank of each candidate's process
    reserve: list[Candidate] = field(default_factory=list)  # ranked, to replace winners whose latents are not finite
    state: str = ""  # `state_of` the denoisers before sampling, if there is a callback to change it
    previews: Previews | None = None  # where predicted clean latents are decoded
    watch: Watch | None = None  # is told of each cut
    guide: Guide | None = None  # of a run that the judge guides
    noise: set[str] = field(default_factory=set)  # sources of the winners' noise, see `Interceptor.noise`

    def __post_init__(self) -> None:
        self.start_anew(self.batch_size)

    def start_anew(self, batch_size: int) -> None:
        """Forget all results and sample from the start with another batch size; the ledger keeps the cost so far."""
        self.batch_size = batch_size
        self.recordings = {candidate: Recording() for candidate in self.candidates}
        self.owners = self.team.owners(self.candidates, {})
        self.scores.clear()
        self.latents.clear()
        self.reserve.clear()
        self.previews = None if self.previews is None else Previews(optional=self.previews.optional)

    def settle(self, plan: Plan) -> Plan:
        """The plan with its cuts settled against the steps that the call makes; sets `load`.

        To learn the steps, the call is run up to its first denoiser call, which encodes the prompt that all candidates
        share; the steps of an equal earlier call are remembered. A plan that looks at nothing uses
        `num_inference_steps`.

        Raises:
            PrismError: for cuts after the last step, or at steps of another denoiser than the head's; for a scheduler
                whose noise levels are unknown.
        """
        backbone, steps, drafted = self.backbone, None, None
        if plan.looks_at == "steps":
            backbone.family.check_scheduler(backbone.pipe.scheduler)
        if plan.predicts():
            prediction.check(backbone.pipe, backbone.family.counts_steps_by_calls)
        if plan.looks_at is not None or self.guide is not None:
            first = self.candidates[: self.batch_size]

            def ask(**changes: Any) -> Any:
                return backbone.steps(self.batch_call(first, output_type="latent", **changes))

            steps = self.team.agree(ask)[self.team.rank]
            if plan.drafts():
                drafted = self.team.agree(lambda: ask(num_inference_steps=plan.drafts()))[self.team.rank]
        tap = getattr(self.judge, "tap", 0)
        self.load = Workload.of(backbone, self.call, len(self.candidates), tap, steps, drafted, self.top_k)
        judge_at = getattr(plan, "judge_at", None)
        if plan.looks_at == "steps" and steps is not None and judge_at is not None:
            self.load = replace(self.load, looks=looks.defaults(backbone, self.judge, self.weights, steps, judge_at))
        if self.guide is not None and steps is not None:
            self.load = replace(self.load, guidance=self.guide.rows(steps))
        plan = plan.settled(self.load, steps)
        edits.check(backbone, self.call, plan.parts_at(self.load))
        if plan.looks_at == "steps" and steps is not None:
            cuts, listened = plan.cuts(self.load), plan.listened(self.load)
            steps.check_cuts(listened, backbone.reads)
            if self.call.get("strength") is None and cuts[0][0] in listened:
                warn_blind(cuts, len(self.candidates), len(steps))
        return plan

    def branch(self, candidate: Candidate, edit: Edit) -> Candidate:
        """A candidate with one more edit and a copy of this one's recording; for now it belongs to the same process."""
        new = candidate.branch(edit)
        self.owners[new] = self.owners[candidate]
        if candidate in self.recordings:
            self.recordings[new] = self.recordings[candidate].copy()
        return new

    def local(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The candidates that belong to this process, in order."""
        return [candidate for candidate in sorted(candidates) if self.owners[candidate] == self.team.rank]

    def chunks(self, candidates: Iterable[Candidate]) -> list[list[Candidate]]:
        """The candidates that belong to this process, in batches of at most `batch_size`."""
        size, local = self.batch_size, self.local(candidates)
        return [local[start : start + size] for start in range(0, len(local), size)]

    def batch_call(self, candidates: Sequence[Candidate], **changes: Any) -> dict[str, Any]:
        """The user's call for several candidates at once, without the user's callback."""
        call = {k: v for k, v in self.call.items() if not k.startswith("callback_on_step_end")}
        rows = self.backbone.batch([self.prompt] * len(candidates), [c.seed for c in candidates], call)
        form = {"return_dict": True} if self.backbone.takes("return_dict") else {}
        return {**call, **rows, **form, **changes}

    def finish(self, winners: Sequence[Candidate]) -> dict[Candidate, tuple[Any, Tensor]]:
        """The pipeline's output and the final latents (1, ...) of each winner, best first.

        Each is finished by a stock call of its own. One whose latents are not finite is replaced by the next candidate
        of the reserve.
        """
        self.share(winners)
        parts = self.team.agree(lambda: {candidate: self._finish(candidate) for candidate in self.local(winners)})
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

    def _finish(self, candidate: Candidate) -> tuple[Any, Tensor] | None:
        """Output and latents of one candidate's stock call, answered from its recording; None if it is dropped."""
        # A replaced method may have side effects, which an answer from a recording would skip.
        if is_patched(self.backbone.denoisers, self.backbone.pipe.scheduler):
            self.recordings.pop(candidate, None)
        self.recordings.setdefault(candidate, Recording())
        call = {**self.call, "generator": generator_of(candidate.seed)}
        if self.backbone.family.takes_prompts and not embedded_rows(call):
            call["prompt"] = self.prompt
        interceptor = self._interceptor([candidate], record=False, searches=False, state=self.state)
        output = interceptor.run(call)
        self.noise.add(interceptor.noise)
        if not self._take_latents([candidate], interceptor):
            return None
        return output, self.latents[candidate][None]

    def _interceptor(self, candidates: Sequence[Candidate], kind: Any = Interceptor, **options: Any) -> Any:
        guide = {} if self.guide is None else {"guide": self.guide}
        return kind(self.backbone, candidates, self.recordings, **options, **guide)

    def sample_all(
        self,
        record: bool = True,
        candidates: Iterable[Candidate] | None = None,
        kind: Callable[..., Interceptor] = Interceptor,
        **changes: Any,
    ) -> Iterator[dict[Candidate, Any]]:
        """Sample every candidate of this process to the end; yield the pipeline's output by candidate, per chunk,
        without those that are dropped. candidates: None: all. kind: makes the interceptor of a chunk's call."""
        for chunk in self.chunks(self.candidates if candidates is None else candidates):
            interceptor = self._interceptor(chunk, kind, record=record)
            output = interceptor.run(self.batch_call(chunk, **changes))
            fine = self._take_latents(chunk, interceptor)
            videos = self.backbone.family.videos(output)
            yield {candidate: value for candidate, value in zip(chunk, videos) if candidate in fine}

    def run_to_cut(
        self, candidates: Sequence[Candidate], step: int, keep: int, probed: Mapping[int, bool]
    ) -> list[Candidate]:
        """The best `keep` of the candidates at a cut, best first; each batch in a call of its own that ends there.

        probed: by step, True if the scores are read by a probe, see `cut_rows`.
        """
        scores: dict[Candidate, Sequence[float]] = {}
        levels: list[float] = []

        def on_cut(_step: int, t: float, living: list[Candidate], tokens: Tokens, finite: Tensor) -> None:
            scores.update(self.score(t, living, tokens, finite))
            levels.append(t)

        def sample() -> tuple[dict[Candidate, Sequence[float]], list[float]]:
            for chunk in self.chunks(candidates):
                self._run_until(chunk, {step: probed[step]}, on_cut)
            return scores, levels

        parts = self.team.agree(sample)
        level = next(t for _, part in parts for t in part)
        return self.rank(step, level, merged(part for part, _ in parts), keep, candidates)

    def run_through_cuts(
        self, candidates: list[Candidate], cuts: Sequence[tuple[int, int]], probed: Mapping[int, bool]
    ) -> list[Candidate]:
        """The survivors of all cuts (step, keep), in one call of all the candidates that ends at the last cut."""
        keeps, last, survivors = dict(cuts), cuts[-1][0], candidates

        def on_cut(
            step: int, t: float, living: list[Candidate], tokens: Tokens, finite: Tensor
        ) -> list[Candidate] | None:
            nonlocal survivors
            survivors = self.rank(step, t, self.score(t, living, tokens, finite), keeps[step], living)
            return None if step == last else survivors

        self._run_until(candidates, {step: probed[step] for step in keeps}, on_cut)
        return survivors

    def _run_until(self, candidates: list[Candidate], cuts: Mapping[int, bool], on_cut: OnCut) -> None:
        """One call of the candidates, which `on_cut` must end at one of the cuts."""
        interceptor = self._interceptor(candidates, cuts=cuts, tap=self.judge.taps, on_cut=on_cut)
        if interceptor.run(self.batch_call(candidates, output_type="latent")) is not None:
            raise PrismError(
                f"The pipeline made {interceptor.step - 1} scheduler steps, and the schedule cuts at step {max(cuts)}."
            )

    def _take_latents(self, candidates: list[Candidate], interceptor: Interceptor) -> list[Candidate]:
        """Keep the final latents of the candidates where they are finite; return these candidates, drop the others."""
        latents = interceptor.finished()
        fine = self.finite(candidates, latents.flatten(1).isfinite().all(1))
        self.latents.update({c: row for c, row in zip(candidates, latents) if c in fine})
        return fine

    def predict(self, candidates: Sequence[Candidate], step: int, conditional: bool) -> dict[Candidate, Tensor]:
        """The clean latents (...) that the denoiser predicts at a step, by candidate of this process.

        Each batch is a call of its own that ends after the step. conditional: predict by the conditional pass alone.
        Candidates whose prediction is not finite are dropped.
        """
        predicted: dict[Candidate, Tensor] = {}
        for chunk in self.chunks(candidates):
            predictor = self._interceptor(chunk, Predictor, steps=[step], conditional=conditional)
            predictor.run(self.batch_call(chunk, output_type="latent"))
            fine = self.finite(chunk, (clean := predictor.at(step)).flatten(1).isfinite().all(1))
            found = {candidate: row for candidate, row in zip(chunk, clean) if candidate in fine}
            if self.previews is not None:
                self.previews.add(self.backbone, self.call, step, found, predictor.grid)
            predicted |= found
        return predicted

    def judge_clean(
        self, sample: Callable[[], Mapping[Candidate, Tensor]], t: float, num_draws: int, key: str = "judge"
    ) -> dict[Candidate, list[float]]:
        """Scores by candidate of the clean latents (...) that `sample` makes on each process.

        They are re-noised to level t, all with the same draws, which follow from `key` and the run's seed. Candidates
        whose scores are not finite, or whose latents the judge refuses, are dropped; where it refuses all, that is
        raised.
        """
        refused: dict[Candidate, str] = {}

        def scored(chunk: list[Candidate], latents: Mapping[Candidate, Tensor]) -> dict[Candidate, list[float]]:
            stacked = torch.stack([latents[candidate] for candidate in chunk])
            generator = judging_noise(self.seed, key)
            conditions: dict[str, Any] = {}
            if hasattr(self.judge, "score_tokens") and self.backbone.draws_conditions(self.call):
                conditions["seeds"] = [candidate.seed for candidate in chunk]
            prompts = [self.prompt] * len(chunk)
            try:
                mean, _ = self.judge.score_clean(
                    stacked, prompts, t, num_draws=num_draws, generator=generator, **self.call, **conditions
                )
            except PrismError as error:
                if len(chunk) == 1:
                    refused[chunk[0]] = str(error)
                    return {}
                return {c: row for candidate in chunk for c, row in scored([candidate], latents).items()}
            return self.finite_scores(chunk, mean)

        def judge() -> tuple[dict[Candidate, list[float]], dict[Candidate, str]]:
            latents = sample()
            chunks = self.chunks(latents)
            return {c: row for chunk in chunks for c, row in scored(chunk, latents).items()}, refused

        parts = self.team.agree(judge)
        scores = merged(part for part, _ in parts)
        for candidate, reason in merged(part for _, part in parts).items():
            if not scores:  # all were refused: the cause is not a candidate
                raise PrismError(reason)
            if self.owners[candidate] == self.team.rank:
                self.warn_dropped(candidate, f"the judge refuses it ({reason.rstrip('.')})")
        return scores

    def rank(
        self, step: int, t: float, scores: Mapping[Candidate, Sequence[float]], keep: int, alive: Iterable[Candidate],
        names: Sequence[str] = (), weights: Mapping[str, float] | None = None, look: str | None = None,
        order: Sequence[Candidate] = (),
    ) -> list[Candidate]:  # fmt: skip
        """The best `keep` candidates by weighted score, best first. The cut is added to `self.scores`.

        The recordings of losers are deleted, and the survivors are distributed evenly over the processes.

        Args:
            step, t: step and noise level of the cut, for the record.
            scores: a row of values per candidate.
            keep: number of survivors.
            alive: the candidates before the cut; those without scores were dropped.
            names: the columns of `scores`; by default the judge's dimensions.
            weights: by name; by default the run's.
            look: the latents that were judged, for the record.
            order: all candidates with scores, best first, where their scores alone do not say it.

        Raises:
            PrismError: if fewer than `top_k` candidates have scores.
        """
        names, weights = names or self.judge.dimensions, self.weights if weights is None else weights
        if len(scores) < self.top_k:
            raise self.too_few()
        overall = weighted(scores, names, weights)
        order = list(order) or sorted(scores, key=lambda candidate: (-overall[candidate], candidate))
        best, dropped = order[:keep], sorted(set(alive) - set(scores))
        if len(scores) > len(best) and len(set(overall.values())) == 1 and self.team.rank == 0:
            warnings.warn(
                f"All {len(scores)} candidates have the same score at step {step}, so that the first are kept; see "
                "whether the judge is trained and select_by names what it tells apart.",
                stacklevel=2,
            )
        self.close(step, t, scores, best, order[keep:], dropped, names, look)
        self.share(best)
        return best

    def close(
        self, step: int, t: float, scores: Mapping[Candidate, Sequence[float]], kept: Iterable[Candidate],
        losers: Sequence[Candidate], dropped: Sequence[Candidate], names: Sequence[str] = (), look: Any = "ahead",
    ) -> None:  # fmt: skip
        """Add a cut to `scores`, and delete the recordings of its losers, best first, and of the dropped."""
        self.reserve[:0] = losers
        for loser in {*losers, *dropped}:
            self.recordings.pop(loser, None)
        candidates = sorted(scores)
        columns = {n: [scores[c][i] for c in candidates] for i, n in enumerate(names or self.judge.dimensions)}
        entry = {"step": step, "t": t, "candidates": candidates, "scores": columns, "kept": sorted(kept)}
        self.scores.append({**entry, "dropped": list(dropped), **({} if look is None else {"look": look})})
        if self.watch is not None:
            self.watch.cut(self.scores[-1], {} if self.previews is None else self.previews.videos.get(step, {}))

    def share(self, candidates: Sequence[Candidate]) -> None:
        """Distribute candidates evenly over the processes, with their recordings."""
        before, self.owners = self.owners, self.team.owners(sorted(candidates), self.owners)
        self.team.move(self.recordings, before, self.owners)

    def score(
        self, t: float, candidates: list[Candidate], tokens: Tokens, finite: Tensor
    ) -> dict[Candidate, list[float]]:
        """The judge's scores of candidates at a cut, from their tokens; candidates that are not finite are dropped."""
        if hasattr(self.judge, "check_level"):
            self.judge.check_level(t)
        if len(fine := self.finite(candidates, finite)) < len(candidates):
            tokens = tokens[[candidates.index(candidate) for candidate in fine]]
        return self.finite_scores(fine, self.judge.score_tokens(tokens)) if fine else {}

    def finite(self, candidates: Sequence[Candidate], finite: Tensor) -> list[Candidate]:
        """The candidates whose latents are finite, by `finite` (B,) bool; the others are dropped with a warning."""
        return self._keep(candidates, finite, "its latents hold NaN or infinity (a wider dtype may help)")

    def finite_scores(self, candidates: Sequence[Candidate], scores: Tensor) -> dict[Candidate, list[float]]:
        """The scores (B, num_dimensions) by candidate; candidates with scores that are not finite are dropped."""
        fine = self._keep(candidates, scores.isfinite().all(1), "the judge's score of it is NaN or infinite")
        return {candidate: row for candidate, row in zip(candidates, scores.tolist()) if candidate in fine}

    def _keep(self, candidates: Sequence[Candidate], finite: Tensor, reason: str) -> list[Candidate]:
        for candidate, fine in zip(candidates, finite.tolist()):
            if not fine:
                self.warn_dropped(candidate, reason)
        return [candidate for candidate, fine in zip(candidates, finite.tolist()) if fine]

    def warn_dropped(self, candidate: Candidate, reason: str) -> None:
        """Warn that a candidate is dropped without a score, and why."""
        warnings.warn(f"The candidate with seed {candidate.seed} is dropped: {reason}.", stacklevel=2)

    def too_few(self) -> PrismError:
        """The error for a search in which fewer than `top_k` candidates are left."""
        few = "No candidate has" if self.top_k == 1 else f"Fewer than the {self.top_k} candidates of top_k have"
        seeds = ", ".join(str(c.seed) for c in self.candidates[:8]) + (", ..." if len(self.candidates) > 8 else "")
        return PrismError(
            f"{few} finite latents and scores, of those with the seeds {seeds}; sample in a wider dtype, and check the "
            "judge."
        )
