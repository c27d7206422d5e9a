"""The demo: train a head on labelled candidates, measure it by noise level on unseen prompts, pick the best of 8 with
every strategy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism import files, media, shapeworld
from prism.experiments import compare
from prism.experiments.loading import EMBEDDED, describe
from prism.experiments.sample import cut_entry
from prism.report.metrics import document, write_config
from prism.report.page import FilmRow, FilmStrip, write_report

NOTES = (
    "It shows that a small head on the hidden states of a frozen video diffusion model learns to tell its better "
    "samples from its worse ones, from noisy latents, on prompts it never saw; and that this is enough to drop most "
    "candidates early at a fraction of the cost.",
    "It does not show that the same numbers hold for large models and human raters: the model, its world and the "
    "referee are small, and the referee is a program. All that was run here runs unchanged on a real pipeline with "
    "real pairs.",
    "Schedules, noise levels and the head's settings were fixed on validation prompts before the test prompts were "
    "looked at.",
)


@dataclass(frozen=True)
class DemoConfig:
    """Everything the demo fixes beforehand."""

    seed: int = 0
    fresh: bool = False
    n: int = 8
    prompts: int = 32  # of the test split, for Best-of-N; accuracy uses all of it
    tap: int = 4
    dim: int = 256
    steps: int = 600
    prompts_per_step: int = 4
    learning_rate: float = 5e-4
    schedule: tuple[tuple[int, int], ...] = ((3, 4), (7, 1))
    draft_steps: int = 3
    judge_at: float = 700.0
    num_draws: int = 2


def strategies(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """The arguments of `best_of_n` by row of the table."""
    clean = {"judge_at": config.judge_at, "num_draws": config.num_draws}
    return {
        "none": {"strategy": "none"},
        "random": {"strategy": "random"},
        "full": {"strategy": "full", **clean},
        "early": {"strategy": "early", "schedule": config.schedule},
        "draft": {"strategy": "draft", "draft_steps": config.draft_steps, **clean},
    }


def run(
    out: Path, fresh: bool = False, seed: int = 0, overwrite: bool = False, config: DemoConfig | None = None
) -> dict[str, Any]:
    """Run the demo and write metrics.json, report.html, winner.mp4, config.json and the trained head to `out`; returns
    the metrics.
    """
    config = replace(config or DemoConfig(), seed=seed, fresh=fresh)
    with files.new_folder(out, overwrite) as folder:
        from prism.backbone import Backbone
        from prism.evaluation import evaluate
        from prism.judge import Judge
        from prism.preference import LatentStore
        from prism.shapeworld import candidates, referee
        from prism.training import TrainConfig, train

        started = time.perf_counter()
        timings: dict[str, float] = {}

        def lap(name: str) -> None:
            timings[name] = time.perf_counter() - started - sum(timings.values())

        backbone, call = Backbone(shapeworld.pipeline()), dict(shapeworld.CALL)
        if fresh:
            candidates.run(folder / "candidates", seed=seed + 1, backbone=backbone)
        store = LatentStore.open(folder / "candidates" if fresh else shapeworld.asset_folder("candidates"))
        lap("data")

        judge = Judge.untrained(backbone, tap=config.tap, dim=config.dim, seed=seed)
        settings = TrainConfig(
            steps=config.steps,
            prompts_per_step=config.prompts_per_step,
            learning_rate=config.learning_rate,
            schedule="cosine",
            warmup_steps=20,
            checkpoint_every=0,
            seed=seed,
        )
        trained = train(store, judge, settings, folder / "training")
        (folder / "training" / "head").replace(folder / "head")
        lap("train")

        accuracy = evaluate(judge, store, "test", seed=seed)
        lap("evaluate")

        def value(video: Any, prompt: str) -> float:
            return referee.score(video, prompt)["overall"]

        prompts = shapeworld.prompts("test")[: config.prompts]
        done = compare.compare(judge, value, prompts, strategies(config), call, config.n, seed=10_000 * (seed + 1))
        picks = compare.rows(done, judge, call, "test", seed)
        lap("best_of_n")

        shown = _most_telling(done)
        strip, cuts = _film(judge, done, shown, call)
        result = done.results["early"][shown]
        media.write_video(folder / "winner.mp4", np.asarray(result.video), shapeworld.FPS)
        write_config(folder / "config.json", {**asdict(config), "call": call})
        metrics = document(
            "demo",
            describe(backbone, EMBEDDED),
            seed,
            accuracy=accuracy,
            best_of_n=picks,
            timings={**timings, "total": time.perf_counter() - started},
            training={key: trained[key] for key in ("steps", "seconds", "pairs", "prompts")},
            over_random=[compare.over_random(done, name, seed) for name in ("full", "early", "draft", "oracle")],
            prompt=prompts[shown],
            seeds=list(result.seeds),
            winner=result.index,
            cuts=cuts,
            ledger=result.ledger.to_dict(),
        )
        files.write_json(folder / "metrics.json", metrics)
        title = "PRISM: the best of eight, chosen early"
        write_report(folder / "report.html", metrics, strip, title, NOTES, files.read_json(folder / "config.json"))
    return metrics


def _most_telling(done: compare.Comparison) -> int:
    """The prompt of the film strips: where the candidates differ most by the referee, whatever the judge made of it."""
    return int(np.argmax([values.std() for values in done.values]))


def _film(
    judge: Any, done: compare.Comparison, place: int, call: Mapping[str, Any]
) -> tuple[list[FilmStrip], list[dict[str, Any]]]:
    """Film strips of all candidates of a prompt, the pick first, then the later dropped before the earlier: what the
    model expected at the first cut, and the finished videos. Beside them the cuts, for the table of scores.
    """
    early, best = done.results["early"][place], done.results["oracle"][place]
    prompt, values, first = done.prompts[place], done.values[place], early.scores[0]
    fate: dict[int, str] = {}
    for cut in reversed(early.scores):
        scores = dict(zip(cut["candidates"], cut["scores"]["overall"], strict=True))
        for candidate in sorted(scores, key=lambda candidate: -scores[candidate]):
            verb = "kept" if candidate in cut["kept"] else "dropped"
            fate.setdefault(candidate, f"{verb} at step {cut['step']}, judge {scores[candidate]:+.2f}")
    order = list(fate)
    expected = judge.backbone.decode(_expected_clean(judge.backbone, prompt, early.seeds, first["step"], call))
    assert best.candidate_latents is not None
    finished = judge.backbone.decode(torch.stack([best.candidate_latents[c] for c in order]))
    at_cut = [FilmRow(f"seed {early.seeds[c]}", expected[c].numpy(), fate[c], picked=c == early.index) for c in order]
    at_end = [
        FilmRow(f"seed {early.seeds[c]}", video.numpy(), f"referee {values[c]:.2f}", picked=c == early.index)
        for c, video in zip(order, finished, strict=True)
    ]
    steps = call["num_inference_steps"]
    strips = [
        FilmStrip(
            f"“{prompt}”: at the first cut, step {first['step']} of {steps}",
            at_cut,
            "What the model expects each video to become, decoded for this page alone: the judge reads hidden states.",
        ),
        FilmStrip(
            f"“{prompt}”: had all been finished",
            at_end,
            "The early strategy finishes the first of these alone. The prompt is the one whose candidates differ most.",
        ),
    ]
    return strips, [cut_entry(cut, "early", {"overall": 1.0}) for cut in early.scores]


@torch.no_grad()
def _expected_clean(backbone: Any, prompt: str, seeds: tuple[int, ...], step: int, call: Mapping[str, Any]) -> Tensor:
    """The clean latents that the denoiser expects of each candidate at a step: z - sigma v of the conditional pass."""
    pipe, taken = backbone.pipe, {}

    def take(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        taken[index] = (
            tensors["latents"],
            float(pipe.scheduler.sigmas[index + 1]),
            pipe.scheduler.timesteps[min(index + 1, step)],
        )
        if index + 2 > step:
            pipe._interrupt = True
        return tensors

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe([prompt] * len(seeds), generator=generators, output_type="latent", callback_on_step_end=take, **call)
    noisy, sigma, timestep = taken[step - 2]
    conditioning = backbone.condition([prompt] * len(seeds), **call)
    arguments = conditioning.call(noisy, timestep.expand(len(seeds)))
    _, output = backbone.read(arguments, backbone.num_blocks, stop=False)
    velocity = output[0] if isinstance(output, tuple) else output.sample
    return noisy - sigma * velocity
