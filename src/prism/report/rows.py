"""The rows of metrics.json as types."""

from __future__ import annotations

from typing import Any, TypedDict


class HeadSeeds(TypedDict, total=False):
    """The judges behind a row that is the mean over several of them; other rows lack the field."""

    head_seeds: list[int | None]


class _NewerAccuracy(HeadSeeds, total=False):
    """Fields that older files of the schema lack."""

    log_snr: float | None
    decided_pairs: int
    decided_prompts: int
    without_ties_videos_ci95: list[float]
    with_ties_videoalign: float | None


class AccuracyRow(_NewerAccuracy):
    """One row of "accuracy": one judge at one noise level on one dimension."""

    judge: str
    head_seed: int | None
    source: str
    t: float
    set: str
    dimension: str
    without_ties: float | None
    without_ties_ci95: list[float] | None
    with_ties: float | None
    with_ties_validation_threshold: float | None
    with_ties_model_rule: float | None
    pairs: int
    prompts: int


class _Look(TypedDict, total=False):
    """The latents that cuts judged, in rows of runs that look ahead only; the step cache of drafts that have one; the
    guidance of runs that a judge guided, as text."""

    look: str
    draft_cache: str
    guidance_by_judge: str


class PlanFields(_Look):
    """The fields of a Best-of-N row that say how the pipeline was called and how the strategy was run."""

    strategy: str
    num_inference_steps: int
    guidance_scale: float | None
    schedule: list[list[int]] | None
    draft_steps: int | None
    judge_at: float | None


class _MeasuredBestOfN(HeadSeeds, total=False):
    """Fields that only a contest of strategies writes."""

    name: str
    num_draws: int | None
    referee_score: float
    runs_timed: int


class BestOfNRow(_MeasuredBestOfN, PlanFields):
    """One row of "best_of_n": one strategy on one set of prompts.

    The judge is null where nothing judged; gain and share are where no referee measured the candidates.
    """

    judge: str | None
    head_seed: int | None
    n: int
    set: str
    prompts: int
    referee_gain: float | None
    referee_gain_ci95: list[float] | None
    oracle_share: float | None
    oracle_share_ci95: list[float] | None
    denoiser_rows: float
    denoiser_share_of_full: float | None
    vae_decodes: int
    head_calls: int
    seconds: float


class _SingleJudges(TypedDict, total=False):
    """Fields of a comparison of two single judges; older files of the schema lack them."""

    better: int
    worse: int
    mcnemar_p: float


class ComparisonRow(_SingleJudges):
    """One row of "judge_comparison" or "confirmed": the accuracy of one judge minus another's, paired."""

    judge: str
    against: str
    set: str
    t: float
    dimension: str
    difference: float
    ci95: list[float] | None
    pairs: int
    prompts: int


class GeneratorRow(TypedDict):
    """One row of "generators": a judge on the pairs of two generators' clips, or of one generator's.

    The shares are of decided pairs: how often the clip of `model_a` is preferred, by the judge and by people; null
    where both clips are of one generator.
    """

    judge: str
    set: str
    t: float
    dimension: str
    model_a: str
    model_b: str
    pairs: int
    decided_pairs: int
    prompts: int
    without_ties: float | None
    without_ties_ci95: list[float] | None
    judge_share: float | None
    people_share: float | None
    difference: float | None
    difference_ci95: list[float] | None


class ReliabilityRow(TypedDict):
    """One row of "reliability": a judge's probabilities of A, tie and B (Eq. 3-4) against the labels.

    nll is the mean cross-entropy in nats, nll_of_shares that of one who knows the shares of ties and of preferences
    alone. Errors are expected calibration errors of P(preferred) and P(tie) in bins of as many pairs each; by_chance is
    the former's mean if the probabilities were right. curve: [mean probability, share that came true, number] per bin.
    refitted: temperature, eta, nll and calibration_error of a calibration that fits the validation pairs.
    """

    judge: str
    set: str
    t: float
    dimension: str
    temperature: float
    eta: float
    pairs: int
    soft_pairs: int
    nll: float
    nll_ci95: list[float] | None
    nll_of_shares: float
    calibration_error: float
    calibration_error_by_chance: float
    tie_calibration_error: float
    curve: list[list[float]]
    tie_curve: list[list[float]]
    refitted: dict[str, float] | None


class BiasRow(TypedDict):
    """One row of "biases": how often the longer, brighter, ... clip is preferred, by a judge and by people."""

    judge: str
    set: str
    t: float
    dimension: str
    probe: str
    unit: str
    pairs: int
    prompts: int
    judge_share: float
    judge_share_ci95: list[float] | None
    people_share: float
    people_share_ci95: list[float] | None
    difference: float
    difference_ci95: list[float] | None


