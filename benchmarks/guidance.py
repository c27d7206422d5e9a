"""Guidance by the judge on ShapeWorld: how far its own score rises, and what judges that do not guide say.

`python benchmarks/guidance.py --out runs/guidance` plays each arm on each prompt with one seed, a line per prompt; a
stopped run goes on. Validation prompts come first: of their arms the look and the strength with the highest mean of the
referee is the setting that test prompts decide about; they are played with all strengths of that look. Beside them
stand the plain call and Best-of-N with a budget of the guided call's rows, both of the same seed. At the end a head of
another seed is trained on the store that ships, scores all latents, and summary.md and guidance.svg are written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import prism
from prism import shapeworld
from prism.evaluation import clustered_bootstrap
from prism.lab.pixel import PixelJudge
from prism.sampling import Guidance
from prism.sampling.plan import generator_of
from prism.shapeworld import grammar, referee

CALL = {**shapeworld.CALL, "output_type": "latent"}
STRENGTHS = {"validation": (0.1, 0.2, 0.4, 0.8), "test": (0.1, 0.4, 0.8, 1.6)}
PLAIN, BEST = "plain", "best-of-n"
T, DRAWS = 700.0, 4  # at which finished latents are scored, with noise that guides nothing
SEED = 5_000  # of the plain call
COLUMNS = {"guide": "guiding judge", "other": "judge of another seed", "pixel": "pixel judge",
           "referee": "referee", "VQ": "VQ", "MQ": "MQ", "TA": "TA"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--validation", type=int, default=6, help="prompts that choose")
    parser.add_argument("--test", type=int, default=24, help="prompts that are reported")
    parser.add_argument("--head-steps", type=int, default=100, help="training steps of the second head")
    parser.add_argument("--report", action="store_true", help="play nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    judge = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), pipe)
    pixel = PixelJudge.from_pretrained(shapeworld.asset_folder("pixel"), judge.backbone)
    arms = {f"{look} {strength}": Guidance(strength, look) for look in ("ahead", "now")
            for strength in STRENGTHS["validation"]}  # fmt: skip
    lines = {split: read(options.out / f"{split}.jsonl") for split in ("validation", "test")}
    if not options.report:
        play(judge, pixel, "validation", options.validation, arms, lines["validation"], options.out)
    chosen, table = choose(lines["validation"])
    look = chosen.split()[0]
    arms = {f"{look} {strength}": Guidance(strength, look) for strength in STRENGTHS["test"]}
    if not options.report:
        play(judge, pixel, "test", options.test, arms, lines["test"], options.out)
    second = other_head(pipe, options.out / "head", options.head_steps)
    for line in lines["test"]:
        latents = [load_file(options.out / line["latents"][name])[name] for name in line["arms"]]
        scores = finished_scores(second, torch.stack(latents), line["prompt"])
        for arm, score in zip(line["arms"].values(), scores):
            arm["other"] = score
    text = f"{table}\n{markdown(lines['test'], chosen)}"
    (options.out / "summary.md").write_text(text)
    draw(lines["test"], options.out / "guidance.svg")
    print(text)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, those of one prompt joined; one that a kill left unfinished is cut off."""
    if not path.exists():
        return []
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    path.write_bytes(whole + end)
    joined: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, whole.splitlines()):
        known = joined.setdefault(line["prompt"], {**line, "arms": {}, "latents": {}})
        known["arms"] |= line["arms"]
        known["latents"] |= line["latents"]
    return list(joined.values())


def play(
    judge: Any, pixel: Any, split: str, count: int, arms: Mapping[str, Guidance], lines: list[dict[str, Any]], out: Path
) -> None:
    """Play the arms that a prompt lacks; they are added to the file and to `lines`."""
    by_prompt = {line["prompt"]: line for line in lines}
    for number, prompt in enumerate(grammar.prompts(split, count)):
        line = by_prompt.get(prompt) or {"prompt": prompt, "arms": {}, "latents": {}}
        missing = {name: arm for name, arm in {PLAIN: None, **arms}.items() if name not in line["arms"]}
        if not missing:
            continue
        latents: dict[str, torch.Tensor] = {}
        rows: dict[str, float] = {}
        run = {"seed": SEED + 100 * number, "batch_size": 1, **CALL}
        for name, guidance in missing.items():
            result = prism.best_of_n(
                judge.backbone.pipe, judge, prompt, n=1, strategy="none", guidance_by_judge=guidance, **run
            )
            latents[name], rows[name] = result.latents[0], result.ledger.denoiser_rows
        if split == "test" and BEST not in line["arms"]:
            budget = max(rows.values()) / rows[PLAIN]
            result = prism.best_of_n(judge.backbone.pipe, judge, prompt, budget=budget, **{**run, "batch_size": None})
            latents[BEST], rows[BEST] = result.latents[0], result.ledger.denoiser_rows
        file = f"{split}-{number:03d}-{len(line['arms'])}.safetensors"
        save_file(latents, out / file)
        played = measured(judge, pixel, prompt, latents, rows)
        new = {"prompt": prompt, "latents": dict.fromkeys(played, file), "arms": played}
        with (out / f"{split}.jsonl").open("a") as lines_file:
            lines_file.write(json.dumps(new) + "\n")
        print(split, number, {name: round(arm["referee"], 3) for name, arm in played.items()}, flush=True)
    lines[:] = read(out / f"{split}.jsonl")


