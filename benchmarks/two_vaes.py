"""A judge across VAEs: clips of a second ShapeWorld backbone, whose VAE is another, judged by the head of the first.

`python benchmarks/two_vaes.py --out runs/two_vaes` makes a second backbone: a VAE of 32 channels in place of 48, whose
code is fitted to other clips, and a transformer on its latents. The decoder and the transformer start from the embedded
ones, whose latents are mapped to the new ones by least squares, and are trained for some steps. Then clips of both for
the same test prompts are written as mp4 files, labelled by the referee on the files' frames, encoded with the embedded
VAE by `prism encode`, and judged by the shipped head in `prism eval`: its accuracy on pairs of either generator and on
pairs of one of each, with intervals over prompts. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from prism import files, shapeworld, video
from prism.backbone import Backbone
from prism.clips import read_clip
from prism.evaluation import Measurement, prompt_interval
from prism.preference import LatentStore, pairs_from_scores
from prism.sampling.trajectory import candidate_seed
from prism.shapeworld import generator, grammar, referee, train, world

CHANNELS = 32
LEVELS = (899, 699, 499, 0)
FIRST, SECOND = "embedded", "second"
WORDS = {1: "A", -1: "B", 0: "same", None: ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/two_vaes"))
    parser.add_argument("--prompts", type=int, default=60, help="of the shipped test prompts, at most 100")
    parser.add_argument("--vae-steps", type=int, default=100, help="of 4 clips")
    parser.add_argument("--steps", type=int, default=400, help="of the transformer, of 16 clips")
    parser.add_argument("--seed", type=int, default=1, help="of the second backbone's training and sampling")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make_second(out / "training", options)
    if not (out / "pairs.csv").exists():
        write_pairs(write_clips(out, options), out)
    if not (out / "evaluation").exists():
        prism("encode", out / "pairs.csv", "--out", out / "store", *resumed(out / "store"))
        levels = ",".join(map(str, LEVELS))
        prism("eval", "--data", out / "store", "--timesteps", levels, "--num-draws", 2, "--out", out / "evaluation")
    report(out)


def make_second(folder: Path, options: argparse.Namespace) -> None:
    """Train the second backbone; `folder/pipeline` holds it."""
    if (folder / "pipeline").exists():
        return
    if not (folder / "start").exists():
        with files.new_folder(folder / "start") as start:
            write_start(start, options.seed)
    start = str(folder / "start")
    common = {"seed": options.seed, "start": start, "videos": 4000}
    settings = {"steps": options.vae_steps, "batch_size": 4, "learning_rate": 5e-4}
    train.run(folder, "vae", resume=(folder / "vae").exists(), **common, **settings)
    settings = {"steps": options.steps, "batch_size": 16, "learning_rate": 5e-4, "matrix_rate": 3e-3}
    train.run(folder, "transformer", resume=(folder / "transformer").exists(), **common, **settings)


@torch.no_grad()
def write_start(folder: Path, seed: int) -> None:
    """A VAE with a code of its own; its decoder and the transformer are the embedded ones behind linear maps."""
    torch.manual_seed(seed)
    vae, embedded = generator.build(CHANNELS), shapeworld.pipeline()
    lost = generator.fit_encoder(vae, seed, videos=384)
    print(f"the code of {CHANNELS} channels loses {lost:.1%} of the pixels' variance")
    clips, _ = world.sample(256, seed + 1)
    one, two = (
        generator.LinearCode.of(each)(clips).permute(0, 2, 3, 4, 1).flatten(0, 3) for each in (embedded.vae, vae)
    )
    to_first = torch.linalg.lstsq(two, one).solution.T  # (48, CHANNELS)
    to_second = torch.linalg.lstsq(one, two).solution.T
    vae.post_quant_conv.weight.copy_(torch.eye(CHANNELS)[..., None, None, None])
    vae.post_quant_conv.bias.zero_()
    before = embedded.vae.post_quant_conv
    weights = dict(embedded.vae.decoder.state_dict())
    kernel = weights["conv_in.weight"]
    weights["conv_in.bias"] = weights["conv_in.bias"] + torch.einsum("octhw,c->o", kernel, before.bias)
    weights["conv_in.weight"] = torch.einsum("octhw,cd->odthw", kernel, before.weight[..., 0, 0, 0] @ to_first)
    vae.decoder.load_state_dict(weights)
    vae.save_pretrained(folder)
    transformer = generator.build_transformer(channels=CHANNELS)
    weights = dict(embedded.transformer.state_dict())
    weights["patch_embedding.weight"] = torch.einsum("octhw,cd->odthw", weights["patch_embedding.weight"], to_first)
    weights["proj_out.weight"] = to_second @ weights["proj_out.weight"]
    weights["proj_out.bias"] = to_second @ weights["proj_out.bias"]
    transformer.load_state_dict(weights)
    transformer.save_pretrained(folder / "transformer")
    embedded.text_encoder.save_pretrained(folder / "text_encoder")


def write_clips(out: Path, options: argparse.Namespace) -> pa.Table:
    """Four clips of each prompt and generator as mp4 files; a row each, with the referee's scores of the file."""
    shipped = LatentStore.open(shapeworld.asset_folder("candidates"))
    tests = shipped.videos.filter(pc.equal(shipped.videos["split"], "test"))
    prompts = grammar.prompts("test", options.prompts)
    backbones = {
        FIRST: Backbone(shapeworld.pipeline()),
        SECOND: Backbone(generator.load(out / "training" / "pipeline")),
    }
    rows = []
    (out / "clips").mkdir(exist_ok=True)
    for number, prompt in enumerate(tqdm(prompts, "clips", disable=None)):
        for name, backbone in backbones.items():
            paths = [out / "clips" / f"{name}-{number:03d}-{place}.mp4" for place in range(4)]
            if not all(path.exists() for path in paths):
                if name == FIRST:
                    latents = shipped.latents(tests.filter(pc.equal(tests["prompt"], prompt))["video"].to_pylist())
                else:
                    seeds = [candidate_seed(options.seed, prompt, place) for place in range(4)]
                    chance = [torch.Generator().manual_seed(seed) for seed in seeds]
                    call = {**shapeworld.CALL, "output_type": "latent"}
                    latents = backbone.pipe([prompt] * 4, generator=chance, **call).frames
                for path, frames in zip(paths, backbone.decode(latents), strict=True):
                    with files.new_file(path) as work:
                        video.write_video(work, frames, shapeworld.FPS)
            shown = np.stack([read_clip(path).frames for path in paths])
            scores = referee.batch(torch.from_numpy(shown).float() / 255, [prompt] * 4)
            for place, path in enumerate(paths):
                said = {dimension: float(scores[dimension][place]) for dimension in referee.DIMENSIONS}
                rows.append({"video": f"clips/{path.name}", "prompt": prompt, "split": "test", "model": name, **said})
    return pa.Table.from_pylist(rows)


