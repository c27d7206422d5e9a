"""The demo: replay what a budget buys, pick the best of 8 on unseen prompts, measure the judge by noise level.

`DemoConfig()` takes minutes: the head that ships judges, and a small one is trained for show. `FULL` takes an hour or
more on two cores, in parts that survive a kill: it trains its own heads and runs every strategy.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import prism
from prism import files, runs, shapeworld, temporary, video
from prism.errors import SEEDS, whole
from prism.lab import claims, front, origins, per_prompt
from prism.lab import contest as strategies
from prism.loading import check_alone, describe, load_backbone
from prism.report import plan_page
from prism.report.metrics import cut_entry, document, write_config
from prism.report.page import write_evidence, write_report
from prism.report.rows import ClaimRow
from prism.runs import IDENTITY, Clock, Parts, claim
from prism.training.config import RESULTLESS, TrainConfig

TRAIN = TrainConfig(
    steps=400, prompts_per_step=4, learning_rate=5e-4, schedule="cosine", warmup_steps=20, checkpoint_every=0
)
Schedule = tuple[tuple[int, int], ...]
FRESH = "trained now"  # the name of a judge that is trained beside the shipped one


@dataclass(frozen=True)
class DemoConfig:
    """All settings of a demo, fixed before it runs. taps: the block that each of a trained judge's heads reads; the
    judge averages their scores."""

    seed: int = 0
    full: bool = False
    fresh: bool = False
    front: bool = True  # replay plans on the table of scores that ships
    shipped: bool = True  # the head that ships judges; what is trained is measured beside it
    n: int = 8
    prompts: int = 40  # of the test split, for Best-of-N
    labelled: int = 0  # candidates sampled per test prompt to measure accuracy on; 0: the store's test candidates
    unseen: int = 0  # prompts outside the training domain, for accuracy and Best-of-N
    train_prompts: int = 0  # prompts whose candidates are sampled to train on; 0: the store that ships
    judges: int = 1  # with seeds seed, seed + 1, ...
    alone: int = 2  # test prompts on which each strategy is also run separately
    taps: tuple[int, ...] = (4, 5)
    dim: int = 144
    train: TrainConfig = TRAIN
    fresh_levels: tuple[float, ...] = (899, 699, 499, 99)  # noise levels at which a head beside the shipped is measured
    pixel: bool = True
    pixel_steps: int | None = None  # training steps of pixel judges, if they are trained; None: the default
    # Noise levels that pixel judges are measured at, each of which costs a decode per video; (): all levels.
    pixel_levels: tuple[float, ...] = (699,)
    schedule: Schedule = ((4, 1),)
    schedules: tuple[Schedule, ...] = (((3, 1),), ((6, 1),))  # the curve's other points
    ahead: tuple[Schedule, ...] = (((3, 1),),)  # schedules that look ahead
    draft_steps: int | None = None  # None: no drafts
    drafts: tuple[int, ...] = ()
    judge_at: float = 700.0
    num_draws: int = 3
    look_at: tuple[float, ...] = (699,)
    strips: int = 2  # prompts shown in the report with the attention of the query


FULL = DemoConfig(
    full=True,
    shipped=False,
    prompts=200,
    labelled=6,
    unseen=40,
    train_prompts=1600,
    judges=3,
    alone=6,
    train=replace(TRAIN, steps=2000, prompts_per_step=8),
    schedules=(((2, 1),), ((3, 1),), ((5, 1),), ((6, 1),), ((8, 1),), ((2, 4), (4, 1)), ((3, 4), (6, 1))),
    draft_steps=3,
    drafts=(2, 4, 5, 6),
    look_at=(899, 699, 499),
    pixel_levels=(),
    strips=4,
)


def plans(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """The arguments of `best_of_n` by row of the table; the other schedules and draft lengths after the main ones."""
    clean = {"judge_at": config.judge_at, "num_draws": config.num_draws}
    by_name: dict[str, dict[str, Any]] = {
        "none": {"strategy": "none"},
        "random": {"strategy": "random"},
        "early": {"strategy": "early", "schedule": config.schedule},
        "draft": {"strategy": "draft", "draft_steps": config.draft_steps, **clean},
        "full": {"strategy": "full", **clean},
        "oracle": {"strategy": "oracle"},
    }
    if config.draft_steps is None:
        del by_name["draft"]
    for cuts in (*config.schedules, *config.ahead):
        name = "early " + ",".join(f"{step}:{keep}" for step, keep in cuts)
        if cuts in config.ahead:
            by_name[f"{name} ahead"] = {"strategy": "early", "schedule": cuts, "look": "ahead", **clean}
        if cuts in config.schedules:
            by_name[name] = {"strategy": "early", "schedule": cuts}
    for steps in config.drafts:
        by_name[f"draft {steps}"] = {"strategy": "draft", "draft_steps": steps, **clean}
    return by_name


def run(
    out: Path,
    full: bool = False,
    fresh: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
    config: DemoConfig | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the demo and write metrics.json, report.html, winner.mp4, config.json and the trained head to `out`, for a
    full run also evidence/; return the metrics. config.json also holds the `options` of the command line.

    The parts of a full run lie in `<out>.parts` until it is done; a run that was killed continues from there.
    """
    check_alone("demo")
    whole("--seed", seed, 0, SEEDS)
    config = replace(config or (FULL if full else DemoConfig()), seed=seed, fresh=fresh)
    if batch_size is not None:
        config = replace(config, train=replace(config.train, max_rows=batch_size))
    runs.check(out, overwrite, "demo")
    with contextlib.nullcontext() if config.full else temporary.scratch(out) as scratch:
        folder = runs.parts_of(out) if scratch is None else scratch / "parts"
        return _run(out, folder, config, overwrite, device, options)


