"""`prism sample`: Best-of-N for one prompt, with its video, ledger and report."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from prism import files, runs
from prism.commands import show, speaks
from prism.commands.budgets import filed_plan, parse_budget
from prism.commands.options import Adapted, Head, Replacing, in_flags, option, recorded
from prism.commands.sampled import loser_of, named_cut, notes_of, preview_strips, refereed, row_of, stopped, written
from prism.errors import PrismError, number, quoted, whole


@dataclass(frozen=True)
class Sampling(Adapted):
    """Models, and where they are kept."""

    head: Head = None


@dataclass(frozen=True)
class Call:
    """Arguments of the pipeline's call; by default those of call.json beside the backbone, or its own."""

    num_inference_steps: Annotated[int | None, option(default="", name="steps")] = None
    """Denoising steps."""
    guidance_scale: Annotated[float | None, option(default="")] = None
    """Classifier-free guidance; 1 turns it off."""
    height: Annotated[int | None, option("PIXELS", "")] = None
    """Height."""
    width: Annotated[int | None, option("PIXELS", "")] = None
    """Width."""
    num_frames: Annotated[int | None, option(default="")] = None
    """Frames."""
    negative_prompt: Annotated[str | None, option("TEXT", "")] = None
    """What the video should not show."""
    image: Annotated[str | None, option("FILE", "")] = None
    """Image to start from."""
    last_image: Annotated[str | None, option("FILE", "")] = None
    """Image to end with."""
    video: Annotated[str | None, option("FILE", "")] = None
    """Video to start from."""


