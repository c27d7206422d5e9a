"""The film strips of the demo: candidates at a cut and finished, and where the query looks on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone.conditioning import noisy_name
from prism.backbone.interceptor import capture, state_kept
from prism.experiments import gaze
from prism.experiments.contest import Contest
from prism.judge import Judge
from prism.report import wording
from prism.report.page import FilmRow, FilmStrip


def candidates(contest: Contest, name: str, which: str) -> list[FilmStrip]:
    """All candidates of a prompt for the page: the pick of the early plan `name` and the last by the referee as videos,
    then, the pick first and the later dropped before the earlier, the model's expectation at the first cut and the
    finished videos.

    which: how the prompt was chosen, for the title.
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
    videos = [video.numpy() for video in contest.videos]
    at_cut = [FilmRow(f"seed {seeds[c]}", expected[c].numpy(), note, picked=c == chosen) for c, note in fate.items()]
    at_end = [FilmRow(f"seed {seeds[c]}", videos[c], f"referee {values[c]:.2f}", picked=c == chosen) for c in fate]
    worst = int(np.argmin(values))
    shown = [(f"The pick, seed {seeds[chosen]}:", chosen)]
    if worst != chosen:
        shown.append((f"The worst of the {len(seeds)}, seed {seeds[worst]}:", worst))
    clips = [FilmRow(label, videos[c], f"referee {values[c]:.2f}, {fate[c]}", picked=c == chosen) for label, c in shown]
    gain = f"The pick is at {values[chosen]:.2f} by the referee, its {len(seeds)} candidates at {values.mean():.2f} on "
    gain += f"average and at {values.max():.2f} at best."
    steps = contest.call["num_inference_steps"]
    return [
        FilmStrip(f"{which}: “{contest.prompt}”", caption=gain, clips=clips),
        FilmStrip(
            f"The same at the first cut, step {first['step']} of {steps}",
            at_cut,
            "How the model expects each to end, decoded for this page alone: the judge reads hidden states.",
        ),
        FilmStrip(
            "If all candidates had been finished",
            at_end,
            "The strategy early finishes the first of these and no other.",
        ),
    ]


def chosen_prompts(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The prompts with the largest, the median and the smallest gain of a plan's first judge, with how to call each."""
    gains = [record["values"]["overall"][record["picks"][name][0]] - np.mean(record["values"]["overall"])
             for record in records]  # fmt: skip
    order = sorted(range(len(records)), key=lambda place: -gains[place])
    places = {"The largest gain": 0, "The median gain": len(order) // 2, "The smallest gain": len(order) - 1}
    shown: dict[int, str] = {}
    for which, place in places.items():
        shown.setdefault(order[place], f"{which} of {len(order)} prompts")
    return [(which, records[place]) for place, which in shown.items()]


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
    """The clean latents that the denoiser expects of each candidate at a step (1-based): z - sigma v of the conditional
    pass.
    """
    pipe, prompts, taken = backbone.pipe, [prompt] * len(seeds), {}

    def take(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        taken[index + 2] = tensors["latents"], pipe.scheduler.timesteps[index + 1]
        if index + 2 == step:
            pipe._interrupt = True
        return tensors

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {**call, "generator": generators, "output_type": "latent"}
    if step == 1:  # no step ends before it
        given = capture(pipe, backbone.denoisers, {"prompt": prompts, **call})
        first = given[noisy_name(given, backbone.family)], given[backbone.family.timestep_argument]
        rows = backbone.family.conditional(len(first[0]), len(seeds))
        taken[1] = first[0][rows], first[1][rows][0]
    else:
        with state_kept(pipe):  # the next call must not be found interrupted
            pipe(prompts, callback_on_step_end=take, **call)
    noisy, timestep = taken[step]
    conditioning = backbone.condition(prompts, **{name: call[name] for name in call if name != "generator"})
    arguments = conditioning.call(noisy, timestep.expand(len(seeds)))
    _, output = backbone.read(arguments, backbone.num_blocks, stop=False)
    velocity = output[0] if isinstance(output, tuple) else output.sample
    return noisy - float(timestep) / 1000 * velocity
