"""The paper's head beside related ones on the same pairs, and beside two judges that need no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prism.errors import PrismError
from prism.evaluation import Measurement
from prism.lab.bench import BASE, Bench
from prism.lab.findings import Drawing, Experiment, Finding, Tables, between, judged, row_of
from prism.lab.heads import RIVALS
from prism.lab.rivals import JointRivalJudge, OwnDisagreement, OwnError, RivalJudge, train_rivals
from prism.report import wording
from prism.report.claim_plots import Bar, forest

UNTRAINED = {"flow-residual": OwnError, "disagreement": OwnDisagreement}


def run(bench: Bench) -> Finding:
    """Accuracy of each related judge, and its paired difference from the paper's head."""
    registers = bench.scale.registers and bench.backbone.family.name == "wan"
    names = [name for name in RIVALS if name != "registers" or registers]
    base = bench.measured([BASE])[BASE]
    rows = [row_of(BASE, "PRISM’s head", base, base, bench.seed)]
    for name, measured in _trained(bench, names).items():
        rows.append(row_of(name, RIVALS[name].title, measured, base, bench.seed))
    left_out = [] if bench.scale.registers else ["Registers, which take a pass of their own, are left to --scale full."]
    for name, kind in UNTRAINED.items():
        try:
            measured = [_kept(bench, name, kind)]
        except PrismError as error:  # what the denoiser predicts is not known
            left_out.append(str(error))
            continue
        rows.append(row_of(name, f"{kind.title}, no training", measured, base, bench.seed))
    trained = [row for row in rows if row["kind"] in RIVALS]
    ours = [_reversed(row["difference_ci95"]) for row in trained]
    better = [row for row in trained if (ci := row["difference_ci95"]) and ci[0] > 0]
    worse = [row for row in trained if (ci := row["difference_ci95"]) and ci[1] < 0]
    beside = [row for row in rows[1:] if row["kind"] in UNTRAINED and wording.clear(row["difference_ci95"])]
    told = "".join(
        f"{row['what'][0].upper()}{row['what'][1:]}, is told to be {'more' if row['difference'] > 0 else 'less'} "
        f"accurate than the paper's head: {wording.points(row['difference'])} points{between(row['difference_ci95'])}. "
        for row in beside
    )
    best = max(rows, key=lambda row: float(row["accuracy"]))
    text = (
        f"Trained on the same pairs and batches, {len(worse)} of {len(trained)} related heads are told to be less "
        f"accurate than the paper's, {len(better)} to be more accurate. {told}The most accurate by "
        f"point is {best['what']} ({wording.percent(best['accuracy'])}). The verdict is of trained heads. "
        "Each related work also tunes its backbone, or learns "
        f"from other labels; here all read the same frozen one. {' '.join(left_out)}"
    ).strip()
    number = "; ".join(
        f"{row['what']} {wording.points(row['difference'])}{between(row['difference_ci95'])}" for row in rows[1:]
    )
    prompts = rows[0]["prompts"]
    return Finding(judged(ours), f"less PRISM’s head, points: {number}", text, {"related": rows}, prompts,
                   tuple(bench.seeds))  # fmt: skip


def _reversed(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [-interval[1], -interval[0]]


def _trained(bench: Bench, names: Sequence[str]) -> dict[str, list[Measurement]]:
    """Measurements of the related heads by name, one per seed; those of a seed are trained together."""
    every: dict[str, list[Measurement]] = {name: [] for name in names}
    for seed in bench.seeds:
        missing = [name for name in names if not bench.parts.has(_file(name, seed))]
        judges = _train(bench, missing, seed) if missing else {}
        files = {_file(name, seed): partial(judges.__getitem__, name) for name in names}
        tables = bench.together(files, bench.tested, "test", bench.claimed, JointRivalJudge)
        for name, table in zip(names, tables):
            every[name].append(table)
    return every


def _train(bench: Bench, names: Sequence[str], seed: int) -> dict[str, RivalJudge]:
    config = replace(bench.scale.train, seed=seed)
    return train_rivals(names, bench.backbone, bench.training, config, bench.tap, bench.scale.dim)


def _kept(bench: Bench, name: str, kind: Any) -> Measurement:
    make = partial(bench.measure_claimed, kind(bench.backbone), bench.tested, "test")
    made: Measurement = bench.parts.piece(_file(name, bench.seed), make, Measurement.load)
    return made


def _file(name: str, seed: int) -> str:
    return f"measured/related/{name}-{seed}.parquet"


def draw(tables: Tables) -> Sequence[Drawing]:
    """Differences from the paper's head."""
    bars = [
        Bar(row["what"], row["difference"], row["difference_ci95"], "trained" if row["kind"] in RIVALS else "untrained")
        for row in tables["related"]
        if row["kind"] != BASE
    ]
    figure = forest(bars, "accuracy less that of PRISM’s head, percentage points")
    return [Drawing("related", "Paired differences over t = 899, 699 and 499, with 95 % intervals.", figure)]


RELATED = Experiment(
    "related-judges",
    "Related judges",
    "The paper's head is more accurate than related heads on the same frozen backbone.",
    "Not compared in the paper",
    run,
    draw,
    kinds=lambda bench: [BASE],
    trainings=lambda bench: bench.scale.seeds * (2 if bench.scale.registers else 1),
)
