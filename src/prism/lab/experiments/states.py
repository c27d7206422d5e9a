"""The question of what to train on: finished videos under new noise, states recorded while sampling, or what the
denoiser predicted there. The paper re-noises finished videos (Eq. 1) and does not compare."""

from __future__ import annotations

from collections.abc import Sequence

from prism.lab.bench import BASE, Bench
from prism.lab.findings import Drawing, Experiment, Finding, Tables, judged, row_of, shares
from prism.report.claim_plots import Bar, forest

SOURCES = ("recorded", "predicted", "mixture")


def run(bench: Bench) -> Finding:
    """Accuracy on re-noised test videos by what a head was trained on."""
    names = [BASE, *SOURCES]
    measured = bench.measured(names)
    rows = [row_of(name, bench.kinds[name].what, measured[name], measured[BASE], bench.seed) for name in names]
    base = shares(measured[BASE])
    over = {name: base.less(shares(measured[name])) for name in SOURCES}
    words = "; ".join(f"over {bench.kinds[name].what}: {over[name].points(bench.seed)}" for name in SOURCES)
    text = (
        f"A head trained on finished videos under new noise, {words}. All are measured on finished test videos under "
        "new noise, which favours training on the same; how they pick while sampling is in docs/study.md."
    )
    recorded = over["recorded"]
    number, verdict = f"over recorded states {recorded.points(bench.seed)}", judged([recorded.interval(bench.seed)])
    return Finding(verdict, number, text, {"sources": rows}, base.num_prompts, tuple(bench.seeds))


def draw(tables: Tables) -> Sequence[Drawing]:
    """Differences from training on finished videos under new noise."""
    rows = [row for row in tables["sources"] if row["kind"] != BASE]
    bars = [Bar(row["what"], row["difference"], row["difference_ci95"]) for row in rows]
    figure = forest(bars, "accuracy less that of finished videos under new noise, percentage points")
    return [Drawing("states", "Paired differences over t = 899, 699 and 499, with 95 % intervals.", figure)]


STATES = Experiment(
    "states",
    "What to train on",
    "Finished videos under new noise train the judge better than states recorded while sampling.",
    "Section 3.3 (Eq. 1); not compared in the paper",
    run,
    draw,
    kinds=lambda bench: [BASE, *SOURCES],
    scales=("full",),
)
