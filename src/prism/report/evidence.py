"""A finished run as Markdown tables, to be kept under docs/evidence with the command that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism import files
from prism.report import wording

Row = Mapping[str, Any]


TIES = "with ties, threshold of validation pairs"
METHOD = (
    "Intervals are 95 % bootstrap intervals over prompts; what another training of the judges would change is not in "
    "them. `per_prompt/` holds the values per prompt that each is recomputed from (`prism.lab.per_prompt`). "
    "Accuracy is that of decided pairs, which are no ties. A gain is the referee's overall score of the pick over the "
    "mean of its prompt's candidates, which is what a random pick gets on average, in pooled within-prompt standard "
    "deviations. A denoiser row is one evaluation of one sample by the denoiser."
)


def write(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any], command: str) -> None:
    """Write README.md, with every table of the run, and metrics.json and config.json to `folder`, which is made."""
    folder.mkdir(parents=True)
    files.write_json(folder / "metrics.json", metrics)
    files.write_json(folder / "config.json", config)
    (folder / "README.md").write_text(markdown(metrics, config, command), encoding="utf-8")


def markdown(metrics: Mapping[str, Any], config: Mapping[str, Any], command: str) -> str:
    """The tables of a run, after the command, date, machine and time that made them."""
    place, parts = metrics["environment"], metrics["timings"]
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items() if name != "this process")
    rows, picks = metrics["accuracy"], metrics["best_of_n"]
    found = metrics.get("agreement", {})
    sections = [
        "# A full run of the demo",
        f"`{command}`, {place['date']}, seed {metrics['seed']}, on {place['processor']} with {place['threads']} threads"
        f"{' and ' + place['accelerator'] if place.get('accelerator') else ''}. Minutes: {minutes}. "
        "`config.json` holds every setting, `metrics.json` every number.",
        METHOD,
        "## Bars",
        _table(("bar", "reached", "met"), [(row["bar"], row["reached"], _met(row["met"])) for row in metrics["bars"]]),
        "## Accuracy by noise level",
        _accuracy(wording.pooled(rows)),
        "## Against the pixel judges",
        "Accuracy of PRISM minus the pixel judge's in percentage points, paired.",
        _comparison(metrics.get("judge_comparison", [])),
    ]
    for name, some in wording.by_set(wording.pooled(picks)).items():
        sections += [
            f"## Best-of-{some[0]['n']} on {some[0]['prompts']} prompts of the split {name}",
            _picks(wording.in_order(some)),
        ]
    if found:
        sections.append(
            f"Run by itself on {found['prompts']} prompts, each strategy picked the same candidate in "
            f"{found['same_pick']} of {found['runs']} runs as in the run that all share; the largest difference of a "
            f"score was {found['largest_difference']:.1e}. Rows and seconds come from these separate runs, "
            "scaled to all prompts."
        )
    if metrics.get("attention"):
        sections += ["## Where the query looks", _attention(metrics["attention"])]
    if wording.apart(rows):
        sections += ["## By the seed of the head", _accuracy(wording.apart(rows)), _picks(wording.apart(picks))]
    return "\n\n".join(sections) + "\n\n" + f"```json\n{json.dumps(config, indent=1)}\n```\n"


def _accuracy(rows: Sequence[Row]) -> str:
    main, names = wording.main_dimension(rows), wording.dimensions(rows)
    header = (
        "judge",
        "set",
        "t",
        main,
        "95 % interval",
        *names,
        "with ties, threshold of validation pairs",
        "decided pairs",
        "prompts",
        "all pairs",
        "prompts",
    )
    lines = []
    for group in wording.by_level(rows):
        row = group.get(main) or next(iter(group.values()))
        lines.append(
            (
                wording.judge_name(row),
                row["set"],
                f"{row['t']:g}",
                wording.percent(row["without_ties"]),
                wording.percent_interval(row["without_ties_ci95"]),
                *(wording.percent(group[name]["without_ties"]) if name in group else wording.MISSING for name in names),
                wording.percent(row["with_ties_validation_threshold"]),
                *(wording.whole(row.get(name)) for name in ("decided_pairs", "decided_prompts", "pairs", "prompts")),
            )
        )
    return _table(header, lines)


def _comparison(rows: Sequence[Row]) -> str:
    lines = [
        (
            row["set"],
            row["against"],
            f"{row['t']:g}",
            row["dimension"],
            wording.points(row["difference"]),
            wording.points_interval(row["ci95"]),
            str(row["pairs"]),
            str(row["prompts"]),
        )
        for row in rows
    ]
    return _table(
        ("set", "against", "t", "dimension", "difference", "95 % interval", "decided pairs", "prompts"), lines
    )


def _picks(rows: Sequence[Row]) -> str:
    header = (
        *("strategy", "how", "judge", "gain", "95 % interval", "share of the oracle's gain", "95 % interval"),
        *("denoiser rows", "of full", "VAE decodes", "head calls", "seconds"),
    )
    lines = [
        (
            row["strategy"],
            wording.how(row),
            wording.judge_name(row) if row["judge"] else wording.MISSING,
            wording.signed(row["referee_gain"]),
            wording.signed_interval(row["referee_gain_ci95"]),
            wording.percent(row["oracle_share"]),
            wording.percent_interval(row["oracle_share_ci95"]),
            wording.count(row["denoiser_rows"]),
            wording.percent(row["denoiser_share_of_full"]),
            str(row["vae_decodes"]),
            str(row["head_calls"]),
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    return _table(header, lines)


def _attention(rows: Sequence[Row]) -> str:
    header = (
        "t",
        "candidates",
        "mean score",
        "attention on objects",
        "cells that are objects",
        "ratio",
        "95 % interval",
    )
    lines = [
        (
            f"{row['t']:g}",
            row["candidates"],
            f"{row['referee']:.2f}",
            wording.percent(row["attention_share"]),
            wording.percent(row["area_share"]),
            wording.MISSING if row["lift"] is None else f"{row['lift']:.2f}",
            wording.MISSING if row["lift_ci95"] is None else " … ".join(f"{end:.2f}" for end in row["lift_ci95"]),
        )
        for row in rows
    ]
    return _table(header, lines)


def _met(met: bool | None) -> str:
    return wording.MISSING if met is None else "yes" if met else "no"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