def measured(
    judge: Any, pixel: Any, prompt: str, latents: Mapping[str, torch.Tensor], rows: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """By arm: denoiser rows, the referee's scores, and those of the guiding and of the pixel judge."""
    stacked = torch.stack(list(latents.values()))
    with torch.no_grad():
        videos = judge.backbone.decode(stacked, None, CALL["num_frames"]).clamp(0, 1)
    seen = pixel.score_videos(videos.numpy(), prompt)[:, pixel.dimensions.index("overall")].tolist()
    guide = finished_scores(judge, stacked, prompt)
    scores = [referee.score(video, prompt) for video in videos]
    return {
        name: {"rows": rows[name], "guide": guide[row], "pixel": seen[row], "referee": scores[row]["overall"],
               **{dimension: scores[row][dimension] for dimension in ("VQ", "MQ", "TA")}}
        for row, name in enumerate(latents)
    }  # fmt: skip


def finished_scores(judge: Any, latents: torch.Tensor, prompt: str) -> list[float]:
    """A judge's overall scores of finished latents (B, ...), under the same noise for all."""
    mean, _ = judge.score_clean(latents, prompt, T, num_draws=DRAWS, generator=generator_of(77), **CALL)
    return mean[:, judge.dimensions.index("overall")].tolist()


def other_head(pipe: Any, folder: Path, steps: int) -> Any:
    """A head of another seed, trained on the store that ships; it guides nothing."""
    if not (folder / "config.json").exists():
        store = prism.LatentStore.open(shapeworld.asset_folder("candidates"))
        fresh = prism.Judge.untrained(pipe, tap=4, dimensions=store.dimensions, seed=1)
        config = prism.TrainConfig(steps=steps, learning_rate=5e-4, schedule="cosine", warmup_steps=10, seed=1)
        prism.train(store, fresh, config, out=folder.parent / "train", progress=False)
        fresh.save_pretrained(folder)
    return prism.Judge.from_pretrained(folder, pipe)


def column(lines: Iterable[Mapping[str, Any]], arm: str, name: str) -> np.ndarray:
    """A value of an arm, per prompt."""
    return np.array([line["arms"][arm][name] for line in lines], dtype=float)


def choose(lines: list[dict[str, Any]]) -> tuple[str, str]:
    """The arm with the highest mean of the referee on validation prompts, and the table of all."""
    names = [name for name in lines[0]["arms"] if name != PLAIN]
    means = {name: column(lines, name, "referee").mean() for name in [PLAIN, *names]}
    table = [f"{len(lines)} validation prompts", "", "| arm | referee | guiding judge |", "|---|---|---|"]
    table += [f"| {name} | {means[name]:.4f} | {column(lines, name, 'guide').mean():.2f} |" for name in means]
    return max(names, key=means.__getitem__), "\n".join(table) + "\n"


def markdown(lines: list[dict[str, Any]], chosen: str) -> str:
    """The table of test prompts: each arm minus the plain call, and minus Best-of-N at equal cost."""
    prompts = [line["prompt"] for line in lines]
    shown = [name for name in COLUMNS if all(name in arm for line in lines for arm in line["arms"].values())]
    text = [f"{len(lines)} test prompts, one seed each; chosen on validation prompts: {chosen}"]
    for against in (PLAIN, BEST):
        text += ["", f"minus {against}", "", f"| arm | rows | {' | '.join(COLUMNS[name] for name in shown)} |",
                 "|---" * (len(shown) + 2) + "|"]  # fmt: skip
        for arm in lines[0]["arms"]:
            if arm in (against, PLAIN):
                continue
            cells = [f"{column(lines, arm, 'rows').mean():.1f}"]
            for name in shown:
                difference = column(lines, arm, name) - column(lines, against, name)
                low, high = clustered_bootstrap(difference, prompts)
                cells.append(f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})")
            text.append(f"| {arm} | {' | '.join(cells)} |")
    plain = ", ".join(f"{COLUMNS[name]} {column(lines, PLAIN, name).mean():.3f}" for name in shown)
    spread = ", ".join(f"{COLUMNS[name]} {column(lines, PLAIN, name).std(ddof=1):.3f}" for name in shown)
    return "\n".join([*text, "", f"The plain call: {plain}. Standard deviation over prompts: {spread}."]) + "\n"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The gain of each judge by strength, in standard deviations of the plain call over prompts."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "prism", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    prompts = [line["prompt"] for line in lines]
    arms = [name for name in lines[0]["arms"] if name not in (PLAIN, BEST)]
    strengths = [float(name.split()[1]) for name in arms]
    figure, axes = pyplot.subplots(figsize=(5.6, 3.2), layout="constrained")
    styles = {"guide": ("#c1440e", "-"), "other": ("#1f6fb4", "--"), "pixel": ("#3a8f5c", "--"), "referee": ("k", "-")}
    for name, (color, style) in styles.items():
        if not all(name in arm for line in lines for arm in line["arms"].values()):
            continue
        spread = column(lines, PLAIN, name).std(ddof=1)
        gains = [(column(lines, arm, name) - column(lines, PLAIN, name)) / spread for arm in arms]
        ends = np.array([clustered_bootstrap(gain, prompts) for gain in gains]).T
        means = [gain.mean() for gain in gains]
        axes.plot(strengths, means, style, color=color, marker="o", markersize=3, label=COLUMNS[name])
        axes.fill_between(strengths, *ends, color=color, alpha=0.12, linewidth=0)
        best = ((column(lines, BEST, name) - column(lines, PLAIN, name)) / spread).mean()
        axes.plot([strengths[-1] * 1.25], [best], "D", color=color, markersize=4)
    axes.axhline(0, color="0.6", linewidth=0.7)
    axes.set_xscale("log")
    axes.set_xticks([*strengths, strengths[-1] * 1.25], [*map(str, strengths), "Best-\nof-N"])
    axes.minorticks_off()
    axes.set_xlabel("strength of guidance, in steps of the sampler")
    axes.set_ylabel("minus the plain call, in its s.d.")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