def _run(
    out: Path, parts_folder: Path, config: DemoConfig, overwrite: bool, device: str | None, options: Any
) -> dict[str, Any]:
    from prism.backbone.fingerprint import VERSIONED
    from prism.lab import attention, judges
    from prism.lab.contest import JointJudge
    from prism.preference import LatentStore
    from prism.shapeworld import candidates

    started, seed = time.perf_counter(), config.seed
    timings: dict[str, float] = {}
    backbone, call, name = load_backbone(device=device)
    samples_data = config.fresh or config.train_prompts  # unless fresh, the shipped prompts and seeds come first
    shipped = None if samples_data else LatentStore.open(shapeworld.asset_folder("candidates"))
    changeable = (*(f"config.train.{name}" for name in RESULTLESS), *(f"backbone.{name}" for name in VERSIONED))
    run_identity = identity(config, backbone, call, shipped)
    parts = claim(parts_folder, run_identity, True, overwrite, name=IDENTITY, changeable=changeable)

    def seconds(name: str, *prefixes: str) -> None:
        paths = [path for prefix in prefixes for path in sorted(parts_folder.glob(f"{prefix}*.json"))]
        timings[name] = sum(files.read_json(path)["seconds"] for path in paths)

    def sampled(name: str, folder: str, shares: dict[str, tuple[int, int]], seed: int) -> LatentStore:
        def make() -> None:
            if not (parts_folder / folder).is_dir():  # a run may have been killed just after it wrote the folder
                candidates.run(parts_folder / folder, shares, seed=seed, backbone=backbone)

        parts.once(name, make)
        return LatentStore.open(parts_folder / folder)

    if shipped is None:
        prompts, each = candidates.SHIPPED["train"]
        shares = {**candidates.SHIPPED, "train": (config.train_prompts or prompts, each)}
        store = sampled("data", "candidates", shares, seed + 1 if config.fresh else seed)
    else:
        store = shipped
    _say(config, f"training {config.judges} judge{'s' if config.judges > 1 else ''}, {config.train.steps} steps")
    trained = [
        judges.trained(parts, store, backbone, config.taps, config.dim, config.train, seed + k)
        for k in range(config.judges)
    ]
    ours = [judge for judge, _ in trained]
    fresh: list[Any] = []
    if config.shipped:
        ours, fresh = [judges.shipped(backbone)], [(judge, config.fresh_levels) for judge in ours]
        for judge, _ in fresh:
            judge.name = FRESH
    others = []
    if config.pixel:
        others = judges.pixel_judges(parts, store, backbone, config.fresh or config.full, seed, config.pixel_steps)
    tested = store
    if config.labelled:  # validation prompts too: the threshold of ties comes from them
        shares = {"test": (config.prompts, config.labelled), "validation": (min(config.prompts, 40), config.labelled)}
        tested = sampled("test-data", "test-store", shares, seed + 3)
    levels_and_rows = config.pixel_levels, config.train.max_rows, fresh
    _say(config, "measuring judges by noise level")
    accuracy, comparison, measured = judges.measured(parts, tested, ours, others, "test", seed, *levels_and_rows)
    joint, played = JointJudge(ours), plans(config)
    records = contests(parts, joint, config, "test", config.prompts, 10_000 * (seed + 1), call)
    contested = {"test": records}
    head_seeds = [judge.trained_on["seed"] for judge in ours]
    picks = strategies.rows(records, played, head_seeds, call, "test", seed)
    if config.unseen:
        unseen_store = sampled("unseen-data", "unseen-store", {"unseen": (config.unseen, 8)}, seed + 2)
        on_unseen = judges.measured(parts, unseen_store, ours, others, "unseen", seed, *levels_and_rows)
        unseen_records = contests(parts, joint, config, "unseen", config.unseen, 10_000_000 * (seed + 1), call)
        accuracy, comparison = accuracy + on_unseen[0], comparison + on_unseen[1]
        measured = measured + on_unseen[2]
        contested["unseen"] = unseen_records
        picks += strategies.rows(unseen_records, played, head_seeds, call, "unseen", seed, measured=records)

    _say(config, "replaying plans, and making the page")
    replayed = front.replay(front.shipped(), seed) if config.front else None
    seen = front.sight(records, None if replayed is None else replayed.table, seed)
    strips, played_again = [], []
    for which, entry in attention.chosen_prompts(records, "early"):
        contest = make_contest(joint, config, entry["prompt"], entry["seeds"], call, ("early", "full"))
        strips += attention.candidates(contest, "early", which)
        played_again.append((entry, contest))
    shown, contest = played_again[len(played_again) // 2]  # the median gain's video is the run's
    result = contest.play("early", 0)
    looked = [{**record, "values": record["values"]["overall"]} for record in records]
    level = sorted(config.look_at)[len(config.look_at) // 2]
    looks = attention.looks(ours[0], attention.widest(records, config.strips), level, call, seed)
    for name, prefixes in {
        "data": ("data", "test-data", "unseen-data"),
        "train": ("train-[0-9]",),
        "train pixel judges": ("train-pixel",),
        "evaluate": ("accuracy/",),
        "best of n": ("test/", "unseen/"),
    }.items():
        seconds(name, *prefixes)
    metrics = document(
        "demo",
        describe(backbone, name),
        seed,
        accuracy=accuracy,
        best_of_n=picks,
        timings={**timings, "total": sum(timings.values()), "this process": time.perf_counter() - started},
        judge_comparison=comparison,
        **({} if replayed is None else front.fields(replayed)),
        sight=seen,
        training=[summary for _, summary in trained],
        agreement=strategies.agreement(records),
        attention=attention.rows(looked, seed),
        bars=_claims(config, comparison, picks, records),
        prompt=shown["prompt"],
        seeds=list(result.seeds),
        winner=result.index,
        cuts=[cut_entry(cut, "early", {"overall": 1.0}) for cut in result.scores],
        ledger=result.ledger.to_dict(),
    )
    metrics["beside"] = None if config.full else claims.beside(metrics)
    metrics["origins"] = origins.rows(config, metrics)
    with runs.new(out, overwrite, "demo") as folder:
        _publish(folder, parts_folder, config, metrics, {**asdict(config), "call": call, "options": options or {}})
        video.write_video(folder / "winner.mp4", result.video, shapeworld.FPS)
        written = files.read_json(folder / "config.json")
        title = "PRISM: the best of eight, chosen early"
        shown_first = [] if replayed is None else [front.section(metrics, replayed)]
        write_report(
            folder / "report.html",
            metrics,
            strips,
            title,
            claims.notes(metrics),
            written,
            looks=looks,
            sections=[*shown_first, *([front.sight_section(seen)] if seen else []), origins.section(metrics)],
            cards=[] if replayed is None else plan_page.cards(metrics)[-1:],
        )
        per_prompt.write_values(folder / "per_prompt", measured, contested, head_seeds)
        if config.full:
            write_evidence(folder / "evidence", metrics, written, _command(out, config))
            shutil.copytree(folder / "per_prompt", folder / "evidence" / "per_prompt")
    if config.full:
        parts.remove()
    return metrics


def identity(config: DemoConfig, backbone: Any, call: dict[str, Any], shipped: Any) -> dict[str, Any]:
    """All that the parts of a demo depend on. shipped: the store that it trains on; None where it samples one."""
    from prism.preference.store import store_identity

    return {
        "config": json.loads(json.dumps({**asdict(config), "call": call})),
        "backbone": backbone.fingerprint(),
        "store": None if shipped is None else store_identity(shipped),
        "version": prism.__version__,
    }


def make_contest(
    joint: Any,
    config: DemoConfig,
    prompt: str,
    seeds: Sequence[int],
    call: dict[str, Any],
    names: Sequence[str] | None = None,
) -> Any:
    """The contest of a prompt, with all plans or those of `names`."""
    from prism.lab.contest import Contest
    from prism.shapeworld import referee

    played = {name: plan for name, plan in plans(config).items() if names is None or name in names}
    return Contest(joint, referee.batch, prompt, seeds, played, call, config.seed)


def contests(
    parts: Parts, joint: Any, config: DemoConfig, split: str, count: int, first_seed: int, call: dict[str, Any]
) -> list[dict[str, Any]]:
    """The records of every plan on the first `count` prompts of a split; each prompt is a part of the run.

    Candidate i of prompt j has the seed first_seed + 1000 j + i. On the first `config.alone` test prompts each plan is
    also run separately.
    """
    prompts, records = shapeworld.prompts(split, count), []
    clock = Clock(f"best of {config.n} on {split} prompts", len(prompts), 300 if config.full else 30)
    _say(config, f"best of {config.n} on {len(prompts)} {split} prompts")
    for index, prompt in enumerate(tqdm(prompts, disable=None, desc=f"best of {config.n}, {split}", unit="prompt")):
        seeds = [first_seed + 1000 * index + i for i in range(config.n)]
        separately = split == "test" and index < config.alone
        name = f"{split}/{index:04d}"
        is_done = parts.has(f"{name}.json")

        def make(prompt: str = prompt, seeds: list[int] = seeds, separately: bool = separately) -> dict[str, Any]:
            return record(make_contest(joint, config, prompt, seeds, call), config, separately)

        records.append(parts.once(name, make))
        clock.tick(index + 1, not is_done)
    return records


def record(contest: Any, config: DemoConfig, separately: bool) -> dict[str, Any]:
    """A contest as JSON: the referee's values, each plan's picks and separate runs, each judge's scores of the finished
    latents, and the attention of the first judge's query.
    """
    from prism.lab import attention
    from prism.sampling.strategies import kind_of

    judge, looks = contest.joint.judges[0], {}
    for t in config.look_at:
        weights = attention.look(judge, contest.latents, contest.prompt, t, contest.call, config.seed)
        cells = attention.object_cells(contest.videos, contest.prompt, weights.shape[1:])
        looks[f"{t:g}"] = attention.shares(weights, cells)
    entry = {
        "prompt": contest.prompt,
        "seeds": list(contest.seeds),
        "values": {name: value.tolist() for name, value in contest.values.items()},
        "picks": {name: contest.picks(name) for name in contest.plans},
        "final": contest.final.tolist(),
        "looks": looks,
        "cuts": contest.readings(),
    }
    if separately:
        judged = {name: kind_of(plan["strategy"]).needs_judge() for name, plan in contest.plans.items()}
        count = len(contest.joint.judges)
        entry["alone"] = {
            name: [contest.run_separately(name, k) for k in range(count if judged[name] else 1)]
            for name in contest.plans
        }
    return entry


def _claims(config: DemoConfig, comparison: Any, picks: Any, records: Any) -> list[ClaimRow]:
    """The rows "bars": the claims of a full run; a short run makes none."""
    share = claims.overhead(records, [name for name in ("early", "draft", "full") if name in plans(config)])
    return claims.check(comparison, picks, "early", "draft", share) if config.full else []


def _publish(
    folder: Path, parts_folder: Path, config: DemoConfig, metrics: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Write metrics and configuration; copy the first seed's head, and data and pixel judges that the run made."""
    write_config(folder / "config.json", settings)
    files.write_json(folder / "metrics.json", metrics)
    shutil.copytree(parts_folder / f"head-{config.seed}", folder / "head")
    for name in ("candidates", "pixel", "pixel-noisy"):
        if (parts_folder / name).is_dir():
            shutil.copytree(parts_folder / name, folder / name)


def _say(config: DemoConfig, text: str) -> None:
    """One line per part of a run, also in a log."""
    if not config.full:
        print(f"prism: {text}", file=sys.stderr, flush=True)


def _command(out: Path, config: DemoConfig) -> str:
    fresh = " --fresh" if config.fresh else ""
    return f"prism demo --full{fresh} --seed {config.seed} --out {out}"
