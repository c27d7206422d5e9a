"""All strategies at matched total cost on ShapeWorld: shares of the oracle's gain, paired differences, cost, diversity.

`python benchmarks/contest.py --plan runs/plan --out runs/contest.jsonl` plays every arm of `prism.lab.matched` at every
budget on the test prompts, a line per prompt; a stopped run goes on, and adds arms and budgets that lines lack. The
plan is of `prism plan` on validation prompts. `--schedule few` and `few-stochastic` play four steps. `--part 1/2` and
`--part 2/2` are two processes, each with an --out of its own. `--report FILE ...` only prints the summary of the lines
that are there; it is also written beside --out, as .md, and as .html.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import prism
from prism import shapeworld
from prism.lab import matched, matched_results
from prism.lab.pixel import PixelJudge
from prism.lab.playing import SCHEDULES, Game, Rules, scheduled, whole_lines
from prism.loading import describe, load_backbone
from prism.report import matched_page
from prism.report.metrics import document
from prism.report.page import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/contest.jsonl"))
    parser.add_argument("--plan", type=Path, help="plan.json of prism plan, or its folder")
    parser.add_argument("--schedule", choices=SCHEDULES, default="plain")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="K/N", help="every N-th prompt, from the K-th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=int, default=20, help="first prompts that are played with two seeds")
    parser.add_argument("--alone", type=int, default=5, help="first prompts whose shared runs are also made alone")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(matched.BUDGETS))
    parser.add_argument("--arms", nargs="+", help="by name")
    parser.add_argument("--whole", action="store_true", help="also searches whose populations run to the end")
    parser.add_argument("--report", type=Path, nargs="*", metavar="FILE", help="play nothing; default: --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    backbone, call, name = load_backbone()
    judge = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), backbone.pipe)
    pixel = PixelJudge.from_pretrained(shapeworld.asset_folder("pixel"), judge.backbone)
    rules = Rules(
        options.schedule, options.split, options.prompts, options.seed, options.again, options.alone,
        tuple(options.budgets), options.arms and tuple(options.arms), options.whole,
    )  # fmt: skip
    with scheduled(judge.backbone, call, options.schedule) as call:
        game = Game(rules, judge, pixel, call, options.plan)
        paths = [options.out] if not options.report else options.report
        lines = [line for path in paths for line in whole_lines(path)]
        if options.report is None:
            lines += play(game, lines, options.part, options.out)
        write(options.out, game.rows(lines), describe(backbone, name), options.seed)


def part_of(text: str) -> tuple[int, int]:
    """K and N of the text K/N."""
    k, n = map(int, text.split("/"))
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"{text} is no part K/N with K from 1 to N")
    return k, n


def play(game: Game, lines: list[Any], part: tuple[int, int], out: Path) -> list[dict[str, Any]]:
    """Play what the lines lack, and add a line per prompt to a file."""
    added = []
    for turn in tqdm(game.turns(lines, part), "prompts"):
        with tqdm(total=len(turn.seats) * len(turn.seeds), desc="runs", leave=False) as bar:
            added.append(game.play(turn, bar.update))
        with out.open("a") as file:
            file.write(json.dumps(added[-1]) + "\n")
    return added


def write(out: Path, rows: list[Any], backbone: Any, seed: int) -> None:
    """Print the summary and write it as Markdown and as a page."""
    verdicts = matched_results.verdicts(rows)
    text = f"{max(row['prompts'] for row in rows)} prompts, seed {seed}.\n\n{matched_page.markdown(rows, verdicts)}"
    out.with_suffix(".md").write_text(text + "\n")
    print(text)
    sections = matched_page.sections(rows, verdicts)
    title = "PRISM: all strategies at matched cost"
    write_report(out.with_suffix(".html"), document("demo", backbone, seed), title=title, sections=sections)


if __name__ == "__main__":
    main()
