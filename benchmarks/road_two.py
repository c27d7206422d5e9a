"""Road 2 on ShapeWorld: a reward function that sees pixels is distilled into a head, which picks early in its place.

`python benchmarks/road_two.py --out runs/road_two` runs `prism collect`, `train` and `eval` as printed: 4 candidates of
200 training, 20 validation and 60 test prompts, labelled by `--reward` (the referee). Then early Best-of-8 by the new
head on prompts that nothing has seen, beside the shipped head and all eight finished: the share of the reward's own
gain, and of the referee's, that the pick keeps, with an interval over prompts. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prism
from prism import files, shapeworld
from prism.backbone import Backbone
from prism.judge import Judge
from prism.loading import load_reward
from prism.shapeworld import grammar, referee

SPLITS = {"train": 200, "validation": 20, "test": 60}
MARGIN = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/road_two"))
    parser.add_argument("--reward", default="referee")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=40, help="of Best-of-8")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": text, "split": split} for split, count in SPLITS.items() for text in grammar.prompts(split, count)
    ]
    (out / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    collect = ["collect", "--prompts", out / "prompts.jsonl", "--reward", options.reward, "--margin", MARGIN]
    collect += ["--states", "3,4,6", "--seed", options.seed, "--out", out / "store", *resumed(out / "store")]
    if not (out / "head" / "metrics.json").exists():
        run(*collect, processes=options.processes)
        training = ["--steps", options.steps, "--seed", options.seed, *resumed(out / "head")]
        run("train", "--data", out / "store", "--out", out / "head", *training)
    if not (out / "evaluation").exists():
        levels = ["--timesteps", "699,499", "--num-draws", 2]
        run("eval", "--data", out / "store", "--head", out / "head", "--out", out / "evaluation", *levels)
    best_of_8(options, out)


def best_of_8(options: argparse.Namespace, out: Path) -> None:
    """Print the share of the gain of the best of 8 that each way of choosing keeps."""
    pipe = shapeworld.pipeline()
    backbone, reward = Backbone(pipe), load_reward(options.reward)
    heads = {"distilled": out / "head" / "head", "shipped": shapeworld.asset_folder("head")}
    judges = {name: Judge.from_pretrained(folder, backbone) for name, folder in heads.items()}
    prompts = grammar.prompts("test", SPLITS["test"] + options.prompts)[SPLITS["test"] :]
    kept = out / "best_of_8.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for number, prompt in enumerate(tqdm(prompts[len(done) :], "best of 8", disable=None), len(done)):
        common = {"n": 8, "seed": 1000 * number, **shapeworld.CALL}
        full = prism.best_of_n(
            pipe, judges["distilled"], prompt, strategy="full", keep_latents=True, judge_at=700, **common
        )
        assert full.candidate_latents is not None
        videos = [backbone.decode(full.candidate_latents[index][None])[0] for index in range(8)]
        pixels = [(video * 255).round().to(torch.uint8).cpu().numpy() for video in videos]
        said = [row.get("overall", sum(row.values()) / len(row)) for row in reward.score(pixels, [prompt] * 8, 8.0)]
        true = [referee.score(video, prompt)["overall"] for video in videos]
        picks = {"distilled, finished": full.index}
        for name, judge in judges.items():
            picks[f"{name}, early 4:1"] = prism.best_of_n(pipe, judge, prompt, schedule=[(4, 1)], **common).index
        done.append({"prompt": prompt, "reward": said, "referee": true, "picks": picks})
        kept.write_text("".join(json.dumps(each) + "\n" for each in done))
    table = []
    for by in ("reward", "referee"):
        scores = np.array([each[by] for each in done])
        best = scores.max(1) - scores.mean(1)
        for name in done[0]["picks"]:
            gain = scores[np.arange(len(done)), [each["picks"][name] for each in done]] - scores.mean(1)
            ci95 = share_interval(gain, best, options.seed)
            table.append({"by": by, "pick": name, "share": float(gain.sum() / best.sum()), "ci95": ci95})
            print(table[-1])
    files.write_json(out / "best_of_8.json", {"prompts": len(done), "rows": table})


def share_interval(gain: np.ndarray, best: np.ndarray, seed: int) -> list[float]:
    """The 95 % bootstrap interval over prompts of the summed gain by the best's summed gain."""
    chance = np.random.default_rng(seed)
    rows = chance.integers(0, len(gain), (10_000, len(gain)))
    return np.quantile(gain[rows].sum(1) / best[rows].sum(1), (0.025, 0.975)).tolist()  # type: ignore[no-any-return]


def resumed(folder: Path) -> tuple[str, ...]:
    return ("--resume",) if folder.exists() else ()


def run(*arguments: object, processes: int = 1) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    subprocess.run([sys.executable, "-m", *launcher * (processes > 1), "prism", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
