"""Attention of a head's query on the token grid: its share on objects, rows of metrics.json, and film strips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone.wrapping import capture, state_restored
from prism.evaluation import prompt_interval
from prism.judge import Judge
from prism.lab.contest import Contest
from prism.report import wording
from prism.report.page import FilmRow, FilmStrip
from prism.report.rows import AttentionRow
from prism.shapeworld import grammar, world

SEEN = 0.2  # a pixel belongs to an object where its RGB distance from the ground is larger
CELL = 0.1  # a cell belongs to an object where a larger share of its pixels, over its frames, does
CHOSEN = {"best": np.argmax, "worst": np.argmin}  # which of a prompt's candidates, by the referee's score
TINT = np.array([1.0, 0.36, 0.10])


def look(judge: Judge, latents: Tensor, prompt: str, t: float, call: Mapping[str, Any], seed: int) -> Tensor:
    """(B, T, H, W) weights on the token grid for finished latents (B, ...), re-noised to t with one draw for all."""
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
    noisy = judge.backbone.add_noise(latents, t, noise.to(latents).expand_as(latents))
    return judge.attention(noisy, prompt, t, **call).cpu()


def object_cells(videos: Tensor, prompt: str, grid: Sequence[int]) -> Tensor:
    """(B, T, H, W) bool: the cells of the token grid of which more than the share `CELL` is not the ground.

    videos: (B, FRAMES, SIZE, SIZE, 3) in [0, 1]. Raises ValueError for a prompt outside the grammar.
    """
    scene = grammar.parse(prompt)
    if scene is None:
        raise ValueError(f"prompt {prompt!r} is outside ShapeWorld's grammar: its ground is not known")
    thing = (videos - world.ground_image(scene.ground)).norm(dim=-1) > SEEN  # (B, FRAMES, SIZE, SIZE)
    frames = torch.stack([thing[:, span].float().mean(1) for span in spans(thing.shape[1], grid[0])], 1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1)[:, None], (grid[1], grid[2]))
    return pooled.view(len(videos), *grid) > CELL


def spans(frames: int, cells: int) -> list[slice]:
    """The frames of each latent frame of a causal VAE: the first alone, then equal runs."""
    if cells == 1:
        return [slice(0, frames)]
    run = (frames - 1) // (cells - 1)
    return [slice(0, 1), *(slice(1 + run * k, 1 + run * (k + 1)) for k in range(cells - 1))]


def shares(attention: Tensor, cells: Tensor) -> list[dict[str, float]]:
    """Shares per video: "attention", the share of the video's attention that falls on cells of objects; "area", the
    share of its cells that are of objects; "video", the share of all attention (video and prompt) on the video.
    """
    total = attention.flatten(1).sum(1)
    on = (attention * cells).flatten(1).sum(1) / total
    area = cells.float().flatten(1).mean(1)
    return [
        {"attention": float(a), "area": float(b), "video": float(c)} for a, b, c in zip(on, area, total, strict=True)
    ]


def overlaid(video: np.ndarray, attention: np.ndarray, top: float | None = None) -> np.ndarray:
    """A video (FRAMES, H, W, 3) in [0, 1] with its attention (T, h, w) laid over it as a warm tint.

    The tint of a cell grows with its weight up to `top`; None: the largest weight.
    """
    top = float(attention.max()) if top is None else top
    frames, height, width = video.shape[:3]
    light = torch.as_tensor(attention, dtype=torch.float32)[:, None]
    light = torch.nn.functional.interpolate(light, (height, width), mode="bilinear", align_corners=False)[:, 0]
    weight = np.zeros((frames, height, width, 1), dtype=np.float32)
    for cell, span in enumerate(spans(frames, len(attention))):
        weight[span] = (light[cell].numpy() / max(top, 1e-12)).clip(0, 1)[..., None]
    weight = weight**0.8
    dimmed = 0.35 * video.mean(-1, keepdims=True) + 0.35 * video
    return (dimmed * (1 - weight) + weight * (0.7 * TINT + 0.5 * video)).clip(0, 1)


def rows(records: Sequence[Mapping[str, Any]], seed: int) -> list[AttentionRow]:
    """The "attention" rows of metrics.json, one per noise level, for the best and for the worst candidates of prompts.

    records: one per prompt: "prompt", "values" (n,) by the referee, "looks" t -> shares of its n candidates.
    "lift" is the mean share of attention on objects divided by their mean share of the cells; it is 1 for attention
    that ignores objects. Intervals are 95 % bootstrap intervals over prompts.
    """
    table: list[AttentionRow] = []
    for t in records[0]["looks"] if records else ():
        for which, choose in CHOSEN.items():
            chosen = [entry["looks"][t][int(choose(entry["values"]))] for entry in records]
            columns = np.array([[share["attention"], share["area"], share["video"]] for share in chosen])
            prompts = [entry["prompt"] for entry in records]
            mean = columns.mean(0)
            table.append(
                {
                    "t": float(t),
                    "candidates": which,
                    "referee": float(np.mean([choose_value(entry["values"], choose) for entry in records])),
                    "attention_share": float(mean[0]),
                    "area_share": float(mean[1]),
                    "video_share": float(mean[2]),
                    "lift": float(mean[0] / mean[1]) if mean[1] else None,
                    "lift_ci95": prompt_interval(columns, prompts, ratio, seed),
                    "prompts": len(records),
                }
            )
    return table


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first column's sum over the second's, as a statistic of `prompt_interval`."""
    return sums[:, 0] / sums[:, 1]