class SwapRow(TypedDict):
    """One row of "swap": pairs that were scored as (A, B) and as (B, A).

    flipped: pairs of which another clip was preferred; largest_difference: of margin(A, B) + margin(B, A).
    """

    judge: str
    set: str
    t: float
    pairs: int
    flipped: int
    largest_difference: float


class AttentionRow(TypedDict):
    """One row of "attention": the share of attention that falls on objects, at one level, in some candidates.

    lift: `attention_share` over `area_share`; null where there are no cells of objects.
    """

    t: float
    candidates: str
    referee: float
    attention_share: float
    area_share: float
    video_share: float
    lift: float | None
    lift_ci95: list[float] | None
    prompts: int


class ClaimRow(TypedDict):
    """One row of "bars": a limit that a full run is held to; `met` is null where it was not measured."""

    bar: str
    reached: str
    met: bool | None


class _NewerCut(TypedDict, total=False):
    """Fields that older files of the schema lack."""

    dropped: list[int]


class CutRow(_NewerCut):
    """One row of "cuts": one cut of the run that is shown. `scores` decide; candidates are their keys, as text."""

    name: str
    step: int
    t: float | None
    scores: dict[str, float]
    dimensions: dict[str, list[float]]
    kept: list[int]


class Agreement(TypedDict):
    """The field "agreement": strategies run separately, compared with the run that all share."""

    prompts: int
    runs: int
    same_pick: int
    largest_difference: float


class StudyRow(TypedDict):
    """One row of "study": the accuracy of one variant of a recipe, and its difference from the recipe's."""

    variant: str
    question: str
    what: str
    train: dict[str, Any]
    head: dict[str, Any]
    set: str
    dimension: str
    accuracy: float
    accuracy_ci95: list[float] | None
    difference: float
    difference_ci95: list[float] | None
    spread: float | None
    judges: int
    by_level: dict[str, float]
    by_dimension: dict[str, float]
    pairs: int
    prompts: int


class CalibrationRow(TypedDict):
    """One row of a study's "calibration": one variant on one dimension."""

    variant: str
    dimension: str
    temperature: float
    eta: float
    nll_before: float
    nll_after: float
    calibration_error_before: float
    calibration_error_after: float


class SummaryRow(TypedDict):
    """One main number of a run, and its interval."""

    what: str
    value: float | None
    ci95: list[float] | None


class BesideRow(SummaryRow):
    """The same, with the full run's number and interval."""

    full: float | None
    full_ci95: list[float] | None


class Summary(TypedDict):
    """The main numbers of a run on `prompts` prompts, by `judges` judges."""

    prompts: int
    judges: int
    rows: list[SummaryRow]


class Beside(TypedDict):
    """The field "beside": a run's main numbers beside the full run's."""

    prompts: int
    judges: int
    rows: list[BesideRow]
    full_prompts: int
    full_judges: int


class SightRow(TypedDict):
    """One row of "sight": the judge's pairwise accuracy at a cut, on all pairs of a prompt's candidates.

    look: "now" (latents as they stand) or "ahead". share, prompts: of the run; shipped: of the table of scores that
    ships, None where it does not hold that reading.
    """

    look: str
    step: int
    t: float
    share: float
    share_ci95: list[float] | None
    prompts: int
    shipped: float | None
    shipped_ci95: list[float] | None
    shipped_prompts: int


class MatchedRow(TypedDict):
    """One row of "matched": an arm at a budget, measured on `prompts` prompts.

    schedule: of the steps: plain, few or few-stochastic. dictionary: "replayed" or "measured", where the planner has it
    (with --measured), or "". n: its candidates. share: mean gain over that of the best of the first eight seeds.
    over_plan, over_full: the share less that of the planner's plan, and of full Best-of-N, at this budget; None where
    there is none, or it is the same arm. cost: denoiser rows over one plain sample's. judging_rows: those of them for
    judging clean latents, in closed form. seconds, seconds_p95: of the `runs_timed` runs by themselves. diversity: the
    distance of two seeds' winners over that of two plain samples. same_pick: of `compared` runs by themselves those
    that picked what the shared run says.
    """

    schedule: str
    arm: str
    dictionary: str
    budget: float
    n: int
    prompts: int
    share: float
    share_ci95: list[float] | None
    over_plan: float | None
    over_plan_ci95: list[float] | None
    over_full: float | None
    over_full_ci95: list[float] | None
    cost: float
    denoiser_rows: float
    judging_rows: float
    vae_decodes: float
    seconds: float | None
    seconds_p95: float | None
    runs_timed: int
    diversity: float | None
    same_pick: int
    compared: int


class AnswerRow(TypedDict):
    """A claim and its answer: source (in the paper), verdict, number (with its interval, in words), seeds of the heads,
    prompts that intervals are taken over, command that repeats it alone, and minutes that it took."""

    experiment: str
    claim: str
    source: str
    verdict: str
    number: str
    text: str
    seeds: list[int]
    prompts: int
    command: str
    minutes: float
