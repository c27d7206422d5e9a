"""`prism reproduce`: the paper's claims, each answered by an experiment with intervals, on one page.

What experiments share (videos, heads, measurements) is made once, and everything is kept in the run's folder as it is
made, so that a run that was stopped or killed goes on with --resume, and a run of one experiment can be widened.
"""

from __future__ import annotations

import csv
import difflib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import prism
from prism import files, runs
from prism.backbone.fingerprint import VERSIONED
from prism.errors import SEEDS, PrismError, quoted, whole
from prism.lab import published_quality
from prism.lab.bench import SCALES, Bench, check_store, seconds
from prism.lab.experiments.cuts import CUTS
from prism.lab.experiments.finetuned import FINETUNED
from prism.lab.experiments.improving import IMPROVING
from prism.lab.experiments.judging import CORRELATION, REFUTATION
from prism.lab.experiments.looking import LOOKING
from prism.lab.experiments.noise import NOISE
from prism.lab.experiments.reading import DEPTH, READING
from prism.lab.experiments.related import RELATED
from prism.lab.experiments.states import STATES
from prism.lab.findings import Damaged, Experiment, Finding
from prism.loading import check_alone, describe, load_backbone, open_store
from prism.loading import check_store as check_vae
from prism.preference.store import store_identity
from prism.report import claim_page, claim_plots
from prism.report.figures import as_svg
from prism.report.metrics import document, write_config
from prism.report.page import write_report
from prism.report.rows import AnswerRow

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (
        *(NOISE, CUTS, READING, RELATED, DEPTH, STATES, FINETUNED, LOOKING),
        *(REFUTATION, CORRELATION, IMPROVING),
    )
}
NOTES = (
    "Words. t: the noise level of what is judged, 1000 noise, 0 clean. A decided pair: two videos of one prompt "
    "that its label does not call a tie. A plain sample: one run of the pipeline, the unit of cost. Now: a "
    "candidate is judged as it stands after a step; ahead: the clean video that the denoiser predicts there. "
    "Oracle: the pick by the labels themselves. Eta: the width of ties in the loss (Eq. 3-4). Lift: the share of "
    "attention over the share of the video.",
    "Methods. Every head is trained on the same pairs by the same recipe, each seed with first weights and batches "
    "of its own (those of the refutation and the correlation share batches, so that their accuracies may differ "
    "from other tables'); accuracies are means over heads, of decided pairs, over the noise levels that are named. "
    "Intervals are 95 % bootstrap intervals that resample whole prompts, paired where two things are compared on "
    "the same pairs. They do not hold what another training would change; the columns of spread say how far single "
    "heads lie apart. Prompts that anything was trained on are in no measurement. Shares of a gain are of the best "
    "candidate's over the mean of its prompt's candidates, which is what a random pick gets.",
    "Limits. On the embedded model a program stands in for people, and model, videos and judges are small; numbers of "
    "a large model need that model (--backbone, --data). Many comparisons are made: of those between equals one in "
    "forty lies above zero beyond its interval by luck, and as many below.",
)


