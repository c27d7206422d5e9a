"""A finished run as Markdown tables, to be kept under docs/evidence with the command that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism import files
from prism.report import tables, wording

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
        tables.bars_table(metrics["bars"]).markdown(),
        "## Accuracy by noise level",
        tables.accuracy_table(wording.pooled(rows), whole=True).markdown(),
        "## Against the pixel judges",
        "Accuracy of PRISM minus the pixel judge's in percentage points, paired.",
        tables.comparison_table(metrics.get("judge_comparison", [])).markdown(),
    ]
    for name, some in wording.by_set(wording.pooled(picks)).items():
        sections += [
            f"## Best-of-{some[0]['n']} on {some[0]['prompts']} prompts of the split {name}",
            tables.best_of_n_table(wording.in_order(some), whole=True).markdown(),
        ]
    if found:
        sections.append(
            f"Run by itself on {found['prompts']} prompts, each strategy picked the same candidate in "
            f"{found['same_pick']} of {found['runs']} runs as in the run that all share; the largest difference of a "
            f"score was {found['largest_difference']:.1e}. Rows and seconds come from these separate runs, "
            "scaled to all prompts."
        )
    if metrics.get("attention"):
        sections += ["## Where the query looks", tables.attention_table(metrics["attention"]).markdown()]
    if wording.apart(rows):
        sections += [
            "## By the seed of the head",
            tables.accuracy_table(wording.apart(rows), whole=True).markdown(),
            tables.best_of_n_table(wording.apart(picks), whole=True).markdown(),
        ]
    return "\n\n".join(sections) + "\n\n" + f"```json\n{json.dumps(config, indent=1)}\n```\n"
