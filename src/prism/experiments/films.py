"""The film strips of the demo: candidates at a cut and finished, and where the query looks on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.experiments import gaze
from prism.experiments.contest import Contest
from prism.judge import Judge
from prism.report import wording
from prism.report.page import FilmRow, FilmStrip


def candidates(contest: Contest, name: str) -> list[FilmStrip]:
    """All candidates of a prompt, the pick of the early plan `name` first, then the later dropped before the earlier:
    what the model expected at the first cut, and the finished videos.
    """
    cuts, seeds, values = contest.fate(name, 0), contest.seeds, contest.values["overall"]
    first, chosen = cuts[0], cuts[-1]["kept"][0]
    fate: dict[int, str] = {}
    for cut in reversed(cuts):
        scores = dict(zip(cut["candidates"], cut["scores"]["overall"], strict=True))
        for candidate in sorted(scores, key=lambda candidate: -scores[candidate]):
            verb = "kept" if candidate in cut["kept"] else "dropped"
            fate.setdefault(candidate, f"{verb} at step {cut['step']}, judge {wording.signed(scores[candidate])}")
    backbone = contest.panel.backbone
    clean = _expected_clean(backbone, contest.prompt, seeds, first["step"], contest.call)
    expected = backbone.decode(clean).cpu()
    at_cut = [FilmRow(f"seed {seeds[c]}", expected[c].numpy(), note, picked=c == chosen) for c, note in fate.items()]
    at_end = [
        FilmRow(f"seed {seeds[c]}", contest.videos[c].numpy(), f"referee {values[c]:.2f}", picked=c == chosen)
        for c in fate
    ]
    steps = contest.call["num_inference_steps"]
    return [
        FilmStrip(
            f"“{contest.prompt}”: at the first cut, step {first['step']} of {steps}",
            at_cut,
            "What the model expects each video to become, decoded for this page alone: the judge reads hidden states.",
        ),
        FilmStrip(
            f"“{contest.prompt}”: had all been finished",
            at_end,
            "The early strategy finishes the first of these alone. The prompt is the one whose candidates differ most.",
        ),
    ]


def looks(
    judge: Judge, records: Sequence[Mapping[str, Any]], t: float, call: Mapping[str, Any], seed: int
) -> list[FilmStrip]:
    """For each prompt its best and its worst candidate by the referee, and the attention over their frames."""
    strips, backbone = [], judge.backbone
    for record in records:
        values = record["values"]["overall"]
        pair = [int(np.argmax(values)), int(np.argmin(values))]
        generators = [torch.Generator().manual_seed(record["seeds"][c]) for c in pair]
        prompts = [record["prompt"]] * len(pair)
        latents = backbone.pipe(prompts, generator=generators, output_type="latent", **call).frames
        attention = gaze.look(judge, latents, record["prompt"], t, call, seed)
        videos, top = backbone.decode(latents).cpu(), float(attention.max())
        cells = gaze.object_cells(videos, record["prompt"], attention.shape[1:])
        rows = []
        for which, c, video, weights, share in zip(
            ("best", "worst"), pair, videos, attention, gaze.shares(attention, cells), strict=True
        ):
            rows.append(FilmRow(f"{which} of {len(values)}", video.numpy(), f"referee {values[c]:.2f}"))
            note = (
                f"{wording.percent(share['attention'], 0)} on objects, {wording.percent(share['area'], 0)} of the cells"
            )
            rows.append(FilmRow("where the query looks", gaze.overlaid(video.numpy(), weights.numpy(), top), note))
        strips.append(FilmStrip(f"“{record['prompt']}”", rows))
    return strips


@torch.no_grad()
def _expected_clean(backbone: Any, prompt: str, seeds: Sequence[int], step: int, call: Mapping[str, Any]) -> Tensor:
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