def run(
    out: Path,
    names: Sequence[str] = (),
    scale: str = "quick",
    data: Path | None = None,
    backbone: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tap: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    resume: bool = False,
    others: Sequence[str] = (),
    quality: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the experiments `names` (all of the scale's, where none is named); write the page, tables and figures.

    Returns the metrics. Raises PrismError for an experiment or scale that does not exist, a store without the pairs
    that are needed, and a folder that holds another run.
    """
    check_alone("reproduce")
    whole("--seed", seed, 0, SEEDS)
    whole("--batch-size", batch_size)
    chosen = _chosen(names, scale)
    if bool(others) != (quality is not None):
        raise PrismError("Backbones are correlated by scores of their videos; give both --correlate and --quality.")
    if others and data is None:
        raise PrismError("Backbones to correlate judge the same labelled videos; name their store with --data.")
    if quality is not None:
        published_quality.read(quality, others)  # a table that cannot be read is refused before the work
    if backbone is not None and data is None:
        raise PrismError("A backbone of your own needs labelled videos of its own; name their store with --data.")
    loaded, call, name = load_backbone(backbone, device, dtype)
    if tap is not None:
        whole("--tap", tap, 1, loaded.num_blocks)
    store = None if data is None else open_store(data)
    if store is not None:
        check_vae(data, store, loaded)
        check_store(store)
        call = dict(store.call)
    identity = {
        "command": "reproduce",
        "scale": scale,
        "seed": seed,
        "tap": tap,
        "backbone": loaded.fingerprint(),
        "store": None if store is None else store_identity(store),
        "others": list(others),
        "version": prism.__version__,
    }
    changeable = ("store.name", *(f"backbone.{each}" for each in VERSIONED))
    parts = runs.claim(out, identity, resume, changeable=changeable)
    bench = Bench(parts, SCALES[scale], loaded, call, store, seed, tap, batch_size, others, quality)
    started = time.perf_counter()
    refused: dict[str, str] = {}
    _prepare(bench, chosen)
    for number, experiment in enumerate(chosen):
        _say(f"{experiment.title} ({number + 1} of {len(chosen)})")
        piece = f"findings/{experiment.name}"
        try:
            found = parts.once(piece, partial(_found, experiment, bench))
        except Damaged:
            raise
        except PrismError as error:  # this store or backbone cannot answer it; others may be answered
            if parts.has(f"{piece}.json"):
                raise Damaged(f"{error} Delete it, and it is made anew with --resume.") from error
            refused[experiment.name] = str(error)
            _say(f"{experiment.title}: left out. {error}")
            continue
        print(f"prism: {experiment.claim} {found['verdict'].capitalize()}: {found['number']}", file=sys.stderr)
    metrics = _publish(bench, describe(loaded, name), scale, time.perf_counter() - started, refused, options or {})
    parts.release()
    return metrics


def _chosen(names: Sequence[str], scale: str) -> list[Experiment]:
    """The experiments to run, in the table's order."""
    if scale not in SCALES:
        raise PrismError(f"The --scale is {quoted(scale, 40)}; choose {' or '.join(SCALES)}.")
    for name in names:
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(name, EXPERIMENTS, 1)
            hint = f"did you mean {near[0]}? There are" if near else "there are"
            raise PrismError(f"There is no experiment {quoted(name, 60)}; {hint} {', '.join(EXPERIMENTS)}.")
        if scale not in EXPERIMENTS[name].scales:
            raise PrismError(f"The experiment {name} runs at --scale {' or '.join(EXPERIMENTS[name].scales)} alone.")
    every = [each for each in EXPERIMENTS.values() if scale in each.scales]
    return [each for each in every if not names or each.name in names]


def _prepare(bench: Bench, chosen: Sequence[Experiment]) -> None:
    """Train and measure all heads that the experiments need, those of one batch and those of one reading together."""
    left = [each for each in chosen if not bench.parts.has(f"findings/{each.name}.json")]
    kinds = list(dict.fromkeys(kind for each in left for kind in each.kinds(bench)))
    if left:
        trainings = sum(each.trainings(bench) for each in left)
        minutes = max(1, round(seconds(bench, kinds, trainings, CUTS in left) / 60))
        count, time_left = (
            f"{n} {word}{'s' * (n > 1)}" for n, word in ((len(left), "experiment"), (minutes, "minute"))
        )
        _say(f"{count}, about {time_left} on this machine as busy as it is now")
    if kinds:
        _say(f"training and measuring {len(kinds)} kinds of heads, {bench.scale.seeds} of each")
        bench.measured(kinds)


def _found(experiment: Experiment, bench: Bench) -> dict[str, Any]:
    return experiment.run(bench).to_dict()


def _publish(
    bench: Bench, backbone: Mapping[str, Any], scale: str, took: float, refused: Mapping[str, str], options: Any
) -> dict[str, Any]:
    """Write the page, metrics.json, tables and figures of every finding that the folder holds; return the metrics.

    refused: why an experiment has no finding, by name.
    """
    folder = bench.parts.folder
    settings = {**files.read_json(folder / "config.json"), "options": dict(options)}
    flags = _flags(bench, backbone, settings["tap"])
    answers: list[AnswerRow] = []
    figures: dict[str, list[tuple[str, str]]] = {}
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, experiment in EXPERIMENTS.items():
        path = folder / "findings" / f"{name}.json"
        if not path.exists():
            continue
        entry = files.read_json(path)
        minutes = entry.pop("seconds") / 60
        finding = Finding(**{**entry, "seeds": tuple(entry["seeds"])})
        answers.append(
            {
                "experiment": name,
                "claim": experiment.claim,
                "source": experiment.source,
                "verdict": finding.verdict,
                "number": finding.number,
                "text": finding.text,
                "seeds": list(finding.seeds),
                "prompts": finding.prompts,
                "command": f"prism reproduce {name} --scale {scale} --seed {bench.seed}{flags}",
                "minutes": minutes,
            }
        )
        tables[name] = finding.tables
        for label, rows in finding.tables.items():
            _write_csv(folder / "tables" / f"{label}.csv", rows)
        figures[name] = []
        for drawing in experiment.draw(finding.tables):
            figures[name].append((as_svg(drawing.figure, drawing.caption), drawing.caption))
            claim_plots.save(drawing.figure, folder / "figures" / drawing.name)
    metrics = document("reproduce", backbone, bench.seed, timings={"this process": took}, answers=answers, scale=scale)
    files.write_json(folder / "metrics.json", metrics)
    write_config(folder / "config.json", settings)
    titles = {name: each.title for name, each in EXPERIMENTS.items()}
    parts = claim_page.sections(answers, titles, figures, tables)
    title = "The claims, answered"
    notes = [*NOTES, *(f"Left out: {titles[name]}. {reason}" for name, reason in refused.items())]
    write_report(folder / "report.html", metrics, title=title, notes=notes, config=settings, sections=parts)
    return metrics


def _flags(bench: Bench, backbone: Mapping[str, Any], tap: int | None) -> str:
    """The flags of a run on a model or store of one's own, for its command."""
    flags = {}
    if bench.data is not None:
        flags = {"--backbone": backbone["name"], "--data": bench.data.folder}
    if tap is not None:
        flags["--tap"] = tap
    return "".join(f" {flag} {shlex.quote(str(value))}" for flag, value in flags.items())


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write flat rows as CSV; an interval becomes two columns, NAME_low and NAME_high."""
    path.parent.mkdir(exist_ok=True)
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for name, value in row.items():
            if name.endswith("_ci95"):
                low, high = value or (None, None)
                cells |= {f"{name[:-5]}_low": low, f"{name[:-5]}_high": high}
            else:
                cells[name] = value
        flat.append(cells)
    names = list(dict.fromkeys(name for cells in flat for name in cells))
    with files.new_file(path) as work, work.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def _say(text: str) -> None:
    print(f"prism: {text}", file=sys.stderr, flush=True)