def choose_value(values: Sequence[float], choose: Any) -> float:
    return float(values[int(choose(values))])


def candidates(contest: Contest, name: str, which: str) -> list[FilmStrip]:
    """All candidates of a prompt for the page, in three strips.

    The first shows the pick of the early plan `name` and the worst candidate by the referee, as videos. The other two
    show all candidates as film strips: the clean latents that the denoiser expects at the first cut, decoded, and the
    finished videos. The pick comes first, the candidates that were dropped first come last.

    which: how the prompt was chosen, for the title.
    """
    cuts, seeds, values = contest.cuts_of(name, 0), contest.seeds, contest.values["overall"]
    first, chosen = cuts[0], cuts[-1]["kept"][0]
    notes: dict[int, str] = {}  # in the order of the film strips
    for cut in reversed(cuts):
        scores = dict(zip(cut["candidates"], cut["scores"]["overall"], strict=True))
        for candidate in sorted(scores, key=lambda candidate: -scores[candidate]):
            verb = "kept" if candidate in cut["kept"] else "dropped"
            notes.setdefault(candidate, f"{verb} at step {cut['step']}, judge {wording.signed(scores[candidate])}")
    backbone = contest.joint.backbone
    clean = _expected_clean(backbone, contest.prompt, seeds, first["step"], contest.call)
    expected = backbone.decode(clean).cpu()
    videos = [video.numpy() for video in contest.videos]
    at_cut = [FilmRow(f"seed {seeds[c]}", expected[c].numpy(), note, picked=c == chosen) for c, note in notes.items()]
    at_end = [FilmRow(f"seed {seeds[c]}", videos[c], f"referee {values[c]:.2f}", picked=c == chosen) for c in notes]
    worst = int(np.argmin(values))
    shown = [(f"The pick, seed {seeds[chosen]}:", chosen)]
    if worst != chosen:
        shown.append((f"The worst of the {len(seeds)}, seed {seeds[worst]}:", worst))
    clips = [
        FilmRow(label, videos[c], f"referee {values[c]:.2f}, {notes[c]}", picked=c == chosen) for label, c in shown
    ]
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
    """The prompts at which a plan's pick by the first judge has the largest, the median and the smallest gain, as
    (caption, record)."""
    gains = [record["values"]["overall"][record["picks"][name][0]] - np.mean(record["values"]["overall"])
             for record in records]  # fmt: skip
    order = sorted(range(len(records)), key=lambda index: -gains[index])
    ranks = {"The largest gain": 0, "The median gain": len(order) // 2, "The smallest gain": len(order) - 1}
    captions: dict[int, str] = {}
    for which, rank in ranks.items():
        captions.setdefault(order[rank], f"{which} of {len(order)} prompts")
    return [(caption, records[index]) for index, caption in captions.items()]


def widest(records: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The prompts whose best and worst candidates differ most, alternately with one thing and with two."""
    ordered = sorted(records, key=lambda record: -np.ptp(record["values"]["overall"]))
    kinds: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in grammar.KINDS}
    for entry in ordered:
        scene = grammar.parse(entry["prompt"])
        assert scene is not None
        kinds[scene.kind].append(entry)
    single, pair = kinds.values()
    mixed = [entry for both in zip(single, pair) for entry in both]
    return [*mixed, *(entry for entry in ordered if entry not in mixed)][:count]


def looks(
    judge: Judge, records: Sequence[Mapping[str, Any]], t: float, call: Mapping[str, Any], seed: int
) -> list[FilmStrip]:
    """A film strip per prompt: its best and its worst candidate by the referee, and the attention over their frames."""
    strips, backbone = [], judge.backbone
    for record in records:
        values = record["values"]["overall"]
        pair = [int(np.argmax(values)), int(np.argmin(values))]
        generators = [torch.Generator().manual_seed(record["seeds"][c]) for c in pair]
        prompts = [record["prompt"]] * len(pair)
        latents = backbone.pipe(prompts, generator=generators, output_type="latent", **call).frames
        attention = look(judge, latents, record["prompt"], t, call, seed)
        videos, top = backbone.decode(latents).cpu(), float(attention.max())
        cells = object_cells(videos, record["prompt"], attention.shape[1:])
        rows = []
        for which, c, video, weights, share in zip(
            ("best", "worst"), pair, videos, attention, shares(attention, cells), strict=True
        ):
            rows.append(FilmRow(f"{which} of {len(values)}", video.numpy(), f"referee {values[c]:.2f}"))
            note = (
                f"{wording.percent(share['attention'], 0)} on objects, {wording.percent(share['area'], 0)} of the cells"
            )
            rows.append(FilmRow("where the query looks", overlaid(video.numpy(), weights.numpy(), top), note))
        strips.append(FilmStrip(f"“{record['prompt']}”", rows))
    return strips


@torch.no_grad()
def _expected_clean(backbone: Any, prompt: str, seeds: Sequence[int], step: int, call: Mapping[str, Any]) -> Tensor:
    """The clean latents of each candidate that the conditional pass expects at a step (from 1): z - sigma v."""
    pipe, prompts, states = backbone.pipe, [prompt] * len(seeds), {}

    def keep_state(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        states[index + 2] = tensors["latents"], pipe.scheduler.timesteps[index + 1]
        if index + 2 == step:
            pipe._interrupt = True
        return tensors

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {**call, "generator": generators, "output_type": "latent"}
    if step == 1:  # no callback runs before the first step
        first = backbone.denoiser_call(capture(pipe, backbone.denoisers, {"prompt": prompts, **call}))
        rows = first.conditional(len(seeds))
        states[1] = first.noisy[rows], first.timestep[rows][0]
    else:
        with state_restored(pipe):  # puts the pipeline's `_interrupt` back
            pipe(prompts, callback_on_step_end=keep_state, **call)
    noisy, timestep = states[step]
    conditioning = backbone.condition(prompts, **{name: call[name] for name in call if name != "generator"})
    arguments = conditioning.call(noisy, timestep.expand(len(seeds)))
    _, output = backbone.read(arguments, backbone.num_blocks, stop=False)
    velocity = output[0] if isinstance(output, tuple) else output.sample
    return noisy - float(timestep) / 1000 * velocity
