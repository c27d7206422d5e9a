"""Runs that are killed at random points and go on: python benchmarks/kills.py [--command encode|train|collect]

Each command is run as it would be typed, on a tiny Wan pipeline with random weights: once undisturbed, then in 20 fresh
folders, where SIGKILL ends it after a share of the undisturbed run's time that is drawn at random; `--resume` then goes
on. Prints what was there at each kill, and ends with 1 where a file differs from the undisturbed run's in any byte.
Of metrics.json and history.json seconds are left out, and the report, which is made of them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use the threads of its parent

KILLS = 20
TIMES = ("seconds", "timings", "environment")
COMMANDS = ("encode", "train", "collect")


def prepare(folder: Path) -> dict[str, list[str]]:
    """A pipeline, 48 clips with pairs, and prompts; the words of each command, but for --out."""
    from tests import stores, tiny

    from prism import files
    from prism.video import write_video

    tiny.wan().save_pretrained(folder / "backbone")
    files.write_json(folder / "backbone" / "call.json", {**tiny.CALL_WAN, "num_inference_steps": 2})
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path_A", "path_B", "prompt", "VQ", "split"])
        for number, prompt in enumerate(stores.PROMPTS[:24]):
            for side in "ab":
                write_video(folder / f"{number}{side}.mp4", rng.uniform(size=(9, 32, 32, 3)), 8)
            split = ("train", "train", "validation", "test")[number % 4]
            table.writerow([f"{number}a.mp4", f"{number}b.mp4", prompt, "AB"[number // 4 % 2], split])
    (folder / "prompts.txt").write_text("\n".join(stores.PROMPTS[:8]))
    (folder / "reward.py").write_text("def reward(video, prompt):\n    return float(video.mean())\n")
    on = ["--backbone", str(folder / "backbone"), "--device", "cpu"]
    small = ["--steps", "16", "--checkpoint-every", "2", "--validate-every", "4", "--tap", "2", "--dim", "16"]
    return {
        "encode": ["encode", str(folder / "pairs.csv"), "--unit", "4", *on],
        "train": ["train", "--data", str(folder / "store"), "--prompts-per-step", "4", *small, *on],
        "collect": [
            *("collect", "--prompts", str(folder / "prompts.txt"), "--candidates", "3", "--seed", "5", *on),
            *("--reward", f"{folder / 'reward.py'}:reward"),
        ],
    }


def run(words: list[str], after: float | None = None) -> tuple[int, float]:
    """Run a command in a process of its own; kill it after so many seconds. Returns its exit status and seconds."""
    from prism import cli

    start, child = time.perf_counter(), os.fork()
    if not child:
        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if "--resume" in words or after is not None:
                os.dup2(quiet, 2)
            code = cli.main(words)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - start


def contents(folder: Path) -> dict[str, str]:
    """A digest of each file, by its path below the folder."""
    digests = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != "report.html"):
        data = path.read_bytes()
        if path.name in ("metrics.json", "history.json"):
            data = json.dumps(without_times(json.loads(data))).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return digests


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if name not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", choices=COMMANDS, action="append", help="default: each of them")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=1, help="of the points")
    options = parser.parse_args()
    import torch

    for name in ("loading", "training.encode", "training.collect", "training.trainer"):
        importlib.import_module(f"prism.{name}")  # here, so that kills fall into the work and not into imports
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = prepare(folder)
        run([*commands["encode"], "--out", str(folder / "store")])
        for command in options.command or COMMANDS:
            failed += kill(command, commands[command], folder, options.kills, np.random.default_rng(options.seed))
    return int(failed > 0)


def kill(command: str, words: list[str], folder: Path, kills: int, rng: np.random.Generator) -> int:
    """Kill a command so many times; returns how many of the resumed runs differ."""
    status, seconds = run([*words, "--out", str(folder / command / "whole")])
    assert status == 0, f"prism {command} ended with {status}"
    expected = contents(folder / command / "whole")
    made, late, same = [], 0, 0
    while len(made) < kills:
        out = folder / command / f"{len(made) + late}"
        status, _ = run([*words, "--out", str(out)], after=float(rng.uniform(0, seconds)))
        if status != -signal.SIGKILL:
            late += 1  # it had ended before
            continue
        made.append(len(contents(out)) if out.exists() else 0)
        status, _ = run([*words, "--out", str(out), *(["--resume"] if out.exists() else [])])
        found = contents(out) if out.exists() else {}
        if status == 0 and found == expected:
            same += 1
        else:
            odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            print(
                f"{command}, kill {len(made)} with {made[-1]} files: status {status}, differs in {odd[:6]}", flush=True
            )
    print(
        f"{command}: {same} of {kills} resumed equal the undisturbed run ({len(expected)} files, {seconds:.0f} s); "
        f"files at the kills {sorted(made)}; {late} had ended before",
        flush=True,
    )
    return kills - same


if __name__ == "__main__":
    sys.exit(main())
