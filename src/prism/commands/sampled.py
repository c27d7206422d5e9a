"""The words and rows of a run of `prism sample`: its costs, a loser to see beside the winner, the referee's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from prism.commands.sample import Sample
    from prism.report.page import FilmRow, FilmStrip
    from prism.report.rows import BestOfNRow, CutRow

NOTES = (
    "The winner is the candidate that the judge rates highest at the last cut. Its video is what the stock pipeline "
    "gives for its seed: bit for bit where candidates are sampled one by one, to rounding where they share a batch.",
    "One run shows neither that the judge chose well nor how much choosing gains: nobody has rated these candidates, "
    "and most losers were never finished. The demo and prism eval measure that, over many prompts.",
)


def notes_of(result: Any, n: int, guidance: str | None = None) -> tuple[str, ...]:
    """Notes about a run whose candidates were judged, n of them in a round, or guided by the judge as the text says."""
    edits = result.top[0].edits
    if guidance is not None:
        line = f": {result.reproduce}" if result.reproduce else ""
        return (
            "After steps of the scheduler the latents of every candidate were pushed along the gradient of the judge's "
            f"score ({guidance}); the stock pipeline gives the winner's video with a callback that does so{line}. A "
            "score of the judge that guided says less about a video than that of one that did not.",
            NOTES[1],
        )
    if result.stop is not None:
        return (
            "Each round has a winner by its own cuts; finished and put back to one noise level, these were judged once "
            f"more, and the best of them is the winner. {stopped(asdict(result.stop), n)}",
            NOTES[1],
        )
    if not edits:
        return NOTES
    steps = sorted({edit.step for edit in edits})
    return (
        "The winner is the candidate that the judge rates highest at the last cut. It parted from its seed after step "
        f"{' and '.join(map(str, steps))}, by fresh noise; the stock pipeline gives its video with a callback that "
        f"adds that noise{': ' + result.reproduce if result.reproduce else ''}.",
        NOTES[1],
    )


def row_of(
    config: Sample, backbone: Any, judge: Any, call: Mapping[str, Any], result: Any, num_draws: int
) -> BestOfNRow:
    """The run as a row of "best_of_n" in metrics.json: costs alone, as no referee measures the gain.

    num_draws: noise draws of the full Best-of-N that the costs are compared with.
    """
    from prism.backbone.arguments import normalised
    from prism.sampling.plan import Workload
    from prism.sampling.strategies import Full, kind_of

    ledger, kind, n = result.ledger, kind_of(config.strategy), len(result.seeds)
    settings = kind.settings([cut for cut in result.scores if cut.get("round", 1) == 1])
    whole = normalised({**call, "output_type": "latent"})
    steps = backbone.steps({**whole, **backbone.batch([config.prompt or ""], [0], whole)})
    everything = Full(num_draws=num_draws).rows(Workload.of(backbone, call, n, judge.tap if judge else 0, steps))
    row: BestOfNRow = {
        "judge": "prism" if judge else None,
        "head_seed": judge.trained_on.get("seed") if judge else None,
        "strategy": config.strategy,
        "n": n,
        "num_inference_steps": backbone.num_inference_steps(dict(call)),
        "guidance_scale": call.get("guidance_scale"),
        "schedule": settings["schedule"],
        "draft_steps": settings["draft_steps"],
        "judge_at": settings["judge_at"],
        "set": "prompt",
        "prompts": 1,
        "referee_gain": None,
        "referee_gain_ci95": None,
        "oracle_share": None,
        "oracle_share_ci95": None,
        "denoiser_rows": ledger.denoiser_rows,
        "denoiser_share_of_full": ledger.denoiser_rows / everything,
        "vae_decodes": ledger.vae_decodes,
        "head_calls": ledger.head_calls,
        "seconds": ledger.seconds,
    }
    if "look" in settings:
        row["look"] = settings["look"]
    if "draft_cache" in settings:
        row["draft_cache"] = settings["draft_cache"]
    if config.guidance_by_judge is not None:
        row["guidance_by_judge"] = config.guidance_by_judge
    return row


def written(
    folder: Path, backbone: Any, picks: Sequence[Any], fps: float, call: Mapping[str, Any]
) -> tuple[list[str], list[np.ndarray]]:
    """Write the winners, best first: their files' names in the folder, and their frames (none of sounds).

    A video of one frame is a picture, written without loss. One with a sound has the frame rate of its call, so that
    the two last equally long.
    """
    from prism import video as media
    from prism.backbone.sounds import sampling_rate, soundtrack, write_sound
    from prism.report.page import png

    rate = sampling_rate(backbone.pipe, backbone.family)
    videos = [] if rate else [media.frames(pick.video) for pick in picks]
    pictures = bool(videos) and len(videos[0]) == 1
    ending = "wav" if rate else "png" if pictures else "mp4"
    names = [f"winner.{ending}", *(f"winner-{rank}.{ending}" for rank in range(2, len(picks) + 1))]
    for row, (name, pick) in enumerate(zip(names, picks)):
        if rate:
            write_sound(folder / name, pick.video, rate)
        elif pictures:
            (folder / name).write_bytes(png((videos[row][0] * 255).round().astype("uint8")))
        else:
            sound = soundtrack(backbone.pipe, backbone.family, pick.output)
            own = None if sound is None else call.get("frame_rate", backbone.default("frame_rate"))
            media.write_video(folder / name, videos[row], own or fps, sound=sound)
    return names, videos


def named_cut(cut: Mapping[str, Any], strategy: str, weights: Mapping[str, float]) -> CutRow:
    """A cut of a run for the report, named by its round too where there are several."""
    from prism.report.metrics import cut_entry

    entry = cut_entry(cut, strategy, weights)
    return {**entry, "name": f"round {cut['round']}, {entry['name']}"} if "round" in cut else entry


def stopped(stop: Mapping[str, Any], n: int) -> str:
    """How a run with --until ended, in a sentence."""
    rounds = f"{stop['rounds']} round{'s' if stop['rounds'] > 1 else ''} of {n}"
    clips = f"{stop['clips']} clips of {'its prompt' if stop['same_prompt'] else 'all prompts'}"
    why = "That was enough" if stop["reached"] else "The candidates ran out before it was enough"
    return (
        f"It is preferred to the reference's {clips} with probability {stop['probability']:.2f} ({stop['dimension']} "
        f"at t = {stop['t']:g}). {why}, after {rounds}."
    )


def loser_of(backbone: Any, prompt: str, call: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[FilmRow]:
    """The candidate that the judge rated lowest at the first cut, finished by the stock pipeline."""
    import torch

    from prism import video as media
    from prism.report import wording
    from prism.report.page import FilmRow

    if not metrics["cuts"] or metrics.get("until"):  # scores compare within one cut
        return []
    scores = metrics["cuts"][0]["scores"]
    last = int(min(scores, key=scores.__getitem__))
    if last == metrics["winner"]:
        return []
    seed = metrics["seeds"][last]
    generator = torch.Generator("cpu").manual_seed(seed)
    video = media.frames(backbone.pipe(prompt, generator=generator, **{**call, "output_type": "np"}).frames[0])
    measured, _ = refereed(video, prompt)
    note = f"seed {seed}, judge {wording.signed(scores[str(last)])}"
    return [FilmRow("rated lowest", video, note + (f", referee {measured['overall']:.2f}" if measured else ""))]


SHOWN = 24  # candidates of a cut on the page


def preview_strips(result: Any, cuts: Sequence[CutRow], fps: float) -> list[FilmStrip]:
    """A strip per cut that has previews: its candidates by score, those that were kept marked.

    cuts: the rows "cuts" of metrics.json.
    """
    from prism.report import wording
    from prism.report.page import FilmRow, FilmStrip

    strips = []
    for cut in cuts:
        videos = (result.previews or {}).get(cut["step"], {})
        ranked = sorted(cut["scores"], key=lambda candidate: -cut["scores"][candidate])
        clips = [
            FilmRow(
                f"seed {result.seeds[int(candidate)]}",
                videos[int(candidate)],
                f"judge {wording.signed(cut['scores'][candidate])}",
                picked=int(candidate) in cut["kept"],
            )
            for candidate in ranked[:SHOWN]
            if int(candidate) in videos
        ]
        if clips:
            kept = sum(clip.picked for clip in clips)
            more = f" The best {SHOWN} are shown." if len(ranked) > SHOWN else ""
            caption = f"{len(ranked)} candidates, the highest score first; outlined: the {kept} that went on.{more}"
            strips.append(FilmStrip(f"{cut['name'][0].upper()}{cut['name'][1:]}", (), caption, clips, fps))
    return strips


def refereed(video: np.ndarray, prompt: str | None) -> tuple[dict[str, float] | None, str]:
    """The scores of ShapeWorld's referee for a video (T, H, W, 3) of the embedded model, and a sentence about them.

    The scores are None for a prompt or a size that the referee cannot measure; the sentence says why.
    """
    import torch

    from prism.shapeworld import grammar, referee, world

    if prompt is None or grammar.parse(prompt) is None:
        return None, (
            f"No referee has scored this video: the prompt “{prompt}” is outside the grammar of ShapeWorld, the small "
            "world that the embedded model knows, which docs/shapeworld.md describes."
        )
    if video.shape != (world.FRAMES, world.SIZE, world.SIZE, 3):
        return None, (
            f"No referee has scored this video: it measures {world.FRAMES} frames of {world.SIZE} by {world.SIZE} "
            f"pixels, and these are {' × '.join(map(str, video.shape[:3]))}."
        )
    scores = referee.score(torch.as_tensor(video), prompt)
    listed = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    return (
        scores,
        f"The referee of ShapeWorld, which knows what the prompt asks for, gives the winner {listed} of 1.",
    )