def write_pairs(videos: pa.Table, out: Path) -> None:
    """All pairs of a prompt's clips, as VideoAlign writes them."""
    model = dict(zip(videos["video"].to_pylist(), videos["model"].to_pylist()))
    for name in (FIRST, SECOND):
        some = videos.filter(pc.equal(videos["model"], name))
        print(name, {each: round(float(pc.mean(some[each]).as_py()), 3) for each in referee.DIMENSIONS})
    with files.new_file(out / "pairs.csv") as path, open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path_A", "path_B", "A_model", "B_model", "prompt", "split", "VQ", "MQ", "TA", "Overall"])
        for pair in pairs_from_scores(videos, referee.TIE_MARGINS).to_pylist():
            sides = pair["video_a"], pair["video_b"]
            labels = [WORDS[pair[name]] for name in referee.DIMENSIONS]
            table.writerow([*sides, *(model[side] for side in sides), pair["prompt"], pair["split"], *labels])


def report(out: Path) -> None:
    """Print the accuracy per pair of generators, and the second's less the first's on the same prompts."""
    metrics = files.read_json(out / "evaluation" / "metrics.json")
    rows = [row for row in metrics["generators"] if row["dimension"] == "overall"]
    for row in rows:
        keys = ("t", "model_a", "model_b", "decided_pairs", "prompts", "without_ties", "without_ties_ci95")
        print(*(row[key] for key in (*keys, "judge_share", "people_share")))
    for block in Measurement.load(out / "evaluation" / "scores.parquet").blocks:
        if block.dimension != "overall":
            continue
        sides = [block.decided & (block.models[0] == name) & (block.models[1] == name) for name in (SECOND, FIRST)]
        values = np.stack([column for side in sides for column in (block.right & side, side)], 1).astype(float)
        low, high = prompt_interval(values, block.prompts, difference) or (np.nan, np.nan)
        print(f"t {block.t:g}: {SECOND} less {FIRST} {difference(values.sum(0)):+.3f} ({low:+.3f} to {high:+.3f})")


def difference(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


def resumed(folder: Path) -> tuple[str, ...]:
    return ("--resume",) if folder.exists() else ()


def prism(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "prism", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
