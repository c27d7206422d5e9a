"""All strategies at matched total cost on ShapeWorld: shares of the oracle's gain, paired differences, cost, diversity.

`python benchmarks/contest.py --plan runs/plan --out runs/contest.jsonl` plays every arm of `prism.lab.matched` at every
budget on the test prompts, a line per prompt; a stopped run goes on, and adds arms and budgets that lines lack. The
plan is of `prism plan` on validation prompts. `--schedule few` and `few-stochastic` play four steps. `--report` only
prints the summary of the lines that are there; it is also written beside them, as .md, and as .html.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tqdm import tqdm

import prism
from prism import shapeworld
from prism.lab import matched, matched_results
from prism.lab.pixel import PixelJudge
from prism.loading import describe, load_backbone
from prism.report import matched_page
from prism.report.metrics import document
from prism.report.page import write_report
from prism.shapeworld import grammar, referee

AGAIN = 1_000_000  # added to the seed of a prompt's second play
SCHEDULES = {"plain": matched.ARMS, "few": matched.FEW_STEPS, "few-stochastic": matched.FEW_STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/contest.jsonl"))
    parser.add_argument("--plan", type=Path, help="plan.json of prism plan, or its folder")
    parser.add_argument("--schedule", choices=SCHEDULES, default="plain")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=int, default=20, help="first prompts that are played with two seeds")
    parser.add_argument("--alone", type=int, default=5, help="first prompts whose shared runs are also made alone")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(matched.BUDGETS))
    parser.add_argument("--arms", nargs="+", help="by name")
    parser.add_argument("--whole", action="store_true", help="also searches whose populations run to the end")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.out)
    backbone, call, name = load_backbone()
    if options.schedule != "plain":
        call = {**call, "num_inference_steps": 4}
        pipe, stochastic = backbone.pipe, options.schedule == "few-stochastic"
        config = {**pipe.scheduler.config, "stochastic_sampling": stochastic}
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    judge = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), backbone.pipe)
    arms = SCHEDULES[options.schedule] | (matched.WHOLE if options.whole else {})
    arms = {name: arm for name, arm in arms.items() if options.arms is None or name in options.arms}
    taken = matched.seats(arms, judge, call, options.budgets, options.plan)
    if not options.report:
        done += play(options, judge, call, taken, done)
    rows = matched_results.rows(done, cost_of_one(judge, call))
    write(options.out, rows, describe(backbone, name), options.seed)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that a kill left unfinished is cut off."""
    if not path.exists():
        return []
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    with path.open("r+b") as file:
        file.truncate(len(whole) + len(end))
    return [json.loads(line) for line in whole.splitlines()]


def cost_of_one(judge: Any, call: dict[str, Any]) -> float:
    """The denoiser rows of one plain sample."""
    return matched.seats({matched.PLAIN: matched.ARMS[matched.PLAIN]}, judge, call, [1.0])[matched.PLAIN, 1.0].rows


def play(options: Any, judge: Any, call: dict[str, Any], taken: Any, done: list[Any]) -> list[dict[str, Any]]:
    """Play what the lines lack, and add a line per prompt."""
    pixel = PixelJudge.from_pretrained(shapeworld.asset_folder("pixel"), judge.backbone)
    present = {line["prompt"]: line["runs"] for line in matched_results.merged(done)}
    lines = []
    for index, prompt in enumerate(tqdm(grammar.prompts(options.split, options.prompts), "prompts")):
        have = {(run["arm"], run["budget"]) for run in present.get(prompt, [])}
        missing = {key: seat for key, seat in taken.items() if key not in have}
        if not missing:
            continue
        seeds = [options.seed, options.seed + AGAIN] if index < options.again else [options.seed]
        with tqdm(total=len(missing) * len(seeds), desc="runs", leave=False) as bar:
            line = matched.line(
                judge, pixel, referee.score, call, prompt, seeds, missing, index < options.alone, bar.update
            )
        lines.append(line)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return lines


def write(out: Path, rows: list[Any], backbone: Any, seed: int) -> None:
    """Print the summary and write it as Markdown and as a page."""
    verdicts = matched_results.verdicts(rows)
    tables = matched_page.by_arm(rows), matched_page.details(rows)
    same, compared = (sum(row[key] for row in rows) for key in ("same_pick", "compared"))
    parts = [
        f"{max(row['prompts'] for row in rows)} prompts, seed {seed}.",
        *(f"{table.markdown()}\n\n{table.caption}" for table in tables),
        "\n".join(f"- {sentence}" for sentence in verdicts),
        *([f"Of {compared} runs by themselves, {same} pick what the shared runs say."] if compared else []),
    ]
    text = "\n\n".join(parts)
    out.with_suffix(".md").write_text(text + "\n")
    print(text)
    metrics = document("demo", backbone, seed)
    sections = matched_page.sections(rows, verdicts)
    write_report(out.with_suffix(".html"), metrics, title="PRISM: all strategies at matched cost", sections=sections)


if __name__ == "__main__":
    main()
