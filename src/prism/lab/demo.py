"""The demo: replay what a budget buys, pick the best of 8 on unseen prompts, measure the judge by noise level.

`DemoConfig()` takes minutes: the head that ships judges, and a small one is trained for show. `FULL` takes several
hours on two cores, in parts that survive a kill: it trains its own heads, and plays every strategy at matched cost.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import prism
from prism import files, runs, shapeworld, temporary, video
from prism.errors import SEEDS, whole
from prism.lab import claims, front, origins, per_prompt, playing
from prism.lab import contest as strategies
from prism.lab.matched import BUDGETS
from prism.lab.records import contests, make_contest, plans, say
from prism.loading import check_alone, describe, load_backbone
from prism.report import plan_page
from prism.report.metrics import cut_entry, document, write_config
from prism.report.page import write_evidence, write_report
from prism.report.rows import ClaimRow
from prism.runs import IDENTITY, claim
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
    matched: int = 0  # test prompts on which all strategies play at matched cost, by the head that ships
    few_steps: int = 0  # test prompts on which they do so in four steps
    budgets: tuple[float, ...] = BUDGETS  # of both, in plain samples


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
    matched=200,
    few_steps=60,
)


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
    from prism.judge.joint import JointJudge
    from prism.lab import attention, judges
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
    say(config, f"training {config.judges} judge{'s' if config.judges > 1 else ''}, {config.train.steps} steps")
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
    say(config, "measuring judges by noise level")
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

    matched = playing.of_demo(parts, config, backbone, others, call)
    say(config, "replaying plans, and making the page")
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
        "matched cost": ("matched/",),
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
        **playing.fields(matched),
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
            sections=[
                *shown_first,
                *([front.sight_section(seen)] if seen else []),
                *playing.sections(metrics),
                origins.section(metrics),
            ],
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


def _command(out: Path, config: DemoConfig) -> str:
    fresh = " --fresh" if config.fresh else ""
    return f"prism demo --full{fresh} --seed {config.seed} --out {out}"
