"""Road 1 on ShapeWorld: clips as mp4 files and a CSV in VideoAlign's columns become a head, beside one of the latents.

`python benchmarks/road_one.py --out runs/road_one` decodes the candidates that ship with PRISM to mp4 files, runs
`prism data check`, `encode` and `train` on them as printed, trains a second head on the same candidates' latents, and
measures both on the same test pairs: the difference at each noise level, with an interval over prompts. A stopped run
goes on.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from prism import files, shapeworld, video
from prism.backbone import Backbone
from prism.evaluation import compare_judges, measure
from prism.judge import Judge
from prism.preference import LatentStore, write_store

LEVELS = (899, 699, 499, 0)
WORDS = {1: "A", -1: "B", 0: "same", None: ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/road_one"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=0, help="training prompts; 0: all")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    backbone = Backbone(shapeworld.pipeline())
    shipped = LatentStore.open(shapeworld.asset_folder("candidates"))
    pairs = kept_pairs(shipped.pairs, options.prompts)
    if not (out / "pairs.csv").exists():
        write_clips(shipped, pairs, backbone, out)
    stores = {"clips": out / "store", "latents": out / "latents_store"}
    if not stores["latents"].exists():
        names = sorted({*pairs["video_a"].to_pylist(), *pairs["video_b"].to_pylist()})
        videos = shipped.videos.filter(pc.is_in(shipped.videos["video"], pa.array(names)))
        latents = shipped.latents(videos["video"].to_pylist())
        with files.new_folder(stores["latents"]) as folder:
            write_store(folder, videos.drop_columns(["shard", "row"]), latents, pairs, shipped.meta)
    prism("data", "check", out / "pairs.csv")
    prism("encode", out / "pairs.csv", "--out", stores["clips"], *resumed(stores["clips"]))
    for name, store in stores.items():
        folder = out / f"{name}_head"
        if not (folder / "metrics.json").exists():
            training = ("--steps", options.steps, "--seed", options.seed, *resumed(folder))
            prism("train", "--data", store, "--out", folder, *training)
    rows = []
    for source, store in stores.items():
        measured = {}
        for name in stores:
            judge = Judge.from_pretrained(out / f"{name}_head" / "head", backbone)
            judge.name = name
            measured[name] = measure(judge, store, "test", LEVELS, seed=options.seed)
            for row in measured[name].rows:
                if row["dimension"] == "overall":
                    print("of", name, "on", source, *(row[key] for key in ("t", "without_ties", "without_ties_ci95")))
        compared = compare_judges(measured["clips"], measured["latents"], seed=options.seed)
        rows += [{"measured on": source, **row} for row in compared]
    files.write_json(out / "compared.json", rows)
    for row in rows:
        print(row)


def kept_pairs(pairs: pa.Table, prompts: int) -> pa.Table:
    """All validation and test pairs, and those of some training prompts."""
    train = list(dict.fromkeys(pairs.filter(pc.equal(pairs["split"], "train"))["prompt"].to_pylist()))
    left_out = sorted(set(train) - set(train[:: max(1, len(train) // prompts)])) if prompts else []
    return pairs.filter(pc.invert(pc.is_in(pairs["prompt"], pa.array(left_out, pa.string()))))


def write_clips(store: LatentStore, pairs: pa.Table, backbone: Backbone, out: Path) -> None:
    """Every labelled candidate as an mp4 file, and the pairs as VideoAlign writes them, with the store's splits."""
    (out / "clips").mkdir(exist_ok=True)
    for name in tqdm(sorted({*pairs["video_a"].to_pylist(), *pairs["video_b"].to_pylist()}), "decode", disable=None):
        path = out / "clips" / f"{name}.mp4"
        if not path.exists():
            with files.new_file(path) as work:
                video.write_video(work, backbone.decode(store.latents([name]))[0], shapeworld.FPS)
    with files.new_file(out / "pairs.csv") as path, open(path, "w", newline="") as file:
        table = csv.writer(file)
        columns = [name.replace("overall", "Overall") for name in store.dimensions]  # as VideoAlign calls it
        table.writerow(["path_A", "path_B", "prompt", "split", *columns])
        for pair in pairs.to_pylist():
            sides = [f"clips/{pair[side]}.mp4" for side in ("video_a", "video_b")]
            table.writerow([*sides, pair["prompt"], pair["split"], *(WORDS[pair[name]] for name in store.dimensions)])


def resumed(folder: Path) -> tuple[str, ...]:
    return ("--resume",) if folder.exists() else ()


def prism(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "prism", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