@dataclass(frozen=True)
class Sample:
    """Sample one good video: N seeds in, losers dropped early, one decoded.

    Writes winner.mp4 (a picture: winner.png, a sound: winner.wav), metrics.json, config.json and the report. Under
    torchrun or accelerate launch the processes share the candidates.
    """

    output: Replacing
    prompt: Annotated[str | None, option("TEXT", "none: of pipelines that take an image alone")] = None
    """What the video should show."""
    n: Annotated[int | None, option(default="8, or the plan's")] = None
    """Candidates; candidate i has seed SEED + i."""
    until: Annotated[float | None, option("P", "")] = None
    """Go on in rounds of --n until the winner is preferred to a clip of the head's reference with probability P."""
    max_n: Annotated[int | None, option(default="8 rounds")] = None
    """Candidates at most, with --until."""
    plan: Annotated[Path | None, option("FILE", "")] = None
    """Plan of prism plan (plan.json, or its folder), in place of strategy, schedule, look, judge-at and the like."""
    budget: Annotated[str | None, option("X", "")] = None
    """Cost of the run: in plain samples (2), denoiser rows (200rows) or seconds (30s). The plan for it is taken from
    --plan, else from the head's plans, else the default cut is, with as many candidates as it pays for."""
    strategy: Annotated[str, option("NAME")] = "early"
    """early: drop losers while sampling. race: look ahead until sure. draft: judge coarse runs. full: judge finished
    ones. random, none: none. fk, beam, evolution, prune, zero-order: let the best part on the way."""
    schedule: Annotated[str | None, option("CUTS", "1 after a fifth of the steps")] = None
    """Cuts of early as STEP:KEEP,... with steps from 1; 3:4,6:1 keeps the best 4 at step 3, 1 at step 6."""
    look: Annotated[str | None, option("NAME", "ahead where the head is measured to see too little, else now")] = None
    """What early judges at a cut. now: the noisy latents. ahead: the clean ones that the denoiser predicts there.
    ahead-conditional: as its conditional pass alone predicts them, so that losers take no other. Or a list, one per
    cut: ahead,now."""
    draft_steps: Annotated[int | None, option(default="15 % of the steps")] = None
    """Steps of a draft; with --draft-cache, by default all."""
    draft_cache: Annotated[str | None, option("CACHE", "none")] = None
    """What drafts leave out: first-block:0.06, taylorseer:4 (a step cache with its number), guidance:0.5, or both."""
    judge_at: Annotated[float | None, option("T", "700")] = None
    """Noise level at which draft, full and looks ahead judge, above 0 (clean) to 1000 (noise)."""
    num_draws: int = 2
    """Noise draws that draft, full and looks ahead average over."""
    guidance_by_judge: Annotated[str | None, option("STRENGTH", "none")] = None
    """After each step push the latents along the gradient of the judge's score: 0.1 is a tenth of the step. Settings
    follow: 0.1,look=ahead,steps=2-10,clip=3. Of none, random, early and full."""
    select_by: Annotated[str, option("NAME")] = "overall"
    """Dimension that decides, or weights: VQ:1,MQ:0.5,TA:2."""
    seed: Annotated[str, option("INT")] = "0"
    """Seed of the first candidate; random: one is drawn."""
    batch_size: Annotated[int | None, option(default="all, or 1 above 0.5 billion parameters")] = None
    """Candidates sampled at once. 1: the video equals the stock pipeline's to the bit; more: to rounding."""
    top_k: int = 1
    """How many of the best to finish: winner-2.mp4, ..."""
    fps: float = 8.0
    """Frames per second of the mp4, 0.1 to 240; one with a sound has those of the call's frame_rate."""
    previews: bool = False
    """Decode and show in the report what the denoiser predicts of every candidate at cuts that look ahead."""
    models: Sampling = Sampling()
    call: Call = Call()

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that options set."""
        return {name: value for name, value in asdict(self.call).items() if value is not None}

    def settings(self, cuts: Any) -> dict[str, Any]:
        """The settings of the strategy, with the cuts of --schedule."""
        look = self.look.split(",") if self.look and "," in self.look else self.look
        names = ("draft_steps", "draft_cache", "judge_at", "num_draws")
        return {"schedule": cuts, "look": look, **{name: getattr(self, name) for name in names}}

    def main(self) -> None:
        """Sample, and say which candidate won."""
        metrics = run(self)
        if metrics is None:  # the first process of this run writes and prints
            return
        seeds, out = metrics["seeds"], self.output.out
        among = f" (of seeds {seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else ""
        parted = ", parted on the way" if metrics["edits"] else ""
        print(f"The winner is seed {seeds[metrics['winner']]}{among}{parted}: {out / metrics['top'][0]['video']}")
        if metrics["until"]:
            print(stopped(metrics["until"], metrics["until"]["n"]))
        if metrics["referee_note"]:
            print(metrics["referee_note"])
        show(metrics, out)


class Loaded(NamedTuple):
    """Models of runs that share them: a backbone, the arguments of its call, its name, and the judge on it."""

    backbone: Any
    call: Mapping[str, Any]
    name: str
    judge: Any


def run(config: Sample, loaded: Loaded | None = None, watch: Any = None) -> dict[str, Any] | None:
    """Sample and write the winner, metrics.json, config.json and report.html to `out`; returns the metrics.

    loaded: models, in place of those that the config names. watch: a `prism.sampling.previews.Watch` of the run, in
    place of a bar of its progress; it gets previews where there are any.

    Under `torchrun` or `accelerate launch` the processes share the candidates; the first one writes, the others return
    None.
    """
    from prism.sampling import plan as schedules
    from prism.team import Team

    if config.plan is not None or config.budget is not None:
        _check_planned(config)
    elif config.n is None:
        config = replace(config, n=8)
    cuts = None if config.schedule is None else schedules.parse(config.schedule)
    weights = parse_weights(config.select_by)
    _check(config, cuts)
    team = Team.gathered() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Team()
    distribute = None if team.alone else "candidates"
    if team.rank > 0:
        _sample(config, cuts, weights, distribute, loaded, watch)
        return None
    with runs.new(config.output.out, config.output.overwrite, "sample") as folder:
        from prism.loading import describe
        from prism.report.metrics import document, write_config
        from prism.report.page import FilmRow, FilmStrip, write_report

        backbone, name, judge, call, weights, result, ran = _sample(config, cuts, weights, distribute, loaded, watch)
        names, videos = written(folder, backbone, result.top, config.fps, call)
        referees: list[Any] = [(None, "")] * len(names)
        if config.models.backbone is None:
            referees = [refereed(video, config.prompt) for video in videos]
        scores, sentence = referees[0]
        seed = result.seeds[0]
        write_config(folder / "config.json", {**recorded(replace(config, seed=str(seed))), "call": call, "seed": seed})
        metrics = document(
            "sample",
            describe(backbone, name),
            seed,
            best_of_n=[row_of(ran, backbone, judge, call, result, config.num_draws)],
            timings={**result.ledger.parts, "total": result.ledger.seconds},
            prompt=config.prompt,
            dtype=str(backbone.dtype).removeprefix("torch."),
            offload=config.models.offload,
            loras=list(config.models.loras),
            seeds=list(result.seeds),
            winner=result.index,
            top=[
                {"candidate": pick.index, "seed": pick.seed, "video": file, "referee": measured}
                for pick, file, (measured, _) in zip(result.top, names, referees)
            ],
            referee=scores,
            referee_note=sentence,
            cuts=[named_cut(cut, ran.strategy, weights) for cut in result.scores],
            until=None if result.stop is None else {**asdict(result.stop), "n": ran.n},
            edits=[[edit.step, edit.seed, edit.weight] for edit in result.top[0].edits],
            reproduce=result.reproduce,
            ledger=result.ledger.to_dict(),
        )
        files.write_json(folder / "metrics.json", metrics)
        rows = [
            FilmRow(
                "winner" if pick is result.top[0] else Path(file).stem,
                video,
                f"seed {pick.seed}" + (f", referee {measured['overall']:.2f}" if measured else ""),
                picked=pick is result.top[0],
            )
            for pick, file, video, (measured, _) in zip(result.top, names, videos, referees)
        ]
        caption = "The losers were not finished; --top-k finishes the next best beside the winner."
        if config.models.backbone is None and judge and len(rows) == 1:
            loser = loser_of(backbone, str(config.prompt), call, metrics)
            rows += loser
            caption = "The loser was finished for this page alone; that is not in the costs." if loser else ""
        subject = (
            config.prompt or Path(str(config.arguments.get("image") or config.arguments.get("video") or name)).name
        )
        strip = FilmStrip(f"“{subject}”", rows, caption if len(rows) < len(result.seeds) else "", rows, config.fps)
        title = f"The best of {len(result.seeds)}: {subject}"
        config_written = files.read_json(folder / "config.json")
        notes = (
            *(notes_of(result, ran.n or 1, config.guidance_by_judge) if judge else ()),
            *([sentence] if sentence else []),
        )
        shown = preview_strips(result, metrics["cuts"], config.fps)
        write_report(
            folder / "report.html", metrics, [strip] if rows else [], title, notes, config_written, previews=shown
        )
    return metrics


def _sample(
    config: Sample, cuts: Any, weights: Mapping[str, float], distribute: Any, loaded: Loaded | None, watch: Any
) -> tuple[Any, ...]:
    """Sample; return the backbone, its name, the judge (None for strategies without one), the pipeline's call, the
    weights of dimensions by which candidates are ranked, the result, and the options with those of a plan filled in.
    """
    from prism.loading import load_backbone, load_judge
    from prism.sampling import best_of_n, ranking
    from prism.sampling.guidance import parse
    from prism.sampling.strategies import kind_of

    models = config.models
    if loaded is None:
        backbone, call, name = load_backbone(models.backbone, models.device, models.dtype, models.offload, models.loras)
    else:
        backbone, call, name = loaded.backbone, dict(loaded.call), loaded.name
    if backbone.family.takes_prompts and not config.prompt:
        raise PrismError(f"{type(backbone.pipe).__name__} needs a prompt; give --prompt.")
    parameters = inspect.signature(type(backbone.pipe).__call__).parameters
    for argument, what in (("image", "an image"), ("video", "a video")):
        if (
            argument in parameters
            and parameters[argument].default is inspect.Parameter.empty
            and not {**call, **config.arguments}.get(argument)
        ):
            raise PrismError(f"{type(backbone.pipe).__name__} starts from {what}; give --{argument} FILE.")
    guidance = None if config.guidance_by_judge is None else parse(config.guidance_by_judge)
    judged = kind_of(config.strategy).needs_judge() or config.until is not None or guidance is not None
    judge = None
    if judged:
        judge = loaded.judge if loaded else load_judge(models.head, backbone, embedded=models.backbone is None)
    call = {**call, **config.arguments}
    if judge and weights == {"overall": 1.0}:
        weights = ranking(judge, "overall")
    settings = {"strategy": config.strategy, **config.settings(cuts)}
    if config.plan is not None or config.budget is not None:
        filed = filed_plan(config.plan, config.budget, backbone, judge, call, config.prompt)
        plan, n = filed.run.plan, filed.run.n if config.n is None else config.n
        if speaks():
            print(filed.sentence())
        changes = {name: getattr(plan, name, getattr(config, name)) for name in ("judge_at", "num_draws")}
        config, settings = replace(config, strategy=plan.strategy, n=n, **changes), {"plan": plan}
    with in_flags("until"):
        result = best_of_n(
            backbone.pipe,
            judge,
            config.prompt,
            n=config.n,
            until=config.until,
            max_n=config.max_n,
            seed=_seed(config.seed),
            batch_size=config.batch_size,
            top_k=config.top_k,
            select_by=weights,
            previews=config.previews or (False if watch is None else None),
            watch=watch,
            guidance_by_judge=guidance,
            distribute=distribute,
            progress=watch is None,
            **settings,
            **{**call, "output_type": "np"},
        )
    return backbone, name, judge, call, weights, result, config


def parse_weights(text: str) -> dict[str, float]:
    """Weights of dimensions: overall gives {"overall": 1.0}, VQ:1,MQ:0.5 gives {"VQ": 1.0, "MQ": 0.5}."""
    if ":" not in text:
        return {text: 1.0}
    try:
        parts = [part.split(":") for part in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in parts}
        if len(weights) < len(parts):  # a dimension is named twice
            raise ValueError
    except ValueError:
        raise PrismError(
            f'The --select-by "{quoted(text, 120)}" is neither a dimension nor a list such as VQ:1,MQ:0.5.'
        ) from None
    for name, weight in weights.items():
        number(f"The weight of {quoted(name, 40)} in --select-by", weight)
    return weights


def _seed(text: str) -> int | None:
    """The seed as a number; None for "random"."""
    if text == "random":
        return None
    try:
        return int(text)
    except ValueError:
        raise PrismError(f'--seed must be a whole number, or "random"; found {quoted(text, 60)}.') from None


def _check_planned(config: Sample) -> None:
    """Refuse options that a plan or a budget decides, and what is no plan or no budget."""
    from prism.sampling import plan_files

    decides = "--budget" if config.plan is None else "--plan"
    for name in ("strategy", "schedule", "look", "draft_steps", "draft_cache", "judge_at", "num_draws"):
        if getattr(config, name) != getattr(Sample, name):
            option = f"--{name.replace('_', '-')}"
            raise PrismError(f"The {decides} decides what {option} says; leave {option} out.")
    if config.budget is not None and config.n is not None:
        raise PrismError("The --budget decides how many candidates there are; leave --n out.")
    budget = None if config.budget is None else parse_budget(config.budget)
    if budget is None or budget.unit == "":
        plan_files.opened(config.plan, None if budget is None else budget.value)


def _check(config: Sample, cuts: Any) -> None:
    from prism import video as media
    from prism.sampling import guidance
    from prism.sampling.step_cache import parse
    from prism.sampling.stopping import probability
    from prism.sampling.strategies import kind_of, plan_of

    if config.draft_cache is not None:
        parse(config.draft_cache)
    if config.guidance_by_judge is not None:
        guidance.parse(config.guidance_by_judge)
        guidance.check_guided(kind_of(config.strategy))
    if kind_of(config.strategy).needs_oracle():
        raise PrismError(
            f"The strategy {config.strategy} needs a measured truth, which sampling lacks; choose another --strategy."
        )
    with in_flags():
        plan_of(config.strategy, **config.settings(cuts), until=config.until)
    if config.until is not None:
        probability("--until", config.until)
    elif config.max_n is not None:
        raise PrismError("The --max-n bounds the candidates of a run with --until; give --until, or leave --max-n out.")
    number("--fps", config.fps, *media.FPS)
    n = whole("--n", 1 if config.n is None else config.n, 1, 10_000)
    for flag, value, low, high in (
        ("--top-k", config.top_k, 1, None if config.n is None else n),
        ("--max-n", config.max_n, n, 10_000),
        ("--num-draws", config.num_draws, 1, 1000),
        ("--batch-size", config.batch_size, 1, None),
        ("--draft-steps", config.draft_steps, 1, 10_000),
        ("--seed", _seed(config.seed), 0, 2**63 - n),
        ("--steps", config.arguments.get("num_inference_steps"), 1, 10_000),
        ("--height", config.arguments.get("height"), 1, 16_384),
        ("--width", config.arguments.get("width"), 1, 16_384),
        ("--num-frames", config.arguments.get("num_frames"), 1, 10_000),
    ):
        if value is not None:
            whole(flag, value, low, high)
    if config.judge_at is not None:
        number("--judge-at", config.judge_at, 0, 1000, above=True)
    if config.arguments.get("guidance_scale") is not None:
        number("--guidance-scale", config.arguments["guidance_scale"], -100, 1000)
    if config.models.backbone is None and not (config.prompt or "").strip():
        raise PrismError("The embedded model needs a prompt; give --prompt.")
    for name in ("image", "last_image", "video"):
        if config.arguments.get(name) is not None and not os.path.isfile(str(config.arguments[name])):
            flag = name.replace("_", "-")
            raise PrismError(f"The --{flag} {quoted(str(config.arguments[name]), 200)} is no file; give a local one.")
